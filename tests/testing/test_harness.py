"""The harness on the real kernel: threads of a C library and of Python touch its regions."""

from __future__ import annotations

import array
import contextlib
import ctypes
import gc
import os
import random
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from aiouffd import ClosedError, NotSupported
from aiouffd.kernel import tracing
from aiouffd.testing import (
    Access,
    Freeze,
    FreezeTimeout,
    Harness,
    HarnessError,
    Region,
    latency,
    trampoline,
)
from tests.targets import wait_until

PAGE = os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A pipe, closed afterwards."""
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


CONTENTS = bytes(range(256)) * (2 * PAGE // 256)


# --- freezing ----------------------------------------------------------------------------


def test_a_thread_stands_at_its_access(uffd: Harness, library: ctypes.CDLL, memory: str) -> None:
    """A frozen thread has not made its access; what is changed meanwhile is what it finds."""
    region = uffd.region(2, contents=CONTENTS, memory=memory)
    with region.page(1).freeze() as freeze:
        running = uffd.start(library.load, region.pointer(PAGE + 7))
        frozen = freeze.wait()
        assert (frozen.thread, frozen.touch.offset) == (running.tid, PAGE + 7)
        assert frozen.touch.access is Access.READ
        assert frozen.where.startswith("touching.so+0x")
        assert not running.done
        region.poke(PAGE + 7, b"\xaa")
        frozen.release()
        assert running.result() == 0xAA
        assert frozen.released


def test_a_store_lands_where_it_was_let_go(
    uffd: Harness, library: ctypes.CDLL, memory: str
) -> None:
    """A frozen store is not there before its release, and there after it."""
    region = uffd.region(2, contents=CONTENTS, memory=memory)
    with region.page(0).freeze("write") as freeze:
        assert uffd.start(library.load, region.pointer(3)).result() == 3  # reads pass
        running = uffd.start(library.store, region.pointer(3), 99)
        frozen = freeze.wait()
        assert frozen.touch.access is Access.WRITE
        assert region.peek(3, 1) == b"\x03"
        frozen.release()
        running.result()
    assert region.peek(2, 3) == b"\x02\x63\x04"


@pytest.mark.parametrize("nth", [1, 2, 3, 7])
def test_the_nth_touch_stops(uffd: Harness, library: ctypes.CDLL, memory: str, nth: int) -> None:
    """Touches before the n-th pass, each exactly once, and the n-th stands."""
    region = uffd.region(1, contents=CONTENTS[:PAGE], memory=memory)
    with region.page(0).freeze(nth=nth) as freeze:
        running = uffd.start(library.load_again, region.pointer(5), 7)
        frozen = freeze.wait()
        assert frozen.touch.number == nth
        region.poke(5, b"\x01")
        frozen.release()
        assert running.result() == 5 * (nth - 1) + 8 - nth


def test_only_one_thread_stops(uffd: Harness, library: ctypes.CDLL, memory: str) -> None:
    """A freeze of one thread lets others make the same accesses, before and after."""
    region = uffd.region(1, contents=CONTENTS[:PAGE], memory=memory)
    go_on = threading.Event()
    chosen = uffd.start(lambda: go_on.wait(20) and library.load(region.pointer(9)))
    with region.page(0).freeze(thread=chosen) as freeze:
        for _ in range(3):
            assert uffd.start(library.load, region.pointer(9)).result() == 9
        go_on.set()
        frozen = freeze.wait()
        assert frozen.thread == chosen.tid
        assert uffd.start(library.load, region.pointer(9)).result() == 9
        assert not chosen.done
        frozen.release()
        assert chosen.result() == 9


def test_many_on_one_page_go_in_any_order(
    uffd: Harness, library: ctypes.CDLL, memory: str, seed: int
) -> None:
    """Threads that stand at one page are let go one by one, in an order of the test's."""
    print(f"seed {seed}")
    order = random.Random(seed)
    region = uffd.region(1, contents=CONTENTS[:PAGE], memory=memory)
    for _ in range(10):
        with region.page(0).freeze() as freeze:
            running = [uffd.start(library.load, region.pointer(n)) for n in range(5)]
            standing = {each.thread: each for each in (freeze.wait() for _ in running)}
            left = list(running)
            while left:
                chosen = left.pop(order.randrange(len(left)))
                standing[chosen.tid].release()
                assert chosen.result() == running.index(chosen)
                assert not any(each.done for each in left)


def test_every_touch_stops(uffd: Harness, library: ctypes.CDLL, memory: str) -> None:
    """With every=True each access stands, and is released, by itself."""
    region = uffd.region(1, memory=memory)
    with region.page(0).freeze(every=True) as freeze:
        running = uffd.start(library.increment, region.pointer(), 3)
        seen = []
        for _ in range(6):
            frozen = freeze.wait()
            seen.append(frozen.touch.access.value)
            frozen.release()
        running.result()
    assert seen == ["read", "write"] * 3
    assert region.peek(0, 1) == b"\x03"


def test_a_place_smaller_than_a_page(uffd: Harness, library: ctypes.CDLL, memory: str) -> None:
    """Touches of other bytes of the page pass; that of the place stands."""
    region = uffd.region(1, contents=CONTENTS[:PAGE], memory=memory)
    with region.at(40, 4).freeze() as freeze:
        for offset in (39, 44, 0):
            assert uffd.start(library.load, region.pointer(offset)).result() == offset
        running = uffd.start(library.load, region.pointer(42))
        freeze.wait().release()
        assert running.result() == 42


def test_an_object_across_an_edge_stands_twice(uffd: Harness, library: ctypes.CDLL) -> None:
    """A load of eight bytes across the edge of two pages touches both, one after the other."""
    region = uffd.region(2, contents=CONTENTS)
    at = region.straddle(8, before=3)
    with region.all.freeze(every=True) as freeze:
        running = uffd.start(library.load8, region.pointer(at))
        pages = []
        for _ in range(2):
            frozen = freeze.wait()
            pages.append(frozen.page.number)
            frozen.release()
        assert sorted(pages) == [0, 1]
        assert running.result() == int.from_bytes(CONTENTS[at : at + 8], "little")


def test_a_python_access_leaves_the_interpreter_running(uffd: Harness) -> None:
    """A thread that stands with the GIL in its hands waits where others can run."""
    region = uffd.region(1, contents=b"python")
    view = region.view
    with region.page(0).freeze() as freeze:
        running = uffd.start(lambda: bytes(view[:6]))
        frozen = freeze.wait()
        wait_until(lambda: frozen.held_by == "trampoline", "the trampoline")
        region.poke(0, b"PYTHON")
        frozen.release()
        assert running.result() == b"PYTHON"
    view.release()


def test_python_and_c_stand_side_by_side(uffd: Harness, library: ctypes.CDLL, seed: int) -> None:
    """Python threads and C threads at the same pages are released in any order, many times."""
    print(f"seed {seed}")
    order = random.Random(seed)
    region = uffd.region(2, contents=CONTENTS)
    view = region.view
    for _ in range(10):
        with region.all.freeze() as freeze:
            running = [uffd.start(view.__getitem__, n) for n in (1, PAGE + 2)]
            running += [uffd.start(library.load, region.pointer(n)) for n in (3, PAGE + 4)]
            standing = {each.thread: each for each in (freeze.wait() for _ in running)}
            order.shuffle(running)
            for each in running:
                standing[each.tid].release()
                assert each.result() in (1, 2, 3, 4)
    view.release()


def test_who_is_on_its_way_to_the_trampoline_is_released(library: ctypes.CDLL) -> None:
    """A release that comes before the thread has got there lets its access be made, once."""
    with Harness(timeout=20, backend="trampoline") as uffd:
        region = uffd.region(1)
        with region.page(0).freeze(every=True) as freeze:
            running = uffd.start(library.increment, region.pointer(), 50)
            for _ in range(100):
                freeze.wait().release()
            running.result()
            assert not freeze.frozen
        assert region.peek(0, 1) == b"\x32"
        assert uffd.touch_count() == 100


@pytest.mark.root
def test_a_system_call_stands(
    uffd: Harness, library: ctypes.CDLL, memory: str, pipe: tuple[int, int]
) -> None:
    """A write(2) stands in the kernel before it reads the page, and finds what is changed."""
    region = uffd.region(2, contents=CONTENTS, memory=memory)
    with region.page(1).freeze() as freeze:
        running = uffd.start(library.write_out, pipe[1], region.pointer(PAGE - 4), 8)
        frozen = freeze.wait()
        assert frozen.touch.system_call is not None
        assert frozen.held_by == "page"
        region.poke(PAGE, b"late")
        frozen.release()
        assert running.result() == 8
    assert os.read(pipe[0], 100) == CONTENTS[PAGE - 4 : PAGE] + b"late"


@pytest.mark.root
def test_system_calls_are_counted(
    uffd: Harness, library: ctypes.CDLL, memory: str, pipe: tuple[int, int]
) -> None:
    """Two system calls on one page are two touches; both are whole."""
    region = uffd.region(1, contents=CONTENTS[:PAGE], memory=memory)
    with region.page(0).freeze(nth=2) as freeze:
        assert uffd.start(library.write_out, pipe[1], region.pointer(), 64).result() == 64
        running = uffd.start(library.write_out, pipe[1], region.pointer(), 64)
        freeze.wait().release()
        assert running.result() == 64
    assert os.read(pipe[0], 1000) == CONTENTS[:64] * 2


def test_nobody_comes(uffd: Harness, library: ctypes.CDLL) -> None:
    """A wait that ends without anybody says who did what instead."""
    region = uffd.region(2, name="packet")
    region.name_page(1, "body")
    with region.page("body").freeze() as freeze:
        uffd.start_named("reader", library.load, region.pointer()).result()
        with pytest.raises(FreezeTimeout) as caught:
            freeze.wait(timeout=0.05)
    text = str(caught.value)
    assert "no touch of packet[body] within 0.05 s" in text
    assert "reader" in text
    assert "reads packet[0]+0x0" in text
    assert "MainThread" in text


def test_leaving_releases_all(uffd: Harness, library: ctypes.CDLL) -> None:
    """An exception in the block lets everybody go who stands."""
    region = uffd.region(1, contents=CONTENTS[:PAGE])
    running: Any = None
    with pytest.raises(KeyError), region.page(0).freeze() as freeze:
        running = uffd.start(library.load, region.pointer(8))
        freeze.wait()
        raise KeyError
    assert running.result() == 8


def test_a_freeze_can_be_used_again(uffd: Harness, library: ctypes.CDLL) -> None:
    """Arming anew stops the next touch, whatever is on the page already."""
    region = uffd.region(1, contents=CONTENTS[:PAGE])
    freeze = region.page(0).freeze()
    for _ in range(5):
        with freeze:
            running = uffd.start(library.load, region.pointer(8))
            freeze.wait().release()
            assert running.result() == 8
    assert freeze.frozen == ()


def test_thousands_of_rounds(uffd: Harness, library: ctypes.CDLL, seed: int) -> None:
    """Freezes of random pages, accesses and counts, over and over: each stops as asked."""
    print(f"seed {seed}")
    choose = random.Random(seed)
    region = uffd.region(4, contents=CONTENTS * 2)
    pages = region.pages
    jobs: list[Callable[[], object]] = []
    ready = threading.Semaphore(0)
    done = threading.Semaphore(0)

    def work() -> None:
        while ready.acquire() and (job := jobs.pop()) is not None:
            job()
            done.release()

    worker = uffd.start(work)
    for _ in range(1000):
        page = choose.choice(pages)
        nth = choose.choice((1, 1, 2, 3))
        with page.freeze(nth=nth) as freeze:
            jobs.append(lambda page=page: library.load_again(region.pointer(page.start + 1), 3))  # type: ignore[misc]
            ready.release()
            frozen = freeze.wait()
            assert frozen.page.number == page.number
            frozen.release()
            assert done.acquire(timeout=20)
    jobs.append(None)  # type: ignore[arg-type]
    ready.release()
    worker.result()


# --- slow, failing and changing memory -----------------------------------------------------


def test_slow_memory_takes_its_time(uffd: Harness, library: ctypes.CDLL) -> None:
    """Each page's first touch waits as long as drawn; the record says so."""
    region = uffd.region(3)
    with region.all.slow(latency.constant(0.02)):
        assert uffd.start(library.walk, region.pointer(), 3, PAGE).result() == 0
    touches = list(uffd.record_so_far)
    assert [touch.outcome for touch in touches] == ["delayed"] * 3
    assert all(touch.waited_ns >= 20_000_000 for touch in touches)


def test_the_same_seed_gives_the_same_latencies(library: ctypes.CDLL) -> None:
    """Latencies are drawn from the harness's seed."""
    drawn = []
    for _ in range(2):
        with Harness(seed=7) as uffd:
            region = uffd.region(8)
            with region.all.slow(latency.choice(0.0, 0.05)):
                uffd.start(library.walk, region.pointer(), 8, PAGE).result()
            drawn.append([touch.waited_ns >= 50_000_000 for touch in uffd.record_so_far])
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) == 2


def test_a_page_fails_once(uffd: Harness, library: ctypes.CDLL, memory: str) -> None:
    """SIGBUS comes exactly once, and the access that follows finds the page whole."""
    region = uffd.region(1, contents=CONTENTS[:PAGE], memory=memory)
    value = ctypes.c_ubyte()
    for _ in range(20):
        with region.page(0).fail(once=True):
            running = uffd.start(library.load_until_whole, region.pointer(11), ctypes.byref(value))
            assert running.result() == 1
            assert value.value == 11


@pytest.mark.root
def test_a_system_call_fails(
    uffd: Harness, library: ctypes.CDLL, memory: str, pipe: tuple[int, int]
) -> None:
    """A system call gets EFAULT: at the page's edge its partial progress, once or for ever."""
    region = uffd.region(2, contents=CONTENTS, memory=memory)
    with region.page(1).fail(once=True):
        assert [write_page(uffd, library, region, pipe[1]) for _ in range(2)] == [-14, 8]
    with region.page(1).fail():
        assert [write_page(uffd, library, region, pipe[1]) for _ in range(2)] == [-14, -14]


def write_page(uffd: Harness, library: ctypes.CDLL, region: Region, fd: int) -> int:
    """Write eight bytes of the region's second page to a descriptor."""
    done: int = uffd.start(library.write_out, fd, region.pointer(PAGE), 8).result()
    return done


def test_the_second_read_finds_other_bytes(
    uffd: Harness, library: ctypes.CDLL, memory: str
) -> None:
    """Each read of a place finds its own value; the last one stays."""
    region = uffd.region(1, memory=memory)
    with region.at(16).change(b"\x10", b"\xff"):
        assert uffd.start(library.load_twice, region.pointer(16)).result() == 0x10FF
        assert uffd.start(library.load, region.pointer(16)).result() == 0xFF
    assert region.peek(16, 1) == b"\xff"


@pytest.mark.root
def test_a_system_call_finds_other_bytes(
    uffd: Harness, library: ctypes.CDLL, memory: str, pipe: tuple[int, int]
) -> None:
    """A check in the program and the kernel's copy after it see two values."""
    region = uffd.region(1, memory=memory)
    with region.at(0, 4).change(b"good", b"evil"):
        assert uffd.start(library.load, region.pointer()).result() == ord("g")
        assert uffd.start(library.write_out, pipe[1], region.pointer(), 4).result() == 4
    assert os.read(pipe[0], 10) == b"evil"


@pytest.mark.root
def test_only_system_calls_count(
    uffd: Harness, library: ctypes.CDLL, pipe: tuple[int, int]
) -> None:
    """With mode="kernel" the program's own touches neither count nor change; the kernel's do."""
    region = uffd.region(1, contents=b"good")
    with (
        region.at(0, 4).change(b"evil", mode="kernel"),
        region.page(0).freeze(mode="kernel") as freeze,
    ):
        for _ in range(3):
            assert uffd.start(library.load, region.pointer()).result() == ord("g")
        running = uffd.start(library.write_out, pipe[1], region.pointer(), 4)
        frozen = freeze.wait()
        assert frozen.touch.system_call is not None
        frozen.release()
        assert running.result() == 4
    assert os.read(pipe[0], 10) == b"evil"


# --- regions -------------------------------------------------------------------------------


def test_all_that_a_region_can_be_looked_at_as(uffd: Harness) -> None:
    """View, array, structure and pointer show the same memory; making them touches nothing."""
    numpy = pytest.importorskip("numpy")

    class Header(ctypes.LittleEndianStructure):
        _fields_ = (("magic", ctypes.c_uint32), ("length", ctypes.c_uint32))

    region = uffd.region(2, contents=b"\x01\0\0\0\x02\0\0\0")
    view, array, header = region.view, region.array("<u4"), region.struct(Header)
    assert uffd.touch_count() == 0
    assert (view[0], int(array[1]), header.magic, header.length) == (1, 2, 1, 2)
    assert region.pointer(4).value == region.address + 4
    assert uffd.touch_count() == 1
    assert isinstance(array, numpy.ndarray)
    del header, array
    view.release()


@pytest.mark.parametrize(
    ("offset", "length"), [(-1, 1), (0, 3 * PAGE), (2 * PAGE, 1), (2 * PAGE - 1, 2)]
)
def test_places_outside_are_refused(uffd: Harness, offset: int, length: int) -> None:
    """A place, a look and a change beyond the region say how large it is."""
    region = uffd.region(2)
    for refused in (
        lambda: region.at(offset, length),
        lambda: region.peek(offset, length),
        lambda: region.poke(offset, bytes(length)),
    ):
        with pytest.raises(ValueError, match=f"which has {2 * PAGE} bytes"):
            refused()


def test_items_wider_than_a_byte_are_bytes(uffd: Harness) -> None:
    """What is poked, contained or changed to is measured in bytes, whatever its items are."""
    wide = memoryview(array.array("I", range(PAGE // 4)))
    region = uffd.region(2, contents=wide)
    assert region.peek(0, PAGE) == wide.tobytes()
    region.page(1).poke(wide)
    assert region.peek(PAGE, PAGE) == wide.tobytes()
    region.poke(0, wide[::2])
    assert region.peek(0, PAGE // 2) == wide[::2].tobytes()
    twice = memoryview(array.array("I", range(PAGE // 2)))
    for refused in (
        lambda: region.poke(PAGE + 4, wide),
        lambda: region.at(0, PAGE - 4).poke(wide),
        lambda: region.at(0, PAGE - 4).change(wide),
        lambda: uffd.region(1, contents=twice),
    ):
        with pytest.raises(ValueError, match=r"\d+ bytes"):
            refused()
    large = uffd.region(100)
    large.poke(PAGE - 4, memoryview(array.array("I", range(50_000))))
    assert large.peek(PAGE - 4 + 199_996, 4) == (49_999).to_bytes(4, sys.byteorder)


@pytest.mark.parametrize("order", [("peek", PAGE, 1), ("peek", -1, 1), ("poke", PAGE - 1, b"ab")])
def test_the_helper_refuses_bytes_outside(uffd: Harness, order: tuple[Any, ...]) -> None:
    """A look or a change that left the region would end in the window's own memory."""
    region = uffd.region(1)
    name, *arguments = order
    with pytest.raises(ValueError, match=f"the {PAGE} bytes of this region"):
        uffd.order(name, region.number, *arguments)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (lambda region: region.page(0).freeze("touch").__enter__(), "access is 'any'"),
        (lambda region: region.page(0).fail(mode="driver"), "mode is 'any'"),
        (lambda region: region.page(0).freeze(nth=0).__enter__(), "nth counts touches from 1"),
        (lambda region: region.page(0).freeze(thread=()).__enter__(), "empty list of threads"),
        (lambda region: region.at(0, 2).change(b"abc"), "longer than the 2 bytes"),
        (lambda region: region.at(PAGE - 1, 2).change(b"a"), "spans two pages"),
        (lambda region: region.at(0).change(), "give the bytes"),
        (lambda region: region.straddle(8, before=8), "does not lie across an edge"),
        (lambda region: region.harness.region(0), "one page or more"),
        (lambda region: region.harness.region(1, memory="rom"), "memory is one of"),
        (lambda region: region.harness.region(1, contents=bytes(PAGE + 1)), "do not fit"),
    ],
)
def test_bad_arguments_say_what_is_wrong(
    uffd: Harness, bad: Callable[[Any], object], words: str
) -> None:
    """Each is refused with a sentence; the harness serves on."""
    region = uffd.region(2)
    with pytest.raises(ValueError, match=words):
        bad(region)
    assert region.peek(0, 1) == b"\0"


def test_what_is_written_through_the_memfd_is_kept(uffd: Harness, library: ctypes.CDLL) -> None:
    """Bytes that come past the harness are found, beside what was there, and the test is told."""
    region = uffd.region(3, contents=b"hello" + bytes(PAGE - 5) + b"world")
    os.pwrite(region.memfd, b"J", 0)
    assert region.peek(0, 5) == b"Jello"
    uffd.settle()
    with pytest.raises(HarnessError, match="page 0 was read or written past the harness"):
        uffd.check()
    os.pwrite(region.memfd, b"W", PAGE)
    assert library.load(region.pointer(PAGE + 1)) == ord("o")
    uffd.settle()
    with pytest.raises(HarnessError, match="page 1 was read or written past the harness"):
        uffd.check()
    assert region.peek(PAGE, 5) == b"World"
    os.pwrite(region.memfd, b"new", 2 * PAGE)  # where there was nothing
    region.poke(2 * PAGE + 3, b"er")
    assert region.peek(2 * PAGE, 5) == b"newer"
    assert library.load(region.pointer(2 * PAGE)) == ord("n")


def test_a_region_that_cannot_be_watched_leaves_nothing(uffd: Harness) -> None:
    """What cannot be registered is refused, and the helper keeps neither memfd nor mapping."""

    def held() -> int:
        links = Path(f"/proc/{uffd.service_pid}/fd").iterdir()
        maps = Path(f"/proc/{uffd.service_pid}/maps").read_text("utf-8")
        return sum("nowhere" in os.readlink(link) for link in links) + maps.count("nowhere")

    memfd = os.memfd_create("nowhere")
    try:
        os.ftruncate(memfd, PAGE)
        with pytest.raises(HarnessError):
            uffd.order("region", 99, PAGE, 1, "shmem", PAGE, fds=(memfd,))
    finally:
        os.close(memfd)
    assert held() == 0


@pytest.mark.parametrize("thread", ["main", 1.5, [None]])
def test_what_is_no_thread_is_refused(uffd: Harness, thread: Any) -> None:
    """A thread is given by its id or an object that has one; the text says so."""
    with pytest.raises(TypeError, match="takes a thread id"):
        uffd.region(1).page(0).slow(0, thread=thread)


@pytest.mark.parametrize("nth", [1.5, 1.0, "1", True])
def test_a_count_of_touches_is_a_whole_number(uffd: Harness, nth: Any) -> None:
    """Anything else is refused before a rule is made of it."""
    with pytest.raises(TypeError, match="nth is a whole number"):
        uffd.region(1).page(0).freeze(nth=nth).__enter__()


def test_contents_survive_re_arming(
    uffd: Harness, library: ctypes.CDLL, memory: str, seed: int
) -> None:
    """Pages are taken away while a thread writes them: no store is ever lost."""
    print(f"seed {seed}")
    region = uffd.region(2, memory=memory)
    running = uffd.start(library.increment, region.pointer(PAGE), 50_000_000)
    rounds = 0
    while not running.done:
        region.rearm()
        rounds += 1
    running.result()
    print(f"{rounds} rounds")
    assert region.peek(PAGE, 1)[0] == 50_000_000 % 256
    assert rounds > 1


@pytest.mark.leaky("a thread is still at work there, so the memory stays")
def test_closing_a_region_lets_go_of_who_stands_there(
    uffd: Harness, library: ctypes.CDLL, memory: str
) -> None:
    """Who stands at a region that is closed makes its access, though its freeze is armed still."""
    region = uffd.region(2, contents=CONTENTS, memory=memory)
    freeze = region.page(0).freeze(every=True)
    freeze.__enter__()
    running = uffd.start(library.load, region.pointer(3))
    freeze.wait()
    region.close()
    assert running.result() == 3
    other = uffd.region(1, contents=CONTENTS[:PAGE], memory=memory)
    assert uffd.start(library.load, other.pointer(4)).result() == 4


@pytest.mark.leaky("a thread is still at work there, so the memory stays")
def test_a_region_is_closed_while_a_call_is_stepped_over(
    uffd: Harness, library: ctypes.CDLL, memory: str, pipe: tuple[int, int]
) -> None:
    """A system call that every=True has let through goes on when its region is closed."""
    size = 20 * PAGE  # more than a pipe holds
    region = uffd.region(20, contents=b"x" * size, memory=memory)
    with uffd.record(region, every=True) as record:
        running = uffd.start(library.write_out, pipe[1], region.pointer(), size)
        wait_until(lambda: len(record) > 0, "it has touched")
        region.close()
    uffd.settle()
    uffd.check()  # there is no trouble
    os.set_blocking(pipe[0], False)
    data = b""
    while not running.done or len(data) < running.result():
        with contextlib.suppress(BlockingIOError):
            data += os.read(pipe[0], size)
    assert data == b"x" * running.result()


@pytest.mark.leaky("a thread is still at work there, so the memory stays")
def test_a_thread_of_nobodys_goes_on_in_a_closed_region(
    uffd: Harness, library: ctypes.CDLL
) -> None:
    """Whoever stood when a region was closed has its memory from then on, whatever started it."""
    region = uffd.region(1, contents=b"\x01")
    sums: list[int] = []
    thread = threading.Thread(
        target=lambda: sums.append(library.load_again(region.pointer(), 100_000_000))
    )
    with region.page(0).freeze() as freeze:
        thread.start()
        freeze.wait()
        region.close()
    thread.join(20)
    assert sums == [100_000_000]


def test_what_looks_at_a_closed_region_keeps_its_bytes(uffd: Harness) -> None:
    """After close a view reads the contents as ordinary memory."""
    region = uffd.region(2, contents=CONTENTS)
    view = region.view
    region.close()
    region.close()
    assert bytes(view) == CONTENTS
    view.release()
    with pytest.raises(ClosedError):
        region.view  # noqa: B018
    with pytest.raises(ClosedError):
        region.memfd  # noqa: B018


def test_huge_pages(uffd: Harness, library: ctypes.CDLL, huge_pages: Callable[[int], None]) -> None:
    """A thread stands at a huge page, shared or private; its bytes survive re-arming."""
    huge_pages(4)
    for kind in ("hugetlb", "hugetlb-private"):
        region = uffd.region(1, contents=b"huge", memory=kind)
        assert region.page_size == 2 << 20
        with region.page(0).freeze(nth=2) as freeze:
            running = uffd.start(library.load_twice, region.pointer(1))
            frozen = freeze.wait()
            region.poke(1, b"U")
            frozen.release()
            assert running.result() == ord("u") << 8 | ord("U")
        region.close()


# --- other processes, ends -----------------------------------------------------------------


@pytest.mark.root
def test_a_forked_child_is_watched(uffd: Harness, library: ctypes.CDLL, memory: str) -> None:
    """A child that forks from C touches the region under the same rules."""
    region = uffd.region(1, contents=CONTENTS[:PAGE], memory=memory)
    with region.page(0).freeze() as freeze:
        running = uffd.start(library.load_forked, region.pointer(77))
        frozen = freeze.wait()
        assert frozen.process not in (0, os.getpid())
        frozen.release()
        assert running.result() == 77


def test_who_is_not_released_is_let_go(library: ctypes.CDLL) -> None:
    """Past the time limit the thread goes on, and the harness raises with all stacks."""
    with pytest.raises(HarnessError) as caught, Harness(timeout=0.2) as uffd:
        region = uffd.region(1, contents=CONTENTS[:PAGE])
        with region.page(0).freeze():
            running = uffd.start_named("forgotten", library.load, region.pointer(5))
            assert running.result() == 5
    text = str(caught.value)
    assert "nobody released within 0.2 s" in text
    assert "forgotten" in text
    assert "test_harness.py" in text


def test_the_main_thread_that_freezes_itself_is_let_go() -> None:
    """A test that touches what it froze itself is a failed test, no hung run."""
    with pytest.raises(HarnessError, match="MainThread"), Harness(timeout=0.2) as uffd:
        region = uffd.region(1, contents=b"a")
        with region.view as view, region.page(0).freeze():
            assert view[0] == ord("a")


@pytest.mark.root
def test_a_system_call_with_the_gil_held_is_let_go() -> None:
    """What no trampoline can help, the time limit ends: the interpreter goes on."""
    mapping: Any = None
    with pytest.raises(HarnessError, match="system call"), Harness(timeout=0.2) as uffd:
        region = uffd.region(1)
        mapping = region._mapping
        with region.page(0).freeze():
            mapping.madvise(22)  # MADV_POPULATE_READ, which mmap does with the GIL held


@pytest.mark.leaky("nobody knows who has its address, so the memory stays")
def test_a_harness_that_is_dropped_is_collected(library: ctypes.CDLL) -> None:
    """A harness that nobody has closed ends its helper, lets everybody go, and warns."""
    uffd = Harness(timeout=20)
    region = uffd.region(1, contents=b"a")
    freeze = region.page(0).freeze().__enter__()
    running = uffd.start(library.load, region.pointer())
    freeze.wait()
    helper, seen = uffd.service_pid, weakref.ref(uffd)
    del uffd, region, freeze
    with pytest.warns(ResourceWarning, match="was not closed"):
        gc.collect()
    assert seen() is None
    assert running.result() == ord("a")
    assert not os.path.exists(f"/proc/{helper}")


@contextlib.contextmanager
def crowd(call: Callable[[], object]) -> Iterator[Callable[[], None]]:
    """More threads than one message has room for, which make a call once they are told to."""
    before = threading.stack_size(256 << 10)
    go = threading.Event()
    threads = [threading.Thread(target=lambda: go.wait(20) and call()) for _ in range(CROWD)]
    try:
        for thread in threads:
            thread.start()
        yield go.set
    finally:
        threading.stack_size(before)
        for thread in threads:
            thread.join(20)
    assert not any(thread.is_alive() for thread in threads)


CROWD = 1400


def test_a_crowd_stands(uffd: Harness, library: ctypes.CDLL) -> None:
    """However many stand, all of them are told."""
    region = uffd.region(1)
    with crowd(lambda: library.load(region.pointer())) as go, region.page(0).freeze() as freeze:
        go()
        numbers = {freeze.wait().touch.number for _ in range(CROWD)}
        assert {touch.number for touch, _, _ in uffd.standing()} == numbers
        assert {touch.number for touch in uffd.touches()} == numbers
    assert [touch.number for touch in uffd.touches()] == sorted(numbers)


def test_a_crowd_that_is_not_released_is_let_go(library: ctypes.CDLL) -> None:
    """However many are let go at the time limit, the test hears of it; the harness serves on."""
    with Harness(timeout=1) as uffd:
        region = uffd.region(1, contents=b"a")
        with crowd(lambda: library.load(region.pointer())) as go, region.page(0).freeze():
            go()
            wait_until(lambda: uffd.ledger.touches(()) or uffd._troubles, "they were let go")
        with pytest.raises(HarnessError, match="nobody released within 1 s"):
            uffd.check()
        assert region.peek(0, 1) == b"a"


def test_several_harnesses_may_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two helpers neither takes the other's permission; with the last one it ends."""
    named: list[int] = []
    monkeypatch.setattr(tracing, "allow_tracer", named.append)
    with Harness() as one:
        assert named == [one.service_pid]
        with Harness() as two:
            assert named[1:] == [-1]
            one.close()
            assert named[2:] == [two.service_pid]
    assert named[3:] == [0]


def test_the_trampoline_waits_longer_than_the_harness() -> None:
    """A thread is let go by its own harness's time limit, however long, and by no other's."""
    with Harness(timeout=1000) as long, Harness() as short:
        services = trampoline._services
        assert services[long.service_pid][1] > 1000
        assert services[short.service_pid][1] == trampoline.LIMIT


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_porter_that_dies_takes_no_thread_along() -> None:
    """What ends the thread that hears the helper ends the helper, and lets everybody go."""
    with contextlib.suppress(HarnessError), Harness(timeout=20, backend="trampoline") as uffd:
        region = uffd.region(1, contents=b"a")
        view = region.view
        with region.page(0).freeze() as freeze:
            running = uffd.start(lambda: view[0])
            frozen = freeze.wait()
            wait_until(lambda: frozen.held_by == "trampoline", "it waits there")
            uffd.listeners.append(cast("Any", {}.popitem))  # which raises
            uffd._helper.ask("settle", 0)
            assert running.result() == ord("a")
            wait_until(lambda: uffd._helper.ended, "the helper has ended")
            with pytest.raises(HarnessError, match="has ended"):
                uffd.check()
            uffd.listeners.clear()
    view.release()


def test_a_helper_that_dies_takes_no_thread_along(library: ctypes.CDLL) -> None:
    """Killed, it lets everybody go, and every later call says that it has ended."""
    uffd = Harness()
    region = uffd.region(1)
    with contextlib.suppress(HarnessError), region.page(0).freeze() as freeze:
        running = uffd.start(library.load, region.pointer())
        freeze.wait()
        os.kill(uffd.service_pid, signal.SIGKILL)
        assert running.result() == 0
        with pytest.raises(HarnessError, match="has ended"):
            freeze.wait(timeout=5)
    with pytest.raises(HarnessError, match="has ended"):
        region.peek(0, 1)
    uffd.close()  # which has nothing to say any more


def test_a_closed_harness_says_so(uffd: Harness) -> None:
    """After close every order is refused, and closing again does nothing."""
    region = uffd.region(1)
    uffd.close()
    uffd.close()
    with pytest.raises(ClosedError):
        region.peek(0, 1)
    assert region.closed


def test_user_mode_only_says_what_it_cannot(library: ctypes.CDLL, pipe: tuple[int, int]) -> None:
    """Without kernel-mode touches a system call gets EFAULT, and the limits say so."""
    with Harness(user_mode_only=True) as uffd:
        assert any("EFAULT" in limit for limit in uffd.limits)
        region = uffd.region(1, contents=CONTENTS[:PAGE])
        assert uffd.start(library.write_out, pipe[1], region.pointer(), 8).result() == -14
        with region.page(0).freeze(nth=2) as freeze:
            running = uffd.start(library.load_twice, region.pointer(3))
            freeze.wait().release()
            assert running.result() == 0x303


def test_a_thread_under_a_debugger_cannot_be_stepped(uffd: Harness, library: ctypes.CDLL) -> None:
    """A thread that somebody else traces is let through, and the test told why it fails."""
    if tracing.can_trace() is not None:
        pytest.skip("ptrace is not permitted here")
    region = uffd.region(1)
    ready, go_on = threading.Event(), threading.Event()

    def wait_and_load() -> int:
        ready.set()
        go_on.wait(20)
        value: int = library.load_twice(region.pointer())
        return value

    running = uffd.start(wait_and_load)
    ready.wait()
    read, write = os.pipe()
    tracer = os.fork()
    if tracer == 0:
        try:
            tracing.seize(running.tid)
            os.write(write, b"y")
        except OSError:
            os.write(write, b"n")
        signal.pause()
    try:
        assert os.read(read, 1) == b"y"
        with region.page(0).freeze(nth=2):
            go_on.set()
            running.result()
        with pytest.raises(HarnessError, match="cannot be stepped over"):
            uffd.close()
    finally:
        os.kill(tracer, signal.SIGKILL)
        os.waitpid(tracer, 0)
        os.close(read)
        os.close(write)


def test_no_such_back_end() -> None:
    """A back end or a time limit that is none is refused before anything starts."""
    with pytest.raises(ValueError, match="backend is one of"):
        Harness(backend="magic")
    with pytest.raises(ValueError, match="above zero"):
        Harness(timeout=0)


def test_not_supported_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where threads cannot be stepped, what needs it is refused and named."""
    with Harness() as uffd:
        monkeypatch.setattr(uffd._helper, "cannot_step", "ptrace is not permitted")
        region = uffd.region(1)
        with pytest.raises(NotSupported, match="touches after the first"):
            region.page(0).freeze(nth=2).__enter__()
        with region.page(0).freeze():
            pass


def test_a_signal_handler_stands_within_a_touch(uffd: Harness) -> None:
    """A handler that runs while its thread stands, and touches a frozen page, stands too."""
    region = uffd.region(2, contents=b"o" * PAGE + b"i" * PAGE)
    view = region.view
    found = []

    def handler(*_: object) -> None:
        found.append(view[PAGE])

    before = signal.signal(signal.SIGALRM, handler)
    try:
        for outer_first in (False, True):
            found.clear()
            with region.page(0).freeze() as outer, region.page(1).freeze() as inner:

                def release(
                    outer: Freeze = outer, inner: Freeze = inner, outer_first: bool = outer_first
                ) -> None:
                    standing = [outer.wait()]
                    wait_until(lambda: standing[0].held_by == "trampoline", "the trampoline")
                    os.kill(os.getpid(), signal.SIGALRM)
                    standing.append(inner.wait())
                    for each in standing if outer_first else reversed(standing):
                        each.release()

                releasing = uffd.start(release)
                assert view[0] == ord("o")
                releasing.result()
            assert found == [ord("i")]
    finally:
        signal.signal(signal.SIGALRM, before)
        view.release()
