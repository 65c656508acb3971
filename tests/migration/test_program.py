"""What a program does so that it can move, seen by who asks it to."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from aiouffd.errors import PeerError
from aiouffd.migration import program
from aiouffd.ranges import PAGE_SIZE
from aiouffd.uffd import Userfaultfd

ROOT = Path(__file__).resolve().parents[2]

#: A program that forks, and whose child looks at its memory.
FORKS = """
import os, sys
from aiouffd.migration import program

def child_ends_by():
    pid = os.fork()
    if not pid:
        os._exit(memory.map[0])
    status = os.waitpid(pid, 0)[1]
    return os.waitstatus_to_exitcode(status)

arrival = program.arrive()
memory = arrival.memory["memory"]
arrival.note_running()
print(child_ends_by(), flush=True)
arrival.wait_complete()
print(child_ends_by(), flush=True)
"""


@pytest.mark.once
def test_a_forked_child_has_no_such_memory() -> None:
    """It would fill with zeros, for its parent as well, what its parent waits for; and what it
    wrote later would not be known to have changed.
    """
    ours, theirs = socket.socketpair()
    memfd = os.memfd_create("memory", os.MFD_CLOEXEC)
    os.ftruncate(memfd, PAGE_SIZE)
    state = program.state_file(b"")
    with ours, theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", FORKS],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            pass_fds=(theirs.fileno(),),
            env={**os.environ, program.ARRIVAL_VARIABLE: str(theirs.fileno())},
            text=True,
        )
        with process:
            try:
                line = program._Line(ours)
                region = {"name": "memory", "length": PAGE_SIZE, "page_size": PAGE_SIZE}
                line.say({"do": "arrive", "regions": [region]}, [memfd])
                answer, fds = line.hear()
                with Userfaultfd.adopt(fds[0]) as uffd:
                    start = answer["regions"][0]["start"]
                    uffd.register(start, PAGE_SIZE)
                    line.say({"do": "run"}, [state])
                    assert line.hear()[0] == {"stage": "running"}
                    assert process.stdout is not None
                    assert int(process.stdout.readline()) == -signal.SIGSEGV
                    uffd.copy(start, b"\5" * PAGE_SIZE)
                line.say({"do": "complete"})
                assert line.hear()[0] == {"stage": "complete"}
                assert int(process.stdout.readline()) == -signal.SIGSEGV
                assert process.wait(10) == 0
            finally:
                process.kill()
                os.close(memfd)
                os.close(state)


@pytest.mark.parametrize("stops", [False, True])
def test_a_program_whose_state_cannot_be_had_goes_on(
    tmp_path: Path, stops: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """If it was stopped it is let go on; the mover hears of an end, not of a state."""
    caplog.set_level(logging.CRITICAL, logger="aiouffd.migration")  # a record would hold its memory
    memory = program.ProgramMemory.create("memory", PAGE_SIZE)
    told: list[str] = []

    def stop() -> bytes:
        told.append("stop")
        if stops:
            return "no bytes"  # type: ignore[return-value]  # what else a program might do
        raise OSError("it does not stop")

    path = tmp_path / "socket"
    try:
        with program.Movable(path, [memory], stop=stop, restart=lambda: told.append("go on")) as it:
            with socket.socket(socket.AF_UNIX) as mover:
                mover.connect(str(path))
                line = program._Line(mover)
                line.say({"do": "stop"})
                with pytest.raises(ConnectionResetError):
                    line.hear()
            assert told == ["stop", "go on"][: 1 + stops]
            assert it.stage == "running"
    finally:
        os.close(memory.fd)


def test_a_state_is_a_file_of_some_length() -> None:
    """What a program gives as its state is not read blindly."""
    ends = os.pipe()
    huge = os.memfd_create("huge", os.MFD_CLOEXEC)
    try:
        os.ftruncate(huge, program.MAX_STATE + 1)
        for fd in (ends[0], huge):
            with pytest.raises(PeerError, match="no file of at most"):
                program.read_state(fd)
    finally:
        for fd in (*ends, huge):
            os.close(fd)


def test_a_program_that_is_still_arriving_is_not_sent_on(tmp_path: Path) -> None:
    """What is missing of it would be sent as zeros."""
    memory = program.ProgramMemory.create("memory", PAGE_SIZE)
    memory.is_arriving = True
    path = tmp_path / "socket"
    try:
        with (
            program.Movable(path, [memory], stop=bytes, restart=lambda: None),
            socket.socket(socket.AF_UNIX) as mover,
        ):
            mover.connect(str(path))
            line = program._Line(mover)
            for order in ("describe", "stop"):
                line.say({"do": order})
                assert "still arriving" in line.hear()[0]["error"]
            memory.is_arriving = False
            line.say({"do": "stop"})
            answer, fds = line.hear()
            assert answer == {"stage": "stopped"}
            os.close(fds[0])
    finally:
        os.close(memory.fd)
