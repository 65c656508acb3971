"""What every Source must do, as a test class to inherit: the project's own and a user's.

Inherit SourceContract and say how a source over given bytes is made::

    class TestMySource(SourceContract):
        @contextlib.asynccontextmanager
        async def source_of(self, data: bytes) -> AsyncIterator[Source]:
            source = MySource(await upload(data))
            try:
                yield source
            finally:
                await source.aclose()

It takes pytest and pytest-asyncio: ``pip install 'aiouffd[pytest]'``.

Knows: the Source protocol.
Must not know: any particular source.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from ..errors import ClosedError, SourceError
from ..sources import Source, identity_of

try:
    import pytest
except ImportError as error:
    raise ImportError(
        "aiouffd.testing.sources needs pytest: pip install 'aiouffd[pytest]'"
    ) from error

if TYPE_CHECKING:
    from typing_extensions import Buffer

PAGE: Final = 4096

#: Sizes around every border that sources get wrong; each has a last partial page or none.
SIZES: Final[Sequence[int]] = (1, PAGE - 1, PAGE, PAGE + 1, 16 * PAGE, 16 * PAGE + 123)


def image(size: int, *, seed: int = 0) -> bytes:
    """Make bytes in which every page differs from every other."""
    return random.Random(seed).randbytes(size)  # noqa: S311 - to be the same each time


def as_bytes(data: Buffer) -> bytes:
    """Copy what a source gave, so that two answers can be compared."""
    return bytes(memoryview(data))


@pytest.mark.asyncio
class SourceContract(ABC):
    """The tests that every source passes."""

    @abstractmethod
    def source_of(self, data: bytes) -> contextlib.AbstractAsyncContextManager[Source]:
        """Make a source over ``data``, and clean up behind it."""

    @pytest.mark.parametrize("size", SIZES)
    async def test_reads_give_the_bytes_at_their_offset(self, size: int) -> None:
        """Any stretch inside the source reads as those very bytes, all of them."""
        data = image(size)
        choose = random.Random(size)  # noqa: S311 - to be the same each time
        async with self.source_of(data) as source:
            assert source.size == size
            stretches = [(0, size), (0, 1), (size - 1, 1)]
            for _ in range(20):
                offset = choose.randrange(size)
                stretches.append((offset, choose.randint(1, size - offset)))
            for offset, length in stretches:
                got = as_bytes(await source.read(offset, length))
                assert got == data[offset : offset + length]

    async def test_read_nowait_agrees_with_read_or_gives_none(self) -> None:
        """What is at hand without waiting is the same as what a read gives."""
        data = image(8 * PAGE)
        async with self.source_of(data) as source:
            for _ in range(2):  # the second round finds warm whatever a read warms
                for offset in range(0, len(data), PAGE):
                    at_hand = source.read_nowait(offset, PAGE)
                    assert at_hand is None or as_bytes(at_hand) == data[offset : offset + PAGE]
                    got = as_bytes(await source.read(offset, PAGE))
                    assert got == data[offset : offset + PAGE]

    @pytest.mark.parametrize("stretch", [(-1, 1), (0, 0), (0, -1), (0, 101), (100, 1), (99, 2)])
    async def test_a_read_outside_of_the_source_is_refused(self, stretch: tuple[int, int]) -> None:
        """A read that leaves the source raises SourceError and never gives less."""
        async with self.source_of(image(100)) as source:
            with pytest.raises(SourceError):
                await source.read(*stretch)

    async def test_an_empty_source_has_no_bytes_and_no_extents(self) -> None:
        """Nothing can be read from nothing."""
        async with self.source_of(b"") as source:
            assert source.size == 0
            assert list(source.extents()) == []
            with pytest.raises(SourceError):
                await source.read(0, 1)

    @pytest.mark.parametrize("size", SIZES)
    async def test_extents_ascend_and_leave_out_only_zeros(self, size: int) -> None:
        """Extents are ordered, disjoint and inside; what they leave out is zeros."""
        data = bytearray(image(size))
        data[PAGE : 9 * PAGE] = bytes(len(data[PAGE : 9 * PAGE]))
        async with self.source_of(bytes(data)) as source:
            rebuilt = bytearray(size)
            last = 0
            for offset, length in source.extents():
                assert last <= offset < offset + length <= size
                last = offset + length
                rebuilt[offset:last] = data[offset:last]
            assert rebuilt == data
            assert list(source.extents()) == list(source.extents())

    async def test_reads_at_once_do_not_mix(self) -> None:
        """Many reads in flight each get their own bytes."""
        data = image(64 * PAGE)
        async with self.source_of(data) as source:
            offsets = [page * PAGE for page in range(64)] * 2
            answers = await asyncio.gather(*(source.read(offset, PAGE) for offset in offsets))
            for offset, answer in zip(offsets, answers, strict=True):
                assert as_bytes(answer) == data[offset : offset + PAGE]

    async def test_an_answer_stays_as_it_is(self) -> None:
        """Later reads do not change a buffer that was given before."""
        data = image(4 * PAGE)
        async with self.source_of(data) as source:
            first = await source.read(0, PAGE)
            for offset in range(PAGE, 4 * PAGE, PAGE):
                await source.read(offset, PAGE)
            assert as_bytes(first) == data[:PAGE]

    async def test_a_cancelled_read_harms_nobody(self) -> None:
        """After a cancelled read the same read gives the bytes."""
        data = image(4 * PAGE)
        async with self.source_of(data) as source:
            task = asyncio.ensure_future(source.read(0, 4 * PAGE))
            await asyncio.sleep(0)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            assert as_bytes(await source.read(0, 4 * PAGE)) == data

    async def test_cancelled_among_many_the_others_get_their_bytes(self) -> None:
        """Of many reads of the same bytes every other one is cancelled; the rest are served."""
        data = image(4 * PAGE)
        async with self.source_of(data) as source:
            reads = [asyncio.ensure_future(source.read(PAGE, 2 * PAGE)) for _ in range(16)]
            await asyncio.sleep(0)
            for read in reads[::2]:
                read.cancel()
            answers = await asyncio.gather(*reads, return_exceptions=True)
            for number, answer in enumerate(answers):
                if isinstance(answer, BaseException):
                    assert number % 2 == 0, answer
                    assert isinstance(answer, asyncio.CancelledError)
                else:
                    assert as_bytes(answer) == data[PAGE : 3 * PAGE]

    async def test_read_nowait_may_be_asked_in_any_thread(self) -> None:
        """Threads that touch memory ask there, while the loop reads too."""
        data = image(16 * PAGE)

        def look(source: Source) -> None:
            for offset in [*range(0, len(data), PAGE)] * 4:
                at_hand = source.read_nowait(offset, PAGE)
                assert at_hand is None or as_bytes(at_hand) == data[offset : offset + PAGE]

        async with self.source_of(data) as source:
            looking = [asyncio.ensure_future(asyncio.to_thread(look, source)) for _ in range(3)]
            for offset in range(0, len(data), PAGE):
                got = as_bytes(await source.read(offset, PAGE))
                assert got == data[offset : offset + PAGE]
            await asyncio.gather(*looking)

    async def test_the_identity_stays(self) -> None:
        """A source that has an identity keeps it, whatever is read."""
        async with self.source_of(image(2 * PAGE)) as source:
            before = identity_of(source)
            await source.read(0, 2 * PAGE)
            assert identity_of(source) == before

    async def test_closing_lets_reads_in_flight_end(self) -> None:
        """A read that has begun gives its bytes though the source is closed meanwhile."""
        data = image(4 * PAGE)
        async with self.source_of(data) as source:
            reads = [
                asyncio.ensure_future(source.read(offset, PAGE))
                for offset in range(0, 4 * PAGE, PAGE)
            ]
            await asyncio.sleep(0)
            await source.aclose()
            for number, answer in enumerate(await asyncio.gather(*reads)):
                assert as_bytes(answer) == data[number * PAGE : (number + 1) * PAGE]

    async def test_closing_twice_is_fine_and_reading_afterwards_is_not(self) -> None:
        """``aclose`` may be called again; a read of a closed source raises ClosedError."""
        async with self.source_of(image(PAGE)) as source:
            await source.aclose()
            await source.aclose()
            with pytest.raises(ClosedError):
                await source.read(0, 1)
            with pytest.raises(ClosedError):
                source.read_nowait(0, 1)
