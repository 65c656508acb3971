"""The delaying proxy: bytes as they were, later, and no more often than asked for."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.delaying_proxy import DelayingProxy

ROOT = Path(__file__).resolve().parent.parent


@contextlib.asynccontextmanager
async def echo() -> AsyncIterator[int]:
    """Run a server that sends back what it gets, to the end; give its port."""

    answering: set[asyncio.Task[None]] = set()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        answering.add(task)
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]
        await asyncio.sleep(0)  # a connection that was accepted just now
    if answering:
        await asyncio.wait(answering)


async def exchange(port: int, data: bytes) -> bytes:
    """Send, half-close, and give all that came back."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    receiving = asyncio.ensure_future(reader.read())
    writer.write(data)
    await writer.drain()
    writer.write_eof()
    got = await receiving
    writer.close()
    await writer.wait_closed()
    return got


@pytest.mark.parametrize("bytes_per_second", [None, 50e6])
async def test_every_byte_arrives_in_order(seed: int, bytes_per_second: float | None) -> None:
    """Both directions, the ends too, with and without a bandwidth."""
    data = random.Random(seed).randbytes(3_000_000)
    async with (
        echo() as port,
        DelayingProxy("127.0.0.1", port, delay=0.001, bytes_per_second=bytes_per_second) as proxy,
    ):
        answers = await asyncio.gather(*(exchange(proxy.port, data) for _ in range(3)))
        assert all(answer == data for answer in answers)
        assert proxy.connections == 3


async def test_a_request_takes_at_least_the_delay() -> None:
    """A small exchange cannot be over before what was sent was due."""
    async with echo() as port, DelayingProxy("127.0.0.1", port, delay=0.05) as proxy:
        start = time.monotonic()
        assert await exchange(proxy.port, b"x") == b"x"
        assert time.monotonic() - start >= 0.049


async def test_answers_leave_no_faster_than_the_bandwidth() -> None:
    """All but the last piece must have had its time on the line."""
    async with echo() as port, DelayingProxy("127.0.0.1", port, bytes_per_second=4e6) as proxy:
        start = time.monotonic()
        assert len(await exchange(proxy.port, bytes(400_000))) == 400_000
        assert time.monotonic() - start >= (400_000 - 65_536) / 4e6


async def test_cut_breaks_what_is_there_and_not_what_comes() -> None:
    """A connection that is cut ends; the next one works."""
    async with echo() as port, DelayingProxy("127.0.0.1", port) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"one")
        assert await reader.readexactly(3) == b"one"
        proxy.cut()
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
        writer.close()
        with contextlib.suppress(ConnectionResetError):
            await writer.wait_closed()
        assert await exchange(proxy.port, b"two") == b"two"


async def test_a_server_that_is_not_there_closes_the_client() -> None:
    """No connection is left hanging."""
    async with echo() as port:
        pass
    async with DelayingProxy("127.0.0.1", port) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
        writer.close()
        with contextlib.suppress(ConnectionResetError):
            await writer.wait_closed()


async def test_as_a_program() -> None:
    """It prints its port and ends at SIGTERM."""
    async with echo() as port:
        command = [sys.executable, "-m", "tests.delaying_proxy", f"--to=127.0.0.1:{port}"]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                own = int(await asyncio.to_thread(process.stdout.readline))
                assert await exchange(own, b"through") == b"through"
                process.send_signal(signal.SIGTERM)
                assert await asyncio.to_thread(process.wait, 20) == 0
            finally:
                process.kill()
