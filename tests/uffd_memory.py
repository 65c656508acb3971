"""Memory to try a Userfaultfd on: this process's own, or a target's."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager

from aiouffd.uffd import Mode, Userfaultfd
from tests import targets
from tests.targets import PAGE, Target, wait_until

PAGES = 8


class Own:
    """Memory of this very process: filled first, read then, it never faults."""

    def __init__(self, uffd: Userfaultfd, memory: mmap.mmap) -> None:
        self.uffd = uffd
        self.memory = memory
        self.base = targets.address_of(memory)

    def at(self, page: int) -> int:
        return self.base + page * PAGE

    def __getitem__(self, page: int) -> bytes:
        return self.memory[page * PAGE : (page + 1) * PAGE]


@contextmanager
def own(features: int = 0, modes: int = Mode.MISSING) -> Iterator[Own]:
    """Anonymous memory of this process, registered with a userfaultfd of its own."""
    with (
        mmap.mmap(-1, PAGES * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory,
        Userfaultfd.open(features) as uffd,
    ):
        mine = Own(uffd, memory)
        uffd.register(mine.base, PAGES * PAGE, modes)
        yield mine


@contextmanager
def serving(target: Target) -> Iterator[Userfaultfd]:
    """The target's userfaultfd, adopted."""
    with Userfaultfd.adopt(target.take_uffd()) as uffd:
        yield uffd


def read_all(uffd: Userfaultfd, count: int) -> list[object]:
    """Read until so many messages have come."""
    messages: list[object] = []

    def enough() -> bool:
        messages.extend(uffd.read())
        return len(messages) >= count

    wait_until(enough, f"{count} messages")
    assert len(messages) == count
    return messages
