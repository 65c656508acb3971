"""A machine of examples/kvm_guest.py in a process of its own, for what a test asks of it.

    python -m tests.examples.machine exits
    python -m tests.examples.machine flip SEED
    python -m tests.examples.machine copy SEED ROUNDS
    python -m tests.examples.machine own
    python -m tests.examples.machine served SOCKET

Knows: one job per word; each prints what it found as JSON.
Must not know: pytest.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import mmap
import os
import random
import socket
import sys
from collections.abc import Callable
from typing import Final, Self

from aiouffd.dirty import DirtyRound, DirtyTracker
from aiouffd.events import PageFault
from aiouffd.pager import Pager
from aiouffd.uffd import Feature, Userfaultfd
from kvm_guest import (
    FIRST,
    IMMEDIATE_EXIT_AT,
    PAGE,
    Machine,
    errors_in,
    fill_ram,
    is_written,
)

SIZE: Final = 16 << 20
PAGES: Final = (SIZE - FIRST) // PAGE
WRITTEN: Final = 64  # a quarter of the pages

#: What it takes for asynchronous write-protection of a memfd.
TRACKING: Final = (
    Feature.WP_ASYNC
    | Feature.WP_UNPOPULATED
    | Feature.WP_HUGETLBFS_SHMEM
    | Feature.PAGEFAULT_FLAG_WP
)


class Ram:
    """The memory of a machine: a memfd, mapped; empty at first."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("guest-ram", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, SIZE)
        self.map = mmap.mmap(self.fd, SIZE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.map.close()
        os.close(self.fd)


def new_ram() -> Ram:
    """Make the memory of a machine that has not run yet."""
    ram = Ram()
    fill_ram(ram.map, written=WRITTEN)
    return ram


class _StopsAtAnExit(Machine):
    """It is told to stop while its VMM does what the guest has asked for."""

    def _serve_exit(self) -> None:
        super()._serve_exit()
        self._run[IMMEDIATE_EXIT_AT] = 1


def exits() -> None:
    """Stop the machine at each of its exits, and go on with another one in the same RAM."""
    state = b""
    with new_ram() as ram:
        for number in range(1, 11):
            with _StopsAtAnExit(ram.map) as machine:
                if state:
                    machine.load(state)
                machine.start()
                machine.wait_for_pass(number)
                machine.stop()
                state = machine.save()
    print(json.dumps({"passes": number, "errors": errors_in(state)}))


def flip(seed: str) -> None:
    """Flip single bits of the RAM behind the guest's back."""
    rng = random.Random(int(seed))
    with new_ram() as ram, Machine(ram.map) as machine:
        flipped = []
        for _ in range(30):
            page = rng.randrange(PAGES)
            at, bit = FIRST + page * PAGE + rng.randrange(PAGE), 1 << rng.randrange(8)
            flipped.append(page)
            ram.map[at] ^= bit
            machine.start()
            machine.wait_for_pass(machine.passes + 2)  # the first may have been past that page
            machine.stop()
            assert set(machine.wrong[len(flipped) - 1 :]) == {page}
            del machine.wrong[len(flipped) :]
            if not is_written(page, WRITTEN):  # nobody else puts it right
                ram.map[at] ^= bit
        print(json.dumps({"flipped": flipped, "wrong": machine.wrong}))


async def copy(seed: str, rounds: str) -> None:
    """Copy the RAM of a running guest by what a tracker says was written."""
    rng = random.Random(int(seed))
    with (
        new_ram() as ram,
        Machine(ram.map) as machine,
        Userfaultfd.open(TRACKING, user_mode_only=True) as uffd,
        mmap.mmap(ram.fd, SIZE) as view,  # another mapping: reading it costs the guest nothing
        DirtyTracker(uffd) as tracker,
    ):
        machine.start()
        machine.wait_for_pass(2)
        tracker.add(ram.address, SIZE, file=ram.fd)
        tracker.begin()
        taken = bytearray(view[:])
        counts = []

        def take(found: DirtyRound) -> None:
            for _, at, length in found.runs:
                for page in range((at - FIRST) // PAGE, (at + length - FIRST) // PAGE):
                    assert is_written(page, WRITTEN), f"nobody has written page {page}"
                taken[at : at + length] = view[at : at + length]
            counts.append(found.bytes // PAGE)

        stops = 0
        for number in range(1, int(rounds) + 1):
            await asyncio.sleep(rng.random() * 0.005)  # the instants of the rounds
            if number % 5:
                take(await tracker.collect())
                continue
            machine.stop()
            stops += taken != view[:]
            take(tracker.collect_now())
            assert taken == view[:], f"a write was not seen before round {number}"
            machine.start()
        print(json.dumps({"written_pages": counts, "stops": stops, "wrong": machine.wrong}))


def _check(machine: Machine) -> dict[str, object]:
    """Let the guest look at each page twice more."""
    machine.wait_for_pass(machine.passes + 3)
    machine.stop()
    return {"passes": machine.passes, "errors": errors_in(machine.save())}


async def own() -> None:
    """Serve the guest's missing pages by this process's own loop, and stop it in a fault."""
    with new_ram() as ram, Ram() as empty, Machine(empty.map) as machine:
        waits, go_on = asyncio.Event(), asyncio.Event()

        async def fill(fault: PageFault) -> bytes:
            if fault.offset >= SIZE // 2 and not waits.is_set():
                waits.set()
                await go_on.wait()
            return ram.map[fault.offset : fault.offset + fault.length]

        async with Pager(Userfaultfd.open(Feature.MISSING_SHMEM)) as pager:
            pager.register(empty.address, SIZE, fill)
            machine.start()
            await waits.wait()
            await asyncio.to_thread(machine.stop)  # its page does not come before that
            machine.start()
            go_on.set()
            found = await asyncio.to_thread(_check, machine)
            print(json.dumps(found | {"faults": pager.counters.faults}))


def served(connection: str) -> None:
    """Have the missing pages served by the process at the other end of a socket."""
    with (
        socket.socket(fileno=int(connection)) as parent,
        Ram() as empty,
        Machine(empty.map) as machine,
    ):
        with Userfaultfd.open(Feature.MISSING_SHMEM) as uffd:
            socket.send_fds(parent, [empty.address.to_bytes(8, "little")], [uffd.fileno()])
        parent.recv(1)  # it serves
        machine.start()
        print(json.dumps(_check(machine)))


def main(word: str, *arguments: str) -> None:
    jobs: dict[str, Callable[..., None]] = {
        "exits": exits,
        "flip": flip,
        "copy": lambda *words: asyncio.run(copy(*words)),
        "own": lambda: asyncio.run(own()),
        "served": served,
    }
    jobs[word](*arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
