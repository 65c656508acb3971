"""Recording: what is written down, what is not, and that it survives."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from aiouffd import PageFault, Removed, Resolution, Zero
from aiouffd import recording as module
from aiouffd.ranges import Range
from aiouffd.recording import Recorder, Recording
from aiouffd.working_set import GRANULE, Records, WorkingSet
from tests.serving import LAYOUT, MADV_DONTNEED, Gate, from_image, image, serving
from tests.targets import PAGE, until

SIZE = 64 * PAGE


@contextlib.asynccontextmanager
async def recording(path: Path, **settings: Any) -> AsyncIterator[Recording]:
    defaults: dict[str, Any] = {"identity": "image-1", "image_size": SIZE}
    one = Recording(path, **defaults | settings)
    try:
        yield one
    finally:
        await one.aclose()


def offsets(path: Path) -> list[int]:
    with path.open("rb") as file:
        return [one.offset // PAGE for one in Records(file)]


def fault(page: int, length: int = PAGE, flags: int = 0) -> PageFault:
    return PageFault(0x7F00_0000_0000 + page * PAGE, page * PAGE, length, flags)


async def test_what_a_target_takes_is_recorded_once_and_in_order(tmp_path: Path) -> None:
    """Pages that were waited for; not those brought before, nor zeros, nor duplicates."""

    async def some_zero(fault: PageFault) -> Resolution:
        return Zero() if fault.offset == 20 * PAGE else await from_image(fault)

    path = tmp_path / "set"
    async with (
        recording(path) as one,
        serving(some_zero, features=LAYOUT, observers=[one]) as served,
    ):
        target = served.target
        assert await served.region.fill(8 * PAGE, image(8 * PAGE, 8 * PAGE)) == 8 * PAGE
        for page in (30, 9, 3, 20):
            assert await target.start_read(page) == (0 if page == 20 else page + 1)
        assert await target.start_write(40, 7) == 7
        # Removed and touched again: zeros, which are not the image's.
        assert await target.start_madvise(MADV_DONTNEED, page=30, pages=3) == 0
        assert await target.start_read(30) == 0
        assert await target.start_read(31) == 0
    assert offsets(path) == [30, 3, 40]
    with path.open("rb") as file:
        records = Records(file)
        found = list(records)
        assert records.header.identity == "image-1"
        assert records.header.window == 30.0
    assert [one.flags for one in found] == [0, 0, 1]
    assert [one.seconds for one in found] == sorted(one.seconds for one in found)


async def test_a_fault_on_a_page_that_is_just_being_brought_is_recorded(tmp_path: Path) -> None:
    """Its thread asked for it: replay came too late."""
    gate = Gate()
    path = tmp_path / "set"
    async with recording(path) as one, serving(gate, observers=[one]) as served:
        touch = served.target.start_read(5)
        await until(lambda: gate.faults, "the handler is asked")
        assert await served.region.fill(4 * PAGE, image(4 * PAGE, 4 * PAGE)) == 4 * PAGE
        assert await touch == 6
        gate.let_go()
        await until(lambda: not served.pager.in_flight, "the fault has ended")
    assert offsets(path) == [5]


async def test_a_failed_page_is_not_recorded(tmp_path: Path) -> None:
    """It took nothing."""
    async with recording(tmp_path / "set") as one:
        one.begin(fault(1))
        one.failure(fault(1), RuntimeError())
        one.end(fault(1), "poison", 1000)
        one.event(Removed(Range(0, PAGE)))
        assert not one.pages


async def test_huge_pages_and_ends_of_images(tmp_path: Path) -> None:
    """A huge page is so many granules, as far as the image goes."""
    path = tmp_path / "set"
    async with recording(path, image_size=700 * GRANULE - 5, page_size=2 << 20) as one:
        one.end(fault(512, 2 << 20), "copy", 1000)
        one.end(fault(1024, 2 << 20), "copy", 1000)
    assert list(WorkingSet.load(path).runs()) == [(512, 188)]


async def test_the_file_is_valid_while_it_grows(tmp_path: Path) -> None:
    """What was recorded some tenths of a second ago is there, whatever becomes of the server."""
    path = tmp_path / "set"
    async with recording(path) as one:
        assert not WorkingSet.load(path)
        one.end(fault(3), "copy", 1000)
        await until(lambda: 3 in WorkingSet.load(path), "it is written without being closed")
        one.end(fault(4), "copy", 1000)
    assert offsets(path) == [3, 4]
    assert os.listdir(tmp_path) == ["set"]


async def test_the_window_ends_it(tmp_path: Path) -> None:
    """A target that lives long teaches nothing more."""
    path = tmp_path / "set"
    async with recording(path, window=0.0) as one:
        one.end(fault(3), "copy", 1000)
        await until(lambda: not one._open, "the window has ended")
        one.end(fault(4), "copy", 1000)
    assert offsets(path) == [3]


async def test_a_set_that_is_most_of_the_image_warns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Such a recording was open too long."""
    async with recording(tmp_path / "half") as one:
        for page in range(32):
            one.end(fault(page), "copy", 1000)
    assert not caplog.records
    async with recording(tmp_path / "more") as one:
        for page in range(33):
            one.end(fault(page), "copy", 1000)
    assert "52 % of the image" in caplog.text


async def test_a_disk_that_fails_ends_the_recording_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One line in the log; faults go on."""
    async with recording(tmp_path / "set") as one:
        with open("/dev/null", "rb") as unwritable:
            os.dup2(unwritable.fileno(), one._fd)
        one.end(fault(3), "copy", 1000)
        await until(lambda: not one._open, "the error is noticed")
        one.end(fault(4), "copy", 1000)
    assert "the recording ends here" in caplog.text


async def test_a_disk_that_stands_still_ends_the_recording(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waits to be written is bounded."""
    monkeypatch.setattr(module, "_MOST_WAITING", 100)
    async with recording(tmp_path / "set") as one:
        for page in range(10):
            one.end(fault(page), "copy", 1000)
        await until(lambda: not one._open, "it is given up")
    assert "the disk is too slow" in caplog.text


async def test_one_file_per_session_or_the_first_session_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """``{id}`` makes the difference; a file that cannot be written costs a line."""
    about: dict[str, Any] = {"identity": "", "image_size": SIZE, "page_size": PAGE}
    each = Recorder(str(tmp_path / "set-{id}"))
    for number in ("1", "2"):
        one = each.begin(number, **about)
        assert one is not None
        await one.aclose()
    assert sorted(os.listdir(tmp_path)) == ["set-1", "set-2"]
    first = Recorder(str(tmp_path / "set"), window=3.0)
    one = first.begin("1", **about)
    assert one is not None
    await one.aclose()
    assert first.begin("2", **about) is None
    assert WorkingSet.load(tmp_path / "set").header.window == 3.0
    assert not caplog.records
    nowhere = Recorder(str(tmp_path / "nowhere" / "set"))
    with caplog.at_level(logging.ERROR):
        assert nowhere.begin("1", **about) is None
    assert "session 1 is not recorded" in caplog.text
    (tmp_path / "folder").mkdir()
    assert Recorder(str(tmp_path / "folder")).begin("1", **about) is None
    assert sorted(os.listdir(tmp_path)) == ["folder", "set", "set-1", "set-2"]


async def test_a_part_of_an_image_is_recorded_once(tmp_path: Path) -> None:
    """Five restores of one checkpoint: the first that touches a page is not forgotten."""
    about: dict[str, Any] = {"identity": "", "image_size": SIZE, "page_size": PAGE}
    recorder = Recorder(str(tmp_path / "set-{part}"))
    for number, part, recorded in (("1", "7", True), ("2", "8", True), ("3", "7", False)):
        one = recorder.begin(number, part=part, **about)
        assert (one is not None) == recorded
        if one is not None:
            await one.aclose()
    assert sorted(os.listdir(tmp_path)) == ["set-7", "set-8"]


async def test_a_fault_waits_for_no_disk(tmp_path: Path) -> None:
    """Nothing is written on a fault's way."""
    async with recording(tmp_path / "set") as one:
        one.end(fault(1), "copy", 1000)
        assert not WorkingSet.load(tmp_path / "set")
    assert offsets(tmp_path / "set") == [1]
