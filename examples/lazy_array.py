"""A NumPy array of 64 GiB of which only what is read is ever computed, page by page.

    python examples/lazy_array.py

Needs NumPy and no rights.  The handler stands for a store that one asks over the network.
"""

import asyncio

import numpy as np

import aiouffd

LENGTH = 64 << 30  # of address space; memory is taken by the pages that are touched
STRIDE = 1 << 24


async def fill(fault: aiouffd.PageFault) -> bytes:
    """Make a page: element i of the array is i squared."""
    await asyncio.sleep(0.001)  # other faults are served meanwhile
    first = fault.offset // 8
    return (np.arange(first, first + fault.length // 8, dtype="f8") ** 2).tobytes()


def look_around(squares: np.ndarray) -> float:
    """Use the array as any other: it does not know that it is lazy."""
    assert squares[12_345] == 12_345**2
    assert np.sqrt(squares[-1]) == len(squares) - 1
    samples = squares[::STRIDE]  # a view: nothing is read yet
    assert np.array_equal(samples, np.arange(0, len(squares), STRIDE, dtype="f8") ** 2)
    return float(samples.mean())


async def main() -> None:
    """Serve the array from this loop while a thread reads it."""
    async with aiouffd.LazyMemory(LENGTH, fill, read_only=True, name="squares") as memory:
        squares = np.frombuffer(memory.view, dtype="f8")
        mean = await asyncio.to_thread(look_around, squares)
        async with memory.ensure(0, 1 << 20):  # in one go, for the loop's own thread
            total = int(squares[:1000].sum())
        there = memory.present_bytes
        print(f"{len(squares):,} elements, mean of the samples {mean:.4g}, first sum {total:,}")
        print(f"{there >> 10:,} KiB of {LENGTH >> 30} GiB fetched: {there / LENGTH:.6%}")


if __name__ == "__main__":
    asyncio.run(main())
