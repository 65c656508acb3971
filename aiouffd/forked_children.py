"""The children that one target forks: so many are served, further ones are settled at once.

Knows: the children's pagers, what outlives this process, the limit.
Must not know: the session that serves them; how a child's userfaultfd came.

Laws of this file:

* A child that is one too many costs neither the target nor the children that are served.
* No child costs memory or a descriptor once it has ended; what it did is kept as sums.
* Children can be refused slower than they are forked: then the session ends, not the machine.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from .closing import action_on_close, close_pager
from .errors import PeerError, UffdError
from .failure import Action
from .handover import Handover
from .metrics import Counters
from .pager import Pager
from .protection import Protection
from .service import Service

log: Final = logging.getLogger("aiouffd.session")

_REFUSED_AT_ONCE: Final = 64  # children beyond the limit that wait to be settled, at least


class ForkedChildren:
    """The forked children of one target, and theirs.

    Attributes:
        pagers: Of those that live; some may have ended since the last fork.
        past: Counters of those that have ended and are forgotten.
        protections: What keeps what is known, of the target's pager and its children's.

    Sharing: the loop's thread.
    """

    def __init__(self, handover: Handover, service: Service, name: str) -> None:
        """Begin without any.

        Args:
            handover: Of the target.
            service: How many are served, and what becomes of the others.
            name: Whose children they are, for messages.
        """
        self.pagers: list[Pager] = []
        self.past: Final = Counters()
        self.protections: Final[dict[Pager, Protection]] = {}
        self._service = service
        self._name = name
        self._on_close = action_on_close(handover, service)
        self._refusing: set[asyncio.Task[None]] = set()
        self._many = False
        self._given_up = 0  # descriptors of those that could not be settled

    def adopt(self, child: Pager) -> None:
        """Take up a child that was just forked, and forget those that have ended."""
        parent = self.protections.get(child.parent) if child.parent is not None else None
        protection = parent.protect_child(child) if parent is not None else None
        if protection is not None:
            self.protections[child] = protection
        for one in self.pagers:
            if one.uffd.closed:
                self.past.add(one.counters)
                self.protections.pop(one, None)
        self.pagers = [one for one in self.pagers if not one.uffd.closed]
        self.pagers.append(child)

    def refuse_beyond_limit(self, child: Pager) -> None:
        """Settle the child that was just taken up if it is one too many.

        Raises:
            PeerError: They are forked faster than that is done.
        """
        count, limit = len(self.pagers) + self._given_up, self._service.max_children
        if count <= limit:
            return
        if not self._many:
            self._many = True
            log.warning("%s: more than %d forked children are not served", self._name, limit)
        if count > 2 * limit + _REFUSED_AT_ONCE:
            # An error here ends the pager that read the fork, and with it the session.
            raise PeerError(f"forks faster than children can be refused ({count})", self._name)
        task = asyncio.get_running_loop().create_task(
            self._refuse(child), name="aiouffd refuse child"
        )
        self._refusing.add(task)
        task.add_done_callback(self._refusing.discard)

    async def _refuse(self, child: Pager) -> None:
        hang = self._on_close is Action.HANG
        await self._close_one(child, Action.POISON if hang else None)

    async def close(self, action: Action | None) -> None:
        """Wait for those that are being refused, then close what is left.

        The target's pager has closed its children, unless one of them could not be settled.
        """
        if self._refusing:
            await asyncio.wait(tuple(self._refusing))
        for child in self.pagers:
            await self._close_one(child, action)

    async def _close_one(self, child: Pager, action: Action | None) -> None:
        """Close a child's pager; nobody can kill a child, for it has no pidfd."""
        try:
            await close_pager(child, action, None)
        except (UffdError, OSError) as error:
            self._given_up += 1
            log.warning("a forked child of %s could not be settled: %s", self._name, error)
