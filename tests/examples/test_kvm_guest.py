"""examples/kvm_guest.py: a machine that stops anywhere, goes on anywhere, and knows its memory."""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import subprocess
import sys
from typing import Any, Final

import pytest

from aiouffd.events import PageFault
from aiouffd.fds import OwnedFd
from aiouffd.pager import Pager
from aiouffd.uffd import Userfaultfd
from kvm_guest import errors_in, why_not
from tests.examples.machine import SIZE, new_ram
from tests.examples.running import ROOT

pytestmark = pytest.mark.skipif(bool(why_not()), reason=f"{why_not()}: it takes KVM on x86-64")

COMMAND: Final = (sys.executable, "-W", "error", "-m")
ENVIRONMENT: Final = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/examples"}


def run(module: str, *arguments: object, state: bytes = b"", fds: tuple[int, ...] = ()) -> bytes:
    """Run a module of tests/examples, and give what it prints."""
    done = subprocess.run(
        [*COMMAND, f"tests.examples.{module}", *map(str, arguments)],
        cwd=ROOT,
        env=ENVIRONMENT,
        input=state,
        capture_output=True,
        timeout=50,
        check=False,
        pass_fds=fds,
    )
    assert (done.returncode, done.stderr) == (0, b""), done.stderr.decode()
    return done.stdout


def _new_ram() -> OwnedFd:
    with new_ram() as ram:
        return OwnedFd(os.dup(ram.fd))


def _copied(ram: OwnedFd) -> OwnedFd:
    """Copy a memfd."""
    new = os.memfd_create("copy", os.MFD_CLOEXEC)
    at = 0
    while at < SIZE:
        at += os.sendfile(new, ram.fileno(), at, SIZE - at)
    return OwnedFd(new)


@pytest.mark.once
def test_it_goes_on_in_another_process_wherever_it_was_stopped(seed: int) -> None:
    """Its registers and its RAM are all of it: no pass is lost, no page is wrong."""
    rng = random.Random(seed)
    state, ram = b"", _new_ram()
    try:
        for _ in range(30):
            fd = ram.fileno()
            state = run("hop", fd, 0, rng.random() * 0.02, state=state, fds=(fd,))
            old, ram = ram, _copied(ram)
            old.close()
        fd = ram.fileno()
        state = run("hop", fd, 2, 0, state=state, fds=(fd,))  # it sees each page again
    finally:
        ram.close()
    assert errors_in(state) == 0


@pytest.mark.once
def test_what_an_exit_asked_for_is_done_once() -> None:
    """A state that is taken at an exit does not ask for the same thing again."""
    assert json.loads(run("machine", "exits")) == {"passes": 10, "errors": 0}


@pytest.mark.once
def test_it_notices_a_single_bit(seed: int) -> None:
    """Whatever byte of its pages is changed: the guest names the page, and no other."""
    found: dict[str, list[int]] = json.loads(run("machine", "flip", seed))
    assert found["wrong"] == found["flipped"]


@pytest.mark.once
def test_its_writes_are_seen(seed: int) -> None:
    """What a tracker says was written is what was, exactly, while the guest goes on.

    Copied by what it says, the RAM is right at each of forty stops.
    """
    found: dict[str, Any] = json.loads(run("machine", "copy", seed, 200))
    assert found["wrong"] == []
    assert found["stops"] > 10, "there was hardly ever something to take at a stop"
    assert len([count for count in found["written_pages"] if count]) > 50


@pytest.mark.once
@pytest.mark.root
def test_its_faults_are_served_by_its_own_process(seed: int) -> None:
    """The loop fills what the vCPU waits for; a vCPU that waits can be stopped, and started."""
    found: dict[str, int] = json.loads(run("machine", "own"))
    assert found["errors"] == 0
    assert found["faults"] >= SIZE // 4096 // 2


@pytest.mark.once
@pytest.mark.root
@pytest.mark.child
async def test_its_faults_are_served_by_another_process(time_scale: float) -> None:
    """A pager that has never seen the machine fills its memory."""
    ours, theirs = socket.socketpair()
    with ours, _new_ram() as ram:
        with theirs:
            process = await asyncio.create_subprocess_exec(
                *COMMAND,
                "tests.examples.machine",
                "served",
                str(theirs.fileno()),
                cwd=ROOT,
                env=ENVIRONMENT,
                stdout=asyncio.subprocess.PIPE,
                pass_fds=[theirs.fileno()],
            )
        try:
            async with asyncio.timeout(50 * time_scale):
                faults = await _serve(ours, process, ram)
                assert process.stdout is not None
                found = json.loads(await process.stdout.read())
                assert await process.wait() == 0
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    assert found["errors"] == 0
    assert faults >= SIZE // 4096 // 2


async def _serve(ours: socket.socket, process: asyncio.subprocess.Process, ram: OwnedFd) -> int:
    async def fill(fault: PageFault) -> bytes:
        return os.pread(ram.fileno(), fault.length, fault.offset)

    data, fds, _, _ = await asyncio.to_thread(socket.recv_fds, ours, 8, 1)
    with OwnedFd(os.pidfd_open(process.pid)) as pidfd:
        async with Pager(Userfaultfd.adopt(fds[0]), target=pidfd.fileno()) as pager:
            pager.register(int.from_bytes(data, "little"), SIZE, fill)
            ours.send(b"!")
            await pager.wait_closed()
            return pager.counters.faults
