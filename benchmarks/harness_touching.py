"""One run of the test harness: touch pages that it stops or records, and print what that took.

Knows: how to have a thread of C, or of Python, touch pages, and when it did.
Must not know: what it is compared with.

    python -m benchmarks.harness_touching HOW CPU PAGES|ORDERS

A round trip is that of ``with page.freeze()``: a thread touches, ``wait`` gives it, ``release``
lets it go, and its touch is made.  Both its ends are times that the touching thread takes.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import sys
import time
from collections.abc import Callable, Sequence

from aiouffd.testing import Harness, Region

from .build import compile_library

Sample = dict[str, float]
now = time.perf_counter_ns  # CLOCK_MONOTONIC, as in C


def percentile(values: Sequence[int], percent: int) -> int:
    """Give the value below which so many percent lie."""
    return sorted(values)[len(values) * percent // 100]


def load() -> ctypes.CDLL:
    """Open the C library that touches."""
    library = ctypes.CDLL(str(compile_library("harness_floor.c")))
    pages, times = ctypes.c_long, ctypes.c_void_p
    library.touch_each.argtypes = (ctypes.c_void_p, pages, times)
    library.touch_each.restype = None
    library.touch_when_told.argtypes = (
        *(ctypes.c_int, ctypes.c_int, ctypes.c_void_p, pages, times, times),
    )
    library.touch_when_told.restype = None
    library.increment.argtypes = (ctypes.c_void_p, ctypes.c_long)
    library.increment.restype = None
    return library


class Toucher:
    """A thread that reads a byte of the next page whenever it is told to.

    Attributes:
        before: When it was about to read, nanoseconds, a number for each page.
        after: When it had read.
    """

    def __init__(self, harness: Harness, region: Region, pages: int) -> None:
        self._region = region
        self._pages = pages
        self.before = (ctypes.c_uint64 * pages)(*[1] * pages)
        self.after = (ctypes.c_uint64 * pages)(*[1] * pages)
        self._go, self._done = os.pipe(), os.pipe()
        self._running = harness.start(self._touch)

    def _touch(self) -> None:
        load().touch_when_told(
            *(self._go[0], self._done[1], self._region.pointer(), self._pages),
            *(self.before, self.after),
        )

    def tell(self) -> None:
        """Have it touch its next page."""
        os.write(self._go[1], b".")

    def join_touch(self) -> None:
        """Wait until it has."""
        os.read(self._done[0], 1)

    def close(self) -> None:
        """End, after the last page."""
        self._running.result()
        for end in (*self._go, *self._done):
            os.close(end)


class PythonToucher(Toucher):
    """The same in Python: the thread holds the GIL while it stands."""

    def _touch(self) -> None:
        view, size = self._region.view, self._region.page_size
        for page in range(self._pages):
            os.read(self._go[0], 1)
            self.before[page] = now()
            view[page * size]
            self.after[page] = now()
            os.write(self._done[1], b".")


# --- stopping and letting go -----------------------------------------------------------


def summary(toucher: Toucher, standing: list[int], going: list[int]) -> Sample:
    """Say what a round trip took, and its halves: until ``wait`` returned, from ``release`` on.

    The first one of the thread is apart.
    """
    took = [end - start for start, end in zip(toucher.before, toucher.after, strict=True)]
    stop = [there - start for start, there in zip(toucher.before, standing, strict=True)]
    go = [end - start for start, end in zip(going, toucher.after, strict=True)]
    return {
        "first_ns": took[0],
        "p50_ns": percentile(took[1:], 50),
        "p99_ns": percentile(took[1:], 99),
        "stop_ns": percentile(stop[1:], 50),
        "go_ns": percentile(go[1:], 50),
    }


def freeze(pages: int, backend: str, kind: type[Toucher]) -> Sample:
    """Stop one page's touch after the other."""
    standing, going = [], []
    with Harness(backend=backend) as harness:
        region = harness.region(pages)
        toucher = kind(harness, region, pages)
        for page in range(pages):
            with region.page(page).freeze() as frozen_page:
                toucher.tell()
                frozen = frozen_page.wait()
                standing.append(now())
                going.append(now())
                frozen.release()
                toucher.join_touch()
        toucher.close()
    return summary(toucher, standing, going)


async def freeze_async(pages: int) -> Sample:
    """Stop one page's touch after the other, from a loop."""
    standing, going = [], []
    with Harness() as harness:
        region = harness.region(pages)
        toucher = Toucher(harness, region, pages)
        for page in range(pages):
            async with region.page(page).freeze() as frozen_page:
                toucher.tell()
                frozen = await frozen_page.wait()
                standing.append(now())
                going.append(now())
                await frozen.release()
                toucher.join_touch()
        toucher.close()
    return summary(toucher, standing, going)


def run_uvloop(pages: int) -> Sample:
    """Stop pages' touches from uvloop."""
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(freeze_async(pages))


# --- recording -------------------------------------------------------------------------


def walk(pages: int, *, every: bool) -> Sample:
    """Have every page touched once, recorded."""
    took = (ctypes.c_uint64 * pages)(*[1] * pages)
    with Harness() as harness:
        region = harness.region(pages)
        with harness.record(region, every=every) as record:
            harness.start(load().touch_each, region.pointer(), pages, took).result(None)
        if len(record) != pages:
            raise AssertionError(f"{len(record)} touches of {pages} pages")
    return {"p50_ns": percentile(list(took), 50), "p99_ns": percentile(list(took), 99)}


# --- exploring -------------------------------------------------------------------------


def explore(orders: int) -> Sample:
    """Run two threads that increment a counter three times each, in many orders."""
    increment = load().increment
    with Harness() as harness:
        region = harness.region()
        found = harness.explore(
            {name: lambda: increment(region.pointer(), 3) for name in "ab"},
            reset=lambda: region.poke(0, bytes(1)),
            preemptions=4,
            orders=orders,
        )
    if found.orders != orders:
        raise AssertionError(f"{found.orders} orders, not {orders}")
    return {
        "orders_per_second": found.orders / found.seconds,
        "touches_per_second": found.touches / found.seconds,
        "touch_ns": found.seconds * 1e9 / found.touches,
    }


# --- the process -----------------------------------------------------------------------

HOW: dict[str, Callable[[int], Sample]] = {
    "freeze": lambda pages: freeze(pages, "auto", Toucher),
    "freeze-python": lambda pages: freeze(pages, "auto", PythonToucher),
    "freeze-trampoline": lambda pages: freeze(pages, "trampoline", PythonToucher),
    "freeze-asyncio": lambda pages: asyncio.run(freeze_async(pages)),
    "freeze-uvloop": run_uvloop,
    "walk": lambda pages: walk(pages, every=False),
    "every": lambda pages: walk(pages, every=True),
    "explore": explore,
}


def main(how: str, cpu: int, pages: int) -> None:
    """Run and print."""
    if cpu >= 0:
        os.sched_setaffinity(0, {cpu})
    print(json.dumps(HOW[how](pages)))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
