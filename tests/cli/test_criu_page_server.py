"""``aiouffd criu page-server`` as a process: giving, receiving, ending."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from aiouffd.cli.main import main
from aiouffd.errors import SourceError
from aiouffd.protocols.criu import page_wire as wire
from aiouffd.protocols.criu.checkpoint import Checkpoint
from aiouffd.protocols.criu.images import PagemapEntry
from aiouffd.protocols.criu.page_client import PageClient
from aiouffd.protocols.criu.page_wire import LONG, SHORT, pack_header
from aiouffd.protocols.criu.strip import strip
from aiouffd.protocols.criu.tls import client_context
from tests.protocols.criu.checkpoints import PAGE, Made, Memory, anonymous
from tests.protocols.criu.test_tls import files_of
from tests.serving import within

pytestmark = pytest.mark.once

ROOT = Path(__file__).resolve().parents[2]
START = 0x10000000
DATA = random.Random(4).randbytes(64 * PAGE)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    memory = Memory([anonymous(START, 64)], [PagemapEntry(START, 64, 6)], DATA)
    return Made({1000: memory}).write(tmp_path / "images")


class Command:
    """The command, running."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def line(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        text = await within(self.process.stdout.readline(), 30)
        assert text, (await self.end())[2]
        fields = json.loads(text)
        assert isinstance(fields, dict)
        return fields

    async def end(self, number: signal.Signals | None = None) -> tuple[int, str, str]:
        """Wait until it ends; give status, output and errors."""
        if number is not None:
            self.process.send_signal(number)
        out, err = await within(self.process.communicate(), 30)
        assert self.process.returncode is not None
        return self.process.returncode, out.decode(), err.decode()


@contextlib.asynccontextmanager
async def command(*options: str | Path, pass_fds: tuple[int, ...] = ()) -> AsyncIterator[Command]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "aiouffd", "criu", "page-server", *map(str, options)),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        pass_fds=pass_fds,
    )
    try:
        yield Command(process)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


@pytest.mark.child
async def test_it_gives_pages_until_it_is_drained(images: Path) -> None:
    """To any number of clients; SIGTERM waits for those that are being served."""
    async with command("--lazy-pages", "-D", images, "--address=127.0.0.1", "--json") as server:
        listening = await server.line()
        assert listening["event"] == "listening"
        assert (listening["address"], listening["processes"]) == ("127.0.0.1", 1)
        assert listening["lazy_bytes"] == len(DATA)
        for size in (SHORT, LONG, None):
            async with await PageClient.connect(
                "127.0.0.1", listening["port"], header_bytes=size
            ) as client:
                assert await within(client.read_pages(1000, START, 64)) == DATA
                await client.finish()
            left = await server.line()
            assert (left["event"], left["ended"]) == ("client", True)
            assert left["answered_bytes"] == len(DATA) + PAGE  # one for the guard
        async with await PageClient.connect(
            "127.0.0.1", listening["port"], header_bytes=SHORT
        ) as client:
            assert await within(client.read_pages(1000, START, 1)) == DATA[:PAGE]
            server.process.terminate()
            assert await within(client.read_pages(1000, START + PAGE, 1)) == DATA[PAGE : 2 * PAGE]
            await client.finish()
        status, out, err = await server.end()
        assert (status, err) == (0, "")
        assert [json.loads(line)["event"] for line in out.splitlines()] == ["client", "stopped"]


@pytest.mark.child
async def test_a_second_signal_ends_it_at_once(images: Path) -> None:
    """Whoever is being served."""
    async with command("--lazy-pages", "-D", images, "--json") as server:
        port = (await server.line())["port"]
        async with await PageClient.connect("127.0.0.1", port, header_bytes=SHORT) as client:
            await within(client.read_pages(1000, START, 1))
            server.process.terminate()
            while True:
                try:
                    late = await PageClient.connect("127.0.0.1", port, header_bytes=SHORT)
                except SourceError:
                    break
                await late.aclose()
            assert (await server.end(signal.SIGTERM))[0] == 0
            with pytest.raises(SourceError, match=r"clos|reset"):
                await within(client.read_pages(1000, START + PAGE, 1))


@pytest.mark.child
@pytest.mark.parametrize("good", [True, False])
async def test_once_is_once(images: Path, good: bool) -> None:
    """The status says how it went."""
    async with command("--lazy-pages", "-D", images, "--once", "--protocol=32", "--json") as server:
        port = (await server.line())["port"]
        async with await PageClient.connect(
            "127.0.0.1", port, header_bytes=LONG if good else SHORT
        ) as client:
            if good:
                assert await within(client.read_pages(1000, START, 1)) == DATA[:PAGE]
                await client.finish()
            else:
                reads = [client.read_pages(1000, START + at * PAGE, 1) for at in range(2)]
                with pytest.raises(SourceError, match="--protocol 32"):
                    await within(asyncio.gather(*reads))
        status, out, err = await server.end()
        assert status == (0 if good else 1), out
        assert good or "--protocol 24 or 32" in err


@pytest.mark.child
async def test_in_words(images: Path) -> None:
    """What people read."""
    async with command("--lazy-pages", "--images", images) as server:
        assert server.process.stdout is not None
        line = (await within(server.process.stdout.readline(), 30)).decode()
        assert line.startswith(f"giving 0.2 MiB of 1 process of {images} on 127.0.0.1:")
        assert line.endswith(", to whoever can connect\n")
        status, out, err = await server.end(signal.SIGTERM)
        assert (status, err) == (0, "")
        assert out == "stopped: 0 requests answered, 0.0 MiB, 0 clients dropped\n"


@pytest.mark.child
async def test_pages_that_lie_elsewhere(images: Path, tmp_path: Path) -> None:
    """The small images here, the pages there; a stripped copy alone is refused."""
    stripped = tmp_path / "stripped"
    async with await Checkpoint.open(images) as checkpoint:
        await strip(checkpoint, stripped)
    async with command("--lazy-pages", "-D", stripped) as server:
        status, out, err = await server.end()
        assert (status, out) == (1, "")
        assert err.startswith("aiouffd: pages-1.img: ")
        assert "is a stripped copy" in err
    both = ("--lazy-pages", "-D", stripped, "--images", images, "--json")
    async with command(*both) as server:
        listening = await server.line()
        async with await PageClient.connect("127.0.0.1", listening["port"]) as client:
            assert await within(client.read_pages(1000, START, 64)) == DATA
            await client.finish()
        assert (await server.end(signal.SIGTERM))[0] == 0


@pytest.mark.child
async def test_with_tls(images: Path, tmp_path: Path) -> None:
    """Both sides show certificates, for the address that is given."""
    authority = trustme.CA()
    files = files_of(authority, tmp_path, "server")
    options = ("--tls", "--address=127.0.0.1", f"--tls-cacert={files.cacert}")
    more = (f"--tls-cert={files.cert}", f"--tls-key={files.key}", "--json")
    async with command("--lazy-pages", "-D", images, *options, *more) as server:
        listening = await server.line()
        assert listening["tls"] is True
        mine = client_context(files_of(authority, tmp_path, "client"))
        async with await PageClient.connect(
            "127.0.0.1", listening["port"], header_bytes=LONG, ssl=mine
        ) as client:
            assert await within(client.read_pages(1000, START, 64)) == DATA
            await client.finish()
        other = client_context(files_of(authority, tmp_path, "other", "other.example.org"))
        async with await PageClient.connect(
            "127.0.0.1", listening["port"], header_bytes=LONG, ssl=other
        ) as client:
            with pytest.raises(SourceError):
                await within(client.read_pages(1000, START, 1))
        _, _, err = await server.end(signal.SIGTERM)
        assert "shows a certificate that is not for 127.0.0.1" in err


async def dump(port: int, *, whole: bool) -> None:
    """Send what a dumper sends."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    image = 1000 << 8 | 1
    writer.write(pack_header(LONG, wire.OPEN2, 0, 0, image))
    assert await within(reader.readexactly(1)) == b"\0"
    writer.write(pack_header(LONG, 6 << 16 | wire.ADD_F, 64, START, image) + DATA)
    if whole:
        writer.write(pack_header(LONG, wire.CLOSE))
        assert await within(reader.readexactly(4)) == bytes(4)
    else:
        await writer.drain()
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


@pytest.mark.child
async def test_it_receives_a_dump(tmp_path: Path) -> None:
    """And ends; who waits for it is told when it listens."""
    reading, writing = os.pipe()
    folder = tmp_path / "new"
    try:
        options = ("-D", folder, "--status-fd", str(writing), "--json")
        async with command(*options, pass_fds=(writing,)) as server:
            os.close(writing)
            listening = await server.line()
            assert await asyncio.to_thread(os.read, reading, 10) == b"\0"
            await dump(listening["port"], whole=True)
            received = await server.line()
            assert received["event"] == "received"
            assert (received["processes"], received["stored_bytes"]) == (1, len(DATA))
            assert (await server.end())[0] == 0
    finally:
        os.close(reading)
    assert (folder / "pages-65537.img").read_bytes() == DATA


@pytest.mark.child
async def test_a_dump_that_breaks_off_is_an_error(tmp_path: Path) -> None:
    """Named, and with nothing left behind."""
    async with command("-D", tmp_path, "--json") as server:
        await dump((await server.line())["port"], whole=False)
        status, _, err = await server.end()
    assert status == 1
    assert "aiouffd: 127.0.0.1:" in err
    assert "the dump broke off: the connection ended before the dump did" in err
    assert os.listdir(tmp_path) == []


@pytest.mark.child
async def test_a_dump_that_stalls_is_given_up(tmp_path: Path) -> None:
    """Nothing is left behind, not even the link to its parent."""
    (tmp_path / "first").mkdir()
    folder = tmp_path / "second"
    parent = ("--prev-images-dir", "../first")
    async with command("-D", folder, *parent, "--silence", "0.1", "--json") as server:
        port = (await server.line())["port"]
        assert os.listdir(folder) == ["parent"]
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        image = 1000 << 8 | 1
        writer.write(pack_header(LONG, wire.OPEN2, 0, 0, image))
        writer.write(pack_header(LONG, 6 << 16 | wire.ADD_F, 64, START, image) + DATA[:-1])
        status, _, err = await server.end()
        writer.transport.abort()
    assert status == 1
    assert "the dump broke off: sent nothing for 0.1 s, and was not through" in err
    assert os.listdir(folder) == []


@pytest.mark.child
async def test_a_signal_before_a_dump_has_come(tmp_path: Path) -> None:
    """It says that there was none."""
    async with command("-D", tmp_path) as server:
        assert server.process.stdout is not None
        await within(server.process.stdout.readline(), 30)
        status, out, err = await server.end(signal.SIGTERM)
    assert (status, out, err) == (1, "stopped: no dump was received\n", "")


@pytest.mark.parametrize(
    "options, why",
    [
        (["--lazy-pages", "--prev-images-dir", "x"], "is for receiving a dump"),
        (["--images", "x"], "--images is for giving pages: add --lazy-pages"),
        (["--lazy-pages", "--silence", "5"], "--silence is for receiving a dump"),
        (["--once"], "--once is for giving pages: add --lazy-pages"),
        (["--lazy-pages", "-D", "nothing"], "inventory.img"),
        (["--lazy-pages", "--images", "ftp://x/y"], "no image can be had from ftp://"),
        (["--tls-key", "x"], "need --tls"),
        (["--tls", "--tls-cacert", "nothing.pem"], "nothing.pem: No such file"),
        (["--prev-images-dir", "../nothing"], "There is no such folder of the parent"),
        (["--address", "203.0.113.1"], "203.0.113.1"),
    ],
)
def test_what_cannot_be_is_said(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    why: str,
) -> None:
    """One line, and status 1."""
    monkeypatch.chdir(tmp_path)
    assert main(["criu", "page-server", *options]) == 1
    err = capsys.readouterr().err
    assert why in err
    assert err.count("\n") == 1
