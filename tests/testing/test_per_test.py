"""The harnesses of one test, without pytest: opened with settings, asked, closed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from aiouffd.testing import per_test
from aiouffd.testing.failures import HarnessError
from aiouffd.testing.per_test import PerTest, region_of, write
from aiouffd.testing.record import Record
from aiouffd.testing.settings import Settings

pytestmark = pytest.mark.child

STACKS = """\
nobody released within 1 s, so the harness let go:
  #1 tid 5 reads packet[0]+0x0 (user mode)
stacks of the test process at that moment:
Thread 0x00007f41b89276c0 (most recent call first):
  File "/usr/lib/python3.11/socket.py", line 573 in recv_fds
  File "/x/aiouffd/testing/helper.py", line 372 in _carry
  File "/usr/lib/python3.11/threading.py", line 1002 in _bootstrap

Thread 0x00007f41b89276c1 (most recent call first):
  File "/y/harness.py", line 2 in f

Current thread 0x00007f41bac5db80 (most recent call first):
  File "/y/test_it.py", line 21 in test_hangs
  File "/x/site-packages/_pytest/python.py", line 187 in pytest_pyfunc_call
  File "/x/site-packages/pluggy/_execution.py", line 147 in _multicall
  File "/x/site-packages/pytest/__main__.py", line 9 in <module>
  File "<frozen runpy>", line 88 in _run_code"""

READABLE = """\
nobody released within 1 s, so the harness let go:
  #1 tid 5 reads packet[0]+0x0 (user mode)
stacks of the test process at that moment:
Thread 0x00007f41b89276c1 (most recent call first):
  File "/y/harness.py", line 2 in f

Current thread 0x00007f41bac5db80 (most recent call first):
  File "/y/test_it.py", line 21 in test_hangs"""


def test_stacks_without_what_is_the_same_in_all() -> None:
    """The porter's thread and the way from pytest to the test are left out, and no more."""
    assert per_test._readable(STACKS) == READABLE
    assert per_test._readable(READABLE) == READABLE


def test_settings_and_arguments() -> None:
    """A harness has the test's settings, but where it is asked for others."""
    harnesses = PerTest(Settings(timeout=3.0, backend="process"), seed=5)
    first, second = harnesses.open(), harnesses.open(timeout=4, seed=6)
    assert (first.timeout, first.backend, first.seed) == (3.0, "process", 5)
    assert (second.timeout, second.backend, second.seed) == (4, "process", 6)
    assert harnesses.trouble() is None
    assert harnesses.close(None) is None
    assert first.closed
    assert second.closed
    assert harnesses.close(None) is None


def test_the_markers_seed_is_the_harnesss() -> None:
    """What the settings say goes before what was made of the run's."""
    harnesses = PerTest(Settings(seed=7), seed=5)
    assert harnesses.open().seed == 7
    harnesses.close(None)


def test_a_harness_that_the_test_has_closed() -> None:
    """It is nobody's trouble, and its touches can still be told."""
    harnesses = PerTest(Settings(), seed=5)
    harness = harnesses.open()
    assert region_of(harness, Settings()).view[0] == 0
    harness.close()
    assert harnesses.trouble() is None
    ((name, text),) = harnesses.sections()
    assert name == "uffd touches"
    assert " reads uffd_region[0]+0x0 " in text
    assert harnesses.close(None) is None


def test_trouble_is_told_once() -> None:
    """A helper that has ended is told when the test ends, and not again at the close."""
    harnesses = PerTest(Settings(), seed=5)
    harness = harnesses.open()
    harness._helper._process.kill()
    trouble = harnesses.trouble()
    assert isinstance(trouble, HarnessError)
    assert "helper process" in str(trouble)
    assert any("cannot be had" in text for _, text in harnesses.sections())
    assert harnesses.close(None) is None


@pytest.mark.leaky("matplotlib keeps its fonts open")
def test_a_record_in_all_its_forms(tmp_path: Path) -> None:
    """Ours, Perfetto's, and a picture where matplotlib is there; the folder is made."""
    harnesses = PerTest(Settings(), seed=5)
    harness = harnesses.open()
    assert region_of(harness, Settings(pages=3)).view[0] == 0
    write(harness.record_so_far, str(tmp_path / "new" / "it"))
    assert harnesses.close(str(tmp_path / "new" / "closed")) is None
    for name in ("it", "closed"):
        assert len(Record.load(tmp_path / "new" / f"{name}.json")) == 1
        trace = json.loads((tmp_path / "new" / f"{name}.perfetto.json").read_text())
        assert trace["traceEvents"]
        picture = (tmp_path / "new" / f"{name}.png").exists()
        assert picture == (importlib.util.find_spec("matplotlib") is not None)


@pytest.mark.leaky("matplotlib keeps its fonts open")
def test_several_records(tmp_path: Path) -> None:
    """Each of a test's harnesses has its own files."""
    harnesses = PerTest(Settings(), seed=5)
    for _ in range(3):
        harnesses.open()
    assert harnesses.close(str(tmp_path / "it")) is None
    names = {path.name for path in tmp_path.glob("*[!o].json")}
    assert {"it.json", "it-2.json", "it-3.json"} == {n for n in names if "perfetto" not in n}
