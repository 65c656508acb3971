"""Log of touches: which thread touched which page, in order; with names, to be filtered.

Knows: touches, and the names of regions, pages and threads.
Must not know: where touches come from, and what they should have been.

Laws of this file:

* It grows by ``add`` only; who iterates has what was there when it began.
* A filter gives another log with the same names, which knows what it does not know: the kernel
  tells the first touches of a page, and if one thread's are picked, another's opened the page.
* A name that nothing has is an error: an empty log would satisfy whatever is asserted of it.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple, Self, overload

from .places import AnyPlace, AnyThread, HasPid, Layout, RegionLike, Stretch, stretch_of, tids_of
from .touches import Access, Touch

_SHOWN: Final = 20  # touches in a message; who wants all prints the record


class TouchedPage(NamedTuple):
    """A page that was touched: its region, its number, its name or else ``""``."""

    region: str
    page: int
    name: str

    def __str__(self) -> str:
        return f"{self.region}[{self.name or self.page}]"


class TouchingThread(NamedTuple):
    """A thread that touched something: its process, its id, its name or else ``""``."""

    process: int
    thread: int
    name: str

    def __str__(self) -> str:
        return f"{self.name} (tid {self.thread})" if self.name else f"tid {self.thread}"


class TouchLog(Sequence[Touch]):
    """Touches in the order in which the kernel told them, with everybody's names.

    Sharing: one thread adds, any thread reads meanwhile.

    Args:
        touches: To begin with.
        regions: What they look like.
        threads: Names, by thread id.
        began_ns: What to count time from, in nanoseconds of CLOCK_MONOTONIC; without it, from
            the first touch.
        every: All touches are here, not only the first ones of each page.
        openers: Touches that are not here, but after which their pages were open to all, so
            that later ones are missing: another thread's, say, where one was asked for.
        dropped: How many more touches there were at its end, which are not here since there was
            no room for them: of whatever page, by whomever.
    """

    def __init__(
        self,
        touches: Iterable[Touch] = (),
        *,
        regions: Iterable[Layout] = (),
        threads: Mapping[int, str] | None = None,
        began_ns: int | None = None,
        every: bool = False,
        openers: Iterable[Touch] = (),
        dropped: int = 0,
    ) -> None:
        self._touches: list[Touch] = []
        self._places: dict[int, int] = {}  # by number, where in the list
        self.layouts = {each.name: each for each in regions}
        self.thread_names = dict(threads or {})
        self._began_ns = began_ns
        self.every: Final = every
        self.openers: Final = tuple(openers)
        self.dropped = dropped
        for touch in touches:
            self.add(touch)

    # --- how it grows --------------------------------------------------------------------

    def add(self, touch: Touch) -> None:
        """Add a touch; one with the number of an earlier touch takes its place.

        That is how a touch gets its outcome, which is known only after a while.
        """
        at = self._places.get(touch.number)
        if at is None:
            self._places[touch.number] = len(self._touches)
            self._touches.append(touch)
        else:
            self._touches[at] = touch

    def add_region(self, layout: Layout) -> None:
        """Say what a region looks like, or looks like now that a page has got a name."""
        self.layouts = {**self.layouts, layout.name: layout}  # who reads has the old one

    def name_thread(self, thread: int, name: str) -> None:
        """Say what a thread is called."""
        self.thread_names = {**self.thread_names, thread: name}

    # --- the data ------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._touches)

    @overload
    def __getitem__(self, at: int) -> Touch: ...

    @overload
    def __getitem__(self, at: slice) -> Self: ...

    def __getitem__(self, at: int | slice) -> Touch | Self:
        if not isinstance(at, slice):
            return self._touches[at]
        inside = self._touches[at]
        numbers = {each.number for each in inside}
        others = [each for each in self if each.number not in numbers]
        return self._with(inside, [*self.openers, *others])

    def __iter__(self) -> Iterator[Touch]:
        return iter(tuple(self._touches))

    def __repr__(self) -> str:
        what = "every touch" if self.every else "first touches"
        count = len(self)
        dropped = f", {self.dropped} dropped" if self.dropped else ""
        return (
            f"<{type(self).__name__} of {what}: {count} by {len(self.threads())} threads{dropped}>"
        )

    @property
    def regions(self) -> tuple[Layout, ...]:
        """What the regions look like."""
        return tuple(self.layouts.values())

    @property
    def began_ns(self) -> int:
        """What time is counted from: nanoseconds of CLOCK_MONOTONIC."""
        if self._began_ns is not None:
            return self._began_ns
        return self._touches[0].time_ns if self._touches else 0

    def page_of(self, touch: Touch) -> TouchedPage:
        """Give the page of a touch, with its name."""
        layout = self.layouts.get(touch.region)
        name = layout.page_names.get(touch.page, "") if layout is not None else ""
        return TouchedPage(touch.region, touch.page, name)

    def thread_of(self, touch: Touch) -> TouchingThread:
        """Give the thread of a touch, with its name."""
        return TouchingThread(touch.process, touch.thread, self.thread_names.get(touch.thread, ""))

    def describe(self, touch: Touch) -> str:
        """Say a touch in a line, with all names and the time since the record began."""
        return touch.describe(
            began_ns=self.began_ns,
            page_name=self.page_of(touch).name,
            thread_name=self.thread_of(touch).name,
        )

    def pages(self) -> tuple[TouchedPage, ...]:
        """List the pages that were touched, in the order of their first touch."""
        return tuple(dict.fromkeys(self.page_of(touch) for touch in self))

    def threads(self) -> tuple[TouchingThread, ...]:
        """List the threads that touched something, in the order of their first touch."""
        return tuple(dict.fromkeys(self.thread_of(touch) for touch in self))

    def of(
        self,
        *places: AnyPlace,
        region: RegionLike | str | None = None,
        page: int | str | None = None,
        thread: AnyThread | None = None,
        process: int | HasPid | None = None,
        access: Access | str | None = None,
    ) -> Self:
        """Pick the touches that all of this is true of.

        Args:
            places: In one of these: a region, a page, ``region.at(...)``, or a name such as
                ``"packet[header]"``.
            region: Of this region, or of the one with this name.
            page: Of the page with this number or name, in whatever region.
            thread: By the thread with this id or name, or by this very thread.
            process: By a process: its id, or an object with a ``pid``.
            access: ``"read"`` or ``"write"``.

        Raises:
            ValueError: Nothing has such a name.
        """
        stretches = self.stretches(places)
        within = None if region is None else stretch_of(region, self.layouts).region
        names = [name for each in self.regions for name in each.page_names.values()]
        if isinstance(page, str) and page not in names:
            raise ValueError(f"no page here is named {page!r}: there are {listed(names)}")
        tids = None if thread is None else tids_of(thread, self.thread_names)
        pid = process if process is None or isinstance(process, int) else process.pid
        kind = access_of(access)

        def is_near(touch: Touch) -> bool:
            return (
                (not places or self.is_page_in(touch, stretches))
                and (within is None or within == touch.region)
                and (page is None or page in {touch.page, self.page_of(touch).name})
            )

        def is_meant(touch: Touch) -> bool:
            return (
                (not places or any(each.holds(touch) for each in stretches))
                and (tids is None or touch.thread in tids)
                and (pid is None or pid == touch.process)
                and (kind is None or kind is touch.access)
            )

        near = [touch for touch in self if is_near(touch)]
        openers = [touch for touch in near if not is_meant(touch)]
        openers += filter(is_near, self.openers)
        if kind is Access.WRITE:  # a page that was only read is protected: its first write is told
            openers = [touch for touch in openers if touch.access is kind]
        return self._with(filter(is_meant, near), openers)

    def lines(self, touches: Sequence[Touch]) -> list[str]:
        """Say touches, one a line; of many only the first ones."""
        lines = [f"  {self.describe(each)}" for each in touches[:_SHOWN]]
        if len(touches) > _SHOWN:
            lines.append(f"  ... and {len(touches) - _SHOWN} more")
        return lines

    def is_page_in(
        self, touch: Touch, stretches: Iterable[Stretch], *, whole: bool = False
    ) -> bool:
        """Say whether any byte of the touched page, or the whole page, is in one of these."""
        layout = self.layouts.get(touch.region)
        start = touch.page * (size := mmap.PAGESIZE if layout is None else layout.page_size)
        for each in stretches:
            if each.region == touch.region:
                common = min(each.end, start + size) - max(each.start, start)
                if common == size or (common > 0 and not whole):
                    return True
        return False

    def stretches(self, places: Iterable[AnyPlace]) -> list[Stretch]:
        """Understand places."""
        return [stretch_of(each, self.layouts) for each in places]

    def _with(self, touches: Iterable[Touch], openers: Iterable[Touch]) -> Self:
        return type(self)(
            touches,
            regions=self.regions,
            threads=self.thread_names,
            began_ns=self.began_ns,
            every=self.every,
            openers=openers,
            dropped=self.dropped,
        )


def listed(things: Iterable[object]) -> str:
    """Name things in a row."""
    return ", ".join(map(str, things)) or "nothing"


def access_of(access: Access | str | None) -> Access | None:
    """Understand an access: None and ``any`` are no condition."""
    try:
        return None if access is None or access == "any" else Access(access)
    except ValueError:
        raise ValueError(f"an access is read, write or any, not {access!r}") from None
