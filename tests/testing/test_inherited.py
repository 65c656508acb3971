"""Children that fork from the test process inherit its regions, and are watched there."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable, Iterator

import pytest

from aiouffd.testing import Harness, Region
from tests import unprivileged
from tests.targets import wait_until

PAGE = os.sysconf("SC_PAGE_SIZE")
CONTENTS = bytes(range(256)) * (2 * PAGE // 256)

pytestmark = pytest.mark.root


@pytest.fixture
def uffd() -> Iterator[Harness]:
    """A harness."""
    with Harness(timeout=20) as harness:
        yield harness


def fork(child: Callable[[], int]) -> int:
    """Fork; the child ends with what it finds as its status.  Give its process id."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there are threads: the harness has one
        process = os.fork()
    if process == 0:
        faulthandler.disable()  # a SIGBUS may be what is wanted
        status = 255
        try:
            status = child()
        finally:
            os._exit(status)
    return process


def ended(process: int) -> int:
    """Wait for a child; give its status, or minus the signal that has ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


@pytest.fixture(params=["shmem", "anon", "shmem-private"])
def region(request: pytest.FixtureRequest, uffd: Harness) -> Region:
    """Two pages of known bytes, of each kind of memory of small pages."""
    return uffd.region(2, contents=CONTENTS, memory=request.param, name="packet")


def test_a_forked_python_child_stands(uffd: Harness, region: Region) -> None:
    """A child's Python access stands in the kernel: the GIL that it holds is its own."""
    with region.view as view, region.page(1).freeze() as freeze:
        process = fork(lambda: view[PAGE + 5])
        frozen = freeze.wait()
        assert (frozen.process, frozen.held_by) == (process, "page")
        assert frozen.touch.offset == PAGE + 5
        frozen.release()
        assert ended(process) == 5


def test_the_nth_touch_of_a_child_stops(uffd: Harness, region: Region) -> None:
    """A child is stepped over its accesses before the n-th."""
    with region.view as view, region.page(1).freeze(nth=3) as freeze:
        process = fork(lambda: sum(view[PAGE + 5] for _ in range(4)))
        frozen = freeze.wait()
        assert frozen.touch.number == 3
        frozen.release()
        assert ended(process) == 20


def test_children_and_the_test_stand_side_by_side(uffd: Harness, region: Region) -> None:
    """Two children and a thread of the test at one page go on one by one, the last one first."""
    with region.view as view, region.page(1).freeze() as freeze:
        children = [fork(lambda n=n: view[PAGE + n]) for n in (1, 2)]  # type: ignore[misc]
        mine = uffd.start(view.__getitem__, PAGE + 3)
        standing = {each.process: each for each in (freeze.wait() for _ in range(3))}
        for number, process in ((2, children[1]), (1, children[0])):
            standing[process].release()
            assert ended(process) == number
            assert not mine.done
        standing[os.getpid()].release()
        assert mine.result() == 3


def test_a_child_of_multiprocessing_stands(uffd: Harness, region: Region) -> None:
    """The fork context of multiprocessing gives its processes the region."""
    view = region.view

    def work() -> None:
        os._exit(view[PAGE + 7])

    with region.page(1).freeze() as freeze:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as above
            process = multiprocessing.get_context("fork").Process(target=work)
            process.start()
        frozen = freeze.wait()
        assert frozen.process == process.pid
        frozen.release()
        process.join()
        assert process.exitcode == 7
        process.close()
    view.release()


def test_a_grandchild_stands(uffd: Harness, region: Region) -> None:
    """What a child forks is watched, too."""
    with region.view as view, region.page(1).freeze() as freeze:
        process = fork(lambda: ended(fork(lambda: view[PAGE + 9])))
        frozen = freeze.wait()
        assert frozen.process not in (process, os.getpid())
        frozen.release()
        assert ended(process) == 9


def test_a_child_that_is_killed_stands_no_more(uffd: Harness, region: Region) -> None:
    """Where a child stood that was killed nobody stands."""
    with region.view as view, region.page(1).freeze() as freeze:
        process = fork(lambda: view[PAGE])
        frozen = freeze.wait()
        os.kill(process, signal.SIGKILL)
        assert ended(process) == -signal.SIGKILL
        wait_until(lambda: frozen.released, "the end of its touch")
        assert freeze.frozen == ()


def test_children_that_have_ended_are_forgotten(uffd: Harness, region: Region) -> None:
    """However many children there were, the helper keeps descriptors of those that live."""

    def descriptors() -> int:
        return len(os.listdir(f"/proc/{uffd.service_pid}/fd"))

    before = descriptors()
    with region.view as view:
        for number in range(60):
            process = fork(lambda touches=number % 2: view[PAGE + 1] if touches else 1)  # type: ignore[misc]
            assert ended(process) == 1
    assert descriptors() <= before + 10  # for who has ended just now


@pytest.mark.parametrize(
    ("memory", "found"), [("anon", -signal.SIGBUS), ("shmem-private", -signal.SIGBUS), ("shmem", 5)]
)
def test_a_child_that_outlives_the_harness_finds_no_zeros(memory: str, found: int) -> None:
    """After the end a child's own missing pages fail; shared memory has all its bytes."""
    read, write = os.pipe()

    def child() -> int:
        os.close(write)  # or its own end would keep it waiting
        os.read(read, 1)
        return view[PAGE + 5]

    with Harness() as uffd:
        view = uffd.region(2, contents=CONTENTS, memory=memory).view
        process = fork(child)
        os.close(read)
        view.release()
    os.close(write)
    assert ended(process) == found


UNPRIVILEGED = """
import os, warnings
from aiouffd.testing import Harness
with Harness(timeout=20) as uffd:
    region = uffd.region(1, contents=b"parent's")
    warnings.simplefilter("ignore")
    view = region.view
    if (process := os.fork()) == 0:
        os._exit(view[0])
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
    print(bytes(view[:8]))
    print(*uffd.limits, sep="\\n")
    view.release()
"""


def test_without_privilege_a_child_has_no_region() -> None:
    """Where forks cannot be watched the child does not get the memory, and the limits say so."""
    status, contents, *limits = unprivileged.run(UNPRIVILEGED).splitlines()
    assert status == str(-signal.SIGSEGV)
    assert contents == repr(b"parent's")
    assert any(
        "Children that fork from this process do not get its regions" in each for each in limits
    )
