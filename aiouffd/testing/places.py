"""Places that touches are compared with: a region, a page, some bytes, as a user may give them.

Knows: regions' layouts, and what users write for a place or a thread.
Must not know: memory, or whoever owns it: it is enough that a place *looks* like one.

Laws of this file:

* A place becomes a ``Stretch`` once, at the door; behind it nothing is guessed.
* What cannot be understood is refused with what could have been written instead.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeAlias, runtime_checkable

from .touches import Touch


@dataclass(frozen=True, slots=True)
class Layout:
    """What a region looks like, once its memory is gone.

    Attributes:
        name: The region's.
        pages: How many it has.
        page_size: In bytes.
        page_names: By number; most pages have none.
    """

    name: str
    pages: int
    page_size: int = mmap.PAGESIZE
    page_names: Mapping[int, str] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Bytes of the region."""
        return self.pages * self.page_size

    def name_of(self, page: int) -> str:
        """Give a page's name, or else its number."""
        return self.page_names.get(page) or str(page)

    def page_named(self, name: str) -> int | None:
        """Find a page by its name or, written out, its number."""
        for page, known in self.page_names.items():
            if known == name:
                return page
        return int(name) if name.isascii() and name.isdigit() and int(name) < self.pages else None


@runtime_checkable
class RegionLike(Protocol):
    """All of a region: ``testing.region.Region`` is one."""

    @property
    def name(self) -> str:
        """The region's name."""

    @property
    def length(self) -> int:
        """Bytes."""


@runtime_checkable
class PlaceLike(Protocol):
    """Some bytes of a region: ``testing.region.Place`` and ``Page`` are."""

    @property
    def region(self) -> RegionLike:
        """The region they are in."""

    @property
    def start(self) -> int:
        """Offset of the first one."""

    @property
    def length(self) -> int:
        """How many."""


#: What may stand for a place: the object itself, or its name: ``"packet"``, ``"packet[header]"``,
#: ``"packet[1]"``, and just ``"header"`` where only one page has that name.
AnyPlace: TypeAlias = PlaceLike | RegionLike | str


@runtime_checkable
class HasTid(Protocol):
    """Whatever knows its thread's id: ``testing.running.Running`` does."""

    @property
    def tid(self) -> int:
        """As the kernel counts threads."""


@runtime_checkable
class HasNativeId(Protocol):
    """``threading.Thread``."""

    @property
    def native_id(self) -> int | None:
        """As the kernel counts threads; None before it has started."""


@runtime_checkable
class HasPid(Protocol):
    """A process: ``testing.programs.Program`` and ``subprocess.Popen`` do."""

    @property
    def pid(self) -> int:
        """Its id."""


#: What may stand for a thread: its id, its name, or an object that knows its id.
AnyThread: TypeAlias = int | str | HasTid | HasNativeId


@dataclass(frozen=True, slots=True)
class Stretch:
    """The bytes from ``start`` to ``end`` of a region, and how they are called.

    Attributes:
        region: The region's name.
        start: Offset of the first byte.
        end: Offset behind the last byte.
        label: For readers.
    """

    region: str
    start: int
    end: int
    label: str

    def holds(self, touch: Touch) -> bool:
        """Say whether the touched byte is one of these."""
        return touch.region == self.region and self.start <= touch.offset < self.end

    def __str__(self) -> str:
        return self.label


def merged(stretches: Iterable[Stretch]) -> list[Stretch]:
    """Join what overlaps or touches: two halves of a page are that page."""
    joined: list[Stretch] = []
    for each in sorted(stretches, key=lambda one: (one.region, one.start)):
        last = joined[-1] if joined else None
        if last is not None and last.region == each.region and each.start <= last.end:
            joined[-1] = replace(last, end=max(last.end, each.end))
        else:
            joined.append(each)
    return joined


def stretch_of(place: AnyPlace, layouts: Mapping[str, Layout]) -> Stretch:
    """Understand a place.

    Args:
        place: A region, a page, some bytes, or a name.
        layouts: By region, what the names mean.

    Raises:
        TypeError: It is no place.
        ValueError: Nothing has this name, or several pages do.
    """
    if isinstance(place, str):
        return _named(place, layouts)
    if isinstance(place, PlaceLike):
        region, start, end = place.region.name, place.start, place.start + place.length
        label = _label(region, start, end, layouts.get(region))
        name = getattr(place, "name", None)
        if name and isinstance(name, str) and f"[{name}]" not in label:
            label = f"{name} ({label})"
        return Stretch(region, start, end, label)
    if isinstance(place, RegionLike):
        return Stretch(place.name, 0, place.length, place.name)
    raise TypeError(f"a place is a region, a page, region.at(...) or a name, not {place!r}")


def _label(region: str, start: int, end: int, layout: Layout | None) -> str:
    if layout is not None:
        if (start, end) == (0, layout.length):
            return region
        page, rest = divmod(start, layout.page_size)
        if rest == 0 and end - start == layout.page_size:
            return f"{region}[{layout.name_of(page)}]"
    return f"{region}+{start:#x}..{end:#x}"


def _named(name: str, layouts: Mapping[str, Layout]) -> Stretch:
    if (layout := layouts.get(name)) is not None:
        return Stretch(name, 0, layout.length, name)
    region, bracket, rest = name.rpartition("[")
    if bracket and rest.endswith("]") and (layout := layouts.get(region)) is not None:
        found = [(layout, layout.page_named(rest[:-1]))]
    else:
        found = [
            (layout, page)
            for layout in layouts.values()
            for page, known in layout.page_names.items()
            if known == name
        ]
    if len(found) == 1 and found[0][1] is not None:
        layout, page = found[0][0], found[0][1]
        start = page * layout.page_size
        end = start + layout.page_size
        return Stretch(layout.name, start, end, _label(layout.name, start, end, layout))
    if len(found) > 1:
        where = ", ".join(f"{layout.name}[{name}]" for layout, _ in found)
        raise ValueError(f"{name!r} may be any of {where}: say which")
    raise ValueError(
        f"nothing here is named {name!r}: there are {', '.join(_names(layouts)) or 'no regions'}"
    )


def _names(layouts: Mapping[str, Layout]) -> list[str]:
    return [
        each
        for layout in layouts.values()
        for each in (layout.name, *(f"{layout.name}[{x}]" for x in layout.page_names.values()))
    ]


def tids_of(thread: AnyThread, names: Mapping[int, str]) -> frozenset[int]:
    """Give the ids of the threads that are meant; a name may be that of several.

    Args:
        thread: A thread's id or name, or an object that knows its id.
        names: Of the threads, by id.

    Raises:
        TypeError: It is no thread.
        ValueError: It has not started, or none has this name.
    """
    if isinstance(thread, str):
        tids = frozenset(tid for tid, name in names.items() if name == thread)
        if not tids:
            known = ", ".join(sorted(set(names.values()))) or "none has a name"
            raise ValueError(f"no thread here is named {thread!r}: {known}")
        return tids
    if type(thread) is int:
        return frozenset({thread})
    if isinstance(thread, HasTid):
        return frozenset({thread.tid})
    if isinstance(thread, HasNativeId):
        if thread.native_id is None:
            raise ValueError(f"{thread!r} has not started: it has no id yet")
        return frozenset({thread.native_id})
    raise TypeError(
        f"a thread is its id or name, a threading.Thread or what start() gave, not {thread!r}"
    )
