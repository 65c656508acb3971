"""Frames made by hand, for tests of who takes them.

Knows: the bytes of the wire, from its page and not from its code.
Must not know: the encoder.
"""

from __future__ import annotations

import json
import struct
import zlib
from typing import Any, Final

from aiouffd.migration.wire import Decoder, Extent, Frame

PAGE: Final = 4096
EXTENTS: Final = [Extent("heap", 64 << 20, PAGE), Extent("stack", 16 * PAGE, 2 * PAGE)]

HELLO, WELCOME, ERROR, PAGES, BATCH, ZERO, MISSING, STATE, SWITCH = range(1, 10)
RUNNING, DEMAND, ACK, PROGRESS, DONE, END, CANCEL, PING = range(10, 18)

CHECKED, ZSTD, LZ4 = 1, 2, 4


def preamble(newest: int = 1, oldest: int = 1) -> bytes:
    begin = b"aiouffdM" + struct.pack(">HH", newest, oldest)
    return begin + struct.pack(">I", zlib.crc32(begin))


def frame(
    kind: int,
    body: bytes = b"",
    *,
    flags: int | None = None,
    region: int = 0,
    number: int = 0,
    offset: int = 0,
    span: int = 0,
    length: int | None = None,
) -> bytes:
    """Make one; whatever is asked for, right or wrong.

    Args:
        length: Of the body as the head has it.
    """
    if flags is None:
        flags = CHECKED if body else 0
    check = zlib.crc32(body) if flags & CHECKED else 0
    head = struct.pack(
        ">BBHIQQII",
        kind,
        flags,
        region,
        len(body) if length is None else length,
        number,
        offset,
        span,
        check,
    )
    return head + struct.pack(">I", zlib.crc32(head)) + body


def of_json(kind: int, value: Any) -> bytes:
    return frame(kind, json.dumps(value).encode())


def runs(*each: tuple[int, int]) -> bytes:
    """Make a table of (offset, length)."""
    return b"".join(struct.pack(">QI", offset, length) for offset, length in each)


def hello(role: str = "demand", *, token: Any = "", epoch: Any = 1, **more: Any) -> bytes:
    """Greet as a source of EXTENTS does."""
    value: dict[str, Any] = {"role": role, "token": token, "epoch": epoch}
    if not token:
        value |= {
            "name": "a program",
            "regions": [each._asdict() for each in EXTENTS],
            "features": ["checksums", "precopy"],
        }
    return of_json(HELLO, value | more)


def decoder(*, from_source: bool = True, checked: bool = False) -> Decoder:
    """Give one that has agreed on EXTENTS."""
    made = Decoder(from_source=from_source)
    made.regions = EXTENTS
    made.checked = checked
    return made


def taken(receiver: Decoder, *pieces: bytes) -> list[Frame]:
    """Feed pieces; give the frames with bodies of their own."""
    return [
        each._replace(body=bytes(each.body)) for piece in pieces for each in receiver.feed(piece)
    ]
