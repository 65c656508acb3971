"""aiouffd.keeper: holds descriptors, starts again, gives up safely; and aiouffd.cli.keep."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from aiouffd.fds import OwnedFd
from aiouffd.keeper import Generation, Keeper, Patience, _is_name, kill_targets
from tests.keeping import ROOT, keeping
from tests.serving import within

#: The keeper is a process of its own; the test's loop makes no difference.
one_loop = pytest.mark.asyncio(loop_factories=["asyncio"])


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_text(path.name)
    return [str(path) for path in paths]


@one_loop
async def test_gives_back_what_was_stored(tmp_path: Path, files: list[str]) -> None:
    """After kill -9 the next run has the descriptors, by name, and what is removed is gone."""
    async with keeping(tmp_path) as kept:
        run = await kept.next_run()
        assert run.taken == {}
        assert run.hello["limit"] == 4096
        await run.ask("store", "one", files[0], files[1])
        await run.ask("store", "two", files[2])
        os.kill(run.hello["pid"], signal.SIGKILL)
        again = await kept.next_run()
        assert again.taken == {"one": files[:2], "two": files[2:]}
        await again.ask("remove", "one")
        await again.ask("store", "three", files[0])
        again.tell("exit", 3)  # a failure is a death too
        third = await kept.next_run()
        assert third.taken == {"two": files[2:], "three": files[:1]}
        third.tell("exit", 0)
        status, _ = await kept.end()
        assert status == 0


@one_loop
async def test_the_last_breath_counts(tmp_path: Path, files: list[str]) -> None:
    """What a process sent right before its death is kept."""
    async with keeping(tmp_path) as kept:
        run = await kept.next_run()
        run.tell("die with", "last", files[0])
        assert (await kept.next_run()).taken == {"last": files[:1]}


@one_loop
async def test_children_of_the_command_are_heard(tmp_path: Path, files: list[str]) -> None:
    """A process that the command has started may store; one of our own may not."""
    async with keeping(tmp_path) as kept:
        run = await kept.next_run()
        await run.ask("child stores", "child", files[0])
        path = Path(f"/proc/{run.hello['pid']}/environ").read_bytes()
        place = next(x for x in path.split(b"\0") if x.startswith(b"NOTIFY_SOCKET=")).decode()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stranger:
            stranger.connect(place.partition("=")[2])
            for garbage in (b"", b"\xff" * 4096, b"FDSTOREREMOVE=1\nFDNAME=child", b"FDSTORE=1"):
                with open(files[1]) as file:
                    socket.send_fds(stranger, [garbage], [file.fileno()] * 200)
        assert (await run.ask("told"))["done"]
        os.kill(run.hello["pid"], signal.SIGKILL)
        again = await kept.next_run()
        assert again.taken == {"child": files[:1]}
        again.tell("exit", 0)
        _, text = await kept.end()
        assert text.count("stranger") == 4


@one_loop
async def test_the_limit_is_known_to_the_command(tmp_path: Path, files: list[str]) -> None:
    """The command knows how many descriptors are kept, and stores no more."""
    async with keeping(tmp_path, "--max-fds", "2") as kept:
        run = await kept.next_run()
        assert run.hello["limit"] == 2
        await run.ask("store", "two", *files[:2])
        run.tell("store", "more", files[2])  # it dies of the StoreError
        assert (await kept.next_run()).taken == {"two": files[:2]}


@one_loop
async def test_gives_up_and_kills_the_targets(tmp_path: Path) -> None:
    """After so many deaths in a row the targets are killed before anything is closed."""
    with subprocess.Popen(["sleep", "1000"]) as target:
        options = ("--tries", "3", "--max-delay", "0.01", "--give-up", "kill")
        async with keeping(tmp_path, *options) as kept:
            run = await kept.next_run()
            await run.ask("pidfd", "target", target.pid)
            for _ in range(2):
                run.tell("exit", 9)
                run = await kept.next_run()
            assert target.poll() is None
            run.tell("exit", 9)
            status, text = await kept.end()
            assert status == 9
            assert "given up: it died 3 times" in text
            assert target.wait(10) == -signal.SIGKILL


@one_loop
async def test_holds_if_told_so(tmp_path: Path) -> None:
    """With --give-up hold nothing is killed and nothing closed."""
    with subprocess.Popen(["sleep", "1000"]) as target:
        async with keeping(tmp_path, "--tries", "1", "--give-up", "hold") as kept:
            run = await kept.next_run()
            await run.ask("pidfd", "target", target.pid)
            run.tell("exit", 9)
            assert kept.process.stderr is not None
            while b"stays for that" not in (line := await within(kept.process.stderr.readline())):
                assert line
            assert target.poll() is None
        target.kill()


@one_loop
async def test_a_command_that_never_works_ends_at_once(tmp_path: Path) -> None:
    """A wrong option is no crash: there is nothing to keep and nothing to try again."""
    words = [sys.executable, "-m", "aiouffd", "keep", "--", sys.executable, "-c", "exit(7)"]
    process = await asyncio.create_subprocess_exec(*words, cwd=ROOT)
    assert await within(process.wait()) == 7
    words[-3:] = [str(tmp_path / "nonesuch")]
    process = await asyncio.create_subprocess_exec(*words, cwd=ROOT, stderr=asyncio.subprocess.PIPE)
    _, text = await within(process.communicate())
    assert process.returncode == 1
    assert b"no such program" in text


@one_loop
async def test_sigterm_is_passed_on(tmp_path: Path, files: list[str]) -> None:
    """The command is told, and its end is the keeper's."""
    async with keeping(tmp_path) as kept:
        run = await kept.next_run()
        await run.ask("ready")
        kept.process.send_signal(signal.SIGTERM)
        while not (await run.ask("told"))["told"]:
            pass
        os.kill(run.hello["pid"], signal.SIGKILL)  # a death while it drains is no end
        again = await kept.next_run()
        await again.ask("ready")
        while not (await again.ask("told"))["told"]:
            pass
        again.tell("exit", 4)
        assert (await kept.end())[0] == 4


@one_loop
async def test_upgrade(tmp_path: Path, files: list[str]) -> None:
    """SIGHUP starts a new run; once it is ready the old one is told to end, and may."""
    async with keeping(tmp_path) as kept:
        old = await kept.next_run()
        await old.ask("ready")
        await old.ask("store", "same name", files[0])
        kept.process.send_signal(signal.SIGHUP)
        new = await kept.next_run()
        assert new.taken == {}
        assert new.hello["limit"] == 4096 - 1  # they share it
        await new.ask("store", "same name", files[1])
        assert not (await old.ask("told"))["told"]
        await new.ask("ready")
        while not (await old.ask("told"))["told"]:
            pass
        await old.ask("remove", "same name")
        old.tell("exit", 0)
        while Path(f"/proc/{old.hello['pid']}").exists():
            await asyncio.sleep(0)
        os.kill(new.hello["pid"], signal.SIGKILL)
        last = await kept.next_run()
        assert last.taken == {"same name": files[1:2]}
        last.tell("exit", 0)
        assert (await kept.end())[0] == 0


@one_loop
async def test_upgrade_with_deaths(tmp_path: Path, files: list[str]) -> None:
    """A draining run that dies leaves its descriptors to the newest, started again for that."""
    async with keeping(tmp_path) as kept:
        old = await kept.next_run()
        await old.ask("ready")
        await old.ask("store", "old", files[0])
        kept.process.send_signal(signal.SIGHUP)
        new = await kept.next_run()
        await new.ask("store", "new", files[1])
        await new.ask("ready")
        os.kill(old.hello["pid"], signal.SIGKILL)
        both = await kept.next_run()
        assert both.taken == {"old": files[:1], "new": files[1:2]}
        # A new run that never gets ready leaves the old one in charge.
        await both.ask("ready")
        kept.process.send_signal(signal.SIGHUP)
        (await kept.next_run()).tell("exit", 5)
        await kept.until_it_says("the old one stays")
        assert (await both.ask("told"))["told"] is False
        both.tell("exit", 0)
        assert (await kept.end())[0] == 0


def test_keeps_no_more_than_it_can_hand_on() -> None:
    """Where few descriptors are allowed few are kept: they are there twice at a start."""
    keep = [sys.executable, "-m", "aiouffd", "keep", "--", "sh", "-c", "echo $FDSTORE"]
    limited = ["sh", "-c", 'ulimit -n 264; exec "$@"', "sh", *keep]
    done = subprocess.run(
        limited, check=False, cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "100\n"
    assert "keeping 100 descriptors at most" in done.stderr


def test_delays_grow_and_end() -> None:
    """The first restart is at once; each further one waits twice as long, up to a bound."""
    patience = Patience(first_delay=0.1, max_delay=1.0)
    assert [patience.delay(n) for n in range(1, 8)] == [0, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0]


@one_loop
async def test_a_healthy_life_starts_the_row_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deaths far apart are no row."""
    keeper = Keeper(["true"], fail_closed=kill_targets, patience=Patience(tries=2))
    keeper._ever_ready = True
    started: list[Any] = []
    monkeypatch.setattr(keeper, "_start", started.append)
    for healthy in (True, True, True):
        run = Generation(0, None)  # type: ignore[arg-type]
        run.began -= 100 if healthy else 0
        keeper._bury(run, -9)
    assert len(started) == 3
    assert not keeper._over.is_set()
    keeper._bury(Generation(0, None), -9)  # type: ignore[arg-type]
    assert keeper._over.is_set()


@one_loop
async def test_nothing_is_lost_when_there_is_no_process_to_be_had(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A fork that fails is a try like any other; what was stored waits for the next."""
    keeper = Keeper(["true"], fail_closed=kill_targets, patience=Patience(tries=3))
    keeper._loop, keeper.path = asyncio.get_running_loop(), str(tmp_path)

    def no_fork() -> int:
        raise BlockingIOError

    with OwnedFd(os.dup(0)) as fd:
        keeper._ever_ready, keeper._orphans = True, {"one": [fd]}
        with monkeypatch.context() as patch:
            patch.setattr(os, "fork", no_fork)
            keeper._start_again()
        assert keeper._orphans == {"one": [fd]}
        assert not fd.closed
        assert keeper._restart is not None
        keeper._restart.cancel()


@one_loop
async def test_what_cannot_be_settled_is_held() -> None:
    """An error in the last look at what is kept closes nothing."""

    async def broken(kept: object) -> set[str]:
        raise ValueError

    keeper = Keeper(["true"], fail_closed=broken)
    with OwnedFd(os.dup(0)) as fd:
        keeper._orphans = {"one": [fd]}
        closing = asyncio.create_task(keeper._close_down(1))
        for _ in range(10):  # it would be through after two
            await asyncio.sleep(0)
        assert not fd.closed
        assert not closing.done()
        closing.cancel()
        await asyncio.wait([closing])


@one_loop
async def test_both_runs_of_an_upgrade_end(tmp_path: Path) -> None:
    """The end of the new run, and then of the old one, is the end of the keeper."""
    async with keeping(tmp_path) as kept:
        old = await kept.next_run()
        await old.ask("ready")
        kept.process.send_signal(signal.SIGHUP)
        new = await kept.next_run()
        await new.ask("ready")
        while not (await old.ask("told"))["told"]:
            pass
        new.tell("exit", 0)
        await kept.until_it_says("the new run has ended")
        old.tell("exit", 0)
        assert (await kept.end())[0] == 0


@pytest.mark.parametrize("name", ["", "a:b", "a\n", "é", "x" * 256])
def test_names_that_nobody_may_have(name: str) -> None:
    """Names are systemd's: printable ASCII without a colon, up to 255 characters."""
    assert not _is_name(name)
    assert _is_name("aiouffd-1.2 x")
