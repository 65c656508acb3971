"""Take-over: what a server before us has left in the fd store, made into sessions again.

Knows: groups of stored descriptors, journals, manifests.
Must not know: where the bytes come from, how a server runs its sessions.

Laws of this file:

* A group is taken over whole or fails closed: its target is killed, or what is missing in its
  memory is poisoned.  A userfaultfd of which nothing is known is never closed.
* A forked child is a session of its own from here on: nothing binds it to its parent.
* What a fork's message has told and nobody had stored is lost, and that is said.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from .closing import settle
from .failure import Action
from .fds import OwnedFd
from .handover import Handover, Peer
from .journal import Journal, JournalError
from .kernel.calls import is_pidfd, is_userfaultfd, pid_of
from .manifest import Manifest
from .protection import PREFIX, Books
from .service import Service

log: Final = logging.getLogger("aiouffd.takeover")


@dataclass(eq=False)
class Stored:
    """One userfaultfd from the store, and all that is known of it.

    Attributes:
        name: In the store.
        fd: The userfaultfd, if it is there.
        pidfd: Of the target; a forked child has none.
        journal: With the manifest, if it can be read.
        manifest: From the journal.
        books: From the journal.
        others: Further descriptors.
        id: Of its session, which no other has.
        unstored: The journal is not in the store yet.
        trouble: Why it cannot be served on, if it cannot.
    """

    name: str
    fd: OwnedFd | None = None
    pidfd: OwnedFd | None = None
    journal: Journal | None = None
    manifest: Manifest | None = None
    books: Books | None = None
    others: list[OwnedFd] = field(default_factory=list)
    id: str = ""
    unstored: bool = False
    trouble: str = ""

    def handover(self) -> Handover:
        """Give it as its peer had handed it over."""
        assert self.fd is not None  # noqa: S101 - asked only where it is whole
        assert self.manifest is not None  # noqa: S101 - as above
        manifest = self.manifest
        by_inode = {_inode(fd): fd for fd in self.others}
        others = tuple(by_inode[inode] for inode in manifest.others if inode in by_inode)
        return Handover(
            self.fd,
            manifest.regions,
            others,
            dialect=manifest.dialect,
            part=manifest.part,
            zero_elsewhere=manifest.zero_elsewhere,
            alone=manifest.alone,
        )

    def peer(self) -> Peer | None:
        """Give who had handed it over; the pidfd is the peer's from here on."""
        if self.pidfd is None or self.manifest is None or self.manifest.peer is None:
            return None
        return Peer(*self.manifest.peer, self.pidfd)

    def close(self) -> None:
        """Close what nobody has taken, save a userfaultfd: that must be settled before."""
        for fd in (self.pidfd, *self.others):
            if fd is not None:
                fd.close()
        if self.journal is not None:
            self.journal.close_file()


def _inode(fd: OwnedFd) -> tuple[int, int]:
    status = os.fstat(fd.fileno())
    return status.st_dev, status.st_ino


def inodes_of(fds: tuple[OwnedFd, ...]) -> tuple[tuple[int, int], ...]:
    """Name descriptors so that they are known again when they come back in any order."""
    return tuple(_inode(fd) for fd in fds)


def take_groups(taken: dict[str, list[OwnedFd]]) -> list[Stored]:
    """Take our groups out of what the store gave back, parents before their children.

    What can be served on has no ``trouble``.
    """
    names = sorted(name for name in taken if name.startswith(PREFIX))
    groups = {name: _group(name, taken.pop(name)) for name in names}
    lost: dict[str, tuple[Stored, int, Books]] = {}
    for name in sorted(groups, key=lambda name: (name.count("."), name)):
        group = groups[name]
        if group.journal is None and name in lost:
            _adopt_orphan(group, *lost[name])
        _read(group, lost)
    for name, (parent, _, _) in lost.items():
        if name not in groups:
            log.critical(
                "a forked child of %s was lost: its server died between the kernel's word of it"
                " and the store; its missing memory reads zero",
                parent.name,
            )
    return list(groups.values())


def _group(name: str, fds: list[OwnedFd]) -> Stored:
    """Sort descriptors by what they are; they come back in any order."""
    group = Stored(name)
    for fd in fds:
        number = fd.fileno()
        if is_userfaultfd(number) and group.fd is None:
            group.fd = fd
        elif Journal.is_one(number) and group.journal is None:
            _adopt_journal(group, fd)
        else:
            group.others.append(fd)
    return group


def _adopt_journal(group: Stored, fd: OwnedFd) -> None:
    """Take a journal over if it is this group's: a peer may hand over what looks like one.

    What it cannot know is the group's name, which was made up after its hand-over.
    """
    try:
        journal = Journal.adopt(fd)
    except JournalError as error:
        group.trouble = str(error)
        return
    if f'"name":"{group.name}"'.encode() in journal.manifest:
        group.journal, group.trouble = journal, ""
    else:
        journal.end()
        journal.close_file()


def _pin(group: Stored) -> None:
    """Find the target's pidfd: a peer may have handed over that of another process."""
    pidfds = [fd for fd in group.others if is_pidfd(fd.fileno())]
    if len(pidfds) > 1:
        pid = group.manifest.peer[0] if group.manifest and group.manifest.peer else None
        pidfds = [fd for fd in pidfds if pid is not None and pid_of(fd.fileno()) in (pid, -1)]
        pidfds.sort(key=lambda fd: pid_of(fd.fileno()) == -1)
    if pidfds and (group.manifest is None or group.manifest.peer is not None):
        group.pidfd = pidfds[0]
        group.others.remove(pidfds[0])


def _read(group: Stored, lost: dict[str, tuple[Stored, int, Books]]) -> None:
    """Read manifest and journal; note the children that were lost on the way to the store."""
    try:
        _read_journal(group, lost)
    finally:
        _pin(group)


def _read_journal(group: Stored, lost: dict[str, tuple[Stored, int, Books]]) -> None:
    if group.fd is None:
        group.trouble = group.trouble or "its userfaultfd is not in the store"
    if group.journal is None:
        group.trouble = group.trouble or "its journal is not in the store"
        return
    try:
        group.manifest = Manifest.from_json(group.journal.manifest)
        regions = group.manifest.regions
        replayed: Any = group.journal.replay(
            range(len(regions)), [one.page_size for one in regions]
        )
    except Exception as error:  # it alone is settled; the others are served on
        group.trouble = group.trouble or f"its journal cannot be read: {error}"
        return
    group.books = replayed.space
    for fork, books in replayed.lost.items():
        lost[f"{group.name}.{fork}"] = group, fork, books


def _adopt_orphan(child: Stored, parent: Stored, fork: int, books: Books) -> None:
    """Give a child that was stored without a journal the one that it would have got."""
    assert parent.manifest is not None  # noqa: S101 - it was read, and told of this child
    manifest = parent.manifest.child(fork)
    journal = child.journal = Journal.create(manifest.to_json(), manifest.regions)
    journal.write_books(books, lambda number: number)
    child.unstored = True
    child.trouble = ""


def highest_id(groups: list[Stored]) -> int:
    """Give the highest number among the ids of stored sessions, so that none is used twice."""
    ids = (group.manifest.session.partition(".")[0] for group in groups if group.manifest)
    return max((int(number) for number in ids if number.isdecimal()), default=0)


def name_sessions(groups: list[Stored], ids: Iterator[int]) -> None:
    """Give each group the id that its session had, or one of ``ids`` if another has that.

    Servers that ran beside each other, as in a change of version, have counted from one both.
    """
    seen: set[str] = set()
    for group in groups:
        if group.manifest is not None:
            taken = group.manifest.session in seen
            group.id = str(next(ids)) if taken else group.manifest.session
            seen.add(group.id)


async def fail_closed(group: Stored) -> bool:
    """See to it that closing a group makes no zeros, then close it.

    The target is treated as its session's ``on_close`` says.  If nothing is known of that, it is
    killed.

    Returns:
        Whether it could be done; if not, the userfaultfd stays open.
    """
    fd, peer, manifest = group.fd, group.peer(), group.manifest
    try:
        if fd is None or fd.closed:
            return True
        if manifest is not None and group.books is not None:
            service = Service(on_close=Action(manifest.on_close))
            await settle(group.handover(), service, peer, group.books)
            return True
        if group.pidfd is None:
            number = fd.detach()
            log.critical(
                "%s: nothing is known of it (%s); descriptor %d stays open, or its memory would"
                " read zeros",
                *(group.name, group.trouble, number),
            )
            return False
        unknown = Peer(0, 0, 0, group.pidfd)
        unknown.kill()
        log.critical("%s: its target is killed: %s", group.name, group.trouble)
        await _exit_of(group.pidfd)
        fd.close()
    except Exception as error:
        log.critical("%s could not be settled: %s", group.name, error)
        return fd is not None and fd.closed
    else:
        return True
    finally:
        group.close()


async def fail_all_closed(kept: Mapping[str, list[OwnedFd]]) -> set[str]:
    """Do ``fail_closed`` with everything that is stored: what a keeper does in the end.

    Returns:
        The names of those that could not be settled.
    """
    copies = {name: [fd.dup() for fd in fds] for name, fds in kept.items()}
    unsettled = set()
    for group in take_groups(copies):
        group.trouble = group.trouble or "its server was given up"
        if not await fail_closed(group):
            unsettled.add(group.name)
    for fds in copies.values():
        for fd in fds:
            fd.close()
    return unsettled


async def _exit_of(pidfd: OwnedFd) -> None:
    loop, exited = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(pidfd.fileno(), exited.set)
    try:
        await exited.wait()
    finally:
        loop.remove_reader(pidfd.fileno())
