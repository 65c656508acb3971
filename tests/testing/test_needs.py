"""What a test may need, and what is told of what is missing."""

from __future__ import annotations

import pytest

from aiouffd.kernel import probe
from aiouffd.testing import needs

CAPABILITY = {"kernel-mode": "kernel-faults", "fork": "event-fork"}


@pytest.mark.parametrize("name", ["kernel-mode", "fork", "poison", "minor-shmem", "MINOR_SHMEM"])
def test_a_need_is_missing_exactly_if_the_capability_is(name: str) -> None:
    """What is told is the probe's own remedy; nothing is told of what is there."""
    capability = probe.probe()[CAPABILITY.get(name, name)]
    missing = needs.missing(name)
    assert (missing is None) == capability.available
    if missing is not None:
        assert capability.name in missing
        assert missing.endswith(capability.remedy)


def test_what_no_kernel_has_is_missing() -> None:
    """A bit that this kernel lacks is told with what it takes."""
    missing = needs.missing("bit-63")
    assert missing is not None
    assert missing.endswith("It takes a newer kernel.")


@pytest.mark.parametrize("name", [*needs.NEEDS, "wp", "device", "bit-17"])
def test_known_needs(name: str) -> None:
    """There are four of our own, and every capability by its name."""
    assert needs.is_known(name)


def test_an_unknown_need() -> None:
    """It is told apart, and what there is can be listed."""
    assert not needs.is_known("magic")
    for name in (*needs.NEEDS, "poison"):
        assert name in needs.known()
