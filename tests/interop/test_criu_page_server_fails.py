"""Page servers that fail us: what cannot be had is never zeros, and we say why."""

from __future__ import annotations

import os
import signal

import pytest

from tests.interop.criu import Stage
from tests.interop.criu_relay import LazyRelay
from tests.interop.criu_running import free_port

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


@pytest.mark.usefixtures("big_pipes")
def test_a_daemon_killed_in_a_post_copy_leaves_the_source_alive(stage: Stage, seed: int) -> None:
    """The stock source takes an orderly end for success, and would be killed with its memory."""
    target, images, port = stage.pages(32, seed=seed), stage.images(), free_port()
    address = ("--address", "127.0.0.1", "--port", port)
    words = ("-t", target.pid, "--shell-job", "--lazy-pages", *address)
    dump = stage.start_criu("dump", images, *words, ready=True)
    stage.until_listens(dump, port)
    daemon = stage.our_lazy_pages(images, "--page-server", *address, "--no-push")
    restored = stage.restore(images).wait()
    daemon.end(signal.SIGKILL)
    dump.wait(1)
    restored.end()
    target.go(f"random {seed} 1")
    assert target.result()["right"]


# --- a restore that fails --------------------------------------------------------------


def test_a_restore_that_fails_midway_is_said(stage: Stage, seed: int) -> None:
    """Its connection ends without the last word: status 1, and what is missing is not zeros."""
    images = stage.dump(stage.tree(seed=seed))
    work = stage.images("work")
    daemon = stage.our_lazy_pages(images)
    with LazyRelay(work, images):
        restored = stage.restore(images, work=work).wait()
    daemon.wait(1)
    assert "restore" in daemon.text()
    restored.go(f"{seed} 0 0")
    stage.until(lambda: restored.is_done() or not restored.lives(), "they go on, or meet SIGBUS")
    assert not restored.is_done() or "ended with wait status 0x7" in str(restored.result())


def test_a_restore_of_other_images_is_refused(stage: Stage, seed: int) -> None:
    """The daemon has another checkpoint: what it cannot serve does not live on with zeros."""
    images = stage.dump(stage.pages(8, seed=seed))
    other = stage.dump(stage.pages(8, seed=seed), name="other")
    daemon = stage.our_lazy_pages(other, work=images)
    restored = stage.restore(images, go=f"random {seed} 1")
    stage.until(lambda: restored.has_ended() and not restored.lives(), "all has ended")
    assert not restored.is_done()
    daemon.wait(1)
    assert "is it a restore of other images?" in daemon.text()


@pytest.mark.usefixtures("big_pipes")
def test_the_wrong_size_of_headers_is_said(stage: Stage, seed: int) -> None:
    """CRIU 4.1 and 4.2 do not understand each other; told to speak the other's, we say so."""
    images = stage.dump(stage.pages(8, seed=seed))
    _, port = stage.page_server(images)
    wrong = "32" if stage.criu.name.endswith("4.1") else "24"
    address = ("--page-server", "--address", "127.0.0.1", "--port", port)
    daemon = stage.our_lazy_pages(images, *address, "--protocol", wrong)
    restored = stage.restore(images, go=f"random {seed} 1")
    stage.until(lambda: restored.has_ended() and not restored.lives(), "all has ended")
    assert not restored.is_done()
    daemon.wait(1)
    assert "--protocol" in daemon.text(), daemon.text()
