"""What is missing skips a test, with the remedy; seen by users and containers that lack it."""

from __future__ import annotations

import os

import pytest

from aiouffd.kernel import abi, probe
from tests.testing.conftest import Run

pytest_plugins = "pytester"
pytestmark = [pytest.mark.child, pytest.mark.once]

#: Nobody, who may read files, without the device: what an unprivileged user has.
NOBODY = (
    *("unshare", "--mount", "--", "sh", "-c"),
    f"""
    if [ -e {abi.DEVICE_PATH} ]; then mount --bind /dev/null {abi.DEVICE_PATH}; fi
    exec setpriv --reuid=65534 --regid=65534 --clear-groups \\
        --inh-caps=-all,+dac_read_search --ambient-caps=-all,+dac_read_search \\
        --bounding-set=-all,+dac_read_search -- "$0" "$@"
    """,
)

NR_PTRACE = {"x86_64": 101, "aarch64": 117}[os.uname().machine]


def deny(call: int) -> str:
    """A conftest.py that has the kernel refuse a system call from now on."""
    return f"""
    import ctypes

    class Filter(ctypes.Structure):
        _fields_ = [("code", ctypes.c_ushort), ("jt", ctypes.c_ubyte), ("jf", ctypes.c_ubyte),
                    ("k", ctypes.c_uint)]

    class Program(ctypes.Structure):
        _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.POINTER(Filter))]

    rules = (Filter * 4)(
        Filter(0x20, 0, 0, 0),               # load the call's number
        Filter(0x15, 0, 1, {call}),
        Filter(0x06, 0, 0, 0x00050000 | 1),  # SECCOMP_RET_ERRNO, EPERM
        Filter(0x06, 0, 0, 0x7FFF0000),      # SECCOMP_RET_ALLOW
    )
    program = Program(4, rules)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert libc.prctl(22, 2, ctypes.byref(program), 0, 0) == 0
    """


def nobody_may(path: str) -> bool:
    """Whether the sysctl gives everybody a full userfaultfd."""
    try:
        with open(path, encoding="ascii") as file:
            return int(file.read()) == 1
    except OSError:
        return False


@pytest.fixture(autouse=True)
def _privileged_only_by_rights() -> None:
    if nobody_may(abi.UNPRIVILEGED_SYSCTL):
        pytest.skip("needs vm.unprivileged_userfaultfd=0: sysctl vm.unprivileged_userfaultfd=0")


@pytest.mark.root
def test_without_privilege(run: Run) -> None:
    """Tests of user-mode accesses run; those that need more are skipped, and told why."""
    result = run(
        """
        import ctypes

        import pytest

        libc = ctypes.CDLL(None)

        @pytest.mark.uffd(needs="kernel-mode")
        def test_system_call(uffd):
            raise AssertionError("not to be run")

        @pytest.mark.uffd(needs=["trace", "fork"])
        class TestForks:
            def test_fork(self, uffd_region):
                raise AssertionError("not to be run")

        @pytest.mark.uffd(needs="fork")
        def test_without_fixtures():
            raise AssertionError("not to be run")

        def test_program(uffd, uffd_region):
            assert uffd.limits
            with uffd_region.page(0).freeze() as freeze:
                running = uffd.start(libc.strlen, uffd_region.pointer())
                frozen = freeze.wait()
                assert frozen.touch.system_call is None
                uffd_region.poke(0, b"four")
                frozen.release()
            assert running.result(timeout=5) == 4
        """,
        *("-rs", "-p", "no:cacheprovider"),
        through=NOBODY,
    )
    result.assert_outcomes(skipped=3, passed=1)
    result.stdout.fnmatch_lines_random(
        [
            "SKIPPED * needs kernel-mode: kernel-faults is missing here (*)*CAP_SYS_PTRACE*",
            "SKIPPED * test_it.py:*: needs fork: event-fork is missing here (*)*",
        ]
    )


@pytest.mark.root
def test_without_userfaultfd(run: Run, pytester: pytest.Pytester) -> None:
    """Where nothing can be opened every fixture skips, and each gate's remedy is told."""
    pytester.makeconftest(deny(abi.NR_USERFAULTFD))
    result = run(
        """
        def test_uffd(uffd):
            raise AssertionError("not to be run")

        def test_region(uffd_region):
            raise AssertionError("not to be run")

        def test_harness(uffd_harness):
            uffd_harness(timeout=1)
            raise AssertionError("not to be run")

        def test_other():
            pass
        """,
        *("-rs", "-p", "no:cacheprovider"),
        through=NOBODY,
    )
    result.assert_outcomes(skipped=3, passed=1)
    result.stdout.fnmatch_lines("SKIPPED * needs userfaultfd: *seccomp filter*")


def test_without_ptrace(run: Run, pytester: pytest.Pytester) -> None:
    """Where a container's filter refuses ptrace, what needs it is skipped and the rest runs."""
    pytester.makeconftest(deny(NR_PTRACE))
    result = run(
        """
        import pytest

        @pytest.mark.uffd(needs="trace")
        def test_trace(uffd):
            raise AssertionError("not to be run")

        def test_region(uffd, uffd_region):
            assert uffd_region.view[0] == 0
            assert [touch.page for touch in uffd.record_so_far] == [0]
            assert any("ptrace" in limit for limit in uffd.limits)
        """,
        "-rs",
    )
    result.assert_outcomes(skipped=1, passed=1)
    result.stdout.fnmatch_lines("SKIPPED * test_it.py:3: needs trace: *ptrace*")


def test_huge_pages(run: Run) -> None:
    """Memory of huge pages is there, or the reason says how to get some."""
    result = run(
        """
        import pytest

        @pytest.mark.uffd(memory="hugetlb")
        def test_region(uffd_region):
            assert uffd_region.page_size > 4096
        """,
        "-rs",
    )
    report = probe.probe()
    if report["hugetlb"].available and report["missing-hugetlbfs"].available:
        result.assert_outcomes(passed=1)
    else:
        result.assert_outcomes(skipped=1)
        result.stdout.fnmatch_lines("SKIPPED * test_it.py:3: needs hugetlb: *missing here*")


def test_elsewhere(run: Run, pytester: pytest.Pytester) -> None:
    """On another system than Linux everything is skipped with one sentence."""
    pytester.makeconftest("import sys\n\ndef pytest_sessionstart():\n    sys.platform = 'darwin'\n")
    result = run(
        """
        import pytest

        def test_uffd(uffd_region):
            raise AssertionError("not to be run")

        @pytest.mark.uffd(needs="kernel-mode")
        def test_needs():
            raise AssertionError("not to be run")
        """,
        "-rs",
    )
    result.assert_outcomes(skipped=2)
    result.stdout.fnmatch_lines("SKIPPED * userfaultfd exists on Linux only*")
