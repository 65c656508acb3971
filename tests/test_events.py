"""Messages decoded, fault words packed: tables, random bytes, and an independent reading."""

from __future__ import annotations

import ctypes
import os

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from aiouffd import events
from aiouffd.events import (
    MESSAGE_SIZE,
    MINOR,
    WP,
    WRITE,
    Event,
    Forked,
    Message,
    PageFault,
    RawFault,
    Remapped,
    Removed,
    UnknownEvent,
    Unmapped,
    decode,
    decode_fault_word,
    fault_word,
)
from aiouffd.kernel import abi
from aiouffd.ranges import PAGE_SIZE, Range

TOP = (1 << 64) - 1

# --- messages --------------------------------------------------------------------------


def pagefault(flags: int, address: int, thread_id: int = 0) -> bytes:
    return abi.UFFD_MSG_PAGEFAULT.pack(abi.UFFD_EVENT_PAGEFAULT, flags, address, thread_id)


def remap(start: int, to: int, length: int) -> bytes:
    return abi.UFFD_MSG_REMAP.pack(abi.UFFD_EVENT_REMAP, start, to, length)


def a_range(event: int, start: int, end: int) -> bytes:
    return abi.UFFD_MSG_RANGE.pack(event, start, end)


UNKNOWN = bytes([0x17, *range(31)])

TABLE: list[tuple[bytes, Message]] = [
    (pagefault(0, 0x7000, 0), RawFault(0, 0x7000, 0)),
    (pagefault(3, 0x7123, 4242), RawFault(3, 0x7123, 4242)),
    (pagefault(1 << 63 | 8, TOP, 0xFFFF_FFFF), RawFault(1 << 63 | 8, TOP, 0xFFFF_FFFF)),
    (remap(0x1000, 0x9000, 0x2000), Remapped(0x1000, 0x9000, 0x2000)),
    (remap(TOP, 0, TOP), Remapped(TOP, 0, TOP)),
    (a_range(abi.UFFD_EVENT_REMOVE, 0x1000, 0x3000), Removed(Range(0x1000, 0x2000))),
    (a_range(abi.UFFD_EVENT_UNMAP, 0, TOP), Unmapped(Range(0, TOP))),
    (a_range(abi.UFFD_EVENT_UNMAP, 0x1000, 0x1000), Unmapped(Range(0x1000, 0))),
    (UNKNOWN, UnknownEvent(0x17, UNKNOWN)),
    (bytes(32), UnknownEvent(0, bytes(32))),
]


@pytest.mark.parametrize("data, message", TABLE)
def test_each_kind(data: bytes, message: Message) -> None:
    """What the kernel writes is what is read, each field at its place."""
    assert list(decode(data)) == [message]


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_a_batch_in_order(kind: type[bytes]) -> None:
    """Messages come out as they went in, from any buffer."""
    batch = b"".join(data for data, _ in TABLE)
    assert list(decode(kind(batch))) == [message for _, message in TABLE]


def test_unknown_messages_are_kept_whole() -> None:
    """What a newer kernel says outlives the buffer it was read into."""
    buffer = bytearray(UNKNOWN)
    (message,) = decode(memoryview(buffer))
    buffer[:] = bytes(32)
    assert message == UnknownEvent(0x17, UNKNOWN)


def test_nothing_read_is_nothing() -> None:
    """An empty read has no message."""
    assert list(decode(b"")) == []


@pytest.mark.parametrize("length", [1, 31, 33, 63])
def test_parts_of_messages_are_refused(length: int) -> None:
    """The kernel gives whole messages; anything else is a mistake of the caller."""
    with pytest.raises(ValueError, match=f"{length} bytes"):
        list(decode(bytes(length)))


def test_a_range_that_ends_before_it_starts() -> None:
    """No kernel says so, and nothing is invented for it."""
    with pytest.raises(ValueError, match="no negative parts"):
        list(decode(a_range(abi.UFFD_EVENT_REMOVE, 2, 1)))


def test_a_fork_owns_its_descriptor() -> None:
    """The child's userfaultfd has an owner from the moment it is decoded."""
    fd = os.open(os.devnull, os.O_RDONLY)
    (message,) = decode(abi.UFFD_MSG_FORK.pack(abi.UFFD_EVENT_FORK, fd))
    assert isinstance(message, Forked)
    with message.fd as owned:
        assert owned.fileno() == fd
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)


class Fields(ctypes.LittleEndianStructure):
    """``struct uffd_msg`` as three numbers behind the event."""

    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (
        ("event", ctypes.c_uint8),
        ("reserved", ctypes.c_uint8 * 7),
        ("first", ctypes.c_uint64),
        ("second", ctypes.c_uint64),
        ("third", ctypes.c_uint64),
    )


def read_independently(data: bytes) -> tuple[object, ...]:
    fields = Fields.from_buffer_copy(data)
    one, two, three = fields.first, fields.second, fields.third
    match fields.event:
        case 0x12:
            return (RawFault, one, two, three & 0xFFFF_FFFF)
        case 0x13:
            return (Forked, one & 0xFFFF_FFFF)
        case 0x14:
            return (Remapped, one, two, three)
        case 0x15:
            return (Removed, one, two)
        case 0x16:
            return (Unmapped, one, two)
        case number:
            return (UnknownEvent, number, data)


def shown(message: Message) -> tuple[object, ...]:
    match message:
        case RawFault(flags, address, thread_id):
            return (RawFault, flags, address, thread_id)
        case Forked(fd):
            return (Forked, fd.detach())  # a random number: it must never be closed
        case Remapped(start, to, length):
            return (Remapped, start, to, length)
        case Removed(where) | Unmapped(where):
            return (type(message), where.start, where.end)
        case UnknownEvent(number, data):
            return (UnknownEvent, number, data)


random_messages = st.tuples(
    st.one_of(st.integers(0x12, 0x16), st.integers(0, 255)), st.binary(min_size=31, max_size=31)
).map(lambda parts: bytes([parts[0]]) + parts[1])


@given(st.lists(random_messages, max_size=8))
@example([])
def test_random_bytes_mean_what_their_fields_say(messages: list[bytes]) -> None:
    """Whatever the bytes are: each message is read, or its range is impossible."""
    decoded = decode(b"".join(messages))
    for data in messages:
        expected = read_independently(data)
        if expected[0] in {Removed, Unmapped} and expected[2] < expected[1]:  # type: ignore[operator]
            with pytest.raises(ValueError, match="no negative parts"):
                next(decoded)
            return
        assert shown(next(decoded)) == expected
    assert next(decoded, None) is None


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    """A decoder raises nothing but ValueError."""
    try:
        for message in decode(data):
            if isinstance(message, Forked):
                message.fd.detach()
    except ValueError:
        pass


def test_events_are_values() -> None:
    """Equal when their fields are; nobody changes one that another has too."""
    event: Event = Remapped(1, 2, 3)
    assert event == Remapped(1, 2, 3)
    assert hash(event) == hash(Remapped(1, 2, 3))
    with pytest.raises(AttributeError):
        event.start = 4  # type: ignore[misc]


# --- page faults -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, kind, write",
    [
        (0, "missing", False),
        (WRITE, "missing", True),
        (WP | WRITE, "wp", True),
        (MINOR, "minor", False),
        (MINOR | WRITE, "minor", True),
        (1 << 3, "missing", False),  # a bit of a newer kernel
    ],
)
def test_the_kind_of_a_fault(flags: int, kind: str, write: bool) -> None:
    """Neither WP nor MINOR set means that there is no page."""
    fault = PageFault(0x7000, 0, PAGE_SIZE, flags)
    assert fault.kind == kind
    assert [fault.missing, fault.wp, fault.minor] == [k == kind for k in ("missing", "wp", "minor")]
    assert fault.write == write
    assert decode_fault_word(fault.word) == (fault.address // PAGE_SIZE * PAGE_SIZE, flags & 7)


# --- fault words -----------------------------------------------------------------------


@given(st.integers(0, TOP), st.integers(0, TOP))
def test_a_fault_word_gives_back_page_and_flags(address: int, flags: int) -> None:
    """Within its page the address is forgotten, and flags that it has no room for."""
    word = fault_word(address, flags)
    assert decode_fault_word(word) == (address & -PAGE_SIZE, flags & (WRITE | WP | MINOR))
    assert word & 1 == flags & WRITE  # where read(2) had it in 2015
    assert word & 2 == flags & WP


@given(st.integers(0, TOP))
def test_any_word_is_a_fault_or_refused(word: int) -> None:
    """What decodes is encoded back to the same word."""
    try:
        address, flags = decode_fault_word(word)
    except ValueError:
        assert word & (PAGE_SIZE - 1) & ~7
    else:
        assert fault_word(address, flags) == word


@given(st.integers(0, (TOP >> 12)), st.integers(0, 7))
def test_every_page_and_flag_has_its_word(page: int, flags: int) -> None:
    """Words are as many as pages and flags."""
    word = page << 12 | flags
    if PAGE_SIZE == 4096:
        assert fault_word(*decode_fault_word(word)) == word


@pytest.mark.parametrize("value", [-1, 1 << 64])
def test_fault_words_have_64_bits(value: int) -> None:
    """Neither an address nor a word is larger."""
    with pytest.raises(ValueError, match="64 bits"):
        fault_word(value, 0)
    with pytest.raises(ValueError, match="64 bits"):
        decode_fault_word(value)


def test_unknown_low_bits_are_refused() -> None:
    """A word with other bits is of another kind of record."""
    with pytest.raises(ValueError, match="0x1008 is no fault word: unknown low bits 0x8"):
        decode_fault_word(0x1008)


def test_message_size() -> None:
    """Thirty-two bytes, whatever the event."""
    assert MESSAGE_SIZE == ctypes.sizeof(Fields) == 32
    assert events.PAGEFAULT == 0x12
