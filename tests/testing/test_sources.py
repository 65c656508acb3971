"""The public contract of sources as a user runs it: it passes what is right, finds what is not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent

#: A user's own test file, away from this checkout: no settings, no conftest.
USER = """
import asyncio, contextlib
from aiouffd.errors import ClosedError
from aiouffd.sources import check_read
from aiouffd.testing.sources import SourceContract

class Right:
    identity = "mine"
    def __init__(self, data):
        self.data, self.size, self.closed, self.lock = data, len(data), False, asyncio.Lock()
    def read_nowait(self, offset, length):
        if self.closed:
            raise ClosedError("closed")
        check_read(offset, length, self.size)
        return None
    async def read(self, offset, length):
        self.read_nowait(offset, length)
        await asyncio.sleep(0)
        return self.data[offset:offset + length]
    def extents(self):
        if self.size:
            yield 0, self.size
    async def aclose(self):
        self.closed = True

class GivesLess(Right):
    async def read(self, offset, length):
        return (await super().read(offset, length))[:8192]

class OneBufferForAll(Right):
    buffer = bytearray(1 << 20)
    async def read(self, offset, length):
        self.buffer[:length] = await super().read(offset, length)
        return memoryview(self.buffer)[:length]

class DropsReads(Right):
    async def read(self, offset, length):
        data = await super().read(offset, length)
        self.read_nowait(offset, length)
        return data

class WrongHole(Right):
    def extents(self):
        yield 0, 1

class KeepsItsLock(Right):
    async def read(self, offset, length):
        async with asyncio.timeout(0.1):
            await self.lock.acquire()
        data = await super().read(offset, length)
        self.lock.release()
        return data

class Mine(SourceContract):
    @contextlib.asynccontextmanager
    async def source_of(self, data):
        yield self.kind(data)

class TestRight(Mine): kind = Right
class TestGivesLess(Mine): kind = GivesLess
class TestOneBufferForAll(Mine): kind = OneBufferForAll
class TestDropsReads(Mine): kind = DropsReads
class TestWrongHole(Mine): kind = WrongHole
class TestKeepsItsLock(Mine): kind = KeepsItsLock
"""


def test_the_contract_tells_right_from_wrong(tmp_path: Path) -> None:
    """A source that keeps it passes; one that breaks a clause fails that clause's test."""
    (tmp_path / "test_mine.py").write_text(USER)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rfE",
        "--tb=no",
        "-p",
        "pytest_asyncio.plugin",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", "test_mine.py"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        cwd=tmp_path,
        env=environment,
        text=True,
        timeout=60,
    )
    failed = {
        tuple(line.split("::", 1)[1].split(" ")[0].partition("[")[0].split("::"))
        for line in done.stdout.splitlines()
        if line.startswith(("FAILED", "ERROR"))
    }
    assert failed >= {
        ("TestGivesLess", "test_reads_give_the_bytes_at_their_offset"),
        ("TestOneBufferForAll", "test_an_answer_stays_as_it_is"),
        ("TestDropsReads", "test_closing_lets_reads_in_flight_end"),
        ("TestWrongHole", "test_extents_ascend_and_leave_out_only_zeros"),
        ("TestKeepsItsLock", "test_a_cancelled_read_harms_nobody"),
    }, done.stdout
    assert not [test for test in failed if test[0] == "TestRight"], done.stdout
    assert " passed" in done.stdout


def test_without_pytest_the_extra_is_named() -> None:
    """Importing it says what to install; importing aiouffd needs nothing."""
    code = (
        "import sys; sys.modules['pytest'] = None\n"
        "import aiouffd, aiouffd.testing\n"
        "try:\n    import aiouffd.testing.sources\n"
        "except ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        check=True,
        cwd=ROOT,
        text=True,
        timeout=60,
    )
    assert "pip install 'aiouffd[pytest]'" in done.stdout
