"""The judge of observations: pure, so that any kernel can be given to it."""

from __future__ import annotations

import dataclasses
import errno

import pytest

from aiouffd.kernel import abi
from aiouffd.kernel.capabilities import (
    NAMES,
    Capability,
    Observation,
    absent_bit,
    canonical,
    capabilities,
)
from aiouffd.kernel.gates import DEVICE, SYSCALL, Attempt, Circumstances

ROOT = Circumstances(seccomp=False, ptrace=True, initial_namespace=True, sysctl=0)
GRANTED = tuple(
    Attempt(gate, limited, 0) for limited in (False, True) for gate in (DEVICE, SYSCALL)
)
TRIED = {
    "continue-wp": 0,
    "pagemap-scan": 0,
    "pagemap-guard": 0,
    "pidfd": 0,
    "peer-pidfd": 0,
    "event-fork": 0,
}
EVERYTHING = Observation(
    release="6.18.44",
    machine="x86_64",
    uid=0,
    circumstances=ROOT,
    attempts=GRANTED,
    features=abi.UFFD_API_FEATURES,
    ioctls=abi.UFFD_API_IOCTLS,
    range_ioctls=abi.UFFD_API_RANGE_IOCTLS,
    tried=TRIED,
    huge_pages=3,
)


def judged(**changes: object) -> dict[str, Capability]:
    """Judge an observation that differs from one where everything is there."""
    seen = dataclasses.replace(EVERYTHING, **changes)  # type: ignore[arg-type]
    return {capability.name: capability for capability in capabilities(seen)}


def test_everything_is_there() -> None:
    """On such a kernel nothing is missing, each feature bit has a name, remedies are empty."""
    found = judged()
    assert tuple(found) == NAMES
    assert all(one.available and not one.remedy and one.about and one.how for one in found.values())
    assert len(NAMES) == len(set(NAMES)) == 5 + len(abi.FEATURES) + 5 + 1


@pytest.mark.parametrize("name", abi.FEATURES)
def test_a_feature_of_a_later_kernel_names_its_version(name: str) -> None:
    """On a kernel before it the remedy is its first release."""
    features = abi.UFFD_API_FEATURES & ~abi.FEATURES[name]
    capability = canonical(name)
    assert capability is not None
    found = judged(features=features, release="4.3.0-generic")
    assert not found[capability].available
    assert abi.FEATURE_SINCE[name] in found[capability].remedy
    assert "4.3.0-generic" in found[capability].remedy
    assert [one.name for one in found.values() if not one.available] == [capability]


def test_a_feature_left_out_of_the_build_names_its_option() -> None:
    """On a kernel that should have it the remedy is the build: write-protection on old arm64."""
    lacking = abi.UFFD_FEATURE_PAGEFAULT_FLAG_WP | abi.UFFD_FEATURE_MINOR_SHMEM
    found = judged(features=abi.UFFD_API_FEATURES & ~lacking, release="6.9", machine="aarch64")
    assert "CONFIG_HAVE_ARCH_USERFAULTFD_WP" in found["wp"].remedy
    assert "6.10" in found["wp"].remedy
    assert "CONFIG_HAVE_ARCH_USERFAULTFD_MINOR" in found["minor-shmem"].remedy
    assert found["move"].available


def test_a_release_that_cannot_be_read_is_old() -> None:
    """An unreadable release number only chooses the words."""
    assert "Linux 6.8 or newer" in judged(features=0, release="custom")["move"].remedy


def test_no_bit_without_a_remedy() -> None:
    """A kernel with nothing but the handshake: everything missing says how to get it."""
    for one in judged(features=0, tried=dict.fromkeys(TRIED, errno.ENOTTY), huge_pages=0).values():
        assert bool(one.remedy) != one.available


def test_fork_events_are_tried() -> None:
    """The bit alone is not enough: the kernel may have it and not grant it."""
    found = judged(tried={**TRIED, "event-fork": errno.EPERM})
    assert not found["event-fork"].available
    assert "EPERM" in found["event-fork"].how
    assert "CAP_SYS_PTRACE" in found["event-fork"].remedy


def test_nothing_can_be_opened() -> None:
    """Every feature is unknown then, and says where to look."""
    refused = tuple(
        Attempt(gate, limited, errno.EPERM)
        for limited in (False, True)
        for gate in (DEVICE, SYSCALL)
    )
    tried = {name: 0 for name in TRIED if name not in ("event-fork", "continue-wp")}
    found = judged(attempts=refused, features=None, ioctls=0, range_ioctls=0, tried=tried)
    for name in ("userfaultfd", "kernel-faults", "user-mode-only", "device", "syscall"):
        assert not found[name].available
        assert "EPERM" in found[name].how
        assert found[name].remedy.endswith(".")
    for name in ("move", "event-fork", "continue-wp"):
        assert not found[name].available
        assert found[name].how == "not seen"
        assert "see userfaultfd" in found[name].remedy
    assert found["pagemap-scan"].available


def test_no_gate_at_all() -> None:
    """Without any attempt nothing is granted and nothing is made up."""
    found = judged(attempts=(), features=None, tried={})
    assert found["device"].how == "not tried"
    assert found["device"].remedy == ""
    assert not found["device"].available


@pytest.mark.parametrize(
    "name, number, words",
    [
        ("pagemap-scan", errno.ENOTTY, "built without"),
        ("pagemap-scan", errno.EACCES, "PR_SET_DUMPABLE"),
        ("pagemap-guard", errno.EINVAL, "built without"),
        ("peer-pidfd", errno.ENOPROTOOPT, "built without"),
        ("pidfd", errno.EPERM, "seccomp"),
        ("continue-wp", errno.EINVAL, "CONFIG_PTE_MARKER_UFFD_WP"),
    ],
)
def test_what_was_tried_and_failed(name: str, number: int, words: str) -> None:
    """The errno is shown, and the remedy follows it."""
    one = judged(tried={**TRIED, name: number})[name]
    assert not one.available
    assert errno.errorcode[number] in one.how
    assert words in one.remedy
    old = judged(tried={**TRIED, name: errno.ENOSYS}, release="4.3")[name]
    assert f"Linux {one.since} or newer" in old.remedy


def test_bits_of_newer_kernels_are_shown() -> None:
    """Unknown feature and ioctl bits come last, by number, and are available."""
    found = judged(
        features=abi.UFFD_API_FEATURES | 1 << 17 | 1 << 18,
        ioctls=abi.UFFD_API_IOCTLS | 1 << 10,
        range_ioctls=abi.UFFD_API_RANGE_IOCTLS | 1 << 9,
    )
    assert list(found)[len(NAMES) :] == ["bit-17", "bit-18", "ioctl-9", "ioctl-10"]
    assert all(found[name].available for name in ("bit-17", "ioctl-10"))
    assert "newer" in found["bit-17"].about


@pytest.mark.parametrize("name", ["bit-17", "ioctl-9"])
def test_a_bit_this_kernel_lacks(name: str) -> None:
    """It can be asked for all the same."""
    one = absent_bit(name)
    assert (one.name, one.available) == (name, False)
    assert "newer kernel" in one.remedy


@pytest.mark.parametrize(
    "text, name",
    [
        ("minor-shmem", "minor-shmem"),
        ("MINOR_SHMEM", "minor-shmem"),
        (" Move ", "move"),
        ("UFFD_FEATURE_WP_ASYNC", "wp-async"),
        ("PAGEFAULT_FLAG_WP", "wp"),
        ("UFFD_FEATURE_PAGEFAULT_FLAG_WP", "wp"),
        ("bit-0", "bit-0"),
        ("bit-17", "bit-17"),
        ("ioctl-63", "ioctl-63"),
        ("bit-64", None),
        ("bit-017", None),
        ("bit-", None),
        ("teleport", None),
        ("", None),
    ],
)
def test_spellings(text: str, name: str | None) -> None:
    """The header's spelling is understood; what is no name is not guessed at."""
    assert canonical(text) == name
