"""Pages over TCP: stock CRIU and ours as page server and as the daemon that asks it."""

from __future__ import annotations

import signal

import pytest

from tests.interop.criu import Stage
from tests.interop.criu_certificates import Certificates
from tests.interop.criu_running import free_port
from tests.interop.cut_line import CutLine

pytestmark = [
    pytest.mark.child,
    pytest.mark.root,
    pytest.mark.limit(110),
    pytest.mark.usefixtures("big_pipes"),
]

#: Who asks, and who answers; stock with stock shows that the stage is right.
PAIRS = pytest.mark.parametrize(
    ("daemon", "server"),
    [("stock", "stock"), ("stock", "ours"), ("ours", "stock"), ("ours", "ours")],
)


@PAIRS
@pytest.mark.parametrize("mode", ["random", "writing"])
def test_pages_come_from_a_page_server(
    stage: Stage, daemon: str, server: str, mode: str, seed: int
) -> None:
    """All memory is right, and both sides end with status 0."""
    images = stage.dump(stage.pages(16, seed=seed))
    serving, port = stage.server(server, images)
    address = ("--page-server", "--address", "127.0.0.1", "--port", port)
    running = stage.daemon(daemon, images, *address)
    result = stage.restore(images, go=f"{mode} {seed} 1 2").wait().result()
    assert result["right"], result
    running.wait()
    if server == "stock":
        serving.wait()


@PAIRS
def test_tree_from_a_page_server(stage: Stage, daemon: str, server: str, seed: int) -> None:
    """Several tasks on one connection, and the zombie that has no memory."""
    images = stage.dump(stage.tree(seed=seed))
    _, port = stage.server(server, images)
    address = ("--page-server", "--address", "127.0.0.1", "--port", port)
    running = stage.daemon(daemon, images, *address)
    result = stage.restore(images, go=f"{seed} {stage.changes(daemon, 40, 1)}").wait().result()
    assert result["right"], result
    running.wait()


@PAIRS
def test_pages_over_tls(stage: Stage, daemon: str, server: str, seed: int) -> None:
    """Both sides show a certificate."""
    tls = Certificates.make(stage.folder / "tls").options
    images = stage.dump(stage.pages(8, seed=seed))
    _, port = stage.server(server, images, *tls)
    address = ("--page-server", "--address", "127.0.0.1", "--port", port)
    running = stage.daemon(daemon, images, *address, *tls)
    result = stage.restore(images, go=f"random {seed} 1 2").wait().result()
    assert result["right"], result
    running.wait()


@pytest.mark.parametrize("daemon", ["stock", "ours"])
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_post_copy_from_a_live_dump(stage: Stage, daemon: str, tls: bool, seed: int) -> None:
    """The frozen program's own memory follows it; the source ends with 0 and is gone."""
    certificates = Certificates.make(stage.folder / "tls").options if tls else ()
    target, images, port = stage.pages(32, seed=seed), stage.images(), free_port()
    address = ("--address", "127.0.0.1", "--port", port, *certificates)
    words = ("-t", target.pid, "--shell-job", "--lazy-pages", *address)
    dump = stage.start_criu("dump", images, *words, ready=True)
    stage.until_listens(dump, port)
    assert stage.running(target).status is None
    assert (images / "pages-1.img").stat().st_size < 4 << 20, "the rest is at the source"
    running = stage.daemon(daemon, images, "--page-server", *address)
    result = stage.restore(images, go=f"random {seed} 1 2").wait().result()
    assert result["right"], result
    running.wait()
    dump.wait()
    stage.running(target).wait(-signal.SIGKILL)


@pytest.mark.parametrize("daemon", ["stock", "ours"])
def test_a_cut_post_copy_leaves_the_source_alive(stage: Stage, daemon: str, seed: int) -> None:
    """The line breaks in the middle; the dump ends with 1, and the program goes on there.

    A line that *ends* between two messages is success for the dump, and the source is killed:
    what asks it must never close before it has all.
    """
    target, images, port = stage.pages(32, seed=seed), stage.images(), free_port()
    address = ("--address", "127.0.0.1", "--port")
    words = ("-t", target.pid, "--shell-job", "--lazy-pages", *address, port)
    dump = stage.start_criu("dump", images, *words, ready=True)
    stage.until_listens(dump, port)
    with CutLine(port, after=4 << 20) as line:
        running = stage.daemon(daemon, images, "--page-server", *address, line.port)
        restored = stage.restore(images).wait()
        dump.wait(1)
        running.wait(1)
    restored.end()
    target.go(f"random {seed} 1")
    assert target.result()["right"]
