"""Where threads stand, of real processes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from aiouffd.kernel import tracing
from aiouffd.testing.where import Calls, Places
from tests.targets import wait_until

CHILD = (sys.executable, "-S", "-c", "import sys; sys.stdin.read()")


@pytest.fixture
def calls() -> Iterator[Calls]:
    """What is tested."""
    calls = Calls()
    yield calls
    calls.close()


def sleeper() -> subprocess.Popen[bytes]:
    """A process that sleeps in a system call."""
    child = subprocess.Popen(CHILD, stdin=subprocess.PIPE)
    wait_until(lambda: tracing.in_system_call(child.pid, child.pid)[0] is not None, "asleep")
    return child


def open_files() -> int:
    """How many descriptors there are."""
    return len(os.listdir("/proc/self/fd"))


def test_a_thread_is_asked_again_and_again(calls: Calls) -> None:
    """Each answer is of now, and all of them take one descriptor, which is given back."""
    before = open_files()
    with sleeper() as child:
        there = calls.find(child.pid, child.pid)
        assert there == tracing.in_system_call(child.pid, child.pid)
        assert there[0] is not None
        opened = open_files()
        assert calls.find(child.pid, child.pid) == there
        assert open_files() == opened
        assert child.stdin is not None
        child.stdin.close()
        child.wait()
        assert calls.find(child.pid, child.pid) == (None, 0)
    calls.close()
    assert open_files() == before


def test_a_number_that_was_another_threads(calls: Calls) -> None:
    """A file that was opened for a thread which has ended is opened anew for the next one."""
    with sleeper() as ended:
        calls.find(ended.pid, ended.pid)
        ended.kill()
    with sleeper() as child:
        calls._files[child.pid, child.pid] = calls._files.pop((ended.pid, ended.pid))
        assert calls.find(child.pid, child.pid) == tracing.in_system_call(child.pid, child.pid)
        child.kill()


def test_many_threads_take_few_descriptors(calls: Calls) -> None:
    """However many threads touch, the files that are kept open have a bound."""
    before = open_files()
    stop = threading.Event()
    threads = [threading.Thread(target=stop.wait) for _ in range(100)]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            assert thread.native_id is not None
            calls.find(os.getpid(), thread.native_id)
            assert open_files() <= before + 64
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_code_is_named_by_its_file() -> None:
    """A program counter is a file and an offset in it; nothing where no file's code is."""
    places = Places()
    with sleeper() as child:
        name = places.name(child.pid, tracing.in_system_call(child.pid, child.pid)[1])
        file, _, offset = name.partition("+0x")
        assert ".so" in file or "python" in file
        assert int(offset, 16) > 0
        assert places.name(child.pid, 4096) == ""
        child.kill()
    assert places.name(child.pid, 0) == ""
