"""The sessions of one connection: handed over one by one, brought ahead of demand together.

Knows: sessions, that their peer may still fail.
Must not know: how they are handed over, what becomes of each.

Laws of this file:

* Nothing is brought ahead of demand before the peer has handed everything over: until then the
  memory of some is not registered, and what cannot be brought now would be taken for done.
* Whoever is served on a connection that has failed is not served for ever: if its target
  outlives that, it is closed by its policy.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Final

from .errors import UffdError
from .session import Session

log: Final = logging.getLogger("aiouffd.server")


class Together:
    """The sessions of one connection.

    Attributes:
        sessions: So far; each is held.

    Sharing: the loop's thread.
    """

    def __init__(self) -> None:
        self.sessions: list[Session] = []

    def release(self) -> None:
        """Note that everything was handed over."""
        for session in self.sessions:
            session.release()

    async def give_up(self, grace: float) -> None:
        """End what is left of a connection that has failed.

        Args:
            grace: Seconds that the targets have to end by themselves.

        Cancellation: some sessions may live on.
        """
        living = [one for one in self.sessions if not one.state.ended]
        if not living:
            return
        endings = [asyncio.ensure_future(_end_of(one)) for one in living]
        try:
            await asyncio.wait(endings, timeout=grace)
        finally:
            for ending in endings:
                ending.cancel()
        for session in living:
            if not session.state.ended:
                log.warning("%s outlives its failed hand-over", session.name)
                try:
                    await session.aclose()
                except Exception:  # the others are closed all the same
                    log.exception("%s could not be closed as asked", session.name)


async def _end_of(session: Session) -> None:
    with contextlib.suppress(UffdError, OSError):  # whoever runs the session says so
        await session.wait_closed()
