"""One frame: what was compressed comes back, and nothing else ever does."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiouffd.sources.zstd_frames import LEVELS, FrameCompressor, ZstdError, decompress
from tests.seekable import zstd

DATA = random.Random(1).randbytes(3000) * 11


@given(st.binary(max_size=300), st.integers(1, 500))
def test_a_frame_comes_back(piece: bytes, times: int) -> None:
    """Any bytes, with the checksum known or not."""
    data = piece * times
    frame, checksum = FrameCompressor(1).compress(data)
    assert decompress(memoryview(frame), len(data), checksum) == data
    assert decompress(memoryview(frame), len(data), None) == data


def test_one_compressor_makes_many_frames() -> None:
    """Frames stand alone, whatever was made before them."""
    compressor = FrameCompressor(LEVELS[0])
    first, second = compressor.compress(DATA), compressor.compress(DATA)
    assert first == second
    assert zstd.get_frame_info(first[0]).decompressed_size == len(DATA)


def test_a_frame_without_checksum_is_checked_all_the_same() -> None:
    """The checksum of the table stands in for the frame's own, for zstd to check."""
    _, checksum = FrameCompressor(3).compress(DATA)
    bare = zstd.compress(DATA)
    assert decompress(memoryview(bare), len(DATA), checksum) == DATA
    with pytest.raises(ZstdError, match="checksum"):
        decompress(memoryview(bare), len(DATA), checksum ^ 1)


def test_wrong_frames_are_refused() -> None:
    """Another size, another checksum, two frames, half of one, none at all."""
    packed, checksum = FrameCompressor(3).compress(DATA)
    frame = memoryview(packed)
    size = len(DATA)
    for wrong in (size - 1, size + 1):
        with pytest.raises(ZstdError, match="not one frame of"):
            decompress(frame, wrong, checksum)
    with pytest.raises(ZstdError, match="seek table's differ"):
        decompress(frame, size, checksum ^ 1)
    for broken in (packed * 2, packed[:-1], packed[: len(packed) // 2]):
        with pytest.raises(ZstdError):
            decompress(memoryview(broken), size, None)
    for nothing in (b"", b"1234", bytes(100)):
        with pytest.raises(ZstdError):
            decompress(memoryview(nothing), size, checksum)


def test_any_bit_that_falls_over_is_seen(seed: int) -> None:
    """A frame with one bit flipped is an error, never other bytes."""
    packed, checksum = FrameCompressor(3).compress(DATA)
    choose = random.Random(seed)
    for at in choose.sample(range(len(packed)), 200):
        broken = bytearray(packed)
        broken[at] ^= 1 << choose.randrange(8)
        try:
            got = decompress(memoryview(broken), len(DATA), checksum)
        except ZstdError:
            continue
        assert got == DATA  # a bit without meaning, such as one of the unused ones


def test_without_the_library_the_extra_is_named() -> None:
    """The import says how to get what is missing."""
    if sys.version_info >= (3, 14):
        pytest.skip("zstd is in the standard library from Python 3.14 on")
    program = (
        "import sys; sys.modules['backports.zstd'] = None\n"
        "import aiouffd.sources.compressed\n"  # asking is_compressed needs no library
        "try: import aiouffd.sources.zstd_frames\n"
        "except ImportError as error: print(error)\n"
    )
    said = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert "pip install 'aiouffd[zstd]'" in said.stdout
