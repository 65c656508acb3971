"""What every test gets: both loops, a leak check, a seed, and a header that says what ran where.

Laws of this file:

* Async tests run on asyncio and on uvloop; the loop's name is in the test's id.  Those that
  only drive child processes (``child``) run on asyncio.
* After a test no descriptor, no task and no child process is left that was not there before.
* Whatever is random comes from one seed, printed first and again beside each failure.
* A skip says what is missing and how to get it.
"""

from __future__ import annotations

import asyncio
import faulthandler
import fcntl
import functools
import gc
import importlib.metadata
import os
import platform
import random
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Final

import pytest
from _pytest.faulthandler import fault_handler_stderr_fd_key  # no public door to it
from hypothesis import settings
from pytest_asyncio import is_async_test

from aiouffd.errors import NotSupported
from aiouffd.kernel import abi, calls
from tests import interpreters

pytest.register_assert_rewrite("aiouffd.testing.sources")

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": asyncio.new_event_loop}
try:
    import uvloop
except ImportError:
    pass  # no wheel for this Python; the header says so
else:
    LOOPS["uvloop"] = uvloop.new_event_loop

# Hypothesis by itself is deterministic where the environment has CI; we want it to find things,
# and print how to find them again.  --hypothesis-profile=ci looks longer.
settings.register_profile("default", deadline=None, derandomize=False, print_blob=True)
settings.register_profile("ci", parent=settings.get_profile("default"), max_examples=300)
settings.load_profile("default")


# --- the header ------------------------------------------------------------------------


def pytest_configure(config: pytest.Config) -> None:
    # xdist's workers inherit the environment, and so the seed.
    os.environ.setdefault("AIOUFFD_SEED", str(random.SystemRandom().randrange(2**32)))
    if "uvloop" in LOOPS:
        # libuv opens one pipe for signals with its first loop and keeps it for the process's life.
        uvloop.new_event_loop().close()


def pytest_report_header(config: pytest.Config) -> list[str]:
    loops = "asyncio, no uvloop (pip install uvloop)"
    if "uvloop" in LOOPS:
        loops = f"asyncio, uvloop {importlib.metadata.version('uvloop')}"
    found = ", ".join(f"{python.version} ({python.path})" for python in interpreters.find_all())
    return [
        f"kernel: Linux {platform.release()} {platform.machine()}",
        f"userfaultfd: {_features()}",
        f"rights: {_rights()}",
        f"loops: {loops}; interpreters: {found}",
        f"AIOUFFD_SEED={os.environ['AIOUFFD_SEED']} AIOUFFD_TIME_SCALE={_time_scale():g}",
    ]


def _open_uffd() -> int:
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    try:
        return calls.open_device(flags)
    except OSError:
        return calls.open_syscall(flags)


@functools.cache
def _may_open() -> bool:
    try:
        os.close(_open_uffd())
    except (OSError, NotSupported):
        return False
    return True


def _lacks_rights(error: BaseException) -> bool:
    """Say whether a test failed only because this user may not open a userfaultfd."""
    if _may_open():
        return False
    errors = error.exceptions if isinstance(error, BaseExceptionGroup) else (error,)
    return all(isinstance(each, (PermissionError, NotSupported)) for each in errors)


def _features() -> str:
    try:
        fd = _open_uffd()
    except (OSError, NotSupported) as error:
        return f"not to be opened here ({error}); sudo make test"
    try:
        available, _ = calls.api(fd, 0)
    finally:
        os.close(fd)
    missing = [name for name, bit in abi.FEATURES.items() if not available & bit]
    unknown = available & ~sum(abi.FEATURES.values())
    text = f"features {available:#x}, " + (f"without {' '.join(missing)}" if missing else "all")
    return text + (f", unknown bits {unknown:#x}" if unknown else "")


def _rights() -> str:
    with open("/proc/self/status", encoding="ascii") as file:
        capabilities = next(int(line.split()[1], 16) for line in file if line.startswith("CapEff"))
    try:
        with open(abi.UNPRIVILEGED_SYSCTL, encoding="ascii") as file:
            sysctl = file.read().strip()
    except FileNotFoundError:
        sysctl = "absent"
    device = "usable" if os.access(abi.DEVICE_PATH, os.R_OK | os.W_OK) else "not usable"
    ptrace = "with" if capabilities >> 19 & 1 else "without"
    return (
        f"{'root' if os.geteuid() == 0 else f'uid {os.geteuid()}'}, {ptrace} CAP_SYS_PTRACE, "
        f"{abi.DEVICE_PATH} {device}, vm.unprivileged_userfaultfd {sysctl}"
    )


# --- loops, limits, seeds --------------------------------------------------------------


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    if item.get_closest_marker("child") is not None:
        return {"asyncio": LOOPS["asyncio"]}
    return LOOPS


def _time_scale() -> float:
    return float(os.environ.get("AIOUFFD_TIME_SCALE", "1"))


@pytest.fixture(scope="session")
def time_scale() -> float:
    """What every time limit of a test is multiplied with (AIOUFFD_TIME_SCALE)."""
    return _time_scale()


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """This test's own seed: the run's seed (AIOUFFD_SEED) and the test's name."""
    name = f"{os.environ['AIOUFFD_SEED']}/{request.node.nodeid}"
    return random.Random(name).randrange(2**32)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed and call.excinfo and _lacks_rights(call.excinfo.value):
        line = report.location[1] or 0
        report.outcome = "skipped"
        report.longrepr = (
            report.location[0],
            line,
            "no right to open a userfaultfd here: sudo make test",
        )
    if report.failed:
        report.sections.append(("run again with", f"AIOUFFD_SEED={os.environ['AIOUFFD_SEED']}"))
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, None, None]:
    if item.get_closest_marker("root") is not None and os.geteuid() != 0:
        pytest.skip("needs root: sudo make test")
    limit = item.get_closest_marker("limit")
    if limit is not None:
        # pytest has set its own limit already; the interpreter has only one such clock.
        faulthandler.dump_traceback_later(
            limit.args[0] * _time_scale(),
            file=item.config.stash[fault_handler_stderr_fd_key],
            exit=True,
        )
    return (yield)


# --- nothing is left over --------------------------------------------------------------


def _descriptors() -> dict[int, str]:
    """What each descriptor of this process is; a number used anew shows another link."""
    links: dict[int, str] = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            links[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            pass  # the descriptor of this very listing
    return {
        fd: link
        for fd, link in links.items()
        if not link.startswith("/memfd:libffi")  # ctypes keeps one for the process's life
    }


def _children() -> dict[int, str]:
    """Command lines of the children of this process, those that nobody waited for too."""
    children: dict[int, str] = {}
    for thread in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{thread}/children", encoding="ascii") as file:
                pids = file.read().split()
            for pid in pids:
                with open(f"/proc/{pid}/cmdline", "rb") as file:
                    children[int(pid)] = file.read().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            pass  # the thread has ended; its children are another thread's now
    return {
        pid: line or "ended, but nobody waited for it"
        for pid, line in children.items()
        if "resource_tracker" not in line  # multiprocessing keeps one for the process's life
    }


_SETTLING: Final = 5.0  # seconds until what is left over counts as left


def _left_over(fds: dict[int, str], children: dict[int, str]) -> list[str]:
    left = [
        f"descriptor {fd}: {link}" for fd, link in _descriptors().items() if fds.get(fd) != link
    ]
    left += [f"child {pid}: {line}" for pid, line in _children().items() if pid not in children]
    return left


@pytest.fixture(autouse=True)
def _nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves a descriptor, a child process or a task behind."""
    if request.node.get_closest_marker("leaky") is not None:
        yield
        return
    fds, children = _descriptors(), _children()
    # The loop is set up next and torn down before the comparison; tests' own fixtures live inside.
    yield
    left = _left_over(fds, children)
    if left:
        gc.collect()  # an object in a cycle still holds it: collecting it warns, and that fails too
        left = _left_over(fds, children)
    end = time.monotonic() + _SETTLING * _time_scale()
    while left and time.monotonic() < end:  # a library's own threads close a moment later (obstore)
        time.sleep(0.01)
        left = _left_over(fds, children)
    if left:
        pytest.fail("left over after the test:\n  " + "\n  ".join(left))


@pytest.fixture(autouse=True)
def _no_task_left(request: pytest.FixtureRequest, _nothing_left: None) -> Iterator[None]:
    """Fail an async test whose loop still has a task once its own fixtures are gone."""
    if not is_async_test(request.node) or request.node.get_closest_marker("leaky") is not None:
        yield
        return
    runner: asyncio.Runner = request.getfixturevalue("_function_scoped_runner")
    yield

    async def settle() -> list[str]:
        for _ in range(3):  # a task that was cancelled just now ends within these rounds
            await asyncio.sleep(0)
        return [repr(task) for task in asyncio.all_tasks() if task is not asyncio.current_task()]

    left = runner.run(settle())
    if left:
        pytest.fail("tasks left over after the test:\n  " + "\n  ".join(left))


# --- tests side by side ----------------------------------------------------------------


@pytest.fixture(autouse=True)
def _beside_others(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Run beside what other workers run, unless the test is marked to be alone.

    Who wants to be alone holds the turnstile while it waits, or the others would pass it by.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ:
        yield
        return
    alone = request.node.get_closest_marker("alone") is not None
    folder = tmp_path_factory.getbasetemp().parent  # of all workers
    with open(folder / "turnstile", "w") as turnstile, open(folder / "running", "w") as running:
        fcntl.flock(turnstile, fcntl.LOCK_EX)
        fcntl.flock(running, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(turnstile, fcntl.LOCK_UN)
        yield


# --- huge pages ------------------------------------------------------------------------

_HUGE_PAGES = "/proc/sys/vm/nr_hugepages"


@pytest.fixture
def huge_pages(time_scale: float) -> Iterator[Callable[[int], None]]:
    """Reserve 2 MiB pages for this test: ``huge_pages(8)``; given back afterwards.

    One test at a time, across processes too: the pool is one per machine.
    """
    if not os.access(_HUGE_PAGES, os.W_OK):
        pytest.skip(f"needs to write {_HUGE_PAGES}: sudo make test")
    with open(_HUGE_PAGES, "r+", encoding="ascii") as pool:
        fcntl.flock(pool, fcntl.LOCK_EX)
        before = pool.read().strip()

        def reserve(pages: int) -> None:
            wanted = int(before) + pages
            for _ in range(3):
                _write("/proc/sys/vm/compact_memory", "1")
                _write(_HUGE_PAGES, str(wanted))
                with open(_HUGE_PAGES, encoding="ascii") as file:
                    if int(file.read()) >= wanted:
                        return
            pytest.fail(
                f"the kernel has no {pages} free huge pages (memory too small or scattered)"
            )

        try:
            yield reserve
        finally:
            _write(_HUGE_PAGES, before)


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)
