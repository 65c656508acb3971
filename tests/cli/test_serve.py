"""``aiouffd serve`` as a process: its options, its lines, its signals."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import resource
import signal
import stat
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import pytest

from aiouffd.cli import main
from aiouffd.testing.sources import image
from aiouffd.unix_socket import Connection
from aiouffd.working_set import WorkingSet
from tests.attached import Attached
from tests.http_server import ImageServer
from tests.seekable import seekable
from tests.stand_in_vmm import PAGE, ROOT, StandInVmm

pytestmark = pytest.mark.once

SIZE: Final = 32 * PAGE


class Serve:
    """A running ``aiouffd serve --json``."""

    def __init__(self, process: asyncio.subprocess.Process, path: Path) -> None:
        self.process = process
        self.path = path

    async def line(self) -> str:
        """Read its next line."""
        assert self.process.stdout is not None
        async with asyncio.timeout(30):
            return (await self.process.stdout.readline()).decode().rstrip("\n")

    async def event(self, name: str) -> dict[str, Any]:
        """Read its next line, which has to be this event; other milestones are passed over."""
        fields = json.loads(await self.line())
        while fields["event"] in {"first_page", "resident"} - {name}:
            fields = json.loads(await self.line())
        assert fields["event"] == name, fields
        assert isinstance(fields, dict)
        return fields

    async def end(self) -> int:
        """Wait for its exit status."""
        async with asyncio.timeout(30):
            return await self.process.wait()


@contextlib.asynccontextmanager
async def serve(
    tmp_path: Path,
    *options: str,
    plain: bool = False,
    size: int | None = None,
    url: str | None = None,
) -> AsyncIterator[Serve]:
    """Run the command over an image of 32 pages until it listens."""
    file = tmp_path / "image"
    if not file.exists():
        file.write_bytes(image(SIZE))
    path = tmp_path / "socket"
    command = ["serve", url or os.fspath(file), "--socket", os.fspath(path), *options]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "aiouffd",
        *command,
        *([] if plain else ["--json"]),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    server = Serve(process, path)
    try:
        if not plain:
            listening = await server.event("listening")
            assert listening["socket"] == os.fspath(path)
            assert listening["size"] == (file.stat().st_size if size is None else size)
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


async def test_a_session_is_two_lines(tmp_path: Path) -> None:
    """One JSON object at its start, at its first page, and at its end, then with its figures."""
    async with serve(tmp_path) as server:
        async with StandInVmm.start(server.path, SIZE) as guest:
            started = await server.event("started")
            assert await guest.read(0, SIZE) == image(SIZE)
            assert (await server.event("first_page"))["seconds"] > 0
            pid = guest.process.pid
        ended = await server.event("ended")
        server.process.terminate()
        assert (await server.event("draining"))["sessions"] == 0
        stopped = await server.event("stopped")
        assert await server.end() == 0
    assert started["pid"] == ended["pid"] == pid
    assert started["memory_bytes"] == SIZE
    assert started["dialect"] == "firecracker 1.12"
    assert ended["outcome"] == "target exited"
    assert ended["error"] is None
    assert ended["faults"] == SIZE // PAGE
    assert ended["copied_bytes"] == SIZE
    assert {"p50_us", "p99_us", "zero_pages", "removed_pages", "failures"} <= ended.keys()
    assert (stopped["served"], stopped["failed"], stopped["refused"]) == (1, 0, 0)
    assert not server.path.exists()


async def test_people_get_lines_of_text(tmp_path: Path) -> None:
    """The same, to be read by eye."""
    async with serve(tmp_path, plain=True) as server:
        assert (await server.line()).startswith(f"serving {tmp_path}/image (131072 bytes) on ")
        async with StandInVmm.start(server.path, SIZE) as guest:
            assert f"session of pid {guest.process.pid}" in await server.line()
            await guest.read(0)
            assert "first page served after" in await server.line()
        assert "1 faults" in await server.line()
        server.process.send_signal(signal.SIGINT)
        assert await server.line() == "draining: no new peers, 0 sessions live on"
        assert (await server.line()).startswith("stopped: 1 sessions served")
        assert await server.end() == 0


async def test_a_first_signal_drains_and_leaves_a_newer_server_alone(tmp_path: Path) -> None:
    """Scenario 32: the living are served to their end while a newer server has the path."""
    async with serve(tmp_path) as server, StandInVmm.start(server.path, SIZE) as guest:
        await server.event("started")
        server.process.terminate()
        await server.event("draining")
        async with serve(tmp_path) as newer, StandInVmm.start(newer.path, SIZE) as other:
            await newer.event("started")
            assert await guest.read(0, SIZE) == image(SIZE)
            assert await other.read(0, SIZE) == image(SIZE)
            guest.kill()
            await server.event("ended")
            await server.event("stopped")
            assert await server.end() == 0
            assert newer.path.is_socket()


@pytest.mark.parametrize("policy", ["poison", "kill", "zero"])
async def test_a_second_signal_aborts_by_policy(tmp_path: Path, policy: str) -> None:
    """What is missing becomes what --policy says; the exit status says that it was cut short."""
    async with (
        serve(tmp_path, "--policy", policy) as server,
        StandInVmm.start(server.path, SIZE) as guest,
    ):
        await server.event("started")
        assert await guest.read(0, PAGE) == image(SIZE)[:PAGE]
        server.process.terminate()
        await server.event("draining")
        server.process.terminate()
        assert (await server.event("aborting"))["sessions"] == 1
        assert policy in (await server.event("ended"))["outcome"]
        await server.event("stopped")
        assert await server.end() == 3
        if policy == "kill":
            assert await guest.status() == -signal.SIGKILL
        elif policy == "zero":
            assert await guest.read(0, SIZE) == image(SIZE)[:PAGE] + bytes(SIZE - PAGE)
        else:
            guest.tell("read", 5 * PAGE)
            assert await guest.status() == -signal.SIGBUS


async def test_a_changed_image_ends_in_the_policy(tmp_path: Path) -> None:
    """Scenario 30: the failure is in the line of the session and in the count at the end."""
    async with (
        serve(tmp_path, "--policy", "kill") as server,
        StandInVmm.start(server.path, SIZE) as guest,
    ):
        await server.event("started")
        os.truncate(tmp_path / "image", PAGE)
        guest.tell("read", 5 * PAGE)
        assert await guest.status() == -signal.SIGKILL
        ended = await server.event("ended")
        assert "changed while it was served" in ended["error"]
        assert ended["failures"] == 1
        server.process.terminate()
        await server.event("draining")
        assert (await server.event("stopped"))["failed"] == 1


async def test_the_options_reach_the_server(tmp_path: Path) -> None:
    """Rights, users, chunk and time limits are what was asked for."""
    options = ("--uid", "12345", "--mode", "666", "--handshake-timeout", "1", "--chunk", "64K")
    async with serve(tmp_path, *options) as server:
        assert stat.S_IMODE(server.path.lstat().st_mode) == 0o666
        async with StandInVmm.start(server.path, SIZE, wait=False):
            refused = await server.event("refused")
    assert refused["reason"] == f"uid {os.geteuid()} may not connect; allowed: 12345"
    uid = ("--uid", str(os.geteuid()), "--uid", "12345")
    async with serve(tmp_path, *uid, *options[2:], "--replace") as server:
        reader, writer = await asyncio.open_unix_connection(server.path)
        assert "within 1 s" in (await server.event("refused"))["reason"]
        writer.close()
        await writer.wait_closed()
        async with StandInVmm.start(server.path, SIZE) as guest:
            await server.event("started")
            await guest.read(0, SIZE)
        assert (await server.event("ended"))["faults"] == 2
    del reader


async def test_the_limit_of_descriptors_is_raised(tmp_path: Path) -> None:
    """The usual 1,024 would be some two hundred sessions."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with serve(tmp_path) as server:
        assert resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE) == (hard, hard)


async def test_a_reader_that_goes_away_stops_nothing(tmp_path: Path) -> None:
    """Without anybody to read its lines the server serves on."""
    async with serve(tmp_path) as server:
        assert server.process.stdout is not None
        transport = server.process.stdout._transport  # type: ignore[attr-defined]
        transport.close()
        for _ in range(2):
            async with StandInVmm.start(server.path, SIZE) as guest:
                assert await guest.read(0, SIZE) == image(SIZE)
        server.process.terminate()
        assert await server.end() == 0


async def test_a_reader_that_does_not_read_holds_up_nobody(tmp_path: Path) -> None:
    """Lines pile up and a guest is served all the same."""
    async with serve(tmp_path) as server:
        assert server.process.stdout is not None
        transport = server.process.stdout._transport  # type: ignore[attr-defined]
        transport.pause_reading()
        for _ in range(1000):  # each is a line of some hundred bytes; a pipe holds 64 KiB
            (await Connection.open(server.path)).close()
        async with StandInVmm.start(server.path, SIZE) as guest:
            assert await guest.read(0, SIZE) == image(SIZE)
        server.process.terminate()
        transport.resume_reading()
        events = [json.loads(line) async for line in server.process.stdout]
        assert await server.end() == 0
    assert sum(event["event"] == "refused" for event in events) == 1000
    assert events[-1]["event"] == "stopped"


@pytest.mark.parametrize(
    "wrong",
    [
        ["--deadline", "0"],
        ["--deadline", "nan"],
        ["--chunk", "3K"],
        ["--chunk", "many"],
        ["--policy", "pray"],
        ["--mode", "rw"],
        ["--cache", "much"],
    ],
    ids=" ".join,
)
def test_nonsense_is_refused_with_a_usage(
    wrong: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """What cannot be meant ends before anything listens."""
    with pytest.raises(SystemExit) as ended:
        main(["serve", "image", "--socket", "socket", *wrong])
    assert ended.value.code == 2
    assert wrong[0] in capsys.readouterr().err


def test_a_missing_image_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is named, and the exit status says that nothing was served."""
    assert main(["serve", f"{tmp_path}/none", "--socket", f"{tmp_path}/socket"]) == 1
    assert "none" in capsys.readouterr().err
    assert not (tmp_path / "socket").exists()


async def test_peers_beyond_the_limit_are_refused(tmp_path: Path) -> None:
    """One line says why; who is served goes on."""
    options = ("--max-sessions", "1", "--policy", "zero")
    async with serve(tmp_path, *options) as server, StandInVmm.start(server.path, SIZE) as guest:
        await server.event("started")
        async with StandInVmm.start(server.path, SIZE) as other:
            refused = await server.event("refused")
            assert refused["reason"] == "there are 1 sessions already, as many as allowed"
            assert await other.read(0) == b"\0"
        assert await guest.read(0, SIZE) == image(SIZE)


def test_a_limit_is_a_number_of_sessions(capsys: pytest.CaptureFixture[str]) -> None:
    """Zero would serve nobody."""
    with pytest.raises(SystemExit):
        main(["serve", "image", "--socket", "socket", "--max-sessions", "0"])
    assert "0 is no number from 1 on" in capsys.readouterr().err


# --- images of several parts -----------------------------------------------------------


async def test_layers_are_served_to_all_sessions(tmp_path: Path) -> None:
    """A base, two sparse diffs and a cache: every session reads the newest bytes."""
    expected = bytearray(image(SIZE))
    diffs = []
    for seed, pages in ((1, (3, 4)), (2, (4, 20))):
        diff = tmp_path / f"diff {seed}"
        with open(diff, "wb") as file:
            file.truncate(SIZE)
            for page in pages:
                data = image(PAGE, seed=100 * seed + page)
                os.pwrite(file.fileno(), data, page * PAGE)
                expected[page * PAGE : (page + 1) * PAGE] = data
        diffs += ["--layer", os.fspath(diff)]
    async with serve(tmp_path, *diffs, "--cache", "64K") as server:
        fds = Path(f"/proc/{server.process.pid}/fd")
        async with StandInVmm.start(server.path, SIZE) as one:
            await server.event("started")
            assert await one.read(0, SIZE) == expected
            async with StandInVmm.start(server.path, SIZE) as other:
                await server.event("started")
                assert await other.read(0, SIZE) == expected
                links = [os.readlink(fd) for fd in fds.iterdir()]
                assert links.count(os.fspath(tmp_path / "diff 1")) == 1  # opened once for both
        for _ in range(2):
            assert (await server.event("ended"))["error"] is None
        server.process.terminate()
        await server.event("draining")
        await server.event("stopped")
        assert await server.end() == 0


async def test_a_fallback_takes_over(tmp_path: Path) -> None:
    """The image is written to while it is served; its copy answers instead, in every session."""
    (tmp_path / "copy").write_bytes(image(SIZE))
    options = ("--fallback", (tmp_path / "copy").as_uri(), "--policy", "kill")
    async with serve(tmp_path, *options) as server:
        async with StandInVmm.start(server.path, SIZE) as guest:
            await server.event("started")
            assert await guest.read(0, PAGE) == image(SIZE)[:PAGE]
            os.truncate(tmp_path / "image", PAGE)
            assert await guest.read(0, SIZE) == image(SIZE)
        assert (await server.event("ended"))["failures"] == 0


async def test_a_compressed_image_is_served(tmp_path: Path) -> None:
    """It is told by its end, and its content is what counts."""
    (tmp_path / "image").write_bytes(seekable(image(SIZE)))
    async with serve(tmp_path, size=SIZE) as server:
        async with StandInVmm.start(server.path, SIZE) as guest:
            await server.event("started")
            assert await guest.read(0, SIZE) == image(SIZE)
        assert (await server.event("ended"))["error"] is None


async def test_an_image_on_a_web_server_falls_over_to_a_file(tmp_path: Path) -> None:
    """Its bytes come by HTTP until the web server is gone; the guest notices nothing."""
    (tmp_path / "copy").write_bytes(image(SIZE))
    async with ImageServer(image(SIZE)) as web:
        options = ("--fallback", os.fspath(tmp_path / "copy"), "--cache", "16K")
        async with serve(tmp_path, *options, url=web.url, size=SIZE) as server:
            async with StandInVmm.start(server.path, SIZE) as guest:
                await server.event("started")
                assert await guest.read(0, 4 * PAGE) == image(SIZE)[: 4 * PAGE]
                asked = len(web.requests)
                web.always(web.status(404))
                assert await guest.read(0, SIZE) == image(SIZE)
            assert (await server.event("ended"))["failures"] == 0
        assert len(web.requests) > asked > 0


async def test_clones_share_one_copy(tmp_path: Path) -> None:
    """With --share peers map the image; the line at the end says what that saves."""
    async with serve(tmp_path, "--share", "--chunk", "64K") as server:
        async with (
            Attached.start(server.path, SIZE) as one,
            Attached.start(server.path, SIZE) as two,
        ):
            for _ in range(2):
                assert (await server.event("started"))["dialect"] == "shared memory"
            assert await one.ask("write 0 7") == "written"
            expected = b"\x07" + image(SIZE)[1:]
            assert await one.ask("digest") == hashlib.sha256(expected).hexdigest()
            assert await two.ask("digest") == hashlib.sha256(image(SIZE)).hexdigest()
            server.process.terminate()
            sharing = await server.event("sharing")
            assert (sharing["clones"], sharing["private_bytes"]) == (2, PAGE)
            assert sharing["image_bytes"] == SIZE
            assert sharing["saved_bytes"] == SIZE - PAGE
            assert (await server.event("draining"))["sessions"] == 2
        for _ in range(2):
            assert (await server.event("ended"))["error"] is None
        assert (await server.event("stopped"))["failed"] == 0
        assert await server.end() == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["ftp://host/image"], "no image can be had from ftp://"),
        (["image", "--layer", "nowhere.diff"], "nowhere.diff"),
        (["image", "--cache", "100"], "cannot keep a page"),
    ],
)
def test_an_image_that_cannot_be_opened_is_one_line(
    wrong: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whatever it is made of; nothing listens then."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "image").write_bytes(image(SIZE))
    assert main(["serve", *wrong, "--socket", "socket"]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "socket").exists()


async def test_a_session_is_recorded_and_the_next_server_replays_it(tmp_path: Path) -> None:
    """What the first target touched, the second has before it asks."""
    recorded = tmp_path / "set-1"
    options = ("--record", str(tmp_path / "set-{id}"), "--record-window", "60s")
    async with serve(tmp_path, *options) as server:
        async with StandInVmm.start(server.path, SIZE) as guest:
            for page in (3, 9):
                await guest.read(page * PAGE)
        server.process.terminate()
        assert await server.end() == 0
    assert list(WorkingSet.load(recorded).runs()) == [(3, 1), (9, 1)]
    async with serve(tmp_path, "--replay", str(recorded), "--hydrate", "slow") as server:
        async with StandInVmm.start(server.path, SIZE) as guest:
            await server.event("started")
            assert (await server.event("resident"))["seconds"] >= 0
            assert await guest.read(0, SIZE) == image(SIZE)
        ended = await server.event("ended")
        assert ended["faults"] == 0
        assert ended["filled_bytes"] == SIZE


def test_there_must_be_a_folder_to_record_into(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said at the start; a warning for each session would be seen when nothing was recorded."""
    (tmp_path / "image").write_bytes(b"x")
    folder = tmp_path / "nowhere"
    options = ("--socket", str(tmp_path / "socket"), "--record", str(folder / "{id}.set"))
    assert main(["serve", str(tmp_path / "image"), *options]) == 1
    assert f"{folder}: no folder to put the recording into" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [("--record-window", "0"), ("--record-window", "x"), ("--hydrate", "fast")],
)
async def test_options_of_recording_are_checked(tmp_path: Path, options: tuple[str, str]) -> None:
    """Before anything is served."""
    with pytest.raises(SystemExit):
        main(["serve", "image", "--socket", str(tmp_path / "socket"), *options])


async def test_a_set_that_is_none_is_refused_at_the_start(tmp_path: Path) -> None:
    """One line, and status 1."""
    (tmp_path / "set").write_bytes(b"no set")
    async with serve(tmp_path, "--replay", str(tmp_path / "set"), plain=True) as server:
        assert await server.end() == 1
