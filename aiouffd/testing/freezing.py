"""Threads that are stopped at a touch: waiting for them, and letting them go.

Knows: freezes, who stands at them, and both ways to wait (threads and loops).
Must not know: how a thread is held; the helper process does that.

Laws of this file:

* Leaving a freeze releases everybody, whatever ended the block.
* A wait that ends without anybody says who did what instead.
* A cancelled or timed-out wait loses nobody: who comes next is had by the next wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from .failures import FreezeTimeout
from .places import PlaceLike
from .rules import Kind, check
from .running import running_loop

if TYPE_CHECKING:
    from .arming import Armed
    from .harness import Harness
    from .region import Page, Place, Region
    from .threads import ThreadLike
    from .touches import Touch


class Frozen:
    """A thread that stands before its access; it goes on when it is released.

    Attributes:
        touch: What it was about to do.
        freeze: What has stopped it.
    """

    def __init__(self, freeze: Freeze, touch: Touch) -> None:
        """Made by the harness."""
        self.freeze = freeze
        self.touch = touch
        self._held_by = "page"
        self._ended = threading.Event()

    def __repr__(self) -> str:
        state = "released" if self.released else f"held by {self.held_by}"
        return f"<Frozen {self.touch} {state}>"

    @property
    def process(self) -> int:
        """The process of the thread."""
        return self.touch.process

    @property
    def thread(self) -> int:
        """The kernel's number of the thread."""
        return self.touch.thread

    @property
    def where(self) -> str:
        """Which code stands there, such as ``libparse.so+0x1139``; empty if not known."""
        return self.touch.where

    @property
    def page(self) -> Page:
        """The page that it is about to touch."""
        return self.freeze.place.region.page(self.touch.page)

    @property
    def held_by(self) -> str:
        """``page``: in the kernel.  ``trampoline``: in a signal handler, since it has the GIL."""
        return self._held_by

    @property
    def released(self) -> bool:
        """Whether it goes on, or has gone on."""
        return self._ended.is_set()

    def release(self) -> None:
        """Let it make its access and go on.  A second call does nothing.

        Raises:
            HarnessError: The harness has let somebody go at the time limit, or has ended; unless
                it has ended, this one was released all the same.
        """
        if self._ended.is_set():
            return
        harness = self.freeze.harness
        if not harness.closed:
            harness._helper.ask("release", self.touch.number)
        self._ended.set()  # not before: who asks again, because this has raised, is to be heard
        harness.check()


class AsyncFrozen:
    """A Frozen whose release is awaited.

    Attributes:
        sync: The same for threads.
    """

    def __init__(self, sync: Frozen) -> None:
        """Wrap what ``AsyncFreeze.wait`` has got."""
        self.sync = sync

    def __repr__(self) -> str:
        return repr(self.sync).replace("Frozen", "AsyncFrozen", 1)

    @property
    def touch(self) -> Touch:
        """What it was about to do."""
        return self.sync.touch

    @property
    def thread(self) -> int:
        """The kernel's number of the thread."""
        return self.sync.thread

    @property
    def process(self) -> int:
        """The process of the thread."""
        return self.sync.process

    @property
    def where(self) -> str:
        """Which code stands there."""
        return self.sync.where

    @property
    def page(self) -> Page:
        """The page that it is about to touch."""
        return self.sync.page

    @property
    def held_by(self) -> str:
        """``page`` or ``trampoline``."""
        return self.sync.held_by

    @property
    def released(self) -> bool:
        """Whether it goes on."""
        return self.sync.released

    async def release(self) -> None:
        """Let it make its access and go on; the order itself takes a fraction of a millisecond.

        Cancellation: it is released.
        """
        self.sync.release()
        await asyncio.sleep(0)


class Freeze:
    """Stops who touches a place, from ``with`` to its end.

    ``async with`` gives the same as an AsyncFreeze.

    Attributes:
        place: What is watched.
    """

    def __init__(
        self,
        place: Place,
        access: str = "any",
        *,
        nth: int = 1,
        mode: str = "any",
        thread: ThreadLike | Iterable[ThreadLike] | None = None,
        every: bool = False,
    ) -> None:
        """Prepare; use ``Place.freeze`` or ``freeze``.

        Raises:
            ValueError: There is no such access or mode, or the number is not above zero.
            TypeError: The number is no whole number.
        """
        check(access, mode, nth)
        self.place = place
        self._access = access
        self._nth = nth
        self._mode = mode
        self._thread = thread
        self._every = every
        self._armed: Armed | None = None
        self._rule = 0  # the number of what is armed, or was last
        self._came: list[Frozen] = []  # all, in order
        self._given = 0  # how many of them ``wait`` has given
        self._since = 0

    def __repr__(self) -> str:
        return f"<Freeze of {self.what} {'armed' if self._armed else 'not armed'}>"

    @property
    def harness(self) -> Harness:
        """Whose it is."""
        return self.place.region.harness

    @property
    def what(self) -> str:
        """What it waits for, in words."""
        access = {"any": "touch", "read": "read", "write": "write"}.get(self._access, self._access)
        number = "" if self._nth == 1 else f" number {self._nth}"
        by = {"user": " by the program", "kernel": " by a system call"}.get(self._mode, "")
        return f"{access}{number}{by} of {self.place.name}"

    @property
    def frozen(self) -> tuple[Frozen, ...]:
        """Who stands now, in the order in which they came."""
        return tuple(each for each in self._came if not each.released)

    def __enter__(self) -> Self:
        if self._armed is not None:
            raise RuntimeError(f"{self!r} is armed already")
        self._came.clear()
        self._given = 0
        self._since = self.harness.order("count")
        self._armed = self.harness.arm(
            Kind.FREEZE,
            self.place,
            access=self._access,
            mode=self._mode,
            thread=self._thread,
            nth=self._nth,
            every=self._every,
            freeze=self,
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        armed, self._armed = self._armed, None
        if armed is not None:
            if error is not None:
                self.harness.note_standing(error)
            armed.disarm()
            for each in self._came:
                each._ended.set()

    async def __aenter__(self) -> AsyncFreeze:
        running_loop()
        self.__enter__()
        return AsyncFreeze(self)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.__exit__(kind, error, traceback)

    def wait(self, timeout: float | None = None) -> Frozen:
        """Wait until one more thread stands here.

        Args:
            timeout: Seconds; the harness's own limit if None.

        Returns:
            Each thread once, in the order in which they came; also one that has gone meanwhile.

        Raises:
            FreezeTimeout: Nobody came; says who did what instead.
            RuntimeError: It is not armed: nobody would ever come.
            HarnessError: The harness has let somebody go at the time limit, or has ended.
        """
        __tracebackhide__ = True  # pytest shows the test's line, not ours
        self._check_armed("with")
        seconds = self.harness.timeout if timeout is None else timeout
        end = time.monotonic() + seconds
        with self.harness.changed:
            while self._given == len(self._came):
                self.harness.check()
                left = end - time.monotonic()
                if left <= 0 or not self.harness.changed.wait(left):
                    break
            else:
                return self._next()
        raise self._timeout(seconds)

    def _check_armed(self, word: str) -> None:
        __tracebackhide__ = True
        if self._armed is None:
            raise RuntimeError(
                f"this freeze is not armed: use '{word} place.freeze() as freeze:',"
                " and wait within that block"
            )

    def _next(self) -> Frozen:
        self._given += 1
        return self._came[self._given - 1]

    def _timeout(self, seconds: float) -> FreezeTimeout:
        return FreezeTimeout(
            f"no {self.what} within {seconds:g} s of waiting."
            f" Since it was armed:\n{self.harness.account(self._since)}"
        )

    def _arrive(self, frozen: Frozen) -> None:
        self._came.append(frozen)


class AsyncFreeze:
    """What ``async with freeze(...)`` gives.

    Attributes:
        sync: The same for threads.
    """

    def __init__(self, sync: Freeze) -> None:
        """Wrap an armed freeze."""
        self.sync = sync

    def __repr__(self) -> str:
        return repr(self.sync).replace("Freeze", "AsyncFreeze", 1)

    @property
    def frozen(self) -> tuple[AsyncFrozen, ...]:
        """Who stands now."""
        return tuple(AsyncFrozen(each) for each in self.sync.frozen)

    async def wait(self, timeout: float | None = None) -> AsyncFrozen:
        """Wait until one more thread stands here; arguments and errors as ``Freeze.wait``.

        Cancellation: nobody is lost; the next wait gets who came meanwhile.
        """
        __tracebackhide__ = True  # as above
        freeze = self.sync
        freeze._check_armed("async with")
        harness = freeze.harness
        seconds = harness.timeout if timeout is None else timeout
        loop = running_loop()
        changed = asyncio.Event()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed under a waiting task
                loop.call_soon_threadsafe(changed.set)

        harness.listeners.append(wake)
        try:
            async with asyncio.timeout(seconds):
                while True:
                    with harness.changed:
                        harness.check()
                        if freeze._given < len(freeze._came):
                            return AsyncFrozen(freeze._next())
                        changed.clear()
                    await changed.wait()
        except TimeoutError:
            raise freeze._timeout(seconds) from None
        finally:
            harness.listeners.remove(wake)


def freeze(
    place: Place | Region,
    access: str = "any",
    *,
    nth: int = 1,
    mode: str = "any",
    thread: ThreadLike | Iterable[ThreadLike] | None = None,
    every: bool = False,
) -> Freeze:
    """Stop whoever touches a place; see ``Place.freeze``.

    ::

        with freeze(page) as frozen_page:
            thread = frozen_page.wait()
            thread.release()

        async with freeze(page) as frozen_page:
            thread = await frozen_page.wait()
            await thread.release()

    Raises:
        TypeError: It is neither a place nor a region, all of which is one.
    """
    found: Any = place if isinstance(place, PlaceLike) else getattr(place, "all", None)
    if not isinstance(found, PlaceLike):
        raise TypeError(f"freeze a place: region.page(0) or region.all, not {place!r}")
    whole: Any = found  # a region's, or the place itself; a mere look-alike has no harness
    return Freeze(whole, access, nth=nth, mode=mode, thread=thread, every=every)
