"""LayeredSource: of what lies over each other the newest wins, against a plain model."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiouffd.errors import ClosedError, SourceError
from aiouffd.sources import Extents, Source, identity_of, layered
from aiouffd.sources.buffer import BufferSource
from aiouffd.sources.file import FileSource
from aiouffd.sources.layered import Layer, LayeredSource
from aiouffd.sources.zero import ZeroSource
from aiouffd.testing.sources import PAGE, SourceContract, as_bytes, image
from tests.sources.slow import SlowSource, turns


def _striped(data: bytes, make: type[BufferSource] | type[SlowSource]) -> LayeredSource:
    """Cut bytes into three layers, none of which has right bytes where another one counts."""
    stripe = 3 * PAGE + 7
    layers = []
    for turn in range(3):
        mine = bytearray(b"\xee" * len(data))
        extents = []
        for start in range(turn * stripe, len(data), 3 * stripe):
            end = min(start + stripe, len(data))
            mine[start:end] = data[start:end]
            extents.append((start, end - start))
        source = SlowSource(bytes(mine), wait=False) if make is SlowSource else make(bytes(mine))
        layers.append(Layer(source, extents))
    return LayeredSource(*layers)


class TestOverMemory(SourceContract):
    """Three layers in memory."""

    @contextlib.asynccontextmanager
    async def source_of(self, data: bytes) -> AsyncIterator[Source]:
        """Cut the bytes into stripes."""
        source = _striped(data, BufferSource)
        yield source
        await source.aclose()


class TestOverSlowSources(SourceContract):
    """Three layers that take their time."""

    @contextlib.asynccontextmanager
    async def source_of(self, data: bytes) -> AsyncIterator[Source]:
        """Cut the bytes into stripes."""
        source = _striped(data, SlowSource)
        yield source
        await source.aclose()


@st.composite
def layers(draw: st.DrawFn) -> list[tuple[bytes, list[tuple[int, int]]]]:
    """Draw layers of different sizes, each with its bytes and extents."""
    drawn = []
    for number in range(draw(st.integers(1, 4))):
        size = draw(st.integers(0, 60))
        at, extents = 0, []
        for gap, length in draw(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)))):
            if at + gap + length > size:
                break
            extents.append((at + gap, length))
            at += gap + length
        drawn.append((bytes([0x10 * (number + 1) + at % 16 for at in range(size)]), extents))
    return drawn


@given(layers(), st.data(), st.booleans(), st.sampled_from([0, 3, 1 << 16]))
def test_the_newest_wins(
    drawn: list[tuple[bytes, list[tuple[int, int]]]],
    choose: st.DataObject,
    slow: bool,
    read_through: int,
) -> None:
    """Every byte is that of the newest layer that holds it, else zero; extents are the union."""
    size = max(len(data) for data, _ in drawn)
    model, held = bytearray(size), set()
    for data, extents in drawn:
        for offset, length in extents:
            model[offset : offset + length] = data[offset : offset + length]
            held |= set(range(offset, offset + length))

    async def compare() -> None:
        source = LayeredSource(
            *(
                Layer(SlowSource(data, wait=False) if slow else BufferSource(data), extents)
                for data, extents in drawn
            )
        )
        assert source.size == size
        assert list(source.extents()) == list(Extents((at, 1) for at in sorted(held)))
        for _ in range(3):
            if not size:
                break
            offset = choose.draw(st.integers(0, size - 1))
            length = choose.draw(st.integers(1, size - offset))
            assert as_bytes(await source.read(offset, length)) == model[offset : offset + length]
            at_hand = source.read_nowait(offset, length)
            assert at_hand is None or as_bytes(at_hand) == model[offset : offset + length]
            assert slow or at_hand is not None
        await source.aclose()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layered, "READ_THROUGH", read_through)
        asyncio.run(compare())


async def test_diffs_are_sparse_files(tmp_path: Path) -> None:
    """What is no hole in a file is what the layer holds."""
    base = image(16 * PAGE)
    (tmp_path / "base").write_bytes(base)
    expected = bytearray(base) + bytearray(2 * PAGE)
    for seed, (size, pages) in enumerate([(16, (1, 2, 9)), (18, (2, 17))], 1):
        with open(tmp_path / f"{seed}", "wb") as file:
            file.truncate(size * PAGE)
            for page in pages:
                data = image(PAGE, seed=100 * seed + page)
                os.pwrite(file.fileno(), data, page * PAGE)
                expected[page * PAGE : (page + 1) * PAGE] = data
    files = [FileSource(tmp_path / name) for name in ("base", "1", "2")]
    source = LayeredSource(*files)
    if len(list(files[1].extents())) == 1:
        pytest.skip("this file system knows no holes; use a TMPDIR on ext4, xfs or tmpfs")
    assert as_bytes(await source.read(0, 18 * PAGE)) == expected
    assert list(source.extents()) == [(0, 16 * PAGE), (17 * PAGE, PAGE)]
    owners = [source.owner_of(page * PAGE) for page in (0, 1, 2, 9, 16, 17)]
    assert owners == [files[0], files[1], files[2], files[1], None, files[2]]
    await source.aclose()
    with pytest.raises(ClosedError):
        files[2].read_nowait(0, 1)


async def test_a_read_inside_one_layer_is_not_copied() -> None:
    """The answer is the layer's own buffer."""
    data = image(4 * PAGE)
    source = LayeredSource(ZeroSource(8 * PAGE), BufferSource(data))
    for answer in (source.read_nowait(PAGE, PAGE), await source.read(PAGE, PAGE)):
        assert isinstance(answer, memoryview)
        assert answer.obj is data
    assert source.read_nowait(5 * PAGE, PAGE) == bytes(PAGE)


async def test_layers_are_read_at_once_and_neighbours_together() -> None:
    """One read goes to all layers at the same time, and to each but once."""
    data = image(8 * PAGE)
    base, diff = SlowSource(data), SlowSource(data)
    source = LayeredSource(base, Layer(diff, [(PAGE, PAGE), (3 * PAGE, PAGE)]))
    reading = asyncio.ensure_future(source.read(0, 5 * PAGE))
    await turns()
    assert base.reads == [(0, 5 * PAGE)]
    assert diff.reads == [(PAGE, 3 * PAGE)]
    base.let_go()
    diff.let_go()
    assert as_bytes(await reading) == data[: 5 * PAGE]


async def test_what_lies_far_apart_is_read_apart() -> None:
    """A gap that costs more than a read is left out."""
    data = image(64 * PAGE)
    diff = SlowSource(data, wait=False)
    wide = Layer(diff, [(0, PAGE), (40 * PAGE, PAGE)])
    source = LayeredSource(ZeroSource(64 * PAGE), wide)
    got = as_bytes(await source.read(0, 64 * PAGE))
    assert got[:PAGE] + got[40 * PAGE : 41 * PAGE] == data[:PAGE] + data[40 * PAGE : 41 * PAGE]
    assert not any(got[PAGE : 40 * PAGE] + got[41 * PAGE :])
    assert diff.reads == [(0, PAGE), (40 * PAGE, PAGE)]


async def test_the_first_error_ends_the_other_reads() -> None:
    """A layer that fails fails the read; nothing goes on behind it."""
    base, diff = SlowSource(image(4 * PAGE)), SlowSource(image(4 * PAGE), wait=False)
    diff.error = SourceError("gone")
    source = LayeredSource(base, Layer(diff, [(PAGE, PAGE)]))
    with pytest.raises(SourceError, match="gone"):
        await source.read(0, 4 * PAGE)
    assert base.cancelled == 1
    reading = asyncio.ensure_future(source.read(0, 4 * PAGE))
    diff.hold()
    await turns()
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert (base.cancelled, diff.cancelled) == (2, 1)


async def test_a_layer_that_cancels_itself_has_failed() -> None:
    """To who waits it is an error, not a cancellation of the waiter."""
    base, diff = (SlowSource(image(4 * PAGE), wait=False) for _ in range(2))
    source = LayeredSource(base, Layer(diff, [(PAGE, PAGE)]))
    diff.error = asyncio.CancelledError()
    with pytest.raises(SourceError, match="cancelled"):
        await source.read(0, 4 * PAGE)


async def test_the_identity_covers_all_layers_and_their_order() -> None:
    """Another diff, or the same in another order, is another image."""
    one, two = BufferSource(b"one!"), BufferSource(b"two!")
    names = {
        identity_of(LayeredSource(*parts)) for parts in [(one,), (one, two), (two, one), (two,)]
    }
    names.add(identity_of(LayeredSource(one, Layer(two, [(0, 1)]))))
    assert len(names) == 5
    assert "" not in names
    assert identity_of(LayeredSource(one, two)) in names
    assert identity_of(LayeredSource(one, _Nameless(b"two!"))) == ""


class _Nameless(BufferSource):
    identity = ""


class _Stubborn(BufferSource):
    async def aclose(self) -> None:
        raise OSError("will not close")


async def test_a_layer_that_does_not_know_its_holes_is_refused() -> None:
    """Its zeros would hide what lies below; as the base, or with an index, it is right."""

    class Flat(BufferSource):
        holes_known = False

    base, flat = BufferSource(image(4 * PAGE)), Flat(bytes(4 * PAGE))
    for layers in ((base, flat), (base, base, flat), (flat, flat)):
        with pytest.raises(SourceError, match=f"layer {len(layers) - 1} .* pack it"):
            LayeredSource(*layers)
    over = LayeredSource(base, Layer(flat, [(PAGE, PAGE)]))
    expected = bytearray(image(4 * PAGE))
    expected[PAGE : 2 * PAGE] = bytes(PAGE)
    assert as_bytes(await over.read(0, 4 * PAGE)) == expected
    LayeredSource(flat, base)


async def test_every_layer_is_closed_whatever_another_says() -> None:
    """The error of one is raised when all have been asked."""
    last = SlowSource(b"abc")
    source = LayeredSource(_Stubborn(b"abc"), last)
    with pytest.raises(OSError, match="will not close"):
        await source.aclose()
    assert last.closed == 1


class _Disordered(BufferSource):
    def extents(self) -> Iterator[tuple[int, int]]:
        yield 2, 1
        yield 0, 1


def test_extents_that_make_no_sense_are_refused() -> None:
    """Out of order, or behind the end of their source."""
    with pytest.raises(SourceError, match="layer 1: extents ascend"):
        LayeredSource(BufferSource(b"abc"), _Disordered(b"abc"))
    with pytest.raises(SourceError, match="layer 0 has 3 bytes, but an extent up to 4"):
        LayeredSource(Layer(BufferSource(b"abc"), [(1, 3)]))
