"""A running server seen and steered from outside: sessions, top, drain, metrics, exit statuses."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from aiouffd.cli import arguments, main
from aiouffd.cli.sessions import duration, size
from aiouffd.testing.sources import image
from tests.attached import Attached
from tests.cli.running_serve import SIZE, command, running
from tests.control_asking import ask
from tests.stand_in_vmm import PAGE, ROOT, StandInVmm, eventually

pytestmark = [pytest.mark.child, pytest.mark.once]


async def test_sessions_and_drain(tmp_path: Path) -> None:
    """The table, the same as JSON, and a drain that ends when the last target does."""
    async with running(tmp_path, "--control") as server:
        control = server.listening["control"]
        assert control == f"{server.socket}.control"
        here = ("--control", control)
        assert (await command("sessions", *here))[1].split()[:3] == ["ID", "STATE", "PID"]
        async with StandInVmm.start(server.socket, SIZE) as guest:
            await server.event("started")
            await guest.read(0, 4 * PAGE)
            status, out, _ = await command("sessions", AIOUFFD_CONTROL=control)
            assert status == 0
            row = out.splitlines()[1].split()
            assert row[:4] == ["1", "serving", str(guest.process.pid), str(os.geteuid())]
            assert row[4:7] == ["128", "KiB", "16.0"]
            _, out, _ = await command("sessions", *here, "--json")
            assert json.loads(out)["sessions"][0]["figures"]["copied_bytes"] == 4 * PAGE
            assert await command("drain", *here) == (0, "draining: 1 sessions live on\n", "")
            assert (await server.event("draining"))["sessions"] == 1
            open_before = server.descriptors()
            waiting = asyncio.ensure_future(command("drain", *here, "--wait"))
            await eventually(lambda: server.descriptors() > open_before, "it has connected")
            assert await guest.read(0, SIZE) == image(SIZE)
        assert await waiting == (0, "drained\n", "")
        await server.event("stopped")
        assert await server.end() == 0
        assert not Path(control).exists()


async def test_complete_lets_a_target_live_on(tmp_path: Path) -> None:
    """Begun at once, or waited for; afterwards the server may go, and every byte is right."""
    async with running(tmp_path, "--control") as server:
        here = ("--control", server.listening["control"])
        async with (
            StandInVmm.start(server.socket, SIZE) as first,
            StandInVmm.start(server.socket, SIZE) as second,
        ):
            await first.read(0)
            for _ in range(2):
                await server.event("started")
            status, out, err = await command("complete", "1", *here, "--wait")
            assert (status, out) == (0, "session 1: detached\n"), err
            status, out, err = await command("complete", "2", *here)
            assert status == 0, err
            assert out.startswith("session 2")
            for _ in range(2):
                assert (await server.event("ended"))["outcome"] == "detached"
            server.process.terminate()
            assert await server.end() == 0
            for guest in (first, second):
                assert await guest.read(0, SIZE) == image(SIZE)


async def test_a_snapshot_is_a_layer_for_the_next_server(tmp_path: Path) -> None:
    """What a target has changed and given back is what the next one begins with."""
    layer = tmp_path / "layer"
    expected = bytearray(image(SIZE))
    expected[PAGE : PAGE + 2] = b"\xaa\xbb"
    expected[2 * PAGE : 3 * PAGE] = bytes(PAGE)
    async with running(tmp_path, "--control") as server:
        here = ("--control", server.listening["control"])
        async with StandInVmm.start(server.socket, SIZE) as guest:
            await server.event("started")
            await guest.ask("write", PAGE, "aabb")
            await guest.ask("remove", 2 * PAGE, PAGE)
            status, out, err = await command("snapshot", "1", str(layer), *here)
            assert status == 0, err
            assert out.startswith(f"{layer}: 4.0 KiB of 4.0 KiB that the target had, 4.0 KiB of")
            nowhere = str(tmp_path / "no" / "folder")
            status, _, err = await command("snapshot", "1", nowhere, *here)
            assert (status, nowhere in err) == (6, True), err
            assert await guest.read(0, SIZE) == expected
    (tmp_path / "next").mkdir()
    (tmp_path / "next" / "image").write_bytes(image(SIZE))
    async with (
        running(tmp_path / "next", "--layer", str(layer)) as server,
        StandInVmm.start(server.socket, SIZE) as guest,
    ):
        assert await guest.read(0, SIZE) == expected


async def test_drain_again_and_again_never_aborts(tmp_path: Path) -> None:
    """Only a signal is taken for impatience."""
    async with running(tmp_path, "--control") as server:
        here = ("--control", server.listening["control"])
        async with StandInVmm.start(server.socket, SIZE) as guest:
            await server.event("started")
            for _ in range(3):
                assert (await command("drain", *here))[0] == 0
            assert await guest.read(0, SIZE) == image(SIZE)
        assert (await server.event("stopped"))["failed"] == 0
        assert await server.end() == 0


async def test_a_newer_server_takes_over_what_a_draining_one_held(tmp_path: Path) -> None:
    """Both sockets go to the next; from one that serves nothing is taken."""
    async with running(tmp_path, "--control") as server:
        here = ("--control", server.listening["control"])
        path = str(tmp_path / "other")
        image_path = str(tmp_path / "image")
        status, _, err = await command("serve", image_path, "--socket", path, *here)
        assert status == 1
        assert "a server listens there" in err
        async with StandInVmm.start(server.socket, SIZE) as guest:
            await server.event("started")
            server.process.terminate()
            await server.event("draining")
            async with running(tmp_path, "--control") as newer:
                assert newer.listening["control"] == here[1]
                _, out, _ = await command("sessions", *here, "--json")
                assert json.loads(out) == {"sessions": []}
                assert await guest.read(0, SIZE) == image(SIZE)
                guest.kill()
                await server.event("stopped")
                assert await server.end() == 0
                assert (await command("drain", *here, "--wait"))[0] == 0
                assert await newer.end() == 0


async def test_top_draws_one_picture(tmp_path: Path) -> None:
    """The sums, the table, and a map with a character for each cell."""
    async with running(tmp_path, "--control") as server:
        here = ("--control", server.listening["control"])
        _, out, err = await command("top", "--once", *here, COLUMNS="100", NO_COLOR="1")
        assert "nobody is served" in out, err
        async with StandInVmm.start(server.socket, SIZE) as guest:
            await server.event("started")
            await guest.read(0, 4 * PAGE)
            await guest.ask("remove", PAGE, PAGE)
            status, out, err = await command("top", "--once", *here, COLUMNS="100", NO_COLOR="1")
            assert (status, err) == (0, "")
            assert f"on{server.socket}for" in "".join(out.split())  # lines end where they may
            assert f" {guest.process.pid} " in out
            assert "4 faults, 0 in flight" in out
            assert "█×██" + 28 * "·" in out.splitlines()


async def test_what_clones_share_is_told(tmp_path: Path) -> None:
    """In the sums and in the picture, while they live; nothing of it without --share."""
    async with running(tmp_path, "--control", "--share", "--chunk", "64K") as server:
        here = ("--control", server.listening["control"])
        _, stats = await ask(Path(server.listening["control"]), "GET", "/v1/stats")
        assert (stats["sharing"]["clones"], stats["sharing"]["saved_bytes"]) == (0, -SIZE)
        async with (
            Attached.start(server.socket, SIZE) as one,
            Attached.start(server.socket, SIZE) as two,
        ):
            assert await one.ask("write 0 7") == "written"
            for clone in (one, two):
                await clone.ask("digest")
            _, stats = await ask(Path(server.listening["control"]), "GET", "/v1/stats")
            assert stats["sharing"] == {
                "clones": 2,
                "image_bytes": SIZE,
                "hole_bytes": 0,
                "mapped_bytes": 2 * SIZE - PAGE,
                "private_bytes": PAGE,
                "saved_bytes": SIZE - PAGE,
            }
            _, out, err = await command("top", "--once", *here, COLUMNS="100", NO_COLOR="1")
            text = "2 clones map 252 KiB of one copy of 128 KiB, which saves 124 KiB;"
            assert f"{text} 4.0 KiB are their own" in " ".join(out.split()), err


def _read_until(terminal: int, what: str) -> str:
    seen = b""
    while what.encode() not in seen:
        seen += os.read(terminal, 65536)
    return seen.decode(errors="replace")


async def test_top_lives_in_a_terminal(tmp_path: Path) -> None:
    """It draws anew, takes an arrow, and q ends it with the terminal as it was."""
    async with (
        running(tmp_path, "--control") as server,
        StandInVmm.start(server.socket, SIZE),
        StandInVmm.start(server.socket, SIZE),
    ):
        await server.event("started")
        await server.event("started")
        ours, theirs = pty.openpty()
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "aiouffd", "top", "--interval", "60"),
            *("--control", server.listening["control"]),
            cwd=ROOT,
            env=os.environ | {"TERM": "xterm", "COLUMNS": "100", "LINES": "40"},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
        )
        try:
            os.close(theirs)
            async with asyncio.timeout(30):
                await asyncio.to_thread(_read_until, ours, "session 1, region 0")
                os.write(ours, b"\x1b[B")
                await asyncio.to_thread(_read_until, ours, "session 2, region 0")
                os.write(ours, b"q")
                await asyncio.to_thread(_read_until, ours, "\x1b[?1049l")
                assert await process.wait() == 0
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
            os.close(ours)


async def test_metrics_are_on_tcp_if_asked_for(tmp_path: Path) -> None:
    """Prometheus' own parser reads them, and the process's descriptors are among them."""
    async with running(tmp_path, "--metrics", "127.0.0.1:0") as server:
        address = server.listening["metrics"]
        async with StandInVmm.start(server.socket, SIZE) as guest:
            await server.event("started")
            await guest.read(0, SIZE)
            text = await asyncio.to_thread(_get, address)
        values = {
            (sample.name, *sorted(sample.labels.values())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
        assert values["aiouffd_faults_total",] == SIZE // PAGE
        states = ("serving", "resident")  # whether all of it is there is found out a little later
        assert sum(values["aiouffd_sessions", state] for state in states) == 1
        assert values["aiouffd_installed_bytes_total", "demand"] == SIZE
        assert values["process_open_fds",] > 3
        assert sum(v for k, v in values.items() if k[0] == "aiouffd_source_bytes_total") == SIZE


def _get(address: str) -> str:
    with urllib.request.urlopen(address, timeout=30) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        return str(answer.read().decode())


# --- what goes wrong -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sessions", "drain", "top", "complete", "snapshot"])
def test_no_server_there(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Status 4, and the path in the message."""
    path = str(tmp_path / "nothing")
    needs = {"complete": ["1"], "snapshot": ["1", "out"]}
    arguments = [name, *needs.get(name, []), "--control", path]
    assert main([*arguments, *(["--once"] if name == "top" else [])]) == 4
    assert capsys.readouterr().err.startswith(f"aiouffd: {path}: no server answers there")


def test_which_server(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Status 2 if neither the option nor the variable says."""
    monkeypatch.delenv(arguments.CONTROL_VARIABLE, raising=False)
    assert main(["sessions"]) == 2
    assert "AIOUFFD_CONTROL" in capsys.readouterr().err


@pytest.mark.parametrize("reply", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"])
async def test_something_else_listens(tmp_path: Path, reply: bytes) -> None:
    """Status 4 if what answers is no aiouffd server."""
    path = tmp_path / "other"

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(reply)
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_unix_server(answer, path):
        status, _, err = await command("sessions", "--control", str(path))
    assert status == 4, err
    assert err.startswith(f"aiouffd: {path}: no ")


async def test_no_such_session(tmp_path: Path) -> None:
    """Status 5, and where to look."""
    async with running(tmp_path, "--control") as server:
        status, _, err = await command("complete", "7", "--control", server.listening["control"])
        assert status == 5
        assert "no session 7 lives here" in err


@pytest.mark.root
def test_who_may_not(tmp_path: Path) -> None:
    """Status 6 for another user: the socket's rights say no before anything is asked."""
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents[:2]:
        parent.chmod(0o755)
    path = tmp_path / "control"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen()
        path.chmod(0o600)
        program = (
            "import os, sys; from aiouffd.cli import main\n"
            "main(['sessions', '--control', 'nowhere'])\n"  # imports all, as long as it may
            f"os.setuid(65534); sys.exit(main(['sessions', '--control', {str(path)!r}]))"
        )
        told = subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            check=False,
            timeout=60,
            capture_output=True,
            text=True,
        )
    assert told.returncode == 6, told.stderr
    assert "may not use the control socket" in told.stderr


@pytest.mark.parametrize(
    ("module", "extra", "arguments"),
    [
        ("rich", "tui", ["top", "--once", "--control", "nowhere"]),
        ("aiohttp", "web", ["serve", "IMAGE", "--socket", "SOCKET", "--control"]),
        ("prometheus_client", "metrics", ["serve", "IMAGE", "--socket", "SOCKET"]),
    ],
)
async def test_a_missing_package_names_its_extra(
    tmp_path: Path, module: str, extra: str, arguments: list[str]
) -> None:
    """One line, status 1."""
    (tmp_path / "image").write_bytes(image(SIZE))
    places = {"IMAGE": str(tmp_path / "image"), "SOCKET": str(tmp_path / "socket")}
    arguments = [places.get(word, word) for word in arguments]
    if module == "prometheus_client":
        arguments += ["--metrics", "127.0.0.1:0"]
    program = (
        f"import sys; sys.modules[{module!r}] = None\n"
        f"from aiouffd.cli import main; sys.exit(main({arguments!r}))"
    )
    told = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", program],
        cwd=ROOT,
        check=False,
        timeout=60,
        capture_output=True,
        text=True,
    )
    assert told.returncode == 1
    assert told.stderr.count("\n") == 1, told.stderr
    assert f"pip install 'aiouffd[{extra}]'" in told.stderr


async def test_a_second_signal_cuts_short(tmp_path: Path) -> None:
    """Status 3, after a drain that was asked for over the control socket."""
    async with (
        running(tmp_path, "--control", "--policy", "zero") as server,
        StandInVmm.start(server.socket, SIZE),
    ):
        await server.event("started")
        assert (await command("drain", "--control", server.listening["control"]))[0] == 0
        await server.event("draining")
        server.process.send_signal(signal.SIGTERM)
        await server.event("stopped")
        assert await server.end() == 3


async def test_diagnostics_are_structured(tmp_path: Path) -> None:
    """With --json a failed fault says which session, whose, and what kind of error."""
    async with running(tmp_path, "--policy", "zero", "--log-level", "info") as server:
        async with StandInVmm.start(server.socket, SIZE) as guest:
            await server.event("started")
            os.truncate(tmp_path / "image", PAGE)
            assert await guest.read(5 * PAGE, 1) == b"\0"
            pid = guest.process.pid
        await server.event("ended")
        server.process.terminate()
        assert await server.end() == 0
        records = [json.loads(line) for line in (await server.diagnostics()).splitlines()]
    failed = next(record for record in records if record["level"] == "error")
    assert "was changed while it was served" in failed["message"]
    assert failed["logger"] == "aiouffd"
    assert (failed["session"], failed["pid"], failed["uid"]) == ("1", pid, os.geteuid())
    assert failed["error"] == "SourceError"


def test_numbers_are_for_people() -> None:
    """Sizes and times keep three figures or so."""
    sizes = [0, 1023, 1024, 150 * 1024, 3 << 30, 5 << 40]
    assert [size(count) for count in sizes] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "150 KiB",
        "3.0 GiB",
        "5.0 TiB",
    ]
    times = [0, 16e-6, 0.0125, 3.25, 90, 7200]
    assert [duration(seconds) for seconds in times] == [
        "0 us",
        "16 us",
        "12.5 ms",
        "3.2 s",
        "1.5 min",
        "2.0 h",
    ]
