"""The numbers, against the machine's own header and against the running kernel."""

from __future__ import annotations

import errno
import fcntl
import functools
import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from aiouffd.kernel import abi, calls, gates
from tests.kernel import header

SCAN_FIELDS = (
    "size flags start end walk_end vec vec_len max_pages"
    " category_inverted category_mask category_anyof_mask return_mask"
)

#: C struct: (macro that says the header has it, our layout, C fields with output ones last).
STRUCTS = {
    "struct uffdio_api": ("UFFDIO_API", abi.UFFDIO_API_STRUCT, "api features ioctls"),
    "struct uffdio_range": ("UFFDIO_WAKE", abi.UFFDIO_RANGE_STRUCT, "start len"),
    "struct uffdio_register": (
        "UFFDIO_REGISTER",
        abi.UFFDIO_REGISTER_STRUCT,
        "range.start range.len mode ioctls",
    ),
    "struct uffdio_copy": ("UFFDIO_COPY", abi.UFFDIO_COPY_STRUCT, "dst src len mode copy"),
    "struct uffdio_move": ("UFFDIO_MOVE", abi.UFFDIO_MOVE_STRUCT, "dst src len mode move"),
    "struct uffdio_zeropage": (
        "UFFDIO_ZEROPAGE",
        abi.UFFDIO_ZEROPAGE_STRUCT,
        "range.start range.len mode zeropage",
    ),
    "struct uffdio_continue": (
        "UFFDIO_CONTINUE",
        abi.UFFDIO_CONTINUE_STRUCT,
        "range.start range.len mode mapped",
    ),
    "struct uffdio_poison": (
        "UFFDIO_POISON",
        abi.UFFDIO_POISON_STRUCT,
        "range.start range.len mode updated",
    ),
    "struct uffdio_writeprotect": (
        "UFFDIO_WRITEPROTECT",
        abi.UFFDIO_WRITEPROTECT_STRUCT,
        "range.start range.len mode",
    ),
    "struct pm_scan_arg": (
        "PAGEMAP_SCAN",
        abi.PM_SCAN_ARG_STRUCT,
        SCAN_FIELDS,
    ),
    "struct page_region": ("PAGEMAP_SCAN", abi.PAGE_REGION_STRUCT, "start end categories"),
}
MESSAGES = {
    "PAGEFAULT": (
        abi.UFFD_MSG_PAGEFAULT,
        "event arg.pagefault.flags arg.pagefault.address arg.pagefault.feat.ptid",
    ),
    "FORK": (abi.UFFD_MSG_FORK, "event arg.fork.ufd"),
    "REMAP": (abi.UFFD_MSG_REMAP, "event arg.remap.from arg.remap.to arg.remap.len"),
    "REMOVE": (abi.UFFD_MSG_RANGE, "event arg.remove.start arg.remove.end"),
}

#: Sets that grow with the kernel: the machine's header may know less or more.
OPEN_ENDED = {
    "UFFD_API_FEATURES",
    "UFFD_API_IOCTLS",
    "UFFD_API_RANGE_IOCTLS",
    "UFFD_API_RANGE_IOCTLS_BASIC",
    "UFFD_API_REGISTER_MODES",
}

#: What abi.py calls otherwise than the header, or has from elsewhere.
OTHER_NAMES = {
    "NR_USERFAULTFD": "__NR_userfaultfd",
    "NR_TGKILL": "__NR_tgkill",
    "NR_MADVISE": "__NR_madvise",
}


def our_constants() -> dict[str, int]:
    """Every number of abi.py that a header could have."""
    found = {
        name: value for name, value in vars(abi).items() if name.isupper() and type(value) is int
    }
    found |= {f"_UFFDIO_{name}": entry[0] for name, entry in abi.IOCTLS.items()}
    return found


def members(layout: struct.Struct) -> list[tuple[int, int]]:
    """Offset and size of each value of a layout."""
    found, offset = [], 0
    for count, kind in re.findall(r"(\d*)([a-zA-Z])", layout.format):
        for _ in range(1 if kind == "x" else int(count or 1)):
            size = int(count or 1) if kind == "x" else struct.calcsize("=" + kind)
            if kind != "x":
                found.append((offset, size))
            offset += size
    assert offset == layout.size
    return found


@functools.cache
def answers() -> dict[str, int]:
    """What the machine's headers say, asked once."""
    constants = {name: OTHER_NAMES.get(name, name) for name in our_constants()}
    constants["VERSION"] = "LINUX_VERSION_CODE"
    guarded: dict[str, tuple[str, str]] = {}
    for name, (macro, _, fields) in STRUCTS.items():
        guarded[f"{name.replace(' ', '_')}"] = (macro, f"sizeof({name})")
        guarded |= measured(name, macro, fields)
    for event, (_, fields) in MESSAGES.items():
        guarded |= measured("struct uffd_msg", f"UFFD_EVENT_{event}", fields)
    guarded["struct_uffd_msg"] = ("UFFD_API", "sizeof(struct uffd_msg)")
    return header.ask(constants, guarded)


def measured(name: str, macro: str, fields: str) -> dict[str, tuple[str, str]]:
    """Expressions for the offset and the size of each field of a struct."""
    found = {}
    for field in fields.split():
        key = f"{name.replace(' ', '_')}.{field}"
        found[f"{key}@"] = (macro, f"offsetof({name}, {field})")
        found[f"{key}#"] = (macro, f"sizeof((({name} *)0)->{field})")
    return found


def test_every_constant_of_the_header_is_ours() -> None:
    """Each number that the machine's header defines is the one we have."""
    told = answers()
    ours = our_constants()
    compared = [name for name in ours if name in told]
    assert {
        name: hex(told[name])
        for name in compared
        if name not in OPEN_ENDED and told[name] != ours[name]
    } == {}
    for name in OPEN_ENDED & set(compared):
        known, machine = ours[name], told[name]
        assert known & machine in (known, machine), f"{name}: neither contains the other"
    assert len(compared) > 55  # the header of Linux 6.1 has this many
    assert {"UFFDIO_WAKE", "UFFDIO_UNREGISTER", "NR_USERFAULTFD", "_UFFDIO_API"} <= set(compared)


def test_no_name_of_the_header_is_missing() -> None:
    """Each macro of the machine's header has its place in abi.py."""
    if answers()["VERSION"] >= 7 << 16:
        pytest.skip("headers newer than Linux 6 may have more names: extend kernel/abi.py by them")
    text = Path("/usr/include/linux/userfaultfd.h").read_text(encoding="ascii")
    names = set(re.findall(r"^#define\s+(\w+)", text, re.MULTILINE)) - {"_LINUX_USERFAULTFD_H"}
    assert names - set(our_constants()) == set()


@pytest.mark.parametrize("name", STRUCTS)
def test_a_layout_is_what_the_compiler_lays_out(name: str) -> None:
    """Size, and offset and size of every field, are those of the C struct, if it is there."""
    macro, layout, fields = STRUCTS[name]
    told = answers()
    key = name.replace(" ", "_")
    if key not in told:  # an older header; the ioctl's number, which has the size, is checked below
        assert macro in ("UFFDIO_MOVE", "UFFDIO_POISON", "PAGEMAP_SCAN")
        return
    assert told[key] == layout.size
    assert [(told[f"{key}.{field}@"], told[f"{key}.{field}#"]) for field in fields.split()] == (
        members(layout)
    )


@pytest.mark.parametrize("event", MESSAGES)
def test_a_message_is_what_the_compiler_lays_out(event: str) -> None:
    """Each event's form has the size of struct uffd_msg, and its fields at their offsets."""
    layout, fields = MESSAGES[event]
    told = answers()
    assert layout.size == abi.UFFD_MSG_SIZE == told["struct_uffd_msg"]
    assert [
        (told[f"struct_uffd_msg.{field}@"], told[f"struct_uffd_msg.{field}#"])
        for field in fields.split()
    ] == members(layout)


def test_the_numbers_of_linux_6_18() -> None:
    """The ioctl numbers are these; a wrong size or direction would show here."""
    assert {name: entry[1] for name, entry in abi.IOCTLS.items()} == {
        "REGISTER": 0xC020AA00,
        "UNREGISTER": 0x8010AA01,
        "WAKE": 0x8010AA02,
        "COPY": 0xC028AA03,
        "ZEROPAGE": 0xC020AA04,
        "MOVE": 0xC028AA05,
        "WRITEPROTECT": 0xC018AA06,
        "CONTINUE": 0xC020AA07,
        "POISON": 0xC020AA08,
        "API": 0xC018AA3F,
    }
    assert abi.PAGEMAP_SCAN == 0xC0606610
    assert abi.USERFAULTFD_IOC_NEW == 0xAA00
    assert abi.UFFD_API_FEATURES == 0x1FFFF
    assert abi.UFFD_API_IOCTLS == 0x8000000000000003
    assert abi.UFFD_API_RANGE_IOCTLS == 0x1FC
    assert abi.UFFD_API_RANGE_IOCTLS_BASIC == 0x1CC
    assert list(abi.FEATURES.values()) == [1 << bit for bit in range(17)]
    assert list(abi.FEATURE_SINCE) == list(abi.FEATURES)


@pytest.fixture
def ready() -> Iterator[int]:
    """A userfaultfd after UFFDIO_API."""
    fd = gates.open_userfaultfd()
    calls.api(fd, 0)
    yield fd
    os.close(fd)


def refusal(fd: int, request: int) -> int:
    """The errno of an ioctl whose argument is unreadable."""
    with pytest.raises(OSError) as caught:
        fcntl.ioctl(fd, request, 0)
    return caught.value.errno or 0


@pytest.mark.parametrize("name", [name for name in abi.IOCTLS if name != "API"])
def test_the_kernel_knows_each_ioctl(ready: int, name: str) -> None:
    """A known number gets as far as reading its argument; another size or number does not."""
    request = abi.IOCTLS[name][1]
    assert refusal(ready, request) == errno.EFAULT
    assert refusal(ready, request + (8 << 16)) == errno.EINVAL
    assert refusal(ready, request ^ 1 << 30) == errno.EINVAL  # the other direction


def test_the_kernel_knows_the_handshake() -> None:
    """UFFDIO_API is known before it was done."""
    fd = gates.open_userfaultfd()
    try:
        assert refusal(fd, abi.UFFDIO_API) == errno.EFAULT
    finally:
        os.close(fd)


def test_the_kernel_knows_pagemap_scan() -> None:
    """PAGEMAP_SCAN is known and no other number; on other files there is no such ioctl."""
    fd = os.open("/proc/self/pagemap", os.O_RDONLY)
    try:
        assert refusal(fd, abi.PAGEMAP_SCAN) == errno.EFAULT
        assert refusal(fd, abi.PAGEMAP_SCAN + 1) == errno.EINVAL
    finally:
        os.close(fd)
    fd = os.open("/proc/self/status", os.O_RDONLY)
    try:
        assert refusal(fd, abi.PAGEMAP_SCAN) == errno.ENOTTY
    finally:
        os.close(fd)


def test_the_kernel_offers_the_features_we_name() -> None:
    """On Linux 6.18 the features word is exactly ours; a newer kernel may have more."""
    fd = gates.open_userfaultfd()
    try:
        available, ioctls = calls.api(fd, 0)
    finally:
        os.close(fd)
    release = tuple(int(part) for part in os.uname().release.split(".")[:2])
    named = {name: bit for name, bit in abi.FEATURES.items() if available & bit}
    expected = {
        name
        for name, since in abi.FEATURE_SINCE.items()
        if tuple(int(part) for part in since.split(".")) <= release
    }
    assert set(named) >= expected
    assert ioctls & abi.UFFD_API_IOCTLS == abi.UFFD_API_IOCTLS
    if release == (6, 18):
        assert available == abi.UFFD_API_FEATURES
        assert ioctls == abi.UFFD_API_IOCTLS


def test_names_show_every_bit() -> None:
    """Known bits have names in the table's order, unknown ones are shown and not dropped."""
    assert abi.names(0, abi.FEATURES) == ()
    assert abi.names(abi.UFFD_FEATURE_MOVE | 1, abi.FEATURES) == ("PAGEFAULT_FLAG_WP", "MOVE")
    assert abi.names(1 << 17 | 1 << 63 | 1 << 14, abi.FEATURES) == ("POISON", "bit 17", "bit 63")
    assert abi.names(0x1FF, abi.PAGE_CATEGORIES) == tuple(abi.PAGE_CATEGORIES)


@pytest.mark.parametrize(
    "machine, number",
    [("x86_64", 323), ("i686", 374), ("i386", 374), ("aarch64", 282), ("riscv64", 282)],
)
def test_the_system_calls_number_follows_the_machine(machine: str, number: int) -> None:
    """x86 has numbers of its own, everybody else the generic one."""
    program = (
        "import os\n"
        f"os.uname = lambda real=os.uname(): type(real)((*real[:4], {machine!r}))\n"
        "from aiouffd.kernel import abi\n"
        "print(abi.NR_USERFAULTFD)\n"
    )
    output = subprocess.run(
        [sys.executable, "-c", program], check=True, timeout=30, stdout=subprocess.PIPE
    ).stdout
    assert int(output) == number
