"""The pytest plugin: fixtures ``uffd``, ``uffd_region``, ``uffd_harness`` and the marker ``uffd``.

Knows: pytest's options, fixtures and reports; when the harnesses of a test are made and closed.
Must not know: how a thread is frozen, or what a harness is made of.

Laws of this file:

* It is imported in every run of pytest of everybody who has aiouffd installed.  At module level
  stands nothing but pytest and what pytest has imported itself; a test that asks for none of the
  fixtures pays a look-up in a dictionary.
* Fixtures are plain functions and need no event loop: tests of every kind can ask for them.
* What is missing on this machine skips, with the remedy.  What is wrong fails.
* A test in which a thread had to be let go at the time limit has failed, whatever it asserted.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import zlib
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any, Final, NoReturn

import pytest

if TYPE_CHECKING:
    from .failures import HarnessError
    from .harness import Harness
    from .per_test import PerTest
    from .region import Region
    from .settings import Settings

_SEED: Final[pytest.StashKey[int]] = pytest.StashKey()
_HARNESSES: Final[pytest.StashKey[PerTest]] = pytest.StashKey()
_SETTINGS: Final[pytest.StashKey[Settings]] = pytest.StashKey()
_SKIPPED: Final[pytest.StashKey[bool]] = pytest.StashKey()

_OPTIONS: Final = ("timeout", "backend", "seed", "record")
_MARKER: Final = (
    "uffd(timeout=, backend=, seed=, pages=, memory=, contents=, needs=, latency=, fail_at=): "
    "settings of the fixtures uffd, uffd_region and uffd_harness (aiouffd)"
)


# --- options ---------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("aiouffd", "memory accesses, frozen and recorded (aiouffd)")
    for name, kind, metavar, about in (
        ("timeout", "float", "SECONDS", "how long a thread may stand still (10)"),
        ("backend", "string", "NAME", "how threads are held: auto, process or trampoline (auto)"),
        ("seed", "int", "NUMBER", "make whatever is random the same as in an earlier run"),
        ("record", "string", "DIR", "write what each test touched into this folder"),
    ):
        group.addoption(f"--uffd-{name}", default=None, metavar=metavar, help=about)
        # Types of numbers came with pytest 8.4.
        typed = kind if pytest.version_tuple >= (8, 4) else "string"
        parser.addini(f"uffd_{name}", f"{about}; see --uffd-{name}", type=typed, default=None)  # type: ignore[arg-type] # not all versions know all


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", _MARKER)
    _from_texts(config)  # a mistake ends the run before it has begun
    record = _given(config, "record")
    if record is not None:
        # Workers of xdist get the options as they are now, and may run in another folder.
        on_line = config.getoption("uffd_record") is not None
        base = config.invocation_params.dir if on_line else config.rootpath
        folder = config.option.uffd_record = str(base / str(record))
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as error:
            raise pytest.UsageError(
                f"--uffd-record (in a file uffd_record): no folder can be made there: {error}"
            ) from None


def pytest_report_header(config: pytest.Config) -> list[str]:
    given = {name: value for name in _OPTIONS if (value := _given(config, name)) is not None}
    return ["uffd: " + ", ".join(f"{name} {value}" for name, value in given.items())][: len(given)]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    folder = config.getoption("uffd_record")
    if folder and os.path.isdir(folder) and os.listdir(folder):
        terminalreporter.write_line(f"uffd: what each test touched was written to {folder}")


def _given(config: pytest.Config, name: str) -> object:
    """Give what the command line says, else what the configuration file says, else None."""
    value = config.getoption(f"uffd_{name}")
    if value is None:
        value = config.getini(f"uffd_{name}")
    return None if value in ("", []) else value  # pytest 7 has [] for what nobody has set


def _from_texts(config: pytest.Config) -> dict[str, object]:
    """Read those options that are settings of a test."""
    found: dict[str, object] = {}
    for name in ("timeout", "backend", "seed"):
        value = _given(config, name)
        if value is not None:
            from .settings import ARGUMENTS, SettingsError

            try:
                found[name] = ARGUMENTS[name](value)
            except SettingsError as error:
                raise pytest.UsageError(f"--uffd-{name} (in a file uffd_{name}) {error}") from None
    return found


# --- the seed --------------------------------------------------------------------------


def _run_seed(config: pytest.Config) -> int:
    """Give the run's seed: the same in all workers of xdist."""
    seed = config.stash.get(_SEED, None)
    if seed is None:
        seed = getattr(config, "workerinput", {}).get("uffd_seed")
        if seed is None:
            given = _from_texts(config).get("seed")
            seed = given if isinstance(given, int) else random.SystemRandom().randrange(2**32)
        config.stash[_SEED] = seed
    return seed


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Hand the seed to a worker of xdist."""
    node.workerinput["uffd_seed"] = _run_seed(node.config)


# --- what a test has asked for ---------------------------------------------------------


def _settings(item: pytest.Item) -> Settings:
    """Give what holds for a test: its markers, then the command line, then the file."""
    known = item.stash.get(_SETTINGS, None)
    if known is not None:
        return known
    from .settings import SettingsError, of_marker, settle

    try:
        markers = [of_marker(marker.args, marker.kwargs) for marker in item.iter_markers("uffd")]
        options = _from_texts(item.config)
        options.pop("seed", None)  # each test's own is made of the run's
        settings = settle(*markers, options)
    except SettingsError as error:
        mistake = str(error)
    else:
        item.stash[_SETTINGS] = settings
        return settings
    pytest.fail(f"the marker uffd of {item.nodeid}: {mistake}", pytrace=False)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("uffd") is not None:
        settings = _settings(item)
        huge = ("hugetlb",) if settings.memory.startswith("hugetlb") else ()
        _skip_without(item, (*settings.needs, *huge))


def _skip_without(item: pytest.Item, needs: tuple[str, ...]) -> None:
    if not needs:
        return
    from ..errors import NotSupported
    from .needs import is_known, known, missing

    for need in needs:
        if not is_known(need):
            pytest.fail(
                f"the marker uffd of {item.nodeid}: nothing is known of the need {need!r}:"
                f" there are {known()}",
                pytrace=False,
            )
        try:
            lacking = missing(need)
        except NotSupported as error:
            lacking = str(error)
        if lacking:
            _skip(item, f"needs {need}: {lacking}")


def _skip(item: pytest.Item, reason: str) -> NoReturn:
    item.stash[_SKIPPED] = True
    pytest.skip(reason)


# --- fixtures --------------------------------------------------------------------------


@pytest.fixture(scope="session")
def _uffd_helper() -> Iterator[None]:
    """Keep one helper process for all tests: starting one takes longer than most tests.

    It is started here, so that no test is the one that leaves a process and sockets behind.
    """
    from ..errors import UffdError
    from .harness import Harness
    from .helper import keeping

    with keeping():
        with contextlib.suppress(UffdError):  # the test will have it again, and say so
            Harness().close()
        yield


@pytest.fixture
def uffd_harness(
    request: pytest.FixtureRequest, _uffd_helper: None
) -> Iterator[Callable[..., Harness]]:
    """Make harnesses: ``uffd_harness(timeout=2)``; all are closed after the test.

    Arguments that are not given are the test's settings (marker, options, ini values).
    """
    item: pytest.Item = request.node
    settings = _settings(item)
    from ..errors import NotSupported
    from .per_test import PerTest

    name = f"{_run_seed(item.config)}/{item.nodeid}"
    seed = random.Random(name).randrange(2**32)  # noqa: S311 - to be the same each time
    harnesses = item.stash[_HARNESSES] = PerTest(settings, seed)

    def make(**arguments: Any) -> Harness:
        try:
            return harnesses.open(**arguments)
        except NotSupported as error:
            _skip(item, f"needs userfaultfd: {error}")

    yield make
    folder = item.config.getoption("uffd_record")
    error = harnesses.close(folder and os.path.join(folder, _file_name(item.nodeid)))
    if error is not None:
        _fail(error)


@pytest.fixture
def uffd(uffd_harness: Callable[..., Harness]) -> Harness:
    """Freeze, slow down, fail and record accesses to memory; with the test's settings."""
    return uffd_harness()


@pytest.fixture
def uffd_region(request: pytest.FixtureRequest, uffd: Harness) -> Region:
    """Memory of the harness ``uffd``: one page, or what the marker says."""
    settings = _settings(request.node)
    from ..errors import NotSupported
    from .per_test import region_of

    try:
        return region_of(uffd, settings)
    except NotSupported as error:
        _skip(request.node, f"needs memory of the kind {settings.memory}: {error}")


def _file_name(nodeid: str) -> str:
    """Make a test's name one that a file may have, and that no other test's has."""
    name = re.sub(r"/|::", "-", nodeid)
    plain = re.sub(r"[^\w.\[\]=-]", "_", name)[:140]
    return plain if plain == name else f"{plain}-{zlib.crc32(nodeid.encode()):08x}"


# --- what is told ----------------------------------------------------------------------


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    result = yield
    harnesses = item.stash.get(_HARNESSES, None)
    if harnesses is not None and (trouble := harnesses.trouble()) is not None:
        _fail(trouble)
    return result


def _fail(error: HarnessError) -> NoReturn:
    """Fail a test with an error whose traceback would show nothing but this plugin."""
    # A HarnessError for ``xfail(raises=...)``; for pytest one of those that it shows without.
    kinds = (type(error), pytest.fail.Exception)
    kind = type(type(error).__name__, kinds, {"__module__": type(error).__module__})
    failed = kind(str(error))
    failed.msg, failed.pytrace = str(error), False
    raise failed


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
    call: pytest.CallInfo[None],
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and item.stash.get(_SKIPPED, False) and isinstance(report.longrepr, tuple):
        path, line, _ = item.location  # the test's line says more than the plugin's
        report.longrepr = (path, (line or 0) + 1, report.longrepr[2])
    harnesses = item.stash.get(_HARNESSES, None)
    if report.failed and harnesses is not None:
        closed = report.when == "teardown"
        report.sections += harnesses.closing_sections() if closed else harnesses.sections()
        if _settings(item).seed is None:
            again = f"--uffd-seed={_run_seed(item.config)}"
            report.sections.append(("uffd seed", f"run again with {again}"))
    if call.excinfo is not None and harnesses is not None:
        harnesses.forgive()
    if report.when == "teardown" and harnesses is not None:
        del item.stash[_HARNESSES]  # items live as long as the run, records need not
    return report
