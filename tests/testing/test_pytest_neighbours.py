"""Beside other plugins: xdist, pytest-asyncio in both modes, anyio's, on asyncio, uvloop, trio."""

from __future__ import annotations

import importlib.util

import pytest

from tests.testing.conftest import Run

pytest_plugins = "pytester"
pytestmark = [pytest.mark.child, pytest.mark.once]

#: An async test of each kind does this: a thread stands, the loop goes on.
BODY = """
        with uffd_region.page(0).freeze() as freeze:
            running = uffd.start(libc.strlen, uffd_region.pointer())
            frozen = freeze.wait()
            assert frozen.touch.page == 0
            uffd_region.poke(0, b"four")
            await sleep(0)
            frozen.release()
        assert running.result(timeout=5) == 4
        assert uffd.record_so_far[0].outcome == "frozen"
"""

BEGINNING = """
    import ctypes

    import pytest

    libc = ctypes.CDLL(None)
"""


def _without(module: str) -> pytest.MarkDecorator:
    extra = {"anyio": "trio", "trio": "trio", "uvloop": "uvloop"}[module]
    return pytest.mark.skipif(
        importlib.util.find_spec(module) is None,
        reason=f"needs {module}: pip install 'aiouffd[{extra}]'",
    )


@pytest.mark.parametrize("mode", ["auto", "strict"])
@pytest.mark.parametrize("loop", ["asyncio", pytest.param("uvloop", marks=_without("uvloop"))])
def test_pytest_asyncio(run: Run, pytester: pytest.Pytester, mode: str, loop: str) -> None:
    """Its tests use the fixtures, in both modes, on asyncio's loop and on uvloop's."""
    pytester.makeconftest(
        f"""
        import {loop} as module

        def pytest_asyncio_loop_factories(config, item):
            return {{"{loop}": module.new_event_loop}}
        """
    )
    marker = "@pytest.mark.asyncio\n    " if mode == "strict" else ""
    result = run(
        (
            BEGINNING,
            f"""
    from asyncio import get_running_loop, sleep

    {marker}async def test_it(uffd, uffd_region):
        assert type(get_running_loop()).__module__.startswith("{loop}")
{BODY}
    """,
        ),
        *("-o", f"asyncio_mode={mode}", "-o", "asyncio_default_fixture_loop_scope=function"),
        beside=("asyncio",),
    )
    result.assert_outcomes(passed=1)


@_without("anyio")
@pytest.mark.parametrize("backend", ["asyncio", pytest.param("trio", marks=_without("trio"))])
def test_anyio(run: Run, backend: str) -> None:
    """So do those of anyio's own plugin, which runs trio too."""
    result = run(
        (
            BEGINNING,
            f"""
    from anyio import sleep

    @pytest.fixture
    def anyio_backend():
        return "{backend}"

    @pytest.mark.anyio
    async def test_it(uffd, uffd_region):
{BODY}
    """,
        ),
        beside=("anyio",),
    )
    result.assert_outcomes(passed=1)


@pytest.mark.parametrize("loop", ["asyncio", pytest.param("uvloop", marks=_without("uvloop"))])
def test_a_hung_loop_fails_its_test(run: Run, pytester: pytest.Pytester, loop: str) -> None:
    """The loop's own thread stands, so nothing in the loop could have ended it."""
    pytester.makeconftest(
        f"""
        import {loop} as module

        def pytest_asyncio_loop_factories(config, item):
            return {{"{loop}": module.new_event_loop}}
        """
    )
    result = run(
        """
        import asyncio

        async def test_hangs(uffd_region):
            with uffd_region.page(0).freeze():
                async with asyncio.timeout(0.1):
                    uffd_region.view[0]

        async def test_after(uffd_region):
            await asyncio.sleep(0)
            assert uffd_region.view[0] == 0
        """,
        *("-o", "asyncio_mode=auto", "-o", "asyncio_default_fixture_loop_scope=function"),
        "--uffd-timeout=0.5",
        beside=("asyncio",),
    )
    result.assert_outcomes(failed=1, passed=1)
    result.stdout.fnmatch_lines(["nobody released within 0.5 s*", "*in test_hangs"])


def test_xdist(run: Run, pytester: pytest.Pytester) -> None:
    """Workers share the run's seed, and their tests' reports and records arrive as without."""
    pytester.makepyfile(matplotlib="raise ImportError")  # which would take longer than all else
    result = run(
        """
        import os

        import pytest

        @pytest.mark.parametrize("number", range(4))
        def test_fails(uffd, uffd_region, number):
            uffd_region.view[number]
            assert not os.environ["PYTEST_XDIST_WORKER"]
        """,
        *("-n", "2", "--uffd-record=touched"),
        beside=("xdist", "xdist.looponfail"),
    )
    result.assert_outcomes(failed=4)
    again = [line for line in result.outlines if line.startswith("run again with --uffd-seed=")]
    assert len(again) == 4
    assert len(set(again)) == 1
    for number in range(4):
        result.stdout.fnmatch_lines(f"#1 * reads uffd_region?0?+0x{number} *")
    assert len([*(pytester.path / "touched").glob("*].json")]) == 4


def test_xdist_goes_on_after_a_hung_test(run: Run) -> None:
    """No worker is lost: the test fails in it, and the next one runs."""
    result = run(
        """
        def test_hangs(uffd_region):
            with uffd_region.page(0).freeze():
                uffd_region.view[0]

        def test_after(uffd_region):
            assert uffd_region.view[0] == 0
        """,
        *("-n", "1", "--uffd-timeout=0.5"),
        beside=("xdist", "xdist.looponfail"),
    )
    result.assert_outcomes(failed=1, passed=1)
    result.stdout.no_fnmatch_line("*worker*crashed*")
