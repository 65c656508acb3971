"""Record: which thread touched which page, in order; as data, as text, and to assert upon.

Knows: what can be told from touches, and what cannot.
Must not know: where touches come from; it grows by ``add``, or is read from a file.

Laws of this file:

* An assertion that cannot be decided from what was recorded fails, and says what to record.
* A failed assertion shows the touches that it is about, and what was allowed or asked for.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from . import record_file
from .places import AnyPlace, AnyThread, merged, stretch_of, tids_of
from .touch_log import TouchedPage, TouchingThread, TouchLog, access_of, listed
from .touches import Access, Touch

#: In ``assert_order``: a place, or (thread, place, access) in which None stands for any.
Pattern: TypeAlias = AnyPlace | tuple[AnyThread | None, AnyPlace | None, Access | str | None]


class RecordMismatch(AssertionError):
    """The touches are not what was asserted.

    Attributes:
        touches: Those that contradict it, or, where one is missing, those that were found.
    """

    def __init__(self, message: str, touches: Sequence[Touch]) -> None:
        super().__init__(message)
        self.touches = tuple(touches)


class Record(TouchLog):
    """The touches of some regions, to assert upon, print and save.

    By itself the kernel tells the first read and the first write of each page; a record of
    *every* touch has the later ones too.

    Sharing: one thread adds, any thread reads meanwhile.
    """

    def __str__(self) -> str:
        return self.summary()

    # --- assertions ----------------------------------------------------------------------

    def assert_touched_only(self, *places: AnyPlace) -> None:
        """Assert that each touch was in one of these places.

        Raises:
            RecordMismatch: One was elsewhere.  Or that cannot be told, since only the first
                touches of pages were recorded, and a page of which a part was allowed, or which
                another thread touched first, was open from then on.
        """
        __tracebackhide__ = True  # pytest shows the test's line, not ours
        stretches = self.stretches(places)
        whole = merged(stretches)
        allowed = f"allowed: {listed(stretches)}"
        self._refuse(
            [touch for touch in self if not any(each.holds(touch) for each in stretches)],
            "touched elsewhere than allowed",
            allowed,
        )
        self._undecided(
            [
                touch
                for touch in (*self, *self.openers)
                if not self.is_page_in(touch, whole, whole=True)
            ],
            allowed,
        )

    def assert_untouched(self, *places: AnyPlace) -> None:
        """Assert that no touch was in one of these places; without any, that there was none.

        Raises:
            RecordMismatch: One was, or that cannot be told: as in ``assert_touched_only``.
        """
        __tracebackhide__ = True
        self._assert_none(places, (*self,), self.openers, "touched")

    def assert_never_wrote(self, *places: AnyPlace) -> None:
        """Assert that no write was to one of these places; without any, that nothing wrote.

        Raises:
            RecordMismatch: One was, or that cannot be told: as in ``assert_touched_only``.
        """
        __tracebackhide__ = True
        writes, openers = (
            [touch for touch in touches if touch.access is Access.WRITE]
            for touches in (self, self.openers)
        )
        self._assert_none(places, writes, openers, "written")

    def assert_order(self, *patterns: Pattern) -> None:
        """Assert that such touches occur one after the other; others may lie between them.

        Args:
            patterns: Places, or (thread, place, access) with None for any:
                ``assert_order("header", ("parser", "body", "read"))``.

        Raises:
            RecordMismatch: There is no such sequence of touches.
            ValueError: Nothing has such a name.
        """
        __tracebackhide__ = True
        if not patterns:
            raise ValueError("an order of nothing always holds: give places, first to last")
        wanted = [self._pattern(each) for each in patterns]
        found: list[Touch] = []
        touches = iter(self)
        for number, (text, matching) in enumerate(wanted):
            numbers = {each.number for each in matching}
            touch = next((each for each in touches if each.number in numbers), None)
            if touch is not None:
                found.append(touch)
                continue
            lines = [f"after the touches found, none was {text} ({number + 1} of {len(wanted)})"]
            lines.append("order asked for: " + ", then ".join(text for text, _ in wanted))
            lines.append("found:" if found else "found: nothing")
            lines += self.lines(found)
            if self.dropped:
                lines.append(self._dropped())
            if matching:
                lines += ["too early, or taken already:", *self.lines(matching)]
            raise RecordMismatch("\n".join(lines), found)

    def assert_at_most(self, *, pages: int) -> None:
        """Assert that no more than so many pages were touched.

        Raises:
            RecordMismatch: There are more.
        """
        __tracebackhide__ = True
        touched = self.pages()
        if len(touched) > pages:
            first = {self.page_of(each): each for each in reversed(tuple(self))}
            beyond = [first[each] for each in touched[pages:]]
            raise RecordMismatch(
                "\n".join(
                    (
                        f"{len(touched)} pages were touched, at most {pages} allowed",
                        f"touched: {listed(touched)}",
                        "first touches of those beyond:",
                        *self.lines(beyond),
                    )
                ),
                beyond,
            )
        self._refuse_dropped(f"at most {pages} pages allowed")
        others = [each for each in self.openers if self.page_of(each) not in touched]
        if len(touched) + len({self.page_of(each) for each in others}) > pages:
            self._undecided(others, f"at most {pages} pages allowed")

    # --- text and files ------------------------------------------------------------------

    def summary(self) -> str:
        """Give a table: by thread and page the first read, the first write, and how many."""
        rows: dict[tuple[TouchingThread, TouchedPage], list[Touch]] = {}
        for touch in self:
            rows.setdefault((self.thread_of(touch), self.page_of(touch)), []).append(touch)
        table = [("thread", "page", "first read", "first write", "touches", "waited")]
        last: TouchingThread | None = None
        order = {thread: at for at, thread in enumerate(self.threads())}
        for (thread, page), touches in sorted(rows.items(), key=lambda row: order[row[0][0]]):
            waited = sum(each.waited_ns for each in touches)
            table.append(
                (
                    "" if thread == last else str(thread),
                    str(page),
                    self._first(touches, Access.READ),
                    self._first(touches, Access.WRITE),
                    str(len(touches)),
                    f"{waited / 1e6:.3f} ms" if waited else "-",
                )
            )
            last = thread
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if at < 2 else cell.rjust(width)
                for at, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in table
        ]
        lines = lines if rows else ["no touches"]
        return "\n".join([*lines, self._dropped()] if self.dropped else lines)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON, to be loaded again, read by other programs, and compared.

        Raises:
            OSError: It cannot be written; what was there before is still there.
        """
        contents = record_file.Contents(
            regions=self.regions,
            threads=self.thread_names,
            touches=tuple(self),
            openers=self.openers,
            began_ns=self._began_ns,
            every=self.every,
            dropped=self.dropped,
        )
        record_file.write(path, contents)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Record:
        """Read what ``save`` has written.

        Raises:
            OSError: It cannot be read.
            RecordError: It is no record, or is damaged; the text says where.
        """
        contents = record_file.read(path)
        return cls(
            contents.touches,
            regions=contents.regions,
            threads=contents.threads,
            began_ns=contents.began_ns,
            every=contents.every,
            openers=contents.openers,
            dropped=contents.dropped,
        )

    # --- inside --------------------------------------------------------------------------

    def _pattern(self, pattern: Pattern) -> tuple[str, Record]:
        if not isinstance(pattern, tuple):
            stretch = stretch_of(pattern, self.layouts)
            return f"a touch of {stretch}", self.of(pattern)
        if len(pattern) != 3:
            raise ValueError(f"a pattern is a place or (thread, place, access), not {pattern!r}")
        thread, place, access = pattern
        kind = access_of(access) or "touch"
        where = "anything" if place is None else str(stretch_of(place, self.layouts))
        matching = self.of(*(() if place is None else (place,)), thread=thread, access=access)
        who = ""
        if thread is not None:
            (tid, *_) = tids_of(thread, self.thread_names)
            who = " by " + (
                thread if isinstance(thread, str) else self.thread_names.get(tid, f"tid {tid}")
            )
        return f"a {kind} of {where}{who}", matching

    def _assert_none(
        self,
        places: Sequence[AnyPlace],
        touches: Sequence[Touch],
        openers: Sequence[Touch],
        done: str,
    ) -> None:
        __tracebackhide__ = True
        stretches = self.stretches(places)
        forbidden = f"not to be {done}: {listed(stretches) if places else 'anything'}"
        self._refuse(
            [
                touch
                for touch in touches
                if not places or any(each.holds(touch) for each in stretches)
            ],
            f"{done} though it should not be",
            forbidden,
        )
        self._undecided(
            [
                touch
                for touch in (*touches, *openers)
                if not places or self.is_page_in(touch, stretches)
            ],
            forbidden,
        )

    def _refuse(self, touches: Sequence[Touch], what: str, rule: str) -> None:
        __tracebackhide__ = True
        if touches:
            message = f"{what}: {len(touches)} of {len(self)} touches\n{rule}\n"
            raise RecordMismatch(message + "\n".join(self.lines(touches)), touches)

    def _refuse_dropped(self, rule: str) -> None:
        __tracebackhide__ = True
        if self.dropped:
            raise RecordMismatch(f"cannot tell: {self._dropped()}\n{rule}", ())

    def _dropped(self) -> str:
        return (
            f"there was no room for {self.dropped} touches at the end, by whomever:"
            " record a shorter part, or without every=True"
        )

    def _undecided(self, touches: Sequence[Touch], rule: str) -> None:
        __tracebackhide__ = True
        self._refuse_dropped(rule)
        if touches and not self.every:
            why = (
                "cannot tell: these touches opened their pages, and what came later, to other"
                " bytes or by other threads, was not recorded\n"
                "record with every=True, or assert about whole pages and all threads\n"
            )
            raise RecordMismatch("\n".join((why + rule, *self.lines(touches))), touches)

    def _first(self, touches: Iterable[Touch], access: Access) -> str:
        for touch in touches:
            if touch.access is access:
                return f"{(touch.time_ns - self.began_ns) / 1e6:+.3f} ms"
        return "-"
