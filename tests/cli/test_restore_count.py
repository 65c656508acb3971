"""aiouffd.cli.restore_count: what a daemon that is started again knows of the restores before."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from aiouffd.cli.restore_count import NAME, RestoreCount
from aiouffd.fd_store import FdStore
from aiouffd.fds import OwnedFd
from tests.test_protection import Manager


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    with contextlib.closing(Manager(tmp_path / "notify")) as manager:
        yield manager


@contextlib.contextmanager
def another(manager: Manager, limit: int = 10) -> Iterator[RestoreCount]:
    """Count in a daemon that is started with what the store has."""
    kept = manager.listen().items()
    given = [(name, fd.dup()) for name, fds in kept for fd in fds]
    with FdStore(manager._socket.getsockname(), limit, given) as store:
        count = RestoreCount(store)
        try:
            yield count
        finally:
            count.close()


def numbers(count: RestoreCount) -> tuple[int, int, int, int]:
    return count.finished, count.failed, count.lost, count.over


def test_it_outlives_a_daemon(manager: Manager) -> None:
    """Once and again; a restore that was under way is lost."""
    with another(manager) as count:
        assert numbers(count) == (0, 0, 0, 0)
        assert not manager.listen(), "who stores something has begun to serve"
        count.begin()
        count.begin()
        count.end()
        count.finish()
    with another(manager) as count:
        assert numbers(count) == (1, 0, 1, 2)
        count.fail()
    with another(manager) as count:
        assert numbers(count) == (1, 1, 1, 3)
        count.begin()
        count.end()
        count.finish()
    with another(manager) as count:
        assert numbers(count) == (2, 1, 1, 4)
        count.forget()
    with another(manager) as count:
        assert numbers(count) == (0, 0, 0, 0)
    assert manager.said == [f"put {NAME} 1", f"remove {NAME} 0"]


def test_without_a_place_it_counts_all_the_same(
    manager: Manager, caplog: pytest.LogCaptureFixture
) -> None:
    """No store, or a full one."""
    with another(manager, limit=0) as count:
        count.finish()
        assert count.over == 1
    assert "does not outlive this process: the fd store is full" in caplog.text
    with contextlib.closing(RestoreCount(None)) as count:
        count.begin()
        count.end()
        count.fail()
        count.forget()
        assert numbers(count) == (0, 1, 0, 1)


def test_what_is_no_count_is_not_believed(
    manager: Manager, caplog: pytest.LogCaptureFixture
) -> None:
    """It begins anew, and says so."""
    with OwnedFd(os.memfd_create("other")) as other:
        os.write(other.fileno(), b"x" * 100)
        manager.store.put(NAME, [other])
    with another(manager) as count:
        assert numbers(count) == (0, 0, 0, 0)
        count.finish()
    assert "cannot be read" in caplog.text
    with another(manager) as count:
        assert numbers(count) == (1, 0, 0, 1)
