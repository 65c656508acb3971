"""Userfaultfds of other processes: what is gone is forgotten, what has moved is found."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Iterator

import pytest

from aiouffd import Userfaultfd
from aiouffd.testing.pages import Mapping, Memory
from aiouffd.testing.turning import Turning
from aiouffd.testing.watching import Source, Watch, has_ended
from tests.targets import PAGE, Target, wait_until

PAGES = 8
START = 0x10000000


class Scene:
    """A watch with nothing of its own, and what it has said to be gone."""

    def __init__(self) -> None:
        self.turning = Turning()
        self.gone: list[Source] = []
        self.watch = Watch(self.turning, self.gone.append)
        self.memory = Memory(1, PAGE, 4, "anon", None, self.watch.pump, print)

    def add(self, target: Target) -> Source:
        """Watch a target's memory."""
        source = self.watch.add(Userfaultfd.adopt(os.dup(target.uffd)), target.pid)
        source.mappings.append(self.memory.add(target.pid, source.uffd, target.at(0)))
        return source


@pytest.fixture
def scene() -> Iterator[Scene]:
    """A watch whose first source, the test process's own, is a target too."""
    made = Scene()
    with Target("anon", pages=4, user_mode_only=True) as own:
        made.add(own)
        yield made
        made.watch.close()
    made.turning.close()


def test_a_fault_of_who_was_dropped_is_no_touch(scene: Scene) -> None:
    """What was read of a process that has ended meanwhile is not handed on."""
    with Target("anon", pages=4, user_mode_only=True) as target:
        source = scene.add(target)
        target.start_read(2)
        wait_until(lambda: target.fdinfo().total == 1, "a fault")
        scene.watch.pump()
        scene.watch.drop(source)
        arrived: list[object] = []
        scene.watch.take_in(lambda *fault: arrived.append(fault))
        assert arrived == []
        assert scene.memory.mappings == scene.watch.sources[0].mappings


def test_who_ends_is_gone(scene: Scene) -> None:
    """A process that ends is said to be gone before its userfaultfd is closed."""
    with Target("anon", pages=4, user_mode_only=True) as target:
        source = scene.add(target)
        scene.watch.await_exit(target.pid)
        scene.watch.await_exit(target.pid)  # once is enough
        target.kill()
        scene.turning.run(lambda: scene.turning.stop() if scene.gone else None)
        assert scene.gone == [source]
        assert source.uffd.closed


def test_who_had_ended_is_gone(scene: Scene) -> None:
    """A process that ended before anybody waited for it is seen to be gone, too."""
    with subprocess.Popen(["true"]) as process:
        process.wait()
    with Target("anon", pages=4, user_mode_only=True) as target:
        source = scene.add(target)
        target.kill()
        target.reap()
        scene.watch.await_exit(process.pid)  # whose number stands for that of the target
        scene.turning.run(lambda: scene.turning.stop() if scene.gone else None)
        assert scene.gone == [source]


def test_a_thread_that_has_ended(scene: Scene) -> None:
    """A zombie and a thread that never was have ended; this one has not."""
    with subprocess.Popen(["true"]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert has_ended(process.pid, process.pid)
    assert has_ended(process.pid, process.pid)
    assert not has_ended(os.getpid(), os.getpid())


# --- mappings, with no kernel behind them ------------------------------------------------


@pytest.fixture
def program() -> Iterator[Source]:
    """A program that has mapped a region of eight pages."""
    uffd = Userfaultfd.open(user_mode_only=True)
    with uffd:
        memory = Memory(1, PAGE, PAGES, "anon", None, lambda: None, print)
        source = Source(uffd, 1, of_program=True)
        source.mappings.append(memory.add(1, uffd, START))
        yield source


def page_at(source: Source, address: int) -> int | None:
    """Give the page of the region that lies at an address."""
    for mapping in source.mappings:
        if mapping.address <= address < mapping.end:
            return mapping.offset_of(address) // PAGE
    return None


def test_mappings_follow_what_a_program_does(program: Source, seed: int) -> None:
    """After many random unmappings and moves each page is found where it lies, or not at all."""
    print(f"seed {seed}")
    choose = random.Random(seed)
    lies = {START + page * PAGE: page for page in range(PAGES)}
    free = START + 2 * PAGES * PAGE
    for _ in range(40):
        start = choose.choice([*lies, START]) - choose.randrange(2) * PAGE
        length = choose.randint(1, 3) * PAGE
        moving = [at for at in range(start, start + length, PAGE) if at in lies]
        whole = len(moving) == length // PAGE
        together = whole and len({lies[at] - at // PAGE for at in moving}) == 1
        if together and choose.random() < 0.7:
            program.moved(start, free, length)
            for at in moving:
                lies[free + at - start] = lies.pop(at)
            free += length + choose.randrange(2) * PAGE
        elif choose.random() < 0.3:
            program.unmapped(start, start + length)
            for at in moving:
                del lies[at]
        for at in range(START - PAGE, free + PAGE, PAGE):
            assert page_at(program, at) == lies.get(at)
        assert program.mappings == program.mappings[0].memory.mappings if lies else True


def test_a_mapping_grows_where_it_is(program: Source) -> None:
    """A fault behind a program's mapping, still within the region, belongs to it."""
    mapping = program.mappings[0]
    mapping.end = START + 2 * PAGE
    assert program.find(START + 4 * PAGE + 7) is mapping
    assert (mapping.end - START) // PAGE == 5
    assert program.find(START + PAGES * PAGE) is None
    assert program.find(START - 1) is None


def test_the_tests_own_mappings_do_not_grow(program: Source) -> None:
    """Of several regions of the test's no one reaches into what lies behind it."""
    program.of_program = False
    program.mappings[0].end = START + 2 * PAGE
    assert program.find(START + 4 * PAGE) is None


def test_a_hole_makes_two_of_one(program: Source) -> None:
    """What is behind a hole is a piece of its own, and knows which pages it has."""
    first = program.mappings[0]
    program.unmapped(START + 2 * PAGE, START + 3 * PAGE)
    second = program.mappings[1]
    assert isinstance(second, Mapping)
    assert (first.address, first.end) == (START, START + 2 * PAGE)
    assert (second.address, second.end) == (START + 3 * PAGE, START + PAGES * PAGE)
    assert second.offset_of(second.address) == 3 * PAGE
