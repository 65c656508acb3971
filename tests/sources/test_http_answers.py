"""What a web server's answer says: tables, and round trips by Hypothesis."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiouffd.sources.http_answers import ContentRange, Generation, may_help_later, retry_after

NOW = datetime(2026, 11, 22, 12, 0, 0, tzinfo=UTC)


@given(st.integers(0, 1 << 60), st.integers(1, 1 << 40), st.integers(0, 1 << 62))
def test_a_content_range_is_read_as_it_was_written(start: int, length: int, size: int) -> None:
    """Start, length and size come back."""
    text = f"bytes {start}-{start + length - 1}/{size}"
    assert ContentRange.parse(text) == ContentRange(start, length, size)


@given(st.text())
def test_anything_else_is_no_content_range(text: str) -> None:
    """Whatever a server sends, reading it raises nothing."""
    found = ContentRange.parse(text)
    assert found is None or text.strip().lower().startswith("bytes")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (None, None),
        ("", None),
        ("bytes */0", ContentRange(-1, 0, 0)),
        ("bytes */17", ContentRange(-1, 0, 17)),
        ("BYTES  0-0/1", ContentRange(0, 1, 1)),
        ("bytes 0-0/*", None),
        ("items 0-0/1", None),
        ("bytes 0-0/1, 2-3/4", None),
        ("bytes -1-0/1", None),
        ("bytes 0-0/" + "9" * 5000, None),
        ("bytes 0-0/\N{ARABIC-INDIC DIGIT ONE}", None),
    ],
)
def test_content_ranges(text: str | None, found: ContentRange | None) -> None:
    """The forms that servers send, and those that say too little."""
    assert ContentRange.parse(text) == found


STRONG = Generation(8, '"a"', "then")
WEAK = Generation(8, 'W/"a"', "then")
DATED = Generation(8, "", "then")


@pytest.mark.parametrize(
    ("one", "other", "differs"),
    [
        (STRONG, STRONG, ""),
        (STRONG, Generation(9, '"a"', "then"), "size"),
        (STRONG, Generation(8, '"b"', "then"), "ETag"),
        (STRONG, Generation(8, '"a"', "later"), ""),  # servers behind one name, each its own time
        (STRONG, Generation(8, 'W/"a"', "then"), "ETag"),
        (WEAK, WEAK, ""),
        (WEAK, Generation(8, 'W/"a"', "later"), "Last-Modified"),
        (WEAK, Generation(8, 'W/"b"', "then"), "ETag"),
        (DATED, DATED, ""),
        (DATED, Generation(8, "", "later"), "Last-Modified"),
    ],
)
def test_generations_that_differ(one: Generation, other: Generation, differs: str) -> None:
    """Any difference that proves a change is named."""
    assert bool(one.difference(other)) == bool(differs)
    assert differs in one.difference(other)


def test_what_a_generation_asks_the_server_for() -> None:
    """A strong ETag by If-Match; without one the time; a weak ETag is no condition."""
    assert STRONG.condition == {"If-Match": '"a"'}
    assert WEAK.condition == DATED.condition == {"If-Unmodified-Since": "then"}
    assert Generation(8, 'W/"a"', "").condition == {}
    assert not Generation(8, "", "").known
    assert Generation(8, 'W/"a"', "").known


def test_an_answer_without_validators_shows_nothing() -> None:
    """What was pinned by an ETag is shown only by one, and likewise the time."""
    assert STRONG.is_shown_by(Generation(8, '"b"', ""))
    assert not STRONG.is_shown_by(DATED)
    assert DATED.is_shown_by(DATED)
    assert not DATED.is_shown_by(Generation(8, '"a"', ""))


def test_identities_differ_by_image_and_generation() -> None:
    """Same time and length at another URL is another image."""
    found = {
        STRONG.identity("a"),
        STRONG.identity("b"),
        WEAK.identity("a"),
        Generation(9, '"a"', "then").identity("a"),
    }
    assert len(found) == 4
    assert all(" " not in each for each in found)
    assert STRONG.identity("a") == Generation(8, '"a"', "later").identity("a")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (None, 0),
        ("", 0),
        ("7", 7),
        ("-7", 0),
        ("soon", 0),
        ("Sun, 22 Nov 2026 12:00:30 GMT", 30),
        ("Sun, 22 Nov 2026 12:00:30 -0000", 30),
        ("Sun, 22 Nov 2026 11:00:30 GMT", 0),
        ("9" * 400, 999_999_999),
        ("Sun, 22 Nov 99999999999999999999 12:00:30 GMT", 0),
    ],
)
def test_retry_after(text: str | None, seconds: float) -> None:
    """Seconds, a date, or nothing usable."""
    assert retry_after(text, NOW) == seconds


@given(st.text())
def test_no_retry_after_raises(text: str) -> None:
    """Whatever a server sends, it is a time to wait."""
    assert retry_after(text) >= 0


def test_which_statuses_may_help_later() -> None:
    """Overload and outages, not refusals."""
    later = {status for status in range(200, 600) if may_help_later(status)}
    assert {408, 425, 429, 500, 502, 503, 504} <= later
    assert not later & {200, 206, 400, 401, 403, 404, 410, 412, 416, 501, 505}
