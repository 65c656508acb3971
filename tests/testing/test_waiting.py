"""Who stands, and who waits for whom: in words, of real threads."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable

import pytest

from aiouffd.testing import Frozen, waiting
from aiouffd.testing.harness import Harness

pytestmark = pytest.mark.child

libc = ctypes.CDLL(None)


def until(harness: Harness, done: Callable[[list[str]], bool], time_scale: float) -> None:
    """Ask until threads that were started have come to where they wait."""
    end = time.monotonic() + 10 * time_scale
    while not done(lines := waiting.lines(harness)):
        assert time.monotonic() < end, lines
        time.sleep(0.001)


def test_who_stands(time_scale: float) -> None:
    """A line says who stands before what access of which byte, and by which freeze."""
    with Harness(timeout=20 * time_scale) as uffd:
        region = uffd.region(2, name="packet")
        with region.page(1).freeze("read") as freeze:
            parser = uffd.start_named("parser", libc.strlen, region.pointer(region.page_size + 16))
            freeze.wait()
            (line,) = [each for each in waiting.lines(uffd) if "parser" in each]
        assert parser.result(20 * time_scale) == 0
        told = f"parser (tid {parser.tid}) stands before its read of packet[1]+0x10, at "
        assert line.startswith(told)
        assert ": stopped by the freeze of read of packet[1] " in line
        assert line.endswith(" s ago, held by the kernel")
        assert not [line for line in waiting.lines(uffd) if "parser" in line]


def test_who_stands_in_the_trampoline(time_scale: float) -> None:
    """Of an access that had the GIL it says that it has it no more."""
    with Harness(timeout=20 * time_scale) as uffd:
        region = uffd.region()
        with region.page(0).freeze() as freeze:
            python = uffd.start_named("python", lambda: region.view[0])
            freeze.wait()
            end = "held by the trampoline, without the GIL"
            until(uffd, lambda lines: lines[0].endswith(end), time_scale)
        assert python.result(20 * time_scale) == 0


def test_who_waits_for_whom(time_scale: float) -> None:
    """A result, the end of a thread, a freeze: each is told with the line that waits for it."""
    with Harness(timeout=20 * time_scale) as uffd:
        region = uffd.region(2, name="packet")
        with region.page(0).freeze() as freeze, region.page(1).freeze("write") as other:
            parser = uffd.start_named("parser", libc.strlen, region.pointer())
            freeze.wait()
            asks = uffd.start_named("asks", parser.result, None)
            joins = uffd.start_named("joins", parser.thread.join)

            def watch() -> Frozen:
                return other.wait()

            watches = uffd.start_named("watches", watch)
            expected = (
                f"asks (tid {asks.tid}) waits for the result of parser (tid {parser.tid})",
                f"joins (tid {joins.tid}) waits for the end of parser (tid {parser.tid})",
                f"watches (tid {watches.tid}) waits for a write of packet[1], at {__file__}:",
            )
            until(
                uffd,
                lambda lines: all(any(map(_begins(each), lines)) for each in expected),
                time_scale,
            )
            pointer = region.pointer(region.page_size)
            writer = uffd.start_named("writer", libc.memset, pointer, 1, 1)
            assert watches.result(20 * time_scale).thread == writer.tid
        for running in (parser, asks, joins, writer):
            running.result(20 * time_scale)


def _begins(text: str) -> Callable[[str], bool]:
    return lambda line: line.startswith(text)


def test_what_stops_a_thread_is_named() -> None:
    """A latency is not what every rule is called that nobody knows any more."""
    with Harness() as uffd:
        page = uffd.region(name="packet").page(0)
        with page.freeze() as freeze:
            assert uffd._what(freeze._rule) == "the freeze of touch of packet[0]"
        assert uffd._what(0) == "a latency"
        for gone in (-1, 12345):
            assert uffd._what(gone) == "a rule that has ended"
