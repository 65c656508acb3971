"""Each call against the running kernel: numbers given, numbers decoded, errnos told apart."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from aiouffd.kernel import abi, calls, gates
from tests import targets
from tests.targets import HUGE, MINOR, MISSING, PAGE, WP, Signal, Target

EAGAIN, EEXIST, EINVAL, ENOENT, ESRCH = (
    -errno.EAGAIN,
    -errno.EEXIST,
    -errno.EINVAL,
    -errno.ENOENT,
    -errno.ESRCH,
)


@pytest.fixture
def fd() -> Iterator[int]:
    """A userfaultfd before UFFDIO_API."""
    fd = gates.open_userfaultfd()
    yield fd
    os.close(fd)


@contextmanager
def staged(length: int, byte: int = 7) -> Iterator[int]:
    """The address of some bytes to copy from."""
    with mmap.mmap(-1, length) as memory:
        memory[:] = bytes([byte]) * length
        yield targets.address_of(memory)


def fill(target: Target, page: int, pages: int = 1, mode: int = 0) -> int:
    """Copy pages into a target."""
    length = pages * target.page_size
    with staged(length) as source:
        return calls.copy(target.uffd, target.at(page), source, length, mode)


# --- opening and shaking hands ---------------------------------------------------------


@pytest.mark.parametrize("gate", [calls.open_device, calls.open_syscall])
def test_a_gate_opens_with_its_flags(gate: Callable[[int], int]) -> None:
    """Close-on-exec and non-blocking are as asked; the descriptor is a userfaultfd."""
    fd = gate(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        assert not os.get_inheritable(fd)
        assert not os.get_blocking(fd)
        assert calls.is_userfaultfd(fd)
    finally:
        os.close(fd)


@pytest.mark.root
@pytest.mark.parametrize("gate", [calls.open_device, calls.open_syscall])
def test_unknown_flags_are_einval(gate: Callable[[int], int]) -> None:
    """A flag that userfaultfd does not know is refused, by either gate."""
    with pytest.raises(OSError) as caught:
        gate(os.O_RDWR)
    assert caught.value.errno == errno.EINVAL


def test_other_descriptors_are_no_userfaultfd(fd: int) -> None:
    """A file, a socket and a closed number are told apart from a userfaultfd."""
    assert calls.is_userfaultfd(fd)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert not calls.is_userfaultfd(ours.fileno())
    assert not calls.is_userfaultfd(ours.fileno())
    with open(os.devnull, "rb") as file:
        assert not calls.is_userfaultfd(file.fileno())


def test_nothing_works_before_the_handshake(fd: int) -> None:
    """Before UFFDIO_API every other ioctl and reading are EINVAL."""
    with mmap.mmap(-1, PAGE) as memory:
        start = targets.address_of(memory)
        for call in (calls.unregister, calls.wake):
            with pytest.raises(OSError) as caught:
                call(fd, start, PAGE)
            assert caught.value.errno == errno.EINVAL
        with pytest.raises(OSError) as caught:
            calls.register(fd, start, PAGE, MISSING)
        assert caught.value.errno == errno.EINVAL
        assert calls.zeropage(fd, start, PAGE) == EINVAL
        assert calls.writeprotect(fd, start, PAGE, 0) == EINVAL
    with pytest.raises(OSError) as caught:
        calls.read_messages(fd, [bytearray(abi.UFFD_MSG_SIZE)])
    assert caught.value.errno == errno.EINVAL
    assert calls.fdinfo(fd) == (0, 0, 0, False)


def test_the_handshake_succeeds_once(fd: int) -> None:
    """A refused handshake may be repeated, a successful one may not, not even after zero."""
    with pytest.raises(OSError) as caught:
        calls.api(fd, 1 << 63)
    assert caught.value.errno == errno.EINVAL
    available, ioctls = calls.api(fd, abi.UFFD_FEATURE_THREAD_ID)
    assert available & abi.UFFD_FEATURE_THREAD_ID
    assert ioctls & abi.UFFD_API_IOCTLS == abi.UFFD_API_IOCTLS
    assert calls.fdinfo(fd) == (0, 0, abi.UFFD_FEATURE_THREAD_ID, True)
    with pytest.raises(OSError) as caught:
        calls.api(fd, 0)
    assert caught.value.errno == errno.EINVAL


def test_a_refused_handshake_zeroes_its_argument(fd: int) -> None:
    """Another version than 0xAA is refused, and nothing is left of the argument."""
    argument = bytearray(abi.UFFDIO_API_STRUCT.pack(0xAB, 0, 0))
    with pytest.raises(OSError) as caught:
        fcntl.ioctl(fd, abi.UFFDIO_API, argument)
    assert caught.value.errno == errno.EINVAL
    assert not any(argument)


def test_asynchronous_protection_brings_the_unpopulated_kind(fd: int) -> None:
    """WP_ASYNC enables WP_UNPOPULATED without being asked to; fdinfo tells the truth."""
    calls.api(fd, abi.UFFD_FEATURE_WP_ASYNC)
    enabled = abi.UFFD_FEATURE_WP_ASYNC | abi.UFFD_FEATURE_WP_UNPOPULATED
    assert calls.fdinfo(fd).features == enabled


def test_a_blocking_descriptor_is_made_non_blocking() -> None:
    """O_NONBLOCK can be set after the fact."""
    fd = calls.open_syscall(os.O_CLOEXEC)
    try:
        assert os.get_blocking(fd)
        calls.set_nonblocking(fd)
        assert not os.get_blocking(fd)
        calls.api(fd, 0)
        assert calls.read_messages(fd, [bytearray(abi.UFFD_MSG_SIZE)]) == 0
    finally:
        os.close(fd)


# --- ranges ----------------------------------------------------------------------------

_BASE = abi.IOCTL_BITS["WAKE"] | abi.IOCTL_BITS["COPY"] | abi.IOCTL_BITS["POISON"]
_SMALL = _BASE | abi.IOCTL_BITS["ZEROPAGE"] | abi.IOCTL_BITS["MOVE"]
_PROTECT = abi.IOCTL_BITS["WRITEPROTECT"]
_CONTINUE = abi.IOCTL_BITS["CONTINUE"]


@pytest.mark.parametrize(
    "kind, modes, mask",
    [
        ("anon", MISSING, _SMALL),
        ("anon", WP, _SMALL | _PROTECT),
        ("anon", MISSING | WP, _SMALL | _PROTECT),
        ("shmem", MISSING, _SMALL),
        ("shmem", MISSING | WP, _SMALL | _PROTECT),
        ("shmem", MINOR, _SMALL | _CONTINUE),
        ("shmem", MISSING | MINOR | WP, _SMALL | _PROTECT | _CONTINUE),
        ("shmem-private", MISSING, _SMALL),
        ("shmem-private", MISSING | MINOR | WP, _SMALL | _PROTECT | _CONTINUE),
    ],
)
def test_the_ioctls_of_a_range(kind: str, modes: int, mask: int) -> None:
    """The mask follows the modes asked for; unknown bits of newer kernels are kept."""
    with Target(kind, pages=2, register=modes) as target:
        assert target.ioctls & abi.UFFD_API_RANGE_IOCTLS == mask
        calls.unregister(target.uffd, target.base, target.length)
        assert not {"um", "uw", "ui"} & target.vm_flags(target.base)


@pytest.mark.parametrize(
    "modes, mask",
    [
        (MISSING, _BASE),
        (MISSING | WP, _BASE | _PROTECT),
        (MINOR, _BASE | _CONTINUE),
        (MISSING | MINOR | WP, _BASE | _PROTECT | _CONTINUE),
    ],
)
def test_the_ioctls_of_a_huge_range(huge_pages: object, modes: int, mask: int) -> None:
    """Huge pages have neither ZEROPAGE nor MOVE."""
    assert callable(huge_pages)
    huge_pages(2)
    with Target("hugetlb", pages=2, register=modes) as target:
        assert target.ioctls & abi.UFFD_API_RANGE_IOCTLS == mask
        assert calls.zeropage(target.uffd, target.base, HUGE) == EINVAL
        with pytest.raises(OSError) as caught:
            calls.register(target.uffd, target.base, PAGE, modes)
        assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("modes", [0, 1 << 20, MINOR])
def test_a_mode_that_does_not_suit_is_einval(modes: int) -> None:
    """No mode, an unknown one, and minor faults of anonymous memory are refused."""
    with Target("anon", pages=2, register=0) as target:
        with pytest.raises(OSError) as caught:
            calls.register(target.uffd, target.base, target.length, modes)
        assert caught.value.errno == errno.EINVAL


def test_a_range_belongs_to_one_userfaultfd() -> None:
    """A second userfaultfd of the same memory is refused with EBUSY."""
    with Target("anon", pages=2) as target:
        _, other = target.open_uffd(0, os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            with pytest.raises(OSError) as caught:
                calls.register(other, target.base, target.length, MISSING)
            assert caught.value.errno == errno.EBUSY
        finally:
            os.close(other)


def test_wake_takes_any_aligned_range() -> None:
    """WAKE wants pages, not a registered range, and never says that a target is gone."""
    with Target("anon", pages=2, register=0) as target:
        calls.wake(target.uffd, target.base, target.length)
        for start, length in ((target.base + 1, PAGE), (target.base, 0), (target.base, 100)):
            with pytest.raises(OSError) as caught:
                calls.wake(target.uffd, start, length)
            assert caught.value.errno == errno.EINVAL


# --- fills -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number, field, length, expected",
    [
        (errno.EAGAIN, -errno.EAGAIN, 4 * PAGE, EAGAIN),  # from about 6.15
        (errno.EAGAIN, 0, 4 * PAGE, EAGAIN),  # older: the field is left as it was
        (errno.EAGAIN, PAGE, 4 * PAGE, PAGE),
        (errno.EAGAIN, 4 * PAGE, 4 * PAGE, 4 * PAGE),
        (errno.EAGAIN, 5 * PAGE, 4 * PAGE, EAGAIN),  # a stale field
        (errno.EAGAIN, PAGE + 1, 4 * PAGE, EAGAIN),
        (errno.EAGAIN, 1, 4 * PAGE, EAGAIN),
        (errno.ESRCH, 0, PAGE, ESRCH),
        (errno.ESRCH, PAGE, PAGE, ESRCH),  # only EAGAIN says that a part was done
        (errno.EINVAL, 0, PAGE, EINVAL),
        (errno.EEXIST, -errno.EEXIST, PAGE, EEXIST),
        (errno.ENOENT, -errno.ENOENT, 2**40, ENOENT),
    ],
)
def test_signed_results(number: int, field: int, length: int, expected: int) -> None:
    """Progress is believed only with EAGAIN, in whole pages, and within what was asked for."""
    assert calls.signed_result(number, field, length) == expected


def test_a_copy_fills_and_wakes() -> None:
    """The fault is reported, copied into, and the thread reads what was copied."""
    with Target("anon", pages=4) as target:
        touch = target.start_read(1)
        targets.wait_until(lambda: target.fdinfo().pending, "the fault is reported")
        message = bytearray(4 * abi.UFFD_MSG_SIZE)
        assert calls.read_messages(target.uffd, [message]) == abi.UFFD_MSG_SIZE
        event, flags, address, thread = abi.UFFD_MSG_PAGEFAULT.unpack_from(message)
        assert (event, flags, address, thread) == (abi.UFFD_EVENT_PAGEFAULT, 0, target.at(1), 0)
        assert fill(target, 1) == PAGE
        assert touch.result() == 7
        assert calls.read_messages(target.uffd, [message]) == 0


@pytest.mark.parametrize("present", range(4))
def test_a_copy_stops_at_a_present_page(present: int) -> None:
    """What is done before it is reported; starting at it is EEXIST; the rest goes on."""
    with Target("anon", pages=4) as target:
        assert fill(target, present) == PAGE
        assert fill(target, 0, 4) == (present * PAGE or EEXIST)
        assert fill(target, present) == EEXIST
        if present < 3:
            assert fill(target, present + 1, 3 - present) == (3 - present) * PAGE
        assert all(target.is_present(page) for page in range(4))


def test_dontwake_leaves_the_thread_asleep() -> None:
    """A page filled with DONTWAKE is there, but who waits for it waits for WAKE."""
    with Target("anon", pages=2) as target:
        touch = target.start_read(0)
        targets.wait_until(lambda: target.fdinfo().pending, "the fault is reported")
        assert fill(target, 0, mode=abi.UFFDIO_COPY_MODE_DONTWAKE) == PAGE
        assert fill(target, 0) == EEXIST  # and EEXIST does not wake either
        assert target.fdinfo().total == 1
        calls.wake(target.uffd, target.base, PAGE)
        assert touch.result() == 7


def test_fills_outside_of_a_range_are_enoent() -> None:
    """Memory that is not registered, and a range over the end of its mapping, are ENOENT."""
    with Target("anon", pages=4, register=0) as target:
        assert fill(target, 0) == ENOENT
        calls.register(target.uffd, target.base, 2 * PAGE, MISSING)
        assert fill(target, 0, 4) == ENOENT
        assert calls.zeropage(target.uffd, target.at(2), PAGE) == ENOENT
        assert calls.poison(target.uffd, target.at(2), PAGE) == ENOENT
        assert calls.writeprotect(target.uffd, target.base, PAGE, 1) == ENOENT
        assert fill(target, 0, 2) == 2 * PAGE


@pytest.mark.parametrize("start, length, mode", [(1, PAGE, 0), (0, 0, 0), (0, 9, 0), (0, PAGE, 64)])
def test_bad_arguments_are_einval(start: int, length: int, mode: int) -> None:
    """An address or length within a page, an empty range and an unknown mode are EINVAL."""
    with Target("anon", pages=2, register=MISSING | WP) as target, staged(PAGE) as source:
        at = target.base + start
        assert calls.copy(target.uffd, at, source, length, mode) == EINVAL
        assert calls.zeropage(target.uffd, at, length, mode) == EINVAL
        assert calls.poison(target.uffd, at, length, mode) == EINVAL
        assert calls.continue_(target.uffd, at, length, mode) == EINVAL
        assert calls.move(target.uffd, at, at, length, mode) == EINVAL
        assert calls.writeprotect(target.uffd, at, length, mode) == EINVAL


def test_an_unreadable_source_is_efault() -> None:
    """Copying from where nothing is mapped fails, and fills nothing."""
    with Target("anon", pages=2) as target:
        with mmap.mmap(-1, PAGE) as memory:
            gone = targets.address_of(memory)
        assert calls.copy(target.uffd, target.base, gone, PAGE) == -errno.EFAULT
        assert not target.is_present(0)


def test_zeros_and_poison() -> None:
    """A zeroed page reads zero, a poisoned one is SIGBUS until bytes are copied over it."""
    with Target("anon", pages=3) as target:
        assert calls.zeropage(target.uffd, target.at(0), PAGE) == PAGE
        assert target.start_read(0).result() == 0
        assert calls.poison(target.uffd, target.at(1), PAGE) == PAGE
        assert calls.poison(target.uffd, target.at(1), PAGE) == EEXIST
        assert calls.zeropage(target.uffd, target.at(1), PAGE) == EEXIST
        assert target.start_read(1).result() == Signal(signal.SIGBUS, 2, target.at(1))
        assert fill(target, 1) == PAGE
        assert target.start_read(1).result() == 7


def test_continue_maps_what_the_page_cache_has() -> None:
    """A page of the file is mapped once; a hole is EFAULT."""
    with Target("shmem", pages=3, register=MINOR) as target:
        os.pwrite(target.memfd, b"\x2a", 0)
        assert calls.continue_(target.uffd, target.at(0), PAGE) == PAGE
        assert calls.continue_(target.uffd, target.at(0), PAGE) == EEXIST
        assert calls.continue_(target.uffd, target.at(1), PAGE) == -errno.EFAULT
        assert target.start_read(0).result() == 0x2A


def test_protection_is_set_and_taken_away() -> None:
    """A write to a protected page waits; unprotecting lets it go on, DONTWAKE leaves it."""
    with Target("anon", pages=2, register=MISSING | WP) as target:
        assert fill(target, 0) == PAGE
        assert calls.writeprotect(target.uffd, target.base, PAGE, 1) == PAGE
        assert target.is_wp(0)
        touch = target.start_write(0, 99)
        targets.wait_until(lambda: target.fdinfo().pending, "the write is reported")
        message = bytearray(abi.UFFD_MSG_SIZE)
        calls.read_messages(target.uffd, [message])
        flags = abi.UFFD_PAGEFAULT_FLAG_WRITE | abi.UFFD_PAGEFAULT_FLAG_WP
        assert abi.UFFD_MSG_PAGEFAULT.unpack(message)[1] == flags
        dontwake = abi.UFFDIO_WRITEPROTECT_MODE_DONTWAKE
        assert calls.writeprotect(target.uffd, target.base, PAGE, dontwake | 1) == EINVAL
        assert calls.writeprotect(target.uffd, target.base, PAGE, dontwake) == PAGE
        assert target.fdinfo().total == 1
        assert calls.writeprotect(target.uffd, target.base, PAGE, 0) == PAGE
        assert touch.result() == 99


def test_a_move_takes_the_page_along() -> None:
    """The destination has the bytes, the source is a hole, a second move is ENOENT or EEXIST."""
    anonymous = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    fd = gates.open_userfaultfd()
    with mmap.mmap(-1, 2 * PAGE, anonymous) as source, mmap.mmap(-1, 2 * PAGE, anonymous) as there:
        try:
            source.madvise(mmap.MADV_DONTFORK)
            calls.api(fd, 0)
            at, start = targets.address_of(there), targets.address_of(source)
            calls.register(fd, at, 2 * PAGE, MISSING)
            source[:PAGE] = b"m" * PAGE
            assert calls.move(fd, at, start, PAGE) == PAGE
            assert there[:PAGE] == b"m" * PAGE  # present: this cannot fault
            assert calls.move(fd, at + PAGE, start, PAGE) == ENOENT
            holes = abi.UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES
            assert calls.move(fd, at + PAGE, start, PAGE, holes) == PAGE
            source[:PAGE] = b"n" * PAGE
            assert calls.move(fd, at, start, PAGE) == EEXIST
        finally:
            os.close(fd)


def test_an_unread_event_is_eagain() -> None:
    """While a REMOVE is unread every fill does nothing; once it is read they work again."""
    features = abi.UFFD_FEATURE_EVENT_REMOVE
    with Target("anon", pages=2, features=features, register=MISSING | WP) as target:
        drop = target.start_madvise(mmap.MADV_DONTNEED, 0, 1)
        targets.wait_until(
            lambda: target.state(0) == "D", "madvise waits for its message to be read"
        )
        assert fill(target, 1) == EAGAIN
        assert calls.zeropage(target.uffd, target.at(1), PAGE) == EAGAIN
        assert calls.poison(target.uffd, target.at(1), PAGE) == EAGAIN
        assert calls.writeprotect(target.uffd, target.at(1), PAGE, 1) == EAGAIN
        message = bytearray(abi.UFFD_MSG_SIZE)
        assert calls.read_messages(target.uffd, [message]) == abi.UFFD_MSG_SIZE
        assert abi.UFFD_MSG_RANGE.unpack(message) == (
            abi.UFFD_EVENT_REMOVE,
            target.at(0),
            target.at(1),
        )
        assert drop.result() == 0
        assert fill(target, 1) == PAGE


def test_a_target_that_is_gone() -> None:
    """Fills say ESRCH, registering ENOMEM, a wake nothing, and no message comes."""
    with Target("anon", pages=2, register=MISSING | WP) as target, staged(PAGE) as source:
        fd, start = target.uffd, target.base
        target.kill()
        target.reap()
        assert calls.copy(fd, start, source, PAGE) == ESRCH
        assert calls.zeropage(fd, start, PAGE) == ESRCH
        assert calls.poison(fd, start, PAGE) == ESRCH
        assert calls.continue_(fd, start, PAGE) == ESRCH
        assert calls.writeprotect(fd, start, PAGE, 1) == ESRCH
        assert calls.move(fd, start, source, PAGE) == EINVAL  # never from another process
        with pytest.raises(OSError) as caught:
            calls.register(fd, start, PAGE, MISSING)
        assert caught.value.errno == errno.ENOMEM
        with pytest.raises(OSError) as caught:
            calls.unregister(fd, start, PAGE)
        assert caught.value.errno == errno.ENOMEM
        calls.wake(fd, start, PAGE)
        assert calls.read_messages(fd, [bytearray(abi.UFFD_MSG_SIZE)]) == 0


def test_a_closed_descriptor_is_ebadf() -> None:
    """A fill on a closed number is a number too; the other calls raise."""
    with Target("anon", pages=2) as target:
        fd = target.take_uffd()
        os.close(fd)
        with staged(PAGE) as source:
            assert calls.copy(fd, target.base, source, PAGE) == -errno.EBADF
        with pytest.raises(OSError) as caught:
            calls.wake(fd, target.base, PAGE)
        assert caught.value.errno == errno.EBADF


def test_each_thread_has_its_own_argument() -> None:
    """Fills from two threads at once do not mix their arguments."""
    pages = 200
    with Target("anon", pages=2 * pages) as target, staged(PAGE) as source:
        results: list[int] = []

        def run(first: int) -> None:
            results.extend(
                calls.copy(target.uffd, target.at(page), source, PAGE)
                for page in range(first, first + pages)
            )

        threads = [threading.Thread(target=run, args=(n * pages,)) for n in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == [PAGE] * 2 * pages
        assert all(target.is_present(page) for page in range(2 * pages))


def test_a_call_in_the_middle_of_a_call_disturbs_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal handler or finaliser may fill a page between another fill's pack and ioctl."""
    pack = calls._pack_five
    inner: list[int] = []

    with Target("anon", pages=2, register=MISSING) as target, staged(PAGE) as source:

        def interrupted(argument: bytearray, *words: int) -> None:
            pack(argument, *words)
            if not inner:
                inner.append(0)
                inner[0] = calls.copy(target.uffd, target.at(1), source, PAGE)

        monkeypatch.setattr(calls, "_pack_five", interrupted)
        assert calls.copy(target.uffd, target.at(0), source, PAGE) == PAGE
        assert inner == [PAGE]
        assert [target.start_read(page).result() for page in range(2)] == [7, 7]


def test_a_message_reader_gives_messages_then_none() -> None:
    """What is pending comes as bytes read; nothing pending is None, not an exception."""
    with Target("anon", pages=2, register=MISSING) as target:
        calls.set_nonblocking(target.uffd)
        buffer = bytearray(4 * abi.UFFD_MSG_SIZE)
        read = calls.reader(target.uffd, buffer)
        assert read() is None
        touch = target.start_read(1)
        targets.wait_until(target.is_blocked, "the thread faults")
        assert read() == abi.UFFD_MSG_SIZE
        assert buffer[0] == abi.UFFD_EVENT_PAGEFAULT
        assert fill(target, 1) == PAGE
        assert touch.result() == 7


def test_knows_a_pidfd() -> None:
    """A pidfd is told from other descriptors."""
    reader, writer = os.pipe()
    pidfd = os.pidfd_open(os.getpid())
    assert calls.is_pidfd(pidfd)
    assert not calls.is_pidfd(reader)
    for fd in (reader, writer, pidfd):
        os.close(fd)
