"""The helper's process, from one harness to the next."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from aiouffd.testing import Harness, HarnessError, helper
from tests.native import build
from tests.targets import wait_until

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    """touching.c."""
    found = ctypes.CDLL(str(build(Path(__file__).with_name("touching.c"))))
    found.load.argtypes = (ctypes.c_void_p,)
    return found


def is_there(pid: int) -> bool:
    """Whether a process is there, be it as a zombie."""
    return os.path.exists(f"/proc/{pid}")


def test_each_has_its_own() -> None:
    """Where nobody has asked to keep it, a harness's process ends with it."""
    for _ in range(2):
        with Harness() as harness:
            pid = harness.service_pid
            assert is_there(pid)
        assert not is_there(pid)


def test_one_serves_the_next() -> None:
    """Where it is kept, harnesses one after the other have one process; it ends with the block."""
    with helper.keeping():
        pids = []
        for _ in range(3):
            with Harness() as harness:
                pids.append(harness.service_pid)
            assert is_there(pids[0])
        assert set(pids) == {pids[0]}
    assert not is_there(pids[0])


def test_two_at_once_have_two() -> None:
    """A process serves one harness at a time, and one of two is kept."""
    with helper.keeping():
        with Harness() as first, Harness() as second:
            pids = {first.service_pid, second.service_pid}
            assert len(pids) == 2
        assert sum(map(is_there, pids)) == 1
        with Harness() as third:
            assert third.service_pid in pids


@pytest.mark.leaky("threads are still at work in the regions, so their memory stays")
def test_nothing_is_left_for_the_next(library: ctypes.CDLL) -> None:
    """Rules, touches, bytes and descriptors of a harness are gone when the next one has it."""
    opened = []
    with helper.keeping():
        for number in range(5):
            with Harness() as harness:
                region = harness.region(2, contents=bytes([number + 1]) * PAGE)
                opened.append(len(os.listdir(f"/proc/{harness.service_pid}/fd")))
                assert harness.start(library.load, region.pointer()).result() == number + 1
                assert harness.start(library.load, region.pointer(PAGE)).result() == 0
                (first, second) = harness.record_so_far
                assert (first.number, second.number) == (1, 2)
                region.page(0).freeze(every=True).__enter__()  # and never left
                region.page(1).slow(0.001, every=True)
                standing = harness.start(library.load, region.pointer())
                wait_until(lambda: len(harness.standing()) == 1, "it stands")
            assert standing.result() == number + 1
    assert opened == opened[:1] * 5


def test_an_answer_to_another_harness_is_none_to_this_one() -> None:
    """An answer that comes late is not taken by the next harness for one to its own question."""
    with helper.keeping():
        with Harness() as first:
            pid, events = first.service_pid, first._helper._events
        events.send(("pong", 1000))
        with Harness() as second:
            assert second.service_pid == pid
            region = second.region(contents=b"\x05")
            with region.page(0).freeze() as freeze:
                running = second.start(lambda: region.view[0])
                frozen = freeze.wait()
                wait_until(lambda: frozen.held_by == "trampoline", "in the trampoline")
                frozen.release()
                assert running.result() == 5


def test_one_that_has_ended_is_not_kept() -> None:
    """After a helper was killed, in a harness or between two, the next harness has another."""
    with helper.keeping():
        harness = Harness()
        killed = harness.service_pid
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: harness._helper.ended, "its end is known")
        with pytest.raises(HarnessError, match="has ended"):
            harness.close()
        with Harness() as harness:
            pid = harness.service_pid
            assert pid != killed
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: "Z" in state(pid), "it is dead")
        with Harness() as harness:
            assert harness.service_pid not in (pid, killed)


def state(pid: int) -> str:
    """The letter that the kernel has for what a process does."""
    return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]


FORKING = """
    import os, warnings
    from aiouffd.testing import Harness, helper

    warnings.simplefilter("error")
    with helper.keeping():
        with Harness() as harness:
            pid = harness.service_pid
        child = os.fork()
        if child == 0:
            with Harness() as harness:
                own = harness.service_pid != pid and harness.region(1).peek(0, 1) == bytes(1)
            os._exit(7 if own else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        with Harness() as harness:
            assert harness.service_pid == pid
            assert harness.region(1, contents=b"x").peek(0, 1) == b"x"
"""


def test_a_forked_child_starts_its_own() -> None:
    """A process that was kept serves who has started it; a forked child leaves it alone."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FORKING)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_it_ends_with_who_keeps_it() -> None:
    """A kept process ends when its test process does, however that ends."""
    program = """
        import os
        from aiouffd.testing import Harness, helper

        with helper.keeping():
            with Harness() as harness:
                print(harness.service_pid)
            os.kill(os.getpid(), 9)
    """
    done = subprocess.run(
        [sys.executable, "-u", "-c", textwrap.dedent(program)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    pid = int(done.stdout)
    wait_until(lambda: not is_there(pid) or state(pid) == "Z", "it has ended")
