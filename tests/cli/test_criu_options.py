"""Options under CRIU's names: what they do to a server that is run as they ask."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

from aiouffd.cli import criu_options
from aiouffd.errors import UffdError
from tests.targets import wait_until

pytestmark = pytest.mark.once

ROOT = Path(__file__).resolve().parents[2]

#: A server that is ready at once, and ends with status 7 when its standard input, or the file it
#: is told, says so; or fails at once.
SERVER = """
import argparse, asyncio, os, sys
from aiouffd.cli import criu_options
from aiouffd.errors import UffdError

parser = argparse.ArgumentParser()
criu_options.add_folder_options(parser)
criu_options.add_process_options(parser)
parser.add_argument("--fail")
args = parser.parse_args()

async def serve(out, ready):
    out.put("begun")
    if args.fail == "early":
        raise UffdError("there is no such thing")
    ready()
    if args.fail == "late":
        raise UffdError("it broke")
    while not os.path.exists(os.path.join(args.images_dir, "end")):
        await asyncio.sleep(0.01)
    out.put("over")
    return 7

try:
    sys.exit(criu_options.run_server(args, serve))
except (UffdError, OSError) as error:
    sys.exit(f"failed: {error}")
"""


def run(*options: str | Path, pass_fds: tuple[int, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SERVER, *map(str, options)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        pass_fds=pass_fds,
    )


@pytest.mark.child
def test_in_the_foreground(tmp_path: Path) -> None:
    """Its status is ours, lines are on stdout, and those who wait for it are told."""
    (tmp_path / "end").touch()
    reading, writing = os.pipe()
    try:
        options = ("-D", tmp_path, "--status-fd", str(writing), "--pidfile", "pid")
        done = run(*options, pass_fds=(writing,))
        os.close(writing)
        assert os.read(reading, 10) == b"\0"
        assert os.read(reading, 10) == b""
    finally:
        os.close(reading)
    assert done.returncode == 7, done.stderr
    assert done.stdout == "begun\nover\n"
    assert sorted(os.listdir(tmp_path)) == ["end"]  # no pid file is left behind


@pytest.mark.child
def test_in_the_background(tmp_path: Path) -> None:
    """The command ends when the server is ready, and not before; nothing holds its terminal."""
    work = tmp_path / "work"
    work.mkdir()
    done = run("-D", tmp_path, "-W", work, "-d", "--pidfile", "pid", "-o", "log", "-v4")
    assert done.returncode == 0, done.stderr
    assert done.stdout == done.stderr == ""
    pid = int((work / "pid").read_text())
    try:
        assert os.getsid(pid) == pid
        links = [os.readlink(f"/proc/{pid}/fd/{number}") for number in (0, 1, 2)]
        assert links == [os.devnull] * 3
    finally:
        (tmp_path / "end").touch()
    wait_until(lambda: not os.path.exists(f"/proc/{pid}"), "it has ended")
    assert os.listdir(work) == ["log"]
    assert (work / "log").read_text().startswith("begun\nover\n")


@pytest.mark.child
def test_a_server_that_fails_in_the_background_fails_the_command(tmp_path: Path) -> None:
    """With its own words; nobody is told that it is ready."""
    done = run("-D", tmp_path, "-d", "--pidfile", "pid", "-o", "log", "--fail", "early")
    assert done.returncode == 1
    assert "failed: there is no such thing" in done.stderr
    assert os.listdir(tmp_path) == ["log"]
    assert "there is no such thing" in (tmp_path / "log").read_text()


@pytest.mark.child
def test_one_that_fails_later_says_so_in_its_log(tmp_path: Path) -> None:
    """Its stderr has gone."""
    done = run("-D", tmp_path, "-d", "-o", "log", "--fail", "late")
    assert done.returncode == 0
    wait_until(lambda: "it broke" in (tmp_path / "log").read_text(), "the log says so")


@pytest.mark.child
def test_who_asked_and_has_gone_is_no_obstacle(tmp_path: Path) -> None:
    """A keeper starts a server again with the pipe and the pid file of the one that was killed."""
    (tmp_path / "end").touch()
    killed = subprocess.Popen(["true"])
    killed.wait()
    (tmp_path / "pid").write_text(str(killed.pid))
    reading, writing = os.pipe()
    os.close(reading)
    try:
        options = ("-D", tmp_path, "--status-fd", str(writing), "--pidfile", "pid")
        done = run(*options, pass_fds=(writing,))
    finally:
        os.close(writing)
    assert done.returncode == 7, done.stderr
    assert os.listdir(tmp_path) == ["end"]


@pytest.mark.child
def test_stdout_may_be_what_is_told(tmp_path: Path) -> None:
    """It ends there, and no connection or file gets its number, for lines to be written into."""
    command = [sys.executable, "-c", SERVER, "-D", str(tmp_path), "--status-fd", "1"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        try:
            told = server.stdout.read()  # up to its end, while the server runs
            assert b"\0" in told  # before or behind a line, which a thread writes
            assert os.readlink(f"/proc/{server.pid}/fd/1") == os.devnull
        finally:
            (tmp_path / "end").touch()
        assert server.wait(30) == 7


@pytest.mark.child
@pytest.mark.parametrize("text", ["", "x", "9" * 30, "\xff"])
def test_a_pid_file_that_holds_no_pid_stays(tmp_path: Path, text: str) -> None:
    """It is not ours to remove."""
    (tmp_path / "pid").write_text(text, encoding="latin-1")
    done = run("-D", tmp_path, "--pidfile", "pid")
    assert done.returncode == 1
    assert "is there already: another server runs" in done.stderr


@pytest.mark.child
def test_a_descriptor_that_a_keeper_gave_back_is_not_written_to(tmp_path: Path) -> None:
    """Under the number of --status-fd there is something else by then."""
    (tmp_path / "end").touch()
    script = 'export LISTEN_FDS=1 LISTEN_PID=$$; exec "$@" 3>"$0"'
    command = ("sh", "-c", script, tmp_path / "3", sys.executable, "-c", SERVER)
    done = subprocess.run(
        [*command, "-D", tmp_path, "--status-fd", "3"],
        cwd=ROOT,
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 7, done.stderr
    assert (tmp_path / "3").read_bytes() == b""


@pytest.mark.child
@pytest.mark.parametrize("given_back", [0, 1])
def test_a_log_is_gone_on_with_after_a_crash(tmp_path: Path, given_back: int) -> None:
    """What the one has said that died is what one looks for; a new one's log is its own."""
    (tmp_path / "log").write_text("it died\n")
    script = f'export LISTEN_FDS={given_back} LISTEN_PID=$$; exec "$@" 3</dev/null'
    command = ("sh", "-c", script, "-", sys.executable, "-c", SERVER)
    done = subprocess.run(
        [*command, "-D", tmp_path, "-o", "log", "--fail", "late"],
        cwd=ROOT,
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    lines = (tmp_path / "log").read_text().splitlines()
    assert ("it died" in lines) == bool(given_back)
    assert "it broke" in lines[-1]


@pytest.mark.child
def test_what_cannot_be_told_is_said_first(tmp_path: Path) -> None:
    """Before anything is served."""
    (tmp_path / "pid").write_text("1")
    done = run("-D", tmp_path, "--pidfile", "pid")
    assert done.returncode == 1
    assert "is there already: another server runs" in done.stderr
    assert (tmp_path / "pid").read_text() == "1"
    done = run("-D", tmp_path, "--status-fd", "77")
    assert "--status-fd 77" in done.stderr
    assert "is not open" in done.stderr


@pytest.mark.parametrize(
    "options, level",
    [
        ("", "warning"),
        ("-v", "info"),
        ("-vv", "debug"),
        ("-v -v", "debug"),
        ("-v4", "debug"),
        ("-v0", "error"),
        ("-v1", "error"),
        ("-vvvv", "debug"),
        ("--verbosity=3", "info"),
        ("--verbosity", "info"),
    ],
)
def test_verbosity_is_as_crius(options: str, level: str) -> None:
    """Each v is one more; a number is the level itself."""
    parser = argparse.ArgumentParser()
    criu_options.add_process_options(parser)
    assert criu_options.log_level(parser.parse_args(options.split())) == level


def test_where() -> None:
    """Nothing is chosen for those who do not say it."""
    parser = argparse.ArgumentParser()
    criu_options.add_address_options(parser, address="", port="")
    args = parser.parse_args([])
    assert (args.address, args.port) == (None, 0)
    args = parser.parse_args(["--address", "::1", "--port", "65535"])
    assert (args.address, args.port) == ("::1", 65535)


@pytest.mark.parametrize(
    "options", ["-vx", "-v999", "--status-fd=-1", "--status-fd=x", "--port=x", "--port=65536"]
)
def test_nonsense_is_refused(options: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With status 2."""
    parser = argparse.ArgumentParser()
    criu_options.add_process_options(parser)
    criu_options.add_address_options(parser, address="", port="")
    with pytest.raises(SystemExit) as caught:
        parser.parse_args([options])
    assert caught.value.code == 2


def test_tls_files_need_tls() -> None:
    """And without either there is no TLS."""
    parser = argparse.ArgumentParser()
    criu_options.add_tls_options(parser)
    assert criu_options.tls_client_context(parser.parse_args([])) is None
    assert criu_options.tls_server_context(parser.parse_args([])) is None
    with pytest.raises(UffdError, match="need --tls"):
        criu_options.tls_client_context(parser.parse_args(["--tls-key", "x"]))
