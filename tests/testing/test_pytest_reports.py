"""What a failed test is told: what was touched, who stood where; and that no test hangs."""

from __future__ import annotations

import pytest

from tests.testing.conftest import Run

pytest_plugins = "pytester"
pytestmark = [pytest.mark.child, pytest.mark.once]

BEGINNING = """
    import contextlib
    import ctypes
    import os
    import signal
    import threading
    import time

    import pytest

    libc = ctypes.CDLL(None)

    @pytest.fixture
    def pipe():
        ends = os.pipe()
        yield ends
        for end in ends:
            os.close(end)
"""


# --- tests that would hang -------------------------------------------------------------

HUNG = {
    "c thread": """
        def test_hangs(uffd_region):
            with uffd_region.page(0).freeze():
                thread = threading.Thread(target=libc.strlen, args=(uffd_region.pointer(),))
                thread.start()
                thread.join()
    """,
    "python": """
        def test_hangs(uffd_region):
            with uffd_region.page(0).freeze():
                uffd_region.view[0]
    """,
    "python with the gil": """
        @pytest.mark.uffd(backend="process")
        def test_hangs(uffd_region):
            with uffd_region.page(0).freeze():
                uffd_region.view[0]
    """,
    "python thread": """
        def test_hangs(uffd_region):
            with uffd_region.page(0).freeze():
                thread = threading.Thread(target=lambda: uffd_region.view[0])
                thread.start()
                thread.join()
    """,
    "system call": """
        @pytest.mark.uffd(needs="kernel-mode")
        def test_hangs(uffd_region, pipe):
            with uffd_region.page(0).freeze():
                os.write(pipe[1], uffd_region.view)
    """,
    "system call with the gil": """
        @pytest.mark.uffd(needs="kernel-mode")
        def test_hangs(uffd_region, pipe):
            with uffd_region.page(0).freeze():
                ctypes.PyDLL(None).write(pipe[1], uffd_region.pointer(), 1)
    """,
}


@pytest.mark.parametrize("text", HUNG.values(), ids=HUNG)
def test_a_hung_test_fails_and_the_run_goes_on(run: Run, text: str) -> None:
    """Past the limit the thread goes on; the test has failed, and shows where it stood."""
    after = """
        def test_after(uffd_region):
            assert uffd_region.view[0] == 0
    """
    result = run((BEGINNING, text, after), "--uffd-timeout=0.5")
    result.assert_outcomes(failed=1, passed=1)
    result.stdout.fnmatch_lines(
        [
            "nobody released within 0.5 s*",
            "* uffd_region?0?* the freeze of touch of uffd_region?0?",
            '*File "*test_it.py", line * in test_hangs',
            "*let go at the time limit*",
            "FAILED test_it.py::test_hangs*",
        ]
    )
    result.stdout.no_re_match_line(r".*(pytest_plugin\.py|per_test\.py|_pytest/|_carry)")


def test_a_hung_test_is_told_who_waited_for_whom(run: Run) -> None:
    """As it was at the limit: the test's own thread waited for the one that stood."""
    result = run((BEGINNING, HUNG["c thread"]), "--uffd-timeout=0.5")
    result.assert_outcomes(failed=1)
    result.stdout.re_match_lines(
        [
            r".* uffd waits .*",
            r"(Thread-1.* \(tid \d+\)) stands before its read of uffd_region\[0\]\+0x0, .*",
            r"MainThread \(tid \d+\) waits for the end of Thread-1.*\(tid \d+\), at .*test_it\.py:",
        ]
    )


def test_only_the_time_limit_of_the_test_counts(run: Run) -> None:
    """The marker's limit holds for its test."""
    result = run(
        (
            BEGINNING,
            """
            @pytest.mark.uffd(timeout=0.25)
            def test_hangs(uffd_region):
                with uffd_region.page(0).freeze():
                    uffd_region.view[0]
            """,
        ),
        "--uffd-timeout=50",
    )
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines("nobody released within 0.25 s*")


def test_a_test_that_saw_it_itself_is_told_once(run: Run) -> None:
    """The error that the test got from the harness is not raised again behind it."""
    result = run(
        (
            BEGINNING,
            """
            def test_hangs(uffd, uffd_region):
                with uffd_region.page(0).freeze():
                    uffd_region.view[0]
                uffd.region(1)
            """,
        ),
        "--uffd-timeout=0.25",
    )
    result.assert_outcomes(failed=1)


def test_a_helper_that_died_fails_its_test(run: Run) -> None:
    """Its threads go on, and what was asserted on their accesses is worth nothing."""
    result = run(
        (
            BEGINNING,
            """
            def test_loses(uffd):
                with open(f"/proc/self/task/{os.getpid()}/children") as file:
                    (helper,) = map(int, file.read().split())
                os.kill(helper, signal.SIGKILL)
                os.waitid(os.P_PID, helper, os.WEXITED | os.WNOWAIT)

            def test_after(uffd_region):
                assert uffd_region.view[0] == 0
            """,
        )
    )
    result.assert_outcomes(failed=1, passed=1)
    result.stdout.fnmatch_lines("the helper process *")


# --- what a failure shows --------------------------------------------------------------


def test_the_last_touches_and_who_stands(run: Run) -> None:
    """Touches with thread, page and place; who stood where, by which freeze, for how long."""
    result = run(
        (
            BEGINNING,
            """
            @pytest.mark.uffd(pages=2)
            def test_fails(uffd, uffd_region):
                uffd_region.name_page(1, "body")
                uffd_region.view[5]
                with uffd_region.page("body").freeze("read") as freeze:
                    pointer = uffd_region.pointer(uffd_region.page_size)
                    uffd.start_named("parser", libc.strlen, pointer)
                    freeze.wait()
                    assert freeze.frozen == ()

            def test_passes(uffd_region):
                uffd_region.view[0]
            """,
        )
    )
    result.assert_outcomes(failed=1, passed=1)
    result.stdout.re_match_lines(
        [
            r".* uffd touches .*",
            r"#1 .* reads uffd_region\[0\]\+0x5 .*",
            r"#2 .* parser \(tid \d+\) reads uffd_region\[body\]\+0x0 .*libc.*",
            r".* uffd waits .*",
            r"parser \(tid \d+\) .*uffd_region\[body\].*",
            r".* uffd seed .*",
        ]
    )
    assert result.stdout.str().count("uffd touches") == 1


def test_only_the_last_touches_are_shown(run: Run) -> None:
    """Of thousands of touches the report has the last ones, and says how many there were."""
    result = run(
        """
        import pytest

        @pytest.mark.uffd(pages=100)
        def test_fails(uffd_region):
            for page in uffd_region.pages:
                uffd_region.view[page.start]
            assert False
        """
    )
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*the last 40 of 100:", "#61 *", "#100 *"])
    result.stdout.no_fnmatch_line("#60 *")


def test_a_thread_that_is_left_frozen_is_an_error(run: Run) -> None:
    """The test has passed, but whom it froze stands still when its fixtures are closed."""
    result = run(
        (
            BEGINNING,
            """
            def test_leaves(uffd, uffd_region):
                freeze = uffd_region.page(0).freeze().__enter__()
                uffd.start_named("parser", libc.strlen, uffd_region.pointer())
                freeze.wait()

            def test_after(uffd_region):
                assert uffd_region.view[0] == 0
            """,
        )
    )
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.re_match_lines(
        [
            r".*ERROR at teardown of test_leaves.*",
            r".*left frozen.*",
            r".* uffd waits .*",
            r"parser \(tid \d+\) .*uffd_region\[0\].*",
        ]
    )


def test_a_fixture_may_hold_a_thread(run: Run) -> None:
    """What a test's own fixtures release behind it was not left."""
    result = run(
        (
            BEGINNING,
            """
            @pytest.fixture
            def frozen(uffd, uffd_region):
                with uffd_region.page(0).freeze() as freeze:
                    running = uffd.start(libc.strlen, uffd_region.pointer())
                    yield freeze.wait()
                assert running.result(timeout=5) == 0

            def test_it(frozen):
                assert frozen.touch.page == 0
            """,
        )
    )
    result.assert_outcomes(passed=1)


def test_what_is_expected_to_fail_says_nothing(run: Run) -> None:
    """Expected failures and skipped tests have no such sections."""
    result = run(
        """
        import pytest

        @pytest.mark.xfail(strict=True)
        def test_expected(uffd_region):
            uffd_region.view[0]
            assert False

        def test_skipped(uffd_region):
            pytest.skip("for no reason")
        """,
        *("-rA",),
    )
    result.assert_outcomes(xfailed=1, skipped=1)
    result.stdout.no_fnmatch_line("*uffd touches*")


def test_an_error_of_a_started_function(run: Run) -> None:
    """It fails the test that has not asked for it; one that fails anyway shows it, and no more."""
    text = """
        import pytest

        def worker():
            raise TypeError("the worker is broken")

        def test_passes(uffd):
            uffd.start(worker).thread.join()

        def test_fails(uffd):
            uffd.start(worker).thread.join()
            assert False, "first"

        @pytest.mark.xfail
        def test_is_expected_to_fail(uffd):
            uffd.start(worker).thread.join()
            assert False
        """
    result = run(text)
    result.assert_outcomes(passed=1, failed=1, xfailed=1, errors=1)
    result.stdout.fnmatch_lines(
        ["*ERROR at teardown of test_passes*", "*has raised an error*", "*the worker is broken*"]
    )
    result.stdout.fnmatch_lines(["*assert False*", "*uffd errors*", "*the worker is broken*"])


def test_a_time_limit_can_be_what_is_expected(run: Run) -> None:
    """``xfail(raises=HarnessError)`` sees the error, as of any other failure."""
    result = run(
        """
        import pytest
        from aiouffd.testing import HarnessError

        @pytest.mark.xfail(raises=HarnessError, strict=True)
        def test_expected(uffd_region):
            with uffd_region.page(0).freeze():
                uffd_region.view[0]
        """,
        "--uffd-timeout=0.25",
    )
    result.assert_outcomes(xfailed=1)


def test_the_line_of_the_test_is_shown(run: Run) -> None:
    """A wait in vain and a failed assertion point at the test, not into this package."""
    result = run(
        """
        def test_waits(uffd_region):
            with uffd_region.page(0).freeze() as freeze:
                freeze.wait(timeout=0.01)

        def test_asserts(uffd, uffd_region):
            uffd_region.view[0]
            uffd.record_so_far.assert_untouched()

        def test_explores(uffd, uffd_region):
            def check():
                assert not uffd_region.view[0]
            uffd.explore({"one": lambda: uffd_region.poke(0, b"1")}, check=check)
        """
    )
    result.assert_outcomes(failed=3)
    result.stdout.fnmatch_lines(
        [
            ">*freeze.wait(timeout=0.01)",
            ">*assert_untouched()",
            ">*assert not uffd_region.view?0?",
            ">*uffd.explore(*",
        ]
    )
    result.stdout.no_re_match_line(r".*(freezing|record|interleaving|harness|inspect)\.py")


def test_a_hung_test_can_be_interrupted(run: Run) -> None:
    """Control-C ends the run at once, long before the limit, and fixtures are torn down."""
    result = run(
        (
            BEGINNING,
            """
            def interrupt(freeze):
                frozen = freeze.wait()
                while frozen.held_by != "trampoline":
                    time.sleep(0.001)
                os.kill(os.getpid(), signal.SIGINT)

            @pytest.fixture
            def after():
                yield
                print("torn down")

            def test_hangs(uffd, after, uffd_region):
                with uffd_region.page(0).freeze() as freeze:
                    uffd.start(interrupt, freeze)
                    uffd_region.view[0]
            """,
        ),
        *("-s", "--uffd-timeout=1000"),
    )
    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.stdout.fnmatch_lines(["*torn down*", "*KeyboardInterrupt*"])
