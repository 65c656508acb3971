"""Descriptors that outlive this process: the client's side of systemd's fd store.

Knows: FDSTORE, FDSTOREREMOVE, BARRIER, and what a restart brings back.
Must not know: what the descriptors are for; who keeps them (systemd, or ``aiouffd keep``).

Laws of this file:

* What belongs together goes in one message and comes back under one name: there is no half of
  a group in the store.
* Once ``put`` has returned, the descriptors outlive this process: the datagram that carries
  them lies in the keeper's queue.
* The store's limit is known and kept here: a keeper closes what is too much, without a word.
* So is the kernel's: all names come back in one environment variable (LISTEN_FDNAMES), and with
  a longer one than it allows the next process could not even be started.
* Nobody polls our descriptors (FDPOLL=0): a userfaultfd or pidfd that is readable is no reason
  to throw it away.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Final, Self

from .errors import StoreError
from .fds import OwnedFd
from .sd_notify import Channel

#: What one message may carry (SCM_MAX_FD).
MAX_GROUP: Final = 253

#: What all names together may take (MAX_ARG_STRLEN is 32 pages), each once for each of its
#: descriptors; some room is left for sockets of other names.
MAX_NAME_BYTES: Final = 31 * 4096


class FdStore:
    """The fd store of the service manager that has started this process.

    Attributes:
        limit: How many descriptors it keeps for us.
        taken: What it gave back when this process started, by name; the caller takes what it
            needs out of it, and owns that.

    Sharing: one thread.
    """

    def __init__(self, path: str, limit: int, taken: Sequence[tuple[str, OwnedFd]] = ()) -> None:
        """Connect to the service manager.

        Args:
            path: Its notify socket.
            limit: How many descriptors it keeps.
            taken: What it gave back.

        Raises:
            OSError: It does not listen.
        """
        self._channel = Channel(path)
        self.limit: Final = limit
        self.taken: dict[str, list[OwnedFd]] = {}
        for name, fd in taken:
            self.taken.setdefault(name, []).append(fd)
        self._counts = {name: len(fds) for name, fds in self.taken.items()}
        self._total = sum(self._counts.values())
        self._name_bytes = sum(_bytes_of(*one) for one in self._counts.items())

    @classmethod
    def from_environment(
        cls,
        taken: Sequence[tuple[str, OwnedFd]] = (),
        environment: Mapping[str, str] | None = None,
    ) -> Self | None:
        """Give the fd store if this process was started with one, else None.

        Args:
            taken: What it gave back, from ``take_listen_fds``.
            environment: By default ours.

        Raises:
            OSError: There should be one, but it does not listen.
        """
        source = os.environ if environment is None else environment
        path, limit = source.get("NOTIFY_SOCKET", ""), source.get("FDSTORE", "")
        if not path or not limit.isdecimal() or not int(limit):
            return None
        return cls(path, int(limit), taken)

    def __len__(self) -> int:
        """How many descriptors are in it, as far as we know."""
        return self._total

    def __bool__(self) -> bool:
        """Be true though it is empty: ``store or ...`` asks whether there is one."""
        return True

    def holds(self, name: str) -> bool:
        """Say whether something is kept under a name."""
        return name in self._counts

    def put(self, name: str, fds: Sequence[OwnedFd | int]) -> None:
        """Keep a group of descriptors, all or none.

        Args:
            name: Printable, without a colon; a name that is there gets them in addition.
            fds: They stay the caller's; the store has duplicates.

        Raises:
            StoreError: It is full, or nobody reads its messages.
        """
        if self._total + len(fds) > self.limit:
            raise StoreError(
                f"the fd store is full: {len(self)} descriptors of at most {self.limit}; raise"
                " FileDescriptorStoreMax= or --max-fds"
            )
        name_bytes = self._name_bytes + _bytes_of(name, len(fds))
        if name_bytes > MAX_NAME_BYTES:
            raise StoreError(
                f"the fd store is full: the names of {len(self)} descriptors are all that can be"
                " given back"
            )
        numbers = [fd if isinstance(fd, int) else fd.fileno() for fd in fds]
        self._send(f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0", numbers)
        self._counts[name] = self._counts.get(name, 0) + len(fds)
        self._total += len(fds)
        self._name_bytes = name_bytes

    def remove(self, name: str) -> None:
        """Keep the descriptors of a name no longer; nothing happens if there are none.

        Raises:
            StoreError: Nobody reads its messages.
        """
        count = self._counts.pop(name, 0)
        if count:
            self._total -= count
            self._name_bytes -= _bytes_of(name, count)
            self._send(f"FDSTOREREMOVE=1\nFDNAME={name}")

    def barrier(self, timeout: float = 5.0) -> bool:
        """Wait until everything that was said has been worked off.

        Returns:
            Whether it was, within ``timeout`` seconds.
        """
        reader, writer = os.pipe()
        try:
            try:
                self._send("BARRIER=1", [writer])
            finally:
                os.close(writer)
            poll = select.poll()
            poll.register(reader, 0)  # POLLHUP is always reported
            deadline = time.monotonic() + timeout
            while (left := deadline - time.monotonic()) > 0:
                if poll.poll(left * 1000):
                    return True
            return False
        finally:
            os.close(reader)

    def answers(self) -> bool:
        """Say whether somebody keeps what was stored; waits for seconds if nobody does."""
        try:
            return self.barrier()
        except StoreError:
            return False

    def _send(self, state: str, fds: Sequence[int] = ()) -> None:
        try:
            self._channel.send(state, fds)
        except OSError as error:
            raise StoreError(f"the fd store does not answer: {error}") from error

    def close(self) -> None:
        """Close the way to the store, and what nobody has taken; what it keeps it keeps."""
        self._channel.close()
        for fds in self.taken.values():
            for fd in fds:
                fd.close()
        self.taken.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _bytes_of(name: str, count: int) -> int:
    """Say what the names of a group take where they are given back."""
    return (len(name) + 1) * count
