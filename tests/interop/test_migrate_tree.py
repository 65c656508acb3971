"""A tree of processes moved by one command on either side, with real CRIU in between."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.interop.criu_certificates import Certificates
from tests.interop.criu_running import descendants
from tests.interop.moving_trees import MovingStage, files_of, state_of
from tests.suites import CRIU, Foreign

pytestmark = [pytest.mark.child, pytest.mark.root, pytest.mark.once, pytest.mark.limit(60)]

#: What is no matter of CRIU's version is tried with one.
NEWEST = pytest.mark.parametrize("criu", [CRIU[-1]], indirect=True, ids=lambda criu: criu.name)


@pytest.fixture
def stage(criu: Foreign) -> Iterator[MovingStage]:
    """A folder with whatever runs on it, ended afterwards."""
    with MovingStage(criu) as stage:
        yield stage


def test_a_tree_moves(stage: MovingStage, seed: int) -> None:
    """All its processes count on where they were, nothing is counted twice, nothing is lost."""
    tree = stage.counting(seed=seed)
    there = stage.receive()
    sending = stage.send(tree, there)
    assert there.status() == 0, there.running.text()
    sending.wait()
    tree.wait(-signal.SIGKILL)
    assert not list(stage.here.iterdir())
    assert not list(there.folder.iterdir())
    stage.check(machines=2)
    there.end()


def test_a_tree_moves_over_a_network_and_tls(stage: MovingStage, seed: int) -> None:
    """Memory comes from the address that the other machine is reached from, encrypted."""
    certificates = Certificates.make(stage.folder / "tls")
    tls = certificates.options[1:]
    tree = stage.counting(seed=seed)
    there = stage.receive(*tls, "--client-name", "localhost", network=True)
    sending = stage.send(tree, there, *tls, "--server-name", "localhost", "--keep")
    assert there.status() == 0, there.running.text()
    sending.wait()
    tree.wait(-signal.SIGKILL)
    assert "pstree.img" in files_of(stage.here, [".img"])
    stage.check(machines=2)
    there.end()


@NEWEST
def test_a_tree_moves_into_a_pid_namespace(stage: MovingStage, seed: int) -> None:
    """Its pids are taken where it is received: CRIU is the first process of a namespace then."""
    tree = stage.counting(seed=seed)
    there = stage.receive("--pid-namespace", alone=False)
    sending = stage.send(tree, there)
    assert there.status() == 0, there.running.text()
    sending.wait()
    tree.wait(-signal.SIGKILL)
    first = stage.left_to_us("unshare")
    stage.check(machines=2)
    stage.until_gone(first)  # the tree ends, and so does its namespace


def test_a_restore_that_fails_leaves_the_tree_where_it_was(stage: MovingStage, seed: int) -> None:
    """Where its pids are taken it cannot be: the source hears so, and it counts on there."""
    tree = stage.counting(seed=seed)
    there = stage.receive(alone=False)
    sending = stage.send(tree, there)
    sending.wait(1)
    assert there.status() == 1
    for said in (sending.text(), there.running.text()):
        assert "criu restore ended with status 1" in said, said
        assert str(there.folder / "restore.log") in said
    assert "runs on here" in sending.text()
    assert not files_of(stage.here, [".img"])
    assert not files_of(there.folder, [".img"])
    stage.check(machines=1)
    tree.wait()


def test_cancelled_before_the_switch(stage: MovingStage, seed: int) -> None:
    """A signal while CRIU works: the tree goes on, and has noticed nothing."""
    tree = stage.counting(seed=seed)
    there = stage.receive()
    sending = stage.send(tree, there, criu=_slow(stage, "dump"))
    stage.until((stage.folder / "begun").exists, "criu dump was asked for")
    sending.popen.send_signal(signal.SIGINT)
    (stage.folder / "go").touch()
    sending.wait(1)
    assert "runs on here: it was cancelled" in sending.text()
    assert there.status() == 1
    assert (stage.here / "dump.log").exists()
    assert not files_of(stage.here, [".img"])
    stage.check(machines=1)
    assert not stage.was_continued()
    tree.wait()
    there.end()


@NEWEST
def test_a_dump_that_fails(stage: MovingStage) -> None:
    """The tree runs on, and the sentence says why, and where there is more."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        tree = stage.counting(server.getsockname()[1])
        there = stage.receive()
        sending = stage.send(tree, there)
        sending.wait(1)
        said = sending.text()
        assert "runs on here: criu dump ended with status 1: " in said
        assert "--tcp-established" in said, "CRIU's own reason"
        assert f"({stage.here}/dump.log)" in said
        assert there.status() == 1
        stage.check(machines=1)
        assert not stage.was_continued()
        tree.wait()
        there.end()


@NEWEST
def test_who_receives_is_killed(stage: MovingStage, seed: int) -> None:
    """Nobody reads zeros: the tree there is killed.  Here it stands still, and can go on."""
    tree = stage.counting(seed=seed)
    pids = [tree.pid, *descendants(tree.pid)]
    there = stage.receive(f"--criu-option=--action-script={_ask_before_it_runs(stage)}")
    sending = stage.send(tree, there, "--deadline", 1)
    stage.until((stage.folder / "begun").exists, "criu has restored it, but for its memory")
    sending.popen.send_signal(signal.SIGSTOP)  # nothing comes from now on
    (stage.folder / "go").touch()
    there.said("runs here: 4 processes")
    os.kill(there.receiver(), signal.SIGKILL)
    assert there.status() == 8
    assert "was killed, and so were the processes" in there.running.text()
    assert there.others() == []
    there.end()
    sending.popen.send_signal(signal.SIGCONT)
    sending.wait(7)
    assert f"`kill -CONT {' '.join(map(str, pids))}`" in sending.text()
    assert "pages-1.img" in files_of(stage.here, [".img"])
    for pid in pids:
        assert state_of(pid) == "T", sending.text()
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    stage.check(machines=1)
    tree.wait()


@NEWEST
def test_who_sends_is_killed_before_the_switch(stage: MovingStage, seed: int) -> None:
    """Nobody answers CRIU any more: it lets the tree go on, which has noticed nothing."""
    tree = stage.counting(seed=seed)
    there = stage.receive("--deadline", 1)
    sending = stage.send(tree, there, criu=_slow(stage, "dump"))
    stage.until((stage.folder / "begun").exists, "criu dump was asked for")
    sending.end(signal.SIGKILL)
    (stage.folder / "go").touch()
    assert there.status() == 1
    stage.check(machines=1)
    assert not stage.was_continued()
    tree.wait()
    there.end()
    stage.until_gone(stage.left_to_us("ld-linux-x86-64"))


@NEWEST
def test_who_sends_is_killed_after_the_switch(stage: MovingStage, seed: int) -> None:
    """The tree here stands still, though CRIU has let go of it; there it is killed, all of it."""
    tree = stage.counting(seed=seed)
    pids = [tree.pid, *descendants(tree.pid)]
    there = stage.receive(
        "--deadline", 1, f"--criu-option=--action-script={_ask_before_it_runs(stage)}"
    )
    sending = stage.send(tree, there)
    stage.until((stage.folder / "begun").exists, "criu has restored it, but for its memory")
    sending.end(signal.SIGKILL)
    stage.until(lambda: {state_of(pid) for pid in pids} == {"T"}, "it stands still")
    (stage.folder / "go").touch()
    assert there.status() == 8
    assert "were killed, as memory of theirs is missing" in there.running.text()
    assert there.others() == []
    there.end()
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    stage.check(machines=1)
    tree.wait()


@NEWEST
def test_what_has_all_of_its_memory_is_killed_with_the_rest(stage: MovingStage, seed: int) -> None:
    """Three processes live on by themselves already, when a second signal ends it."""
    tree = stage.counting(seed=seed, last=128)
    pids = [tree.pid, *descendants(tree.pid)]
    there = stage.receive("--log-level", "info")
    sending = stage.send(tree, there)
    for pid in pids[:-1]:
        there.said(f"session of task {pid}, pid {pid} (uid 0): detached")
    sending.popen.send_signal(signal.SIGSTOP)  # much of the last one's memory is missing
    os.kill(there.receiver(), signal.SIGTERM)
    there.said("A second signal kills them")
    assert sum("python" in each for each in there.others()) == len(pids) + 2, "we are two there"
    os.kill(there.receiver(), signal.SIGTERM)
    assert there.status() == 8
    assert there.others() == []
    there.end()
    sending.popen.send_signal(signal.SIGCONT)
    sending.wait(8)
    for pid in pids:
        assert state_of(pid) == "T", sending.text()
        os.kill(pid, signal.SIGKILL)
    tree.wait(-signal.SIGKILL)
    for pid in pids[1:]:
        stage.until_gone(pid)


@NEWEST
def test_all_connections_break(stage: MovingStage, seed: int) -> None:
    """While memory is missing; both sides go on over others."""
    tree = stage.counting(seed=seed)
    script = _ask_before_it_runs(stage)
    there = stage.receive(f"--criu-option=--action-script={script}", "--plain", network=True)
    sending = stage.send(tree, there, "--plain")
    stage.until((stage.folder / "begun").exists, "criu has restored it, but for its memory")
    sending.popen.send_signal(signal.SIGSTOP)
    (stage.folder / "go").touch()
    there.said("runs here: 4 processes")
    broken = stage.start("cut", "ss", "--kill", "--numeric", "dst", there.address)
    broken.wait()
    assert broken.text().count(there.address) == 3, broken.text()
    sending.popen.send_signal(signal.SIGCONT)
    assert there.status() == 0, there.running.text()
    assert "memory comes by another connection" in there.running.text()
    sending.wait()
    tree.wait(-signal.SIGKILL)
    stage.check(machines=2)
    there.end()


def _slow(stage: MovingStage, verb: str) -> Path:
    """Make a CRIU that waits before it does one thing."""
    return _script(
        stage,
        f'[ "$1" = {verb} ] && touch {stage.folder}/begun && {_wait(stage)}\n'
        f'exec {stage.criu.command} "$@"',
    )


def _ask_before_it_runs(stage: MovingStage) -> Path:
    """Make an action script that waits when all is restored, and no memory is brought ahead yet."""
    return _script(
        stage,
        f'[ "$CRTOOLS_SCRIPT_ACTION" = post-restore ] || exit 0\ntouch {stage.folder}/begun\n'
        f"{_wait(stage)}",
    )


def _wait(stage: MovingStage) -> str:
    return f"until [ -e {stage.folder}/go ]; do sleep 0.01; done"


def _script(stage: MovingStage, text: str) -> Path:
    path = stage.folder / "script"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path
