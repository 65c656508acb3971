"""A raw asyncio TCP stream between two processes on loopback: the floor under bulk transfers.

    python -m benchmarks.raw_stream

    bytes_per_second = raw_stream("uvloop")

Knows: StreamWriter.write and drain on one side, StreamReader.read on the other, and a clock.
Must not know: what might be sent, aiouffd.

The receiver counts from its first byte to the end of the stream, and throws all away.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Coroutine
from importlib.util import find_spec
from typing import Any, Final

from .build import HERE
from .contest import RunFailed

SIZE: Final = 1 << 30
CHUNK: Final = 256 << 10  # what was fastest
LIMIT: Final = 1 << 20  # likewise, of the reader's buffer; asyncio's own default is 64 KiB
LOOPS: Final = ("asyncio", "uvloop")

_LIMIT_SECONDS: Final = 120.0


def loops() -> list[str]:
    """List the event loops that there are."""
    return [loop for loop in LOOPS if find_spec(loop) is not None]


def raw_stream(
    loop: str = "asyncio",
    *,
    size: int = SIZE,
    chunk: int = CHUNK,
    limit: int = LIMIT,
    rounds: int = 3,
) -> float:
    """Measure some times, and give the median.

    Args:
        loop: "asyncio" or "uvloop", for both sides.
        size: Bytes to send in each round.
        chunk: Bytes that are written, and at most read, at once.
        limit: Of the reader's buffer, in bytes; at twice as much it lets the sender wait.
        rounds: How often.

    Returns:
        Bytes per second.

    Raises:
        RunFailed: A side failed, or took minutes.
    """
    return statistics.median(
        raw_stream_once(loop, size=size, chunk=chunk, limit=limit) for _ in range(rounds)
    )


def raw_stream_once(
    loop: str = "asyncio", *, size: int = SIZE, chunk: int = CHUNK, limit: int = LIMIT
) -> float:
    """Measure once: for rounds in turn with other contestants.  As ``raw_stream``."""
    environment = dict(os.environ, PYTHONPATH=str(HERE.parent), PYTHONDONTWRITEBYTECODE="1")
    command = [sys.executable, "-m", "benchmarks.raw_stream", "--loop", loop]
    command += ["--size", str(size), "--chunk", str(chunk)]
    command += ["--limit", str(limit), "--side"]
    receiver = subprocess.Popen(
        [*command, "0"], env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    )
    with receiver:
        try:
            assert receiver.stdout is not None
            port = receiver.stdout.readline().decode().strip()
            if not port:
                raise RunFailed(f"the receiver on {loop} did not start")
            sender = [*command, port]
            subprocess.run(sender, env=environment, check=True, timeout=_LIMIT_SECONDS)
            said, _ = receiver.communicate(timeout=_LIMIT_SECONDS)
        except subprocess.SubprocessError as error:
            raise RunFailed(f"a raw stream on {loop}: {error}") from error
        finally:
            receiver.kill()
    if receiver.returncode != 0:
        raise RunFailed(f"a raw stream on {loop}: the receiver ended with {receiver.returncode}")
    received, took_ns = map(int, said.split())
    if received != size:
        raise RunFailed(f"a raw stream on {loop}: {received} of {size} bytes")
    return received / took_ns * 1e9


# --- the two sides ---------------------------------------------------------------------


async def _receive(chunk: int, limit: int) -> None:
    done = asyncio.get_running_loop().create_future()

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received, started = len(await reader.read(chunk)), time.perf_counter_ns()
        while data := await reader.read(chunk):
            received += len(data)
        done.set_result((received, time.perf_counter_ns() - started))
        writer.close()

    server = await asyncio.start_server(take, "127.0.0.1", 0, limit=limit)
    async with server:
        print(server.sockets[0].getsockname()[1], flush=True)
        print(*await done)


async def _send(port: int, size: int, chunk: int) -> None:
    data = os.urandom(chunk)
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    for offset in range(0, size, chunk):
        writer.write(data if size - offset >= chunk else data[: size - offset])
        await writer.drain()
    writer.close()
    await writer.wait_closed()


def _run(loop: str, side: Coroutine[Any, Any, None]) -> None:
    if loop == "uvloop":
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(side)
    else:
        asyncio.run(side)


def main() -> None:
    """Print the floor on each event loop."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--loop", choices=LOOPS, help="on this one only")
    parser.add_argument("--size", type=int, default=SIZE, help="bytes in each round")
    parser.add_argument("--chunk", type=int, default=CHUNK, help="bytes written at once")
    parser.add_argument("--limit", type=int, default=LIMIT, help="bytes that the reader buffers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", type=int, help=argparse.SUPPRESS)  # 0: receive; else send there
    options = parser.parse_args()
    if options.side is not None:
        if options.side == 0:
            _run(options.loop, _receive(options.chunk, options.limit))
        else:
            _run(options.loop, _send(options.side, options.size, options.chunk))
        return
    for loop in [options.loop] if options.loop else loops():
        speed = raw_stream(
            loop,
            size=options.size,
            chunk=options.chunk,
            limit=options.limit,
            rounds=options.rounds,
        )
        print(f"{loop}: {speed / (1 << 20):.0f} MiB/s")


if __name__ == "__main__":
    main()
