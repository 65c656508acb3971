"""Threads and processes by the number that they have for themselves."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from aiouffd.testing import Harness, HarnessError
from aiouffd.testing.whose import is_elsewhere, process_of, thread_of
from tests.native import build

SLEEPER = "import threading; threading.Thread(target=input).start(); print(flush=True)"

#: process_vm_readv(2) of three bytes.
LOOKING = """
import ctypes, sys
process, address = map(int, sys.argv[1:])
found = ctypes.create_string_buffer(3)
there, here = (ctypes.c_size_t * 2)(address, 3), (ctypes.c_size_t * 2)(ctypes.addressof(found), 3)
ctypes.CDLL(None).process_vm_readv(process, here, 1, there, 1, 0)
print(found.raw.decode())
"""


@pytest.fixture(scope="module")
def mapper() -> str:
    """mapper.c, built."""
    return str(build(Path(__file__).with_name("mapper.c"), library=False))


def test_threads_of_this_namespace_keep_their_numbers() -> None:
    """A thread's number is found in its own process only."""
    own = os.getpid()
    assert not is_elsewhere(own)
    assert thread_of(own, threading.get_native_id(), elsewhere=False) == threading.get_native_id()
    assert thread_of(own, 1, elsewhere=False) is None
    anything = ctypes.create_string_buffer(1)
    assert process_of(threading.get_native_id(), ctypes.addressof(anything)) == own
    assert process_of(threading.get_native_id(), 0) is None


@pytest.mark.root
def test_threads_of_another_namespace_have_other_numbers() -> None:
    """What is thread 2 to itself is found under the number that it has here."""
    with subprocess.Popen(
        ["unshare", "--pid", "--fork", sys.executable, "-c", SLEEPER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as program:
        assert program.stdout is not None
        program.stdout.readline()
        children = Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text("ascii")
        process = int(children)
        assert is_elsewhere(process)
        assert thread_of(process, 1, elsewhere=True) == process
        second = thread_of(process, 2, elsewhere=True)
        assert str(second) in os.listdir(f"/proc/{process}/task")
        assert second != process
        assert thread_of(process, 77, elsewhere=True) is None
        start = Path(f"/proc/{process}/maps").read_text("utf-8").partition("-")[0]
        assert process_of(2, int(start, 16)) == process
        program.communicate(b"\n")


@pytest.mark.root
def test_a_program_in_another_namespace_is_stepped_over(mapper: str) -> None:
    """Each touch of a program that is process 1 to itself is seen, under its number here."""
    with Harness(timeout=20) as uffd:
        region = uffd.region(1, contents=b"abc")
        argv = ["unshare", "--pid", "--fork", mapper, "map", "load", "0", "load", "1", "fork", "2"]
        with uffd.record(region, every=True) as record:
            program = uffd.program(
                argv, {"AIOUFFD_REGION": region}, stdout=subprocess.PIPE, name="elsewhere"
            )
            output, _ = program.communicate(timeout=30)
        assert output.split() == [b"97", b"98", b"99"]
        assert [touch.offset for touch in record] == [0, 1, 2]
        processes = [touch.process for touch in record]
        assert processes[0] == processes[1] != processes[2]
        assert not {1, 2} & {*processes, *(touch.thread for touch in record)}


@pytest.mark.root
def test_who_looks_from_outside_is_let_through(mapper: str) -> None:
    """A thread of no process that has the region is never traced; the test hears of it."""
    with pytest.raises(HarnessError, match="which is none of process"), Harness(timeout=20) as uffd:
        region = uffd.region(1, contents=b"abc")
        with uffd.record(region, every=True) as record:
            found = subprocess.run(
                [sys.executable, "-c", LOOKING, str(os.getpid()), str(region.address)],
                stdout=subprocess.PIPE,
                timeout=30,
                check=True,
            )
        assert found.stdout.strip() == b"abc"
        assert len(record) == 0
