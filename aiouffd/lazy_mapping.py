"""A mapping of this process whose missing pages raise SIGBUS, and every operation on its pages.

Knows: mmap and the userfaultfd over it; filling, protecting, dropping pages.
Must not know: threads that wait, handlers, loops.

Laws of this file:

* USER_MODE_ONLY and SIGBUS, no events: unprivileged, and nothing in the process can ever be
  parked by the kernel.  Reading an event would take the GIL that ``os.fork`` holds.
* MADV_DONTFORK: a child's touch is a clear SIGSEGV, not a silent zero.
* Fills are for holes: a page that is there is stepped over (EEXIST), never overwritten.
* No ioctl is given more than PIECE_BYTES: one holds the mapping's lock as long as it runs.
* Who holds a view of the memory keeps it mapped.  The last view may outlive this object.
* Calls may nest: a Python signal handler can run between any two lines and touch a missing
  page.  So bytes are passed by their own address, not through a buffer of the thread.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import mmap
import os
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from .errors import ClosedError, NotSupported, refusal
from .fds import OwnedFd
from .kernel import abi, calls, pagemap
from .kernel.buffers import PinnedBuffer
from .kernel.holding_gil import fill_holding_gil
from .lazy_pages import LazyPages
from .performer import PIECE_BYTES
from .ranges import PAGE_SIZE, align_down, align_up
from .uffd import Feature, Mode, Userfaultfd

if TYPE_CHECKING:
    from typing_extensions import Buffer

_MAP_NORESERVE: Final = 0x4000  # mmap.MAP_NORESERVE came with Python 3.13
BYTES_HEADER: Final = bytes.__basicsize__ - 1  # CPython: where a bytes object's bytes begin
_ZEROS: Final = bytes(PAGE_SIZE)
_ZEROS_ADDRESS: Final = id(_ZEROS) + BYTES_HEADER
_RETRIES: Final = 100

#: Views that a forked child keeps for good: unmapping there would hit what has been mapped at
#: these addresses since.
_kept_in_child: list[memoryview] = []


#: Closed while somebody had a view: their descriptors go with the last view.
_left_to_views: set[LazyMapping] = set()


@atexit.register
def _leave_fds_open() -> None:
    # Threads may touch the memory to the very end: closing would give them zeros.
    for mapping in list(_left_to_views):
        mapping.leave_fds_open()


class LazyMapping:
    """Anonymous memory, registered and empty.

    Attributes:
        start: Its first address.
        end: One past its last; whole pages of ``page_size``.
        length: What was asked for, in bytes.
        page_size: What one fault brings, in bytes.
        wake: An eventfd by which a faulting thread wakes the loop; here because it has to live
            as long as a thread can fault.
        shared: Whether it is shared memory (MAP_SHARED).
        pages: Which of its pages are there.
        write_protect: Whether filled pages start write-protected.
        maybe_filled: One byte per page of ``page_size``: 0 if nobody has filled anything in it
            since it was last dropped.  It only saves a look at the pagemap: 1 proves nothing.

    Sharing: any thread, except for closing.
    """

    def __init__(
        self, length: int, *, shared: bool, read_only: bool, page_size: int, write_protect: bool
    ) -> None:
        """Map and register.

        Args:
            length: In bytes, above zero.
            shared: Map it MAP_SHARED.
            read_only: Map it without the right to write; fills work all the same.
            page_size: A power of two, at least the machine's page size.
            write_protect: Have the first write to each page fault as well.

        Raises:
            NotSupported: There is no userfaultfd to be had, or it lacks a feature.
            OSError: The memory cannot be mapped.
        """
        self.length: Final = length
        self.page_size: Final = page_size
        self.shared: Final = shared
        self.read_only: Final = read_only
        self.write_protect: Final = write_protect
        self._size = align_up(length, page_size)
        self.fill_mode = abi.UFFDIO_COPY_MODE_DONTWAKE  # with SIGBUS nobody ever sleeps
        features = Feature.SIGBUS
        if write_protect:
            self.fill_mode |= abi.UFFDIO_COPY_MODE_WP
            features |= Feature.PAGEFAULT_FLAG_WP
            if shared:
                features |= Feature.WP_HUGETLBFS_SHMEM
        with contextlib.ExitStack() as undo:
            uffd = undo.enter_context(Userfaultfd.open(features, user_mode_only=True))
            pages = undo.enter_context(OwnedFd(pagemap.open_pagemap()))
            content = undo.enter_context(
                OwnedFd(os.open("/proc/self/mem", os.O_RDONLY | os.O_CLOEXEC))
            )
            flags = os.EFD_CLOEXEC | os.EFD_NONBLOCK
            wake = undo.enter_context(OwnedFd(os.eventfd(0, flags)))
            memory = mmap.mmap(
                -1,
                self._size,
                flags=(mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE)
                | mmap.MAP_ANONYMOUS
                | _MAP_NORESERVE,
                prot=mmap.PROT_READ | (0 if read_only else mmap.PROT_WRITE),
            )
            undo.callback(memory.close)
            memory.madvise(mmap.MADV_DONTFORK)
            self.start: Final = _address_of(memory)
            self.end: Final = self.start + self._size
            uffd.register(self.start, self._size, Mode.MISSING | (Mode.WP if write_protect else 0))
            undo.pop_all()
        self._uffd = uffd
        self._pagemap = pages
        self._content = content
        self.wake = wake
        self.fd = uffd.fileno()
        self.pages: Final = LazyPages(pages.fileno(), shared=shared)
        #: Held for the memory's life: while it is, no ``close`` or ``resize`` unmaps what a
        #: thread may be in the middle of touching.
        self._view: memoryview | None = memoryview(memory)[:length]
        # A mapping, not a bytearray: of terabytes of lazy memory it takes only what is used.
        self.maybe_filled: Final = mmap.mmap(
            -1, self._size // page_size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        )
        self._memory: mmap.mmap | None = memory
        self._weak = weakref.ref(memory)

    @property
    def view(self) -> memoryview:
        """The memory itself, without the tail of the last page.

        Raises:
            ClosedError: It was closed.
        """
        if self._view is None:
            raise ClosedError("this lazy memory is closed")
        return self._view

    def read_present(self, start: int, length: int) -> bytes:
        """Read up to the first missing page."""
        view = self.view  # held: a close in another thread leaves the descriptors till we are done
        try:
            return os.pread(self._content.fileno(), length, start)
        except OSError as error:
            if error.errno == errno.EIO:
                return b""
            raise
        finally:
            del view

    # --- filling -----------------------------------------------------------------------

    def fill(self, address: int, data: bytes) -> int:
        """Fill holes with bytes; pages that are there are left alone.

        Args:
            address: Page-aligned.
            data: Whole pages of the machine.

        Returns:
            Bytes filled.
        """
        source = id(data) + BYTES_HEADER
        length = len(data)
        self._mark(address, length, 1)
        filled = done = 0
        busy = 0
        while done < length:
            result = calls.copy(
                self.fd,
                address + done,
                source + done,
                min(length - done, PIECE_BYTES),
                self.fill_mode,
            )
            if result > 0:
                filled += result
                done += result
            elif result == -errno.EEXIST:
                done += PAGE_SIZE
            elif result == -errno.EAGAIN and busy < _RETRIES:
                busy += 1  # no event is ever pending here: it passes by itself
            else:
                raise refusal("UFFDIO_COPY", -result, address, length, done)
        return filled

    def plant(self, page: int) -> bool:
        """Fill one page of the machine with zeros, unprotected, without giving up the GIL.

        Returns:
            Whether it was a hole.
        """
        self._mark(page, PAGE_SIZE, 1)
        result = fill_holding_gil(
            self.fd, page, _ZEROS_ADDRESS, PAGE_SIZE, abi.UFFDIO_COPY_MODE_DONTWAKE
        )
        if result < 0 and result != -errno.EEXIST:
            raise refusal("UFFDIO_COPY", -result, page, PAGE_SIZE)
        return result > 0

    def fill_zeros(self, address: int, length: int) -> int:
        """Fill holes with zeros, as ``fill`` does."""
        if self.write_protect:  # ZEROPAGE cannot protect
            filled = 0
            for at in range(0, length, PIECE_BYTES):
                filled += self.fill(address + at, bytes(min(length - at, PIECE_BYTES)))
            return filled
        self._mark(address, length, 1)
        filled = done = 0
        while done < length:
            result = calls.zeropage(
                self.fd,
                address + done,
                min(length - done, PIECE_BYTES),
                abi.UFFDIO_ZEROPAGE_MODE_DONTWAKE,
            )
            if result > 0:
                filled += result
                done += result
            elif result == -errno.EEXIST:
                done += PAGE_SIZE
            else:
                raise refusal("UFFDIO_ZEROPAGE", -result, address, length, done)
        return filled

    def protect(self, address: int, length: int) -> None:
        """Write-protect the pages of a range that are there.

        Kernel: UFFDIO_WRITEPROTECT, since Linux 5.7.
        """
        self._writeprotect(address, length, abi.UFFDIO_WRITEPROTECT_MODE_WP)

    def unprotect(self, address: int, length: int) -> None:
        """Let the pages of a range be written to."""
        self._writeprotect(address, length, 0)

    def _writeprotect(self, address: int, length: int, mode: int) -> None:
        result = -errno.EAGAIN
        for _ in range(_RETRIES):
            result = calls.writeprotect(self.fd, address, length, mode)
            if result != -errno.EAGAIN:
                break
        if result < 0:
            raise refusal("UFFDIO_WRITEPROTECT", -result, address, length)

    def drop(self, address: int, length: int) -> None:
        """Make pages missing again; what they held is lost.  Nothing if it is unmapped."""
        memory = self._weak()
        if memory is None:
            return
        # A shared page stays in the page cache after DONTNEED, and a later fill says EEXIST.
        self._mark(address, length, 0)
        advice = mmap.MADV_REMOVE if self.shared else mmap.MADV_DONTNEED
        with contextlib.suppress(ValueError):  # closed between the lines
            memory.madvise(advice, address - self.start, length)

    def filled_bytes(self) -> int:
        """Count the bytes of the pages that are there."""
        holes = sum(end - start for start, end in self.pages.holes(self.start, self.end))
        return self._size - holes

    def _mark(self, address: int, length: int, value: int) -> None:
        first = (address - self.start) // self.page_size
        end = (address + length - 1 - self.start) // self.page_size + 1
        if end - first == 1:
            self.maybe_filled[first] = value
            return
        inner, inner_end = align_up(first), align_down(end)
        if not value and inner < inner_end:
            self.maybe_filled.madvise(mmap.MADV_DONTNEED, inner, inner_end - inner)
            self.maybe_filled[first:inner] = bytes(inner - first)
            first = inner_end
        self.maybe_filled[first:end] = bytes((value,)) * (end - first)

    def poison(self) -> int:
        """Mark every hole as lost, for good: touching one is SIGBUS even without us.

        Kernel: UFFDIO_POISON, since Linux 6.6.

        Returns:
            Bytes marked.

        Raises:
            NotSupported: The kernel is older.
        """
        marked = 0
        for start, end in list(self.pages.holes(self.start, self.end)):
            done = 0
            while start + done < end:
                result = calls.poison(
                    self.fd,
                    start + done,
                    min(end - start - done, PIECE_BYTES),
                    abi.UFFDIO_POISON_MODE_DONTWAKE,
                )
                if result == -errno.EINVAL:
                    raise NotSupported("this kernel cannot poison pages", "It takes Linux 6.6.")
                if result < 0 and result != -errno.EEXIST:
                    raise refusal("UFFDIO_POISON", -result, start, end - start, done)
                marked += max(result, 0)
                done += result if result > 0 else PAGE_SIZE
        return marked

    # --- the end ------------------------------------------------------------------------

    def unmap(self) -> bool:
        """Unmap the memory unless somebody holds a view of it.

        A thread in the middle of an access has the view on its stack, so it counts too.

        Returns:
            Whether it is gone.  If not, everything is as before.
        """
        if self._memory is None:
            return True
        length, self._view = self.length, None
        try:
            self._memory.close()
        except BufferError:
            self._view = memoryview(self._memory)[:length]
            return False
        self._memory = None
        return True

    def let_go(self, then: Callable[[], object]) -> None:
        """Leave the memory to those who hold views of it.

        Args:
            then: Called when the last of them is gone and the memory unmapped.
        """
        memory, self._memory, self._view = self._memory, None, None
        if memory is None:
            then()
            return
        _left_to_views.add(self)
        weakref.finalize(memory, self._gone, then).atexit = False

    def _gone(self, then: Callable[[], object]) -> None:
        _left_to_views.discard(self)
        then()

    def close_fds(self) -> None:
        """Close all descriptors, ``wake`` too.  Holes read as zeros from here on.

        Nobody may be in the middle of a fault: he would use the numbers after they are given
        to somebody else.
        """
        self._uffd.close()
        self._pagemap.close()
        self._content.close()
        self.wake.close()

    def leave_fds_open(self) -> None:
        """Have the descriptors live as long as the process, which is about to end."""
        self._uffd.detach().detach()
        self._pagemap.detach()
        self._content.detach()
        self.wake.detach()

    def forked(self) -> None:
        """Give up in a forked child, where the memory does not exist."""
        memory = self._weak()
        if memory is not None:
            _kept_in_child.append(memoryview(memory))
        self.close_fds()


def as_bytes(data: Buffer) -> bytes:
    """Give a buffer's bytes as an object whose address does not change."""
    return data if type(data) is bytes else bytes(memoryview(data))


def _address_of(memory: mmap.mmap) -> int:
    """Find where a mapping lies, read-only ones too, without touching it."""
    with PinnedBuffer(memory) as pinned:
        return pinned.address
