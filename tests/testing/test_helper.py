"""The helper process at its ends: killed, stopped, left alone, one of several."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from aiouffd.testing import Harness, HarnessError
from tests import unprivileged
from tests.native import build
from tests.targets import wait_until

PAGE = os.sysconf("SC_PAGE_SIZE")
Pipes = Callable[[], tuple[int, int]]


def in_child(work: Callable[[], None]) -> int:
    """Run something in a forked child; its exit status, or minus a signal."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# --- killed ----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "trampoline"])
@pytest.mark.parametrize("when", ["idle", "standing", "delayed", "stepping"])
def test_killed_it_lets_all_go(library: ctypes.CDLL, backend: str, when: str) -> None:
    """Whatever it was doing, threads go on at once, and the harness says that it has ended."""
    status = in_child(lambda: killed_it_lets_all_go(library, backend, when))
    # A tracer's death leaves the trap flag of a thread that it steps: on 6.18 that may be its end.
    assert status in ((0, -signal.SIGTRAP) if when == "stepping" else (0,))


def killed_it_lets_all_go(library: ctypes.CDLL, backend: str, when: str) -> None:
    """Kill the helper in the middle of something."""
    uffd = Harness(timeout=20, backend=backend)
    region = uffd.region(2, contents=b"abcd")
    view = region.view
    with contextlib.suppress(HarnessError), contextlib.ExitStack() as stack:
        running = []
        if when == "standing":
            freeze = stack.enter_context(region.page(0).freeze())
            running += [uffd.start(library.load, region.pointer(n)) for n in range(3)]
            running.append(uffd.start(view.__getitem__, 1))
            for _ in running:
                freeze.wait()
        elif when == "delayed":
            stack.enter_context(region.page(0).slow(30))
            running.append(uffd.start(library.load, region.pointer()))
            wait_until(lambda: uffd.touch_count() == 1, "the touch")
        elif when == "stepping":
            stack.enter_context(uffd.record(region, every=True))
            running += [
                uffd.start(library.increment, region.pointer(n), 100_000) for n in (0, PAGE)
            ]
            wait_until(lambda: uffd.touch_count() > 100, "touches")
        os.kill(uffd.service_pid, signal.SIGKILL)
        for each in running:
            each.result()
        with pytest.raises(HarnessError, match="has ended"):
            region.peek(0, 1)
    view.release()
    with contextlib.suppress(HarnessError):
        uffd.close()


def test_it_ends_with_the_test_process(library: ctypes.CDLL, pipes: Pipes) -> None:
    """If the test process is killed the helper ends; children see an error and no zeros."""
    (reading, writing), (hold, release) = pipes(), pipes()
    child = os.fork()
    if child == 0:
        uffd = Harness(timeout=20)
        region = uffd.region(2, contents=b"abcd" + bytes(PAGE) + b"efgh", memory="anon")
        with region.page(0).freeze() as freeze:
            uffd.start(library.load, region.pointer())
            freeze.wait()
            if os.fork() == 0:
                os.close(release)
                os.write(writing, b"%d %d\n" % (os.getpid(), uffd.service_pid))
                os.read(hold, 1)
                failed = library.fails(region.pointer(PAGE), -1)
                os.write(writing, b"failed\n" if failed else b"found something\n")
                os._exit(0)
            signal.pause()
    with open(os.dup(reading), "rb", buffering=0) as file:
        grandchild, helper = map(int, file.readline().split())
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        ended = Path(f"/proc/{helper}/stat")
        wait_until(lambda: not ended.exists() or " Z " in ended.read_text(), "the helper's end")
        os.write(release, b"x")
        assert file.readline() == b"failed\n"
        wait_until(lambda: not Path(f"/proc/{grandchild}/fd/0").exists(), "its end")


# --- silent, full, interrupted ---------------------------------------------------------------


def test_a_silent_helper_is_ended(library: ctypes.CDLL) -> None:
    """One that does not answer is killed: the order says so, and whoever stands goes on."""
    uffd = Harness(timeout=20)
    region = uffd.region(1, contents=b"abc")
    with contextlib.suppress(HarnessError), region.page(0).freeze() as freeze:
        running = uffd.start(library.load, region.pointer(1))
        freeze.wait()
        uffd._helper._commands.sock.settimeout(0.2)
        os.kill(uffd.service_pid, signal.SIGSTOP)
        with pytest.raises(HarnessError, match="did not answer in time and was ended"):
            region.peek(0, 1)
        running.result()
    with contextlib.suppress(HarnessError):
        uffd.close()


def test_an_order_that_ctrl_c_breaks_off_has_no_answer(uffd: Harness) -> None:
    """The answer of an order that was broken off is not taken for the next one's."""
    region = uffd.region(1, contents=b"abcdef")
    os.kill(uffd.service_pid, signal.SIGSTOP)
    timer = threading.Timer(0.1, signal.pthread_kill, (threading.get_ident(), signal.SIGINT))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            region.peek(0, 3)
    finally:
        os.kill(uffd.service_pid, signal.SIGCONT)
        timer.join()
    for offset in range(6):
        assert region.peek(offset, 1) == b"abcdef"[offset : offset + 1]


def test_a_porter_that_cannot_run_loses_nothing(uffd: Harness, library: ctypes.CDLL) -> None:
    """While the GIL is held thousands of touches are told; afterwards all of them are heard."""
    region = uffd.region(1)
    holding = ctypes.PyDLL(str(build(Path(__file__).with_name("touching.c"))))  # keeps the GIL
    holding.increment.argtypes = (ctypes.c_void_p, ctypes.c_int)
    holding.increment.restype = None
    with uffd.record(region, every=True) as record:
        holding.increment(region.pointer(), 1000)
        assert len(record) == 2000
    assert int.from_bytes(region.peek(0, 1), "little") == 1000 % 256
    with region.page(0).freeze() as freeze:
        running = uffd.start(library.load, region.pointer())
        freeze.wait().release()
        running.result()


def test_late_threads_are_let_go_while_others_are_delayed(library: ctypes.CDLL) -> None:
    """The time limit is of who stands; who is only slow may take longer."""
    with contextlib.suppress(HarnessError), Harness(timeout=0.2) as uffd:
        region = uffd.region(2)
        with region.page(0).slow(0.6):
            running = uffd.start(library.load, region.pointer())
            running.result()
        uffd.check()
        (touch,) = uffd.record_so_far
        assert touch.outcome == "delayed"
        assert touch.waited_ns >= 600_000_000


# --- several ---------------------------------------------------------------------------------


def test_two_at_once(library: ctypes.CDLL) -> None:
    """Two harnesses serve the same threads, each its own region."""
    with Harness(timeout=20) as one, Harness(timeout=20, backend="trampoline") as two:
        regions = [each.region(1, contents=b"ab") for each in (one, two)]
        with regions[0].page(0).freeze() as first, regions[1].page(0).freeze() as second:

            def work() -> int:
                return sum(library.load(region.pointer(1)) for region in regions)

            running = one.start(work)
            assert first.wait().thread == running.tid
            assert not second.frozen
            first.frozen[0].release()
            assert second.wait().thread == running.tid
            second.frozen[0].release()
            assert running.result() == 2 * ord("b")


def test_opened_in_a_thread(library: ctypes.CDLL) -> None:
    """A thread may have a harness that it opens and closes itself."""
    found: list[int] = []

    def work() -> None:
        with Harness(timeout=20) as uffd:
            region = uffd.region(1, contents=b"ab")
            with region.page(0).freeze(nth=2) as freeze:
                running = uffd.start(library.load_twice, region.pointer(1))
                freeze.wait().release()
                found.append(running.result())

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == [ord("b") << 8 | ord("b")] * 3


def test_opened_in_a_forked_child(uffd: Harness, library: ctypes.CDLL) -> None:
    """A child has no use of its parent's harness, and opens one of its own."""
    region = uffd.region(1)

    def work() -> None:
        with pytest.raises(HarnessError, match="was forked from it"):
            region.peek(0, 1)
        with Harness(timeout=20) as own:
            other = own.region(1, contents=b"ab")
            with other.page(0).freeze(every=True) as freeze:
                running = own.start(library.load_twice, other.pointer(1))
                freeze.wait().release()
                freeze.wait().release()
                assert running.result() == ord("b") << 8 | ord("b")

    assert in_child(work) == 0
    assert region.peek(0, 1) == b"\0"


def test_nothing_is_left(library: ctypes.CDLL) -> None:
    """Many harnesses leave no descriptor, thread, child or signal handler behind."""

    def counts() -> tuple[int, int, int]:
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        return len(os.listdir("/proc/self/fd")), threading.active_count(), len(children)

    before = None
    for number in range(25):
        with Harness(timeout=20) as uffd:
            region = uffd.region(1)
            if number % 5 == 0:
                with region.page(0).freeze(nth=2) as freeze:
                    running = uffd.start(library.load_twice, region.pointer())
                    freeze.wait().release()
                    running.result()
        before = before or counts()
    assert counts() == before


AS_NOBODY = """
import ctypes, sys, time
from aiouffd.testing import Harness

library = ctypes.CDLL(sys.argv[1])
library.load_twice.argtypes = (ctypes.c_void_p,)
library.increment.argtypes = (ctypes.c_void_p, ctypes.c_int)
library.fails.argtypes = (ctypes.c_void_p, ctypes.c_int)
for backend in ("auto", "trampoline"):
    with Harness(timeout=20, backend=backend) as uffd:
        assert any("EFAULT" in limit for limit in uffd.limits), uffd.limits
        for memory in ("shmem", "anon", "shmem-private"):
            region = uffd.region(1, contents=b"ab", memory=memory)
            with region.page(0).freeze(nth=2) as freeze:
                running = uffd.start(library.load_twice, region.pointer(1))
                freeze.wait().release()
                assert running.result() == ord("b") << 8 | ord("b")
            with region.page(0).freeze(every=True) as freeze:
                running = uffd.start(library.increment, region.pointer(), 3)
                for _ in range(6):
                    freeze.wait().release()
                running.result()
            with region.page(0).fail(once=True):
                assert uffd.start(library.fails, region.pointer(1), -1).result() == 1
                assert uffd.start(library.fails, region.pointer(1), -1).result() == 0
            with region.view as view, region.page(0).freeze() as freeze:
                reading = uffd.start(view.__getitem__, 1)
                frozen = freeze.wait()
                while frozen.held_by != "trampoline":
                    time.sleep(0.001)
                frozen.release()
                assert reading.result() == ord("b")
            print(backend, memory, region.peek(0, 2))
"""


def test_without_privilege() -> None:
    """Another user's process freezes, counts, steps, fails and parks all the same."""
    if os.geteuid() != 0:
        pytest.skip("takes root to become somebody else: this very run shows the rest")
    told = unprivileged.run(AS_NOBODY, build(Path(__file__).with_name("touching.c")))
    assert told.splitlines() == [
        f"{backend} {memory} {bytes([ord('a') + 3, ord('b')])!r}"
        for backend in ("auto", "trampoline")
        for memory in ("shmem", "anon", "shmem-private")
    ]


_BUSY = """
import ctypes, threading, time
from aiouffd.testing import Harness, HarnessError

def deep(left):
    return deep(left - 1) + 1 if left else 0

def churn():
    while True:
        deep(30)
        time.sleep(0.0001)

for _ in range(3):
    threading.Thread(target=churn, daemon=True).start()
libc = ctypes.CDLL(None)
libc.strlen.argtypes = [ctypes.c_void_p]
told = 0
for _ in range(40):
    try:
        with Harness(timeout=0.01) as uffd:
            region = uffd.region(1)
            with region.page(0).freeze():
                assert uffd.start(libc.strlen, region.pointer()).result() == 0
    except HarnessError as error:
        told += "Current thread" in str(error)
print(told)
"""


def test_stacks_are_read_while_they_stand() -> None:
    """The stacks of threads that run are written down, time after time, and nobody crashes."""
    done = subprocess.run(
        (sys.executable, "-X", "faulthandler", "-c", _BUSY),
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "40\n", "")
