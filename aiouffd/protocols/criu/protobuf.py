"""Protocol buffers as CRIU writes them: the wire format of proto2, read and written.

Knows: keys, varints, lengths.
Must not know: what a field means.

Laws of this file:

* A message stays where it is: what is read of it are numbers, and positions in its bytes.
  A length is checked against what is there before anything is done with it.
* As every reader of protocol buffers: unknown fields are stepped over, of a field that comes
  twice the last one counts, and a repeated number may be packed or not.
* What cannot be a message is WireError, which says where.  Groups (wire types 3 and 4), which
  proto2 has given up, count as that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

_VARINT: Final = 0
_FIXED64: Final = 1
_BYTES: Final = 2
_FIXED32: Final = 5

_FIXED: Final = {_FIXED64: 8, _FIXED32: 4}

_MOST: Final = (1 << 64) - 1


class WireError(ValueError):
    """Bytes that are no message, or lack what the message must have.

    Attributes:
        problem: What is wrong.
        offset: Where, in the bytes that were read.
    """

    def __init__(self, problem: str, offset: int) -> None:
        super().__init__(f"at offset {offset}: {problem}")
        self.problem = problem
        self.offset = offset


class Field(NamedTuple):
    """One field as it lies in a message.

    Attributes:
        number: Which one.
        value: Its number; 0 for one that has a length.
        start: Where its bytes begin, behind key and length.
        end: Where they end.
        long: Whether it has a length: text, bytes, a message, or packed numbers.
    """

    number: int
    value: int
    start: int
    end: int
    long: bool


def varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    """Read a number.

    Returns:
        The number, and where it ends.

    Raises:
        WireError: It is cut off, or has more than 64 bits.
    """
    start = at
    value = shift = 0
    while at < end:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value > _MOST:
                break
            return value, at
        shift += 7
        if shift > 63:
            break
    else:
        raise WireError("a number is cut off", start)
    raise WireError("a number of more than 64 bits", start)


def fields(data: bytes, start: int, end: int) -> Iterator[Field]:
    """Walk the fields of a message.

    Args:
        data: What holds the message.
        start: Where it begins.
        end: Where it ends.

    Raises:
        WireError: It is none.
    """
    at = start
    while at < end:
        began = at
        key, at = varint(data, at, end)
        number, wire = key >> 3, key & 7
        if not 0 < number < 1 << 29:
            raise WireError(f"a field cannot have the number {number}", began)
        if wire == _VARINT:
            begin = at
            value, at = varint(data, at, end)
            yield Field(number, value, begin, at, long=False)
            continue
        if wire == _BYTES:
            length, at = varint(data, at, end)
        elif wire in _FIXED:
            length = _FIXED[wire]
        else:
            raise WireError(f"field {number} has wire type {wire}, which means nothing", began)
        if length > end - at:
            raise WireError(f"field {number} of {length} bytes, where {end - at} are left", began)
        value = 0 if wire == _BYTES else int.from_bytes(data[at : at + length], "little")
        yield Field(number, value, at, at + length, long=wire == _BYTES)
        at += length


def numbers(data: bytes, start: int, end: int) -> dict[int, int]:
    """Read a message of which only the numbers count: quicker than ``Message``.

    Returns:
        By field: its value.  Fields that have a length are left out.

    Raises:
        WireError: It is no message.
    """
    found: dict[int, int] = {}
    at = start
    while at < end:
        key = data[at]
        if key & 0x87 or not key or at + 1 == end:  # all but a number of a field up to 15
            break
        value = data[at + 1]
        if value < 0x80:
            at += 2
        else:
            value, at = varint(data, at + 1, end)
        found[key >> 3] = value
    if at < end:
        found.update((one.number, one.value) for one in fields(data, at, end) if not one.long)
    return found


class Message:
    """The fields of one message, asked for by number.

    Attributes:
        start: Where it begins.
    """

    __slots__ = ("_data", "_fields", "start")

    def __init__(self, data: bytes, start: int, end: int, numbers: Iterable[int]) -> None:
        """Read a message.

        Args:
            data: What holds it.
            start: Where it begins.
            end: Where it ends.
            numbers: The fields that will be asked for; others are stepped over.

        Raises:
            WireError: It is none.
        """
        self.start = start
        self._data = data
        self._fields: dict[int, list[Field]] = {number: [] for number in numbers}
        for field in fields(data, start, end):
            wanted = self._fields.get(field.number)
            if wanted is not None:
                wanted.append(field)

    def number(self, number: int, *, bits: int = 64, default: int | None = None) -> int:
        """Give an unsigned number.

        Args:
            number: Of the field.
            bits: How many it may have.
            default: What to give if it is not there; without one, it must be.

        Raises:
            WireError: It is missing, is no number, or is too big.
        """
        found = self._fields[number]
        if not found:
            if default is None:
                raise WireError(f"a message lacks its field {number}", self.start)
            return default
        last = found[-1]
        if last.long:
            raise WireError(f"field {number} is no number", last.start)
        return _within(last.value, bits, number, last.start)

    def numbers(self, number: int, *, bits: int = 64) -> Iterator[int]:
        """Give the unsigned numbers of a repeated field, packed or not.

        Raises:
            WireError: One is too big, or cut off.
        """
        for field in self._fields[number]:
            if not field.long:
                yield _within(field.value, bits, number, field.start)
                continue
            at = field.start
            while at < field.end:
                began = at
                value, at = varint(self._data, at, field.end)
                yield _within(value, bits, number, began)

    def messages(self, number: int) -> Iterator[tuple[int, int]]:
        """Give where each message of a repeated field begins and ends.

        Raises:
            WireError: One has no length.
        """
        for field in self._fields[number]:
            if not field.long:
                raise WireError(f"field {number} is no message", field.start)
            yield field.start, field.end

    def message(self, number: int) -> tuple[int, int] | None:
        """Give where a message begins and ends; None if it is not there.

        Raises:
            WireError: It has no length.
        """
        places = [*self.messages(number)]
        return places[-1] if places else None

    def text(self, number: int) -> str:
        """Give a text; empty if it is not there.  What is no UTF-8 is shown as escapes.

        Raises:
            WireError: It has no length.
        """
        place = self.message(number)
        if place is None:
            return ""
        return self._data[place[0] : place[1]].decode("utf-8", "backslashreplace")


def _within(value: int, bits: int, number: int, at: int) -> int:
    if value >> bits:
        raise WireError(f"field {number} is {value}, more than {bits} bits hold", at)
    return value


def write_varint(value: int) -> bytes:
    """Write a number of up to 64 bits, not negative."""
    if not 0 <= value <= _MOST:
        raise ValueError(f"{value} does not fit into 64 bits")
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def write_number(number: int, value: int) -> bytes:
    """Write a field that holds an unsigned number."""
    return write_varint(number << 3 | _VARINT) + write_varint(value)


def write_bytes(number: int, value: bytes) -> bytes:
    """Write a field that has a length: text in UTF-8, bytes, or a message."""
    return write_varint(number << 3 | _BYTES) + write_varint(len(value)) + value
