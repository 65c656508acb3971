"""The userfaultfds of all processes that have a region: what they say, in a queue.

Knows: which mapping an address lies in, and that forked children bring their own userfaultfd.
Must not know: what becomes of a fault.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator

from ..events import Forked, RawFault
from ..fds import OwnedFd
from ..uffd import Userfaultfd
from .pages import Mapping, Memory
from .turning import Turning


class Source:
    """One userfaultfd: that of a process's memory.

    Attributes:
        uffd: It.
        process: Whose; 0 until a forked child has touched something.
        mappings: The regions that lie there.
    """

    __slots__ = ("mappings", "process", "uffd")

    def __init__(self, uffd: Userfaultfd, process: int) -> None:
        """Take over a userfaultfd."""
        self.uffd = uffd
        self.process = process
        self.mappings: list[Mapping] = []

    def find(self, address: int) -> Mapping | None:
        """Give the mapping in which an address lies."""
        for mapping in self.mappings:
            if mapping.address <= address < mapping.end:
                return mapping
        return None

    def name_process(self, thread: int) -> None:
        """Learn whose it is from a thread that has faulted there."""
        if not self.process:
            self.process = _process_of(thread)
            for mapping in self.mappings:
                mapping.process = self.process


class Watch:
    """All userfaultfds, and the faults that were read and not taken in yet.

    Sharing: one thread.
    """

    def __init__(self, turning: Turning) -> None:
        """Begin with none."""
        self.sources: list[Source] = []
        self._turning = turning
        self._inbox: deque[tuple[Source, RawFault]] = deque()

    def add(self, uffd: Userfaultfd, process: int) -> Source:
        """Read a userfaultfd from now on."""
        source = Source(uffd, process)
        uffd.claim_reader()
        self.sources.append(source)
        self._turning.watch(uffd.fileno(), lambda: self._read(source))
        return source

    def drop(self, source: Source) -> None:
        """Read a userfaultfd no more, and close it."""
        self._turning.forget(source.uffd.fileno())
        self.sources.remove(source)
        source.uffd.close()

    def forget(self, memory: Memory) -> None:
        """Forget a region everywhere, and other processes that have none left."""
        for source in list(self.sources):
            source.mappings = [m for m in source.mappings if m.memory is not memory]
            if source is not self.sources[0] and not source.mappings:
                self.drop(source)

    def pump(self) -> None:
        """Read whatever there is."""
        for source in list(self.sources):
            self._read(source)

    def take_in(self, arrive: Callable[[Source, RawFault], None]) -> None:
        """Hand on what was read, in order."""
        while self._inbox:
            arrive(*self._inbox.popleft())

    def close(self) -> None:
        """Close all of them."""
        for source in list(self.sources):
            self.drop(source)

    def _read(self, source: Source) -> None:
        while messages := source.uffd.read():
            for message in messages:
                if isinstance(message, RawFault):
                    self._inbox.append((source, message))
                elif isinstance(message, Forked):
                    self._add_child(source, message.fd)

    def _add_child(self, parent: Source, fd: OwnedFd) -> None:
        """Watch a forked child's memory, too."""
        source = self.add(Userfaultfd.adopt(fd), 0)
        for mapping in parent.mappings:
            source.mappings.append(
                mapping.memory.add(
                    0,
                    source.uffd,
                    mapping.address,
                    like=mapping,
                    length=mapping.end - mapping.address,
                    first=mapping.first,
                )
            )


def threads_of(process: int) -> Iterator[int]:
    """Give the threads of a process, oldest first; none if it has ended."""
    try:
        yield from sorted(map(int, os.listdir(f"/proc/{process}/task")))
    except OSError:
        return


def _process_of(thread: int) -> int:
    """Give the process of a thread; the thread's own number where that cannot be told."""
    try:
        with open(f"/proc/{thread}/status", encoding="ascii", errors="replace") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("Tgid:"))
    except OSError:
        return thread
