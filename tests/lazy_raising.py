"""Accesses that fail: where the exception comes, what is left behind, what runs no more.

Knows: shapes of code around a failing access; both ways of raising in a frame.
Must not know: how the frame is made to raise.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from aiouffd import frame_raise
from aiouffd.errors import (
    ClosedError,
    DeadlineExceeded,
    FaultError,
    HandlerError,
    LoopThreadTouch,
    SourceError,
)
from aiouffd.events import PageFault
from aiouffd.lazy_memory import Holes, LazyMemory
from aiouffd.resolutions import Poison
from tests.lazy_access import PAGE, LoopThread
from tests.lazy_harness import Case, NewLoop

SIZE = 64 * PAGE

MECHANISMS = (
    [frame_raise.TRACE, frame_raise.MONITORING]
    if sys.version_info >= (3, 12)
    else [frame_raise.TRACE]
)


class OutOfStock(Exception):
    """What the handlers here raise."""


class Trouble:
    """A handler that fails until told otherwise, and counts."""

    def __init__(self) -> None:
        self.broken = True
        self.calls = 0

    async def __call__(self, fault: PageFault) -> bytes:
        self.calls += 1
        await asyncio.sleep(0)
        if self.broken:
            raise OutOfStock(fault.offset)
        return bytes([fault.offset // PAGE % 251 + 1]) * fault.length


# --- shapes: each gets a view whose every touch fails --------------------------------------


class Trail(list[str]):
    """What of a shape was executed."""


def _assignment(view: Any, trail: Trail) -> None:
    try:
        x = view[0]; trail.append(f"went on with {x}")  # fmt: skip  # noqa: E702
    except HandlerError:
        trail.append("caught")


def _last_line_of_try(view: Any, trail: Trail) -> None:
    try:
        trail.append("before")
        x = view[0]
    except HandlerError:
        trail.append("caught")
    else:
        trail.append(f"went on with {x}")


def _with_block(view: Any, trail: Trail) -> None:
    try:
        with contextlib.nullcontext():
            x = view[0]
            trail.append(f"went on with {x}")
    except HandlerError:
        trail.append("caught")


def _call_argument(view: Any, trail: Trail) -> None:
    try:
        trail.append(view[0])
    except HandlerError:
        trail.append("caught")


def _while_condition(view: Any, trail: Trail) -> None:
    try:
        while view[0]:
            trail.append("went on")
    except HandlerError:
        trail.append("caught")


def _if_condition(view: Any, trail: Trail) -> None:
    try:
        if not view[0]:
            trail.append("believed the zero")
    except HandlerError:
        trail.append("caught")


def _comprehension(view: Any, trail: Trail) -> None:
    try:
        trail.append(str([view[i] for i in range(3)]))
    except HandlerError:
        trail.append("caught")


def _generator(view: Any, trail: Trail) -> None:
    def items() -> Any:
        for i in range(3):
            yield view[i]

    try:
        trail.append(str(sum(items())))
    except HandlerError:
        trail.append("caught")


def _lambda(view: Any, trail: Trail) -> None:
    try:
        first: Callable[[], str] = lambda: view[0]  # noqa: E731
        trail.append(first())
    except HandlerError:
        trail.append("caught")


def _sort_key(view: Any, trail: Trail) -> None:
    try:
        trail.append(str(sorted([3, 1, 2], key=lambda i: view[i])))
    except HandlerError:
        trail.append("caught")


def _coroutine(view: Any, trail: Trail) -> None:
    async def read() -> int:
        value: int = view[0]
        return value

    reading = read()
    try:
        reading.send(None)
    except HandlerError:
        trail.append("caught")
    except StopIteration:
        trail.append("went on")


def _store(view: Any, trail: Trail) -> None:
    try:
        view[0] = 5
        trail.append("went on")
    except HandlerError:
        trail.append("caught")


def _c_call(view: Any, trail: Trail) -> None:
    try:
        x = bytes(view)
        trail.append(f"went on with {len(x)}")
    except HandlerError:
        trail.append("caught")


def _nested_try(view: Any, trail: Trail) -> None:
    try:
        try:
            x = view[0]
            trail.append(f"went on with {x}")
        finally:
            trail.append("finally")
    except HandlerError:
        trail.append("caught")


def _returns(view: Any, trail: Trail) -> int:
    try:
        return view[0]  # type: ignore[no-any-return]
    except HandlerError:
        trail.append("caught within")
    return 0


def _caller_of_return(view: Any, trail: Trail) -> None:
    try:
        trail.append(f"returned {_returns(view, trail)}")
    except HandlerError:
        trail.append("caught")


def _stores_last(view: Any, trail: Trail) -> None:
    try:
        view[0] = 1
    except HandlerError:
        trail.append("caught within")


def _caller_of_store(view: Any, trail: Trail) -> None:
    try:
        _stores_last(view, trail)
    except HandlerError:
        trail.append("caught")


SHAPES: dict[str, tuple[Callable[[Any, Trail], None], list[str]]] = {
    "assignment, rest of the line": (_assignment, ["caught"]),
    "last line of try": (_last_line_of_try, ["before", "caught"]),
    "with": (_with_block, ["caught"]),
    "call argument": (_call_argument, ["caught"]),
    "while": (_while_condition, ["caught"]),
    "if": (_if_condition, ["caught"]),
    "comprehension": (_comprehension, ["caught"]),
    "generator": (_generator, ["caught"]),
    "lambda": (_lambda, ["caught"]),
    "sort key": (_sort_key, ["caught"]),
    "coroutine": (_coroutine, ["caught"]),
    "store": (_store, ["caught"]),
    "C call over many pages": (_c_call, ["caught"]),
    "try in try": (_nested_try, ["finally", "caught"]),
    # The instruction after these is outside of their try: the caller gets it.
    "return": (_caller_of_return, ["caught"]),
    "store as last statement": (_caller_of_store, ["caught"]),
}


async def _shape(name: str) -> None:
    function, expected = SHAPES[name]
    handler = Trouble()

    def touch() -> None:
        trail = Trail()
        function(memory.view[: 8 * PAGE], trail)
        assert trail == expected, trail
        assert sys.gettrace() is None, "a trace function was left behind"
        assert not frame_raise.armed(memory._serving.faults)

    async with LazyMemory(SIZE, handler, deadline=5) as memory:
        await asyncio.to_thread(touch)
        assert memory.present_bytes == 0, "zeros were left behind"
        assert memory.counters.failures > 0


# --- other behaviour ---------------------------------------------------------------------


async def _cause_and_recovery() -> None:
    handler = Trouble()

    def touch() -> None:
        for _ in range(2):
            with pytest.raises(HandlerError) as failure:
                memory[PAGE]
            assert isinstance(failure.value.__cause__, OutOfStock)
            assert failure.value.address == memory._mapping.start + PAGE
            names = [entry.name for entry in failure.traceback]
            assert "__getitem__" in names, "raised in the touching frame"
        handler.broken = False
        assert memory[PAGE] == 2

    async with LazyMemory(SIZE, handler, deadline=5) as memory:
        await asyncio.to_thread(touch)
        assert handler.calls == 3


async def _failed_store_is_dropped() -> None:
    handler = Trouble()

    def touch() -> None:
        with pytest.raises(HandlerError):
            memory[PAGE + 5] = 99
        handler.broken = False
        assert memory[PAGE + 5] == 2

    async with LazyMemory(SIZE, handler, deadline=5) as memory:
        await asyncio.to_thread(touch)


async def _many_threads_in_one_function() -> None:
    handler = Trouble()
    failures: list[BaseException] = []

    def touch(page: int) -> None:
        for _ in range(20):
            try:
                x = view[page * PAGE]
                raise AssertionError(f"read {x}")
            except HandlerError as error:
                failures.append(error)

    async with LazyMemory(SIZE, handler, deadline=5) as memory:
        view = memory.view
        await asyncio.gather(*(asyncio.to_thread(touch, page) for page in range(8)))
        assert len(failures) == 160
        assert len({id(failure) for failure in failures}) == 160, "each has its own"
        assert memory.present_bytes == 0
        assert not frame_raise.armed(memory._serving.faults)


async def _frame_within_a_failing_call() -> None:
    handler = Trouble()

    def touch() -> None:
        view = memory.view
        with pytest.raises(HandlerError):
            # The sort reads its items from lazy memory, and so does its key function.
            sorted(view[:10], key=lambda item: view[PAGE * 5 + item])
        assert sys.gettrace() is None

    async with LazyMemory(SIZE, handler, deadline=5) as memory:
        await asyncio.to_thread(touch)
        assert memory.present_bytes == 0


async def _touch_on_the_loop() -> None:
    handler = Trouble()
    handler.broken = False
    async with LazyMemory(SIZE, handler, deadline=5) as memory:
        view = memory.view
        with pytest.raises(LoopThreadTouch):
            view[PAGE]

        def plain_function() -> int:
            value = view[2 * PAGE]
            return value  # noqa: RET504

        with pytest.raises(LoopThreadTouch):
            plain_function()
        assert memory.present_bytes == 0
        assert handler.calls == 0
        await memory.ensure(PAGE, 1)
        assert view[PAGE] == 2


async def _touch_on_the_loop_of_a_page_in_flight() -> None:
    asked = asyncio.Event()
    go_on = asyncio.Event()

    async def fill(fault: PageFault) -> bytes:
        asked.set()
        await go_on.wait()
        return b"x" * fault.length

    async with LazyMemory(SIZE, fill, deadline=5) as memory:
        reading = asyncio.create_task(asyncio.to_thread(lambda: memory[0]))
        await asked.wait()
        with pytest.raises(LoopThreadTouch):
            memory.view[0]
        go_on.set()
        assert await reading == ord("x")
        assert memory.view[0] == ord("x")


async def _handler_touches_what_it_serves() -> None:
    async def fill(fault: PageFault) -> bytes:
        return bytes([memory.view[5 * PAGE]]) * fault.length

    def touch() -> None:
        with pytest.raises(HandlerError) as failure:
            memory[0]
        assert isinstance(failure.value.__cause__, LoopThreadTouch) or isinstance(
            failure.value, LoopThreadTouch
        )

    async with LazyMemory(SIZE, fill, deadline=5) as memory:
        await asyncio.to_thread(touch)


async def _inline_handler_touches_its_own_page() -> None:
    def fill(fault: PageFault) -> bytes:
        return bytes([memory.view[fault.offset]]) * fault.length

    async with LazyMemory(SIZE, fill, deadline=5) as memory:
        with pytest.raises(HandlerError):
            memory[0]
        assert memory.present_bytes == 0


async def _inline_handler_fails() -> None:
    def fill(fault: PageFault) -> bytes:
        raise OutOfStock

    async with LazyMemory(SIZE, fill, deadline=5) as memory:
        with pytest.raises(HandlerError) as failure:
            memory[0]
        assert isinstance(failure.value.__cause__, OutOfStock)
        assert memory.present_bytes == 0


async def _source_fails() -> None:
    class Source:
        def read_nowait(self, offset: int, length: int) -> bytes | None:
            if offset:
                return None
            raise OutOfStock

        async def read(self, offset: int, length: int) -> bytes:
            raise OutOfStock

    def touch() -> None:
        for page in (0, 1):
            with pytest.raises(SourceError) as failure:
                memory[page * PAGE]
            assert isinstance(failure.value.__cause__, OutOfStock)

    async with LazyMemory(SIZE, Source(), deadline=5) as memory:
        await asyncio.to_thread(touch)
        with pytest.raises(SourceError):
            await memory.ensure()


async def _useless_answers() -> None:
    answers: list[Any] = [b"short", 17, None, object(), b"x" * (PAGE * 2 - 1)]

    def touch() -> None:
        for page in range(len(answers)):
            with pytest.raises(HandlerError):
                memory[page * PAGE]

    async def fill(fault: PageFault) -> Any:
        return answers[fault.offset // PAGE]

    async with LazyMemory(SIZE, fill, deadline=5) as memory:
        await asyncio.to_thread(touch)
        assert memory.present_bytes == 0


async def _poisoned_page() -> None:
    calls = 0

    async def fill(fault: PageFault) -> Poison:
        nonlocal calls
        calls += 1
        return Poison()

    def touch() -> None:
        for _ in range(3):
            with pytest.raises(FaultError, match="lost"):
                memory[0]

    async with LazyMemory(SIZE, fill, deadline=5) as memory:
        await asyncio.to_thread(touch)
        assert calls == 1, "a lost page is not asked for again"
        with pytest.raises(FaultError, match="lost"):
            await memory.ensure(0, PAGE)
        assert memory.read_present(0, 10) == b""
        memory.evict()
        with pytest.raises(FaultError, match="lost"):
            await memory.ensure(0, PAGE)
        assert calls == 2, "evicted, it is asked for anew"


async def _deadline() -> None:
    gate = asyncio.Event()

    async def fill(fault: PageFault) -> bytes:
        await gate.wait()
        return b"y" * fault.length

    def touch() -> None:
        with pytest.raises(DeadlineExceeded):
            memory[0]

    async with LazyMemory(SIZE, fill, deadline=0.1) as memory:
        await asyncio.to_thread(touch)
        assert not memory.present(0, 1)
        gate.set()
        assert await asyncio.to_thread(lambda: memory[0]) == ord("y")


def _closed_loop(new_loop: NewLoop) -> None:
    memory = LazyMemory(SIZE, Trouble(), deadline=20)
    with LoopThread(new_loop) as other:
        other.run(memory.open())
    with pytest.raises(ClosedError, match="loop is closed"):
        memory[0]
    memory.close(Holes.RAISE)


def _loop_closed_while_a_thread_waits(new_loop: NewLoop) -> None:
    asked = threading.Event()

    async def fill(fault: PageFault) -> bytes:
        asked.set()
        await asyncio.sleep(3600)
        return b""

    memory = LazyMemory(SIZE, fill, deadline=20)
    raised: list[BaseException] = []

    def touch() -> None:
        try:
            value = memory[0]
            raised.append(AssertionError(value))
        except ClosedError as error:
            raised.append(error)

    async def serve_a_while() -> None:
        await memory.open()
        thread.start()
        await asyncio.to_thread(asked.wait)

    thread = threading.Thread(target=touch)
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(serve_a_while())
    thread.join()
    assert isinstance(raised[0], ClosedError)
    memory.close(Holes.RAISE)


async def _closed_while_a_thread_waits() -> None:
    asked = asyncio.Event()

    async def fill(fault: PageFault) -> bytes:
        asked.set()
        await asyncio.sleep(3600)
        return b""

    def touch() -> None:
        with pytest.raises(ClosedError):
            view[0]
        with pytest.raises(ClosedError):
            view[PAGE]

    async with LazyMemory(SIZE, fill, deadline=20) as memory:
        view = memory.view
        touching = asyncio.create_task(asyncio.to_thread(touch))
        await asked.wait()
    await touching


def _tracer_survives(new_loop: NewLoop) -> None:
    """With sys.monitoring a debugger's trace function stays."""
    if sys.version_info < (3, 12):
        return

    def tracer(frame: Any, event: str, argument: Any) -> Any:
        return tracer

    def touch() -> None:
        sys.settrace(tracer)
        try:
            with pytest.raises(HandlerError):
                memory[0]
            assert sys.gettrace() is tracer
        finally:
            sys.settrace(None)

    memory = LazyMemory(SIZE, Trouble(), deadline=5)
    with LoopThread(new_loop) as other:
        other.run(memory.open())
        frame_raise.prepare(frame_raise.MONITORING)
        touch()
        other.run(memory.aclose())


async def _monitoring_is_off_afterwards() -> None:
    if sys.version_info < (3, 12):
        return

    def touch() -> None:
        with pytest.raises(HandlerError):
            view[0]

    async with LazyMemory(SIZE, Trouble(), deadline=5) as memory:
        frame_raise.prepare(frame_raise.MONITORING)
        view = memory.view
        await asyncio.to_thread(touch)
        assert frame_raise._tool is not None
        assert sys.monitoring.get_local_events(frame_raise._tool, touch.__code__) == 0


async def _tool_ids_taken() -> None:
    """With both free tool ids taken by others, the trace function does it."""
    if sys.version_info < (3, 12):
        return
    taken = frame_raise._tool
    if taken is not None:
        sys.monitoring.free_tool_id(taken)
        frame_raise._tool = None
    for tool in frame_raise._FREE_TOOL_IDS:
        sys.monitoring.use_tool_id(tool, "another")
    try:
        assert frame_raise.prepare() == frame_raise.TRACE
        with pytest.raises(ValueError, match="monitoring"):
            frame_raise.prepare(frame_raise.MONITORING)
        await _shape("assignment, rest of the line")
    finally:
        for tool in frame_raise._FREE_TOOL_IDS:
            sys.monitoring.free_tool_id(tool)
        frame_raise.prepare()


BOTH_WAYS: dict[str, Callable[[], Any]] = {
    **{f"try shape: {name}": partial(_shape, name) for name in SHAPES},
    "handler error: cause kept, no zeros left, recovery": _cause_and_recovery,
    "failed store is dropped": _failed_store_is_dropped,
    "many threads fail in one function": _many_threads_in_one_function,
    "frame within a failing call": _frame_within_a_failing_call,
    "touch on the loop": _touch_on_the_loop,
    "touch on the loop of a page in flight": _touch_on_the_loop_of_a_page_in_flight,
    "handler touches what it serves": _handler_touches_what_it_serves,
    "inline handler touches its own page": _inline_handler_touches_its_own_page,
    "inline handler fails": _inline_handler_fails,
    "source fails": _source_fails,
    "useless answers": _useless_answers,
    "poisoned page": _poisoned_page,
    "deadline": _deadline,
    "closed while a thread waits": _closed_while_a_thread_waits,
}


def _run(work: Callable[[], Any], mechanism: str | None, new_loop: NewLoop) -> None:
    async def prepared() -> None:
        if mechanism is not None:
            # Opening some memory chooses a mechanism: choose behind it.
            async with LazyMemory(PAGE, Trouble()):
                pass
            frame_raise.prepare(mechanism)
        await work()

    try:
        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(prepared())
    finally:
        frame_raise.prepare()


CASES: dict[str, Case] = {
    f"{name}, by {mechanism}": functools.partial(_run, work, mechanism)
    for name, work in BOTH_WAYS.items()
    for mechanism in MECHANISMS
}
CASES["closed loop"] = _closed_loop
CASES["loop closed while a thread waits"] = _loop_closed_while_a_thread_waits
CASES["a tracer survives monitoring"] = _tracer_survives
CASES["monitoring is off afterwards"] = partial(_run, _monitoring_is_off_afterwards, None)
CASES["tool ids taken"] = partial(_run, _tool_ids_taken, None)
