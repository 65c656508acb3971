"""What the helper process does with orders and touches that nobody would make on a good day."""

from __future__ import annotations

import ctypes
import os
import resource
import signal

import pytest

from aiouffd.testing import Harness, HarnessError, Region, latency
from tests.targets import wait_until

PAGE = os.sysconf("SC_PAGE_SIZE")


def futex(uffd: Harness, library: ctypes.CDLL, region: Region) -> int:
    """Have the kernel pin the region's first page for a futex that does not wait."""
    library.futex_mismatch.argtypes = (ctypes.c_void_p,)
    library.futex_mismatch.restype = ctypes.c_long
    result: int = uffd.start(library.futex_mismatch, region.pointer()).result()
    return result


@pytest.mark.root
def test_a_call_that_pins_its_page_goes_on(
    uffd: Harness, library: ctypes.CDLL, memory: str
) -> None:
    """A futex on a page that is stepped over ends, and the page's next touch is seen."""
    region = uffd.region(1, memory=memory)
    with uffd.record(every=True) as record:
        assert [futex(uffd, library, region) for _ in range(3)] == [-11] * 3
    assert len(record) >= 3


@pytest.mark.root
def test_a_call_that_pins_its_page_leaves_others_standing(
    uffd: Harness, library: ctypes.CDLL, memory: str
) -> None:
    """It is woken, and who is frozen at the same page is not."""
    region = uffd.region(1, contents=b"abcdefgh", memory=memory)
    with region.at(7).freeze() as freeze:
        running = uffd.start(library.load, region.pointer(7))
        frozen = freeze.wait()
        assert futex(uffd, library, region) == -11
        assert not running.done
        region.poke(7, b"H")
        frozen.release()
        assert running.result() == ord("H")


def test_a_handler_within_a_slow_touch(uffd: Harness, library: ctypes.CDLL) -> None:
    """A signal handler's slower touch within a slow one: both threads' accesses are made."""
    library.load_interrupted.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
    region = uffd.region(2, contents=b"s" * PAGE + b"h")
    with region.page(0).slow(latency.constant(0.2)), region.page(1).slow(0.4):
        running = uffd.start(library.load_interrupted, region.pointer(), region.pointer(PAGE))
        wait_until(lambda: uffd.touch_count() > 0, "the slow touch")
        thread = running.thread.ident
        assert thread is not None
        signal.pthread_kill(thread, signal.SIGUSR1)
        assert running.result(20) == ord("s") << 8 | ord("h")


def test_a_page_that_cannot_be_discarded_is_left_as_it_was(
    uffd: Harness, library: ctypes.CDLL
) -> None:
    """Locked memory refuses to go: the test is told, and later touches go through."""
    region = uffd.region(1, memory="anon")
    uffd.start(library.store, region.pointer(1), 7).result()
    libc = ctypes.CDLL(None, use_errno=True)
    address = region.pointer()
    if libc.mlock(address, ctypes.c_size_t(PAGE)):
        pytest.skip("mlock is not permitted here (ulimit -l)")
    with pytest.raises((HarnessError, OSError), match="madvise"):
        region.rearm()
    assert uffd.start(library.load, region.pointer(1)).result() == 7
    uffd.start(library.store, region.pointer(1), 8).result()
    assert region.peek(1, 1) == b"\x08"
    libc.munlock(address, ctypes.c_size_t(PAGE))
    region.rearm()
    assert uffd.start(library.load, region.pointer(1)).result() == 8


def test_an_order_that_breaks_the_helper_is_told(uffd: Harness) -> None:
    """Whatever an order raises in the helper is raised here, and the others are served on."""
    region = uffd.region(1, contents=b"kept")
    with pytest.raises(HarnessError, match=r"peek failed in the helper process: KeyError\(999\)"):
        uffd.order("peek", 999, 0, 1)
    assert region.peek(0, 4) == b"kept"


def test_a_thousand_open_descriptors(library: ctypes.CDLL, uffd: Harness) -> None:
    """The helper runs whatever numbers its descriptors have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2000:
        pytest.skip(f"needs 2,000 descriptors, has {hard} (ulimit -n)")
    resource.setrlimit(resource.RLIMIT_NOFILE, (2000, hard))
    fds = [os.dup(0) for _ in range(1200)]
    try:
        with Harness() as many:
            region = many.region(1, contents=b"x")
            assert many.start(library.load, region.pointer()).result() == ord("x")
    finally:
        for fd in fds:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_helper_that_cannot_start_says_so_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose program fails is known to have ended, without waiting for an answer."""
    monkeypatch.setattr("aiouffd.testing.helper._command", _failing_command, raising=True)
    with pytest.raises(HarnessError, match="has ended"):
        Harness()


def _failing_command(*_: object) -> list[str]:
    return ["false"]


@pytest.mark.parametrize("exact", [False, True])
def test_times_are_not_cut_short(uffd: Harness, library: ctypes.CDLL, exact: bool) -> None:
    """A latency below the kernel's millisecond is waited for in full, and so is one above."""
    region = uffd.region(4)
    seconds = 0.0003 if exact else 0.0021
    with region.all.slow(seconds):
        uffd.start(library.walk, region.pointer(), 4, PAGE).result()
    assert all(touch.waited_ns >= seconds * 1e9 for touch in uffd.record_so_far)
