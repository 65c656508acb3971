"""ZeroSource: zeros, no extents; it passes of the contract what its bytes allow."""

from __future__ import annotations

import pytest

from aiouffd.errors import ClosedError, SourceError
from aiouffd.sources import Source, identity_of
from aiouffd.sources.zero import ZeroSource
from aiouffd.testing.sources import PAGE, as_bytes


async def test_all_of_it_is_zeros_and_none_of_it_data() -> None:
    """Any stretch reads as zeros, at once, and no extent asks for a read."""
    source = ZeroSource(3 * PAGE + 5)
    assert isinstance(source, Source)
    assert source.size == 3 * PAGE + 5
    assert list(source.extents()) == []
    assert as_bytes(await source.read(0, source.size)) == bytes(source.size)
    assert as_bytes(source.read_nowait(PAGE, 7)) == bytes(7)
    assert identity_of(source) == identity_of(ZeroSource(3 * PAGE + 5))
    assert identity_of(source) != identity_of(ZeroSource(3 * PAGE))


async def test_reads_outside_and_after_the_close_are_refused() -> None:
    """As with every source."""
    source = ZeroSource(PAGE)
    for stretch in [(-1, 1), (0, 0), (0, PAGE + 1), (PAGE, 1)]:
        with pytest.raises(SourceError):
            await source.read(*stretch)
    await source.aclose()
    await source.aclose()
    with pytest.raises(ClosedError):
        await source.read(0, 1)
    with pytest.raises(ValueError, match="not negative"):
        ZeroSource(-1)
