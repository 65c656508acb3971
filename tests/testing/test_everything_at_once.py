"""Random rules, threads, system calls, children and orders, against a model of the bytes."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import threading
import time
from typing import Any

import pytest

from aiouffd.testing import Freeze, Harness, Region, latency
from aiouffd.testing.rules import KINDS

PAGE = os.sysconf("SC_PAGE_SIZE")
PAGES = 4
#: Where each page's bytes are; the n-th thread has the n-th byte after each.
PLACES = [page * PAGE + offset for page in range(PAGES) for offset in (0, 20, 100, PAGE - 16)]
POKED = 9  # ... and the test itself this one
OPERATIONS = ("load", "store", "count", "view", "set", "write", "read")
SECONDS = 4.0

Script = list[tuple[str, int, int]]


class Worker:
    """A thread's accesses to bytes of its own, and what they have to find."""

    def __init__(self, library: ctypes.CDLL, region: Region, number: int, script: Script) -> None:
        self.library = library
        self.region = region
        self.script = [(what, PLACES[place] + number, value) for what, place, value in script]
        self.bytes = {place + number: region.peek(place + number, 1)[0] for place in PLACES}
        self.touches: list[tuple[str, int]] = []  # that every=True has to see
        self.view = region.view

    def run(self) -> None:
        """Do all of it."""
        reading, writing = os.pipe()
        try:
            for what, at, value in self.script:
                self.one(what, at, value, reading, writing)
        finally:
            os.close(reading)
            os.close(writing)
            self.view.release()

    def one(self, what: str, at: int, value: int, reading: int, writing: int) -> None:
        """Make one kind of access."""
        library, pointer, found = self.library, self.region.pointer(at), None
        kinds = {"count": ["read", "write"] * 3, "fork": []}
        reads = ["read"] if what in ("load", "view", "write") else ["write"]
        self.touches += [(kind, at) for kind in kinds.get(what, reads)]
        match what:
            case "load":
                found = library.load(pointer)
            case "store":
                library.store(pointer, value)
            case "count":
                library.increment(pointer, 3)
                value = (self.bytes[at] + 3) % 256
            case "view":
                found = self.view[at]
            case "set":
                self.view[at] = value
            case "write":
                assert library.write_out(writing, pointer, 1) == 1
                found = os.read(reading, 1)[0]
            case "read":
                os.write(writing, bytes([value]))
                assert library.read_in(reading, pointer, 1) == 1
            case "fork":
                found = library.load_forked(pointer)
        if found is None:
            self.bytes[at] = value
        else:
            assert found == self.bytes[at], (what, at)


class Round:
    """One region, some threads, and whatever the test does meanwhile."""

    def __init__(self, uffd: Harness, library: ctypes.CDLL, choose: random.Random) -> None:
        self.uffd = uffd
        self.choose = choose
        kind = choose.choice([kind for kind in KINDS if "huge" not in kind])
        self.contents = bytearray(choose.randbytes(PAGES * PAGE))
        self.region = uffd.region(PAGES, contents=bytes(self.contents), memory=kind)
        operations = [*OPERATIONS, *(["fork"] if choose.random() < 0.3 else [])]
        self.workers = [
            Worker(
                *(library, self.region, number),
                [
                    (
                        choose.choice(operations),
                        choose.randrange(len(PLACES)),
                        choose.randrange(256),
                    )
                    for _ in range(choose.randrange(3, 12))
                ],
            )
            for number in range(choose.randrange(1, 5))
        ]
        self.freezes: list[Freeze] = []

    def arm(self, stack: contextlib.ExitStack) -> None:
        """Arm a rule that changes no bytes."""
        choose, region = self.choose, self.region
        place = choose.choice(
            [*region.pages, region.all, region.at(choose.choice(PLACES) + choose.randrange(4))]
        )
        access = choose.choice(("any", "read", "write"))
        if choose.random() < 0.7:
            freeze = place.freeze(access, nth=choose.choice((1, 2, 5)), every=choose.random() < 0.4)
            self.freezes.append(stack.enter_context(freeze))
        else:
            slow = latency.uniform(0, 0.003)
            stack.enter_context(place.slow(slow, access=access, every=choose.random() < 0.5))

    def disturb(self, stack: contextlib.ExitStack) -> None:
        """Do something from outside."""
        what = self.choose.random()
        if what < 0.2:
            self.region.rearm()
        elif what < 0.3:
            self.arm(stack)
        elif what < 0.5:
            at = self.choose.choice(PLACES) + POKED
            self.contents[at] = self.choose.randrange(256)
            self.region.poke(at, self.contents[at : at + 1])
        elif what < 0.6:
            self.region.peek(self.choose.choice(PLACES), 10)

    def release(self) -> None:
        """Let some go who stand, in any order."""
        for freeze in self.freezes:
            standing = list(freeze.frozen)
            self.choose.shuffle(standing)
            for each in standing[: self.choose.randrange(1, 3)]:
                each.release()

    def run(self, limit: float) -> None:
        """Run it, and look at every byte."""
        with contextlib.ExitStack() as stack:
            alone = len(self.workers) == 1 and self.choose.random() < 0.7
            for _ in range(self.choose.randrange(3)):
                self.arm(stack)
            record: Any = stack.enter_context(self.uffd.record(self.region, every=True))
            running = [self.uffd.start(worker.run) for worker in self.workers]
            end = time.monotonic() + limit
            while not all(each.done for each in running):
                assert time.monotonic() < end, self.uffd.account()
                self.release()
                if not alone:
                    self.disturb(stack)
            for each in running:
                each.result()
            if alone:  # else a page that is there for one may be found by another, unseen
                seen = [(t.access.value, t.offset) for t in record if t.thread == running[0].tid]
                assert seen == self.workers[0].touches
        for worker in self.workers:
            for at, value in worker.bytes.items():
                self.contents[at] = value
        assert self.region.peek(0, PAGES * PAGE) == bytes(self.contents)
        self.region.close()


@pytest.mark.root
@pytest.mark.parametrize("backend", ["auto", "trampoline"])
def test_no_byte_is_wrong_and_nobody_is_left_standing(
    library: ctypes.CDLL, seed: int, backend: str, time_scale: float
) -> None:
    """Whatever is mixed with whatever, each access finds what it has to, and ends."""
    print(f"seed {seed}")
    choose = random.Random(seed)
    end = time.monotonic() + SECONDS
    rounds = 0
    while time.monotonic() < end:
        with Harness(timeout=20, seed=seed, backend=backend) as uffd:
            for _ in range(20):
                Round(uffd, library, choose).run(15 * time_scale)
                rounds += 1
    print(f"{rounds} rounds")


def test_pages_leave_under_a_thread_that_has_the_gil(uffd: Harness, memory: str) -> None:
    """Taking pages away needs nothing that a Python thread which stands there may hold."""
    region = uffd.region(1, contents=b"a", memory=memory)
    view = region.view
    enough = threading.Event()

    def work() -> set[int]:
        found = {view[0]}
        while not enough.is_set():
            found.add(view[0])
        return found

    running = uffd.start(work)
    for _ in range(100):
        region.rearm()
    enough.set()
    assert running.result() == {ord("a")}
    view.release()
