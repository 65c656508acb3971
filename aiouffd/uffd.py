"""Userfaultfd: one descriptor, every ioctl on it as a typed method.

Knows: how to open or adopt a userfaultfd, and what its ioctls' results mean.
Must not know: handlers, pagers, event loops.

Laws of this file:

* The descriptor is non-blocking, always: a blocking one reports POLLERR for ever.
* It has at most one reader for life (``claim_reader``): two would steal each other's faults.
* A fill returns bytes done.  It returns 0 where a page was already there (EEXIST is no
  error, and has woken nobody), and raises only when nothing was done for another reason.
"""

from __future__ import annotations

import enum
import errno
import mmap
import os
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from .errors import ClosedError, refusal
from .events import Message, decode
from .fds import OwnedFd
from .kernel import abi, buffers, calls, gates, handshake

if TYPE_CHECKING:
    from typing_extensions import Buffer

_BATCH_BYTES: Final = 64 * abi.UFFD_MSG_SIZE


class Mode(enum.IntFlag, boundary=enum.KEEP):
    """Which faults of a range to ask for; or them together."""

    MISSING = abi.UFFDIO_REGISTER_MODE_MISSING  #: no page there (4.3)
    WP = abi.UFFDIO_REGISTER_MODE_WP  #: a write to a write-protected page (5.7)
    MINOR = abi.UFFDIO_REGISTER_MODE_MINOR  #: in the page cache, not mapped (5.13)


class Feature(enum.IntFlag, boundary=enum.KEEP):
    """What to enable when opening; unknown bits of newer kernels are kept."""

    PAGEFAULT_FLAG_WP = abi.UFFD_FEATURE_PAGEFAULT_FLAG_WP
    EVENT_FORK = abi.UFFD_FEATURE_EVENT_FORK
    EVENT_REMAP = abi.UFFD_FEATURE_EVENT_REMAP
    EVENT_REMOVE = abi.UFFD_FEATURE_EVENT_REMOVE
    MISSING_HUGETLBFS = abi.UFFD_FEATURE_MISSING_HUGETLBFS
    MISSING_SHMEM = abi.UFFD_FEATURE_MISSING_SHMEM
    EVENT_UNMAP = abi.UFFD_FEATURE_EVENT_UNMAP
    SIGBUS = abi.UFFD_FEATURE_SIGBUS
    THREAD_ID = abi.UFFD_FEATURE_THREAD_ID
    MINOR_HUGETLBFS = abi.UFFD_FEATURE_MINOR_HUGETLBFS
    MINOR_SHMEM = abi.UFFD_FEATURE_MINOR_SHMEM
    EXACT_ADDRESS = abi.UFFD_FEATURE_EXACT_ADDRESS
    WP_HUGETLBFS_SHMEM = abi.UFFD_FEATURE_WP_HUGETLBFS_SHMEM
    WP_UNPOPULATED = abi.UFFD_FEATURE_WP_UNPOPULATED
    POISON = abi.UFFD_FEATURE_POISON
    WP_ASYNC = abi.UFFD_FEATURE_WP_ASYNC
    MOVE = abi.UFFD_FEATURE_MOVE


class Userfaultfd:
    """One userfaultfd and the duty to close it.

    Closing the last descriptor of a userfaultfd turns every missing page of its target into
    zeros, silently; see Pager.aclose for how to end without that.

    Sharing: the fills may be called from any thread; the rest belongs to one.
    """

    __slots__ = ("_buffer", "_fd", "_has_reader", "_opened_by", "_view", "features")

    def __init__(self, fd: OwnedFd, features: int) -> None:
        """Use ``open`` or ``adopt`` instead.

        Args:
            fd: A non-blocking userfaultfd after UFFDIO_API.
            features: What was enabled.
        """
        self._fd = fd
        self._has_reader = False
        self._opened_by = 0  # whose memory it is, if known: a process id
        self._buffer = bytearray(_BATCH_BYTES)
        self._view = memoryview(self._buffer)
        self.features: Final = Feature(features)

    @classmethod
    def open(
        cls,
        features: int = 0,
        *,
        user_mode_only: bool = False,
        allow_user_mode_only: bool = False,
    ) -> Self:
        """Open a userfaultfd for this process's own memory.

        Kernel: /dev/userfaultfd (6.1) first, then userfaultfd(2) (4.3) on any failure.

        Args:
            features: Feature bits to enable, or'ed.
            user_mode_only: Ask for user-mode faults only, which needs no privilege (5.11);
                system calls on missing pages then fail with EFAULT.
            allow_user_mode_only: Fall back to that when nothing else is permitted.

        Raises:
            NotSupported: No gate let us in, or a feature is lacking; says what would help.
        """
        fd = OwnedFd(
            gates.open_userfaultfd(
                user_mode_only=user_mode_only, allow_user_mode_only=allow_user_mode_only
            )
        )
        try:
            enabled = handshake.shake_hands(fd.fileno(), features)
        except BaseException:
            fd.close()
            raise
        uffd = cls(fd, enabled)
        uffd._opened_by = os.getpid()
        return uffd

    @classmethod
    def adopt(cls, fd: OwnedFd | int) -> Self:
        """Take over a userfaultfd that somebody else opened and shook hands on.

        The descriptor is closed if it is refused.

        Args:
            fd: From SCM_RIGHTS, a fork event, pidfd_getfd, or an fd store.

        Raises:
            ValueError: It is no userfaultfd, or UFFDIO_API has not been done on it.
        """
        owned = fd if isinstance(fd, OwnedFd) else OwnedFd(fd)
        try:
            number = owned.fileno()
            if not calls.is_userfaultfd(number):
                raise ValueError(
                    f"file descriptor {number} is no userfaultfd; the peer sent something else"
                )
            info = calls.fdinfo(number)
            if not info.initialised:
                raise ValueError(
                    f"userfaultfd {number} has not seen UFFDIO_API; its owner must call it first"
                )
            calls.set_nonblocking(number)
        except BaseException:
            owned.close()
            raise
        return cls(owned, info.features)

    # --- the descriptor ----------------------------------------------------------------

    def fileno(self) -> int:
        """Give the descriptor's number.

        Raises:
            ClosedError: It was closed or detached.
        """
        return self._fd.fileno()

    @property
    def closed(self) -> bool:
        """Whether it was closed or detached."""
        return self._fd.closed

    def dup(self) -> OwnedFd:
        """Make a second descriptor of the same userfaultfd, to keep elsewhere."""
        return self._fd.dup()

    def detach(self) -> OwnedFd:
        """Hand the descriptor on; this object is closed from here on."""
        return OwnedFd(self._fd.detach())

    def close(self) -> None:
        """Close the descriptor; a second call does nothing.

        If it was the last one, the target's waiting threads go on and its missing pages
        become zeros.
        """
        self._fd.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._fd.closed:
            return "<Userfaultfd closed>"
        return f"<Userfaultfd fd={self._fd.fileno()} features={self.features!r}>"

    def claim_reader(self) -> None:
        """Become the one reader of this userfaultfd, for its life.

        Raises:
            RuntimeError: It has a reader.
        """
        if self._has_reader:
            raise RuntimeError(f"{self!r} has a reader already; a second would steal its faults")
        self._has_reader = True

    def info(self) -> calls.FdInfo:
        """Read the kernel's own account: faults pending, faults unresolved, features."""
        return calls.fdinfo(self.fileno())

    def read(self) -> list[Message]:
        """Read one batch of messages, without waiting.

        Kernel: read(2).  Page faults come before events, whatever their order of arrival.

        Returns:
            Raw faults and events; empty if nothing is pending.  The caller owns the
            descriptor of each Forked.
        """
        count = calls.read_messages(self.fileno(), (self._buffer,))
        return list(decode(self._view[:count]))

    # --- ranges ------------------------------------------------------------------------

    def register(self, start: int, length: int, modes: int = Mode.MISSING) -> int:
        """Ask for the faults of a range.

        Kernel: UFFDIO_REGISTER, since Linux 4.3.  Registering anew with other modes replaces
        the old ones, unless the range has them all: pass the full union.

        Args:
            start: Page-aligned address in the target.
            length: Whole pages, in bytes.
            modes: Mode.MISSING, WP, MINOR, or'ed.

        Returns:
            The mask of ioctls that the range takes (abi.IOCTL_BITS).

        Raises:
            ResolutionRefused: EINVAL (nothing mapped, or memory of a wrong kind), EBUSY
                (another userfaultfd has it), EPERM (sealed or read-only shared memory).
            TargetGone: ENOMEM, after which the target is found dead.
        """
        try:
            return calls.register(self.fileno(), start, length, modes)
        except OSError as error:
            raise self._management_refusal("UFFDIO_REGISTER", error, start, length) from error

    def unregister(self, start: int, length: int) -> None:
        """Give a range back to the kernel; its missing pages become zeros from then on.

        Kernel: UFFDIO_UNREGISTER, since Linux 4.3, and UFFDIO_WAKE after it: by itself it
        wakes nobody who waits for a write-protect or minor fault.

        Raises:
            ResolutionRefused: EINVAL: nothing mapped, or another userfaultfd's.
            TargetGone: The target is gone.
        """
        fd = self.fileno()
        try:
            calls.unregister(fd, start, length)
        except OSError as error:
            raise self._management_refusal("UFFDIO_UNREGISTER", error, start, length) from error
        calls.wake(fd, start, length)

    def _management_refusal(self, call: str, error: OSError, start: int, length: int) -> Exception:
        number = error.errno or errno.EIO
        # REGISTER and UNREGISTER say ENOMEM for a target that is gone; the fills say ESRCH.
        if number == errno.ENOMEM and not self.target_alive():
            number = errno.ESRCH
        return refusal(call, number, start, length)

    def wake(self, start: int, length: int) -> None:
        """Let every thread that waits in a range try its access again.

        Kernel: UFFDIO_WAKE, since Linux 4.3.  Wake whole pages of the memory's own size.

        Raises:
            ResolutionRefused: The range is not aligned or empty.
        """
        try:
            calls.wake(self.fileno(), start, length)
        except OSError as error:
            raise refusal("UFFDIO_WAKE", error.errno or errno.EIO, start, length) from error

    def target_alive(self) -> bool:
        """Say whether the process whose memory it is still has that memory.

        Nothing is sent when a target exits or calls exec: poll stays quiet and only the
        fills show ESRCH.  So this tries a CONTINUE where hardly anything is ever mapped, and
        where even a registered anonymous page would be left as it is; before Linux 5.13 a COPY
        from where no user's bytes can be.
        """
        return self._ask() != -errno.ESRCH

    def is_changing(self) -> bool:
        """Say whether an event of the address space is under way: unread, or its thread asleep.

        Fills answer EAGAIN as long as that is so.  A thread that moves, frees or forks memory
        says so before any other change of the layout can get in between.
        """
        return self._ask() == -errno.EAGAIN

    def _ask(self) -> int:
        """Try a fill that cannot do anything, for what the kernel says to it."""
        fd = self.fileno()
        answer = calls.continue_(fd, _LOWEST, mmap.PAGESIZE)
        if answer == -errno.EINVAL:
            answer = calls.copy(fd, _LOWEST, _UNREADABLE, mmap.PAGESIZE)
        return answer

    def is_own_memory(self) -> bool:
        """Say whether the memory is that of the calling process.

        Kernel: UFFDIO_MOVE, since Linux 6.8, refuses other memory before anything else.  On
        older kernels only a userfaultfd that was opened here, not adopted, is known.
        """
        if self._opened_by == os.getpid():
            return True
        done = calls.move(self.fileno(), _LOWEST, _LOWEST + mmap.PAGESIZE, mmap.PAGESIZE)
        return done == -errno.ENOENT

    # --- fills -------------------------------------------------------------------------

    def copy(
        self, destination: int, data: Buffer, *, wake: bool = True, protect: bool = False
    ) -> int:
        """Fill missing pages and let the faulting threads go on.

        Kernel: UFFDIO_COPY, since Linux 4.3.

        Args:
            destination: Page-aligned address in the target.
            data: Whole pages, contiguous; its length in bytes is a multiple of the page size.
            wake: Set to False to fill several ranges and wake once at the end.
            protect: Leave the pages write-protected (needs Mode.WP on the range; 5.7).

        Returns:
            Bytes copied; less than ``len(data)`` if a page was already there or the layout
            changed midway; 0 if the first page was there, whose threads are not woken.

        Raises:
            RangeGone: The range is not mapped or registered, or spans mappings.
            TargetGone: The target process has exited.
            LayoutChanging: Events are unread; read them, then try again.
            ResolutionRefused: Any other errno.
        """
        mode = 0 if wake else abi.UFFDIO_COPY_MODE_DONTWAKE
        if protect:
            mode |= abi.UFFDIO_COPY_MODE_WP
        with buffers.PinnedBuffer(data) as pinned:
            done = calls.copy(self.fileno(), destination, pinned.address, pinned.length, mode)
            return _bytes_done("UFFDIO_COPY", done, destination, pinned.length)

    def zeropage(self, start: int, length: int, *, wake: bool = True) -> int:
        """Fill missing pages with zeros.

        Kernel: UFFDIO_ZEROPAGE, since Linux 4.3; not on hugetlb memory: copy zeros there.

        Returns and raises as ``copy``.
        """
        return self._fill(calls.zeropage, "UFFDIO_ZEROPAGE", start, length, not wake)

    def continue_(
        self, start: int, length: int, *, wake: bool = True, protect: bool = False
    ) -> int:
        """Map pages that the page cache has: the answer to a minor fault.

        Kernel: UFFDIO_CONTINUE, since Linux 5.13 on hugetlb, 5.14 on shmem; ``protect``
        since 6.4.

        Returns and raises as ``copy``; EFAULT means that the page cache has no such page.
        """
        mode = (0 if wake else abi.UFFDIO_CONTINUE_MODE_DONTWAKE) | (
            abi.UFFDIO_CONTINUE_MODE_WP if protect else 0
        )
        return self._fill(calls.continue_, "UFFDIO_CONTINUE", start, length, mode)

    def poison(self, start: int, length: int, *, wake: bool = True) -> int:
        """Mark missing pages as lost: touching one is SIGBUS, a system call gets EFAULT.

        Kernel: UFFDIO_POISON, since Linux 6.6.  The mark outlives this userfaultfd.

        Returns and raises as ``copy``.
        """
        return self._fill(calls.poison, "UFFDIO_POISON", start, length, not wake)

    def move(
        self,
        destination: int,
        source: int,
        length: int,
        *,
        wake: bool = True,
        allow_holes: bool = False,
    ) -> int:
        """Move pages of this process into missing ones, without a copy.

        Kernel: UFFDIO_MOVE, since Linux 6.8: private anonymous memory of the calling process.

        Returns and raises as ``copy``; EBUSY means that a source page is shared or pinned.
        """
        mode = (0 if wake else abi.UFFDIO_MOVE_MODE_DONTWAKE) | (
            abi.UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES if allow_holes else 0
        )
        done = calls.move(self.fileno(), destination, source, length, mode)
        return _bytes_done("UFFDIO_MOVE", done, destination, length)

    def writeprotect(self, start: int, length: int) -> None:
        """Protect pages: the next write to one faults.

        Kernel: UFFDIO_WRITEPROTECT, since Linux 5.7.  Pages never populated are skipped on
        anonymous memory without feature WP_UNPOPULATED.

        Raises as ``copy``.
        """
        mode = abi.UFFDIO_WRITEPROTECT_MODE_WP
        done = calls.writeprotect(self.fileno(), start, length, mode)
        _bytes_done("UFFDIO_WRITEPROTECT", done, start, length)

    def unprotect(self, start: int, length: int, *, wake: bool = True) -> None:
        """Take the protection off and let the writers go on.

        Kernel: UFFDIO_WRITEPROTECT, since Linux 5.7.  Raises as ``copy``.
        """
        mode = 0 if wake else abi.UFFDIO_WRITEPROTECT_MODE_DONTWAKE
        done = calls.writeprotect(self.fileno(), start, length, mode)
        _bytes_done("UFFDIO_WRITEPROTECT", done, start, length)

    def _fill(
        self,
        call: Callable[[int, int, int, int], int],
        name: str,
        start: int,
        length: int,
        mode: int,
    ) -> int:
        return _bytes_done(name, call(self.fileno(), start, length, mode), start, length)


#: The lowest address that any vm.mmap_min_addr allows by default: programs leave it alone.
_LOWEST: Final = 0x10000
#: In the kernel's half of the address space.
_UNREADABLE: Final = 1 << 63


def _bytes_done(call: str, done: int, start: int, length: int) -> int:
    """Turn a signed result into bytes done, or raise."""
    if done >= 0:
        return done
    if done == -errno.EEXIST:
        return 0
    if done == -errno.EBADF:
        raise ClosedError("this userfaultfd was closed")
    raise refusal(call, -done, start, length)
