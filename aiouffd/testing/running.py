"""A callable in a thread of its own, whose thread id and result a test can have.

Knows: threads.
Must not know: memory, harnesses.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import traceback
from collections.abc import Callable
from typing import Generic, ParamSpec, TypeVar, cast

T = TypeVar("T")
P = ParamSpec("P")


class Running(Generic[T]):
    """One call that runs in its own thread.

    The thread is a daemon: one that stands for ever does not keep the interpreter from ending.

    Attributes:
        name: What reports call it.
        tid: The kernel's number of its thread.
        thread: The thread.

    Sharing: any thread; ``async_result`` any loop.
    """

    def __init__(self, name: str, call: Callable[[], T]) -> None:
        """Start it; use ``Harness.start``."""
        self.name = name
        self._call = call
        self._value: T | None = None
        self._error: BaseException | None = None
        self._told = False  # somebody has had what it has raised
        self._ended = threading.Event()
        self._changing = threading.Lock()
        self._callbacks: list[Callable[[], None]] = []
        started = threading.Event()
        self.tid = 0

        def run() -> None:
            self.tid = threading.get_native_id()
            started.set()
            try:
                self._value = self._call()
            except BaseException as error:  # raised again where the result is asked for
                self._error = error
            with self._changing:
                self._ended.set()
                callbacks, self._callbacks = self._callbacks, []
            for callback in callbacks:
                callback()

        self.thread = threading.Thread(target=run, name=name, daemon=True)
        self.thread.start()
        started.wait()

    def __repr__(self) -> str:
        state = "ended" if self.done else "running"
        return f"<Running {self.name!r} tid={self.tid} {state}>"

    @property
    def done(self) -> bool:
        """Whether the call has returned or raised."""
        return self._ended.is_set()

    def result(self, timeout: float | None = 30.0) -> T:
        """Wait for what the call returns.

        Args:
            timeout: Seconds; None waits for ever.

        Raises:
            TimeoutError: It runs on.
            BaseException: What the call raised.
        """
        if not self._ended.wait(timeout):
            raise TimeoutError(f"{self.name!r} (thread {self.tid}) runs on after {timeout:g} s")
        self.thread.join()
        return self._outcome()

    async def async_result(self, timeout: float | None = 30.0) -> T:
        """Wait for what the call returns, on a loop.

        Raises: as ``result``.

        Cancellation: the call runs on.
        """
        loop = running_loop()
        ended: asyncio.Future[None] = loop.create_future()

        def tell() -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed under a waiting task
                loop.call_soon_threadsafe(_end, ended)

        with self._changing:
            if not self.done:
                self._callbacks.append(tell)
            else:
                ended.set_result(None)
        try:
            async with asyncio.timeout(timeout):
                await ended
        except TimeoutError:
            raise TimeoutError(
                f"{self.name!r} (thread {self.tid}) runs on after {timeout:g} s"
            ) from None
        return self._outcome()

    @property
    def lost(self) -> BaseException | None:
        """What the call has raised, as long as nobody has asked for its result."""
        return None if self._told or not self.done else self._error

    def tell(self) -> str:
        """Say in a line what it has raised, which is then no longer lost; empty if nothing."""
        if not self.done or self._error is None:
            return ""
        self._told = True
        return "".join(traceback.format_exception_only(self._error)).strip()

    def _outcome(self) -> T:
        self._told = True
        if self._error is not None:
            raise self._error
        return cast("T", self._value)


def running_loop() -> asyncio.AbstractEventLoop:
    """Give asyncio's running loop.

    Raises:
        RuntimeError: There is none; says what to use instead.
    """
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        raise RuntimeError(
            "the async forms are asyncio's, and no loop of asyncio runs here; on trio use 'with'"
            " and anyio.to_thread.run_sync(freeze.wait), or running.result"
        ) from None


def _end(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
