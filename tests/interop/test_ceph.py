"""Ceph's S3 gateway as the object store that images lie in: a real, distributed one."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator, Iterator
from typing import Any

import obstore
import pytest
from obstore.store import S3Store

from aiouffd.errors import SourceError
from aiouffd.sources import Source
from aiouffd.sources.object_store import ObjectStoreSource
from aiouffd.testing.sources import PAGE, as_bytes, image
from tests.interop.ceph import KEY, PROGRAMS, SECRET, Ceph
from tests.remote_serving import Place, RemoteServing
from tests.s3_server import make_bucket

pytestmark = [
    pytest.mark.skipif(
        not all(map(shutil.which, PROGRAMS)), reason="needs Ceph: sudo make interop"
    ),
    pytest.mark.limit(110),
]

BUCKET = "images"


@pytest.fixture(scope="module")
def ceph() -> Iterator[Ceph]:
    """A cluster with a bucket."""
    ceph = Ceph()
    try:
        ceph.start()
        make_bucket(ceph.endpoint, BUCKET, KEY, SECRET)
        yield ceph
    finally:
        ceph.close()


def options(ceph: Ceph) -> dict[str, Any]:
    """Give what an S3 client needs to know."""
    return {
        "endpoint": ceph.endpoint,
        "aws_access_key_id": KEY,
        "aws_secret_access_key": SECRET,
        "region": "us-east-1",
    }


class _InCeph(Place):
    def __init__(self, ceph: Ceph) -> None:
        self.ceph = ceph
        # obstore's threads keep descriptors for the process's life; a test's own are compared
        self.store = S3Store(BUCKET, **options(ceph), client_options={"allow_http": True})

    async def put(self, data: bytes) -> None:
        await obstore.put_async(self.store, "vm.img", data)

    async def open(self) -> Source:
        url = f"s3://{BUCKET}/vm.img"
        return await ObjectStoreSource.open(url, options=options(self.ceph))

    async def stop(self) -> None:
        await asyncio.to_thread(self.ceph.kill_gateway)

    async def start(self) -> None:
        await asyncio.to_thread(self.ceph.start_gateway)


@pytest.fixture(scope="module", autouse=True)
def _image(ceph: Ceph) -> None:
    """Put the image, through the threads that obstore then keeps."""
    obstore.put(_InCeph(ceph).store, "vm.img", image(TestServedFromCeph.size))


class TestServedFromCeph(RemoteServing):
    """A process with 64 MiB of memory, in pieces of 64 KiB."""

    size = 64 << 20
    chunk = 64 << 10
    _ceph: Ceph

    @pytest.fixture(autouse=True)
    def _cluster(self, ceph: Ceph) -> None:
        self._ceph = ceph

    @contextlib.asynccontextmanager
    async def place(self) -> AsyncIterator[Place]:
        """Make sure that the image is the one that the tests expect."""
        place = _InCeph(self._ceph)
        yield place
        source = await place.open()
        old = as_bytes(await source.read(0, PAGE)) == image(PAGE)
        await source.aclose()
        if not old:
            await place.put(image(self.size))


async def test_what_is_missing_or_forbidden_is_said(ceph: Ceph) -> None:
    """A key, a bucket, and each half of the credentials."""
    for url in (f"s3://{BUCKET}/none", "s3://nobodys/vm.img"):
        with pytest.raises(SourceError, match="no such object or bucket"):
            await ObjectStoreSource.open(url, options=options(ceph))
    for name in ("aws_access_key_id", "aws_secret_access_key"):
        wrong = {**options(ceph), name: "hunter2"}
        with pytest.raises(SourceError, match="403") as caught:
            await ObjectStoreSource.open(f"s3://{BUCKET}/vm.img", options=wrong)
        assert "hunter2" not in str(caught.value)


async def test_pages_at_once_are_right(ceph: Ceph) -> None:
    """A thousand single pages, as many at a time as the client likes."""
    source = await _InCeph(ceph).open()
    data = image(1000 * PAGE)
    answers = await asyncio.gather(*(source.read(page * PAGE, PAGE) for page in range(1000)))
    assert b"".join(map(as_bytes, answers)) == data
    await source.aclose()
