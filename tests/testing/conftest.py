"""Runs of pytest with the plugin installed, whether this environment has it installed or not.

Who asks for ``run`` says ``pytest_plugins = "pytester"``.

Knows: how an installed plugin is found: by a distribution's entry points on the path.
Must not know: what the plugin does.

The entry points are those of this checkout's pyproject.toml, so a run finds the plugin as a
user's does: by itself, and not if ``-p no:aiouffd`` says so.
"""

from __future__ import annotations

import ctypes
import os
import sys
import textwrap
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, TypeAlias

import pytest

from aiouffd.testing import Harness
from aiouffd.testing.rules import KINDS
from tests.native import build

ROOT: Final = Path(__file__).resolve().parent.parent.parent

Run: TypeAlias = Callable[..., pytest.RunResult]

#: A run that hangs is what these tests are about; it is ended, and the test fails.
LIMIT: Final = 60.0

#: Plugins that this environment has, which a run does without unless it says so.
OTHERS: Final = ("anyio", "asyncio", "hypothesispytest", "xdist", "xdist.looponfail")


def install(folder: Path) -> str:
    """Make what ``pip install`` would make: who has this on the path has the plugin.

    Returns:
        The path, for PYTHONPATH.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (plugin,) = project["entry-points"]["pytest11"].items()
    distribution = folder / "aiouffd_of_the_checkout-0.dist-info"
    distribution.mkdir(parents=True)
    (distribution / "METADATA").write_text("Name: aiouffd-of-the-checkout\nVersion: 0\n")
    (distribution / "entry_points.txt").write_text("[pytest11]\n{} = {}\n".format(*plugin))
    return f"{folder}{os.pathsep}{ROOT}"


@pytest.fixture(scope="session")
def library() -> ctypes.CDLL:
    """touching.c, with the types of what is asked of it."""
    found = ctypes.CDLL(str(build(Path(__file__).with_name("touching.c"))))
    for name in ("load", "load_twice", "load_forked"):
        getattr(found, name).argtypes = (ctypes.c_void_p,)
    found.store.argtypes = (ctypes.c_void_p, ctypes.c_ubyte)
    found.store.restype = None
    found.load_again.argtypes = found.increment.argtypes = (ctypes.c_void_p, ctypes.c_int)
    found.increment.restype = None
    found.walk.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_int)
    found.load8.argtypes = (ctypes.c_void_p,)
    found.load8.restype = ctypes.c_ulong
    found.load_until_whole.argtypes = (ctypes.c_void_p, ctypes.POINTER(ctypes.c_ubyte))
    found.fails.argtypes = (ctypes.c_void_p, ctypes.c_int)
    found.copy.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
    found.copy.restype = None
    found.in_a_storm.argtypes = (ctypes.c_void_p, ctypes.c_int)
    found.interrupted.argtypes = (ctypes.c_int, ctypes.c_void_p)
    found.in_a_storm.restype = found.interrupted.restype = ctypes.c_long
    found.alarmed.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_int)
    found.alarmed.restype = ctypes.c_long
    for name in ("write_out", "read_in"):
        getattr(found, name).argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong)
        getattr(found, name).restype = ctypes.c_long
    for name in ("wait_poll", "wait_message", "wait_epoll"):
        getattr(found, name).argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
        getattr(found, name).restype = ctypes.c_long
    return found


@pytest.fixture
def uffd() -> Iterator[Harness]:
    """A harness."""
    with Harness(timeout=20) as harness:
        yield harness


@pytest.fixture(params=[kind for kind in KINDS if "huge" not in kind])
def memory(request: pytest.FixtureRequest) -> str:
    """Each kind of memory of small pages."""
    kind: str = request.param
    return kind


@pytest.fixture
def pipes() -> Iterator[Callable[[], tuple[int, int]]]:
    """Make pipes, closed afterwards."""
    ends: list[int] = []

    def make() -> tuple[int, int]:
        pair = os.pipe()
        ends.extend(pair)
        return pair

    yield make
    for end in ends:
        os.close(end)


@pytest.fixture
def run(
    pytester: pytest.Pytester,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    time_scale: float,
) -> Run:
    """Run pytest on the text of a test file, in a process of its own; warnings are errors."""
    path = install(tmp_path_factory.mktemp("site"))
    others = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", f"{path}{os.pathsep}{others}" if others else path)
    for name in os.environ:
        if name.startswith("PYTEST_XDIST"):  # this very run's
            monkeypatch.delenv(name)

    def go(
        text: str | tuple[str, ...],
        *arguments: str,
        beside: tuple[str, ...] = (),
        through: tuple[str, ...] = (),
    ) -> pytest.RunResult:
        """Run pytest.

        Args:
            text: The test file's, or its parts.
            arguments: Of pytest.
            beside: Plugins that are to be there too, of ``OTHERS``.
            through: A command that runs the command behind it.
        """
        parts = (text,) if isinstance(text, str) else text
        pytester.makepyfile(test_it="\n".join(map(textwrap.dedent, parts)))
        without = [word for name in OTHERS if name not in beside for word in ("-p", f"no:{name}")]
        command = (sys.executable, "-m", "pytest", "-W", "error", *without, *arguments)
        return pytester.run(*through, *command, timeout=LIMIT * time_scale)

    return go
