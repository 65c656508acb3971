"""What ours does and the stock daemon does not: many restores, no push, sets, crashes, stores."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.interop.criu import Stage
from tests.interop.criu_relay import LazyRelay
from tests.interop.criu_running import Restored, Running
from tests.interop.nginx import Nginx

pytestmark = [pytest.mark.child, pytest.mark.root, pytest.mark.limit(110)]


# --- one checkpoint, many restores -----------------------------------------------------


def test_five_restores_from_one_checkpoint_at_once(stage: Stage, seed: int) -> None:
    """One daemon, five pid namespaces, each with another order."""
    images = stage.dump(stage.pages(40, seed=seed))
    daemon = stage.our_lazy_pages(images, "--restores", 5)
    restored = [stage.restore(images, go=f"random {seed + i} 1") for i in range(5)]
    for each in restored:
        result = each.wait().result()
        assert result["right"], result
    daemon.wait()


def test_one_restore_after_the_other_from_one_daemon(stage: Stage, seed: int) -> None:
    """A tree, three times, the last while the one before it lives."""
    images = stage.dump(stage.tree(seed=seed))
    daemon = stage.our_lazy_pages(images, "--keep-serving")
    for number in range(3):
        result = stage.restore(images, go=f"{seed + number} 30 1").wait().result()
        assert result["right"], result
    daemon.end(signal.SIGTERM)


def test_five_restores_from_one_of_our_page_servers(stage: Stage, seed: int) -> None:
    """Five stock daemons at once, then one more: the stock page server has room for one."""
    images = stage.dump(stage.pages(8, seed=seed))
    _, port = stage.our_page_server(images)
    address = ("--page-server", "--address", "127.0.0.1", "--port", port)

    def begin(number: int) -> tuple[Running, Restored]:
        work = stage.images(f"work-{number}")
        daemon = stage.lazy_pages(images, *address, work=work, level=0)
        return daemon, stage.restore(images, work=work, go=f"random {seed + number} 1 1")

    for together in (range(5), range(5, 6)):
        pairs = [begin(number) for number in together]
        for daemon, restored in pairs:
            result = restored.wait().result()
            assert result["right"], result
            daemon.wait()


# --- only what is touched --------------------------------------------------------------


def resident(stage: Stage, restored: Restored) -> int:
    """Count the pages of the checked memory that are there, as the kernel does."""
    address = int((stage.run / "ready").read_text(), 16)
    pid = restored.pids()[0]
    inside, pages = False, 0
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        word = line.split()[0]
        if not word.endswith(":"):
            start, end = (int(part, 16) for part in word.split("-"))
            inside = start <= address < end
        elif inside and word == "Rss:":
            pages += int(line.split()[1]) // 4
    return pages


def test_without_push_only_what_is_touched_comes(stage: Stage, seed: int) -> None:
    """A tenth of the pages is asked for, and a tenth is there, ever."""
    images = stage.dump(stage.pages(40, seed=seed))
    stage.our_lazy_pages(images, "--no-push")
    restored = stage.restore(images, go=f"random {seed} 0.1").wait()
    result = restored.result()
    assert result["right"], result
    assert result["touched"] == 1024
    assert resident(stage, restored) == 1024


def test_a_recorded_set_is_there_before_it_is_touched(stage: Stage, seed: int) -> None:
    """The first run records which pages it touches; the second finds them there."""
    images = stage.dump(stage.pages(40, seed=seed))
    recorded = stage.folder / "recorded"
    daemon = stage.our_lazy_pages(images, "--no-push", "--record", recorded)
    first = stage.restore(images, go=f"random {seed} 0.1").wait()
    assert first.result()["right"]
    first.end()
    daemon.end(signal.SIGTERM)
    stage.our_lazy_pages(images, "--no-push", "--replay", recorded)
    again = stage.restore(images).wait()
    stage.until(lambda: resident(stage, again) == 1024, "the set is there")
    again.go(f"random {seed} 0.1")
    result = again.result()
    assert result["right"], result
    assert resident(stage, again) == 1024


# --- crashes ---------------------------------------------------------------------------


def child_of(pid: int) -> int:
    """Give the only child of a process, 0 if it has none now."""
    words = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(words[0]) if words else 0


@pytest.mark.parametrize("kind", ["pages", "tree"])
def test_a_daemon_killed_under_load_loses_nothing(stage: Stage, kind: str, seed: int) -> None:
    """Killed with SIGKILL again and again, while threads check, forks fork and moves move."""
    target = stage.pages(200, seed=seed) if kind == "pages" else stage.tree(mib=8, seed=seed)
    images = stage.dump(target)
    keeper = stage.our_lazy_pages(images, keep=True)
    go = f"random {seed} 1" if kind == "pages" else f"{seed} 600 2"
    restored = stage.restore(images, go=go).wait()
    killed: set[int] = set()

    def kill_or_done() -> bool:
        pid = child_of(keeper.pid)
        said = keeper.text().rpartition(f"as pid {pid} ")[2]  # by this daemon
        if pid and pid not in killed and "first page served" in said:
            os.kill(pid, signal.SIGKILL)
            killed.add(pid)
        return len(killed) == 3 or restored.is_done()

    stage.until(kill_or_done, "the daemon is killed three times, each time while it serves")
    result = restored.result()
    assert result["right"], f"{result}\n{keeper.text()}"
    assert killed, "it was done before anything could be killed"
    keeper.wait()


@pytest.mark.parametrize("kind", ["pages", "tree"])
def test_a_restore_waits_in_the_socket_of_a_daemon_that_dies(
    stage: Stage, kind: str, seed: int
) -> None:
    """With all that it has handed over; the next daemon hears of it first, and serves it."""
    target = stage.pages(8, seed=seed) if kind == "pages" else stage.tree(seed=seed)
    images = stage.dump(target)
    keeper = stage.our_lazy_pages(images, keep=True)
    pid = child_of(keeper.pid)
    os.kill(pid, signal.SIGSTOP)
    try:
        restored = stage.restore(
            images, go=f"random {seed} 1" if kind == "pages" else f"{seed} 9 1"
        )
        log = restored.running.also
        assert log is not None
        stage.until(
            lambda: log.exists() and "lazy-pages: closing uffd" in log.read_text(errors="replace"),
            "a task is handed over",
        )
    finally:
        os.kill(pid, signal.SIGKILL)
    result = restored.wait().result()
    assert result["right"], f"{result}\n{keeper.text()}"
    keeper.wait()


def test_without_a_keeper_a_killed_daemon_leaves_zeros(stage: Stage) -> None:
    """The control: this is what the keeper is for."""
    images = stage.dump(stage.pages(8))
    work = stage.images("work")
    daemon = stage.our_lazy_pages(images, "--no-push")
    with LazyRelay(work, images):
        restored = stage.restore(images, work=work).wait()
        daemon.end(signal.SIGKILL)
        restored.go("random 1 1")
        stage.until(lambda: restored.is_done() or not restored.lives(), "the program goes on")
        if restored.is_done():
            result = restored.result()
            assert not result["right"]
            assert result["wrong_words"] == 8 << 17


# --- images anywhere -------------------------------------------------------------------


@contextmanager
def on_nginx(images: Path) -> Iterator[str]:
    """Serve the images from a web server."""
    nginx = Nginx()
    try:
        shutil.copytree(images, nginx.www / "checkpoint", ignore=_sockets)
        asyncio.run(nginx.start())
        yield f"http://127.0.0.1:{nginx.plain}/checkpoint"
    finally:
        asyncio.run(nginx.aclose())


def _sockets(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if name.endswith((".socket", ".log"))]


@pytest.mark.skipif(shutil.which("nginx") is None, reason="needs nginx: sudo make interop")
def test_images_on_a_web_server(stage: Stage, seed: int) -> None:
    """A tree, all of its lazy memory by ranged GETs."""
    images = stage.dump(stage.tree(seed=seed))
    with on_nginx(images) as url:
        daemon = stage.our_lazy_pages(images, "--images", url)
        result = stage.restore(images, go=f"{seed} 40 1").wait().result()
        assert result["right"], result
        daemon.wait()


_PUT = """
import os, sys
from pathlib import Path
import obstore
from obstore.store import S3Store
store = S3Store("images", client_options={"allow_http": True})
for path in Path(sys.argv[1]).iterdir():
    if path.suffix == ".img":
        obstore.put(store, f"checkpoint/{path.name}", path, use_multipart=False)
"""


def test_images_in_an_object_store_compressed(stage: Stage, seed: int) -> None:
    """Its pages are seekable zstd there."""
    images = stage.dump(stage.pages(40, seed=seed))
    packed = stage.images("packed")
    for path in images.glob("*.img"):
        shutil.copy(path, packed)
    pack = (sys.executable, "-m", "aiouffd", "image", "pack", images / "pages-1.img")
    stage.start("pack", *pack, packed / "pages-1.img.zst").wait(limit=60)
    (packed / "pages-1.img.zst").rename(packed / "pages-1.img")
    store = stage.start("s3", sys.executable, "-m", "tests.s3_server")
    stage.until(lambda: store.text().endswith("\n\n"), "the store listens")
    said = subprocess.run(
        ["sh", "-c", f"{store.text()}\nenv -0"], capture_output=True, check=True, text=True
    ).stdout
    names = [line.split()[1].partition("=")[0] for line in store.text().splitlines() if line]
    every = dict(line.split("=", 1) for line in said.split("\0") if line)
    stage.environment |= {name: every[name] for name in names}
    stage.start("put", sys.executable, "-c", _PUT, packed).wait()
    daemon = stage.our_lazy_pages(images, "--images", "s3://images/checkpoint")
    result = stage.restore(images, go=f"random {seed} 1").wait().result()
    assert result["right"], result
    daemon.wait()
