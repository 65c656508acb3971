"""Files of records: whole or not at all, and a damaged one says where."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiouffd.testing.places import Layout
from aiouffd.testing.record_file import Contents, RecordError, read, write
from aiouffd.testing.touches import Touch
from tests.touching import ANY_TOUCH, PACKET, THREADS, touch

CONTENTS = st.builds(
    Contents,
    regions=st.lists(
        st.builds(
            Layout,
            name=st.text(),
            pages=st.integers(0, 1 << 40),
            page_size=st.sampled_from([4096, 65536, 2 << 20]),
            page_names=st.dictionaries(st.integers(0, 1 << 40), st.text()),
        ),
        max_size=3,
    ).map(tuple),
    threads=st.dictionaries(st.integers(1, 1 << 22), st.text()),
    touches=st.lists(ANY_TOUCH.map(lambda pair: pair[0]), max_size=5).map(tuple),
    openers=st.lists(ANY_TOUCH.map(lambda pair: pair[0]), max_size=5).map(tuple),
    began_ns=st.none() | st.integers(0, 1 << 60),
    every=st.booleans(),
    dropped=st.integers(0, 1 << 60),
)

GOOD = Contents((PACKET,), THREADS, (touch(1, 0), touch(2, 4096)), (touch(3, 0),), 1000, every=True)


@given(CONTENTS)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, contents: Contents
) -> None:
    """Whatever the names are, and as plain JSON."""
    path = tmp_path_factory.getbasetemp() / "contents.json"
    write(path, contents)
    assert read(path) == contents
    assert json.loads(path.read_bytes())["version"] == 1


def test_each_touch_has_its_line(tmp_path: Path) -> None:
    """So that two records can be compared with diff."""
    write(tmp_path / "x", GOOD)
    lines = (tmp_path / "x").read_text().splitlines()
    assert sum('"number": ' in line for line in lines) == 3


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    """The error names the file, and the one that was there is still good."""
    with pytest.raises(FileNotFoundError) as info:
        write(tmp_path / "nowhere" / "x", GOOD)
    assert info.value.filename == os.fspath(tmp_path / "nowhere" / "x")
    write(tmp_path / "x", GOOD)
    (tmp_path / "x.part").mkdir()
    with pytest.raises(IsADirectoryError):
        write(tmp_path / "x", GOOD)
    assert read(tmp_path / "x") == GOOD


@pytest.fixture
def document(tmp_path: Path) -> dict[str, Any]:
    write(tmp_path / "good", GOOD)
    loaded: dict[str, Any] = json.loads((tmp_path / "good").read_bytes())
    return loaded


def refusal(tmp_path: Path, data: bytes) -> str:
    (tmp_path / "bad").write_bytes(data)
    with pytest.raises(RecordError) as info:
        read(tmp_path / "bad")
    text = str(info.value)
    assert text.startswith(os.fspath(tmp_path / "bad"))
    return text[len(os.fspath(tmp_path / "bad ")) :]


@pytest.mark.parametrize(
    ("path", "value", "error"),
    [
        (("format",), "x", 'is no record of touches: "format" is not "aiouffd record"'),
        (("version",), 2, "is a record of version 2; this aiouffd reads version 1"),
        (("began_ns",), "0", "is damaged: began_ns should be int, and is '0'"),
        (("dropped",), -1, "is damaged: dropped should be 0 or more, and is -1"),
        (("every",), 1, "is damaged: every should be bool, and is 1"),
        (("regions",), {}, "is damaged: regions should be list, and is {}"),
        (("regions", 0), 7, "is damaged: regions[0] should be an object, and is 7"),
        (("regions", 0, "pages"), -1, "is damaged: regions[0].pages should be a count, and is -1"),
        (
            ("regions", 0, "page_size"),
            4095,
            "is damaged: regions[0].page_size should be a power of two, and is 4095",
        ),
        (
            ("regions", 0, "page_names", "x"),
            "y",
            "is damaged: a name in regions[0].page_names should be a number, and is 'x'",
        ),
        (("threads", "12"), None, "is damaged: threads[12] should be str, and is None"),
        (("touches", 1), [], "is damaged: touches[1] should be an object, and is []"),
        (
            ("touches", 1, "page"),
            1.5,
            "is damaged: at touches[1], page of a touch is int, not 1.5",
        ),
        (
            ("touches", 1, "access"),
            "execute",
            "is damaged: at touches[1], access of a touch is read or write, not 'execute'",
        ),
        (
            ("openers", 0, "offset"),
            -4,
            "is damaged: openers[0].offset should be 0 or more, and is -4",
        ),
    ],
)
def test_a_wrong_value_is_named(
    tmp_path: Path,
    document: dict[str, Any],
    path: tuple[str | int, ...],
    value: object,
    error: str,
) -> None:
    """By its place in the document, with what it should be."""
    at: Any = document
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    assert refusal(tmp_path, json.dumps(document).encode()) == error


@pytest.mark.parametrize("name", ["every", "dropped", "regions", "threads", "touches", "openers"])
def test_a_missing_part_is_named(tmp_path: Path, document: dict[str, Any], name: str) -> None:
    """Nothing is made up for it."""
    del document[name]
    assert refusal(tmp_path, json.dumps(document).encode()) == f"is damaged: it has no '{name}'"


def test_a_missing_attribute_is_named(tmp_path: Path, document: dict[str, Any]) -> None:
    """With the touch that lacks it."""
    del document["touches"][1]["waited_ns"]
    text = refusal(tmp_path, json.dumps(document).encode())
    assert text == "is damaged: touches[1] has no 'waited_ns'"


def test_a_long_value_is_cut(tmp_path: Path, document: dict[str, Any]) -> None:
    """An error stays a line."""
    document["every"] = "x" * 1000
    assert len(refusal(tmp_path, json.dumps(document).encode())) < 120


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    """Wherever a file ends too early; the line is named."""
    write(tmp_path / "x", GOOD)
    data = (tmp_path / "x").read_bytes().rstrip()
    for length in range(len(data)):
        text = refusal(tmp_path, data[:length])
        assert text.startswith("is damaged, or no record of touches: ")
        assert " line " in text


@pytest.mark.parametrize("data", [b"", b"\xff\xfe", b"[]", b"7", b"[" * 100_000])
def test_other_files_are_refused(tmp_path: Path, data: bytes) -> None:
    """With no other error than RecordError."""
    assert "no record of touches" in refusal(tmp_path, data)


def test_a_file_that_is_not_there_is_not_read(tmp_path: Path) -> None:
    """OSError stays OSError."""
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "x")


def test_touches_are_plain_objects(document: dict[str, Any]) -> None:
    """Other programs read them by the names of the attributes."""
    assert document["touches"][1] == {
        "number": 2,
        "time_ns": 1_002_000,
        "process": 10,
        "thread": 11,
        "region": "packet",
        "page": 1,
        "offset": 4096,
        "access": "read",
        "system_call": None,
        "pc": None,
        "where": "",
        "outcome": "passed",
        "waited_ns": 0,
    }
    assert Touch.from_wire(tuple(document["touches"][1].values())) == touch(2, 4096)
