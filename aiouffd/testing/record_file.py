"""Record's file: JSON, one touch a line, so that two records can be compared with ``diff``.

::

    {"format": "aiouffd record", "version": 1,
     "began_ns": 100, "every": false, "dropped": 0,
     "regions": [{"name": "packet", "pages": 4, "page_size": 4096, "page_names": {"0": "header"}}],
     "threads": {"4012": "parser"},
     "openers": [],
     "touches": [
      {"number": 1, "time_ns": 120, ...},
      {"number": 2, "time_ns": 155, ...}]}

Knows: the file's form.
Must not know: what is made of it.

Laws of this file:

* A file is written whole or not at all; what was there before is replaced.
* A damaged file is refused with the line where JSON ends, or the field that is wrong; nothing
  is guessed, and a file of another version is not read as one of this.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from ..errors import UffdError
from .places import Layout
from .touches import Touch

FORMAT: Final = "aiouffd record"
VERSION: Final = 1

_FIELDS: Final = tuple(each.name for each in dataclasses.fields(Touch))


class RecordError(UffdError):
    """A file is no record of touches, or is damaged."""


@dataclass(frozen=True, slots=True)
class Contents:
    """What is in a file.

    Attributes:
        regions: Their layouts.
        threads: Names of threads, by id.
        touches: In order.
        openers: Touches that are not in the record, but hide later ones that would be.
        began_ns: When the record began, in nanoseconds of CLOCK_MONOTONIC.
        every: Whether all touches are in it, not only the first ones of each page.
        dropped: How many touches at its end there was no room for.
    """

    regions: tuple[Layout, ...]
    threads: Mapping[int, str]
    touches: tuple[Touch, ...]
    openers: tuple[Touch, ...]
    began_ns: int | None
    every: bool
    dropped: int = 0


def write(path: str | os.PathLike[str], contents: Contents) -> None:
    """Write a file.

    Raises:
        OSError: It cannot be written.
    """
    write_whole(path, _pieces(contents))


def write_whole(path: str | os.PathLike[str], pieces: Iterable[str]) -> None:
    """Write ASCII text so that a file has all of it, or is as it was before.

    Raises:
        OSError: It cannot be written; the error names ``path``.
    """
    target = os.fspath(path)
    part = f"{target}.part"
    try:
        with open(part, "w", encoding="ascii") as file:
            file.writelines(pieces)
        os.replace(part, target)
    except OSError as error:
        raise OSError(error.errno, error.strerror, target) from error


def _pieces(contents: Contents) -> Iterator[str]:
    regions = [
        {
            "name": each.name,
            "pages": each.pages,
            "page_size": each.page_size,
            "page_names": {str(page): name for page, name in each.page_names.items()},
        }
        for each in contents.regions
    ]
    threads = {str(tid): name for tid, name in contents.threads.items()}
    yield f'{{"format": {json.dumps(FORMAT)}, "version": {VERSION},\n'
    yield f' "began_ns": {json.dumps(contents.began_ns)},'
    yield f' "every": {json.dumps(contents.every)}, "dropped": {contents.dropped},\n'
    yield f' "regions": {json.dumps(regions)},\n "threads": {json.dumps(threads)},\n "openers": ['
    yield from _lines(contents.openers)
    yield '],\n "touches": ['
    yield from _lines(contents.touches)
    yield "]}\n"


def _lines(touches: Iterable[Touch]) -> Iterator[str]:
    separator = "\n  "
    for touch in touches:
        yield separator + json.dumps(dict(zip(_FIELDS, touch.to_wire(), strict=True)))
        separator = ",\n  "


def read(path: str | os.PathLike[str]) -> Contents:
    """Read a file.

    Raises:
        OSError: It cannot be read.
        RecordError: It is none, is damaged, or is of a version that is not known here.
    """
    name = os.fspath(path)
    with open(path, "rb") as file:
        data = file.read()
    try:
        document = json.loads(data)
    except ValueError as error:  # that it is no UTF-8, too
        raise RecordError(f"{name} is damaged, or no record of touches: {error}") from error
    except RecursionError as error:
        raise RecordError(f"{name} is no record of touches: it is nested too deeply") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise RecordError(f'{name} is no record of touches: "format" is not "{FORMAT}"')
    if document.get("version") != VERSION:
        raise RecordError(
            f"{name} is a record of version {document.get('version')!r};"
            f" this aiouffd reads version {VERSION}"
        )
    return _Reader(name).contents(document)


class _Reader:
    """Reads values that ought to have a certain form, and says where one has not."""

    def __init__(self, name: str) -> None:
        self._name = name

    def contents(self, document: dict[str, Any]) -> Contents:
        began_ns = document.get("began_ns")
        if began_ns is not None:
            began_ns = self._value(document, "", "began_ns", int)
        dropped = self._value(document, "", "dropped", int)
        if dropped < 0:
            raise self._wrong("dropped", "0 or more", dropped)
        return Contents(
            regions=tuple(
                self._layout(each, f"regions[{at}]")
                for at, each in enumerate(self._value(document, "", "regions", list))
            ),
            threads=self._numbered(self._value(document, "", "threads", dict), "threads"),
            touches=self._touches(document, "touches"),
            openers=self._touches(document, "openers"),
            began_ns=began_ns,
            every=self._value(document, "", "every", bool),
            dropped=dropped,
        )

    def _layout(self, value: object, where: str) -> Layout:
        names = self._numbered(self._value(value, where, "page_names", dict), f"{where}.page_names")
        layout = Layout(
            name=self._value(value, where, "name", str),
            pages=self._value(value, where, "pages", int),
            page_size=self._value(value, where, "page_size", int),
            page_names=names,
        )
        if layout.pages < 0:
            raise self._wrong(f"{where}.pages", "a count", layout.pages)
        if layout.page_size <= 0 or layout.page_size & (layout.page_size - 1):
            raise self._wrong(f"{where}.page_size", "a power of two", layout.page_size)
        return layout

    def _touches(self, document: dict[str, Any], name: str) -> tuple[Touch, ...]:
        listed = self._value(document, "", name, list)
        return tuple(self._touch(each, f"{name}[{at}]") for at, each in enumerate(listed))

    def _touch(self, value: object, where: str) -> Touch:
        if not isinstance(value, dict):
            raise self._wrong(where, "an object", value)
        missing = [each for each in _FIELDS if each not in value]
        if missing:
            raise RecordError(f"{self._name} is damaged: {where} has no {missing[0]!r}")
        try:
            touch = Touch.from_wire(tuple(value[each] for each in _FIELDS))
        except ValueError as error:
            raise RecordError(f"{self._name} is damaged: at {where}, {error}") from error
        for each in ("page", "offset", "waited_ns"):
            if getattr(touch, each) < 0:
                raise self._wrong(f"{where}.{each}", "0 or more", getattr(touch, each))
        return touch

    def _numbered(self, names: dict[str, Any], where: str) -> dict[int, str]:
        for number, name in names.items():
            if not (number.isascii() and number.isdigit()):
                raise self._wrong(f"a name in {where}", "a number", number)
            if type(name) is not str:
                raise self._wrong(f"{where}[{number}]", "str", name)
        return {int(number): name for number, name in names.items()}

    def _value(self, value: object, where: str, name: str, kind: type) -> Any:
        if not isinstance(value, dict):
            raise self._wrong(where, "an object", value)
        path = f"{where}.{name}" if where else name
        if name not in value:
            raise RecordError(f"{self._name} is damaged: it has no {path!r}")
        if type(value[name]) is not kind:
            raise self._wrong(path, kind.__name__, value[name])
        return value[name]

    def _wrong(self, path: str, wanted: str, value: object) -> RecordError:
        shown = repr(value)
        shown = shown if len(shown) < 60 else shown[:57] + "..."
        return RecordError(f"{self._name} is damaged: {path} should be {wanted}, and is {shown}")
