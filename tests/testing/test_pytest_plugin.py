"""The plugin in runs of pytest of its own: what it costs, what it takes, what its fixtures give."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from tests.testing.conftest import ROOT, Run

pytest_plugins = "pytester"
pytestmark = pytest.mark.child

#: What every run of pytest would pay for, had the plugin asked for it.
HEAVY = {
    *("asyncio", "ctypes", "numpy", "multiprocessing", "concurrent", "mmap", "matplotlib"),
    *("aiouffd.pager", "aiouffd.errors", "aiouffd.testing.harness", "aiouffd.testing.settings"),
}


# --- what it costs those who do not use it ---------------------------------------------


def test_importing_it_imports_nothing_else() -> None:
    """Beside what pytest has imported come three modules: the two packages, and the plugin."""
    program = (
        "import sys, pytest; before = set(sys.modules);"
        "import aiouffd.testing.pytest_plugin; print(*sorted(set(sys.modules) - before))"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    names = set(done.stdout.split())
    assert names == {"aiouffd", "aiouffd.testing", "aiouffd.testing.pytest_plugin"}
    assert not names & HEAVY


def test_a_run_that_does_not_use_it_imports_nothing_for_it(run: Run) -> None:
    """Loaded, configured, and asked by every hook, it stays at its one module."""
    result = run(
        f"""
        import sys

        HEAVY = {HEAVY - {"asyncio", "ctypes", "multiprocessing", "concurrent", "mmap"}!r}

        def test_it():
            assert "aiouffd.testing.pytest_plugin" in sys.modules
            assert not HEAVY & set(sys.modules)
        """
    )
    result.assert_outcomes(passed=1)
    assert not [line for line in result.outlines if line.startswith("uffd")]


def test_it_can_be_left_out(run: Run) -> None:
    """With ``-p no:aiouffd`` it is not even imported."""
    result = run(
        """
        import sys

        def test_it():
            assert "aiouffd" not in sys.modules

        def test_its_fixtures_are_gone(uffd):
            pass
        """,
        *("-p", "no:aiouffd"),
    )
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines("*fixture 'uffd' not found*")


# --- fixtures --------------------------------------------------------------------------


def test_the_fixtures(run: Run) -> None:
    """``uffd`` is a harness, ``uffd_region`` one page of it, ``uffd_harness`` makes more."""
    result = run(
        """
        import aiouffd.testing

        def test_uffd(uffd):
            assert isinstance(uffd, aiouffd.testing.Harness)
            region = uffd.region(2)
            assert region.length == 2 * region.page_size

        def test_uffd_region(uffd, uffd_region):
            assert uffd_region.length == uffd_region.page_size
            assert bytes(uffd_region.view) == bytes(uffd_region.page_size)
            (touch,) = uffd.record_so_far
            assert (touch.region, touch.page) == (uffd_region.name, 0)

        def test_uffd_harness(uffd_harness):
            harness = uffd_harness(timeout=3)
            region = harness.region(1, contents=b"abc")
            assert bytes(region.view[:3]) == b"abc"

        class TestMethods:
            def test_uffd_region(self, uffd_region):
                assert uffd_region.view[0] == 0
        """
    )
    result.assert_outcomes(passed=4)


def test_several_harnesses(run: Run) -> None:
    """A test may have several, one after the other or at once; each is closed behind it."""
    result = run(
        """
        import os
        import pytest

        def children():
            with open(f"/proc/self/task/{os.getpid()}/children") as file:
                return set(file.read().split())

        @pytest.fixture(autouse=True)
        def nothing_left():
            before = children(), len(list(fds()))
            yield
            assert (children(), len(list(fds()))) == before

        def test_two(uffd_harness, uffd):
            regions = [harness.region(1) for harness in (uffd, uffd_harness(), uffd_harness())]
            for region in regions:
                assert region.view[0] == 0

        def test_nothing_is_left():
            assert len(children()) == 1  # which is kept for the next test
            assert not [name for name in map(os.readlink, fds()) if "userfaultfd" in name]

        def fds():
            for fd in os.listdir("/proc/self/fd"):
                path = f"/proc/self/fd/{fd}"
                if os.path.lexists(path):
                    yield path
        """
    )
    result.assert_outcomes(passed=2)


def test_the_markers_region(run: Run) -> None:
    """The marker says how many pages there are, of what, and what is in them."""
    result = run(
        """
        import pytest

        @pytest.mark.uffd(pages=3, memory="anon", contents=b"hello")
        def test_it(uffd_region):
            assert uffd_region.length == 3 * uffd_region.page_size
            assert uffd_region.memory == "anon"
            assert bytes(uffd_region.view[:6]) == b"hello\\0"

        @pytest.mark.uffd(contents=b"x" * 5000)
        def test_as_many_as_the_contents_take(uffd_region):
            assert uffd_region.length == 2 * uffd_region.page_size

        @pytest.mark.uffd(pages=2)
        class TestAll:
            def test_of_the_class(self, uffd_region):
                assert uffd_region.length == 2 * uffd_region.page_size

            @pytest.mark.uffd(pages=4)
            def test_the_nearest(self, uffd_region):
                assert uffd_region.length == 4 * uffd_region.page_size
        """,
        "--strict-markers",
    )
    result.assert_outcomes(passed=4)


def test_slow_and_failing_pages(run: Run) -> None:
    """``latency`` slows each page of the region down, ``fail_at`` makes a page fail."""
    result = run(
        """
        import ctypes
        import os
        import pytest

        @pytest.mark.uffd(pages=2, latency=0.01)
        def test_slow(uffd, uffd_region):
            for page in range(2):
                assert uffd_region.view[page * uffd_region.page_size] == 0
            touches = list(uffd.record_so_far)
            assert [touch.outcome for touch in touches] == ["delayed", "delayed"]
            assert all(touch.waited_ns >= 10_000_000 for touch in touches)

        @pytest.mark.uffd(pages=2, fail_at=1, needs="kernel-mode")
        def test_failing(uffd_region):
            libc = ctypes.CDLL(None, use_errno=True)
            reading, writing = os.pipe()
            size = uffd_region.page_size
            assert libc.write(writing, uffd_region.pointer(), 1) == 1
            assert libc.write(writing, uffd_region.pointer(size), 1) == -1
            assert os.strerror(ctypes.get_errno()) == "Bad address"
            os.close(reading), os.close(writing)
        """
    )
    result.assert_outcomes(passed=2)


# --- what it is told -------------------------------------------------------------------


@pytest.mark.parametrize(
    "marker, told",
    [
        ("memroy='anon'", "there is no argument 'memroy': did you mean 'memory'?"),
        ("pages=0", "pages must be a whole number of pages from 1, not 0"),
        ("4", "arguments go by name only"),
        ("needs='magic'", "nothing is known of the need 'magic': there are kernel-mode, fork"),
    ],
)
def test_a_mistake_in_the_marker(run: Run, marker: str, told: str) -> None:
    """It is an error of that test, told in a line with the test's name, and the run goes on."""
    result = run(
        f"""
        import pytest

        @pytest.mark.uffd({marker})
        def test_wrong():
            pass

        def test_right():
            pass
        """
    )
    result.assert_outcomes(errors=1, passed=1)
    result.stdout.fnmatch_lines(f"the marker uffd of test_it.py::test_wrong: {told}*")
    assert "pytest_plugin.py" not in result.stdout.str()


SHOW = """
    import pytest

    def settings(item):
        from aiouffd.testing import pytest_plugin
        return pytest_plugin._settings(item)

    def test_plain(request):
        print("plain", settings(request.node).timeout, settings(request.node).backend)

    @pytest.mark.uffd(timeout=3, backend="process")
    def test_marked(request):
        print("marked", settings(request.node).timeout, settings(request.node).backend)
"""


@pytest.mark.parametrize(
    "file, line, plain",
    [
        ("", [], "10.0 auto"),
        ("uffd_timeout = 20\nuffd_backend = trampoline", [], "20.0 trampoline"),
        ("uffd_timeout = 20", ["--uffd-timeout=30"], "30.0 auto"),
        ("uffd_backend = process", ["--uffd-backend=trampoline"], "10.0 trampoline"),
    ],
    ids=["defaults", "file", "line", "line over file"],
)
def test_who_is_asked_first(
    run: Run, pytester: pytest.Pytester, file: str, line: list[str], plain: str
) -> None:
    """The marker, then the command line, then the configuration file."""
    pytester.makeini("[pytest]\n" + file)
    result = run(SHOW, "-s", *line)
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines([f"*plain {plain}", "*marked 3.0 process"])


@pytest.mark.parametrize("table", ["tool.pytest.ini_options", "tool.pytest"])
def test_settings_in_pyproject(run: Run, pytester: pytest.Pytester, table: str) -> None:
    """pyproject.toml does as well, with numbers as numbers, in both of pytest's tables."""
    pytester.makepyprojecttoml(f"[{table}]\nuffd_timeout = 2.5\nuffd_seed = 7\n")
    result = run(SHOW, "-s", "--strict-config")
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["uffd: timeout 2.5, seed 7", "*plain 2.5 auto"])


@pytest.mark.parametrize(
    "file, line, told",
    [
        ("", "--uffd-timeout=never", "*--uffd-timeout * seconds above 0, not 'never'*"),
        ("", "--uffd-seed=-1", "*--uffd-seed * whole number from 0, not '-1'*"),
        ("", "--uffd-backend=thread", "*--uffd-backend *auto, process, trampoline; not 'thread'*"),
        ("uffd_backend = thread", "-q", "*uffd_backend*auto, process, trampoline; not 'thread'*"),
    ],
)
def test_a_mistake_in_an_option(
    run: Run, pytester: pytest.Pytester, file: str, line: str, told: str
) -> None:
    """It ends the run before it has begun, in one line."""
    pytester.makeini("[pytest]\n" + file)
    result = run("def test_it(): pass", line)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(told)
    assert "Traceback" not in result.stderr.str()


# --- the seed --------------------------------------------------------------------------

SEEDS = """
    import pytest

    @pytest.mark.parametrize("number", [0, 1])
    def test_own(uffd, number):
        print(f"seed of {number}: {uffd.seed};")

    @pytest.mark.uffd(seed=99)
    def test_fixed(uffd):
        print(f"fixed: {uffd.seed};")
        assert False
"""


def test_each_test_has_its_seed(run: Run) -> None:
    """It is made of the run's seed and the test's name; the marker may fix it."""
    first, again, other = (run(SEEDS, "-s", f"--uffd-seed={seed}") for seed in ("1", "0x1", "2"))
    for result in (first, again, other):
        result.stdout.fnmatch_lines("*fixed: 99;*")
    seeds = [
        [line for line in result.outlines if "seed of" in line] for result in (first, again, other)
    ]
    assert seeds[0] == seeds[1]
    assert seeds[0] != seeds[2]
    assert seeds[0][0].split(": ")[-1] != seeds[0][1].split(": ")[-1]


def test_a_failure_says_how_to_repeat_it(run: Run) -> None:
    """The run's own seed, found by chance, is shown where a test failed that has used it."""
    result = run("def test_fails(uffd):\n    assert uffd.seed < 0")
    result.assert_outcomes(failed=1)
    result.stdout.re_match_lines([r"run again with --uffd-seed=\d+"])
    result = run("def test_fails():\n    assert False")
    result.stdout.no_fnmatch_line("*--uffd-seed*")


# --- the record ------------------------------------------------------------------------


def test_the_record_of_each_test(run: Run, pytester: pytest.Pytester) -> None:
    """``--uffd-record`` writes what each test touched, named like the test, no two alike."""
    result = run(
        """
        import pytest

        @pytest.mark.parametrize("name", ["a_b", "a b", "x" * 300, "x" * 301])
        def test_touches(uffd_region, name):
            uffd_region.view[0]

        def test_without():
            pass
        """,
        "--uffd-record=touched/here",
    )
    result.assert_outcomes(passed=5)
    folder = pytester.path / "touched" / "here"
    result.stdout.fnmatch_lines([f"uffd: what each test touched was written to {folder}"])
    names = {path.name for path in folder.iterdir()}
    records = {name for name in names if name.endswith(".json") and "perfetto" not in name}
    assert len(records) == 4
    assert "test_it.py-test_touches[a_b].json" in records
    for record in records:
        name = record.removesuffix(".json")
        assert f"{name}.perfetto.json" in names
        assert (f"{name}.png" in names) == (importlib.util.find_spec("matplotlib") is not None)


def test_a_records_folder_that_cannot_be(run: Run, pytester: pytest.Pytester) -> None:
    """It ends the run before it has begun; one that can be is there, and empty is not told of."""
    pytester.makefile(".txt", taken="")
    result = run("def test_it(): pass", "--uffd-record=taken.txt/here")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(
        ["ERROR: --uffd-record *: no folder can be made there: *taken.txt*"]
    )
    result = run("def test_it(): pass", "--uffd-record=touched")
    result.assert_outcomes(passed=1)
    assert not list((pytester.path / "touched").iterdir())
    result.stdout.no_fnmatch_line("uffd: what each test touched*")


def test_the_records_folder_in_a_file(run: Run, pytester: pytest.Pytester) -> None:
    """There it counts from the file's folder; without matplotlib there is no picture."""
    pytester.makeini("[pytest]\nuffd_record = touched")
    pytester.mkdir("elsewhere")
    pytester.makepyfile(matplotlib="raise ImportError")
    result = run(
        """
        import os

        def test_touches(uffd_region):
            uffd_region.view[0]
            os.chdir("elsewhere")
        """
    )
    result.assert_outcomes(passed=1)
    names = {path.name for path in (pytester.path / "touched").iterdir()}
    assert names == {f"test_it.py-test_touches{end}.json" for end in ("", ".perfetto")}


def test_harnesses_do_not_outlive_their_tests(run: Run) -> None:
    """In a run of thousands of tests no record is kept of those that are over."""
    result = run(
        """
        import gc

        from aiouffd.testing import Harness

        def test_first(uffd_region):
            uffd_region.view[0]

        def test_second():
            gc.collect()
            assert not [each for each in gc.get_objects() if isinstance(each, Harness)]
        """
    )
    result.assert_outcomes(passed=2)
