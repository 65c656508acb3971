"""Peers that come while there is no room, or while the server ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
from collections.abc import Iterator

import pytest

from aiouffd.peers import Limits, Peer, Peers
from tests.serving import within
from tests.targets import until


class Echo(Peer):
    """Says what it hears."""

    heard = False

    @property
    def silent(self) -> bool:
        return not self.heard

    def data_received(self, data: bytes) -> None:
        self.heard = True
        self._stop_waiting()
        assert self._transport is not None
        self._write(self._transport, [data])

    def _go_on(self) -> None:
        self._goes_on = False
        if self._draining and self._transport is not None:
            self._transport.close()

    def _gone(self, error: Exception | None) -> None:
        pass


class Echoes(Peers):
    """A server of them."""

    def _peer(self, name: str) -> Peer:
        return Echo(self, name)


@contextlib.contextmanager
def no_more_descriptors() -> Iterator[None]:
    """Let nothing more be opened here."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def sockets(count: int) -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        made = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in made:
            each.setblocking(False)
        yield made


async def say(peer: socket.socket, data: bytes) -> bytes:
    loop = asyncio.get_running_loop()
    await within(loop.sock_sendall(peer, data))
    return await within(loop.sock_recv(peer, 100))


async def test_a_shortage_of_descriptors_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    """Who is connected is served meanwhile, the others afterwards; the loop does not spin."""
    loop = asyncio.get_running_loop()
    async with Echoes() as server:
        with sockets(6) as (first, *others):
            await loop.sock_connect(first, ("127.0.0.1", server.port))
            assert await say(first, b"one") == b"one"
            with no_more_descriptors():
                for each in others:
                    await loop.sock_connect(each, ("127.0.0.1", server.port))
                await until(lambda: "new peers wait" in caplog.text, "the shortage is noticed")
                assert await say(first, b"two") == b"two"
                assert server.connections == 1
                assert caplog.text.count("new peers wait") < 20
            for each in others:
                assert await say(each, b"three") == b"three"
            assert server.connections == 6
        await until(lambda: server.connections == 0, "all have left")
        assert server.refused == 0


@pytest.mark.parametrize("turns", range(4))
async def test_who_connects_while_the_server_ends(turns: int) -> None:
    """Is closed, at whatever moment, and no descriptor is left."""
    loop = asyncio.get_running_loop()
    server = Echoes()
    await server.start()
    with sockets(20) as made:
        for each in made:
            await loop.sock_connect(each, ("127.0.0.1", server.port))
        for _ in range(turns):
            await asyncio.sleep(0)
        await within(server.aclose())
        for each in made:
            with contextlib.suppress(ConnectionError):
                assert await within(loop.sock_recv(each, 1)) == b""
    assert server.connections == 0


async def test_a_drain_during_a_shortage() -> None:
    """Nothing is accepted any more when it is over."""
    loop = asyncio.get_running_loop()
    async with Echoes(limits=Limits(patience=5)) as server:
        with sockets(2) as (first, second):
            await loop.sock_connect(first, ("127.0.0.1", server.port))
            assert await say(first, b"one") == b"one"
            with no_more_descriptors():
                await loop.sock_connect(second, ("127.0.0.1", server.port))
                await until(lambda: server._pause is not None, "the shortage is noticed")
                await within(server.drain())
            assert server._pause is None
            assert server.connections == 0
