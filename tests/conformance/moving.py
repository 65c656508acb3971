"""MOVE within one process: UFFDIO_MOVE's caller must be in the target.

usage: moving.py TEST LOOP

A thread touches the destination through ctypes, which gives the GIL up, and the loop's thread
answers each fault with Move.  Prints nothing; exit status 0 means that everything held.
"""

from __future__ import annotations

import asyncio
import ctypes
import mmap
import sys
from typing import Any

from aiouffd import Feature, Move, PageFault, Pager, Resolution, Userfaultfd

PAGE = mmap.PAGESIZE
HUGE = 2 * 1024 * 1024
MADV_DONTFORK, MADV_HUGEPAGE, MADV_NOHUGEPAGE = 10, 14, 15

libc: Any = ctypes.CDLL(None, use_errno=True)


class Memory:
    """Private anonymous memory, aligned to huge pages, known by address alone."""

    def __init__(self, length: int) -> None:
        self.length = length
        self._map = mmap.mmap(-1, length + HUGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._byte = ctypes.c_char.from_buffer(self._map)
        self.address = -(-ctypes.addressof(self._byte) // HUGE) * HUGE

    def advise(self, advice: int) -> None:
        address, length = ctypes.c_void_p(self.address), ctypes.c_size_t(self.length)
        if libc.madvise(address, length, advice):
            raise OSError(ctypes.get_errno(), "madvise")

    def number(self) -> None:
        """Give each page its number plus one."""
        for page in range(self.length // PAGE):
            word = (page + 1).to_bytes(8, "little") * (PAGE // 8)
            ctypes.memmove(self.address + page * PAGE, word, PAGE)

    def numbers(self) -> list[int]:
        """Read each page's number; may fault, so in a thread without the GIL."""
        word = ctypes.create_string_buffer(8)
        found = []
        for page in range(self.length // PAGE):
            ctypes.memmove(word, self.address + page * PAGE, 8)
            found.append(int.from_bytes(word.raw, "little"))
        return found

    def huge_bytes(self) -> int:
        """AnonHugePages of the mapping that holds the address."""
        inside = False
        with open("/proc/self/smaps", encoding="ascii") as file:
            for line in file:
                first = line.split(maxsplit=1)[0]
                if "-" in first:
                    low, _, high = first.partition("-")
                    inside = int(low, 16) <= self.address < int(high, 16)
                elif inside and first == "AnonHugePages:":
                    return int(line.split()[1]) * 1024
        return 0


async def move(*, length: int, unit: int, source_huge: bool, destination_huge: bool) -> None:
    """Move ``unit`` bytes for each fault, and compare everything."""
    source, destination = Memory(length), Memory(length)
    source.advise(MADV_DONTFORK)
    source.advise(MADV_HUGEPAGE if source_huge else MADV_NOHUGEPAGE)
    destination.advise(MADV_HUGEPAGE if destination_huge else MADV_NOHUGEPAGE)
    source.number()
    assert source.huge_bytes() == (length if source_huge else 0), source.huge_bytes()
    faults: list[PageFault] = []

    async def serve(fault: PageFault) -> Resolution:
        faults.append(fault)
        return Move(source.address + fault.offset)

    pager = Pager(Userfaultfd.open(Feature.MOVE))
    async with pager:
        pager.register(destination.address, length, serve, page_size=unit)
        numbers = await asyncio.to_thread(destination.numbers)
        assert numbers == list(range(1, length // PAGE + 1)), numbers
        assert len(faults) == length // unit, len(faults)
        assert not any(fault.write for fault in faults)
        if source_huge:
            moved_whole = destination.huge_bytes()
            assert moved_whole == (length if destination_huge else 0), moved_whole
        assert source.numbers() == [0] * (length // PAGE)


TESTS = {
    "move": {"length": 64 * PAGE, "unit": PAGE, "source_huge": False, "destination_huge": False},
    "move-pmd": {"length": 4 * HUGE, "unit": HUGE, "source_huge": True, "destination_huge": True},
    # A destination that must not have huge pages: each huge source page is split on the way.
    "move-pmd-split": {
        "length": HUGE,
        "unit": HUGE,
        "source_huge": True,
        "destination_huge": False,
    },
}


def main() -> None:
    name, loop = sys.argv[1:]
    factory = None
    if loop == "uvloop":
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(move(**TESTS[name]))  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
