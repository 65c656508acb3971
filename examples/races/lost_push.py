"""A ring buffer in which two threads take the same slot: found by trying orders.

    python examples/races/lost_push.py

ring.c has the bug, ring_repaired.c its repair.
"""

import ctypes

from aiouffd.testing import Harness, RaceFound
from compiled import library

ROOM = 64  # bytes, enough for either ring


def test_no_push_is_lost(uffd: Harness, source: str) -> None:
    c = library(source)
    region = uffd.region(1, name="ring")
    ring = region.pointer()

    def reset() -> None:
        region.poke(0, bytes(ROOM))  # an empty ring

    def check() -> None:
        value, popped = ctypes.c_uint32(), set()
        while c.ring_pop(ring, ctypes.byref(value)):
            popped.add(value.value)
        assert popped == {1, 2}, f"1 and 2 were pushed, {popped} popped"

    pushes = {"one": lambda: c.ring_push(ring, 1), "two": lambda: c.ring_push(ring, 2)}
    print(uffd.explore(pushes, reset=reset, check=check))


if __name__ == "__main__":
    for source in ("ring.c", "ring_repaired.c"):
        print(f"{source}: ", end="")
        with Harness() as uffd:
            try:
                test_no_push_is_lost(uffd, source)
            except RaceFound as race:
                print(race)
