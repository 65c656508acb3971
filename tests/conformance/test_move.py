"""UFFDIO_MOVE, as uffd-unit-tests.c checks it; ``moving.py`` does it, in its own process."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from tests.conformance.support import unit
from tests.targets import DEADLINE

_PROGRAM = Path(__file__).with_name("moving.py")


async def check(name: str) -> None:
    loop = "uvloop" if "uvloop" in type(asyncio.get_running_loop()).__module__ else "asyncio"
    process = await asyncio.create_subprocess_exec(sys.executable, _PROGRAM, name, loop)
    try:
        assert await asyncio.wait_for(process.wait(), 3 * DEADLINE) == 0
    except TimeoutError:
        process.kill()
        await process.wait()
        raise


@pytest.mark.root
@unit("move", "each fault is answered by moving one page; the source reads zero afterwards")
async def test_move() -> None:
    """A page at a time moves in on demand."""
    await check("move")


@pytest.mark.root
@unit("move-pmd", "the same by huge pages: one fault each, moved whole")
async def test_move_pmd() -> None:
    """A transparent huge page moves as one, and is one afterwards."""
    await check("move-pmd")


@pytest.mark.root
@unit("move-pmd-split", "from huge pages into memory without: the source is split")
async def test_move_pmd_split() -> None:
    """Where the destination has no huge pages the source's are split."""
    await check("move-pmd-split")


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the child import this checkout."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
