"""The metrics: Prometheus' own parser reads them, and the accounts balance, at every scrape."""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from prometheus_client.parser import text_string_to_metric_families

from aiouffd.errors import SourceError
from aiouffd.failure import Action, FailurePolicy
from aiouffd.prefetch import Pace
from aiouffd.prometheus import OUTCOMES, text_of
from aiouffd.protocols import firecracker
from aiouffd.server import Server
from aiouffd.service import Service
from aiouffd.session_states import State
from aiouffd.sources import Source
from aiouffd.sources.buffer import BufferSource
from aiouffd.sources.measured import MeasuredSource, Reads
from aiouffd.sources.shared import SharedImage
from aiouffd.status import Status
from aiouffd.testing.sources import image
from tests.clones import cloned
from tests.stand_in_vmm import PAGE, StandInVmm, eventually

SIZE: Final = 256 * PAGE


class Scrape:
    """One scrape, by name and labels."""

    def __init__(self, text: bytes) -> None:
        self.types: dict[str, str] = {}
        self.values: dict[tuple[str, ...], float] = {}
        for family in text_string_to_metric_families(text.decode()):
            self.types[family.name] = family.type
            for sample in family.samples:
                key = (sample.name, *(sample.labels[name] for name in sorted(sample.labels)))
                assert key not in self.values, f"{key} twice"
                self.values[key] = sample.value

    def __call__(self, name: str, *labels: str) -> int:
        return int(self.values["aiouffd_" + name, *labels])

    def sum(self, name: str, *labels: str) -> int:
        """Add up all series of a name whose first labels are these."""
        start = ("aiouffd_" + name, *labels)
        found = [value for key, value in self.values.items() if key[: len(start)] == start]
        assert found, start
        return int(sum(found))


def check_accounts(scrape: Scrape) -> None:
    """Hold a scrape to the equalities, whatever has happened."""
    ended = scrape.sum("faults_ended_total")
    in_flight = scrape("faults_in_flight")
    assert scrape("faults_total") == scrape("faults_joined_total") + ended + in_flight
    assert scrape("fault_seconds_count") == ended
    assert scrape("fault_seconds_bucket", "+Inf") == ended
    assert scrape.sum("faults_failed_total") == sum(
        value for key, value in scrape.values.items() if key[0] == "aiouffd_fault_errors_total"
    )
    assert scrape("faults_already_there_total") == scrape("faults_ended_total", "already")
    assert scrape("faults_removed_total") <= scrape("faults_ended_total", "zero")
    living = scrape.sum("sessions") - scrape("sessions", "handshaking")
    assert scrape("sessions_started_total") == living + scrape.sum("sessions_ended_total")
    waited = scrape("source_read_seconds_count", "image")
    assert waited == scrape("source_reads_total", "waited", "image")
    # Of what was read everything was installed, but what came too late: the page was there
    # already, its memory was gone, its waiter had been answered otherwise.
    installed = scrape.sum("installed_bytes_total")
    assert installed <= scrape.sum("source_bytes_total")
    assert scrape.sum("prefetched_bytes_total") <= scrape("installed_bytes_total", "ahead")


@contextlib.asynccontextmanager
async def scraped(
    folder: Path, source: Source, **service: Any
) -> AsyncIterator[tuple[Server, Callable[[], Awaitable[Scrape]]]]:
    """Run a server whose source is measured."""
    reads = Reads("image")
    server = Server(
        folder / "socket",
        firecracker.receive,
        MeasuredSource(source, "image", reads),
        service=Service(**service),
        report=lambda _: None,
    )
    async with server:
        text = text_of(Status(server, reads=[reads]))

        async def scrape() -> Scrape:
            return Scrape(await text())

        yield server, scrape


class Moody:
    """The image of a store that is sometimes slow, sometimes wrong, sometimes silent."""

    def __init__(self, rng: random.Random) -> None:
        self.size = SIZE
        self.rng = rng
        self.data = image(SIZE)

    def extents(self) -> Iterator[tuple[int, int]]:
        yield 0, SIZE // 2  # the rest is a hole

    def read_nowait(self, offset: int, length: int) -> bytes | None:
        chosen = self.rng.random()
        if chosen < 0.05:
            raise SourceError("moody at once")
        return self.data[offset : offset + length] if chosen < 0.5 else None

    async def read(self, offset: int, length: int) -> bytes:
        chosen = self.rng.random()
        if chosen < 0.5:
            await asyncio.sleep(self.rng.random() / 500)
        if chosen < 0.2:
            raise SourceError("moody")
        if chosen > 0.97:
            await asyncio.sleep(3600)
        return self.data[offset : offset + length]

    async def aclose(self) -> None:
        pass


@pytest.mark.limit(60)
async def test_the_accounts_balance_whatever_happens(tmp_path: Path, seed: int) -> None:
    """Errors, retries, deadlines, joins, removals, forks, kills and closes: all adds up (42)."""
    print(f"seed {seed}")
    rng = random.Random(seed)
    failure = FailurePolicy(retries=1, backoff=0.001, then=Action.ZERO)
    settings: dict[str, Any] = {"failure": failure, "deadline": 0.3, "on_close": Action.ZERO}
    async with scraped(tmp_path, Moody(rng), **settings) as (server, scrape):
        check_accounts(await scrape())
        async with contextlib.AsyncExitStack() as stack:
            guests = [
                await stack.enter_async_context(
                    StandInVmm.start(server.path, SIZE, regions=2, forks=number == 0)
                )
                for number in range(3)
            ]
            await eventually(lambda: server.served == 3, "all are served")
            await guests[0].ask("fork", str(tmp_path / "digest"))
            work = [guest.tell("digest", rng.randrange(1 << 30)) for guest in guests for _ in "ab"]
            for guest in guests:
                page = rng.randrange(SIZE // PAGE - 16)
                work.append(guest.tell("remove", page // 16 * 16 * PAGE, 8 * PAGE))
            before = await scrape()
            while not all(one.done() for one in work):
                await asyncio.sleep(0.05)
                now = await scrape()
                check_accounts(now)
                for key, value in before.values.items():
                    if now.types.get(key[0].removesuffix("_total")) == "counter":
                        assert now.values[key] >= value, key
                before = now
            sessions = sorted(server.sessions, key=lambda session: session.id)
            await sessions[1].aclose(Action.ZERO)
            check_accounts(await scrape())
        await eventually(lambda: not server.sessions, "all have ended")
    last = await scrape()
    check_accounts(last)
    assert last("faults_in_flight") == last.sum("sessions") == 0
    assert last("sessions_ended_total", "failed") == 1
    assert last("sessions_ended_total", "target_gone") == 2
    for name in ("faults_failed_total", "handler_retries_total", "faults_joined_total"):
        assert last.sum(name) > 0, f"nothing of {name}: the test has lost its point"
    assert last("source_reads_total", "cancelled", "image") > 0


async def test_without_trouble_the_equalities_are_exact(tmp_path: Path) -> None:
    """What was read is what was installed; each page is one fault, or came with one."""
    async with scraped(tmp_path, BufferSource(image(SIZE)), chunk=4 * PAGE) as (server, scrape):
        async with StandInVmm.start(server.path, SIZE) as guest:
            await eventually(lambda: server.served == 1, "it is served")
            await guest.read(0, SIZE)
            check_accounts(await scrape())
            now = await scrape()  # whether all of it is there is found out a little later
            assert now("sessions", "serving") + now("sessions", "resident") == 1
            assert (await scrape())("memory_bytes") == SIZE
        await eventually(lambda: not server.sessions, "it has ended")
        last = await scrape()
        assert last.sum("source_bytes_total") == last.sum("installed_bytes_total") == SIZE
        assert last("installed_bytes_total", "demand") == SIZE // 4
        assert last("faults_total") == last("faults_ended_total", "copy") == SIZE // PAGE // 4
        assert last("memory_bytes") == 0


async def test_what_came_ahead_is_told_apart(tmp_path: Path) -> None:
    """Bytes on demand and ahead are what the source gave; resident is a state of its own."""
    source = BufferSource(image(SIZE))
    async with scraped(tmp_path, source, hydrate=Pace.FULL) as (server, scrape):
        async with StandInVmm.start(server.path, SIZE) as guest:
            await guest.read(SIZE - PAGE)
            await eventually(lambda: server.states()[State.RESIDENT], "all is there")
            now = await scrape()
            check_accounts(now)
            assert now.sum("installed_bytes_total") == SIZE
            assert now("prefetched_bytes_total", "hydration") == now(
                "installed_bytes_total", "ahead"
            )
            assert now("prefetched_bytes_total", "replay") == 0
            in_vain = now("prefetched_in_vain_bytes_total")
            assert now.sum("source_bytes_total") == SIZE + in_vain
        await eventually(lambda: not server.sessions, "it has ended")
        assert (await scrape())("prefetched_bytes_total", "hydration") > 0
        check_accounts(await scrape())


async def test_parked_faults_are_counted(tmp_path: Path) -> None:
    """A target that gives memory back without pause makes fills wait; they end all the same."""
    async with scraped(tmp_path, BufferSource(image(SIZE))) as (server, scrape):
        async with StandInVmm.start(server.path, SIZE) as guest:
            await eventually(lambda: server.served == 1, "it is served")
            for _ in range(200):
                removing = [guest.tell("remove", n * 8 * PAGE, 4 * PAGE) for n in range(8)]
                reading = [guest.tell("read", (n * 8 + 5) * PAGE) for n in range(8)]
                await asyncio.gather(*removing, *reading)
                check_accounts(await scrape())
                if (await scrape())("faults_parked_total"):
                    break
                await guest.ask("remove", 0, SIZE)
        await eventually(lambda: not server.sessions, "it has ended")
        check_accounts(await scrape())


async def test_what_can_come_is_there_at_zero(tmp_path: Path) -> None:
    """A first failure is then an increase, which a rate can see."""
    async with scraped(tmp_path, BufferSource(b"")) as (_, scrape):
        first = await scrape()
        assert all(first("faults_ended_total", outcome) == 0 for outcome in OUTCOMES)
        assert all(first("faults_failed_total", action.value) == 0 for action in Action)
        assert first("sessions_ended_total", "detached") == 0
        assert first("info", _version()) == 1
        assert first.values["process_open_fds",] > 0
        assert first.values["process_resident_memory_bytes",] > 1 << 20


def _version() -> str:
    import aiouffd

    return aiouffd.__version__


async def test_without_the_package_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip install 'aiouffd[metrics]'."""
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ImportError, match=r"pip install 'aiouffd\[metrics\]'"):
        async with scraped(tmp_path, BufferSource(b"")):
            pass


async def test_what_clones_share_is_told_as_the_kernel_sees_it(tmp_path: Path) -> None:
    """Gauges of the one copy, of what clones map and of what they wrote; none without sharing."""
    copy = await SharedImage.fill(BufferSource(image(SIZE)))
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(copy.aclose)
        clones = [await stack.enter_async_context(cloned(copy)) for _ in range(3)]
        server = Server(tmp_path / "socket", firecracker.receive, copy, report=lambda _: None)
        await stack.enter_async_context(server)
        sessions = [session for _, session in clones]
        server.sessions.update(sessions)
        stack.callback(server.sessions.difference_update, sessions)
        for number, (clone, _) in enumerate(clones):
            assert await clone.start_read(0) == copy.read_nowait(0, 1)[0]
            assert await clone.start_write(9, number + 1) == number + 1
        scrape = Scrape(await text_of(Status(server, shared=copy))())
        assert scrape("sharing_clones") == 3
        assert scrape("sharing_image_bytes") == SIZE
        assert scrape("sharing_hole_bytes") == 0
        assert scrape("sharing_mapped_bytes") == 3 * PAGE
        assert scrape("sharing_private_bytes") == 3 * PAGE
        assert scrape("sharing_saved_bytes") == 3 * PAGE - SIZE
        assert scrape.types["aiouffd_sharing_saved_bytes"] == "gauge"  # it may sink
        alone = Scrape(await text_of(Status(server))())
        assert not any(name.startswith("aiouffd_sharing_") for name, *_ in alone.values)
