"""LazyMemory: memory of one's own process whose pages are brought by coroutines when touched.

Knows: opening, views, ensuring, evicting, closing: what a user does with such memory.
Must not know: signals; how a fault is answered, by whom, or how an error reaches its frame.

Laws of this file:

* What is pinned is not evicted: pinning and evicting exclude each other.
* Closing fails closed: no missing page ever turns into zeros under somebody's view.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import threading
import warnings
from collections.abc import Coroutine, Generator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from . import sigbus
from .errors import ClosedError
from .lazy_answers import Counters
from .lazy_mapping import LazyMapping, as_bytes
from .lazy_pins import Pins
from .lazy_serving import LazyHandler, PageSource, Serving, ask
from .ranges import PAGE_SIZE, align_down, align_up, is_power_of_two

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["Ensured", "Holes", "LazyHandler", "LazyMemory", "PageSource"]


class Holes(enum.Enum):
    """What becomes of missing pages when lazy memory is closed under somebody's view of it."""

    REFUSE = "refuse"  #: do not close: BufferError
    RAISE = "raise"  #: touching one raises ClosedError, for as long as a view exists
    POISON = "poison"  #: touching one kills the process by SIGBUS, which is anyone's again (6.6)
    FILL = "fill"  #: none is left: everything is brought first


class LazyMemory:
    """Memory of this process, filled page by page when it is touched.

    ::

        async with aiouffd.LazyMemory(1 << 30, fill) as memory:
            array = numpy.frombuffer(memory.view, dtype="f4")
            total = await asyncio.to_thread(array[::100_000].sum)

    Any access from any thread but the loop's own is served, in Python or in C code.  System
    calls on missing pages fail with EFAULT instead: see ``ensure``.  An error of the handler, a
    deadline or Ctrl-C arrives as an exception in the frame that touched the page.

    Kernel: userfaultfd with SIGBUS (4.14) and USER_MODE_ONLY (5.11); no privilege.

    Sharing: the memory from any thread; methods too, except for opening and closing.
    """

    def __init__(
        self,
        length: int,
        handler: LazyHandler,
        *,
        shared: bool = False,
        read_only: bool = False,
        write_protect: bool = False,
        page_size: int = PAGE_SIZE,
        deadline: float = 30.0,
        loop: asyncio.AbstractEventLoop | None = None,
        name: str = "",
    ) -> None:
        """Describe the memory; ``async with`` (or ``open``) makes it.

        Args:
            length: In bytes.  Only what is touched takes room.
            handler: What brings a page; see LazyHandler.  A plain function and
                ``read_nowait`` run in the faulting thread, several at once: they must be
                thread-safe.
            shared: Map it shared; else private.
            read_only: Refuse writes: the view is read-only, C code that writes dies.
            write_protect: Have the first write to each page reported too; a source lets it
                pass, a handler answers Unprotect.
            page_size: What one fault brings, in bytes; a power of two.
            deadline: How long an access waits before it raises DeadlineExceeded, in seconds.
            loop: Who serves; by default the loop that opens it.
            name: For messages.

        Raises:
            TypeError: The handler is neither a function nor a source.
            ValueError: An argument is out of its range.
        """
        if length <= 0:
            raise ValueError(f"memory has a length above zero, not {length}")
        if page_size < PAGE_SIZE or not is_power_of_two(page_size):
            raise ValueError(f"page_size is a power of two from {PAGE_SIZE} up, not {page_size}")
        if read_only and write_protect:
            raise ValueError("read-only memory has no writes to protect it from")
        if deadline <= 0:
            raise ValueError(f"a deadline is above zero, not {deadline}")
        self._serving_or_none: Serving | None = None
        self._closed = False
        self.length: Final = length
        self.page_size: Final = page_size
        self.name: Final = name or "lazy memory"
        self._shared: Final = shared
        self._read_only: Final = read_only
        self._write_protect: Final = write_protect
        self._deadline: Final = deadline
        self._asking: Final = ask(handler, length)
        self._loop: Final = loop
        self._pins: Final = Pins()

    # --- opening ------------------------------------------------------------------------

    async def open(self) -> Self:
        """Map the memory and begin to serve it.

        Raises:
            NotSupported: There is no userfaultfd to be had, or this is not 64-bit Linux.
            OSError: The memory cannot be mapped.

        *Cancellation:* nothing is left behind.
        """
        if self._serving_or_none is not None or self._closed:
            raise RuntimeError(f"{self.name} was opened before")
        loop = self._loop or asyncio.get_running_loop()
        with contextlib.ExitStack() as undo:
            mapping = LazyMapping(
                self.length,
                shared=self._shared,
                read_only=self._read_only,
                page_size=self.page_size,
                write_protect=self._write_protect,
            )
            undo.callback(mapping.close_fds)
            undo.callback(mapping.unmap)
            serving = Serving(mapping, self._asking, loop, deadline=self._deadline, name=self.name)
            undo.callback(serving.close)
            await _on_loop(loop, serving.attach())
            sigbus.add(serving.faults)
            undo.pop_all()
        self._serving_or_none = serving
        return self

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose(Holes.RAISE)

    # --- the memory ---------------------------------------------------------------------

    @property
    def view(self) -> memoryview:
        """A new view of the whole memory, read-only if that is.

        Raises:
            ClosedError: It is not open.
        """
        return memoryview(self._mapping.view)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int | slice) -> int | bytes:
        # Bound to a name first: an exception is raised before the instruction after the
        # access, and so within this frame.
        value = self._mapping.view[index]
        if isinstance(value, int):
            return value
        data = value.tobytes()
        return data  # noqa: RET504

    def __setitem__(self, index: int | slice, value: Any) -> None:
        view = self._mapping.view
        view[index] = value
        del view

    def read_present(self, offset: int, length: int) -> bytes:
        """Read what is there without bringing anything.

        Returns:
            The bytes up to the first missing page; none if that is the first.
        """
        start, end = self._range(offset, length)
        return self._mapping.read_present(start, end - start)

    def present(self, offset: int = 0, length: int | None = None) -> bool:
        """Say whether every page of a range is there (on shared memory: and not in swap)."""
        start, end = self._range(offset, length)
        return next(self._mapping.pages.holes(*_pages(start, end)), None) is None

    @property
    def present_bytes(self) -> int:
        """How much of the memory is there, in bytes of whole pages."""
        return self._mapping.filled_bytes()

    @property
    def counters(self) -> Counters:
        """What happened so far."""
        return self._serving.faults.counters

    # --- bringing and evicting ----------------------------------------------------------

    def ensure(self, offset: int = 0, length: int | None = None, *, write: bool = False) -> Ensured:
        """Bring a range without a fault, for system calls and for the loop's own thread.

        ``await memory.ensure(...)`` brings it; ``async with memory.ensure(...) as view:``
        also pins it against ``evict`` until the block ends.  Both give a view of the range.

        Args:
            offset: First byte.
            length: In bytes; by default to the end.
            write: Also make the pages writable, if the memory has ``write_protect``.

        Raises:
            FaultError: A page could not be had.

        *Cancellation:* handlers that were started go on; nothing stays pinned.
        """
        return Ensured(self, *self._range(offset, length), write=write)

    def fill(self, offset: int, data: Buffer) -> int:
        """Fill holes with bytes at hand; pages that are there keep what they hold.

        Args:
            offset: A multiple of the machine's page size.
            data: Whole pages, or up to the memory's end.

        Returns:
            Bytes filled.
        """
        content = as_bytes(data)
        start, end = self._range(offset, len(content))
        if end == self._mapping.start + self.length:
            content += bytes(-len(content) % PAGE_SIZE)
        if start % PAGE_SIZE or len(content) % PAGE_SIZE:
            raise ValueError(f"{len(content)} bytes at {offset} are not whole pages")
        filled = self._mapping.fill(start, content)
        self.counters.filled_bytes += filled
        return filled

    def evict(self, offset: int = 0, length: int | None = None) -> int:
        """Make pages missing again; what was written to them is lost.

        Only pages that lie in the range as a whole and are not pinned; the next touch asks
        the handler anew.

        Returns:
            Bytes evicted.
        """
        start, end = self._range(offset, length)
        base = self._mapping.start
        if end == base + self.length:
            end = self._mapping.end
        # The mapping itself is aligned to the machine's pages only.
        start = base + align_up(start - base, self.page_size)
        end = base + align_down(end - base, self.page_size)
        evicted = 0
        with self._pins.held() as pins:
            for first, last in pins.unpinned(start, end):
                holes = sum(b - a for a, b in self._mapping.pages.holes(first, last))
                evicted += last - first - holes
                self._mapping.drop(first, last - first)
                self._serving.faults.forget_placeholders(first, last)
                poisoned = self._serving.faults.answers.poisoned
                poisoned.difference_update(
                    [page for page in list(poisoned) if first <= page < last]
                )
        self.counters.evicted_bytes += evicted
        return evicted

    def protect(self, offset: int = 0, length: int | None = None) -> None:
        """Write-protect pages that are there: the next write to each is reported.

        Takes ``write_protect=True``.
        """
        start, end = _pages(*self._range(offset, length))
        self._mapping.protect(start, end - start)

    def _range(self, offset: int, length: int | None) -> tuple[int, int]:
        if length is None:
            length = self.length - offset
        if offset < 0 or length < 0 or offset + length > self.length:
            raise ValueError(f"{length} bytes at {offset} are not within {self.length}")
        start = self._mapping.start + offset
        return start, start + length

    # --- closing ------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    async def aclose(self, holes: Holes = Holes.REFUSE) -> None:
        """End the handlers and close.

        Args:
            holes: What becomes of missing pages while somebody still has a view.

        Raises:
            BufferError: There are views, and ``holes`` is REFUSE; everything goes on.
            FaultError: FILL could not bring a page; everything goes on.

        *Cancellation:* it is closed all the same, or (FILL) still open.
        """
        serving = self._serving_or_none
        if self._closed or serving is None or serving.faults.is_copy:
            self._closed = True
        elif serving.loop.is_closed():
            self.close(holes)
        else:
            if holes is Holes.FILL:
                await self.ensure()
            await _on_loop(serving.loop, self._aclose(serving, holes))

    async def _aclose(self, serving: Serving, holes: Holes) -> None:
        tasks = [task for task in serving.tasks if task is not asyncio.current_task()]
        self.close(holes)
        if tasks:
            await asyncio.wait(tasks)

    def close(self, holes: Holes = Holes.REFUSE) -> None:
        """Close without awaiting the handlers, which are cancelled.

        Call it in the loop's thread, or after the loop was closed.

        Args:
            holes: As for ``aclose``; FILL without it means that all pages are there already.

        Raises:
            BufferError: There are views, and ``holes`` is REFUSE; everything goes on.
            ValueError: A page is missing, and ``holes`` is FILL; everything goes on.
        """
        serving = self._serving_or_none
        if self._closed or serving is None or serving.faults.is_copy:
            # In a forked child there is nothing to close, and the loop must not be touched:
            # its epoll instance is shared with the parent, which would lose its readers.
            self._closed = True
            return
        faults, mapping = serving.faults, serving.mapping
        unmapped = mapping.unmap()
        if not unmapped:
            if holes is Holes.REFUSE:
                raise BufferError(
                    f"views of {self.name} exist (arrays, slices, a thread in the middle of an"
                    " access): drop them, or say what becomes of missing pages (holes=...)"
                )
            if holes is Holes.FILL and not self.present():
                raise ValueError("pages are missing: `await aclose(Holes.FILL)` brings them")
            if holes is Holes.POISON:
                mapping.poison()
        self._closed = True
        serving.close()

        def release() -> None:
            sigbus.remove(faults)
            mapping.close_fds()

        if holes is not Holes.RAISE:
            sigbus.remove(faults)
        mapping.let_go(release)

    def __del__(self) -> None:
        serving = getattr(self, "_serving_or_none", None)
        if serving is not None and not self._closed and not serving.faults.is_copy:
            warnings.warn(f"{self!r} was never closed", ResourceWarning, source=self, stacklevel=2)
            with contextlib.suppress(RuntimeError, OSError):
                if serving.loop.is_closed() or serving.faults.loop_thread == threading.get_ident():
                    self.close(Holes.RAISE)
                else:
                    serving.loop.call_soon_threadsafe(self.close, Holes.RAISE)

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open" if self._serving_or_none else "not open"
        return f"<LazyMemory {self.name!r} {self.length} bytes, {state}>"

    @property
    def _serving(self) -> Serving:
        if self._serving_or_none is None:
            raise ClosedError(f"{self.name} is not open")
        return self._serving_or_none

    @property
    def _mapping(self) -> LazyMapping:
        if self._closed:
            raise ClosedError(f"{self.name} is closed")
        return self._serving.mapping


class Ensured:
    """What ``LazyMemory.ensure`` returns: await it, or enter it to pin the range as well."""

    def __init__(self, memory: LazyMemory, start: int, end: int, *, write: bool) -> None:
        self._memory = memory
        self._start, self._end = start, end
        self._write = write

    def __await__(self) -> Generator[Any, None, memoryview]:
        return self._bring(keep=False).__await__()

    async def __aenter__(self) -> memoryview:
        return await self._bring(keep=True)

    async def __aexit__(self, *_: object) -> None:
        self._memory._pins.remove(self)

    async def _bring(self, *, keep: bool) -> memoryview:
        memory = self._memory
        serving = memory._serving
        base = serving.mapping.start
        view = memory.view[self._start - base : self._end - base]
        memory._pins.add(self, self._start, self._end)
        done = False
        try:
            await _on_loop(serving.loop, serving.bring(self._start, self._end, write=self._write))
            done = True
        finally:
            if not (done and keep):
                memory._pins.remove(self)
        return view


async def _on_loop(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, None]) -> None:
    """Await something on the loop that it belongs to, whichever runs here."""
    if loop is asyncio.get_running_loop():
        await work
    else:
        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, loop))


def _pages(start: int, end: int) -> tuple[int, int]:
    return align_down(start), align_up(end)
