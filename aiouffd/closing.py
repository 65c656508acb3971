"""Closing: no userfaultfd is closed while its memory could become zeros by that.

Knows: a hand-over that nobody took, a pager that is to end, the target if it is known.
Must not know: sessions; why something is closed.

Laws of this file:

* A userfaultfd whose memory could not be settled is closed only after its target is dead; if
  nobody can be killed it stays open for good, for the last close would make zeros.
* What was begun goes on though its waiter is cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Final

from .errors import PeerError, UffdError
from .failure import Action
from .handlers import zeroes
from .handover import Handover, Peer
from .pager import Pager
from .protection import Books, restore
from .service import Service
from .uffd import Userfaultfd

log: Final = logging.getLogger("aiouffd.session")


def action_on_close(handover: Handover, service: Service) -> Action:
    """Say what becomes of missing pages; memory that maps the image is simply let go."""
    return Action.ZERO if handover.backed else service.on_close


async def settle(
    handover: Handover, service: Service, peer: Peer | None, books: Books | None = None
) -> None:
    """Close a hand-over; memory that no session took over is settled by ``on_close`` first.

    Args:
        handover: Closed already if a session had it.
        service: Whose ``on_close`` and deadline count.
        peer: Whose memory it is, if known.
        books: What a process before us knew of the memory, from its journal.

    Raises:
        UffdError: It could not be settled; the peer is killed, or the userfaultfd kept open.

    Cancellation: the close goes on by itself.
    """
    if handover.fd.closed:
        handover.close()
        return
    try:
        uffd = Userfaultfd.adopt(handover.fd)
    except ValueError as error:  # as in Session.start
        handover.close()
        raise PeerError(str(error)) from error
    except BaseException:
        handover.close()
        raise
    try:
        pager = Pager(
            uffd,
            on_close=action_on_close(handover, service),
            deadline=service.deadline,
            target=peer.pidfd.fileno() if peer is not None else None,
            zero_elsewhere=handover.zero_elsewhere,
        )
    except BaseException as error:
        await fail_closed(uffd, peer, error)
        handover.close()
        raise
    try:
        regions = [
            pager.register(
                region.start,
                region.length,
                zeroes,  # never asked: while it closes every fault gets the action
                modes=region.modes,
                page_size=region.page_size,
                offset=region.offset,
                registered=True,
            )
            for region in handover.regions
        ]
        if books is not None:
            restore(pager, regions, books)
    except ValueError as error:
        raise PeerError(str(error)) from error
    finally:
        await asyncio.shield(asyncio.ensure_future(let_go(pager, None, handover, peer)))


async def let_go(
    pager: Pager, action: Action | None, handover: Handover, peer: Peer | None
) -> None:
    """Close a pager, and then everything that was handed over."""
    try:
        await close_pager(pager, action, peer)
    finally:
        handover.close()


async def close_pager(pager: Pager, action: Action | None, peer: Peer | None) -> None:
    """Close a pager and its userfaultfd, failing closed."""
    asked = pager.on_close if action is None else action
    try:
        await pager.aclose(action)
    except BaseException as error:
        if asked not in (Action.ZERO, Action.HANG):
            await fail_closed(pager.uffd, peer, error)
        raise
    finally:
        pager.uffd.close()  # after HANG it is still open: the target's own copy keeps it


async def fail_closed(uffd: Userfaultfd, peer: Peer | None, error: BaseException) -> None:
    """See to it that closing a userfaultfd whose memory is not settled makes no zeros.

    The target is killed; where that is not possible the descriptor is given up: nobody
    closes it as long as this process lives.
    """
    if uffd.closed:
        return
    who = str(peer) if peer is not None else "an unknown peer"
    if peer is not None:
        try:
            peer.kill()
        except (UffdError, OSError):
            log.exception("%s cannot be killed", who)
        else:
            log.critical("%s is killed: its missing memory cannot be settled: %s", who, error)
            await exit_of(peer)  # until it is dead it could still read zeros
            return
    number = uffd.detach().detach()
    log.critical(
        "%s: its missing memory cannot be settled: %s; descriptor %d stays open, or it would"
        " read zeros",
        who,
        error,
        number,
    )


async def exit_of(peer: Peer) -> None:
    loop, exited = asyncio.get_running_loop(), asyncio.Event()
    with contextlib.closing(peer.pidfd.dup()) as pidfd:  # the pager may listen to the other
        loop.add_reader(pidfd.fileno(), exited.set)
        try:
            await exited.wait()
        finally:
            loop.remove_reader(pidfd.fileno())
