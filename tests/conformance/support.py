"""Small steps that many conformance tests take."""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pytest

from aiouffd import Userfaultfd
from aiouffd.events import Message
from aiouffd.kernel import abi
from tests.targets import HUGE, KINDS, SMALL_KINDS, Target, wait_until

ALL = pytest.mark.parametrize("kind", KINDS)
SMALL = pytest.mark.parametrize("kind", SMALL_KINDS)

MISSING = abi.UFFDIO_REGISTER_MODE_MISSING
WP = abi.UFFDIO_REGISTER_MODE_WP
MINOR = abi.UFFDIO_REGISTER_MODE_MINOR

EVENT_FORK = abi.UFFD_FEATURE_EVENT_FORK
EVENT_REMAP = abi.UFFD_FEATURE_EVENT_REMAP
EVENT_REMOVE = abi.UFFD_FEATURE_EVENT_REMOVE
EVENT_UNMAP = abi.UFFD_FEATURE_EVENT_UNMAP
SIGBUS = abi.UFFD_FEATURE_SIGBUS
WP_FEATURES = abi.UFFD_FEATURE_PAGEFAULT_FLAG_WP | abi.UFFD_FEATURE_WP_HUGETLBFS_SHMEM

MADV_REMOVE = 9
MADV_DONTNEED = 4

M = TypeVar("M")

THP = Path("/sys/kernel/mm/transparent_hugepage")


def thp_sizes() -> list[int]:
    """Sizes of transparent huge pages that private anonymous memory can have, in bytes."""
    sizes = [
        int(folder.name.removeprefix("hugepages-").removesuffix("kB")) * 1024
        for folder in THP.glob("hugepages-*")
        if (folder / "enabled").exists()
    ]
    return sorted(sizes) or [HUGE]


class MakeMemory(Protocol):
    def __call__(
        self, kind: str, pages: int = 0, **settings: Any
    ) -> contextlib.AbstractContextManager[tuple[Target, Userfaultfd]]: ...


def selftest(file: str, name: str, asserts: str, *, on: str = "anon") -> pytest.MarkDecorator:
    """Name the kernel selftest that a test re-tells; ``on`` which memory if not by parameter."""
    return pytest.mark.selftest(file, name, asserts, on=on)


def unit(name: str, asserts: str, *, on: str = "anon") -> pytest.MarkDecorator:
    """A test of uffd-unit-tests.c."""
    return selftest("uffd-unit-tests.c", name, asserts, on=on)


def page_bytes(target: Target, page: int) -> bytes:
    """What a page of a test image holds: its number plus one, as u64s."""
    return (page + 1).to_bytes(8, "little") * (target.page_size // 8)


def release_advice(target: Target) -> int:
    """The madvise after which pages read zero: shared memory keeps its file's pages otherwise."""
    return MADV_REMOVE if target.kind in {"shmem", "hugetlb"} else MADV_DONTNEED


def read_one(uffd: Userfaultfd, kind: type[M]) -> M:
    """Wait for one message of a kind, and take it; others are a failure."""
    messages: list[Message] = []

    def arrived() -> bool:
        messages.extend(uffd.read())
        return bool(messages)

    wait_until(arrived, f"a {kind.__name__} message")
    assert len(messages) == 1, messages
    message = messages[0]
    assert isinstance(message, kind)
    return message


def read_everything(uffd: Userfaultfd) -> list[Message]:
    """Take every message that is there now."""
    messages: list[Message] = []
    while batch := uffd.read():
        messages.extend(batch)
    return messages


def smaps_kib(target: Target, field: str, address: int) -> int:
    """A field of the mapping that holds an address, in KiB."""
    inside = False
    with open(f"/proc/{target.pid}/smaps", encoding="utf-8") as file:
        for line in file:
            first = line.split(maxsplit=1)[0]
            if "-" in first and not first.endswith(":"):
                low, _, high = first.partition("-")
                inside = int(low, 16) <= address < int(high, 16)
            elif inside and first == f"{field}:":
                return int(line.split()[1])
    raise LookupError(field)


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def pin_read_only(pid: int, address: int, length: int = 8) -> bytes:
    """Read another process's memory through a read-only page pin (FOLL_PIN), which unshares.

    Kernel: process_vm_readv(2).
    """
    libc: Any = ctypes.CDLL(None, use_errno=True)
    data = ctypes.create_string_buffer(length)
    local = _IoVec(ctypes.addressof(data), length)
    remote = _IoVec(address, length)
    done = libc.process_vm_readv(pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
    if done < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), "process_vm_readv")
    return data.raw[:done]
