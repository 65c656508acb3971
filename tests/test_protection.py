"""aiouffd.protection and what aiouffd.takeover finds: groups, whole and broken."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aiouffd import Action, Feature, Pager, Userfaultfd, journal
from aiouffd.fd_store import FdStore
from aiouffd.fds import OwnedFd
from aiouffd.handover import HandedRegion
from aiouffd.journal import Journal
from aiouffd.kernel import calls
from aiouffd.manifest import Manifest
from aiouffd.protection import PREFIX, Protection, new_name
from aiouffd.takeover import Stored, fail_closed, highest_id, take_groups
from tests import chaos
from tests.serving import LAYOUT, MADV_DONTNEED, from_image, image, within
from tests.targets import PAGE, Target, until

PAGES = 16


class Manager:
    """Systemd's side: what was stored, by name."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.setblocking(False)
        self.store = FdStore(str(path), 100)
        self.kept: dict[str, list[OwnedFd]] = {}
        self.said: list[str] = []

    def listen(self) -> dict[str, list[OwnedFd]]:
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(self._socket, 1000, 10)
            except BlockingIOError:
                return self.kept
            words = dict(line.split("=", 1) for line in data.decode().splitlines())
            name = words["FDNAME"]
            self.said.append(f"{'put' if 'FDSTORE' in words else 'remove'} {name} {len(fds)}")
            if "FDSTORE" in words:
                self.kept.setdefault(name, []).extend(map(OwnedFd, fds))
            else:
                _close(self.kept.pop(name, []))

    def close(self) -> None:
        self.listen()
        for fds in self.kept.values():
            _close(fds)
        self.store.close()
        self._socket.close()


def _close(fds: list[OwnedFd]) -> None:
    for fd in fds:
        fd.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    with contextlib.closing(Manager(tmp_path / "notify")) as manager:
        yield manager


def manifest_of(target: Target, **changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "session": "7",
        "name": new_name(),
        "regions": (HandedRegion(target.base, target.length, 0, PAGE),),
        "image": "the image",
        "image_size": target.length,
        "dialect": "test",
        "on_close": "poison",
        "peer": (target.pid, 0, 0),
    }
    return Manifest(**fields | changes)


async def _serve(target: Target, protection: Protection, manager: Manager) -> Pager:
    """Begin to serve a target that is protected."""
    pager = Pager(Userfaultfd.adopt(target.take_uffd()))
    region = pager.register(target.base, target.length, from_image)
    with OwnedFd(os.dup(target.pidfd)) as pidfd:
        protection.begin(pager, [region], [pidfd])
    manager.listen()
    pager.start()
    return pager


async def _die(pager: Pager) -> None:
    """End as by a crash, as far as one's own process allows: nothing is settled, nothing said."""
    if pager.journal is not None:
        pager.journal.on_end = None
    family = [pager, *pager.children]
    await pager.aclose(Action.HANG)
    for one in family:
        one.uffd.close()


async def test_what_was_known_is_known_again(manager: Manager) -> None:
    """Filled and removed pages come back, and a filled page that is missing reads zero."""
    with Target("anon", PAGES, features=LAYOUT, register=1) as target:
        manifest = manifest_of(target)
        pager = await _serve(target, Protection(manager.store, manifest), manager)
        assert manager.said == [f"put {manifest.name} 3"]
        for page in range(4):
            assert await within(target.start_read(page)) == page + 1
        await within(target.start_madvise(MADV_DONTNEED, 1, 2))
        await within(target.start_madvise(MADV_DONTNEED, 9))
        await _die(pager)

        (group,) = take_groups(manager.kept)
        assert not group.trouble
        assert group.manifest == manifest
        assert group.fd is not None
        again = Pager(Userfaultfd.adopt(group.fd))
        region = again.register(target.base, target.length, from_image)
        assert group.books is not None
        Protection(manager.store, manifest, group.journal).resume(again, [region], group.books)
        assert region.filled_before is not None
        assert len(region.filled_before) == 4
        # As if the word of a removal had been lost: the bit alone says it.
        again.space.removed.discard(next(again.space.removed.runs(region.ranges[0][0])))
        async with again:
            again.wake_all()
            for page in (0, 3, 5):
                assert await within(target.start_read(page)) == page + 1
            for page in (1, 2, 9):
                assert await within(target.start_read(page)) == 0
            assert await region.fill(0, image(0, PAGES * PAGE)) == 10 * PAGE
        manager.listen()
        assert manager.said[-1] == f"remove {manifest.name} 0"
        group.close()


async def test_a_fork_is_stored_before_its_journal(manager: Manager) -> None:
    """A child's descriptor goes first and alone; either half of the way can be gone on from."""
    features = LAYOUT | Feature.EVENT_FORK
    with Target("anon", PAGES, features=features, register=1) as target:
        manifest = manifest_of(target)
        protection = Protection(manager.store, manifest)
        pager = await _serve(target, protection, manager)
        await within(target.start_read(0))
        name = f"{manifest.name}.1"
        # Died after the first half: the parent's journal tells what the child's memory is.
        fork = target.start_fork()
        await until(lambda: pager.children, "the child's pager")
        grandchild = await within(fork)
        manager.listen()
        assert manager.said[-1] == f"put {name} 1"
        copies = {key: [fd.dup() for fd in fds] for key, fds in manager.kept.items()}
        parent, child = take_groups(copies)
        assert child.unstored
        assert not child.trouble
        assert child.manifest == manifest.child(1)
        assert highest_id([parent, child]) == 7
        for group in (parent, child):
            assert group.fd is not None
            group.fd.close()
            group.close()
        # The second half.
        (served,) = pager.children
        assert protection.protect_child(served) is not None
        manager.listen()
        assert manager.said[-1] == f"put {name} 1"
        copies = {key: [fd.dup() for fd in fds] for key, fds in manager.kept.items()}
        parent, child = take_groups(copies)
        assert not child.unstored
        assert child.journal is not None
        assert len(child.journal.filled(manifest.regions)[0]) == 1
        for group in (parent, child):
            assert group.fd is not None
            group.fd.close()
            group.close()
        grandchild.kill()
        await _die(pager)


async def test_what_cannot_be_read_fails_closed(manager: Manager) -> None:
    """A journal of another version: the target is killed, and only then its memory let go."""
    with Target("anon", PAGES, features=LAYOUT, register=1) as target:
        pager = await _serve(target, Protection(manager.store, manifest_of(target)), manager)
        (fds,) = manager.kept.values()
        file = next(fd for fd in fds if Journal.is_one(fd.fileno()))
        os.pwrite(file.fileno(), b"\x63", 8)
        await _die(pager)
        (group,) = take_groups(manager.kept)
        assert "version 99" in group.trouble
        assert await within(fail_closed(group))
        assert target.reap() == -signal.SIGKILL


@pytest.mark.parametrize("backwards", [False, True])
async def test_a_peer_cannot_pass_off_its_own(manager: Manager, backwards: bool) -> None:
    """A journal or a pidfd that the target had handed over is not taken for ours.

    Systemd gives descriptors back in an order of its own.
    """
    with Target("anon", PAGES, features=LAYOUT, register=1) as target:
        manifest = manifest_of(target)
        pager = Pager(Userfaultfd.adopt(target.take_uffd()))
        region = pager.register(target.base, target.length, from_image)
        false = Journal.create(manifest_of(target, session="8").to_json(), manifest.regions)
        with OwnedFd(os.dup(target.pidfd)) as ours, OwnedFd(os.pidfd_open(os.getpid())) as stranger:
            others = [stranger, OwnedFd(os.dup(false.fileno()))]
            Protection(manager.store, manifest).begin(pager, [region], [ours, *others])
        others[1].close()
        false.end()
        false.close_file()
        manager.listen()
        if backwards:
            manager.kept[manifest.name].reverse()
        pager.start()
        await _die(pager)
        (group,) = take_groups(manager.kept)
        assert group.manifest == manifest
        assert group.pidfd is not None
        assert calls.pid_of(group.pidfd.fileno()) == target.pid
        assert await within(fail_closed(group))


async def test_half_a_group_is_never_closed(manager: Manager) -> None:
    """A userfaultfd of which nothing is known, not even a pidfd, stays open."""
    with Target("anon", PAGES, features=LAYOUT, register=1) as target:
        number = target.take_uffd()
        group = Stored(PREFIX + "x", fd=OwnedFd(number), trouble="its journal is not in the store")
        assert not await fail_closed(group)
        os.fstat(number)
        os.close(number)


async def test_books_too_large_for_a_journal(
    manager: Manager, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A target whose books outgrow the journal is served on; it would only not outlive a crash."""
    with Target("anon", PAGES, features=LAYOUT, register=1) as target:
        manifest = manifest_of(target)
        pager = await _serve(target, Protection(manager.store, manifest), manager)
        assert pager.journal is not None
        monkeypatch.setattr(pager.journal, "_limit", 0)  # written anew with the next event
        monkeypatch.setattr(journal, "_HALF_BYTES", 0)  # and there is no room
        await within(target.start_madvise(MADV_DONTNEED, 3))
        assert await within(target.start_read(3)) == 0
        assert await within(target.start_read(4)) == 5
        assert pager.journal is None
        assert "will not outlive" in caplog.text
        (group,) = take_groups({name: [fd.dup() for fd in fds] for name, fds in _listen(manager)})
        assert "given up" in group.trouble
        assert group.fd is not None
        group.fd.close()
        group.close()
        await pager.aclose()
        manager.listen()
        assert manager.said[-1] == f"remove {manifest.name} 0"


def _listen(manager: Manager) -> list[tuple[str, list[OwnedFd]]]:
    return list(manager.listen().items())


def test_a_full_store_refuses(tmp_path: Path) -> None:
    """Who could not outlive a crash is not served at all: better to know now."""
    with chaos.kept([], ["--max-fds", "4"]) as server:
        first = chaos.Target(server.socket, "anon", chaos.OPERATIONS["balloon"], 1, 0)
        server.wait_for("started", 1)
        second = chaos.Target(server.socket, "anon", chaos.OPERATIONS["balloon"], 2, 0)
        second.put("closing", 1)  # its memory is poisoned
        try:
            server.wait_for("refused", 1)
            assert any("the fd store is full" in line for line in server.said)
            first.finish()
        finally:
            first.kill()
            second.kill()
