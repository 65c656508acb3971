"""aiouffd.takeover and aiouffd.protection: a server that was killed is missed by nobody.

The servers are real and are killed with SIGKILL; see ``tests.chaos`` for the long run of this.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos import OPERATIONS, Chaos, Kept, Target, kept
from tests.targets import wait_until


@pytest.fixture
def target_of() -> Iterator[list[Target]]:
    """Targets that are killed at the end."""
    targets: list[Target] = []
    yield targets
    for target in targets:
        target.kill()


def _start(server: Kept, operations: str, seed: int, targets: list[Target]) -> Target:
    target = Target(server.socket, "anon", OPERATIONS[operations], seed, 0)
    targets.append(target)
    server.wait_for("started", len(targets))
    return target


def _kill(server: Kept) -> None:
    pid = server.server()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


def test_killed_again_and_again(seed: int) -> None:
    """Under load, at random moments: no byte is wrong and no thread waits on."""
    with kept(["--chunk", "16K", "--hydrate", "slow"]) as server:
        run = Chaos(server, seed, per_life=5)
        run.run(5)
        assert run.done.checked
        assert server.end() == 0


def test_the_listening_socket_lives_on(seed: int, target_of: list[Target]) -> None:
    """Who connects while no server runs waits in the queue, and is served."""
    with kept() as server:
        _start(server, "balloon", seed, target_of)
        _kill(server)
        late = Target(server.socket, "anon", OPERATIONS["balloon"], seed + 1, 0)
        target_of.append(late)
        server.wait_for("started", 2)
        server.wait_for("taken_over", 1)  # in whatever order
        for target in target_of:
            target.finish()


def test_another_image_is_not_served_on(seed: int, target_of: list[Target]) -> None:
    """If the image is another one now the memory is settled by policy: no wrong byte is made."""
    with kept(["--policy", "kill"]) as server:
        target = _start(server, "balloon", seed, target_of)
        folder = Path(server.socket).parent.parent
        new = folder / "new"
        new.write_bytes((folder / "image").read_bytes())
        pid = server.server()
        new.rename(folder / "image")
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        server.wait_for("refused", 1)
        assert target.popen.wait(10) == -signal.SIGKILL
        assert not target.get("errors")
        assert any("not the one that it was served from" in line for line in server.said)


@pytest.mark.parametrize("way", ["kill", "policy"])
def test_given_up(way: str, seed: int, target_of: list[Target]) -> None:
    """A keeper that gives up lets nobody read zeros: targets are killed, or pages poisoned."""
    with kept([], ["--tries", "1", "--give-up", way]) as server:
        target = _start(server, "balloon", seed, target_of)
        target.put("closing", 1)  # a SIGBUS is right from here on
        _kill(server)
        assert server.popen.wait(20) == 1
        if way == "kill":
            assert target.popen.wait(10) == -signal.SIGKILL
        else:
            target.finish()
            assert target.get("sigbus")
        assert not target.get("errors")


def test_without_a_keeper_zeros_are_read(seed: int, target_of: list[Target]) -> None:
    """The negative control: with the last descriptor the kernel makes zeros of what is missing."""
    with kept([], alone=True) as server:
        target = _start(server, "balloon", seed, target_of)
        server.popen.kill()
        wait_until(lambda: target.get("errors"), "a wrong byte, for nobody serves any more")
        assert "word 0 is 0" in target.message


def test_a_detached_or_ended_session_leaves_nothing(seed: int, target_of: list[Target]) -> None:
    """What has ended is out of the store: the next server takes over the living only."""
    with kept() as server:
        first = _start(server, "forks", seed, target_of)
        _start(server, "balloon", seed, target_of)
        first.finish()
        server.wait_for("ended", 1)
        _kill(server)
        server.wait_for("listening", 2)
        server.wait_for("taken_over", 1)
        target_of[1].finish()
        server.wait_for("ended", 2)
        assert server.end() == 0
        assert server.events["taken_over"] == 1


def test_a_new_version_takes_the_new_and_the_old_drains(seed: int, target_of: list[Target]) -> None:
    """SIGHUP: who is served stays with the old server, who comes goes to the new one."""
    with kept(["--replace"]) as server:
        old = server.server()
        first = _start(server, "balloon", seed, target_of)
        server.popen.send_signal(signal.SIGHUP)
        server.wait_for("listening", 2)
        server.wait_for("draining", 1)
        second = _start(server, "balloon", seed + 1, target_of)
        assert server.server() != old
        assert server.events["taken_over"] == 0
        first.finish()
        server.wait_for("stopped", 1)
        _kill(server)  # and the new one survives a crash as ever
        server.wait_for("taken_over", 1)
        second.finish()
        assert server.end() == 0


def test_sessions_of_two_servers_have_two_ids(seed: int, target_of: list[Target]) -> None:
    """Old and new count from one both; who takes over what both had tells them apart."""
    with kept(["--replace"]) as server:
        old = server.server()
        assert old is not None
        _start(server, "balloon", seed, target_of)
        server.popen.send_signal(signal.SIGHUP)
        server.wait_for("draining", 1)
        _start(server, "balloon", seed + 1, target_of)
        os.kill(old, signal.SIGKILL)
        server.wait_for("taken_over", 2)
        assert sorted(server.ids) == ["1", "2"]
        for target in target_of:
            target.finish()
        assert server.end() == 0


def test_the_server_drains_without_its_keeper(seed: int, target_of: list[Target]) -> None:
    """A keeper that is killed takes nothing with it: who is served is served to the end."""
    with kept() as server:
        target = _start(server, "balloon", seed, target_of)
        pid = server.server()
        assert pid is not None
        server.popen.kill()
        server.popen.wait()
        os.kill(pid, signal.SIGTERM)
        server.wait_for("draining", 1)
        checked = target.get("checked")
        wait_until(lambda: target.get("checked") > checked + (1 << 20), "it is served on")
        target.finish()
        server.wait_for("stopped", 1)


def test_a_recording_is_not_begun_anew(seed: int, target_of: list[Target], tmp_path: Path) -> None:
    """What was recorded before the crash stays: it is what the target needed first."""
    recorded = tmp_path / "set"
    with kept(["--record", str(recorded)]) as server:
        target = _start(server, "balloon", seed, target_of)
        begun = recorded.stat().st_ino
        _kill(server)
        server.wait_for("taken_over", 1)
        target.finish()
        server.wait_for("ended", 1)
        assert recorded.stat().st_ino == begun
