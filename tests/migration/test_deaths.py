"""Who dies at which stage, and what becomes of the program: docs/topics/migration-failures.md.

Real processes: the program here, who sends it, who receives it, the program there; and a proxy that
holds a migration at a stage until one of them has been killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final, Self

import pytest

from aiouffd.migration.wire import Kind, Role
from tests.migration.unreliable import Connection, Passed, Unreliable, Way
from tests.stand_in_vmm import ROOT
from tests.targets import DEADLINE

pytestmark = [pytest.mark.once, pytest.mark.child]

#: Where a migration is held: at a frame, and whether it still passes itself; the last one is the
#: stage's beginning.
_STAGES: Final[dict[str, list[tuple[Kind, Role, str, bool]]]] = {
    "copying": [(Kind.PAGES, Role.BULK, "up", True)],
    "switching": [(Kind.SWITCH, Role.BULK, "up", False)],
    "following": [(Kind.SWITCH, Role.BULK, "up", True), (Kind.RUNNING, Role.DEMAND, "down", True)],
    "done": [(Kind.DONE, Role.DEMAND, "down", False)],
    "over": [],
}


class Said:
    """A process, and what it says as lines of JSON."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.said: list[dict[str, Any]] = []

    @classmethod
    async def start(cls, *arguments: str) -> Self:
        """Start a Python program."""
        return cls(
            await asyncio.create_subprocess_exec(
                *(sys.executable, *arguments),
                cwd=ROOT,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
            )
        )

    async def until(self, word: str) -> dict[str, Any]:
        """Read up to the line that has this key, or is this event."""
        assert self.process.stdout is not None
        async with asyncio.timeout(3 * DEADLINE):
            async for line in self.process.stdout:
                value: dict[str, Any] = json.loads(line)
                self.said.append(value)
                if word in value or value.get("event") == word:
                    return value
        raise AssertionError(f"it ended without {word}; it had said {self.said[-3:]}")

    async def end(self) -> int:
        """Wait for its end; give the status."""
        async with asyncio.timeout(3 * DEADLINE):
            await self.process.communicate()
        return self.process.returncode if self.process.returncode is not None else -1

    def kill(self) -> None:
        """Kill it."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()


class Scene:
    """One migration of real processes, held at a stage.

    Attributes:
        here: The program, where it was.
        send: Who sends it.
        receive: Who receives it; what the program there says comes out here, too.
    """

    def __init__(self, folder: Path, proxy: Unreliable, stage: str) -> None:
        self.paths = str(folder / "here"), str(folder / "there")
        self.proxy = proxy
        self.stage = stage
        self.held = asyncio.Event()
        self.here: Said
        self.send: Said
        self.receive: Said

    def hold(self, connection: Connection, way: Way, frame: Passed) -> None:
        """Hold what comes behind a frame of the stage, or with it."""
        direction = "up" if way is connection.up else "down"
        for kind, role, up_or_down, passes in _STAGES[self.stage]:
            if (kind, role, up_or_down) == (frame.kind, connection.role, direction):
                if way.hold_at is None:
                    way.hold_at = frame.end if passes else frame.begin
                if kind is _STAGES[self.stage][-1][0]:
                    self.held.set()

    def go_on(self) -> None:
        """Hold nothing any more."""
        self.proxy.on_frame = lambda *_: None
        for connection in self.proxy.connections:
            for way in connection.ways:
                way.release()

    def kill_there(self) -> None:
        """Kill the program that has arrived."""
        children = Path(f"/proc/{self.receive.process.pid}/task").glob("*/children")
        (pid,) = (int(pid) for each in children for pid in each.read_text().split())
        os.kill(pid, signal.SIGKILL)

    async def stage_here(self) -> str:
        """Say whether the program here runs, stands still, or is gone."""
        reader, writer = await asyncio.open_unix_connection(self.paths[0])
        try:
            writer.write(b'{"do": "describe"}\n')
            return str(json.loads(await reader.readline())["stage"])
        finally:
            writer.close()


@contextlib.asynccontextmanager
async def scene(folder: Path, stage: str) -> AsyncIterator[Scene]:
    """Start all, and let it go on up to a stage."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(*arguments: str) -> Said:
            said = await Said.start(*arguments)
            stack.push_async_callback(said.end)
            stack.callback(said.kill)
            return said

        movable = ("-m", "tests.cli.movable")
        here, there = str(folder / "here"), str(folder / "there")
        program, receive = await asyncio.gather(
            start(*movable, here, "2"),
            start(
                *("-m", "aiouffd", "migrate", "receive", "127.0.0.1:0", "--json", "--wait"),
                *("--deadline", "1", "--", sys.executable, *movable, there),
            ),
        )
        listening = await receive.until("listening")
        proxy = await stack.enter_async_context(Unreliable("127.0.0.1", listening["port"]))
        found = Scene(folder, proxy, stage)
        proxy.on_frame = found.hold
        await program.until("ready")
        to = f"127.0.0.1:{proxy.port}"
        rounds = "1" if stage == "copying" else "0"
        options = ("--json", "--deadline", "1", "--rounds", rounds, "--downtime", "0")
        found.here, found.receive = program, receive
        found.send = await start("-m", "aiouffd", "migrate", "send", here, to, *options)
        if stage != "over":
            async with asyncio.timeout(3 * DEADLINE):
                await found.held.wait()
        yield found
        found.go_on()


async def restart(found: Scene) -> int:
    """Let the program go on here, as its owner would."""
    said = await Said.start("-m", "aiouffd", "migrate", "restart", found.paths[0])
    return await said.end()


# --- who sends it ------------------------------------------------------------------------


async def test_sender_dies_while_copying(tmp_path: Path) -> None:
    """The program runs on here; there it is forgotten after the deadline."""
    async with scene(tmp_path, "copying") as found:
        found.send.kill()
        await found.send.end()
        failed = await found.receive.until("failed")
        assert failed["outcome"] == "source"
        assert await found.receive.end() == 1
        assert await found.stage_here() == "running"


async def test_sender_dies_while_switching(tmp_path: Path) -> None:
    """It stands still here, runs nowhere, and can be let go on."""
    async with scene(tmp_path, "switching") as found:
        found.send.kill()
        await found.send.end()
        assert (await found.receive.until("failed"))["outcome"] == "source"
        assert await found.receive.end() == 1
        assert await found.stage_here() == "left"
        assert await restart(found) == 0
        assert await found.stage_here() == "running"


async def test_sender_dies_while_following(tmp_path: Path) -> None:
    """There it ends for want of memory; here it stands still as of the switch."""
    async with scene(tmp_path, "following") as found:
        await found.receive.until("running")
        found.send.kill()
        await found.send.end()
        assert (await found.receive.until("failed"))["outcome"] == "lost"
        assert await found.receive.end() == 8
        assert await found.stage_here() == "left"


async def test_sender_dies_before_it_hears_that_all_is_there(tmp_path: Path) -> None:
    """There it runs with all of its memory; here it stands still, since nobody has told it."""
    async with scene(tmp_path, "done") as found:
        await found.receive.until("began")
        found.send.kill()
        await found.send.end()
        await found.receive.until("ended")
        assert await found.receive.end() == 0
        assert await found.stage_here() == "left"


# --- who receives it ---------------------------------------------------------------------


async def test_receiver_dies_while_copying(tmp_path: Path) -> None:
    """The program runs on here."""
    async with scene(tmp_path, "copying") as found:
        found.receive.kill()
        assert (await found.send.until("failed"))["outcome"] == "source"
        assert await found.send.end() == 1
        assert await found.stage_here() == "running"
        await found.receive.end()  # what is there has its stdout, too, and is killed with it


async def test_receiver_dies_while_switching(tmp_path: Path) -> None:
    """It stands still here: that it does not run there is not known, but can be looked up."""
    async with scene(tmp_path, "switching") as found:
        found.receive.kill()
        assert (await found.send.until("failed"))["outcome"] == "unknown"
        assert await found.send.end() == 7
        assert await found.stage_here() == "left"
        await found.receive.end()
        assert not any("began" in each for each in found.receive.said)
        assert await restart(found) == 0


async def test_receiver_dies_while_following(tmp_path: Path) -> None:
    """The program there is killed with it, rather than read zeros; here it stands still."""
    async with scene(tmp_path, "following") as found:
        await found.receive.until("running")
        found.receive.kill()
        assert (await found.send.until("failed"))["outcome"] == "unknown"
        assert await found.send.end() == 7
        assert await found.stage_here() == "left"
        await found.receive.end()
        assert not any("wrong" in each or "ended" in each for each in found.receive.said)


async def test_receiver_dies_when_all_is_there(tmp_path: Path) -> None:
    """The program there lives on by itself; the one here has ended."""
    async with scene(tmp_path, "over") as found:
        await found.send.until("moved")
        await found.receive.until("moved")
        found.receive.kill()
        await found.receive.until("ended")
        assert await found.send.end() == 0
        assert await found.here.end() == 0


# --- the program here --------------------------------------------------------------------


async def test_program_here_dies_while_copying(tmp_path: Path) -> None:
    """It has ended here, and nothing runs there."""
    async with scene(tmp_path, "copying") as found:
        found.here.kill()
        await found.here.end()
        found.go_on()
        failed = await found.send.until("failed")
        assert failed["outcome"] == "source"
        assert await found.send.end() == 1
        assert (await found.receive.until("failed"))["outcome"] == "source"
        assert await found.receive.end() == 1


@pytest.mark.parametrize("stage", ["switching", "following"])
async def test_program_here_dies_once_it_has_left(tmp_path: Path, stage: str) -> None:
    """It was over here anyway: who sends it has its memory, and it moves."""
    async with scene(tmp_path, stage) as found:
        found.here.kill()
        await found.here.end()
        found.go_on()
        await found.send.until("moved")
        assert await found.send.end() == 0
        await found.receive.until("ended")
        assert await found.receive.end() == 0


# --- the program there -------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["copying", "switching"])
async def test_program_there_dies_before_it_runs(tmp_path: Path, stage: str) -> None:
    """It goes on here, wherever the switch has got to."""
    async with scene(tmp_path, stage) as found:
        found.kill_there()
        assert (await found.receive.until("failed"))["outcome"] == "source"
        assert await found.receive.end() == 1
        assert (await found.send.until("failed"))["outcome"] == "source"
        assert await found.send.end() == 1
        assert await found.stage_here() == "running"


async def test_program_there_dies_while_following(tmp_path: Path) -> None:
    """What it has done there is gone; here it stands still as of the switch."""
    async with scene(tmp_path, "following") as found:
        await found.receive.until("running")
        found.kill_there()
        assert (await found.receive.until("failed"))["outcome"] == "lost"
        assert await found.receive.end() == 8
        event = await found.send.until("failed")
        assert event["outcome"] == "lost", event
        assert await found.send.end() == 8
        assert await found.stage_here() == "left"
        assert await restart(found) == 0
