"""Protection: a session's descriptors and its knowledge, kept where they outlive this process.

Knows: the fd store, journals, manifests, and in which order they must be written.
Must not know: how sessions begin, how the stored ones are taken over.

Laws of this file:

* One name in the store per userfaultfd: with its journal and, for a target, its pidfd.
* A target is stored whole, in one message, before its first fault is read and before its
  peer is told that it is served.
* A forked child's userfaultfd is stored before anything else is done with it, by itself; then
  comes its journal.  In between its parent's journal says all that there is to say of it.
* A name is taken out when its userfaultfd was closed with nothing missing, and only then.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Sequence
from typing import Any, Final, TypeAlias

from .address_space import AddressSpace, Placement
from .errors import StoreError
from .events import PageFault
from .fd_store import FdStore
from .fds import OwnedFd
from .filled_pages import FilledPages
from .flight import Flight
from .journal import Journal, JournalError
from .manifest import Manifest
from .pager import Pager
from .region import Region
from .resolutions import Answer, Handler, Zero
from .uffd import Feature

log: Final = logging.getLogger("aiouffd.session")

PREFIX: Final = "aiouffd-session-"  #: of the names in the store

#: The books of an address space whose regions are numbers: those of a manifest.
Books: TypeAlias = AddressSpace[int, Any]


def new_name() -> str:
    """Make a name for a group of descriptors that no other has."""
    return PREFIX + os.urandom(6).hex()


class Protection:
    """Keeps one pager's userfaultfd and knowledge in the fd store.

    Attributes:
        manifest: What must be known to serve it on.
        journal: From ``begin`` on, or from the process before.

    Sharing: the loop's thread.
    """

    def __init__(self, store: FdStore, manifest: Manifest, journal: Journal | None = None) -> None:
        """Prepare.

        Args:
            store: Where to keep it.
            manifest: What must be known to serve it on.
            journal: Of the process that served it before.
        """
        self._store = store
        self.manifest: Final = manifest
        self.journal = journal
        self._forked: dict[int, tuple[int, bytes]] = {}  # by descriptor: number, bits

    def begin(self, pager: Pager, regions: Sequence[Region], fds: Sequence[OwnedFd]) -> None:
        """Store a pager that is about to start.

        Args:
            pager: Its regions are registered.
            regions: Those, in the order of the manifest.
            fds: What belongs to it beside its userfaultfd.

        Raises:
            StoreError: The store is full or does not answer.
        """
        journal = self.journal = Journal.create(self.manifest.to_json(), self.manifest.regions)
        for number, region in enumerate(regions):
            region.number = number
        self._attach(pager, journal, regions)
        self._store.put(self.manifest.name, [pager.uffd.fileno(), journal.fileno(), *fds])
        journal.close_file()

    def resume(self, pager: Pager, regions: Sequence[Region], books: Books) -> None:
        """Let a pager that is about to start go on where the process before has ended.

        Args:
            pager: Its regions are registered.
            regions: Those, in the order of the manifest.
            books: What the journal has told.
        """
        journal = self.journal
        assert journal is not None  # noqa: S101 - given when it was made
        for number, region in enumerate(regions):
            region.number = number
        restore(pager, regions, books)
        told = pager.uffd.features & Feature.EVENT_REMOVE
        for region, bits in zip(regions, journal.filled(self.manifest.regions), strict=True):
            if told and bits:
                region.filled_before = bits.frozen()
                region.handler = _removed_reads_zero(region.handler, region.filled_before)
        self._attach(pager, journal, regions)
        journal.close_file()

    def _attach(self, pager: Pager, journal: Journal, regions: Sequence[Region]) -> None:
        bits = journal.filled(self.manifest.regions)
        for region in regions:
            if region.number >= 0:
                region.filled = bits[region.number]
        journal.on_fork = self._on_fork
        journal.on_end = self._on_end
        pager.keep_journal(journal)

    def _on_fork(self, fork: int, fd: int) -> None:
        """A child's descriptor is in this process: not for long without a copy elsewhere."""
        try:
            self._store.put(f"{self.manifest.name}.{fork}", [fd])
        except StoreError as error:
            log.critical("a forked child will not outlive this process: %s", error)
            return
        assert self.journal is not None  # noqa: S101 - it calls this
        self._forked[fd] = fork, self.journal.bits

    def protect_child(self, child: Pager) -> Protection | None:
        """Give a forked child's pager a journal of its own.

        Returns:
            The child's protection; None if it could not be stored.
        """
        fork, bits = self._forked.pop(child.uffd.fileno(), (0, b""))
        if not fork or self.journal is None:
            return None
        protection = Protection(self._store, self.manifest.child(fork))
        try:
            protection._begin_child(child, bits)
        except (StoreError, JournalError) as error:
            # Without what is to come its descriptor would be taken over to serve wrong bytes.
            log.critical("a forked child will not outlive this process: %s", error)
            with contextlib.suppress(StoreError):  # nobody keeps it any more
                self._store.remove(protection.manifest.name)
            return None
        self.journal.adopted(fork)
        return protection

    def _begin_child(self, child: Pager, bits: bytes) -> None:
        journal = self.journal = Journal.create(self.manifest.to_json(), self.manifest.regions)
        journal.bits = bits
        self._attach(child, journal, child.regions)
        self._store.put(self.manifest.name, [journal.fileno()])
        journal.close_file()

    def _on_end(self) -> None:
        try:
            self._store.remove(self.manifest.name)
        except StoreError:
            log.exception("%s stays in the fd store", self.manifest.name)


def restore(pager: Pager, regions: Sequence[Region], books: Books) -> None:
    """Let a pager's books be those that a journal has told."""
    space: AddressSpace[Region, Flight] = AddressSpace()
    for where, placement in books.placements:
        placed = Placement(
            regions[placement.region],
            *(placement.delta, placement.page_size, placement.mask, placement.vacated),
        )
        space.placements.set(where, placed)
    space.removed = books.removed
    pager.restore(space)


def _removed_reads_zero(handler: Handler, before: FilledPages) -> Handler:
    """Answer with zeros what was filled before and is missing now: the target removed it."""

    async def answer(fault: PageFault) -> Answer:
        if fault.missing and fault.offset in before:
            return Zero()
        return await handler(fault)

    return answer
