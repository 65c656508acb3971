"""examples/post_copy.py, run as its first lines say."""

from __future__ import annotations

import re

from tests.examples.running import ROOT, run_example


def test_the_destination_ends_with_the_sources_bytes() -> None:
    """A page is pulled, the rest is pushed, and the digests are equal."""
    source, first, counts, whole = run_example("post_copy.py")
    assert first == "the last page first: b'the end.'"
    assert whole.split()[-1] == source.split()[-1]
    pulled, pushed = map(int, re.findall(r"\d+", counts))
    assert pulled >= 4096
    assert pulled + pushed == 4096 * 4096


def test_it_fits_on_a_page() -> None:
    """It stays under sixty lines."""
    assert len((ROOT / "examples/post_copy.py").read_text().splitlines()) < 60
