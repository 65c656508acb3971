"""A parser that checks a length and then fetches it again: found every time.

    python examples/races/double_fetch.py [RUNS]

parser.c has the bug and its repair, luck.c the test that one would write without a harness.
"""

import ctypes
import sys

from aiouffd.testing import Harness
from compiled import library

PAYLOAD, LONGEST, UNTOUCHED = 64, 255, 0xA5
FITS, TOO_LONG = bytes([16]), bytes([255])
PACKET = bytes([1]) + FITS + bytes(range(LONGEST))


class Message(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_uint8),
        ("length", ctypes.c_uint8),
        ("payload", ctypes.c_uint8 * PAYLOAD),
        ("guard", ctypes.c_uint8 * (LONGEST - PAYLOAD)),
    )


c = library("parser.c", "luck.c")
runs = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000


def with_harness(parser: str, times: int = 100) -> int:
    """Give in how many of so many runs the parser wrote past the payload."""
    overflows = 0
    with Harness() as uffd:
        region = uffd.region(1, contents=PACKET, name="packet")
        length = region.at(1, name="length")
        for _ in range(times):
            message = Message(guard=(ctypes.c_uint8 * (LONGEST - PAYLOAD))(*[UNTOUCHED] * 191))
            with length.change(FITS, TOO_LONG):  # the first look sees 16, any later one 255
                getattr(c, parser)(region.pointer(), ctypes.byref(message))
            overflows += message.guard[0] != UNTOUCHED
    return overflows


for parser in ("parse", "parse_repaired"):
    overflows = c.luck(getattr(c, parser), runs, 1)
    print(f"{parser} by luck: {overflows} of {runs} runs overflow")
    print(f"{parser} with the harness: {with_harness(parser)} of 100 runs overflow")
