"""What the tests with real CRIU share: each of its versions in turn, and room for its pipes."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from benchmarks import qemu_migration
from tests.interop.criu import Stage, large_pipes
from tests.suites import CRIU, Foreign


def pytest_report_header() -> list[str]:
    """Say which CRIU runs, and which QEMU."""
    versions = [foreign.said() if foreign.is_there() else f"no {foreign.name}" for foreign in CRIU]
    return [f"CRIU: {', '.join(versions)}", f"QEMU: {qemu_migration.version() or 'none'}"]


@pytest.fixture(params=CRIU, ids=lambda foreign: foreign.name)
def criu(request: pytest.FixtureRequest) -> Foreign:
    """Each version of CRIU."""
    foreign: Foreign = request.param
    if not foreign.is_there():
        pytest.skip(f"needs {foreign.name} in build/suites: sudo make interop")
    if os.geteuid() != 0:
        pytest.skip("criu needs root: sudo make interop")
    return foreign


@pytest.fixture
def stage(criu: Foreign) -> Iterator[Stage]:
    """A folder with whatever runs on it, ended afterwards."""
    with Stage(criu) as stage:
        yield stage


@pytest.fixture
def big_pipes() -> Iterator[None]:
    """Pipes as large as a stock page server wants them."""
    with large_pipes():
        yield
