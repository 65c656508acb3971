"""Progress: silent at first, one line on a terminal, lines elsewhere if they are wanted."""

from __future__ import annotations

import io

import pytest

from aiouffd.cli.progress import Progress, amount, counted


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1.0 KiB"),
        (1536 << 20, "1.5 GiB"),
        (1 << 63, "8192.0 PiB"),
    ],
)
def test_amounts_are_for_people(count: int, text: str) -> None:
    """Bytes up to 1023, then one digit behind the point."""
    assert amount(count) == text


def test_what_is_quick_says_nothing() -> None:
    """Nothing is written in the first two seconds."""
    stream, now = _Terminal(), 0.0
    progress = Progress("packing", stream=stream, clock=lambda: now)
    for now in (0.0, 1.0, 1.99):  # noqa: B007 - the clock reads it
        progress(10, 100)
    progress.end()
    assert stream.getvalue() == ""


def test_a_terminal_shows_one_line_that_goes_away() -> None:
    """A line replaces the one before, at most twice a second, and nothing of it is left."""
    stream, now = _Terminal(), 0.0
    progress = Progress("packing", stream=stream, clock=lambda: now)
    now = 2.0
    progress(1 << 30, 4 << 30)
    first = "packing: 1.0 GiB of 4.0 GiB, 25%, 512.0 MiB/s, 0:00:06 left"
    assert stream.getvalue() == f"\r{first}"
    now = 2.4
    progress(2 << 30, 4 << 30)
    assert stream.getvalue() == f"\r{first}"
    now = 2.5
    progress(0, 4 << 30)
    second = "packing: 0 bytes of 4.0 GiB, 0%, 0 bytes/s"
    assert stream.getvalue() == f"\r{first}\r{second.ljust(len(first))}"
    progress.end()
    assert stream.getvalue().endswith("\r" + " " * len(second) + "\r")


@pytest.mark.parametrize("wanted", [True, False])
def test_elsewhere_there_are_lines_if_they_are_wanted(wanted: bool) -> None:
    """In a file nothing is written unasked, and a line every five seconds if asked."""
    stream, now = io.StringIO(), 0.0
    progress = Progress("reading", wanted=wanted, stream=stream, clock=lambda: now)
    for now in (2.0, 3.0, 6.9, 7.0):  # noqa: B007 - the clock reads it
        progress(7200, 14400)
    progress.end()
    lines = stream.getvalue().splitlines()
    assert len(lines) == (2 if wanted else 0)
    assert all(line.startswith("reading: 7.0 KiB of 14.1 KiB, 50%") for line in lines)


def test_one_is_no_plural() -> None:
    """Whether they are many or none."""
    words = [counted(number, "process", "processes") for number in range(3)]
    assert words == ["0 processes", "1 process", "2 processes"]
