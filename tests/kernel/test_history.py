"""The page about the header of 2015: complete, up to date, and true to the code."""

from __future__ import annotations

import doctest
import importlib
import operator
import subprocess
import sys
from pathlib import Path

import pytest

from aiouffd.kernel import abi, history

PAGE = Path(__file__).parents[2] / "docs" / "uapi-2015.md"


def test_the_committed_page_is_the_one_the_code_writes() -> None:
    """If this fails: python -m aiouffd.kernel.history > docs/uapi-2015.md"""
    assert PAGE.read_text(encoding="utf-8") == history.page()


def test_the_module_prints_the_page() -> None:
    """The command named at the top of the page makes it."""
    command = (sys.executable, "-m", "aiouffd.kernel.history")
    printed = subprocess.run(command, capture_output=True, check=True, text=True, timeout=60).stdout
    assert printed == history.page()


@pytest.mark.parametrize("name", history.NAMES, ids=lambda name: name.name)
def test_every_place_exists(name: history.Name) -> None:
    """Each object that the page names can be imported, and has the value that it shows."""
    assert name.places
    values = []
    for place in name.places:
        module, _, path = place.partition(":")
        values.append(operator.attrgetter(path)(importlib.import_module(module)))
    if name.value is not None:
        assert name.value in values


def test_no_name_of_the_header_is_left_out() -> None:
    """Every macro, struct and mode of the header has a row."""
    rows = " ".join(name.name for name in history.NAMES)
    for word in (
        "0xAA 00-3F",
        "UFFD_API",
        "UFFD_API_BITS",
        "UFFD_API_IOCTLS",
        "UFFD_API_RANGE_IOCTLS",
        "_UFFDIO_REGISTER",
        "UFFDIO_API",
        "UFFDIO_REGISTER",
        "UFFDIO_UNREGISTER",
        "UFFDIO_WAKE",
        "UFFD_BIT_WRITE",
        "UFFD_BIT_WP",
        "UFFD_BITS",
        "struct uffdio_api",
        "uffdio_api.bits",
        "struct uffdio_range",
        "struct uffdio_register",
        "UFFDIO_REGISTER_MODE_MISSING",
        "UFFDIO_REGISTER_MODE_WP",
        "u64",
    ):
        assert word in rows


def test_what_has_not_changed_since_2015() -> None:
    """The values of the header, as it was posted, are still ours where the page says so."""
    assert abi.UFFD_API == 0xAA
    assert abi.UFFD_API_IOCTLS == 1 << 0x00 | 1 << 0x01 | 1 << 0x3F
    assert (abi.UFFD_PAGEFAULT_FLAG_WRITE, abi.UFFD_PAGEFAULT_FLAG_WP) == (1, 2)
    assert (abi.UFFDIO_REGISTER_MODE_MISSING, abi.UFFDIO_REGISTER_MODE_WP) == (1, 2)
    sizes = (abi.UFFDIO_API_STRUCT, abi.UFFDIO_RANGE_STRUCT, abi.UFFDIO_REGISTER_STRUCT)
    assert [layout.size for layout in sizes] == [24, 16, 32]


def test_the_pages_examples_are_true() -> None:
    """What the page shows at the Python prompt happens."""
    failed, tried = doctest.testfile(str(PAGE), module_relative=False)
    assert (failed, tried) == (0, 3)
