"""Regions of memory to hand to code under test, their pages, and places in them.

Knows: addresses, offsets, names; how to look at memory in the ways that code wants it.
Must not know: how touches are caught; the harness does that.

Laws of this file:

* Nothing here touches the memory: no page is read, written or filled by making these objects.
* A place is given in bytes and lies in its region.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import ClosedError
from . import latency as latencies
from .freezing import Freeze
from .rules import Kind

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray
    from typing_extensions import Buffer

    from .arming import Armed
    from .harness import Harness
    from .threads import ThreadLike

C = TypeVar("C", bound=Any)


def size_of(data: Buffer, what: str) -> int:
    """Give how many bytes some data is.

    Raises:
        TypeError: It is none.
    """
    try:
        return memoryview(data).nbytes
    except TypeError:
        hint = f": b{data!r}, or .encode()" if isinstance(data, str) else ""
        raise TypeError(f"{what} must be bytes, not {data!r}{hint}") from None


class Place:
    """Some bytes of a region.

    What a touch is of is known by its first byte on the page: a load of eight bytes that
    begins before the place is not a touch of the place.

    Attributes:
        region: Which region.
        start: Offset of the first byte.
        length: In bytes.
        name: What reports call it.
    """

    __slots__ = ("_name", "length", "region", "start")

    def __init__(self, region: Region, start: int, length: int, name: str = "") -> None:
        """Use ``Region.at`` or ``Region.page``.

        Raises:
            ValueError: It does not lie in the region.
        """
        if length <= 0 or start < 0 or start + length > region.length:
            raise ValueError(
                f"{length} bytes at offset {start} are not in region {region.name!r},"
                f" which has {region.length} bytes"
            )
        self.region = region
        self.start = start
        self.length = length
        self._name = name

    @property
    def name(self) -> str:
        """What reports call it."""
        if self._name:
            return self._name
        page, offset = divmod(self.start, self.region.page_size)
        page_name = self.region.page_names.get(page, str(page))
        if offset == 0 and self.length == self.region.page_size:
            return f"{self.region.name}[{page_name}]"
        return f"{self.region.name}[{page_name}]+{offset:#x}"

    @property
    def end(self) -> int:
        """Offset one past its last byte."""
        return self.start + self.length

    @property
    def address(self) -> int:
        """Address of the first byte in this process."""
        return self.region.address + self.start

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} of {self.length} bytes>"

    # --- what a test wants of it -------------------------------------------------------

    def freeze(
        self,
        access: str = "any",
        *,
        nth: int = 1,
        mode: str = "any",
        thread: ThreadLike | Iterable[ThreadLike] | None = None,
        every: bool = False,
    ) -> Freeze:
        """Stop whoever touches these bytes, until they are released.

        Args:
            access: ``read``, ``write`` or ``any``.
            nth: The how-manieth touch stops; the ones before it pass.
            mode: ``user``: the program's own touches; ``kernel``: those of system calls.
            thread: Only this thread, or these: a thread id, a threading.Thread or a Running.
            every: Stop each touch from the nth on.  Otherwise who comes while one stands
                stops too, and after the first release nobody does.

        Returns:
            A context manager; ``with`` arms it, as does ``async with``.
        """
        return Freeze(self, access, nth=nth, mode=mode, thread=thread, every=every)

    def slow(
        self,
        latency: float | latencies.Distribution,
        *,
        access: str = "any",
        mode: str = "any",
        thread: ThreadLike | Iterable[ThreadLike] | None = None,
        every: bool = False,
    ) -> Armed:
        """Make touches of these bytes take time.

        Args:
            latency: Seconds, or a distribution from ``aiouffd.testing.latency``.
            access: ``read``, ``write`` or ``any``.
            mode: ``user``: the program's own touches; ``kernel``: those of system calls.
            thread: Only these threads.
            every: Each touch, not only each page's first.
        """
        return self.region.harness.arm(
            Kind.SLOW,
            self,
            access=access,
            mode=mode,
            thread=thread,
            every=every,
            latency=latencies.of(latency).to_wire(),
        )

    def fail(
        self,
        *,
        once: bool = False,
        nth: int = 1,
        access: str = "any",
        mode: str = "any",
        thread: ThreadLike | Iterable[ThreadLike] | None = None,
    ) -> Armed:
        """Make touches of these bytes fail: SIGBUS for the program, EFAULT for a system call.

        A page fails as a whole: once it has, other bytes of it fail too.

        Kernel: UFFDIO_POISON, since Linux 6.6.

        Args:
            once: Only one touch; the page is whole again after it.
            nth: The how-manieth touch is the first to fail.
            access: ``read``, ``write`` or ``any``.
            mode: ``user``: the program's own touches; ``kernel``: those of system calls.
            thread: Only these threads.
        """
        return self.region.harness.arm(
            Kind.FAIL, self, access=access, mode=mode, thread=thread, nth=nth, every=not once
        )

    def change(
        self,
        *values: Buffer,
        access: str = "read",
        mode: str = "any",
        thread: ThreadLike | Iterable[ThreadLike] | None = None,
    ) -> Armed:
        """Have each touch of these bytes find other ones.

        Args:
            values: What the first touch finds, the second, and so on; the last one stays.
            access: Which touches count: ``read``, ``write`` or ``any``.
            mode: ``user``: the program's own touches; ``kernel``: those of system calls.
            thread: Only these threads' touches.

        Raises:
            ValueError: A value is longer than the place, or the place spans two pages.
        """
        if not values:
            raise ValueError("give the bytes that the first touch finds, the second, and so on")
        for value in values:
            size_of(value, "a value")
        found = tuple(memoryview(value).tobytes() for value in values)
        for value in found:
            if len(value) > self.length:
                raise ValueError(
                    f"a value of {len(value)} bytes is longer than the {self.length} bytes of"
                    f" {self.name}"
                )
        if self.start // self.region.page_size != (self.end - 1) // self.region.page_size:
            raise ValueError(
                f"{self.name} spans two pages, of which each access touches each:"
                " give the part on one page"
            )
        return self.region.harness.arm(
            Kind.CHANGE,
            self,
            access=access,
            mode=mode,
            thread=thread,
            values=found,
        )

    def peek(self) -> bytes:
        """Read these bytes from outside, without a touch."""
        return self.region.peek(self.start, self.length)

    def poke(self, data: Buffer) -> None:
        """Write these bytes from outside, without a touch."""
        if (size := size_of(data, "what is poked")) > self.length:
            raise ValueError(f"{size} bytes do not fit into the {self.length} of {self.name}")
        self.region.poke(self.start, data)


class Page(Place):
    """One page of a region.

    Attributes:
        number: Which, from 0.
    """

    __slots__ = ("number",)

    def __init__(self, region: Region, number: int) -> None:
        """Use ``Region.page``."""
        super().__init__(region, number * region.page_size, region.page_size)
        self.number = number


class Region:
    """Memory whose touches a harness sees.

    Attributes:
        harness: Whose it is.
        number: Which of the harness's regions.
        name: What reports call it.
        memory: What kind it is: one of ``aiouffd.testing.rules.KINDS``.
        length: In bytes.
        page_size: In bytes.
        page_names: Names of pages by number.
    """

    def __init__(
        self,
        harness: Harness,
        number: int,
        name: str,
        memory: str,
        mapping: mmap.mmap,
        page_size: int,
        memfd: int | None,
    ) -> None:
        """Use ``Harness.region``."""
        self.harness = harness
        self.number = number
        self.name = name
        self.memory = memory
        self.length = len(mapping)
        self.page_size = page_size
        self.page_names: dict[int, str] = {}
        self._mapping: mmap.mmap | None = mapping
        self._memfd = memfd
        anchor = ctypes.c_char.from_buffer(mapping)
        self._address = ctypes.addressof(anchor)
        del anchor  # an export would forbid closing

    def __repr__(self) -> str:
        state = " closed" if self.closed else ""
        return (
            f"<Region {self.name!r}{state}: {self.length // self.page_size} pages of"
            f" {self.memory} memory at {self._address:#x}>"
        )

    def __len__(self) -> int:
        return self.length

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._mapping is None

    # --- ways to look at it ------------------------------------------------------------

    def check(self) -> mmap.mmap:
        """Give its memory, for whatever needs that to be there.

        Raises:
            ClosedError: It was closed.
        """
        if self._mapping is None:
            raise ClosedError(f"region {self.name!r} was closed: make another")
        return self._mapping

    @property
    def address(self) -> int:
        """Where it begins in this process.

        Raises:
            ClosedError: It was closed: something else may be there by now.
        """
        self.check()
        return self._address

    @property
    def view(self) -> memoryview:
        """It as bytes for Python; each access is a touch."""
        return memoryview(self.check())

    def array(self, dtype: DTypeLike = "u1") -> NDArray[Any]:
        """Give it as a NumPy array of one dimension; making it touches nothing.

        Raises:
            ImportError: NumPy is not installed.
        """
        try:
            import numpy as np
        except ImportError as error:
            raise ImportError("Region.array needs NumPy: pip install numpy") from error
        array: NDArray[Any] = np.frombuffer(self.check(), dtype=dtype)
        return array

    def pointer(self, offset: int = 0) -> ctypes.c_void_p:
        """Give the address of a byte as ctypes passes it to a C function.

        Raises:
            ClosedError: The region was closed.
        """
        self._check(offset, 0)
        return ctypes.c_void_p(self.address + offset)

    def struct(self, kind: type[C], offset: int = 0) -> C:
        """Give a ctypes structure, array or number that lies in it.

        Raises:
            ClosedError: The region was closed.
        """
        self._check(offset, ctypes.sizeof(kind))
        found: C = kind.from_buffer(self.check(), offset)  # which keeps the memory, as a view does
        return found

    @property
    def memfd(self) -> int:
        """Descriptor of its memfd, to pass to another program.

        It is for mapping with MAP_SHARED: that sees what is in the region.  ``read()`` and
        ``write()`` of it pass the harness by, and find zeros where nobody has touched yet.

        Raises:
            ValueError: This kind of memory has none.
        """
        self.check()
        if self._memfd is None:
            raise ValueError(
                f"region {self.name!r} is of {self.memory} memory, which no descriptor stands for:"
                " make it with memory='shmem'"
            )
        return self._memfd

    # --- places ------------------------------------------------------------------------

    @property
    def pages(self) -> tuple[Page, ...]:
        """All of its pages."""
        return tuple(Page(self, number) for number in range(self.length // self.page_size))

    def page(self, which: int | str) -> Page:
        """Give a page by its number or its name.

        Raises:
            IndexError: There is no page of this number.
            KeyError: No page has this name.
        """
        if isinstance(which, str):
            for number, name in self.page_names.items():
                if name == which:
                    return Page(self, number)
            known = ", ".join(map(repr, self.page_names.values())) or "none has one"
            raise KeyError(f"no page of region {self.name!r} is named {which!r}; named: {known}")
        count = self.length // self.page_size
        if not -count <= which < count:
            raise IndexError(f"region {self.name!r} has pages 0 to {count - 1}, not {which}")
        return Page(self, which % count)

    def name_page(self, number: int, name: str) -> Page:
        """Give a page a name, by which reports call it and ``page`` finds it."""
        page = self.page(number)
        self.page_names[page.number] = name
        return page

    def at(self, offset: int, length: int = 1, name: str = "") -> Place:
        """Give a place: any of its bytes."""
        return Place(self, offset, length, name)

    @property
    def all(self) -> Place:
        """All of it as one place."""
        return Place(self, 0, self.length, self.name)

    def freeze(
        self,
        access: str = "any",
        *,
        nth: int = 1,
        mode: str = "any",
        thread: ThreadLike | Iterable[ThreadLike] | None = None,
        every: bool = False,
    ) -> Freeze:
        """Stop whoever touches any of it; see ``Place.freeze``."""
        return self.all.freeze(access, nth=nth, mode=mode, thread=thread, every=every)

    def slow(
        self,
        latency: float | latencies.Distribution,
        *,
        access: str = "any",
        mode: str = "any",
        thread: ThreadLike | Iterable[ThreadLike] | None = None,
        every: bool = False,
    ) -> Armed:
        """Make touches of all of it take time; see ``Place.slow``."""
        return self.all.slow(latency, access=access, mode=mode, thread=thread, every=every)

    def fail(
        self,
        *,
        once: bool = False,
        nth: int = 1,
        access: str = "any",
        mode: str = "any",
        thread: ThreadLike | Iterable[ThreadLike] | None = None,
    ) -> Armed:
        """Make touches of any of it fail; see ``Place.fail``."""
        return self.all.fail(once=once, nth=nth, access=access, mode=mode, thread=thread)

    def straddle(self, size: int, before: int = 1, page: int = 1) -> int:
        """Give the offset at which an object lies across the edge of two pages.

        Args:
            size: The object's, in bytes.
            before: How many of its bytes lie before the edge.
            page: The page after the edge.

        Raises:
            ValueError: It would not lie across it, or not in the region.
        """
        edge = self.page(page).start
        if page <= 0 or not 0 < before < size:
            raise ValueError(
                f"an object of {size} bytes with {before} of them before page {page}"
                " does not lie across an edge"
            )
        offset = edge - before
        self._check(offset, size)
        return offset

    # --- from outside ------------------------------------------------------------------

    def peek(self, offset: int, length: int) -> bytes:
        """Read bytes from outside: no touch, also while threads stand at them."""
        self._check(offset, length)
        self.check()
        return self.harness.peek(self, offset, length)

    def poke(self, offset: int, data: Buffer) -> None:
        """Write bytes from outside: no touch, also while threads stand at them.

        Raises:
            TypeError: What is to be written is no bytes.
        """
        self._check(offset, size_of(data, "what is poked"))
        self.check()
        self.harness.poke(self, offset, data)

    def rearm(self, page: int | str | None = None) -> None:
        """Have the next touch of a page, or of each, be seen again; no byte changes."""
        self.check()
        if page is None:
            self.harness.rearm(self, 0, self.length // self.page_size)
        else:
            self.harness.rearm(self, self.page(page).number, 1)

    def close(self) -> None:
        """Give the memory back; who stands there goes on.  A second call does nothing.

        What still looks at it (a memoryview, an array, a structure) keeps it, as ordinary memory.
        """
        mapping, self._mapping = self._mapping, None
        if mapping is not None:
            self.harness.forget(self, mapping, self._memfd)

    def abandon(self, kept: list[mmap.mmap]) -> None:
        """Close what nobody has closed, its memory kept; for a harness that is collected."""
        mapping, self._mapping = self._mapping, None
        if mapping is not None:
            kept.append(mapping)
            if self._memfd is not None:
                os.close(self._memfd)

    def _check(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.length:
            raise ValueError(
                f"{length} bytes at offset {offset} are not in region {self.name!r},"
                f" which has {self.length} bytes"
            )
