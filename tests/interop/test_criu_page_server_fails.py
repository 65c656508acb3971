"""Page servers that fail us: what cannot be had is never zeros, and we say why."""

from __future__ import annotations

import os
import signal

import pytest

from tests.interop.criu import Stage

pytestmark = [pytest.mark.child, pytest.mark.root, pytest.mark.limit(110)]


def test_a_page_server_that_dies_does_not_leave_zeros(stage: Stage, seed: int) -> None:
    """What can no longer be had ends the restored program; it never reads as zeros."""
    images = stage.dump(stage.pages(32, seed=seed))
    serving, port = stage.our_page_server(images)
    address = ("--page-server", "--address", "127.0.0.1", "--port", port)
    daemon = stage.our_lazy_pages(images, *address, "--no-push")
    restored = stage.restore(images).wait()
    serving.end(signal.SIGKILL)
    restored.go(f"random {seed} 1")
    stage.until(lambda: not restored.lives(), "the program has ended")
    assert not restored.is_done()
    stage.until(lambda: daemon.status is not None, "the daemon has ended")
    assert daemon.status != 0


@pytest.mark.usefixtures("big_pipes")
def test_a_stock_page_server_of_another_checkpoint(stage: Stage, seed: int) -> None:
    """It knows no such pid, and dies; what waits for pages is ended, and we say why."""
    images = stage.dump(stage.pages(8, seed=seed))
    other = stage.dump(stage.pages(8, seed=seed), name="other")
    serving, port = stage.page_server(other)
    address = ("--page-server", "--address", "127.0.0.1", "--port", port)
    daemon = stage.our_lazy_pages(images, *address)
    restored = stage.restore(images, go=f"random {seed} 1")
    stage.until(lambda: serving.status is not None, "the page server dies")
    stage.until(lambda: not restored.lives(), "the program is ended")
    assert not restored.is_done()
    stage.until(lambda: daemon.status is not None, "the daemon ends")
    assert daemon.status != 0
    assert "page server" in daemon.text()


@pytest.mark.usefixtures("big_pipes")
def test_a_stock_page_server_that_stops_answering(stage: Stage, seed: int) -> None:
    """Stopped in the middle: the deadline ends the program, not zeros, and not a wait for ever."""
    images = stage.dump(stage.pages(64, seed=seed))
    serving, port = stage.page_server(images)
    address = ("--page-server", "--address", "127.0.0.1", "--port", port)
    daemon = stage.our_lazy_pages(images, *address, "--no-push", "--deadline", 1)
    restored = stage.restore(images).wait()
    os.kill(serving.pid, signal.SIGSTOP)
    restored.go(f"random {seed} 1")
    stage.until(lambda: not restored.lives(), "the program is ended")
    assert not restored.is_done()
    del daemon
