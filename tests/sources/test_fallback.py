"""FallbackSource: retries, time limits, the second source, and the way back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import pytest

from aiouffd.errors import ClosedError, SourceError
from aiouffd.sources import Source, fallback, identity_of
from aiouffd.sources.buffer import BufferSource
from aiouffd.sources.fallback import FallbackSource
from aiouffd.testing.sources import PAGE, SourceContract, as_bytes, image
from tests.serving import within
from tests.sources.slow import SlowSource, turns

if TYPE_CHECKING:
    from typing_extensions import Buffer

DATA = image(4 * PAGE)


class Moody(SlowSource):
    """Fails so many reads, then works."""

    def __init__(self, data: bytes, failures: int, error: Exception | None = None) -> None:
        super().__init__(data, wait=False)
        self.failures = failures
        self.mood = error if error is not None else SourceError("not in the mood")

    async def read(self, offset: int, length: int) -> Buffer:
        self.reads.append((offset, length))
        await asyncio.sleep(0)
        if self.failures:
            self.failures -= 1
            raise self.mood
        return self._data.read_nowait(offset, length)


class TestAlone(SourceContract):
    """A source that works at once."""

    @contextlib.asynccontextmanager
    async def source_of(self, data: bytes) -> AsyncIterator[Source]:
        """Nothing behind it."""
        source = FallbackSource(SlowSource(data, wait=False))
        yield source
        await source.aclose()


class TestFallenOver(SourceContract):
    """The first source always fails."""

    @contextlib.asynccontextmanager
    async def source_of(self, data: bytes) -> AsyncIterator[Source]:
        """All bytes come from the second."""
        first = Moody(data, 1 << 30)
        source = FallbackSource(first, BufferSource(data), retries=1, backoff=0)
        yield source
        await source.aclose()


@pytest.mark.parametrize("error", [SourceError("gone"), OSError(5, "EIO"), RuntimeError("bug")])
async def test_a_failed_read_is_tried_again(error: Exception) -> None:
    """Two failures and a success are a success, whatever was raised."""
    source = FallbackSource(Moody(DATA, 2, error), retries=2, backoff=0)
    assert as_bytes(await source.read(PAGE, PAGE)) == DATA[PAGE : 2 * PAGE]
    assert source.figures.retries == 2
    assert source.figures.failures == 0


async def test_without_a_second_source_the_last_error_is_raised(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """After all tries, with its cause; ten pages are one line in the log."""
    first = Moody(DATA, 30)
    source = FallbackSource(first, retries=2, backoff=0)
    for _ in range(10):
        with pytest.raises(SourceError, match=r"3 tries.*not in the mood") as raised:
            await source.read(0, PAGE)
        assert raised.value.__cause__ is first.mood
    assert len(caplog.records) == 1
    await source.read(0, PAGE)
    assert [record.message for record in caplog.records][1:] == ["the source answers again"]
    assert (source.figures.retries, source.figures.failures) == (20, 10)


async def test_the_second_source_takes_over_and_the_first_comes_back(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once fallen over, reads do not ask the first; when it is time, it is asked once."""
    first, second = Moody(DATA, 1 << 30), SlowSource(DATA, wait=False)
    source = FallbackSource(first, second, retries=2, backoff=0)
    for _ in range(10):
        assert as_bytes(await source.read(0, PAGE)) == DATA[:PAGE]
    assert len(first.reads) == 3
    assert len(second.reads) == 10
    assert len(caplog.records) == 1
    monkeypatch.setattr(fallback, "LEFT_ALONE", 0)
    source._ask_again_at = 0
    await asyncio.gather(*(source.read(0, PAGE) for _ in range(10)))
    assert len(first.reads) == 4  # it still fails, as one try has shown
    first.failures = 0
    source._ask_again_at = 0
    await source.read(0, PAGE)
    await turns()
    for _ in range(10):
        await source.read(0, PAGE)
    assert len(second.reads) == 21
    assert source.figures.fall_overs == 1
    assert source.figures.second_reads == 21
    assert len(caplog.records) == 2
    assert "answers again" in caplog.records[1].message


async def test_no_read_waits_to_find_out_that_the_first_still_hangs() -> None:
    """It is asked beside; closing does not wait for it either."""
    first = SlowSource(DATA)
    source = FallbackSource(first, BufferSource(DATA), retries=0, timeout=30)
    source._failing = True
    assert as_bytes(await within(source.read(0, 2 * PAGE))) == DATA[: 2 * PAGE]
    await turns()
    assert first.reads == [(0, PAGE)]
    assert as_bytes(await within(source.read(0, 2 * PAGE))) == DATA[: 2 * PAGE]
    assert first.reads == [(0, PAGE)]
    await within(source.aclose())
    assert (first.cancelled, first.closed) == (1, 1)


async def test_many_failing_reads_fall_over_once(caplog: pytest.LogCaptureFixture) -> None:
    """Reads that fail together are one change of state."""
    source = FallbackSource(Moody(DATA, 1 << 30), BufferSource(DATA), retries=0)
    await asyncio.gather(*(source.read(0, PAGE) for _ in range(50)))
    assert source.figures.fall_overs == 1
    assert len(caplog.records) == 1


async def test_a_try_has_a_time_limit() -> None:
    """A source that hangs has failed; what it was doing is cancelled."""
    first = SlowSource(DATA)
    source = FallbackSource(first, BufferSource(DATA), retries=1, backoff=0, timeout=0.001)
    assert as_bytes(await source.read(0, PAGE)) == DATA[:PAGE]
    assert source.figures.timeouts == first.cancelled == 2


async def test_when_both_fail_it_is_an_error() -> None:
    """The fallback's own error is told."""
    source = FallbackSource(Moody(DATA, 9), Moody(DATA, 9, OSError(5, "EIO")), retries=1, backoff=0)
    with pytest.raises(SourceError, match=r"the fallback too.*EIO"):
        await source.read(0, PAGE)
    assert source.figures.failures == 1


async def test_what_no_retry_cures_is_raised_at_once() -> None:
    """A closed source, or a read outside."""
    first = Moody(DATA, 9, ClosedError("closed"))
    source = FallbackSource(first, BufferSource(DATA))
    with pytest.raises(ClosedError):
        await source.read(0, PAGE)
    with pytest.raises(SourceError, match="outside"):
        await source.read(0, 5 * PAGE)
    assert len(first.reads) == 1


async def test_what_is_at_hand_comes_from_the_one_that_answers() -> None:
    """A source that cannot even look does not raise there; ``read`` sees to it."""
    first = BufferSource(DATA)
    source = FallbackSource(_Blind(DATA), first, retries=0)
    assert source.read_nowait(0, PAGE) is None
    await source.read(0, PAGE)
    assert as_bytes(source.read_nowait(0, PAGE) or b"") == DATA[:PAGE]
    assert identity_of(source) == identity_of(first)


class _Blind(Moody):
    def __init__(self, data: bytes) -> None:
        super().__init__(data, 1 << 30)

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        raise SourceError("blind")


async def test_a_cancelled_read_does_not_try_again() -> None:
    """Cancellation is no failure of the source; a source that cancels itself is one."""
    first = SlowSource(DATA)
    source = FallbackSource(first, BufferSource(DATA))
    reading = asyncio.ensure_future(source.read(0, PAGE))
    await turns()
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert first.reads == [(0, PAGE)]
    assert source.figures.second_reads == 0
    first.error = asyncio.CancelledError()
    first.let_go()
    source = FallbackSource(first, BufferSource(DATA), retries=0)
    assert as_bytes(await source.read(0, PAGE)) == DATA[:PAGE]
    assert source.figures.fall_overs == 1


async def test_both_are_closed() -> None:
    """With the one that stands in front of them."""
    first, second = SlowSource(DATA), SlowSource(DATA)
    await FallbackSource(first, second).aclose()
    assert (first.closed, second.closed) == (1, 1)


def test_nonsense_is_refused() -> None:
    """Sources of different sizes are not the same image."""
    with pytest.raises(SourceError, match="not the same"):
        FallbackSource(BufferSource(DATA), BufferSource(DATA[1:]))
    for settings in ({"retries": -1}, {"backoff": -0.1}, {"timeout": 0}):
        with pytest.raises(ValueError, match="retries"):
            FallbackSource(BufferSource(DATA), **settings)
