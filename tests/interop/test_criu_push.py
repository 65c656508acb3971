"""``criu dump --page-server`` into our receiver, and its checkpoint at the hands of stock CRIU."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.interop.criu import Stage
from tests.interop.criu_certificates import Certificates
from tests.interop.criu_running import Target, free_port

pytestmark = [
    pytest.mark.child,
    pytest.mark.root,
    pytest.mark.limit(110),
    pytest.mark.usefixtures("big_pipes"),
]


def push(stage: Stage, target: Target, *options: object) -> Path:
    """Dump a target, its pages over the line to us, into the same folder."""
    images = stage.images()
    receiving, port = stage.our_receiver(images, *options)
    dump_to(stage, target, images, port, *options)
    stage.running(target).wait(-signal.SIGKILL)
    receiving.wait()
    return images


def dump_to(stage: Stage, target: Target, images: Path, port: int, *options: object) -> None:
    """Let stock CRIU dump a target, its pages to a port."""
    address = ("--page-server", "--address", "127.0.0.1", "--port", port)
    words = ("-t", target.pid, "--shell-job", *address, *options)
    stage.start_criu("dump", images, *words).wait()


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("lazy", [False, True], ids=["at once", "lazily"])
def test_threads_find_200_mib_that_were_pushed(
    stage: Stage, tls: bool, lazy: bool, seed: int
) -> None:
    """Every page that we wrote is read by stock CRIU as it was sent."""
    options = Certificates.make(stage.folder / "tls").options if tls else ()
    images = push(stage, stage.pages(32 if tls else 200, seed=seed), *options)
    if lazy:
        stage.lazy_pages(images, level=0)
    result = stage.restore(images, go=f"sequential {seed} 1", lazy=lazy).wait().result()
    assert result["right"], result


def test_tree_that_was_pushed(stage: Stage, seed: int) -> None:
    """Several tasks on one connection, shared memory and a zombie among them."""
    images = push(stage, stage.tree(seed=seed))
    result = stage.restore(images, go=f"{seed} 40 1", lazy=False).wait().result()
    assert result["right"], result


def test_we_write_what_the_stock_receiver_writes(stage: Stage, seed: int) -> None:
    """Files of the same names and lengths; the pages are the same where nothing has moved."""
    target, theirs, port = stage.pages(8, seed=seed), stage.images("theirs"), free_port()
    receiving = stage.start_criu("page-server", theirs, "--address", "127.0.0.1", "--port", port)
    stage.until_listens(receiving, port)
    dump_to(stage, target, theirs, port, "--leave-running")
    receiving.wait()
    ours = push(stage, target)
    names = sorted(path.name for path in theirs.glob("page*.img"))
    assert sorted(path.name for path in ours.glob("page*.img")) == names
    pages = next(name for name in names if name.startswith("pages-"))
    one, other = (folder.joinpath(pages).read_bytes() for folder in (ours, theirs))
    assert len(one) == len(other)
    places = range(0, len(one), 4096)
    differing = sum(one[at : at + 4096] != other[at : at + 4096] for at in places)
    assert differing < 8, "a few of its stacks and of its libraries' have changed meanwhile"
    for name in names:
        if name != pages:
            assert ours.joinpath(name).read_bytes() == theirs.joinpath(name).read_bytes()
