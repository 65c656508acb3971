"""Served from servers in this process: the tests that tests/interop runs with real ones."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import obstore
import pytest
from obstore.store import MemoryStore

from aiouffd.sources import Source
from aiouffd.sources.http import HttpSource
from aiouffd.sources.object_store import ObjectStoreSource
from aiouffd.testing.sources import image
from tests.http_server import ImageServer
from tests.remote_serving import Place, RemoteServing
from tests.s3_server import KEY, SECRET, S3Server


@pytest.fixture(scope="session", autouse=True)
def _obstore_threads() -> None:
    """obstore's threads keep descriptors for the process's life: let them begin before a test."""
    obstore.put(MemoryStore(), "x", b"x")


class _WebServer(Place):
    """An image on a web server."""

    def __init__(self, data: bytes) -> None:
        self._server = ImageServer(data)

    async def put(self, data: bytes) -> None:
        self._server.data = data
        self._server.etag = '"two"'

    async def open(self) -> Source:
        return await HttpSource.open(self._server.url)

    async def stop(self) -> None:
        await self._server.__aexit__(None, None, None)

    async def start(self) -> None:
        self._server = ImageServer(self._server.data, port=self._server.port)
        await self._server.__aenter__()


class TestFromWebServer(RemoteServing):
    """HttpSource."""

    @contextlib.asynccontextmanager
    async def place(self) -> AsyncIterator[Place]:
        """Serve an image."""
        place = _WebServer(image(self.size))
        await place.start()
        try:
            yield place
        finally:
            await place.stop()


class _ObjectStore(Place):
    """An image in an S3."""

    def __init__(self, data: bytes) -> None:
        self._server = S3Server()
        self._server.objects["images/vm.img"] = data

    async def put(self, data: bytes) -> None:
        self._server.objects["images/vm.img"] = data

    async def open(self) -> Source:
        options = {"aws_access_key_id": KEY, "aws_secret_access_key": SECRET}
        options["endpoint"] = self._server.endpoint
        return await ObjectStoreSource.open("s3://images/vm.img", options=options)

    async def stop(self) -> None:
        await self._server.__aexit__(None, None, None)

    async def start(self) -> None:
        objects = self._server.objects
        self._server = S3Server(port=self._server.port)
        self._server.objects = objects
        await self._server.__aenter__()


class TestFromObjectStore(RemoteServing):
    """ObjectStoreSource."""

    @contextlib.asynccontextmanager
    async def place(self) -> AsyncIterator[Place]:
        """Keep an image."""
        place = _ObjectStore(image(self.size))
        await place.start()
        try:
            yield place
        finally:
            await place.stop()
