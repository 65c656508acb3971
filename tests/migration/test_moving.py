"""A program that is received: until it lives by itself the source keeps everything."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from pathlib import Path

import pytest

from aiouffd.errors import MigrationFailed
from aiouffd.migration.listener import Listener
from aiouffd.migration.moving import Arriving, Leaving, arriving
from aiouffd.migration.outgoing import Outgoing, Plan
from aiouffd.migration.stages import Stage
from tests.stand_in_vmm import ROOT
from tests.targets import DEADLINE

pytestmark = pytest.mark.once


async def test_a_receiver_that_ends_behind_the_last_page_has_not_got_the_program(
    tmp_path: Path,
) -> None:
    """It kills the program, which lacks who serves it; the source has not let go of its own."""
    here = str(tmp_path / "here")
    command = [sys.executable, "-m", "tests.cli.movable"]
    program = subprocess.Popen(
        [*command, here, "4"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    arrived: list[Arriving] = []

    async def receive(listener: Listener) -> None:
        incoming = await listener.accept()
        there = ["env", f"PYTHONPATH={ROOT}", *command, str(tmp_path / "there"), "4"]
        async with arriving(incoming, there) as one:
            arrived.append(one)
            await one.run()
            completing = asyncio.ensure_future(one.complete())
            await incoming.wait_here()  # in the same turn as complete() hears of it
            completing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await completing
            raise ConnectionAbortedError("the receiver ends")

    try:
        assert program.stdout is not None
        program.stdout.readline()
        async with Listener() as listener, asyncio.timeout(3 * DEADLINE):
            receiving = asyncio.ensure_future(receive(listener))
            async with await Leaving.open(here) as leaving:
                outgoing = Outgoing(leaving.memory, "127.0.0.1", listener.port, plan=Plan(rounds=0))
                with pytest.raises(MigrationFailed) as failed:
                    await outgoing.run(leaving)
                assert failed.value.outcome == "lost"
                assert outgoing.stage is not Stage.DONE
                await leaving.restart()  # as the operator's order: it is all here
            with pytest.raises(ConnectionAbortedError):
                await receiving
        assert arrived[0].process.poll() is not None
        assert program.poll() is None
    finally:
        program.kill()
        program.communicate()
