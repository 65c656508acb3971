"""What stands behind an option: bytes, seconds, counts, addresses, as people write them.

Knows: how they are written, and how to say what is wrong with one.
Must not know: options, commands.
"""

from __future__ import annotations

import argparse
import re
from typing import Final

#: Where the path of a server's control socket is taken from without ``--control``.
CONTROL_VARIABLE: Final = "AIOUFFD_CONTROL"

_BYTES: Final = re.compile(r"([0-9]+)([KMGT]?)(?:i?B)?", re.IGNORECASE)
_SECONDS: Final = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)s?")
_WHOLE: Final = re.compile(r"[0-9]{1,18}")
_RIGHTS: Final = re.compile(r"[0-7]{1,4}")


def byte_count(text: str) -> int:
    """Read a number of bytes: ``4096``, ``64K``, ``1G``."""
    match = _BYTES.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text} is no number of bytes, such as 512M")
    return int(match[1]) << 10 * " KMGT".index(match[2].upper() or " ")


def chunk_bytes(text: str) -> int:
    """Read a number of bytes that is a power of two, or 0."""
    value = byte_count(text)
    if value & (value - 1):
        raise argparse.ArgumentTypeError(f"{text} is no power of two, such as 64K")
    return value


def seconds_or_none(text: str) -> float:
    """Read a time, or 0: ``30``, ``0.5`` or ``30s``."""
    match = _SECONDS.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text} is no time in seconds, such as 30")
    return float(match[1])


def seconds(text: str) -> float:
    """Read a time that is not 0."""
    value = seconds_or_none(text)
    if not value:
        raise argparse.ArgumentTypeError(f"{text} is no time in seconds, such as 30")
    return value


def count(text: str) -> int:
    """Read a number of things, at least one."""
    if not _WHOLE.fullmatch(text) or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is no number from 1 on")
    return int(text)


def user(text: str) -> int:
    """Read a user's number."""
    if not _WHOLE.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text} is no user's number; `id -u NAME` says it")
    return int(text)


def rights(text: str) -> int:
    """Read rights of a file, in octal."""
    if not _RIGHTS.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text} are no rights in octal, such as 660")
    return int(text, 8)


def host_and_port(text: str) -> tuple[str, int]:
    """Read HOST:PORT, [IPV6]:PORT or :PORT, which is the loopback address."""
    host, colon, port = text.rpartition(":")
    if not colon or not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65535:
        raise argparse.ArgumentTypeError(f"{text} is not HOST:PORT")
    return host.removeprefix("[").removesuffix("]") or "127.0.0.1", int(port)
