"""What the page says of a program and its mover, said to a program by hand."""

from __future__ import annotations

import array
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from aiouffd.migration import program
from aiouffd.uffd import Userfaultfd
from tests.docs.pages import ROOT
from tests.migration.ends import memfd
from tests.migration.frames import PAGE
from tests.migration.test_protocol_page import tables
from tests.targets import DEADLINE

PAGE_FILE: Final = ROOT / "docs" / "reference" / "migration-program.md"
LENGTH: Final = 4 * PAGE

#: Counts in its memory's first word on request, so that a test sees what it holds.
PROGRAM: Final = """
import sys
from aiouffd.migration import program

arrival = program.arrive()
if arrival is None:
    memory = program.ProgramMemory.create("counts", int(sys.argv[2]))
    memory.map[:2] = b"it"
    state = b"young"
else:
    memory, state = arrival.memory["counts"], arrival.state
with program.Movable(
    sys.argv[1], [memory], stop=lambda: state + b", stopped", restart=lambda: None, name="counter"
) as movable:
    if arrival is not None:
        arrival.note_running()
        arrival.wait_complete()
        print(arrival.state.decode(), bytes(memory.map[:2]).decode(), flush=True)
    else:
        print("ready", flush=True)
        movable.wait_ended()
"""

Answer = tuple[dict[str, Any], list[int]]


class Mover:
    """Says lines by hand, as the page has them."""

    def __init__(self, sock: socket.socket, stack: ExitStack) -> None:
        self.socket = sock
        self._stack = stack
        sock.settimeout(DEADLINE)

    def say(self, line: str, fds: Sequence[int] = ()) -> None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.socket.sendmsg([line.encode() + b"\n"], ancillary)

    def hear(self) -> Answer:
        data, fds = b"", []
        while not data.endswith(b"\n"):
            more, given, _, _ = socket.recv_fds(self.socket, 65536, 16)
            assert more
            data += more
            fds += given
        for fd in fds:
            self._stack.callback(os.close, fd)
        value: dict[str, Any] = json.loads(data)
        return value, fds

    def ask(self, line: str, fds: Sequence[int] = ()) -> Answer:
        self.say(line, fds)
        return self.hear()


@contextmanager
def running(folder: Path, arrival: socket.socket | None = None) -> Iterator[subprocess.Popen[str]]:
    """Start the program; without an arrival, wait until it listens."""
    path = folder / "program.sock"
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, path, str(LENGTH)],
        env=os.environ | ({"AIOUFFD_ARRIVAL": str(arrival.fileno())} if arrival else {}),
        pass_fds=(arrival.fileno(),) if arrival else (),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@contextmanager
def leaving(folder: Path) -> Iterator[tuple[subprocess.Popen[str], ExitStack]]:
    """Start a program that can be sent away."""
    with running(folder) as process, ExitStack() as stack:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process, stack


def mover(folder: Path, stack: ExitStack) -> Mover:
    sock = stack.enter_context(socket.socket(socket.AF_UNIX))
    sock.connect(os.fspath(folder / "program.sock"))
    return Mover(sock, stack)


@pytest.mark.once
def test_a_program_is_sent_away_by_the_lines_of_the_page(tmp_path: Path) -> None:
    """In their order, each with its answer and its descriptors."""
    rows = [row for row in tables(PAGE_FILE)["Line"] if "arrive" not in row[0]]
    answers = {row[0].strip("`"): row[2].strip("`") for row in rows}
    with leaving(tmp_path) as (process, stack):
        one = mover(tmp_path, stack)
        description, fds = one.ask('{"do": "describe"}')
        members = {row[0].strip("`") for row in tables(PAGE_FILE)["Member of the description"]}
        assert set(description) | {"untracked"} == members
        assert (description["version"], description["name"]) == (1, "counter")
        assert (description["stage"], description["pid"]) == ("running", process.pid)
        (region,) = description["regions"]
        assert set(region) == {"name", "start", "length", "page_size"}
        assert (region["name"], region["length"]) == ("counts", LENGTH)
        assert len(fds) == 2 - ("untracked" in description)
        assert os.pread(fds[0], 2, 0) == b"it"
        refused = one.ask('{"do": "leave"}')[0]
        assert set(refused) == {"error"}
        for line in ('{"do": "stop"}', '{"do": "restart"}', '{"do": "stop"}', '{"do": "leave"}'):
            answer, fds = one.ask(line)
            assert answer == json.loads(answers[line])
            assert len(fds) == (1 if "stop" in line else 0)
            if fds:
                assert os.pread(fds[0], 100, 0) == b"young, stopped"
        one.socket.close()
        # It has left: it stands still, whoever has gone.
        two = mover(tmp_path, stack)
        assert two.ask('{"do": "describe", "of": "tomorrow"}')[0]["stage"] == "left"
        assert two.ask('{"do": "end"}')[0] == json.loads(answers['{"do": "end"}'])
        assert process.wait(DEADLINE) == 0


@pytest.mark.once
def test_a_mover_that_goes_lets_a_stopped_program_go_on(tmp_path: Path) -> None:
    """Nothing has happened."""
    with leaving(tmp_path) as (_, stack):
        one = mover(tmp_path, stack)
        one.ask('{"do": "stop"}')
        one.socket.close()
        assert mover(tmp_path, stack).ask('{"do": "describe"}')[0]["stage"] == "running"


@pytest.mark.once
def test_a_program_arrives_by_the_lines_of_the_page(tmp_path: Path) -> None:
    """It gets its memory and its state, and says where it is."""
    ours, theirs = socket.socketpair()
    with ExitStack() as stack:
        stack.enter_context(ours)
        fd = stack.enter_context(memfd(LENGTH))
        os.pwrite(fd, b"is", 0)
        with theirs:
            process = stack.enter_context(running(tmp_path, theirs))
        one = Mover(ours, stack)
        region = {"name": "counts", "length": LENGTH, "page_size": PAGE}
        order = {"do": "arrive", "version": program.VERSION, "regions": [region]}
        with ExitStack() as given:
            receiver = Mover(ours, given)
            answer, (uffd,) = receiver.ask(json.dumps(order), [fd])
            with Userfaultfd.adopt(os.dup(uffd)) as adopted:
                (place,) = answer["regions"]
                adopted.register(place["start"], LENGTH)
        assert answer["pid"] == process.pid
        assert set(place) == {"name", "start"}
        state = stack.enter_context(memfd(0))
        os.write(state, b"old")
        assert one.ask('{"do": "run"}', [state]) == ({"stage": "running"}, [])
        one.say('{"do": "complete"}')
        assert process.communicate(timeout=DEADLINE)[0] == "old is\n"


@pytest.mark.once
def test_a_program_that_loses_its_receiver_kills_itself(tmp_path: Path) -> None:
    """Before it is complete."""
    ours, theirs = socket.socketpair()
    with ExitStack() as stack:
        stack.enter_context(ours)
        fd = stack.enter_context(memfd(LENGTH))
        with theirs:
            process = stack.enter_context(running(tmp_path, theirs))
        one = Mover(ours, stack)
        region = {"name": "counts", "length": LENGTH, "page_size": PAGE}
        one.ask(json.dumps({"do": "arrive", "version": 1, "regions": [region]}), [fd])
        state = stack.enter_context(memfd(0))
        one.ask('{"do": "run"}', [state])
        ours.close()
        assert process.wait(DEADLINE) == -9


def test_limits_and_names_are_those_of_the_page() -> None:
    """The variable, the lines' length, the regions' number, the features."""
    text = PAGE_FILE.read_text(encoding="utf-8")
    assert f"`{program.ARRIVAL_VARIABLE}`" in text
    assert f"at most {program.MAX_LINE} bytes" in text
    assert f"1 to {program.MAX_REGIONS} of them" in text
    assert f"This is version {program.VERSION}." in text
    for features in (program._TRACKING, program._FOLLOWING):
        assert all(f"`{each.name}`" in text for each in features)
