"""Recording: which pages of an image a target took, written down while it is served.

Knows: faults as observers hear of them, and the file of a working set.
Must not know: who serves, and what the recording is for.

Laws of this file:

* What is recorded are pages whose bytes a thread waited for, each once, in the order in which
  they were brought, with the time of the touch.  A page that was brought before anybody asked
  is no fault and is not recorded; one that was asked for while it was on its way is.
* Pages answered with zeros (holes, removed pages) and failures are not recorded: they took
  nothing from the image.
* Nothing on the way of a fault waits for a disk: a thread writes, some times a second.
* The file is valid at every moment; the window ends it, the session's end, or a crash.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from .events import Event, PageFault, fault_word
from .working_set import GRANULE, Header, WorkingSet, pack_record

log: Final = logging.getLogger("aiouffd.recording")

_WRITE_EVERY: Final = 0.1  # seconds, as long as there is something to write
_MOST_WAITING: Final = 16 << 20  # bytes not yet written: a disk that stands still ends it
_LONGEST_US: Final = 0xFFFF_FFFF
_TOO_MUCH: Final = 0.5  # of the image: such a set is hardly a working set

#: Outcomes with which a fault has taken bytes of the image.
_TAKEN: Final = frozenset(("copy", "continue", "move", "already"))


class Recording:
    """An Observer that writes a working set; begins when it is made.

    Attributes:
        path: Where.
        pages: What was recorded so far.

    Sharing: the loop's thread.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        identity: str,
        image_size: int,
        page_size: int = GRANULE,
        window: float = 30.0,
    ) -> None:
        """Begin, on the running loop: write the header in the place of an older file.

        Args:
            path: Where to.
            identity: Of the image, see sources.identity_of.
            image_size: In bytes.
            page_size: Of the target's memory, in bytes; for people.
            window: Seconds from now after which nothing is recorded any more.

        Raises:
            OSError: The file cannot be written.
        """
        self.path: Final = os.fspath(path)
        header = Header(
            identity=identity,
            image_size=image_size,
            page_size=page_size,
            when=time.time(),
            window=window,
        )
        self.pages: Final = WorkingSet(header)
        self._fd = _begin_file(self.path, header.encode())
        self._loop = asyncio.get_running_loop()
        self._began_ns = time.perf_counter_ns()
        self._open = True
        self._waiting = bytearray()
        self._handed = 0  # bytes given to the thread
        self._written = 0  # of these, by the thread
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="aiouffd-recording")
        self._next: asyncio.TimerHandle | None = None
        self._end = self._loop.call_later(window, self.close)

    # --- Observer ----------------------------------------------------------------------

    def begin(self, fault: PageFault) -> None:
        """Nothing is known yet of how it ends."""

    def end(self, fault: PageFault, outcome: str, elapsed_ns: int) -> None:
        """Note a page, if its bytes were taken and it is the first time."""
        if not self._open or outcome not in _TAKEN:
            return
        offset = fault.offset
        first, pages = offset // GRANULE, self.pages
        if first in pages:
            return
        # A huge page may reach across the image's end.
        count = min(fault.length // GRANULE, pages.granules - first)
        if count < 1:
            return
        pages.add(first, count)
        touched_us = (time.perf_counter_ns() - elapsed_ns - self._began_ns) // 1000
        word = fault_word(offset, fault.flags)
        self._waiting += pack_record(word, min(max(touched_us, 0), _LONGEST_US), count)
        if self._next is None:
            self._next = self._loop.call_later(_WRITE_EVERY, self._write)

    def event(self, event: Event) -> None:
        """A layout that changes does not change what was taken."""

    def failure(self, fault: PageFault, error: Exception) -> None:
        """It took nothing."""

    # --- writing -----------------------------------------------------------------------

    def _write(self) -> None:
        """Hand over what is waiting."""
        self._next = None
        data, self._waiting = self._waiting, bytearray()
        if self._handed - self._written + len(data) > _MOST_WAITING:
            log.error("%s: the disk is too slow, the recording ends here", self.path)
            self.close()
            return
        self._handed += len(data)
        self._thread.submit(self._write_out, data)

    def _write_out(self, data: bytearray) -> None:
        """Write; in the thread."""
        try:
            with memoryview(data) as view:
                done = 0
                while done < len(data):
                    done += os.write(self._fd, view[done:])
        except OSError as error:
            log.error("%s: the recording ends here: %s", self.path, error)  # noqa: TRY400 - says it all
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self.close)
        self._written += len(data)

    def close(self) -> None:
        """End the recording; what is not yet written is written soon, by the thread."""
        if not self._open:
            return
        self._open = False
        self._end.cancel()
        if self._next is not None:
            self._next.cancel()
            self._write()
        self._thread.submit(os.close, self._fd)
        self._thread.shutdown(wait=False)
        share = self.pages.share
        if share > _TOO_MUCH:
            log.warning(
                "%s: the set is %.0f %% of the image: replaying it is hardly better than"
                " hydration; record a shorter window",
                self.path,
                100 * share,
            )

    async def aclose(self) -> None:
        """End the recording and wait until it is written.

        Cancellation: the thread goes on by itself.
        """
        self.close()
        await asyncio.to_thread(self._thread.shutdown)


class Recorder:
    """Makes the recordings of a server's sessions.

    A path with ``{id}`` gives each session a file of its own, one with ``{part}`` each part of an
    image that has parts.  Of several sessions with one file only the first is recorded: each later
    one would overwrite what the one before it has found.

    Sharing: one loop.
    """

    def __init__(self, path: str, *, window: float = 30.0) -> None:
        """Prepare.

        Args:
            path: Where to; ``{id}`` stands for the session's id, ``{part}`` for that of the image.
            window: Seconds of each session that are recorded.
        """
        self.path: Final = path
        self.window: Final = window
        self._used: set[str] = set()

    def begin(
        self,
        id: str,  # noqa: A002 - as of Session
        *,
        part: str = "",
        identity: str,
        image_size: int,
        page_size: int,
    ) -> Recording | None:
        """Begin the recording of a session, if it is to be recorded.

        A file that cannot be written is logged and costs the session nothing.

        Args:
            id: Of the session.
            part: Of the image, where it has parts.
            identity: Of its image.
            image_size: In bytes.
            page_size: Of its memory, in bytes.
        """
        path = self.path.replace("{id}", id).replace("{part}", part)
        if "{id}" not in self.path:
            if path in self._used:
                return None
            self._used.add(path)
        try:
            return Recording(
                path,
                identity=identity,
                image_size=image_size,
                page_size=page_size,
                window=self.window,
            )
        except (OSError, ValueError) as error:
            log.error("session %s is not recorded: %s", id, error)  # noqa: TRY400 - says it all
            return None


def _begin_file(path: str, header: bytes) -> int:
    """Put a file with a header in the place of an older one, and give it open for writing.

    Whoever reads the older one keeps it; nobody ever finds half a header.
    """
    import tempfile  # whoever records nothing need not have it

    fd, partial = tempfile.mkstemp(prefix=".working-set-", dir=os.path.dirname(path) or ".")
    try:
        os.write(fd, header)
        os.fchmod(fd, 0o644)
        os.replace(partial, path)
    except BaseException:
        os.close(fd)
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise
    return fd
