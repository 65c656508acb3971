"""What ``criu restore --lazy-pages`` says on the socket of the lazy-pages daemon.

Knows: the bytes, and where among them a descriptor belongs.
Must not know: checkpoints, sessions, which descriptor is a userfaultfd.

One connection is one restore.  Its tasks are restored side by side, and each hands itself over,
one at a time and in any order:

=========================== =================================================================
i32, a pid of the images    negative: a zombie, which has no memory; nothing more of it follows
one byte, of any value      for all others; SCM_RIGHTS brings the task's userfaultfd with it
u32 0x52535446              all tasks are restored; then the stream ends
=========================== =================================================================

A stream that ends before that word tells that the restore has failed.  Nothing is ever written.
The same in CRIU 3.17.1, 4.1.1 and 4.2.1.

Laws of this file:

* The parser makes no system call.  What it is fed it owns until it has given it away; a refusal
  closes it.
* ``wanted`` says how many bytes may be read next: more could bring a descriptor that belongs to
  a byte behind them.
* What is refused is refused by name: which task, what was wrong.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from ...errors import PeerError
from ...fds import OwnedFd

#: The name that ``criu restore`` looks for, in its work directory.
NAME: Final = "lazy-pages.socket"

_FINISHED: Final = 0x52535446
_PID: Final = struct.Struct("<i")
_HIGHEST_PID: Final = 1 << 22  # PID_MAX_LIMIT


@dataclass(frozen=True, slots=True)
class Handed:
    """A task has handed its memory over.

    Attributes:
        pid: Its process id in the images.
        fd: What should be its userfaultfd; the receiver's to close.
    """

    pid: int
    fd: OwnedFd


@dataclass(frozen=True, slots=True)
class Zombie:
    """A dead task was restored: it has no memory.

    Attributes:
        pid: Its process id in the images.
    """

    pid: int


@dataclass(frozen=True, slots=True)
class Finished:
    """All tasks are restored, and their memory is registered."""


Message: TypeAlias = Handed | Zombie | Finished


class Parser:
    """Bytes and descriptors in, messages out.

    Sharing: none needed; it waits for nothing.
    """

    def __init__(self) -> None:
        self._text = bytearray()
        self._pid = 0  # of the task whose descriptor is to come next
        self._seen: set[int] = set()
        self._finished = False

    @property
    def wanted(self) -> int:
        """How many bytes to read next, at most; 0 when nothing more comes."""
        if self._finished:
            return 0
        return 1 if self._pid else _PID.size - len(self._text)

    def feed(self, data: bytes, fds: Sequence[OwnedFd] = ()) -> Message | None:
        """Take in what one read gave.

        Args:
            data: One to ``wanted`` bytes.
            fds: The descriptors that came with them; from now on the parser's to close.

        Returns:
            A message, if one is complete with that.

        Raises:
            PeerError: The peer broke the protocol; the descriptors are closed.
            ValueError: Those were more bytes than wanted, or none; the descriptors are closed.
        """
        try:
            if not 0 < len(data) <= self.wanted:
                raise ValueError(f"{len(data)} bytes were read, {self.wanted} are wanted")
            if self._pid:
                pid, self._pid = self._pid, 0
                if len(fds) != 1:
                    raise PeerError(
                        f"task {pid} handed {len(fds) or 'no'} descriptors over;"
                        " one userfaultfd was expected"
                    )
                fd, fds = fds[0], ()
                return Handed(pid, fd)
            if fds:
                raise PeerError("a descriptor came with a pid; it belongs to the byte behind it")
            self._text += data
            if len(self._text) < _PID.size:
                return None
            return self._task()
        finally:
            for each in fds:
                each.close()

    def _task(self) -> Message | None:
        """Read a pid, or the word at the end."""
        (number,) = _PID.unpack(self._text)
        self._text.clear()
        if number == _FINISHED:
            self._finished = True
            return Finished()
        pid = abs(number)
        if not 0 < pid <= _HIGHEST_PID:
            raise PeerError(
                f"sent {number}, which is no process id: is it a `criu restore --lazy-pages`?"
            )
        if pid in self._seen:
            raise PeerError(f"task {pid} was handed over twice")
        self._seen.add(pid)
        if number < 0:
            return Zombie(pid)
        self._pid = pid
        return None

    def end(self) -> None:
        """Take in the end of the stream, which may come at the very end only.

        Raises:
            PeerError: It came before; the restore has failed.
        """
        if self._finished:
            return
        if self._pid:
            how = f"while it handed task {self._pid} over"
        elif self._text:
            how = "in the middle of a pid"
        elif count := len(self._seen):
            tasks = "1 task" if count == 1 else f"{count} tasks"
            how = f"or was stopped: its connection ended after {tasks}"
        else:
            how = "or was stopped before it handed any task over"
        raise PeerError(f"the restore failed {how}; the log of `criu restore` says why")
