"""Userfaultfd: opened, adopted, registered; each method asked of the running kernel."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

import pytest

from aiouffd.errors import (
    ClosedError,
    NotSupported,
    RangeGone,
    ResolutionRefused,
)
from aiouffd.fds import OwnedFd
from aiouffd.kernel import abi, calls, gates
from aiouffd.uffd import Feature, Mode, Userfaultfd
from tests.targets import PAGE, Target, wait_until
from tests.uffd_memory import PAGES, own, read_all, serving

# --- opening ---------------------------------------------------------------------------


def test_open_shakes_hands() -> None:
    """It is non-blocking, close-on-exec, initialised, and says what was enabled."""
    wanted = Feature.EVENT_REMOVE | Feature.THREAD_ID
    with Userfaultfd.open(wanted) as uffd:
        fd = uffd.fileno()
        assert not os.get_blocking(fd)
        assert not os.get_inheritable(fd)
        assert uffd.info() == calls.FdInfo(0, 0, wanted, True)
        assert uffd.features == wanted
        assert repr(uffd) == f"<Userfaultfd fd={fd} features={wanted!r}>"
    assert repr(uffd) == "<Userfaultfd closed>"


def test_open_for_user_mode_faults_only() -> None:
    """System calls on missing pages fail then, which needs no right to allow."""
    with Userfaultfd.open(user_mode_only=True) as uffd:
        assert uffd.info().initialised


def test_features_that_another_brings_along() -> None:
    """WP_ASYNC implies WP_UNPOPULATED: both are said, as after adopting."""
    with Userfaultfd.open(Feature.WP_ASYNC) as uffd:
        assert uffd.features == uffd.info().features == Feature.WP_ASYNC | Feature.WP_UNPOPULATED


@pytest.mark.root
def test_a_refused_feature_leaves_no_descriptor() -> None:
    """The error names it; the leak check of every test looks for the rest."""
    with pytest.raises(NotSupported, match="bit 40"):
        Userfaultfd.open(1 << 40)


def test_features_of_newer_kernels_are_kept() -> None:
    """Bits without a name are shown by their value and survive."""
    features = Feature(abi.UFFD_FEATURE_MOVE | 1 << 40)
    assert int(features) == abi.UFFD_FEATURE_MOVE | 1 << 40
    assert Feature.MOVE in features
    assert int(Mode(1 | 1 << 9)) == 1 | 1 << 9
    assert {feature.name: int(feature) for feature in Feature} == abi.FEATURES
    assert {mode.name: int(mode) for mode in Mode} == abi.REGISTER_MODES


# --- adopting --------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [int, OwnedFd])
def test_adopt(wrap: Callable[[int], int | OwnedFd]) -> None:
    """Features are read from the kernel; a blocking descriptor is made non-blocking."""
    fd = gates.open_userfaultfd()
    calls.api(fd, Feature.EVENT_REMAP)
    os.set_blocking(fd, True)
    with Userfaultfd.adopt(wrap(fd)) as uffd:
        assert uffd.fileno() == fd
        assert uffd.features == Feature.EVENT_REMAP
        assert not os.get_blocking(fd)
    assert not os.path.exists(f"/proc/self/fd/{fd}")


def test_adopt_refuses_what_is_no_userfaultfd() -> None:
    """A pipe from a mistaken peer is closed, and named as what it is."""
    read_end, write_end = os.pipe()
    os.close(write_end)
    with pytest.raises(ValueError, match=f"file descriptor {read_end} is no userfaultfd"):
        Userfaultfd.adopt(read_end)
    assert not os.path.exists(f"/proc/self/fd/{read_end}")


def test_adopt_refuses_one_without_a_handshake() -> None:
    """Polled, it would report an error for ever."""
    fd = gates.open_userfaultfd()
    with pytest.raises(ValueError, match="has not seen UFFDIO_API"):
        Userfaultfd.adopt(OwnedFd(fd))
    assert not os.path.exists(f"/proc/self/fd/{fd}")


def test_adopt_refuses_a_closed_one() -> None:
    """There is nothing to take over."""
    owned = OwnedFd(os.open(os.devnull, os.O_RDONLY))
    owned.close()
    with pytest.raises(ClosedError):
        Userfaultfd.adopt(owned)


# --- the descriptor --------------------------------------------------------------------


def test_a_closed_one_refuses_everything() -> None:
    """Closing twice is no mistake; using it after is ClosedError."""
    uffd = Userfaultfd.open()
    uffd.close()
    uffd.close()
    assert uffd.closed
    uses: list[Callable[[], object]] = [
        uffd.fileno,
        uffd.dup,
        uffd.detach,
        uffd.info,
        uffd.read,
        uffd.target_alive,
        lambda: uffd.register(0x10000, PAGE),
        lambda: uffd.unregister(0x10000, PAGE),
        lambda: uffd.wake(0x10000, PAGE),
        lambda: uffd.copy(0x10000, bytes(PAGE)),
        lambda: uffd.zeropage(0x10000, PAGE),
        lambda: uffd.continue_(0x10000, PAGE),
        lambda: uffd.poison(0x10000, PAGE),
        lambda: uffd.move(0x10000, 0x20000, PAGE),
        lambda: uffd.writeprotect(0x10000, PAGE),
        lambda: uffd.unprotect(0x10000, PAGE),
    ]
    for use in uses:
        with pytest.raises(ClosedError):
            use()


def test_a_number_closed_by_others_is_told_as_closed() -> None:
    """EBADF of a fill means that somebody closed the number under us."""
    uffd = Userfaultfd.open()
    with uffd.detach() as owned:
        number = owned.fileno()
        again = Userfaultfd(OwnedFd(owned.detach()), 0)
        os.close(number)
    with pytest.raises(ClosedError, match="this userfaultfd was closed"):
        again.zeropage(0x10000, PAGE)
    again._fd.detach()


def test_dup_and_detach() -> None:
    """A second descriptor keeps the userfaultfd open; detaching hands the first on."""
    uffd = Userfaultfd.open(Feature.THREAD_ID)
    with uffd.dup() as second, uffd.detach() as first:
        assert uffd.closed
        assert first.fileno() != second.fileno()
        assert calls.fdinfo(second.fileno()).features == Feature.THREAD_ID


def test_one_reader_for_life() -> None:
    """A second would steal the first one's faults."""
    with Userfaultfd.open() as uffd:
        uffd.claim_reader()
        with pytest.raises(RuntimeError, match="has a reader already"):
            uffd.claim_reader()


# --- ranges ----------------------------------------------------------------------------


def test_register_gives_the_ioctls() -> None:
    """And refuses what is aligned wrongly, or nothing, with the range in the error."""
    with own() as mine:
        uffd = mine.uffd
        mask = uffd.register(mine.base, PAGE, Mode.MISSING | Mode.WP)
        assert mask & abi.IOCTL_BITS["WRITEPROTECT"]
        for start, length, modes in (
            (mine.base + 1, PAGE, Mode.MISSING),
            (mine.base, 0, Mode.MISSING),
            (mine.base, PAGE, 0),
            (mine.base, PAGE, Mode.MINOR),  # of anonymous memory
            (0x10000, PAGE, Mode.MISSING),  # nothing is mapped there
        ):
            with pytest.raises(ResolutionRefused, match="UFFDIO_REGISTER") as caught:
                uffd.register(start, length, modes)
            assert (caught.value.errno, caught.value.start) == (errno.EINVAL, start)


def test_two_userfaultfds_do_not_share_a_range() -> None:
    """The second is refused, also for giving the first one's range back."""
    with own() as mine, Userfaultfd.open() as other:
        with pytest.raises(ResolutionRefused) as caught:
            other.register(mine.base, PAGE)
        assert caught.value.errno == errno.EBUSY
        with pytest.raises(ResolutionRefused, match="UFFDIO_UNREGISTER") as caught:
            other.unregister(mine.base, PAGE)
        assert caught.value.errno == errno.EINVAL


def test_unregister_gives_memory_back() -> None:
    """Missing pages read zero from then on; here, without a fault."""
    with own() as mine:
        mine.uffd.copy(mine.at(0), b"x" * PAGE)
        mine.uffd.unregister(mine.base, PAGES * PAGE)
        assert mine[0] == b"x" * PAGE
        assert mine[1] == bytes(PAGE)
        with pytest.raises(RangeGone):
            mine.uffd.zeropage(mine.at(2), PAGE)


@pytest.mark.parametrize(
    "kind, modes", [("anon", Mode.MISSING), ("anon", Mode.WP), ("shmem", Mode.MINOR)]
)
def test_unregister_wakes_all_who_wait(kind: str, modes: Mode) -> None:
    """Those of write-protect and minor faults too, whom the kernel leaves asleep."""
    features = Feature.WP_HUGETLBFS_SHMEM | Feature.WP_UNPOPULATED
    with Target(kind, 1, features=features, register=modes) as target, serving(target) as uffd:
        if modes is Mode.WP:
            uffd.writeprotect(target.base, PAGE)
        if modes is Mode.MINOR:
            with target.alias() as alias:
                alias[0] = 7
        touch = target.start_write(0, 5)
        wait_until(target.is_blocked, "the target waits")
        uffd.unregister(target.base, PAGE)
        assert touch.result() == 5


def test_wake_lets_the_thread_fault_again() -> None:
    """Nothing was filled: the same fault comes again.  A misaligned wake is refused."""
    with Target(pages=1) as target, serving(target) as uffd:
        touch = target.start_read(0)
        messages = read_all(uffd, 1)
        uffd.wake(target.base, PAGE)
        assert read_all(uffd, 1) == messages
        with pytest.raises(ResolutionRefused, match="UFFDIO_WAKE") as caught:
            uffd.wake(target.base + 1, PAGE)
        assert caught.value.errno == errno.EINVAL
        uffd.zeropage(target.base, PAGE)
        assert touch.result() == 0
