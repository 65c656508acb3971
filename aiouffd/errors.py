"""Every exception of aiouffd, and the one table of what an errno means.

Knows: names and attributes of errors, and the reaction each errno asks for.
Must not know: the event loop, or how to call the kernel.

The tree::

    UffdError
    ├── NotSupported          this kernel, user or container cannot; says what would help
    ├── ClosedError           the object was closed before or during the call
    ├── ResolutionRefused     the kernel refused an ioctl (also an OSError)
    │   ├── TargetGone        ESRCH: the process whose memory it is has exited or exec'd
    │   ├── RangeGone         ENOENT: nothing mapped or registered there now
    │   └── LayoutChanging    EAGAIN: an event of this userfaultfd is still unread
    ├── FaultError            why a fault was not answered
    │   ├── HandlerError      the handler raised or returned something unusable
    │   ├── SourceError       the bytes of a page could not be had
    │   │   └── ImageError    a file of a checkpoint is damaged, cut short or missing
    │   ├── DeadlineExceeded  nothing answered within the deadline
    │   ├── NoHandler         the address lies in no registered range
    │   ├── LoopThreadTouch   the loop's own thread touched a page that only the loop can bring
    │   └── StuckPage         the same page faults again and again though the kernel has it
    ├── PeerError             the other side of a hand-over broke its protocol
    │   ├── UnknownVersion    it speaks another version of it
    │   └── DamagedFrame      bytes of it were changed on the way
    ├── WorkingSetError       a recorded set of pages cannot be read, or is another image's
    ├── NotPaused             a target ran while it had to hold still
    ├── StoreError            the fd store is full or does not answer
    └── MigrationFailed       a migration cannot go on

Programs test classes and attributes, never the text.  Blame is in the class: NotSupported is
the machine, PeerError the peer, HandlerError and SourceError the user's code.
"""

from __future__ import annotations

import errno as _errno
import os
from typing import Final


class UffdError(Exception):
    """Base of every error that aiouffd raises on its own account."""


class NotSupported(UffdError):
    """This kernel, user or container lacks something.

    Attributes:
        missing: What is lacking, in a few words.
        remedy: A sentence that says how to get it.
    """

    def __init__(self, missing: str, remedy: str) -> None:
        super().__init__(missing, remedy)
        self.missing = missing
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.missing}. {self.remedy}"


class ClosedError(UffdError):
    """The object was closed before or during the call."""


class ResolutionRefused(UffdError, OSError):
    """The kernel refused an ioctl on a range.

    Attributes:
        call: The ioctl's name, such as ``UFFDIO_COPY``.
        errno: The kernel's error number.
        start: First address of the range.
        length: Length of the range, in bytes.
        done: Bytes done before the refusal.
    """

    def __init__(self, call: str, number: int, start: int, length: int, done: int = 0) -> None:
        super().__init__(number, os.strerror(number))
        self.call = call
        self.start = start
        self.length = length
        self.done = done

    def __str__(self) -> str:
        number = self.errno or 0
        name = _errno.errorcode.get(number, str(number))
        meaning = _MEANING_OF_CALL.get((self.call, number))
        meaning = meaning or ERRNO_MEANING.get(number, os.strerror(number))
        return (
            f"{self.call} of {self.length} bytes at {self.start:#x} was refused with {name}"
            f" after {self.done} bytes: {meaning}"
        )


class TargetGone(ResolutionRefused):
    """ESRCH: the process whose memory it is has exited or called exec."""


class RangeGone(ResolutionRefused):
    """ENOENT: the range is not mapped, not registered, or crosses the end of its mapping."""


class LayoutChanging(ResolutionRefused):
    """EAGAIN with nothing done: an event of this userfaultfd is unread or unfinished."""


class FaultError(UffdError):
    """Why a fault was not answered.

    Attributes:
        address: The page's address in the target, or None if the error has no page.
    """

    def __init__(self, message: str, address: int | None = None) -> None:
        super().__init__(message)
        self.address = address


class HandlerError(FaultError):
    """The handler raised (see ``__cause__``) or returned something unusable."""


class SourceError(FaultError):
    """The bytes of a page could not be had from their source."""


class ImageError(SourceError):
    """A file of a checkpoint is damaged, cut short or missing, or is another than it should be.

    Attributes:
        file: Its name, with as much of its place as is known.
        offset: Where in it, in bytes; None if it is about the file as a whole.
        problem: What is wrong.
    """

    def __init__(self, file: str, offset: int | None, problem: str) -> None:
        where = file if offset is None else f"{file} at offset {offset}"
        super().__init__(f"{where}: {problem}")
        self.file = file
        self.offset = offset
        self.problem = problem


class DeadlineExceeded(FaultError):
    """Nothing answered the fault within its deadline."""


class NoHandler(FaultError):
    """The fault's address lies in no registered range."""


class LoopThreadTouch(FaultError):
    """The event loop's own thread touched lazy memory and would have waited for itself."""


class StuckPage(FaultError):
    """The kernel says that the page is there, and its threads fault on it all the same.

    On hugetlb memory this is how an exhausted pool of huge pages shows itself.
    """


class PeerError(UffdError):
    """The other side of a hand-over broke its protocol.

    Attributes:
        peer: Who it was, as far as known, such as ``pid 4242``.
    """

    def __init__(self, message: str, peer: str = "") -> None:
        super().__init__(message)
        self.peer = peer

    def __str__(self) -> str:
        text = str(self.args[0])
        return f"{self.peer}: {text}" if self.peer else text


class UnknownVersion(PeerError):
    """The other side speaks no version of the protocol that we do."""


class DamagedFrame(PeerError):
    """What the other side sent was changed on the way."""


class WorkingSetError(UffdError):
    """A recorded set of pages cannot be read, or was made for another image."""


class NotPaused(UffdError):
    """A target ran while its memory was being read, or could not be stopped."""


class StoreError(UffdError):
    """The fd store of the service manager is full, or does not answer."""


class MigrationFailed(UffdError):
    """A migration cannot go on.

    Attributes:
        stage: How far it had come, such as ``copying``.
        outcome: What has become of the program: ``source`` (it runs on there, or can),
            ``unknown`` (the switch was under way, and the other side does not answer) or
            ``lost`` (it ran at the destination, and what it did there is gone).
    """

    def __init__(self, message: str, *, stage: str = "", outcome: str = "") -> None:
        super().__init__(message)
        self.stage = stage
        self.outcome = outcome


#: The errno module has no name for it before Python 3.14.
_EHWPOISON: Final = 133

#: What an errno of a filling ioctl (or of WRITEPROTECT) means.  The pager's reaction:
#:
#: ========= ===============================================================================
#: EEXIST    not an error: wake the page, step over it; StuckPage when it never ends
#: EAGAIN    not an error: park, let the reader run, try again by a timer of our own
#: ENOENT    the layout changed: wake the page and forget the fault
#: ESRCH     the target is gone: end the session
#: ENOMEM    try again a few times, then the failure policy
#: others    the failure policy
#: ========= ===============================================================================
ERRNO_MEANING: Final[dict[int, str]] = {
    _errno.EEXIST: "a page is already there (on hugetlb memory also: the pool is empty)",
    _errno.EAGAIN: "the address space is changing; read the pending events, then try again",
    _errno.ENOENT: "nothing is mapped or registered there, or the range crosses a mapping's end",
    _errno.ESRCH: "the target process is gone",
    _errno.ENOMEM: "no memory for the page; the target's memory cgroup may be full",
    _errno.EFAULT: "the source is unreadable, or the page lies behind the end of its file",
    _errno.EINVAL: "an address, length or mode does not suit this memory"
    " (check page size and alignment)",
    _errno.EINTR: "a fatal signal interrupted it; the process is dying",
    _errno.EBUSY: "the source page is shared or pinned, or the range has another userfaultfd",
    _errno.EIO: "the page is hardware-poisoned",
    _EHWPOISON: "the page is hardware-poisoned",
    _errno.EPERM: "not permitted (a sealed or read-only mapping, or a missing capability)",
    _errno.EBADF: "the userfaultfd is closed",
}

#: Where a call means something else by the same number.
_MEANING_OF_CALL: Final[dict[tuple[str, int], str]] = {
    ("PAGEMAP_SCAN", _errno.EINVAL): "an unknown category or flag, or a start within a page",
    ("PAGEMAP_SCAN", _errno.EPERM): "a page in it is not registered for write-protection with"
    " feature WP_ASYNC",
    ("PAGEMAP_SCAN", _errno.EFAULT): "the end lies before the start",
}

_REFUSALS: Final[dict[int, type[ResolutionRefused]]] = {
    _errno.ESRCH: TargetGone,
    _errno.ENOENT: RangeGone,
    _errno.EAGAIN: LayoutChanging,
}


def refusal(call: str, number: int, start: int, length: int, done: int = 0) -> ResolutionRefused:
    """Make the exception for a refused ioctl, of the class that its errno asks for.

    Args:
        call: The ioctl's name.
        number: The errno, positive.
        start: First address of the range.
        length: Length of the range, in bytes.
        done: Bytes done before the refusal.
    """
    return _REFUSALS.get(number, ResolutionRefused)(call, number, start, length, done)
