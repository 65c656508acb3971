"""Readiness: one epoll for all userfaultfds of a loop, asked again before the loop has its turn.

Knows: descriptors, who is called when one is readable, event loops.
Must not know: what is read from them.

A turn of the loop costs several times what it costs to ask an epoll.  As long as the faults of one
target come one after the other its reader finds the next by reading again; where each fault is
another target's than the last, only this can.

Laws of this file:

* Whoever is ready has a turn before anybody has a second one, however busy that one is.
* A wake-up hands out so many rounds at most, and asks nobody a second time when so much time has
  passed: other work of the loop must run too.  Where faults bring long chunks, ten rounds take as
  long as a hundred elsewhere.
* A descriptor leaves the epoll before it is closed: an epoll keeps the open file, not its number,
  and would tell of it as long as a duplicate lives anywhere.
* With the last descriptor the epoll goes too, or with the loop: nothing here keeps them alive.
"""

from __future__ import annotations

import asyncio
import contextvars
import errno
import select
from collections.abc import Callable
from time import perf_counter
from typing import Final, TypeAlias
from weakref import ReferenceType, WeakKeyDictionary, ref

_ROUNDS: Final = 64  # per wake-up, of all together
_AT_ONCE: Final = 64  # descriptors that one question can answer for
LONGEST_TURN: Final = 0.002  #: seconds; then nobody has a second turn

#: Takes how many rounds it may use, returns how many it has used; never raises.
Turn: TypeAlias = Callable[[int], int]


class _Readiness:
    """The userfaultfds of one loop.

    Sharing: the loop's thread.
    """

    __slots__ = ("__weakref__", "epoll", "turns")

    def __init__(self) -> None:
        self.epoll = select.epoll()
        self.turns: dict[int, tuple[contextvars.Context, Turn]] = {}

    def wake_up(self) -> None:
        """Give turns to whoever is ready until nobody is, or so many rounds were used."""
        rounds, turns, last = _ROUNDS, self.turns, -1
        end = perf_counter() + LONGEST_TURN
        while rounds > 0 and turns:
            ready = self.epoll.poll(0, _AT_ONCE)
            if not ready:
                return
            for fd, _ in ready:
                entry = turns.get(fd)
                if entry is None:  # one before it may have taken it out, or its owner closed it
                    rounds -= 1
                else:
                    context, turn = entry
                    # Alone, and again: it reads on by itself, which costs less than to ask.
                    alone = fd == last and len(ready) == 1
                    rounds -= max(context.run(turn, rounds if alone else 1), 1)
                last = fd
            if perf_counter() > end:
                return


#: Weak on both sides: the loop holds it, as it holds any reader, and takes it along.
_of_loop: WeakKeyDictionary[asyncio.AbstractEventLoop, ReferenceType[_Readiness]]
_of_loop = WeakKeyDictionary()


def _find(loop: asyncio.AbstractEventLoop) -> _Readiness | None:
    found = _of_loop.get(loop)
    return None if found is None else found()


def add_reader(loop: asyncio.AbstractEventLoop, fd: int, turn: Turn) -> None:
    """Call whenever a descriptor is readable, in a copy of the present context."""
    readiness = _find(loop)
    if readiness is None:
        readiness = _Readiness()
        loop.add_reader(readiness.epoll.fileno(), readiness.wake_up)
        _of_loop[loop] = ref(readiness)
    readiness.epoll.register(fd, select.EPOLLIN)
    readiness.turns[fd] = contextvars.copy_context(), turn


def remove_reader(loop: asyncio.AbstractEventLoop, fd: int) -> None:
    """Call no more, from now on; before the descriptor is closed.  Nothing, if it was not added."""
    readiness = _find(loop)
    if readiness is None or readiness.turns.pop(fd, None) is None:
        return
    try:
        readiness.epoll.unregister(fd)
    except OSError as error:
        if error.errno not in (errno.EBADF, errno.ENOENT):  # its owner has closed it before us
            raise
    if not readiness.turns:
        del _of_loop[loop]
        loop.remove_reader(readiness.epoll.fileno())
        readiness.epoll.close()


def pause_reader(loop: asyncio.AbstractEventLoop, fd: int) -> None:
    """Call no more until ``resume_reader``, which takes no descriptor: its place is kept."""
    readiness = _find(loop)
    if readiness is not None and fd in readiness.turns:
        readiness.epoll.modify(fd, 0)


def resume_reader(loop: asyncio.AbstractEventLoop, fd: int) -> None:
    """Call again whenever a paused descriptor is readable.  Nothing, if it was removed since."""
    readiness = _find(loop)
    if readiness is not None and fd in readiness.turns:
        readiness.epoll.modify(fd, select.EPOLLIN)


async def between_pieces() -> None:
    """Let the loop run between two pieces of long work, and serve the faults that have come.

    To yield is not enough: asyncio lets a task that only yields go on before it calls who has
    become readable meanwhile, and a fault would wait for two pieces.

    Cancellation: nothing has happened.
    """
    await asyncio.sleep(0)
    readiness = _find(asyncio.get_running_loop())
    if readiness is not None:
        readiness.wake_up()
