"""Lazy memory without a fault: what the loop does by itself."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from pathlib import Path

import pytest

from aiouffd import sigbus
from aiouffd.errors import ClosedError, FaultError, HandlerError, SourceError, StuckPage
from aiouffd.events import PageFault
from aiouffd.lazy_memory import Holes, LazyMemory
from aiouffd.performer import PIECE_BYTES
from aiouffd.resolutions import Answer, Copy, Move, Poison, Unprotect, Wake, Zero
from aiouffd.sources import Source
from aiouffd.sources.buffer import BufferSource
from aiouffd.sources.file import FileSource
from tests.lazy_access import CONTENT, PAGE

SIZE = 64 * PAGE


class Store:
    """A source that has some pages at hand and counts what it is asked."""

    def __init__(self, size: int = SIZE) -> None:
        self.at_hand: set[int] = set()
        self.asked: list[tuple[int, int]] = []
        self.size = size

    def read_nowait(self, offset: int, length: int) -> bytes | None:
        assert offset + length <= self.size
        if offset // PAGE in self.at_hand:
            return CONTENT[offset : offset + length]
        return None

    async def read(self, offset: int, length: int) -> bytes:
        assert offset + length <= self.size
        self.asked.append((offset, length))
        await asyncio.sleep(0)
        return CONTENT[offset : offset + length]


async def fill(fault: PageFault) -> bytes:
    return CONTENT[fault.offset : fault.offset + fault.length]


async def test_ensure_reads_a_source_in_runs() -> None:
    """A whole range is read in large pieces, around what is there already."""
    store = Store()
    async with LazyMemory(SIZE, store) as memory:
        await memory.ensure(5 * PAGE, PAGE)
        assert store.asked == [(5 * PAGE, PAGE)]
        view = await memory.ensure()
        assert store.asked[1:] == [(0, 5 * PAGE), (6 * PAGE, 58 * PAGE)]
        assert view == CONTENT[:SIZE]
        assert memory.present()
        assert memory.counters.faults == 0


async def test_ensure_covers_the_pages_that_a_range_touches() -> None:
    """Offsets need no alignment; the last page of an odd length is filled up with zeros."""
    length = 3 * PAGE + 100
    async with LazyMemory(length, Store(length)) as memory:
        view = await memory.ensure(PAGE - 1, 2)
        assert view == CONTENT[PAGE - 1 : PAGE + 1]
        assert memory.present(0, 2 * PAGE)
        assert not memory.present(2 * PAGE, 1)
        assert await memory.ensure() == CONTENT[:length]
        assert memory.present_bytes == 4 * PAGE


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("page_size", [PAGE, 16 * PAGE])
async def test_ensure_with_a_handler(shared: bool, page_size: int) -> None:
    """A handler is asked once for each missing page, many at a time."""
    asked: list[int] = []
    running = 0
    most = 0

    async def slow(fault: PageFault) -> bytes:
        nonlocal running, most
        asked.append(fault.offset)
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        return await fill(fault)

    async with LazyMemory(300 * PAGE, slow, shared=shared, page_size=page_size) as memory:
        await asyncio.gather(memory.ensure(), memory.ensure())
        assert asked == list(range(0, 300 * PAGE, page_size))
        assert most > 1
        assert memory.view == CONTENT[: 300 * PAGE]


@pytest.mark.parametrize("kind", ["bytes", "bytearray", "short", "zero"])
@pytest.mark.parametrize("write_protect", [False, True])
async def test_a_long_answer_lets_the_loop_go_on(kind: str, write_protect: bool) -> None:
    """It is done piece by piece, the page that was asked for first, and asked for once."""
    pieces, middle = 8, 5 * PIECE_BYTES + PAGE
    size = pieces * PIECE_BYTES - 100
    content = bytes(size) if kind == "zero" else CONTENT[:PAGE] * (size // PAGE + 1)
    content = content[:size]
    answers: dict[str, Callable[[int], Answer]] = {
        "bytes": lambda start: Copy(content + bytes(100), start),
        "bytearray": lambda start: Copy(bytearray(content + bytes(100)), start),
        "short": lambda start: Copy(memoryview(content), start),
        "zero": lambda start: Zero(pieces * PIECE_BYTES, start),
    }
    asked: list[int] = []

    async def answer_all(fault: PageFault) -> Answer:
        asked.append(fault.offset)
        return answers[kind](fault.address - fault.offset)

    async with LazyMemory(size, answer_all, write_protect=write_protect) as memory:
        await memory.ensure(middle, PAGE)
        first = memory.present_bytes
        assert first <= 3 * PIECE_BYTES, "the loop had its turn before all was there"
        assert memory.present(middle, PAGE), "its page came first"
        turns = 0

        async def count_turns() -> None:
            nonlocal turns
            while not memory.present():
                turns += 1
                await asyncio.sleep(0)

        counting = asyncio.create_task(count_turns())
        view = await memory.ensure()
        await counting
        assert view == content
        assert turns >= pieces - 3
        assert asked == [middle], "what is coming is not asked for"
        assert memory.counters.filled_bytes == pieces * PIECE_BYTES
        del view


async def test_a_large_page_comes_piece_by_piece() -> None:
    """From a handler and from a source; nobody goes on before it is whole."""
    page_size = 4 * PIECE_BYTES
    size = 2 * page_size
    content = CONTENT[:PAGE] * (size // PAGE)

    async def answer(fault: PageFault) -> Answer:
        return content[fault.offset : fault.offset + fault.length]

    for handler in (answer, BufferSource(content)):
        async with LazyMemory(size, handler, page_size=page_size) as memory:
            ensuring = asyncio.ensure_future(memory.ensure(0, page_size))
            seen = set()
            while not ensuring.done():
                seen.add(memory.present_bytes)
                await asyncio.sleep(0)
            assert ensuring.result() == content[:page_size]
            assert len(seen) >= 4
            assert memory.present_bytes == page_size
            del ensuring


async def test_closing_ends_a_long_answer() -> None:
    """Between two pieces the descriptors may go: no piece is done after that."""
    size = 64 * PIECE_BYTES

    async def answer(fault: PageFault) -> Answer:
        return Zero(size, fault.address - fault.offset)

    memory = await LazyMemory(size, answer).open()
    ensuring = asyncio.ensure_future(memory.ensure())
    while not memory.present_bytes:
        await asyncio.sleep(0)
    assert not memory.present()
    filled = memory.counters.filled_bytes
    await memory.aclose(Holes.RAISE)
    with pytest.raises(ClosedError):
        await ensuring
    assert memory.counters.filled_bytes == filled < size


async def test_ensure_with_a_plain_function() -> None:
    """A plain function is called on the loop; what it returns may be awaited."""

    def either(fault: PageFault) -> object:
        return fill(fault) if fault.offset else CONTENT[:PAGE]

    async with LazyMemory(2 * PAGE, either) as memory:  # type: ignore[arg-type]
        assert await memory.ensure() == CONTENT[: 2 * PAGE]


async def test_a_plain_function_serves_the_loops_own_touches() -> None:
    """Nothing has to be waited for, so the loop's thread may touch as well."""
    async with LazyMemory(SIZE, lambda fault: CONTENT[fault.offset :][: fault.length]) as memory:
        assert bytes(memory.view) == CONTENT[:SIZE]
        assert memory.counters.inline == 64


async def test_pinned_pages_are_not_evicted() -> None:
    """What a block has ensured stays until the block ends, whoever evicts."""
    async with LazyMemory(SIZE, fill) as memory:
        async with memory.ensure(10 * PAGE, PAGE + 1), memory.ensure(11 * PAGE, 2 * PAGE):
            await memory.ensure()
            assert memory.evict() == SIZE - 3 * PAGE
            assert memory.present(10 * PAGE, 3 * PAGE)
            assert not memory.present(9 * PAGE, 1)
        assert memory.evict() == 3 * PAGE
        assert memory.present_bytes == 0
        assert memory.counters.evicted_bytes == SIZE


async def test_evict_leaves_pages_that_a_range_only_touches() -> None:
    """Half a page cannot be evicted."""
    async with LazyMemory(4 * PAGE, fill) as memory:
        await memory.ensure()
        assert memory.evict(1, 2 * PAGE) == PAGE
        assert memory.present(0, PAGE)
        assert not memory.present(PAGE, PAGE)
        assert memory.present(2 * PAGE, 2 * PAGE)


async def test_a_cancelled_ensure_pins_nothing_and_loses_nothing() -> None:
    """The handlers go on; whoever asks next gets their page."""
    gate = asyncio.Event()

    async def slow(fault: PageFault) -> bytes:
        await gate.wait()
        return await fill(fault)

    async with LazyMemory(SIZE, slow) as memory:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01), memory.ensure(0, PAGE):
                pass
        assert not memory._pins
        gate.set()
        assert await memory.ensure(0, PAGE) == CONTENT[:PAGE]


async def test_a_cancelled_read_of_a_source_is_repeated() -> None:
    """Pages whose read was cancelled with its ensure are nobody's."""

    class Slow(Store):
        async def read(self, offset: int, length: int) -> bytes:
            if not self.asked:
                self.asked.append((offset, length))
                await asyncio.sleep(3600)
            return await super().read(offset, length)

    async with LazyMemory(SIZE, Slow()) as memory:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await memory.ensure()
        assert not memory._serving.faults.flights
        assert await memory.ensure() == CONTENT[:SIZE]


async def test_an_ensure_that_fails_raises() -> None:
    """The first failure is raised, with its cause; pages that came stay."""

    async def some(fault: PageFault) -> bytes:
        if fault.offset == 3 * PAGE:
            raise LookupError
        return await fill(fault)

    async with LazyMemory(SIZE, some) as memory:
        with pytest.raises(HandlerError) as failure:
            await memory.ensure()
        assert isinstance(failure.value.__cause__, LookupError)
        assert memory.present(0, 3 * PAGE)
        assert not memory._pins


async def test_a_source_that_gives_too_little_fails() -> None:
    """Bytes are never made up."""

    class Short(Store):
        async def read(self, offset: int, length: int) -> bytes:
            return b"x" * (length - 1)

    async with LazyMemory(SIZE, Short()) as memory:
        with pytest.raises(SourceError):
            await memory.ensure(0, PAGE)
        assert memory.present_bytes == 0


async def test_every_resolution() -> None:
    """Copy, Zero and Poison do what they say, also beside the faulting page; others are refused."""
    answers: dict[int, Answer] = {}

    async def answer(fault: PageFault) -> Answer:
        return answers[fault.offset // PAGE]

    async with LazyMemory(SIZE, answer) as memory:
        base = memory._mapping.start
        answers[0] = Copy(bytearray(CONTENT[: 4 * PAGE]))  # three more than asked for
        answers[4] = Zero(2 * PAGE)
        answers[6] = memoryview(CONTENT)[:PAGE]
        for page in (0, 4, 6):
            await memory.ensure(page * PAGE, PAGE)
        assert memory.view[: 7 * PAGE] == CONTENT[: 4 * PAGE] + bytes(2 * PAGE) + CONTENT[:PAGE]
        answers[10] = Poison(2 * PAGE)
        for page in (10, 11):
            with pytest.raises(FaultError, match="lost"):
                await memory.ensure(page * PAGE, PAGE)
        for wrong in (
            Copy(CONTENT[:PAGE], address=base - PAGE),
            Copy(CONTENT[:PAGE], address=base + 20 * PAGE, protect=True),
            Zero(PAGE, address=base + 63 * PAGE + 1),
            Zero(2 * PAGE, address=base + 63 * PAGE),
            Move(base),
            Wake(),
            b"",
            b"x" * 100,
        ):
            answers[20] = wrong
            with pytest.raises(HandlerError):
                await memory.ensure(20 * PAGE, PAGE)
        answers[20] = Copy(CONTENT[:PAGE], address=base + 30 * PAGE)
        with pytest.raises(FaultError, match="vanish"):
            await memory.ensure(20 * PAGE, PAGE)


async def test_write_protected_pages_are_made_writable_by_ensure() -> None:
    """``ensure(write=True)`` asks the handler for protected pages; Zero is protected as well."""
    kinds: list[str] = []

    async def watch(fault: PageFault) -> Answer:
        kinds.append(fault.kind)
        return Unprotect() if fault.wp else Zero()

    async with LazyMemory(PAGE, watch, write_protect=True) as memory:
        await memory.ensure()
        assert kinds == ["missing"]
        assert list(memory._mapping.pages.protected(memory._mapping.start, memory._mapping.end))
        view = await memory.ensure(write=True)
        assert kinds == ["missing", "wp"]
        view[0] = 1
        memory.protect()
    async with LazyMemory(PAGE, Store(PAGE), write_protect=True) as memory:
        view = await memory.ensure(write=True)
        view[0] = 1
        assert view[0] == 1


async def test_fill_brings_bytes_at_hand() -> None:
    """What is there keeps what it holds; the tail needs no whole page."""
    length = 3 * PAGE + 10
    async with LazyMemory(length, fill) as memory:
        assert memory.fill(PAGE, b"a" * PAGE) == PAGE
        assert memory.fill(0, CONTENT[:length]) == 3 * PAGE
        assert memory.view[PAGE : 2 * PAGE] == b"a" * PAGE
        assert memory.view[2 * PAGE :] == CONTENT[2 * PAGE : length]
        for offset, data in ((1, b"b" * PAGE), (0, b"b"), (-PAGE, b""), (length, b"b")):
            with pytest.raises(ValueError, match="are not"):
                memory.fill(offset, data)


async def test_read_only_memory() -> None:
    """Views refuse writes; filling and evicting work all the same."""
    for shared in (False, True):
        async with LazyMemory(SIZE, fill, read_only=True, shared=shared) as memory:
            await memory.ensure()
            assert memory.view.readonly
            with pytest.raises(TypeError):
                memory[0] = 1
            assert memory.evict() == SIZE


async def test_arguments_are_checked() -> None:
    """What cannot work is refused before anything is mapped."""
    for length, options in (
        (0, {}),
        (PAGE, {"page_size": 1000}),
        (PAGE, {"page_size": 3 * PAGE}),
        (PAGE, {"deadline": 0}),
        (PAGE, {"read_only": True, "write_protect": True}),
    ):
        with pytest.raises(ValueError):
            LazyMemory(length, fill, **options)
    with pytest.raises(TypeError):
        LazyMemory(PAGE, "handler")  # type: ignore[arg-type]
    memory = LazyMemory(PAGE, fill)
    with pytest.raises(ClosedError):
        memory.view  # noqa: B018
    await memory.aclose()
    with pytest.raises(RuntimeError):
        await memory.open()


async def test_closing_is_refused_while_views_exist() -> None:
    """BufferError, and everything goes on; without views the memory is gone at once."""
    memory = await LazyMemory(SIZE, fill).open()
    view = memory.view[10:20]
    with pytest.raises(BufferError):
        await memory.aclose()
    with pytest.raises(ValueError, match="missing"):
        memory.close(Holes.FILL)
    assert await memory.ensure(0, PAGE)
    assert view == CONTENT[10:20]
    view.release()
    await memory.aclose()
    await memory.aclose()
    assert memory.closed
    assert not sigbus.targets()
    with pytest.raises(ClosedError):
        memory[0]


async def test_forgotten_memory_warns() -> None:
    """Memory that nobody closed says so, and fails closed."""

    async def forget() -> None:
        memory = await LazyMemory(SIZE, fill).open()
        # Served memory is held by its loop; only the object that opened it can be lost.
        del memory
        gc.collect()

    with pytest.warns(ResourceWarning, match="never closed"):
        await forget()
    assert not sigbus.targets()


async def test_two_memories_are_apart() -> None:
    """Each range has its own handler; the table finds the right one."""
    async with (
        LazyMemory(SIZE, lambda fault: b"a" * fault.length) as first,
        LazyMemory(SIZE, lambda fault: b"b" * fault.length, shared=True) as second,
        LazyMemory(SIZE, lambda fault: b"c" * fault.length) as third,
    ):
        assert [bytes(one.view[PAGE:][:2]) for one in (third, first, second)] == [
            b"cc",
            b"aa",
            b"bb",
        ]
        starts = [target.start for target in sigbus.targets()]
        assert starts == sorted(starts)
        assert len(starts) == 3


async def test_a_page_that_faults_for_ever_is_noticed() -> None:
    """The same thread on the same page, which is there: that cannot go on for ever."""
    async with LazyMemory(SIZE, fill) as memory:
        await memory.ensure(0, 2 * PAGE)
        faults = memory._serving.faults
        results = [faults.fault(faults.start, False) for _ in range(20_001)]
        assert results[:-1] == [None] * 20_000
        assert isinstance(results[-1], StuckPage)
        assert faults.fault(faults.start + PAGE, False) is None
        assert not faults.flights


async def test_an_ensure_that_is_under_way_ends_when_the_memory_is_closed() -> None:
    """Whatever the handler or the source then answers is filled nowhere."""
    gate = asyncio.Event()

    async def stubborn(fault: PageFault) -> bytes:
        try:
            await gate.wait()
        except asyncio.CancelledError:
            await asyncio.sleep(0)  # a handler that does not want to be cancelled
        return await fill(fault)

    class Slow(Store):
        async def read(self, offset: int, length: int) -> bytes:
            await gate.wait()
            return await super().read(offset, length)

    for handler in (stubborn, Slow()):
        gate.clear()
        memory = await LazyMemory(SIZE, handler).open()
        view = memory.view
        bringing = asyncio.ensure_future(memory.ensure())
        while not memory._serving.faults.flights:
            await asyncio.sleep(0)
        await memory.aclose(Holes.RAISE)
        gate.set()
        with pytest.raises((ClosedError, SourceError)):
            await bringing
        del bringing
        with pytest.raises(ClosedError):
            view[0]
        await asyncio.sleep(0)  # this step of the loop still holds the task that woke us
        view.release()
        gc.collect()
        assert not sigbus.targets()


async def test_the_sources_of_the_package_fit(tmp_path: Path) -> None:
    """A file and a buffer, as any server takes them, also fill memory of one's own."""
    length = 10 * PAGE + 77
    (tmp_path / "image").write_bytes(CONTENT[:length])
    sources: list[Source] = [BufferSource(CONTENT[:length]), FileSource(tmp_path / "image")]
    for source in sources:
        async with LazyMemory(length, source) as memory:
            first = await asyncio.to_thread(memory.__getitem__, slice(PAGE - 2, PAGE + 2))
            assert first == CONTENT[PAGE - 2 : PAGE + 2]
            assert await memory.ensure() == CONTENT[:length]
        await source.aclose()
