"""Traces of records: what the Trace Event Format asks for, and that nothing is lost."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiouffd.testing import perfetto
from aiouffd.testing.record import Record
from aiouffd.testing.touches import Access, Touch
from tests.touching import ANY_TOUCH, PACKET, PAGE, RING, THREADS, touch

pytestmark = pytest.mark.once


def trace(record: Record) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads("".join(perfetto.pieces(record)))
    return loaded


def record(*touches: Touch, began_ns: int = 1_000_000) -> Record:
    return Record(touches, regions=(PACKET, RING), threads=THREADS, began_ns=began_ns)


def test_a_touch_is_an_instant_on_its_thread() -> None:
    """With all there is to say about it."""
    one = dataclasses.replace(touch(3, PAGE + 5), where="libparse.so+0x1139", pc=0x7F0000001139)
    assert trace(record(one))["traceEvents"][-1] == {
        "name": "read packet[body]",
        "cat": "read",
        "ph": "i",
        "s": "t",
        "ts": 3.0,
        "pid": 10,
        "tid": 11,
        "args": {
            "number": 3,
            "page": "packet[body]",
            "offset": "0x1005",
            "access": "read",
            "where": "libparse.so+0x1139",
            "pc": "0x7f0000001139",
            "outcome": "passed",
        },
    }


def test_a_wait_is_as_long_as_it_was() -> None:
    """It is a complete event, in microseconds; and a system call has its number."""
    one = dataclasses.replace(
        touch(1, 0, Access.WRITE, waited_ns=1_234_567), outcome="frozen", system_call=0
    )
    event = trace(record(one))["traceEvents"][-1]
    assert (event["ph"], event["dur"], "s" in event) == ("X", 1234.567, False)
    assert (event["args"]["outcome"], event["args"]["system_call"]) == ("frozen", 0)


def test_each_thread_has_a_track() -> None:
    """Named, under its process, in the order of first touches."""
    touches = [touch(1, 0, thread=12), touch(2, 0), touch(3, 0, thread=13, process=20)]
    names = [each for each in trace(record(*touches))["traceEvents"] if each["ph"] == "M"]
    assert [(x["name"], x["pid"], x["tid"], *x["args"].values()) for x in names] == [
        ("process_name", 10, 12, "process (10)"),
        ("thread_name", 10, 12, "writer"),
        ("thread_sort_index", 10, 12, 0),
        ("thread_name", 10, 11, "parser"),
        ("thread_sort_index", 10, 11, 1),
        ("process_name", 20, 13, "process (20)"),
        ("thread_name", 20, 13, "thread"),
        ("thread_sort_index", 20, 13, 2),
    ]


def test_the_test_process_is_called_so() -> None:
    """Among the processes of a trace it is the one that a reader knows."""
    here = trace(record(touch(1, 0, process=os.getpid())))["traceEvents"][0]
    assert here["args"]["name"] == f"test process ({os.getpid()})"


def test_an_empty_record_is_a_trace() -> None:
    """Without events."""
    assert trace(Record()) == {
        "traceEvents": [],
        "displayTimeUnit": "ns",
        "otherData": {"recorded": "first touches", "began_ns": "0"},
    }


@given(
    st.lists(ANY_TOUCH, max_size=5, unique_by=lambda pair: pair[0].number),
    st.integers(0, 1 << 60),
    st.dictionaries(st.integers(1, 1 << 22), st.text(), max_size=3),
    st.booleans(),
)
def test_every_touch_is_an_event(
    pairs: list[tuple[Touch, int]], began_ns: int, names: dict[int, str], every: bool
) -> None:
    """Of the form that Perfetto's importer takes, whatever is in it."""
    touches = [each for each, _ in pairs]
    names |= {each.thread: each.where for each in touches[:2]}
    mine = Record(touches, threads=names, began_ns=began_ns, every=every)
    loaded = trace(mine)
    assert loaded["otherData"]["recorded"] == ("every touch" if every else "first touches")
    events = loaded["traceEvents"]
    for each in events:
        assert isinstance(each["name"], str)
        assert each["ph"] in {"i", "X", "M"}
        assert all(0 <= each[key] < 1 << 32 and type(each[key]) is int for key in ("pid", "tid"))
        assert all(type(x) is str or -(1 << 63) <= x < 1 << 63 for x in each["args"].values())
        assert each["ph"] == "M" or type(each["ts"]) is float
        assert (each["ph"] == "i") == (each.get("s") == "t")
        assert (each["ph"] == "X") == ("dur" in each)
    shown = [each for each in events if each["ph"] != "M"]
    assert [
        (x["pid"], x["tid"], x["args"]["number"], x["args"]["access"], x["args"]["where"])
        for x in shown
    ] == [(x.process, x.thread, x.number, x.access.value, x.where) for x in touches]
    for each, event in zip(touches, shown, strict=True):
        assert int(event["args"]["offset"], 16) == each.offset
        assert int(event["args"].get("pc", "0"), 16) == (each.pc or 0)
        assert event["ts"] * 1000 == pytest.approx(each.time_ns - began_ns, abs=0.5, rel=1e-15)
        assert event.get("dur", 0) * 1000 == pytest.approx(each.waited_ns, abs=0.5)


def test_a_trace_is_saved(tmp_path: Path) -> None:
    """As a file of its own, or not at all."""
    perfetto.save(record(touch(1, 0)), tmp_path / "trace.json")
    assert len(json.loads((tmp_path / "trace.json").read_bytes())["traceEvents"]) == 4
    with pytest.raises(FileNotFoundError) as info:
        perfetto.save(record(touch(1, 0)), tmp_path / "nowhere" / "trace.json")
    assert info.value.filename == os.fspath(tmp_path / "nowhere" / "trace.json")


def test_many_touches_are_written_in_pieces(tmp_path: Path) -> None:
    """A hundred thousand of them, and never all of the text at once."""
    many = record(*(touch(number, number % (4 * PAGE)) for number in range(1, 100_001)))
    perfetto.save(many, tmp_path / "trace.json")
    with open(tmp_path / "trace.json", "rb") as file:
        assert sum(b'"ph": "i"' in line for line in file) == 100_000
    assert max(map(len, perfetto.pieces(many))) < 1000
