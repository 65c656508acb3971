"""ObjectStoreSource over a directory, over an S3 in this process, and over a bad web server."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import obstore
import pytest
from obstore.store import HTTPStore, LocalStore, MemoryStore

from aiouffd.errors import ClosedError, SourceError
from aiouffd.sources import Source, identity_of
from aiouffd.sources.object_store import ObjectStoreSource, open_url
from aiouffd.testing.sources import PAGE, SourceContract, as_bytes, image
from tests.delaying_proxy import DelayingProxy
from tests.http_server import ImageServer
from tests.s3_server import KEY, SECRET, S3Server

DATA = image(16 * PAGE)


@pytest.fixture(scope="session", autouse=True)
def _obstore_threads() -> None:
    """obstore's threads keep descriptors for the process's life: let them begin before a test."""
    store = MemoryStore()
    obstore.put(store, "x", b"x")
    assert obstore.get_range(store, "x", start=0, length=1) == b"x"


@pytest.fixture(autouse=True)
def _no_cloud(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs the tests may have a cloud of their own in the environment."""
    for name in os.environ:
        if name.startswith(("AWS_", "GOOGLE_", "AZURE_")):
            monkeypatch.delenv(name)


@contextlib.asynccontextmanager
async def opened(url: str, **settings: Any) -> AsyncIterator[ObjectStoreSource]:
    """Open an object and close it again."""
    source = await ObjectStoreSource.open(url, **settings)
    try:
        yield source
    finally:
        await source.aclose()


@contextlib.asynccontextmanager
async def serving(**settings: Any) -> AsyncIterator[tuple[S3Server, ObjectStoreSource]]:
    """Keep DATA in an S3 and open it."""
    async with S3Server() as server:
        server.objects["images/vm.img"] = DATA
        options = {"endpoint": server.endpoint, "aws_access_key_id": KEY, "region": "us-east-1"}
        options["aws_secret_access_key"] = SECRET
        async with opened("s3://images/vm.img", options=options, **settings) as source:
            yield server, source


async def check(source: Source, page: int = 3) -> None:
    """Read a page, which is to be right."""
    assert as_bytes(await source.read(page * PAGE, PAGE)) == DATA[page * PAGE :][:PAGE]


class TestObjectStoreSourceOverDirectory(SourceContract):
    """A directory stands in for a store."""

    @contextlib.asynccontextmanager
    async def source_of(self, data: bytes) -> AsyncIterator[Source]:
        """Write the bytes to a file."""
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "an image").write_bytes(data)
            async with opened(f"file://{folder}/an%20image") as source:
                yield source


class TestObjectStoreSourceOverS3(SourceContract):
    """An S3 that checks signatures, found by the environment."""

    @contextlib.asynccontextmanager
    async def source_of(self, data: bytes) -> AsyncIterator[Source]:
        """Put the bytes by a client of S3."""
        async with S3Server() as server:
            with pytest.MonkeyPatch.context() as patch:
                for name, value in server.environment.items():
                    patch.setenv(name, value)
                server.objects["images/folder/vm.img"] = data
                source = await open_url("s3://images/folder/vm.img")
            try:
                yield source
            finally:
                await source.aclose()


# --- another generation ----------------------------------------------------------------


def _other_bytes(data: bytes) -> bytes:
    return image(len(data), seed=1)


def _longer(data: bytes) -> bytes:
    return data + b"more"


def _shorter(data: bytes) -> bytes:
    return data[: 4 * PAGE]


@pytest.mark.parametrize("change", [_other_bytes, _longer, _shorter])
async def test_a_replaced_object_is_an_error_for_ever(change: Callable[[bytes], bytes]) -> None:
    """Even after the old object is back."""
    async with serving() as (server, source):
        await check(source)
        server.objects["images/vm.img"] = change(DATA)
        with pytest.raises(SourceError, match="changed while it was served"):
            await check(source)
        server.objects["images/vm.img"] = DATA
        with pytest.raises(SourceError, match="changed while it was served"):
            await check(source)
        with pytest.raises(SourceError, match="changed while it was served"):
            source.read_nowait(0, PAGE)


@pytest.mark.parametrize("change", [_other_bytes, _longer, _shorter])
async def test_a_replaced_file_is_an_error_for_ever(
    tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    """In a directory too, where a new file takes the name."""
    path = tmp_path / "vm.img"
    path.write_bytes(DATA)
    async with opened(path.as_uri()) as source:
        await check(source)
        (tmp_path / "new").write_bytes(change(DATA))
        (tmp_path / "new").rename(path)
        for _ in range(2):
            with pytest.raises(SourceError, match="changed while it was served"):
                await check(source)


@pytest.mark.parametrize("etag", ["", 'W/"one"'])
async def test_without_a_strong_etag_the_rest_is_compared(etag: str) -> None:
    """A store without ETags, or with weak ones, is pinned by time and length."""
    async with ImageServer(DATA) as server:
        server.etag = etag
        async with over_http(server) as source:
            await check(source)
            server.modified = "Sun, 01 Nov 2026 10:00:01 GMT"
            with pytest.raises(SourceError, match="its time went from"):
                await check(source)


async def test_a_deleted_object_is_an_error_that_may_pass() -> None:
    """Nobody has replaced it yet: if the same object is back, it is served on."""
    async with serving() as (server, source):
        del server.objects["images/vm.img"]
        with pytest.raises(SourceError, match="no such object"):
            await check(source)
        server.objects["images/vm.img"] = DATA
        await check(source)


async def test_the_identity_is_of_object_and_generation() -> None:
    """Same object, same word; another generation, another word."""
    found = []
    async with S3Server() as server:
        options = {"endpoint": server.endpoint}
        options |= {"aws_access_key_id": KEY, "aws_secret_access_key": SECRET}
        for data in (DATA, DATA, _other_bytes(DATA)):
            server.objects["images/vm.img"] = data
            async with opened("s3://images/vm.img", options=options) as source:
                found.append(identity_of(source))
    assert found[0] == found[1] != found[2]
    assert all(each and " " not in each for each in found)


# --- troubles --------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def over_http(server: ImageServer) -> AsyncIterator[ObjectStoreSource]:
    """Open an image of a bad web server, as obstore sees it."""
    store = HTTPStore(
        server.base,
        client_options={"allow_http": True, "timeout": timedelta(seconds=0.3)},
        retry_config={
            "max_retries": 2,
            "retry_timeout": timedelta(seconds=2),
            "backoff": {"init_backoff": timedelta(milliseconds=1)},
        },
    )
    source = await ObjectStoreSource.over(store, "image", timeout=2)
    try:
        yield source
    finally:
        await source.aclose()


async def test_not_now_is_asked_again() -> None:
    """Overload and outages pass, at the opening too."""
    async with serving() as (server, source):
        server.troubles = [503, 500, 429]
        await check(source)
        assert not server.troubles


@pytest.mark.parametrize("trouble", ["drop", "drop_midway", "stall", "stall_midway"])
async def test_a_broken_answer_is_asked_for_again(trouble: str) -> None:
    """One connection that drops or stalls costs its time, not the read."""
    async with ImageServer(DATA) as server, over_http(server) as source:
        server.next(getattr(server, trouble))
        await check(source)


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        ("stall", "not within|timed out|error"),
        ("drop", "error"),
        ("too_short", "4095 bytes|end of file|error"),
        ("everything", "(?i)range"),
        ("other_range", "12289"),
        ("no_content_range", "(?i)range"),
    ],
)
async def test_a_trouble_that_stays_is_a_clear_error(trouble: str, reason: str) -> None:
    """It ends within the limit, and the source works again afterwards."""
    async with ImageServer(DATA) as server, over_http(server) as source:
        server.always(getattr(server, trouble))
        with pytest.raises(SourceError, match=reason):
            await check(source)
        server.always(server.give)
        await check(source)


async def test_a_store_that_never_answers_ends_by_the_time_limit() -> None:
    """The source's own limit holds, whatever the store's client was told."""
    async with ImageServer(DATA) as server:
        server.always(server.stall)
        store = HTTPStore(server.base, client_options={"allow_http": True})
        with pytest.raises(SourceError, match=r"not within 0.2 s"):
            await ObjectStoreSource.over(store, "image", timeout=0.2)


@pytest.mark.parametrize("url", ["s3://images/none", "s3://none/vm.img"])
async def test_a_missing_object_or_bucket_is_an_error_at_once(url: str) -> None:
    """No retry mends it."""
    async with S3Server() as server:
        options = {"endpoint": server.endpoint}
        options |= {"aws_access_key_id": KEY, "aws_secret_access_key": SECRET}
        with pytest.raises(SourceError, match="no such object or bucket"):
            await ObjectStoreSource.open(url, options=options)
        assert len(server.requests) == 1


@pytest.mark.parametrize("wrong", ["aws_access_key_id", "aws_secret_access_key"])
async def test_bad_credentials_are_an_error_that_does_not_show_them(wrong: str) -> None:
    """Refused at once, by name."""
    async with S3Server() as server:
        server.objects["images/vm.img"] = DATA
        options = {"aws_access_key_id": KEY, "aws_secret_access_key": SECRET}
        options |= {"endpoint": server.endpoint, wrong: "hunter2"}
        with pytest.raises(SourceError, match=r"403|privileges") as caught:
            await ObjectStoreSource.open("s3://images/vm.img", options=options)
        assert "hunter2" not in str(caught.value)
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("s3://images", {}),
        ("s3://images/", {}),
        ("images/vm.img", {}),
        ("", {}),
        ("nonsense://images/vm.img", {}),
        ("s3://images/vm.img", {"nonsense": "1"}),
        ("file:///tmp/vm.img", {"region": "here"}),
    ],
)
async def test_what_names_no_object_is_refused(url: str, options: dict[str, str]) -> None:
    """A bucket alone is no image; unknown settings are not ignored."""
    with pytest.raises(SourceError, match=r"names no object|valid|options|recognise"):
        await ObjectStoreSource.open(url, options=options)


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("gs://images/folder/vm.img", {"base_url": ""}),
        ("az://images/folder/vm.img", {"endpoint": "", "account_name": "x"}),
    ],
)
async def test_other_clouds_are_known_by_their_urls(url: str, options: dict[str, str]) -> None:
    """Google's and Azure's clients ask an endpoint of ours, without signing."""
    async with ImageServer(DATA) as server:
        options = {name: value or server.base for name, value in options.items()}
        async with opened(url, options={**options, "skip_signature": "true"}) as source:
            await asyncio.gather(*(check(source, page) for page in range(16)))
            server.etag = '"two"'
            with pytest.raises(SourceError, match="changed while it was served"):
                await check(source)


# --- reads in flight -------------------------------------------------------------------


async def test_cancelled_reads_harm_nobody() -> None:
    """Their connections are closed, and others are there for those that stay."""
    async with (
        serving() as (server, _),
        DelayingProxy("127.0.0.1", int(server.endpoint.rpartition(":")[2])) as proxy,
    ):
        options = {"endpoint": f"http://127.0.0.1:{proxy.port}"}
        options |= {"aws_access_key_id": KEY, "aws_secret_access_key": SECRET}
        async with opened("s3://images/vm.img", options=options) as source:
            await check(source)
            assert proxy.connections == 1
            proxy.delay = 60.0
            reads = [asyncio.ensure_future(check(source)) for _ in range(4)]
            while proxy.connections < 4:
                await asyncio.sleep(0.001)
            for read in reads:
                read.cancel()
            done = await asyncio.gather(*reads, return_exceptions=True)
            assert all(isinstance(each, asyncio.CancelledError) for each in done)
            proxy.delay = 0.0
            await asyncio.gather(*(check(source, page) for page in range(16)))


async def test_a_close_waits_for_reads_in_flight(tmp_path: Path) -> None:
    """They get their bytes; later ones are refused."""
    path = tmp_path / "vm.img"
    path.write_bytes(DATA)
    store = LocalStore(tmp_path)
    source = await ObjectStoreSource.over(store, "vm.img")
    early = asyncio.ensure_future(check(source))
    await asyncio.sleep(0)
    closing = asyncio.ensure_future(source.aclose())
    await asyncio.sleep(0)
    with pytest.raises(ClosedError):
        await check(source)
    await closing
    assert early.done()
    await early
