"""``criu restore --lazy-pages`` from images on this machine."""

from __future__ import annotations

import signal

import pytest

from tests.interop.criu import Stage
from tests.interop.criu_relay import LazyRelay

pytestmark = [pytest.mark.child, pytest.mark.root, pytest.mark.limit(110)]


@pytest.fixture(params=["stock", "ours"])
def daemon(request: pytest.FixtureRequest) -> str:
    """Whose lazy-pages daemon."""
    name: str = request.param
    return name


@pytest.mark.parametrize("mode", ["sequential", "random", "writing"])
def test_threads_check_200_mib(stage: Stage, daemon: str, mode: str, seed: int) -> None:
    """Four threads check every word; the daemon ends when nothing is left to serve."""
    mib = 200 if daemon == "ours" else 40  # stock would take its time: a list that it searches
    images = stage.dump(stage.pages(mib, seed=seed))
    running = stage.daemon(daemon, images)
    restored = stage.restore(images, go=f"{mode} {seed} 1").wait()
    result = restored.result()
    assert result["right"], result
    assert result["touched"] == mib * 256
    running.wait()


def test_tree_that_changes_its_memory(stage: Stage, daemon: str, seed: int) -> None:
    """Three processes, threads, a zombie: all fork, move, discard and unmap, and check all."""
    images = stage.dump(stage.tree(seed=seed))
    running = stage.daemon(daemon, images)
    go = f"{seed} {stage.changes(daemon, 300, 2)}"
    result = stage.restore(images, go=go).wait().result()
    assert result["right"], result
    assert result["processes"] == (3 * 7 if daemon == "ours" else 3)
    assert "refused" not in result["done"]
    running.wait()


@pytest.mark.parametrize(
    ("daemon", "kind"), [("stock", "pages"), ("ours", "pages"), ("ours", "tree")]
)
def test_faults_before_the_restore_is_finished(
    stage: Stage, daemon: str, kind: str, seed: int
) -> None:
    """The daemon does not hear that the restore has finished until all memory was checked.

    A tree of processes the stock daemon can only serve with what its push makes good.
    """
    target = stage.pages(8, seed=seed) if kind == "pages" else stage.tree(seed=seed)
    images = stage.dump(target)
    work = stage.images("work")
    running = stage.daemon(daemon, images)
    with LazyRelay(work, images) as relay:
        go = f"random {seed} 1" if kind == "pages" else f"{seed} 40 1"
        result = stage.restore(images, work=work, go=go).wait().result()
        assert result["right"], result
        assert relay.finished == 1
        zombies = [pid for pid in relay.tasks if pid < 0]
        assert (len(relay.tasks), len(zombies)) == ((1, 0) if kind == "pages" else (4, 1))
        assert running.status is None
        relay.release()
        running.wait()


def test_one_wrong_page_is_noticed(stage: Stage, daemon: str, seed: int) -> None:
    """The control: a byte that was changed in the images is found, and where it is."""
    images = stage.dump(stage.pages(8, seed=seed))
    with open(images / "pages-1.img", "r+b") as file:
        data = file.read()
        at = len(data) // 2  # a page of the 8 MiB, whatever the rest
        file.seek(at)
        file.write(bytes([data[at] ^ 1]))
    stage.daemon(daemon, images)
    result = stage.restore(images, go=f"random {seed} 1").wait().result()
    assert not result["right"]
    assert result["wrong_words"] == 1
    assert len(result["wrong"]) == 1


def test_zeros_are_what_a_dead_stock_daemon_leaves(stage: Stage) -> None:
    """The control of a crash: pages that were missing read zero, if the program lives that long."""
    images = stage.dump(stage.pages(8))
    work = stage.images("work")
    running = stage.lazy_pages(images)
    with LazyRelay(work, images):
        restored = stage.restore(images, work=work).wait()
        running.end(signal.SIGKILL)
        restored.go("random 1 1")
        stage.until(lambda: restored.is_done() or not restored.lives(), "the program goes on")
        if restored.is_done():
            result = restored.result()
            assert not result["right"]
            assert result["wrong_words"] == 8 << 17
