"""The package's front door: every public name through it, and nothing heavy behind it."""

from __future__ import annotations

import subprocess
import sys

import aiouffd


def test_every_public_name_is_there_once() -> None:
    """What ``__all__`` promises is what the table of homes has, and each name resolves."""
    assert sorted(aiouffd.__all__) == sorted(aiouffd._HOMES)
    for name in aiouffd.__all__:
        assert getattr(aiouffd, name) is not None
    assert set(aiouffd.__all__) <= set(dir(aiouffd))


def test_an_unknown_name_is_an_attribute_error() -> None:
    """As with any module."""
    assert not hasattr(aiouffd, "no_such_name")


def test_importing_costs_next_to_nothing() -> None:
    """The command line and pytest plugins import the package without asyncio and ctypes."""
    code = "import sys, aiouffd; print({'asyncio', 'ctypes', 'socket'} & set(sys.modules))"
    run = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, timeout=30, check=True
    )
    assert run.stdout.strip() == "set()"
