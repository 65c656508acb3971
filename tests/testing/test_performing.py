"""Only the one is let through whose turn it is, and what has to be seen again is seen again."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import time
from collections.abc import Callable

import pytest

from aiouffd.testing import Harness, HarnessError, Record
from tests.targets import wait_until

PAGE = os.sysconf("SC_PAGE_SIZE")
Pipes = Callable[[], tuple[int, int]]


def outcomes(record: Record) -> list[str]:
    """What became of each touch."""
    return [touch.outcome for touch in record]


def kernel_sees(thread: int) -> str:
    """The state of a thread of this process, as the kernel has it."""
    with open(f"/proc/self/task/{thread}/stat", encoding="ascii") as file:
        return file.read().rpartition(")")[2].split()[0]


# --- one goes, the others stand --------------------------------------------------------------


@pytest.mark.root
def test_a_system_call_is_let_through_alone(
    uffd: Harness, library: ctypes.CDLL, pipes: Pipes, memory: str
) -> None:
    """Of a C thread and two system calls at one page each goes when it is released, not before."""
    region = uffd.region(1, contents=b"abcdefgh", memory=memory)
    with region.page(0).freeze() as freeze:
        loading = uffd.start(library.load, region.pointer(1))
        writing = [uffd.start(library.write_out, pipes()[1], region.pointer(), n) for n in (3, 4)]
        standing = {each.thread: each for each in (freeze.wait() for _ in range(3))}
        for count, running in enumerate((writing[0], loading, writing[1])):
            standing[running.tid].release()
            assert running.result() == (3, ord("b"), 4)[count]
            left = len(standing) - count - 1
            assert len(freeze.frozen) == left
            # Whoever is still held is asleep at the page, however the one went.
            uffd.settle()
            assert sum(not each.done for each in (loading, *writing)) == left
    assert uffd.touch_count() == 3


def test_who_fails_once_wakes_nobody(uffd: Harness, library: ctypes.CDLL, memory: str) -> None:
    """A page that fails once and is whole again lets nobody go who stands there."""
    region = uffd.region(1, contents=b"abcdefgh", memory=memory)
    value = ctypes.c_ubyte()
    with region.page(0).freeze(every=True) as freeze:
        waiting = uffd.start(library.load, region.pointer(1))
        first = freeze.wait()
        with region.page(0).fail(once=True):
            failing = uffd.start(library.load_until_whole, region.pointer(2), ctypes.byref(value))
            freeze.wait().release()  # SIGBUS
            freeze.wait().release()  # whole
            assert failing.result() == 1
            assert value.value == ord("c")
            assert not waiting.done
            assert freeze.frozen == (first,)
        first.release()
        assert waiting.result() == ord("b")
    assert outcomes(uffd.record_so_far) == ["frozen", "failed", "frozen"]


def test_a_page_that_is_whole_again_is_seen_again(
    uffd: Harness, library: ctypes.CDLL, memory: str
) -> None:
    """Who watches every access sees those after the one that failed, too."""
    region = uffd.region(1, contents=b"abcdefgh", memory=memory)
    value = ctypes.c_ubyte()
    with region.page(0).fail(once=True), uffd.record(region, every=True) as record:
        assert (
            uffd.start(library.load_until_whole, region.pointer(2), ctypes.byref(value)).result()
            == 1
        )
        assert uffd.start(library.load, region.pointer(2)).result() == ord("c")
        assert outcomes(record) == ["failed", "passed", "passed"]


# --- failing pages ---------------------------------------------------------------------------


def test_a_store_to_a_page_that_was_read_fails(
    uffd: Harness, library: ctypes.CDLL, memory: str
) -> None:
    """A page that is there can be made to fail; its bytes are kept, and found after the block."""
    region = uffd.region(1, contents=b"abcdefgh", memory=memory)
    with region.page(0).fail(access="write"):
        assert uffd.start(library.load, region.pointer(1)).result() == ord("b")
        assert uffd.start(library.fails, region.pointer(1), 9).result()
        assert uffd.start(library.fails, region.pointer(2), -1).result()  # as a whole
    assert region.peek(0, 8) == b"abcdefgh"
    assert uffd.start(library.load, region.pointer(1)).result() == ord("b")
    assert outcomes(uffd.record_so_far) == ["passed", "failed", "passed"]


def test_who_stands_at_a_page_that_has_failed_fails(
    uffd: Harness, library: ctypes.CDLL, memory: str
) -> None:
    """A thread that is released onto a page which fails for ever finds it failing."""
    region = uffd.region(1, contents=b"abcdefgh", memory=memory)
    with region.page(0).freeze() as freeze:
        standing = uffd.start(library.fails, region.pointer(1), -1)
        frozen = freeze.wait()
        with region.page(0).fail():
            failing = uffd.start(library.fails, region.pointer(1), -1)
            freeze.wait().release()
            assert failing.result()
            frozen.release()
            assert standing.result()
    assert outcomes(uffd.record_so_far) == ["failed", "failed"]


@pytest.mark.root
def test_a_system_call_onto_a_private_page_that_is_there_goes_on(
    uffd: Harness, library: ctypes.CDLL, pipes: Pipes
) -> None:
    """What cannot be made to fail is let through and told: nobody stands for ever."""
    region = uffd.region(1, memory="anon")
    reading, writing = pipes()
    os.write(writing, b"new")
    with region.page(0).fail(access="write"):
        uffd.start(library.load, region.pointer()).result()
        assert uffd.start(library.read_in, reading, region.pointer(), 3).result() == 3
    with pytest.raises(HarnessError, match="cannot be made to fail"):
        uffd.check()


# --- what has to be seen ---------------------------------------------------------------------


def test_a_smaller_place_is_slow_whatever_came_before(
    uffd: Harness, library: ctypes.CDLL, memory: str
) -> None:
    """The first touch of some bytes is slow, though other bytes of the page came first."""
    region = uffd.region(1, memory=memory)
    with region.at(40, 4).slow(0.001):
        for offset in (2, 41, 42):
            uffd.start(library.load, region.pointer(offset)).result()
    assert outcomes(uffd.record_so_far) == ["passed", "delayed"]


def test_a_changed_value_can_be_written_over(
    uffd: Harness, library: ctypes.CDLL, memory: str
) -> None:
    """The last value stays until somebody writes another one, however many touches are seen."""
    region = uffd.region(1, memory=memory)
    with region.at(0).change(b"x", b"y"), uffd.record(every=True):
        assert uffd.start(library.load_twice, region.pointer()).result() == 0x7879
        uffd.start(library.store, region.pointer(), 65).result()
        assert uffd.start(library.load_twice, region.pointer()).result() == 0x4141
        region.poke(0, b"z")
        assert uffd.start(library.load_twice, region.pointer()).result() == 0x7A7A


def test_a_delay_that_ends_after_its_touch_does_nothing(
    uffd: Harness, library: ctypes.CDLL
) -> None:
    """Leaving a freeze lets go who is still delayed; the rest of the delay makes no page come."""
    region = uffd.region(1)
    with region.page(0).slow(0.2):
        with region.page(0).freeze():
            running = uffd.start(library.load, region.pointer())
            wait_until(lambda: uffd.touch_count() == 1, "the touch")
        running.result()
        region.rearm()
        uffd.start(time.sleep, 0.25).result()  # past the delay's end
    uffd.start(library.load, region.pointer()).result()
    assert uffd.touch_count() == 2


# --- system calls that are stepped over ------------------------------------------------------


@pytest.mark.root
@pytest.mark.parametrize("what", ["wait_poll", "wait_message"])
def test_a_system_call_that_sleeps_is_begun_again(
    uffd: Harness, library: ctypes.CDLL, pipes: Pipes, memory: str, what: str
) -> None:
    """A call that reads memory and then sleeps returns what it would have, and is counted."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        region = uffd.region(2, memory=memory)
        with uffd.record(region, every=True) as record:
            running = uffd.start(
                getattr(library, what), theirs.fileno(), region.pointer(), region.pointer(PAGE)
            )
            wait_until(
                lambda: any(touch.system_call is not None for touch in record), "the system call"
            )
            wait_until(lambda: kernel_sees(running.tid) == "S", "sleep")
            assert not running.done
            ours.send(b"12345")
            assert running.result() == (1 if what == "wait_poll" else 5)
            calls = [
                (touch.access.value, touch.page)
                for touch in record
                if touch.system_call is not None
            ]
        assert calls == [("read", 0), ("write", 0 if what == "wait_poll" else 1)]
    assert region.peek(PAGE, 5) == (bytes(5) if what == "wait_poll" else b"12345")


@pytest.mark.root
def test_a_system_call_that_no_kernel_begins_again_is_interrupted(
    uffd: Harness, library: ctypes.CDLL, pipes: Pipes
) -> None:
    """epoll_wait ends with EINTR when it is stepped over and sleeps: the limit, seen."""
    region = uffd.region(1)
    reading, _ = pipes()
    with uffd.record(region, every=True):
        assert uffd.start(library.wait_epoll, reading, region.pointer(), None).result() == -4


@pytest.mark.root
def test_a_system_call_on_two_frozen_pages(
    uffd: Harness, library: ctypes.CDLL, pipes: Pipes, memory: str
) -> None:
    """One write(2) that is stepped over stands at each of its pages, and is whole."""
    contents = bytes(range(256)) * (2 * PAGE // 256)
    region = uffd.region(2, contents=contents, memory=memory)
    reading, writing = pipes()
    with region.all.freeze(every=True) as freeze:
        running = uffd.start(library.write_out, writing, region.pointer(PAGE - 8), 16)
        pages = []
        for _ in range(2):
            frozen = freeze.wait()
            pages.append(frozen.touch.page)
            frozen.release()
        assert pages == [0, 1]
        assert running.result() == 16
    assert os.read(reading, 100) == contents[PAGE - 8 : PAGE + 8]
    assert uffd.touch_count() == 2


def test_one_instruction_with_two_pages(uffd: Harness, library: ctypes.CDLL, memory: str) -> None:
    """An instruction that reads one page and writes another stands at both; nobody else goes."""
    region = uffd.region(2, contents=b"abcd", memory=memory)
    with region.all.freeze(every=True) as freeze:
        waiting = [uffd.start(library.load, region.pointer(n)) for n in (1, PAGE)]
        standing = [freeze.wait() for _ in waiting]
        copying = uffd.start(library.copy, region.pointer(PAGE), region.pointer(2))
        # The first page may have to be let through again once the second is there.
        while not copying.done:
            if any(each.thread == copying.tid for each in freeze.frozen):
                next(each for each in freeze.frozen if each.thread == copying.tid).release()
        assert set(freeze.frozen) == set(standing)
        assert not any(each.done for each in waiting)
        for each in standing:
            each.release()
        assert [each.result() for each in waiting] == [ord("b"), ord("c")]


# --- ends ------------------------------------------------------------------------------------


@pytest.mark.root
def test_a_process_that_is_killed_in_a_step_harms_nobody(
    uffd: Harness, library: ctypes.CDLL, pipes: Pipes, memory: str
) -> None:
    """A child that is killed within a system call that is stepped over leaves the harness whole."""
    region = uffd.region(2, memory=memory)
    reading, _ = pipes()
    with uffd.record(region, every=True) as record:
        child = os.fork()
        if child == 0:
            library.wait_poll(reading, region.pointer(), None)
            os._exit(1)
        wait_until(
            lambda: any(t.system_call is not None and t.process == child for t in record),
            "the system call",
        )
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        assert uffd.start(library.load, region.pointer(PAGE)).result() == 0
    uffd.check()


@pytest.mark.root
def test_children_that_have_ended_cost_nothing(uffd: Harness, library: ctypes.CDLL) -> None:
    """The helper gives back the userfaultfds of children that are no more."""
    region = uffd.region(1)
    folder = f"/proc/{uffd.service_pid}/fd"
    counts = []
    for _ in range(20):
        assert uffd.start(library.load_forked, region.pointer()).result() == 0
        counts.append(len(os.listdir(folder)))
    assert max(counts) <= counts[0] + 10  # for who has ended just now


@pytest.mark.root
def test_a_child_outlives_a_region(uffd: Harness, library: ctypes.CDLL, pipes: Pipes) -> None:
    """A region that is closed is ordinary memory for a child, which has another one still."""
    region, other = uffd.region(1, contents=b"abc"), uffd.region(1)
    (go_on, go), (answer, answering) = pipes(), pipes()
    child = os.fork()
    if child == 0:
        os.read(go_on, 1)
        os.write(answering, bytes([library.load(region.pointer(1))]))
        os._exit(0)
    region.close()
    os.write(go, b"x")
    assert os.read(answer, 1) == b"b"
    assert os.waitpid(child, 0)[1] == 0
    assert not other.closed
