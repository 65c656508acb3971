"""The userfaultfds of all processes that have a region: what they say, in a queue.

Knows: which mapping an address lies in, that forked children bring their own userfaultfd, and
what programs do to their mappings.
Must not know: what becomes of a fault.

Laws of this file:

* What is gone is forgotten: a process that has ended, memory that was unmapped.
* Who waits where memory was unmapped or moved is woken, to find that out.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterator

from ..errors import UffdError
from ..events import Forked, RawFault, Remapped, Unmapped
from ..fds import OwnedFd
from ..uffd import Userfaultfd
from . import whose
from .pages import Mapping, Memory
from .turning import Turning


class Source:
    """One userfaultfd: that of a process's memory, or of one mapping of a program's.

    Attributes:
        uffd: It.
        process: Whose; 0 until a forked child has touched something.
        of_program: It is a program's, which may move, cut or lengthen what it has mapped.
        mappings: The regions that lie there.
    """

    __slots__ = ("_elsewhere", "mappings", "of_program", "process", "uffd")

    def __init__(self, uffd: Userfaultfd, process: int, *, of_program: bool = False) -> None:
        """Take over a userfaultfd."""
        self.uffd = uffd
        self.process = process
        self.of_program = of_program
        self.mappings: list[Mapping] = []
        self._elsewhere: bool | None = None  # its process lives in another pid namespace

    def find(self, address: int) -> Mapping | None:
        """Give the mapping in which an address lies."""
        for mapping in self.mappings:
            if mapping.address <= address < mapping.end:
                return mapping
        if self.of_program:
            # mremap makes a mapping longer where it is, and tells nobody.
            for mapping in self.mappings:
                if mapping.end <= address < mapping.address_of(mapping.memory.pages):
                    size = mapping.memory.page_size
                    mapping.end += (address - mapping.end) // size * size + size
                    return mapping
        return None

    def moved(self, start: int, to: int, length: int) -> None:
        """Note that a program has moved memory with mremap."""
        for mapping in list(self.mappings):
            if mapping.address <= start < mapping.end:
                page = mapping.offset_of(start) // mapping.memory.page_size
                self.mappings.append(
                    mapping.memory.add(self.process, self.uffd, to, length=length, first=page)
                )
        self.unmapped(start, start + length)

    def unmapped(self, start: int, end: int) -> None:
        """Note that a program has unmapped some addresses."""
        for mapping in list(self.mappings):
            if (behind := mapping.cut(start, end)) is not None:
                self.mappings.append(behind)
                mapping.memory.mappings.append(behind)
            if mapping.address >= mapping.end:
                self.mappings.remove(mapping)
                mapping.memory.mappings.remove(mapping)
        with contextlib.suppress(UffdError):
            self.uffd.wake(start, end - start)

    def thread(self, number: int, address: int) -> int | None:
        """Give our number of a thread that has faulted there, and learn whose the memory is.

        Returns:
            None if that is not known, or the thread is another process's: a debugger's, say.
        """
        if not self.process:
            if (process := whose.process_of(number, address)) is None:
                return None
            self.process = process
            for mapping in self.mappings:
                mapping.process = process
        if self._elsewhere is None:
            self._elsewhere = whose.is_elsewhere(self.process)
        return whose.thread_of(self.process, number, elsewhere=self._elsewhere)


class Watch:
    """All userfaultfds, and the faults that were read and not taken in yet.

    Sharing: one thread.
    """

    def __init__(self, turning: Turning, gone: Callable[[Source], None]) -> None:
        """Begin with none.

        Args:
            turning: The loop.
            gone: Called before a userfaultfd is closed whose memory is gone.
        """
        self.sources: list[Source] = []
        self._turning = turning
        self._gone = gone
        self._exits: dict[int, int] = {}  # pidfds of the other processes
        self._inbox: deque[tuple[Source, RawFault]] = deque()

    def add(self, uffd: Userfaultfd, process: int, *, of_program: bool = False) -> Source:
        """Read a userfaultfd from now on."""
        source = Source(uffd, process, of_program=of_program)
        uffd.claim_reader()
        self.sources.append(source)
        self._turning.watch(uffd.fileno(), lambda: self._read(source))
        return source

    def drop(self, source: Source) -> None:
        """Read a userfaultfd no more, and close it."""
        for mapping in source.mappings:
            mapping.memory.mappings.remove(mapping)
        self._turning.forget(source.uffd.fileno())
        self.sources.remove(source)
        source.uffd.close()
        self._inbox = deque(each for each in self._inbox if each[0] is not source)

    def forget(self, memory: Memory) -> None:
        """Forget a region everywhere, and other processes that have none left."""
        for source in list(self.sources):
            source.mappings = [m for m in source.mappings if m.memory is not memory]
            if source is not self.sources[0] and not source.mappings:
                self.drop(source)

    def sweep(self) -> None:
        """Drop those whose memory is gone."""
        for source in self.sources[1:]:
            if not source.uffd.target_alive():
                self._gone(source)
                self.drop(source)

    def await_exit(self, process: int) -> None:
        """Drop what another process has when it ends; where its threads stand ends with it."""
        if process in self._exits:
            return
        try:
            pidfd = os.pidfd_open(process)
        except OSError:  # it has ended already
            self._turning.after(0, self.sweep)
            return

        def on_exit() -> None:
            self._turning.forget(pidfd)
            os.close(pidfd)
            del self._exits[process]
            for source in [s for s in self.sources[1:] if s.process == process]:
                self._gone(source)
                self.drop(source)

        self._exits[process] = pidfd
        self._turning.watch(pidfd, on_exit)

    def pump(self) -> None:
        """Read whatever there is."""
        for source in list(self.sources):
            self._read(source)

    def unread(self, thread: int) -> None:
        """Forget what a thread said that was let through since it was read."""
        if any(fault.thread_id == thread for _, fault in self._inbox):
            self._inbox = deque(each for each in self._inbox if each[1].thread_id != thread)

    def take_in(self, arrive: Callable[[Source, RawFault], None]) -> None:
        """Hand on what was read, in order."""
        while self._inbox:
            arrive(*self._inbox.popleft())

    def close(self) -> None:
        """Close all of them."""
        for source in list(self.sources):
            self.drop(source)
        for pidfd in self._exits.values():
            self._turning.forget(pidfd)
            os.close(pidfd)
        self._exits.clear()

    def _read(self, source: Source) -> None:
        # It may be dropped in the same turn, and by the fork of which it tells.
        while not source.uffd.closed and (messages := source.uffd.read()):
            for message in messages:
                if isinstance(message, RawFault):
                    self._inbox.append((source, message))
                elif isinstance(message, Forked):
                    self._add_child(source, message.fd)
                elif isinstance(message, Remapped):
                    source.moved(message.start, message.to, message.length)
                elif isinstance(message, Unmapped):
                    source.unmapped(message.range.start, message.range.end)
            if source.of_program and not source.mappings and not source.uffd.closed:
                self._gone(source)
                self.drop(source)  # its one mapping is unmapped

    def _add_child(self, parent: Source, fd: OwnedFd) -> None:
        """Watch a forked child's memory, too."""
        self.sweep()
        source = self.add(Userfaultfd.adopt(fd), 0, of_program=parent.of_program)
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


def has_ended(process: int, thread: int) -> bool:
    """Say whether a thread has ended, or is a zombie."""
    try:
        with open(
            f"/proc/{process}/task/{thread}/stat", encoding="ascii", errors="replace"
        ) as file:
            return file.read().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True
