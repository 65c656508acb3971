"""nginx as the web server that images lie on."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
from collections.abc import AsyncIterator

import pytest

from aiouffd.errors import SourceError
from aiouffd.sources import Source, identity_of
from aiouffd.sources.http import HttpSource
from aiouffd.testing.sources import PAGE, SourceContract, as_bytes, image
from tests.interop.nginx import Nginx
from tests.remote_serving import Place, RemoteServing

pytestmark = pytest.mark.skipif(
    shutil.which("nginx") is None, reason="needs nginx: sudo make interop"
)


class _OnNginx(Place):
    def __init__(self, nginx: Nginx, *, tls: bool) -> None:
        self.nginx = nginx
        self.tls = tls

    async def put(self, data: bytes) -> None:
        new = self.nginx.www / "new"
        new.write_bytes(data)
        # nginx's ETag is time and length: a time that differs for sure
        os.utime(new, (1_700_000_000, 1_700_000_000 + len(list(self.nginx.www.iterdir()))))
        new.rename(self.nginx.www / "vm.img")

    async def open(self) -> Source:
        if self.tls:
            url = f"https://127.0.0.1:{self.nginx.tls}/vm.img"
            return await HttpSource.open(url, ssl=self.nginx.trust)
        return await HttpSource.open(f"http://127.0.0.1:{self.nginx.plain}/vm.img")

    async def stop(self) -> None:
        await self.nginx.stop()

    async def start(self) -> None:
        await self.nginx.start()


@contextlib.asynccontextmanager
async def on_nginx(data: bytes, *, tls: bool) -> AsyncIterator[_OnNginx]:
    """Run nginx over a folder with an image."""
    nginx = Nginx()
    place = _OnNginx(nginx, tls=tls)
    await place.put(data)
    try:
        await nginx.start()
        yield place
    finally:
        await nginx.aclose()


class TestServedOverHttp(RemoteServing):
    """A process's memory, plain."""

    def place(self) -> contextlib.AbstractAsyncContextManager[Place]:
        """Run nginx."""
        return on_nginx(image(self.size), tls=False)


class TestServedOverTls(RemoteServing):
    """A process's memory, over TLS."""

    def place(self) -> contextlib.AbstractAsyncContextManager[Place]:
        """Run nginx."""
        return on_nginx(image(self.size), tls=True)


class TestHttpSourceOnNginx(SourceContract):
    """The contract, at the hands of a real web server."""

    @contextlib.asynccontextmanager
    async def source_of(self, data: bytes) -> AsyncIterator[Source]:
        """Let nginx serve the bytes."""
        async with on_nginx(data, tls=False) as place:
            source = await place.open()
            try:
                yield source
            finally:
                await source.aclose()


async def test_reads_of_any_length_at_once_over_tls(seed: int) -> None:
    """Many reads of random stretches, many at a time."""
    data, choose = image(1000 * PAGE + 17), random.Random(seed)
    async with on_nginx(data, tls=True) as place:
        source = await place.open()
        stretches = []
        for _ in range(300):
            offset = choose.randrange(len(data))
            stretches.append((offset, choose.randint(1, min(len(data) - offset, 1 << 20))))
        answers = await asyncio.gather(*(source.read(*each) for each in stretches))
        for (offset, length), answer in zip(stretches, answers, strict=True):
            assert as_bytes(answer) == data[offset : offset + length]
        await source.aclose()


async def test_another_image_has_another_identity_and_is_refused() -> None:
    """nginx's own ETag tells them apart."""
    async with on_nginx(image(PAGE), tls=False) as place:
        source = await place.open()
        await place.put(image(PAGE, seed=1))
        with pytest.raises(SourceError, match="changed while it was served"):
            await source.read(0, 1)
        later = await place.open()
        assert identity_of(source) != identity_of(later)
        await source.aclose()
        await later.aclose()
