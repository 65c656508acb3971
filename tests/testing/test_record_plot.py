"""Pictures of records: files that are what their suffix says, with everybody's name in them."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from aiouffd.errors import UffdError
from aiouffd.testing import record_plot
from aiouffd.testing.places import Layout
from aiouffd.testing.record import Record
from aiouffd.testing.touches import Access, Touch
from tests.touching import PACKET, PAGE, RING, THREADS, touch

pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'aiouffd[plot]'")
pytestmark = pytest.mark.leaky("matplotlib keeps the fonts open that it has used")

SOME = [
    dataclasses.replace(touch(1, 0, waited_ns=5000), outcome="frozen"),
    touch(2, PAGE, Access.WRITE, thread=12),
    dataclasses.replace(touch(3, 0, layout=RING, thread=13), outcome="failed"),
]


def record(touches: list[Touch], layout: Layout = PACKET, *, every: bool = False) -> Record:
    return Record(touches, regions=(layout, RING), threads=THREADS, began_ns=1_000_000, every=every)


def texts(path: Path, drawn: Record) -> list[str]:
    """Draw it, and list all that is written in it: texts, or beside their glyphs."""
    record_plot.plot(drawn, path / "record.svg")
    picture = (path / "record.svg").read_text()
    found = re.findall("<!-- (.*?) -->|<text[^>]*>([^<]*)</text>", picture)
    return [beside or text for beside, text in found]


@pytest.mark.parametrize(("suffix", "magic"), [("png", b"\x89PNG\r\n"), ("svg", b"<?xml version")])
def test_a_picture_is_drawn(tmp_path: Path, suffix: str, magic: bytes) -> None:
    """Of a record with touches, and of one without."""
    for name, touches in (("some", SOME), ("none", [])):
        output = tmp_path / f"{name}.{suffix}"
        record_plot.plot(record(touches), output)
        assert output.read_bytes().startswith(magic)


def test_everybody_is_named(tmp_path: Path) -> None:
    """Pages, those that nobody touched too, threads, and what the signs mean."""
    written = texts(tmp_path, record(SOME))
    assert {"packet[header]", "packet[body]", "packet[2]", "packet[3]", "ring[slots]"} <= {*written}
    assert {"parser (tid 11)", "writer (tid 12)", "tid 13"} <= {*written}
    assert {"read", "write", "waited", "failed"} <= {*written}
    assert {"µs since the record began", "3 first touches of 3 pages by 3 threads"} <= {*written}


def test_only_what_is_there_is_explained(tmp_path: Path) -> None:
    """No sign that is nowhere in the picture."""
    written = texts(tmp_path, record(SOME[1:2], every=True))
    assert not {"read", "waited", "failed", "others"} & {*written}
    assert {"write", "1 touch of 1 page by 1 thread"} <= {*written}


def test_without_touches_it_says_so(tmp_path: Path) -> None:
    """Rather than be an empty frame."""
    assert "no touches" in texts(tmp_path, Record())


def test_of_many_pages_those_touched_are_shown(tmp_path: Path) -> None:
    """And only some of them are named; the picture says so."""
    heap = Layout("heap", 1 << 20)
    many = [touch(number, 1000 * number * PAGE, layout=heap) for number in range(1, 101)]
    written = texts(tmp_path, record(many, heap))
    named = [each for each in written if each.startswith("heap[")]
    assert named[:2] == ["heap[1000]", "heap[4000]"]
    assert 25 <= len(named) <= 48
    assert "pages, without those that were not touched" in written


def test_of_many_threads_the_first_have_colours(tmp_path: Path) -> None:
    """The others are grey, together."""
    written = texts(tmp_path, record([touch(at, 0, thread=99 + at) for at in range(1, 13)]))
    assert [each for each in written if each.startswith("tid ")] == [
        f"tid {tid}" for tid in range(100, 108)
    ]
    assert written.count("others") == 1


def test_of_too_many_touches_the_first_are_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The title says how many."""
    monkeypatch.setattr(record_plot, "_MOST_POINTS", 2)
    title = "3 first touches of 3 pages by 3 threads; the first 2 are drawn"
    assert title in texts(tmp_path, record(SOME))


def test_another_suffix_is_refused(tmp_path: Path) -> None:
    """Before anything is drawn."""
    with pytest.raises(UffdError, match=r"a plot is a \.png or an \.svg"):
        record_plot.plot(record(SOME), tmp_path / "record.gif")


def test_without_matplotlib_the_extra_is_named() -> None:
    """And records work all the same."""
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from aiouffd.testing.record import Record\n"
        "from aiouffd.testing import record_plot\n"
        "assert Record().summary() == 'no touches'\n"
        "record_plot.plot(Record(), 'x.png')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=Path(__file__).resolve().parent.parent.parent,
    )
    assert done.returncode == 1
    assert "pip install 'aiouffd[plot]'" in done.stderr
