"""Orders of real threads: a race is found, comes again, and is gone from the repaired code."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import random
import re
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from aiouffd.testing import (
    END,
    Before,
    CannotFollow,
    Deadlock,
    Endless,
    Exploration,
    Harness,
    HarnessError,
    NotDeterministic,
    RaceFound,
    Region,
    interleaving,
    waiting,
)
from aiouffd.testing.ahead import Ahead
from aiouffd.testing.rules import KINDS
from aiouffd.testing.schedules import Course, Step
from aiouffd.testing.strategies import Systematic
from tests.native import build
from tests.targets import wait_until
from tests.testing.simulated import Listed, Program, every_order, run

Call = Callable[[], object]
LIBRARY = Path(__file__).with_name("counting.c")


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    """counting.c."""
    return ctypes.CDLL(str(build(LIBRARY)))


@pytest.fixture
def uffd() -> Iterator[Harness]:
    """A harness."""
    with Harness(timeout=20) as harness:
        yield harness


class Counter:
    """A number in a region, and participants that add to it."""

    def __init__(self, uffd: Harness, memory: str = "shmem") -> None:
        self.uffd = uffd
        self.region: Region = uffd.region(1, memory=memory, name="counter")
        self.pointer = self.region.pointer()
        self.ends: list[tuple[int, ...]] = []

    def both(self, function: Callable[[object], object], *others: object) -> dict[str, Call]:
        """Make participants a and b, of one function or of two."""
        other = others[0] if others else function
        assert callable(other)
        return {"a": lambda: function(self.pointer), "b": lambda: other(self.pointer)}

    def reset(self) -> None:
        self.region.poke(0, bytes(8))

    @property
    def value(self) -> int:
        return int.from_bytes(self.region.peek(0, 8), "little")

    def check(self) -> None:
        assert self.value == 2

    def explore(self, participants: dict[str, Call], **keywords: object) -> Exploration:
        return self.uffd.explore(
            participants,
            reset=self.reset,
            check=self.check,
            **keywords,  # type: ignore[arg-type]
        )


@pytest.fixture
def counter(uffd: Harness) -> Counter:
    """A counter in shared memory."""
    return Counter(uffd)


LOST: list[Step] = [("a", 1), ("b", END), ("a", END)]


# --- races -------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [kind for kind in KINDS if "huge" not in kind])
def test_a_lost_update_is_found(uffd: Harness, library: ctypes.CDLL, memory: str) -> None:
    """The order that loses one is found with one preemption, in each kind of memory."""
    counter = Counter(uffd, memory)
    with pytest.raises(RaceFound) as raised:
        counter.explore(counter.both(library.add))
    found = raised.value
    assert found.order == LOST
    assert found.orders == 4
    assert isinstance(found.error, AssertionError)
    assert found.__cause__ is found.error
    assert "counting.so+0x" in str(found)
    assert "a stands before its write of counter+0x0" in found.test
    with pytest.raises(AssertionError, match="1 == 2"):
        uffd.interleave(
            counter.both(library.add), found.order, reset=counter.reset, check=counter.check
        )


@pytest.mark.parametrize(
    "function, orders, touches",
    [
        ("add_locked", 6, 24),  # two starts, and who is blocked cannot be chosen
        ("add_atomic", 6, 12),  # one touch each, beside the starts
    ],
)
def test_the_repaired_code_is_gone_through(
    counter: Counter, library: ctypes.CDLL, function: str, orders: int, touches: int
) -> None:
    """With a lock, or an atomic addition, every order there is comes to two."""
    found = counter.explore(counter.both(library[function]), preemptions=None)
    assert (found.orders, found.touches) == (orders, touches)
    assert found.complete
    assert found.every
    assert f"{orders} orders, {touches} touches" in str(found)
    assert "every order there is" in str(found)


def test_every_order_comes(counter: Counter, library: ctypes.CDLL) -> None:
    """Of two touches and a start each there are twenty orders, six of them right."""
    values = []
    found = counter.uffd.explore(
        counter.both(library.add),
        reset=counter.reset,
        check=lambda: values.append(counter.value),
        preemptions=None,
    )
    assert found.orders == 20
    assert sorted(values) == [1] * 12 + [2] * 8


def test_bounds(counter: Counter, library: ctypes.CDLL) -> None:
    """Preemptions, orders and seconds each end an exploration, and it says so."""
    both = counter.both(library.add)
    explore, reset = counter.uffd.explore, counter.reset
    none = explore(both, reset=reset, preemptions=0)
    assert (none.orders, none.complete, none.every) == (2, True, False)
    assert str(none).endswith("every order with at most 0 preemptions")
    three = explore(both, reset=reset, orders=3)
    assert (three.orders, three.complete, three.every) == (3, False, False)
    assert str(three).endswith("not every order with at most 2 preemptions")
    assert explore(both, reset=reset, seconds=1e-9).orders == 1


def test_the_same_seed_finds_the_same(counter: Counter, library: ctypes.CDLL, seed: int) -> None:
    """Random orders come again with their seed, and the error names it."""
    found = []
    for _ in range(2):
        with pytest.raises(RaceFound) as raised:
            counter.explore(counter.both(library.add), seed=seed)
        found.append((raised.value.order, raised.value.orders, raised.value.seed))
        assert f"random orders of seed {seed}" in str(raised.value)
    assert found[0] == found[1]
    assert found[0][2] == seed


def test_random_orders_of_repaired_code(counter: Counter, library: ctypes.CDLL, seed: int) -> None:
    """They end after as many as were asked for, and claim no more than they are."""
    found = counter.explore(counter.both(library.add_locked), seed=seed, orders=20)
    assert (found.orders, found.complete, found.every) == (20, False, False)
    assert str(found).endswith(f"random orders with at most 2 preemptions, seed {seed}")


def some_text(choose: random.Random) -> str:
    """Make a program of up to three touches, with one stretch under the lock or with none."""
    steps = [choose.choice("rw") + choose.choice("01") for _ in range(choose.randint(0, 3))]
    if choose.random() < 0.7:
        start, end = sorted(choose.randint(0, len(steps)) for _ in range(2))
        steps[start:end] = ["l", *steps[start:end], "u"]
    return "".join(steps)


def simulated(text: str, numbers: list[int]) -> Callable[[], Program]:
    """Give the same program without a thread."""

    def go() -> Program:
        last = 0
        for step in re.findall(r"[rw]\d|[lu]", text):
            if step == "l":
                yield "lock", "m"
            elif step == "u":
                yield "unlock", "m"
            else:
                place = int(step[1])
                yield ("read" if step[0] == "r" else "write"), "xy"[place]
                if step[0] == "r":
                    last = numbers[place]
                else:
                    numbers[place] = last + 1

    return go


def test_real_threads_go_as_simulated_ones(
    counter: Counter, library: ctypes.CDLL, seed: int
) -> None:
    """Random programs come to the same ends in as many orders as programs without threads do."""
    print(f"seed {seed}")
    choose = random.Random(seed)
    for _ in range(8):
        texts = {name: some_text(choose) for name in "ab"}
        print(texts)
        expected = []
        numbers = [0, 0]
        programs = {name: simulated(text, numbers) for name, text in texts.items()}
        for order in every_order(programs):
            numbers[:] = [0, 0]
            run(programs, Listed(order))
            expected.append(tuple(numbers))
        counter.ends.clear()
        explored = counter.uffd.explore(
            {
                name: functools.partial(library.follow, text.encode(), counter.pointer)
                for name, text in texts.items()
            },
            reset=lambda: counter.region.poke(0, bytes(16)),
            check=lambda: counter.ends.append(struct.unpack("=2q", counter.region.peek(0, 16))),
            preemptions=None,
        )
        assert explored.every
        assert sorted(counter.ends) == sorted(expected)


# --- the test that is printed ------------------------------------------------------------

PASTED = """\
import ctypes
import os

import pytest

from aiouffd.testing import Harness

library = ctypes.CDLL({library!r})
add = library[os.environ.get("ADD", "add")]


@pytest.fixture
def uffd():
    with Harness(timeout=20) as harness:
        yield harness


def test_counter(uffd):
    counter = uffd.region(1, name="counter")

    def check():
        assert counter.peek(0, 1) == b"\\2"

    uffd.explore(
        {{"a": lambda: add(counter.pointer()), "b": lambda: add(counter.pointer())}},
        reset=lambda: counter.poke(0, bytes(8)),
        check=check,
        orders=100,
    )
"""


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.limit(240)  # three runs of pytest, on a machine that may be busy
def test_the_printed_test_fails_the_same_way(uffd: Harness, tmp_path: Path) -> None:
    """Pasted below the test that explored it fails in one run, and passes once add is repaired."""
    path = tmp_path / "test_pasted.py"
    source = PASTED.format(library=str(build(LIBRARY)))
    path.write_text(source, encoding="utf-8")
    with pytest.raises(RaceFound) as raised:
        load(path).test_counter(uffd)
    path.write_text(source + "\n\n" + raised.value.test, encoding="utf-8")

    def run(**environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "order", path],
            check=False,
            capture_output=True,
            text=True,
            timeout=75,
            env={**os.environ, "PYTHONPATH": os.getcwd(), **environment},
        )
        return done.stdout + done.stderr

    failed = run()
    assert re.search(r"test_counter_order_[0-9a-f]{4}", failed), failed
    assert r"assert b'\x01' == b'\x02'" in failed
    assert "1 failed, 1 deselected" in failed
    assert "1 passed, 1 deselected" in run(ADD="add_locked")
    assert "1 passed, 1 deselected" in run(ADD="add_atomic")


# --- who waits ---------------------------------------------------------------------------


_EARLIER: set[threading.Thread] = set()


@pytest.fixture(autouse=True)
def _left_of_others() -> None:
    """Know whom earlier tests have left: they are not this one's."""
    _EARLIER.clear()
    _EARLIER.update(threading.enumerate())


def stuck() -> list[threading.Thread]:
    return [
        each
        for each in threading.enumerate()
        if each.name.startswith("participant") and each not in _EARLIER
    ]


def set_free(library: ctypes.CDLL) -> None:
    """End a deadlock."""
    library.give_up(1)
    for each in stuck():
        each.join(20)
    library.give_up(0)
    assert not stuck()


def test_a_deadlock_is_found(counter: Counter, library: ctypes.CDLL) -> None:
    """Two mutexes taken crosswise: the order says who stood where, and the next call works."""
    with pytest.raises(RaceFound) as raised:
        counter.uffd.explore(counter.both(library.first_second, library.second_first))
    found = raised.value
    assert isinstance(found.error, Deadlock)
    assert found.error.blocked == {"a": "in futex", "b": "in futex"}
    assert found.order == [("a", 0), ("b", 1), ("a", 1)]
    assert len(stuck()) == 2
    set_free(library)
    with pytest.raises(Deadlock):
        counter.uffd.interleave(
            counter.both(library.first_second, library.second_first), found.order
        )
    set_free(library)
    assert counter.explore(counter.both(library.add_locked)).complete


@pytest.mark.leaky("the memory of who stands in a deadlock is kept")
def test_a_later_harness_knows_who_is_left_of_a_deadlock(library: ctypes.CDLL) -> None:
    """Its report says of them that they are of an earlier test, and of nobody else."""
    left = " (left over from an earlier test) "
    with Harness() as uffd:
        counter = Counter(uffd)
        with pytest.raises(RaceFound, match="deadlock"):
            uffd.explore(counter.both(library.first_second, library.second_first))
        assert not [line for line in waiting.lines(uffd) if left in line]
    with Harness() as uffd:
        go = threading.Event()
        own = uffd.start_named("own", go.wait)
        lines = [line for line in waiting.lines(uffd) if line.startswith(("participant", "own"))]
        assert [line.startswith("participant") for line in lines] == [left in x for x in lines]
        assert len(lines) == 3
        go.set()
        assert own.result()
    set_free(library)


def test_an_order_that_a_lock_forbids(counter: Counter, library: ctypes.CDLL) -> None:
    """The error says who could have gone on; everybody is let go, and the next order runs."""
    both = counter.both(library.add_locked)
    order: list[Step] = [("a", 1), ("b", 2), ("a", END)]
    with pytest.raises(CannotFollow, match=r"b is blocked \(in futex\)\. Possible: a\.") as raised:
        counter.uffd.interleave(both, order, reset=counter.reset, check=counter.check)
    assert raised.value.possible == ("a",)
    assert counter.value == 2
    done = counter.uffd.interleave(both, LOST, reset=counter.reset, check=counter.check)
    assert done.order == [("a", 1), ("b", 0), ("a", END), ("b", END)]


def test_who_polls_gives_its_turn_away(counter: Counter, library: ctypes.CDLL) -> None:
    """A loop that waits for another thread's store does not keep it from being made."""
    found = counter.uffd.explore(
        counter.both(library.wait_for, library.set), reset=counter.reset, preemptions=1
    )
    assert found.complete


def test_locks_of_python(counter: Counter) -> None:
    """Python code under a lock of Python's is blocked there, and nobody takes that for a touch."""
    lock = threading.Lock()
    view = counter.region.view

    def add() -> None:
        with lock:
            value = view[0]
            view[0] = value + 1

    found = counter.explore({"a": add, "b": add}, preemptions=None)
    assert (found.orders, found.touches, found.every) == (6, 24, True)
    view.release()


def test_who_sleeps_is_waited_for(counter: Counter) -> None:
    """A thread that sleeps for a time is not blocked: it goes on by itself."""

    def add() -> None:
        value = counter.region.peek(0, 1)[0]
        ctypes.c_ubyte.from_address(counter.region.address).value = value + 1
        time.sleep(0.01)
        ctypes.c_ubyte.from_address(counter.region.address).value = value + 1

    done = counter.uffd.interleave({"a": add, "b": add}, [("a", 2), ("b", 2)])
    assert done.order == [("a", END), ("b", END)]
    assert len(done.moves) == 6


def test_who_reads_a_pipe_waits(counter: Counter, library: ctypes.CDLL) -> None:
    """Blocked is blocked, whatever the call; what it waits for is named."""
    reading, writing = os.pipe()

    def receive() -> bytes:
        got = os.read(reading, 1)
        library.set(counter.pointer)
        return got

    def send() -> None:
        library.set(counter.pointer)
        os.write(writing, b"!")

    done = counter.uffd.interleave(
        {"a": receive, "b": send}, [("a", 0), ("b", END), ("a", END)], check=None
    )
    assert str(done.moves[0].after) == "is blocked (in read)"
    assert done.results == {"a": b"!", "b": None}
    os.close(reading)
    os.close(writing)


def test_who_wakes_up_by_itself_is_in_no_deadlock(counter: Counter, library: ctypes.CDLL) -> None:
    """A wait with a time limit that runs out is over, though nobody else could go on."""
    never = threading.Event()

    def wait() -> None:
        never.wait(0.05)
        library.set(counter.pointer)

    done = counter.uffd.interleave({"a": wait, "b": wait}, [])
    assert all(move.after is not None for move in done.moves)
    assert str(done.moves[0].after) == "is blocked (in futex)"


def test_who_waits_for_a_thread_beside_is_in_no_deadlock(counter: Counter) -> None:
    """What is waited for may come from a thread that takes no turns, however long that takes."""
    done = threading.Event()

    def work() -> None:
        time.sleep(0.6)
        done.set()

    beside = threading.Thread(target=work)
    counter.uffd.interleave({"a": done.wait, "b": done.wait}, [], reset=beside.start)
    beside.join()


def test_who_runs_for_ever_is_given_up(library: ctypes.CDLL) -> None:
    """Without a touch, an end or a wait it is not waited for beyond the time limit."""
    stop: list[int] = []

    def run() -> None:
        while not stop:
            pass

    with Harness(timeout=1) as uffd:
        counter = Counter(uffd)
        threading.Timer(1.2, stop.append, [1]).start()
        with pytest.raises(RaceFound) as raised:
            uffd.explore({"a": lambda: library.set(counter.pointer), "b": run})
        assert isinstance(raised.value.error, Endless)
        assert "b has run for 0.8 s" in str(raised.value)
        assert raised.value.order == [("a", END), ("b", 0)]


# --- participants ------------------------------------------------------------------------


def test_python_and_c_take_turns(counter: Counter, library: ctypes.CDLL) -> None:
    """An access that holds the GIL is a touch like one of C code, in every order."""
    view = counter.region.view

    def add() -> None:
        value = view[0]
        view[0] = value + 1

    values = []
    found = counter.uffd.explore(
        {"a": add, "b": lambda: library.add(counter.pointer)},
        reset=counter.reset,
        check=lambda: values.append(counter.value),
        preemptions=None,
    )
    assert (found.orders, found.touches) == (20, 80)
    assert sorted(values) == [1] * 12 + [2] * 8
    view.release()


def test_the_same_code_with_and_without_the_gil(counter: Counter) -> None:
    """One memcpy is called by ctypes, which gives the GIL away, and by bytes, which does not."""
    view = counter.region.view
    here = ctypes.create_string_buffer(64)

    def copy() -> None:
        ctypes.memmove(here, counter.region.address, 64)
        bytes(view[:64])
        ctypes.memmove(here, counter.region.address, 64)

    found = counter.uffd.explore({"a": copy, "b": copy}, preemptions=1)
    assert found.complete
    view.release()


@pytest.mark.root
def test_touches_of_system_calls(counter: Counter, library: ctypes.CDLL) -> None:
    """What a system call reads is a touch, too."""
    null = os.open("/dev/null", os.O_WRONLY)
    pair = os.pipe()
    view = counter.region.view
    seen: list[bytes] = []

    def write() -> None:
        os.write(pair[1], view[:1])

    found = counter.uffd.explore(
        {"a": write, "b": lambda: library.set(counter.pointer)},
        reset=counter.reset,
        check=lambda: seen.append(os.read(pair[0], 1)),
        preemptions=None,
    )
    assert found.every
    assert set(seen) == {b"\0", b"\1"}
    view.release()
    for fd in (null, *pair):
        os.close(fd)


def test_before_a_place(counter: Counter, library: ctypes.CDLL) -> None:
    """A step may go up to a place instead of counting."""
    done = counter.uffd.interleave(
        counter.both(library.add),
        [("a", Before(region="counter", access="write")), ("b", END)],
        reset=counter.reset,
    )
    assert done.order == LOST
    assert counter.value == 1


def test_results_and_checks(counter: Counter, library: ctypes.CDLL) -> None:
    """A check may take what the participants returned."""
    seen: list[object] = []
    done = counter.uffd.interleave({"a": lambda: 1, "b": lambda: 2}, [], check=seen.append)
    assert done.results == {"a": 1, "b": 2}
    assert seen == [done.results]


def test_what_a_participant_raises(counter: Counter, library: ctypes.CDLL) -> None:
    """An order in which one raises is a find; a given order raises it as it is."""

    def raise_if_set() -> None:
        if ctypes.c_long.from_address(counter.region.address).value:
            raise KeyError("set")

    participants = {"a": raise_if_set, "b": lambda: library.set(counter.pointer)}
    with pytest.raises(RaceFound) as raised:
        counter.uffd.explore(participants, reset=counter.reset)
    assert isinstance(raised.value.error, KeyError)
    assert "a has ended (KeyError: 'set')" in str(raised.value)
    with pytest.raises(KeyError, match="set"):
        counter.uffd.interleave(participants, raised.value.order, reset=counter.reset)


def test_two_that_raise(counter: Counter) -> None:
    """The first is raised, and says what the other one raised."""

    def fail(number: int) -> None:
        raise ValueError(f"number {number}")

    with pytest.raises(ValueError, match="number 1") as raised:
        counter.uffd.interleave({"a": lambda: fail(1), "b": lambda: fail(2)}, [])
    assert raised.value.__notes__ == ["another participant raised ValueError: number 2"]


def test_what_is_not_put_back(counter: Counter, library: ctypes.CDLL) -> None:
    """A participant that makes fewer touches the second time is told, not explored."""
    runs: list[int] = []

    def less_and_less() -> None:
        runs.append(1)
        for _ in range(4 - len(runs)):
            library.set(counter.pointer)

    with pytest.raises(NotDeterministic, match="could go on in an earlier run"):
        counter.uffd.explore({"a": less_and_less, "b": lambda: library.set(counter.pointer)})


def test_what_nobody_puts_back_may_be_all_that_is_wrong(
    counter: Counter, library: ctypes.CDLL
) -> None:
    """Without a reset a failure says so, but not one of the first order, which found all fresh."""
    notice = "no reset= was given: what earlier orders left behind may be all that is wrong"
    adding = counter.both(library.add_locked)
    with pytest.raises(RaceFound, match=rf"{notice}\nThe order:") as raised:
        counter.uffd.explore(adding, check=counter.check)
    assert raised.value.orders == 2
    with pytest.raises(RaceFound) as raised:
        counter.uffd.explore(adding, check=counter.check)
    assert raised.value.orders == 1
    assert notice not in str(raised.value).partition("The order:")[0]  # the source has it too
    with pytest.raises(RaceFound) as raised:
        counter.explore(counter.both(library.add))
    assert raised.value.orders > 1
    assert notice not in str(raised.value).partition("The order:")[0]


def test_nobody_to_take_turns(uffd: Harness) -> None:
    """Without participants there is no order."""
    with pytest.raises(ValueError, match="nobody to take turns"):
        uffd.explore({})


def test_one_call_at_a_time(counter: Counter, library: ctypes.CDLL) -> None:
    """A check that runs an order itself is told that it may not; afterwards it may."""

    def run() -> None:
        counter.uffd.interleave(counter.both(library.add), [])

    with pytest.raises(RaceFound, match="one call at a time"):
        counter.uffd.explore(counter.both(library.add), check=run)
    run()


def test_a_check_that_calls_fail(counter: Counter, library: ctypes.CDLL) -> None:
    """pytest.fail() is a find, though what it raises is no Exception; pytest.skip() is none."""
    both = counter.both(library.add)
    with pytest.raises(RaceFound, match="Failed: wrong"):
        counter.uffd.explore(both, check=lambda: pytest.fail("wrong"))
    with pytest.raises(pytest.skip.Exception):
        counter.uffd.explore(both, check=lambda: pytest.skip("not here"))


def test_a_participant_that_exits(counter: Counter) -> None:
    """Whatever a participant raises is a find; errors of the harness itself are not."""
    with pytest.raises(RaceFound, match="SystemExit: 3"):
        counter.uffd.explore({"a": lambda: sys.exit(3), "b": lambda: None})
    trouble = HarnessError("trouble")

    def fail() -> None:
        raise trouble

    with pytest.raises(HarnessError, match="trouble"):
        counter.uffd.explore({"a": fail, "b": lambda: None})
    with pytest.raises(HarnessError, match="trouble"):
        counter.uffd.explore({"a": lambda: None, "b": lambda: None}, check=fail)


def test_looking_at_the_memory_itself(counter: Counter, library: ctypes.CDLL) -> None:
    """Reset and check may touch the region as any code does: it is nobody's turn then."""
    view = counter.region.view

    def reset() -> None:
        view[:8] = bytes(8)

    def check() -> None:
        assert view[0] == 2

    found = counter.uffd.explore(
        counter.both(library.add_locked), reset=reset, check=check, preemptions=None
    )
    assert (found.orders, found.touches) == (6, 24)
    view.release()


@pytest.mark.parametrize("settings", [{"user_mode_only": True}, {"backend": "trampoline"}])
def test_other_harnesses(library: ctypes.CDLL, settings: dict[str, object]) -> None:
    """Without privilege, and with every thread in the trampoline, the orders are the same."""
    with Harness(timeout=20, **settings) as uffd:  # type: ignore[arg-type]
        counter = Counter(uffd)
        found = uffd.explore(counter.both(library.add), reset=counter.reset, preemptions=None)
        assert (found.orders, found.touches) == (20, 80)


def test_moves_that_take_long(library: ctypes.CDLL) -> None:
    """The time limit is for one move, not for all of them."""

    def slowly() -> None:
        for _ in range(5):
            library.set(number.pointer)
            time.sleep(0.15)

    with Harness(timeout=1) as uffd:
        number = Counter(uffd)
        done = uffd.interleave({"a": slowly}, [("a", END)])
        assert done.order == [("a", END)]
        assert len(done.moves) == 6


def test_a_call_whose_source_is_not_known(counter: Counter, library: ctypes.CDLL) -> None:
    """The test that is printed then has names to fill in."""
    code = "explore(both, reset=reset, check=check)"
    names = {
        "explore": counter.uffd.explore,
        "both": counter.both(library.add),
        "reset": counter.reset,
        "check": counter.check,
    }
    with pytest.raises(RaceFound) as raised:
        exec(code, names)
    assert "\ndef test_order_" in raised.value.test
    assert '{"a": a, "b": b}' in raised.value.test


# --- the harness ends --------------------------------------------------------------------


def test_the_helper_dies_in_the_middle(library: ctypes.CDLL) -> None:
    """The run ends with an error, and the threads with it."""
    with pytest.raises(HarnessError), Harness(timeout=20) as uffd:
        counter = Counter(uffd)
        uffd.explore(
            {
                "a": lambda: os.kill(uffd.service_pid, signal.SIGKILL),
                "b": lambda: library.set(counter.pointer),
            }
        )
    wait_until(lambda: not stuck(), "the end of the participants")


def test_nobody_stands_for_ever(library: ctypes.CDLL) -> None:
    """Participants that the test process has forgotten are let go at the time limit."""
    with Harness(timeout=0.5) as uffd:
        counter = Counter(uffd)
        both = counter.both(library.set)
        raises = pytest.raises(HarnessError, match="an order of turns")
        with raises, interleaving.Stage(uffd, both) as stage:
            for each in stage._all.values():
                each.make_ready()
            course = Course(both, Systematic())
            stage._follow(course, "run", Ahead(["a", "b"], [], stay=False))
            end = time.monotonic() + 20
            while time.monotonic() < end:
                uffd.order("count")
