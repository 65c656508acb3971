"""Images by name: what each URL opens, and that nothing is left when something cannot be."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from aiouffd.errors import SourceError
from aiouffd.sources import Source, urls
from aiouffd.sources.cached import CachedSource
from aiouffd.sources.compressed import CompressedSource
from aiouffd.sources.fallback import FallbackSource
from aiouffd.sources.file import FileSource
from aiouffd.sources.layered import LayeredSource
from aiouffd.sources.measured import Reads
from aiouffd.sources.urls import SCHEMES, open_image, open_source, path_of, shown
from aiouffd.testing.sources import PAGE, as_bytes, image
from tests.seekable import seekable, zstd
from tests.sources.slow import SlowSource

DATA = image(8 * PAGE)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Give a file of eight pages with a name that needs care."""
    file = tmp_path / "an image:50%#1?.img"
    file.write_bytes(DATA)
    return file


async def read_all(source: Source) -> bytes:
    """Read everything and close."""
    try:
        return as_bytes(await source.read(0, source.size))
    finally:
        await source.aclose()


async def test_a_file_is_named_by_path_or_url(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain path is taken as it is; a URL is unquoted."""
    assert await read_all(await open_source(os.fspath(path))) == DATA
    assert await read_all(await open_source(path.as_uri())) == DATA
    assert await read_all(await open_source("file:" + path.as_uri()[len("file://") :])) == DATA
    assert await read_all(await open_source(path.as_uri().replace("//", "//localhost"))) == DATA
    monkeypatch.chdir(path.parent)
    path.rename("disk:1.img")
    assert await read_all(await open_source("disk:1.img")) == DATA


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://host/image", r"no image can be had from ftp://; .* http://.* s3://"),
        ("s3:bucket/key", r"write s3://\.\.\. \(or \./s3:\.\.\."),
        ("file://host/image", "lies on this machine"),
        ("file:///image?version=2", "%3F"),
        ("file:", "names no file"),
        ("file:///%00", "names no file"),
        ("file://[::1/image", "IPv6"),
        ("redis://[::1/0/key", "IPv6"),
        ("aiouffd://a..b:1/image", "label (empty|too long)"),
        ("aiouffd://127.0.0.1:1/" + "x" * 1025, "at most 1024 bytes"),
        ("s3://[::1/key", "IPv6"),
        ("s3://bucket/key?versionId=3", "nothing may follow the key"),
        ("", "names no image"),
        ("a\0b", "names no image"),
    ],
)
async def test_what_makes_no_sense_is_refused(url: str, message: str) -> None:
    """The error says what is possible."""
    with pytest.raises(SourceError, match=message):
        await open_source(url)
    with pytest.raises(SourceError, match=message):
        await open_image(url)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_other_schemes_are_no_paths(scheme: str) -> None:
    """They are left to their modules, in capitals too."""
    assert path_of(f"{scheme}://host/image") is None
    assert path_of(f"{scheme.upper()}://host/image") is None


@pytest.mark.parametrize("module", sorted(set(SCHEMES.values())))
def test_each_scheme_has_its_module(module: str) -> None:
    """It opens URLs."""
    opener = importlib.import_module(f"aiouffd.sources.{module}").open_url
    assert inspect.iscoroutinefunction(opener)


@pytest.mark.parametrize(
    ("url", "safe"),
    [
        ("redis://user:secret@host/0", "redis://user:***@host/0"),
        ("redis://:secret@host/0", "redis://:***@host/0"),
        ("https://secret@host/image", "https://***@host/image"),
        ("https://host/image?signature=secret", "https://host/image?***"),
        ("s3://bucket/a:b@c", "s3://bucket/a:b@c"),
        ("/a/path?with:odd@signs", "/a/path?with:odd@signs"),
    ],
)
def test_secrets_are_not_shown(url: str, safe: str) -> None:
    """A password or a signed query is left out of what is printed."""
    assert shown(url) == safe


async def test_a_compressed_image_is_told_by_its_end(tmp_path: Path) -> None:
    """Whatever its name: what is served is its content."""
    file = tmp_path / "image"
    file.write_bytes(seekable(DATA))
    source = await open_image(os.fspath(file))
    assert isinstance(source, CompressedSource)
    assert await read_all(source) == DATA
    file.write_bytes(file.read_bytes()[100:])  # its end is right, but not the rest
    with pytest.raises(SourceError):
        await read_all(await open_source(os.fspath(file)))


async def test_a_zstd_file_without_a_table_is_no_image(tmp_path: Path) -> None:
    """What zstd itself makes, or half a download: its bytes are nobody's memory."""
    file = tmp_path / "image.zst"
    whole = seekable(DATA)
    for content in (whole[:-1], whole[:20], zstd.compress(DATA)):
        file.write_bytes(content)
        with pytest.raises(SourceError, match="without a seek table"):
            await open_source(os.fspath(file))
    for content in (b"", b"\x28\xb5\x2f"):  # too short to tell: bytes like others
        file.write_bytes(content)
        await (await open_source(os.fspath(file))).aclose()


class Opened:
    """Stands in for a scheme's module: opens sources and remembers them."""

    def __init__(self) -> None:
        self.sources: list[SlowSource] = []

    async def open_url(self, url: str) -> SlowSource:
        await asyncio.sleep(0)
        if url.endswith("broken"):
            raise SourceError(f"{url} is broken")
        if url.endswith("slow"):
            await asyncio.sleep(3600)
        data = DATA[PAGE:] if url.endswith("short") else DATA
        self.sources.append(SlowSource(data, wait=False))
        return self.sources[-1]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Opened:
    """Open http:// by Opened."""
    stand_in = Opened()
    real = importlib.import_module

    def choose(name: str, package: str | None = None) -> Any:
        return stand_in if name == ".http" else real(name, package)

    monkeypatch.setattr(urls, "import_module", choose)
    return stand_in


async def test_everything_together(opened: Opened, path: Path, tmp_path: Path) -> None:
    """Cache over layers over a fallback over the image; closing it closes all."""
    diff = tmp_path / "diff"
    expected = bytearray(DATA)
    with open(diff, "wb") as file:
        file.truncate(len(DATA))
        os.pwrite(file.fileno(), b"\xff" * PAGE, 2 * PAGE)
        expected[2 * PAGE : 3 * PAGE] = b"\xff" * PAGE
    source = await open_image(
        "http://host/image",
        layers=[os.fspath(diff)],
        fallback=os.fspath(path),
        cache_bytes=3 * PAGE,
    )
    assert isinstance(source, CachedSource)
    assert isinstance(source._source, LayeredSource)
    assert isinstance(source._source.layers[0], FallbackSource)
    assert as_bytes(await source.read(0, len(DATA))) == expected
    assert source.figures().held_bytes <= 3 * PAGE
    await source.aclose()
    assert [one.closed for one in opened.sources] == [1]


async def test_each_part_has_its_account(opened: Opened, path: Path, tmp_path: Path) -> None:
    """Bytes by source: what the cache keeps is read once, from the part that has it."""
    diff = tmp_path / "diff"
    with open(diff, "wb") as file:
        file.truncate(len(DATA))
        os.pwrite(file.fileno(), b"\xff" * PAGE, 2 * PAGE)
    accounts: list[Reads] = []
    source = await open_image(
        "http://host/image",
        layers=[os.fspath(diff)],
        fallback=os.fspath(path),
        cache_bytes=1 << 20,
        accounts=accounts,
    )
    for _ in range(2):
        await source.read(0, len(DATA))
    await source.aclose()
    assert {one.name: one.bytes for one in accounts} == {
        "image": len(DATA),
        "fallback": 0,
        "layer 1": PAGE,
    }
    assert [one.closed for one in opened.sources] == [1]


async def test_a_lonely_image_has_no_account_of_its_own(path: Path) -> None:
    """What sessions read is what is read from it: whoever serves it counts that."""
    accounts: list[Reads] = []
    source = await open_image(os.fspath(path), accounts=accounts)
    assert type(source) is FileSource
    assert not accounts
    await source.aclose()


async def test_a_plain_file_stays_one(path: Path) -> None:
    """Nothing stands around it that was not asked for."""
    source = await open_image(os.fspath(path))
    assert type(source) is FileSource
    assert await read_all(source) == DATA


@pytest.mark.parametrize("wrong", ["http://host/broken", "/nowhere/at/all"])
async def test_one_that_cannot_be_opened_leaves_no_other(
    opened: Opened, path: Path, wrong: str
) -> None:
    """The third of five layers is missing: everything before it is closed."""
    layers = ["http://host/1", os.fspath(path), wrong, "http://host/4", "http://host/5"]
    with pytest.raises((SourceError, OSError)):
        await open_image("http://host/0", layers=layers, fallback="http://host/f")
    assert [one.closed for one in opened.sources] == [1, 1, 1]  # files: the leak check looks


async def test_a_cancelled_opening_leaves_nothing(opened: Opened, path: Path) -> None:
    """While one is being opened, those before it are closed."""
    layers = [os.fspath(path), "http://host/1", "http://host/slow"]
    opening = asyncio.ensure_future(open_image("http://host/0", layers=layers))
    while len(opened.sources) < 2:
        await asyncio.sleep(0.001)
    await asyncio.sleep(0)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert [one.closed for one in opened.sources] == [1, 1]


async def test_a_file_that_is_opened_for_nobody_is_closed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread cannot be cancelled; what it brings is closed (the leak check looks)."""
    begun, go_on = threading.Event(), threading.Event()

    def open_late(path: str) -> FileSource:
        begun.set()
        assert go_on.wait(10)
        return FileSource(path)

    monkeypatch.setattr(urls, "FileSource", open_late)
    opening = asyncio.ensure_future(open_source(os.fspath(path)))
    while not begun.is_set():
        await asyncio.sleep(0.001)
    opening.cancel()
    await asyncio.sleep(0)
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await opening


async def test_a_fallback_must_be_the_same_image(opened: Opened) -> None:
    """Sizes differ: nobody knows which is right; both are closed."""
    with pytest.raises(SourceError, match="not the same"):
        await open_image("http://host/image", fallback="http://host/short")
    assert [one.closed for one in opened.sources] == [1, 1]


async def test_without_the_image_the_fallback_stands_alone(
    opened: Opened, caplog: pytest.LogCaptureFixture
) -> None:
    """A store that is down at the start is no reason not to start."""
    source = await open_image("http://host/broken", fallback="http://host/image")
    assert await read_all(source) == DATA
    assert "http://host/broken is broken; the fallback stands alone" in caplog.text
    with pytest.raises(SourceError, match="broken"):
        await open_image("http://host/broken")
    with pytest.raises(SourceError, match="broken"):
        await open_image("http://host/broken", fallback="http://host/broken")


async def test_a_cache_without_room_is_refused(path: Path) -> None:
    """Before anything is opened."""
    with pytest.raises(ValueError, match="cannot keep a page"):
        await open_image("/nowhere", cache_bytes=100)
