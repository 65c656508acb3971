"""Reads under way, for sources around sources: a close waits for them, and they for each other.

Knows: how many there are, whether more may begin, and which of them failed.
Must not know: what is read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from types import TracebackType
from typing import Any, TypeVar

from ..errors import ClosedError, SourceError

T = TypeVar("T")


class ReadsUnderWay:
    """What a read enters, and a close waits for.

    Sharing: the loop's thread; ``closed`` may be asked anywhere.
    """

    __slots__ = ("_count", "_idle", "closed", "name")

    def __init__(self, name: str) -> None:
        """Begin with none.

        Args:
            name: What is closed, for messages: ``these layers``.
        """
        self.name = name
        self.closed = False
        self._count = 0
        self._idle: asyncio.Future[None] | None = None

    def check(self) -> None:
        """Refuse if it is closed.

        Raises:
            ClosedError: It is.
        """
        if self.closed:
            raise ClosedError(f"{self.name} is closed")

    def __enter__(self) -> None:
        self._count += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._count -= 1
        if not self._count and self._idle is not None:
            if not self._idle.done():
                self._idle.set_result(None)
            self._idle = None

    async def end(self) -> None:
        """Refuse new reads, and wait until those under way have ended.

        Cancellation: new reads stay refused; call again to wait.
        """
        self.closed = True
        if self._count:
            if self._idle is None:
                self._idle = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._idle)


async def all_of(reads: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Let reads go on at once; the first error ends the others.

    Returns:
        What each gave, in their order.

    Raises:
        SourceError: One of them raised it, or was cancelled by its source.

    Cancellation: they are cancelled, and have ended.
    """
    if len(reads) == 1:
        return [await reads[0]]
    loop = asyncio.get_running_loop()
    tasks = [loop.create_task(read) for read in reads]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        left = [task for task in tasks if not task.done()]
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left)
        errors = [task.exception() for task in tasks if not task.cancelled()]
    for error in errors:
        if error is not None:
            raise error
    if len(errors) < len(tasks):
        raise SourceError("the read was cancelled by its source")
    return [task.result() for task in tasks]
