"""The userfaultfd header of 2015, name by name, and what became of each.

Knows: what the first header defined, what each name is today and where it lives here.
Must not know: how anything of it is used.

``python -m aiouffd.kernel.history`` prints the page ``docs/uapi-2015.md``; a test keeps the
committed page equal to it, and every place it names resolvable.
"""

from __future__ import annotations

import struct
import sys
from typing import Final, NamedTuple

from . import abi


class Name(NamedTuple):
    """One name of the 2015 header."""

    name: str
    then: str  #: what it was in 2015
    today: str  #: what it is in Linux 6.18
    value: int | struct.Struct | None  #: today's value, from this package's own tables
    places: tuple[str, ...]  #: where it lives here, as ``module:object``


_ABI: Final = "aiouffd.kernel.abi"
_CALLS: Final = "aiouffd.kernel.calls"
_EVENTS: Final = "aiouffd.events"
_UFFD: Final = "aiouffd.uffd"

#: Every name, in the order of the header.
NAMES: Final[tuple[Name, ...]] = (
    Name(
        "ioctl range 0xAA 00-3F",
        "reserved for userfaultfd in ioctl-number.txt",
        "unchanged; 0x00 to 0x08 and 0x3F are in use, and 0x00 on the device",
        abi.UFFDIO,
        (f"{_ABI}:UFFDIO", f"{_ABI}:IOCTLS"),
    ),
    Name(
        "UFFD_API",
        "0xAA, asked for by UFFDIO_API",
        "unchanged; a second version (0xAB) was proposed and never came",
        abi.UFFD_API,
        (f"{_ABI}:UFFD_API",),
    ),
    Name(
        "UFFD_API_BITS",
        "UFFD_BIT_WRITE: the low bits that a read address may carry",
        "UFFD_API_FEATURES: the features a kernel has; the write bit is always there",
        abi.UFFD_API_FEATURES,
        (f"{_ABI}:UFFD_API_FEATURES", f"{_ABI}:FEATURES"),
    ),
    Name(
        "UFFD_API_IOCTLS",
        "REGISTER, UNREGISTER and API, as bits",
        "unchanged",
        abi.UFFD_API_IOCTLS,
        (f"{_ABI}:UFFD_API_IOCTLS",),
    ),
    Name(
        "UFFD_API_RANGE_IOCTLS",
        "WAKE alone",
        "also COPY, ZEROPAGE, MOVE, WRITEPROTECT, CONTINUE and POISON",
        abi.UFFD_API_RANGE_IOCTLS,
        (f"{_ABI}:UFFD_API_RANGE_IOCTLS",),
    ),
    Name(
        "_UFFDIO_REGISTER, _UNREGISTER, _WAKE, _API",
        "the numbers 0x00, 0x01, 0x02 and 0x3F",
        "unchanged",
        None,
        (f"{_ABI}:IOCTLS", f"{_ABI}:IOCTL_BITS"),
    ),
    Name(
        "UFFDIO",
        "0xAA, the ioctl type",
        "unchanged; the device has it as USERFAULTFD_IOC",
        abi.UFFDIO,
        (f"{_ABI}:UFFDIO", f"{_ABI}:USERFAULTFD_IOC"),
    ),
    Name(
        "UFFDIO_API",
        "reads 8 bytes, the version; writes bits and ioctls",
        "reads all 24: the features to enable go in with the version",
        abi.UFFDIO_API,
        (f"{_ABI}:UFFDIO_API", f"{_CALLS}:api", f"{_UFFD}:Userfaultfd.open"),
    ),
    Name(
        "UFFDIO_REGISTER",
        "private anonymous memory, mode MISSING",
        "same number; shared memory, huge pages and modes WP and MINOR were added",
        abi.UFFDIO_REGISTER,
        (f"{_ABI}:UFFDIO_REGISTER", f"{_CALLS}:register", f"{_UFFD}:Userfaultfd.register"),
    ),
    Name(
        "UFFDIO_UNREGISTER",
        "carries the read direction though the kernel reads from it",
        "same number; the direction stays wrong",
        abi.UFFDIO_UNREGISTER,
        (f"{_ABI}:UFFDIO_UNREGISTER", f"{_CALLS}:unregister", f"{_UFFD}:Userfaultfd.unregister"),
    ),
    Name(
        "UFFDIO_WAKE",
        "the only way to end a fault; the direction is wrong too",
        "same number; the fills wake by themselves, so it repeats a fault or follows EEXIST",
        abi.UFFDIO_WAKE,
        (
            f"{_ABI}:UFFDIO_WAKE",
            f"{_CALLS}:wake",
            f"{_UFFD}:Userfaultfd.wake",
            "aiouffd.resolutions:Wake",
        ),
    ),
    Name(
        "UFFD_BIT_WRITE",
        "bit 0 of the u64 that read(2) gave: it was a write",
        "UFFD_PAGEFAULT_FLAG_WRITE in uffd_msg, same value; bit 0 of a fault word",
        abi.UFFD_PAGEFAULT_FLAG_WRITE,
        (f"{_ABI}:UFFD_PAGEFAULT_FLAG_WRITE", f"{_EVENTS}:PageFault.write"),
    ),
    Name(
        "UFFD_BIT_WP",
        "bit 1: a write to a protected page; never set, protection was not there yet",
        "UFFD_PAGEFAULT_FLAG_WP in uffd_msg, same value, live since 5.7; bit 1 of a fault word",
        abi.UFFD_PAGEFAULT_FLAG_WP,
        (f"{_ABI}:UFFD_PAGEFAULT_FLAG_WP", f"{_EVENTS}:PageFault.wp"),
    ),
    Name(
        "UFFD_BITS",
        "2: how many low bits carry flags",
        "gone with the u64 message; a fault word has 3, the third is MINOR",
        None,
        (f"{_ABI}:PAGEFAULT_FLAGS", f"{_EVENTS}:decode_fault_word"),
    ),
    Name(
        "struct uffdio_api",
        "api, bits (out), ioctls (out)",
        "api, features (in and out), ioctls (out); same size",
        abi.UFFDIO_API_STRUCT,
        (f"{_ABI}:UFFDIO_API_STRUCT",),
    ),
    Name(
        "uffdio_api.bits",
        "written by the kernel: UFFD_API_BITS",
        "features, at the same offset; what is asked for goes in, what there is comes out",
        None,
        (f"{_ABI}:FEATURES", f"{_UFFD}:Feature", "aiouffd.kernel.capabilities:NAMES"),
    ),
    Name(
        "struct uffdio_range",
        "start, len",
        "unchanged",
        abi.UFFDIO_RANGE_STRUCT,
        (f"{_ABI}:UFFDIO_RANGE_STRUCT", "aiouffd.ranges:Range"),
    ),
    Name(
        "struct uffdio_register",
        "range, mode, ioctls (out)",
        "unchanged",
        abi.UFFDIO_REGISTER_STRUCT,
        (f"{_ABI}:UFFDIO_REGISTER_STRUCT",),
    ),
    Name(
        "UFFDIO_REGISTER_MODE_MISSING",
        "faults of pages that are not there",
        "unchanged",
        abi.UFFDIO_REGISTER_MODE_MISSING,
        (f"{_ABI}:UFFDIO_REGISTER_MODE_MISSING", f"{_UFFD}:Mode.MISSING"),
    ),
    Name(
        "UFFDIO_REGISTER_MODE_WP",
        "defined, but refused",
        "live since 5.7, with UFFDIO_WRITEPROTECT",
        abi.UFFDIO_REGISTER_MODE_WP,
        (f"{_ABI}:UFFDIO_REGISTER_MODE_WP", f"{_UFFD}:Mode.WP"),
    ),
    Name(
        "the message: one u64",
        "read(2) gave 8 bytes for a fault: the page's address, WRITE and WP in its low bits",
        "read(2) gives struct uffd_msg; the u64 lives on as the fault word",
        abi.UFFD_MSG_PAGEFAULT,
        (
            f"{_ABI}:UFFD_MSG_PAGEFAULT",
            f"{_EVENTS}:decode",
            f"{_EVENTS}:fault_word",
            f"{_EVENTS}:decode_fault_word",
        ),
    ),
)

_INTRODUCTION: Final = """\
# The header of 2015

<!-- Made by `python -m aiouffd.kernel.history`; change aiouffd/kernel/history.py instead. -->

The patches of May 2015, half a year before userfaultfd was merged into Linux 4.3, began with
this header.
Its numbers are still those of today; its 8-byte message is not.
This table gives every name of that header: what it was, what it is in Linux 6.18, and where it
lives in aiouffd.
Values are in hexadecimal and come from aiouffd's own tables, which tests compare with the
machine's header and with the running kernel.
"""

_EPILOGUE: Final = """\
## The fault word

The 2015 message lives on as the *fault word*, the compact record of a fault in traces and
working sets.
It is one u64: the page's address, and in the bits below the page size WRITE (1), WP (2) and,
added since, MINOR (4).
`aiouffd.events.fault_word` packs it, `aiouffd.events.decode_fault_word` takes it apart and
refuses a word with any other low bit.

```pycon
>>> from aiouffd.events import decode_fault_word, fault_word
>>> hex(fault_word(0x7F0000001234, 1))
'0x7f0000001001'
>>> decode_fault_word(0x7F0000001001) == (0x7F0000001000, 1)
True

```
"""


def _cell(value: int | struct.Struct | None) -> str:
    if value is None:
        return ""
    return f"{value.size} bytes" if isinstance(value, struct.Struct) else f"`0x{value:X}`"


def page() -> str:
    """Write the page of the documentation, in Markdown."""
    rows = ["| name | in 2015 | today | value today | in aiouffd |", "|---|---|---|---|---|"]
    for name, then, today, value, places in NAMES:
        where = ", ".join(f"`{place.replace(':', '.')}`" for place in places)
        rows.append(f"| `{name}` | {then} | {today} | {_cell(value)} | {where} |")
    return "\n".join([_INTRODUCTION, *rows, "", _EPILOGUE])


if __name__ == "__main__":
    sys.stdout.write(page())
