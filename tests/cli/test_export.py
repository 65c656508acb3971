"""``aiouffd export`` as a process: its lines, its signals, its certificates."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from aiouffd.cli import main
from aiouffd.cli.export import image_name
from aiouffd.errors import SourceError
from aiouffd.sources.peer import open_url
from aiouffd.testing.sources import PAGE, as_bytes, image
from tests.serving import within
from tests.stand_in_vmm import ROOT, StandInVmm

SIZE = 32 * PAGE


@contextlib.asynccontextmanager
async def export(
    tmp_path: Path, *options: str
) -> AsyncIterator[tuple[asyncio.subprocess.Process, dict[str, Any]]]:
    """Run the command; give the process, and its first line."""
    file = tmp_path / "memory.img"
    file.write_bytes(image(SIZE))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "aiouffd", "export", str(file), "--json", *options),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        yield process, json.loads(await within(process.stdout.readline(), 30))
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


async def test_what_it_says_is_a_url_to_read_from(tmp_path: Path) -> None:
    """From its line to the bytes; SIGTERM ends it well, with a peer connected."""
    async with export(tmp_path) as (process, line):
        assert line["event"] == "exporting"
        assert line["size"] == SIZE
        source = await within(open_url(line["url"]))
        assert as_bytes(await source.read(0, SIZE)) == image(SIZE)
        process.send_signal(signal.SIGTERM)
        out, _ = await within(process.communicate(), 30)
        assert json.loads(out)["answered"] >= 1
        assert process.returncode == 0
        await source.aclose()


async def test_with_certificates_only_friends_read(tmp_path: Path) -> None:
    """Both sides show theirs."""
    authority = trustme.CA()
    names = {}
    for name, who in (("server", "127.0.0.1"), ("client", "client@example.org")):
        issued = authority.issue_cert(who)
        names[name] = tmp_path / f"{name}.pem"
        issued.private_key_and_cert_chain_pem.write_to_path(str(names[name]))
    names["ca"] = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(names["ca"]))
    options = (f"--export-cert={names['server']}", f"--export-client-ca={names['ca']}")
    async with export(tmp_path, "--listen=127.0.0.1:0", *options) as (_, line):
        assert line["url"].startswith("aiouffds://127.0.0.1:")
        url = f"{line['url']}?ca={names['ca']}"
        with pytest.raises(SourceError, match=r"certificate required|gave no hello"):
            await within(open_url(url))
        source = await within(open_url(f"{url}&cert={names['client']}"))
        assert as_bytes(await source.read(PAGE, PAGE)) == image(SIZE)[PAGE : 2 * PAGE]
        await source.aclose()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--export-key", "k"], "of no use without --export-cert"),
        (["--export-cert", "/does/not/exist"], "No such file"),
    ],
)
def test_options_that_make_no_sense(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], why: str
) -> None:
    """One line, and status 1."""
    (tmp_path / "image").write_bytes(b"x")
    assert main(["export", str(tmp_path / "image"), *options]) == 1
    assert why in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, why",
    [
        (["--export-cert", "image"], "image: no certificate and its key in PEM"),
        (["--export-cert", "nothing", "--export-key", "key"], "nothing: No such file"),
        (["--export-cert", "image", "--export-client-ca", "none.pem"], "none.pem: No such file"),
    ],
)
def test_a_bad_certificate_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    why: str,
) -> None:
    """OpenSSL says neither which file it is nor, in words, what is wrong with it."""
    monkeypatch.chdir(tmp_path)
    Path("image").write_bytes(b"x")
    assert main(["export", "image", *options]) == 1
    assert f"aiouffd: {why}" in capsys.readouterr().err


def test_an_image_is_named_by_its_last_part() -> None:
    """A path's or a URL's."""
    assert image_name("/images/memory.img") == "memory.img"
    assert image_name("s3://bucket/vm/memory.zst?region=x") == "memory.zst"
    assert image_name("aiouffd://host:1/") == "host:1"


async def test_serve_exports_what_it_serves(tmp_path: Path) -> None:
    """The other server reads from the first one, and a guest of the other gets its bytes."""
    file = tmp_path / "memory.img"
    file.write_bytes(image(SIZE))

    async def start(source: str, *options: str) -> asyncio.subprocess.Process:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "aiouffd", "serve", source, "--json"),
            *("--socket", str(folder / "socket"), *options),
            cwd=ROOT,
            stdout=asyncio.subprocess.PIPE,
        )

    async def line(process: asyncio.subprocess.Process) -> dict[str, Any]:
        assert process.stdout is not None
        fields = json.loads(await within(process.stdout.readline(), 30))
        assert isinstance(fields, dict)
        return fields

    async with contextlib.AsyncExitStack() as stack:

        async def end(process: asyncio.subprocess.Process) -> None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            await within(process.communicate(), 30)
            assert process.returncode == 0

        first = await start(str(file), "--export", "127.0.0.1:0", "--cache", "1M")
        stack.push_async_callback(end, first)
        exported = await line(first)
        assert exported["event"] == "exporting"
        assert (await line(first))["event"] == "listening"
        second = await start(exported["url"], "--cache", "1M")
        stack.push_async_callback(end, second)
        listening = await line(second)
        assert listening["size"] == SIZE
        async with StandInVmm.start(Path(listening["socket"]), SIZE) as guest:
            assert await guest.read(0, SIZE) == image(SIZE)
