"""Restored tasks served by a server of restores: what each byte must be, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import resource
import signal
import zlib
from pathlib import Path

import pytest

from aiouffd import server
from aiouffd.errors import SourceError
from aiouffd.failure import Action, FailurePolicy
from aiouffd.prefetch import Pace
from aiouffd.protocols.criu.checkpoint import Checkpoint
from aiouffd.protocols.criu.restore import Restores
from aiouffd.protocols.criu.task_source import TaskSource
from aiouffd.service import Service
from aiouffd.session_states import State
from aiouffd.sources import Source
from tests.protocols.criu.restoring import (
    EAGER,
    LAZY,
    Restorer,
    checkpoint_of,
    daemon,
    image_of,
    page_of,
    task,
)
from tests.targets import PAGE, Signal, Target, until

pytestmark = pytest.mark.root  # fork events take CAP_SYS_PTRACE

PUSH = Service(hydrate=Pace.FULL, let_go=True, warn_after=None)
QUIET = Service(warn_after=None)


async def words(target: Target, first: int = 0, count: int = 4) -> list[int | None]:
    """Read the first word of some pages."""
    return await target.start_words(target.at(first), PAGE, count, 5)


def expected(target: Target, first: int = 0, count: int = 4) -> list[int]:
    """Give what they must be."""
    return [page_of(target.pid, page) for page in range(first, first + count)]


async def holds_all(target: Target) -> bool:
    """Whether all of its memory is as in the images."""
    crc = await target.start_crc32(target.base, target.length)
    return crc == zlib.crc32(image_of(target.pid, target.pages))


# --- a restore -------------------------------------------------------------------------


async def test_tasks_are_served_before_the_restore_is_finished(tmp_path: Path) -> None:
    """Each from its own memory, as soon as it has come; a zombie takes nothing."""
    with task() as one, task() as two:
        images = checkpoint_of(tmp_path / "c", one, two, dead=[2])
        async with daemon(images, tmp_path / "s", service=QUIET) as running:
            with Restorer(running.path) as restore:
                restore.hand_over(two)
                assert await words(two) == expected(two)
                restore.send(-2)
                restore.hand_over(one)
                assert await words(one) == expected(one)
                assert not running.finished()
                restore.finish()
            await until(running.finished, "the restore is finished")
            assert await words(one, 60) == expected(one, 60)
            assert len(running.server.sessions) == 2


async def test_each_task_is_pinned_and_named(tmp_path: Path) -> None:
    """By itself, not by who has connected: its exit ends its session alone, and at once."""
    with task() as one, task() as two:
        images = checkpoint_of(tmp_path / "c", one, two)
        async with daemon(images, tmp_path / "s", service=QUIET) as running:
            with Restorer(running.path) as restore:
                restore.hand_over(one)
                restore.hand_over(two)
                restore.finish()
            await until(running.finished, "the restore is finished")
            session = running.session(one)
            assert session is not None
            assert session.peer is not None
            assert session.peer.pid == one.pid != os.getpid()
            assert session.name == f"task {one.pid}, pid {one.pid} (uid 0)"
            one.kill()
            await until(lambda: session.state is State.TARGET_GONE, "its session ends")
            await until(lambda: len(running.server.sessions) == 1, "the other one lives on")
            assert await words(two) == expected(two)


async def test_nothing_is_brought_before_all_is_registered(tmp_path: Path) -> None:
    """What cannot be copied for want of registration is not taken for brought."""
    with task() as one, task() as two:
        images = checkpoint_of(tmp_path / "c", one, two)
        async with daemon(images, tmp_path / "s", service=PUSH) as running:
            with Restorer(running.path) as restore:
                restore.hand_over(one, register=False)
                restore.hand_over(two)
                await until(lambda: len(running.sessions()) == 2, "both are served")
                completing = [asyncio.ensure_future(running.sessions()[0].complete())]
                assert await words(two) == expected(two)
                await asyncio.sleep(0.1)  # time to do what must not be done
                assert not running.detached()
                restore.register(one)
                restore.finish()
            await until(lambda: running.detached() == 2, "both have all of their memory")
            await asyncio.gather(*completing)
            for target in (one, two):
                assert await holds_all(target)
            await until(lambda: not running.server.sessions, "both sessions are over")


async def test_what_is_not_lazy_reads_zero(tmp_path: Path) -> None:
    """In a registered mapping, that is; what the restorer has put there stays."""
    runs = [(0, 8, LAZY), (8, 4, EAGER), (20, 4, LAZY)]
    with task() as target:
        images = checkpoint_of(tmp_path / "c", target, runs=runs)
        async with daemon(images, tmp_path / "s", service=PUSH) as running:
            target.start_poke64(target.at(9), 77).result()  # the restorer's: before it registers
            with Restorer(running.path) as restore:
                restore.hand_over(target)
                want = [*expected(target, 0, 8), 0, 77, *([0] * 10), *expected(target, 20, 4), 0, 0]
                assert await words(target, 0, 26) == want
                restore.finish()
            await until(running.detached, "all memory is there")
            assert await words(target, 0, 26) == want
            assert await words(target, 60) == [0, 0, 0, 0]


async def test_events_of_restored_tasks(tmp_path: Path) -> None:
    """A child forked before its pages came, memory moved twice and partly unmapped, and freed."""
    with task() as target:
        images = checkpoint_of(tmp_path / "c", target)
        async with daemon(images, tmp_path / "s", service=QUIET) as running:
            with Restorer(running.path) as restore:
                restore.hand_over(target)
                await until(lambda: running.session(target), "it is served")
                away, further = target.reserve(16 * PAGE), target.reserve(16 * PAGE)
                assert await target.start_mremap(16, 16, flags=3, to=away) == away
                child = await target.fork()
                assert (
                    await target.call("mremap", away, 16 * PAGE, 16 * PAGE, 3, further) == further
                )
                assert await target.call("munmap", further, 8 * PAGE) == 0
                assert await target.start_madvise(mmap.MADV_DONTNEED, 2, 2) == 0
                assert await target.start_words(further + 8 * PAGE, PAGE, 8) == expected(
                    target, 24, 8
                )
                assert isinstance(await target.start_peek(further), Signal)
                assert await words(target, 0, 6) == [
                    *expected(target, 0, 2),
                    0,
                    0,
                    *expected(target, 4, 2),
                ]
                # The child knows of what was before it, and of nothing behind.
                assert await child.start_words(away, PAGE, 16) == expected(target, 16, 16)
                assert await words(child, 0, 6) == expected(target, 0, 6)
                grandchild = await child.fork()
                assert await child.start_madvise(mmap.MADV_DONTNEED, 40, 4) == 0
                assert await words(grandchild, 40) == expected(target, 40)
                assert await words(child, 40) == [0, 0, 0, 0]
                restore.finish()
            await until(running.finished, "the restore is finished")
            session = running.session(target)
            assert session is not None
            await session.complete()
            assert await words(grandchild, 50) == expected(target, 50)
            assert await words(target, 2, 2) == [0, 0]
            assert await target.start_words(further + 8 * PAGE, PAGE, 8) == expected(target, 24, 8)


async def test_restores_at_once_and_after_each_other(tmp_path: Path) -> None:
    """One checkpoint, any number of times."""
    with task() as first:
        images = checkpoint_of(tmp_path / "c", first, dead=[7])
        async with daemon(images, tmp_path / "s", service=PUSH) as running:
            with (
                task(align=1 << 40) as other,  # memory elsewhere: only its bytes count
                Restorer(running.path) as one,
                Restorer(running.path) as two,
            ):
                assert other.pages == first.pages
                one.hand_over(first)
                two.send(-7)
                one.finish()
                await until(lambda: running.finished() == 1, "the first is finished")
                two.finish()
            await until(lambda: running.finished() == 2, "the second is finished")
            await until(running.detached, "it has all of its memory")
            assert await words(first) == expected(first)
            with Restorer(running.path) as three:
                three.finish()
            await until(lambda: running.finished() == 3, "the third is finished")
            assert not running.refusals()


# --- what goes wrong -------------------------------------------------------------------


async def test_a_restore_that_fails_midway(tmp_path: Path) -> None:
    """It is said why; what outlives it is closed by the policy, and reads no zeros."""
    with task() as one, task() as two:
        images = checkpoint_of(tmp_path / "c", one, two)
        async with daemon(images, tmp_path / "s", service=PUSH) as running:
            with Restorer(running.path) as restore:
                restore.hand_over(one)
                restore.hand_over(two)
                await until(lambda: len(running.sessions()) == 2, "both are served")
            await until(running.refusals, "the end is noticed")
            (reason,) = running.refusals()
            assert reason.startswith("the restore failed or was stopped: its connection ended")
            assert reason.endswith("after 2 tasks; the log of `criu restore` says why")
            two.kill()  # as criu does; one outlives it
            await until(lambda: running.ended() == 2, "both sessions end")
            assert not running.finished()
            touched = await one.start_peek(one.base)
            assert isinstance(touched, Signal)
            assert touched.number == signal.SIGBUS


async def test_a_restore_that_is_over_before_it_is_heard(tmp_path: Path) -> None:
    """It has said all there is: its tasks are served, though it has exited."""
    with task() as target:
        images = checkpoint_of(tmp_path / "c", target)
        async with daemon(images, tmp_path / "s", service=PUSH) as running:
            with Restorer(running.path, by_itself=True) as restore:
                restore.hand_over(target)
                restore.finish()
            await until(running.finished, "the restore is finished")
            assert not running.refusals()
            await until(running.detached, "it has all of its memory")
            assert await holds_all(target)


@pytest.mark.parametrize("handed_over", [False, True])
async def test_a_restore_that_fails_before_it_is_heard(tmp_path: Path, handed_over: bool) -> None:
    """It is said so, and where to look; its tasks, dead as it is, cost nothing."""
    with task() as target:
        images = checkpoint_of(tmp_path / "c", target)
        async with daemon(images, tmp_path / "s", service=QUIET) as running:
            with Restorer(running.path, by_itself=True) as restore:
                if handed_over:
                    restore.hand_over(target)
                    target.kill()
                    target.reap()
            await until(running.refusals, "the end is noticed")
            (reason,) = running.refusals()
            assert reason.startswith("the restore failed or was stopped")
            assert ("after 1 task;" in reason) == handed_over
            assert reason.endswith("; the log of `criu restore` says why")
            await until(lambda: running.ended() == handed_over, "its session ends")
            assert not running.server.failed


async def test_silent_peers_push_out_no_restore_that_has_begun(tmp_path: Path) -> None:
    """However many connect and say nothing: whose first task is served goes on."""
    with task() as one, task() as two, contextlib.ExitStack() as silent:
        images = checkpoint_of(tmp_path / "c", one, two)
        async with daemon(images, tmp_path / "s", service=QUIET, max_handshakes=2) as running:
            with Restorer(running.path) as restore:
                restore.hand_over(one)
                await until(lambda: len(running.sessions()) == 1, "the first is served")
                for _ in range(5):
                    silent.enter_context(Restorer(running.path))
                await until(lambda: len(running.refusals()) == 3, "two may be silent, not more")
                assert all("too many peers" in reason for reason in running.refusals())
                restore.hand_over(two)
                restore.finish()
            await until(running.finished, "the restore is finished")
            assert await holds_all(one)
            assert await holds_all(two)
            one.kill()
            two.kill()


async def test_a_silent_peer_does_not_hold_up_a_drain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is ended after a last call; a restore that has begun has all the time it needs."""
    monkeypatch.setattr(server, "_LAST_CALL", 0.05)
    with task() as one, task() as two:
        images = checkpoint_of(tmp_path / "c", one, two)
        async with daemon(images, tmp_path / "s", service=QUIET) as running:
            with Restorer(running.path), Restorer(running.path) as restore:
                restore.hand_over(one)
                await until(lambda: len(running.server.handshakes) == 2, "both are there")
                await until(lambda: len(running.sessions()) == 1, "the first is served")
                draining = asyncio.ensure_future(running.server.drain())
                await until(running.refusals, "the silent one is ended")
                assert "nothing was handed over" in running.refusals()[0]
                restore.hand_over(two)
                restore.finish()
                await until(running.finished, "the restore is finished")
                assert len(running.refusals()) == 1
                assert await holds_all(two)
                one.kill()
                two.kill()
                await draining


async def test_a_task_of_other_images_is_killed(tmp_path: Path) -> None:
    """Its memory is not known, and closing its userfaultfd would make zeros of it."""
    with task() as target:
        images = checkpoint_of(tmp_path / "c", dead=[2])
        async with daemon(images, tmp_path / "s", service=QUIET) as running:
            with Restorer(running.path) as restore:
                restore.hand_over(target)
                await until(running.refusals, "it is refused")
            (reason,) = running.refusals()
            assert reason.startswith(f"task {target.pid} is restored, but there is no process")
            assert reason.endswith("is it a restore of other images?")
            assert target.reap() == -signal.SIGKILL


@pytest.mark.parametrize(
    ("count", "reason"),
    [
        (None, "while it handed task {} over"),
        (0, "task {} handed no descriptors over"),
        (1, "what task {} handed over is no userfaultfd"),
        (2, "task {} handed 2 descriptors over"),
    ],
)
async def test_hostile_tasks_leave_nothing(tmp_path: Path, count: int | None, reason: str) -> None:
    """No descriptor stays, whatever comes in the place of one userfaultfd."""
    with task() as target:
        images = checkpoint_of(tmp_path / "c", target)
        async with daemon(images, tmp_path / "s", service=QUIET) as running:
            pipe = os.pipe()
            before = len(os.listdir("/proc/self/fd"))
            with Restorer(running.path) as restore:
                restore.send(target.pid, None if count is None else pipe[:count])
            await until(running.refusals, "it is refused")
            assert reason.format(target.pid) in running.refusals()[0]
            assert len(os.listdir("/proc/self/fd")) == before
            for fd in pipe:
                os.close(fd)
            with Restorer(running.path) as restore:  # the next one is served
                restore.hand_over(target)
                assert await words(target) == expected(target)
                target.kill()


@pytest.mark.parametrize("free", [0, 1, 2])
async def test_a_task_waits_for_descriptors(
    tmp_path: Path, free: int, caplog: pytest.LogCaptureFixture
) -> None:
    """None or too few for what it sends, or to look at it: it is served later, and all of it."""
    with task() as target:
        images = checkpoint_of(tmp_path / "c", target)
        async with daemon(images, tmp_path / "s", service=QUIET) as running:
            with Restorer(running.path) as restore:
                await until(lambda: running.server.handshakes, "it is connected")
                restore.hand_over(target)
                restore.finish()  # and lives on, whatever becomes of the connection
                holes = [os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)]
                highest = max(map(int, os.listdir("/proc/self/fd")))
                while len(holes) < free or holes[-1] < highest:
                    holes.append(os.dup(holes[0]))
                soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
                try:
                    resource.setrlimit(resource.RLIMIT_NOFILE, (max(holes) + 1, hard))
                    for _ in range(free):
                        os.close(holes.pop())
                    for _ in range(20):
                        await asyncio.sleep(0.001)
                    assert not running.reports
                finally:
                    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
                    for fd in holes:
                        os.close(fd)
            await until(running.finished, "the restore is finished")
            assert running.sessions()[0].peer is not None
            assert await words(target) == expected(target)
    assert len(caplog.records) == 1
    assert ("raise its limit (ulimit -n, LimitNOFILE=)" in caplog.text) == (free < 2)


async def test_dead_tasks_without_end_are_refused_at_once(tmp_path: Path) -> None:
    """Whoever sends one number after the other would hold the loop as long as it can count."""
    with task() as target:
        images = checkpoint_of(tmp_path / "c", target, dead=[2])
        async with daemon(images, tmp_path / "s", service=QUIET) as running:
            before = len(os.listdir("/proc/self/fd"))
            with Restorer(running.path) as restore:
                for pid in (2, 3, 4, 5):
                    restore.send(-pid)
                await until(running.refusals, "it is refused")
            assert "dead task 3 is restored, but there is none" in running.refusals()[0]
            assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("known", [True, False])
async def test_a_task_that_somebody_else_hands_over(tmp_path: Path, known: bool) -> None:
    """Behind a relay the sender is not the task, and is not taken for it; who is, is looked for."""
    with task() as target, task() as other:
        numbered = target if known else other
        images = checkpoint_of(tmp_path / "c", numbered)
        async with daemon(images, tmp_path / "s", service=QUIET) as running:
            if not known:
                other.kill()
                other.reap()
            with Restorer(running.path) as restore:
                restore.send(numbered.pid, [target.uffd])
                target.call("close", target.uffd_there).result()
                await until(running.sessions, "it is served")
                session = running.sessions()[0]
                assert (session.peer is not None) == known
                assert session.peer is None or session.peer.pid == target.pid
                restore.register(target)
                if known:
                    assert await words(target) == expected(target)
                restore.finish()
            target.kill()
            await until(lambda: session.state is State.TARGET_GONE, "its end is noticed")


class FailingParts:
    """Parts whose source fails for a while."""

    def __init__(self, restores: Restores, failures: int) -> None:
        self._restores = restores
        self.failures = failures

    async def open_part(self, part: str) -> Source:
        source = await self._restores.open_part(part)
        assert isinstance(source, TaskSource)
        read_nowait, read, readinto_nowait = (
            source.read_nowait,
            source.read,
            source.readinto_nowait,
        )

        def failing_nowait(offset: int, length: int) -> object:
            return None if self.failures else read_nowait(offset, length)

        def failing_into(offset: int, buffer: memoryview) -> bool:
            return not self.failures and readinto_nowait(offset, buffer)

        async def failing(offset: int, length: int) -> object:
            if self.failures:
                self.failures -= 1
                raise SourceError("out of order for a while")
            return await read(offset, length)

        source.read_nowait = failing_nowait  # type: ignore[method-assign, assignment]
        source.read = failing  # type: ignore[method-assign, assignment]
        source.readinto = None  # type: ignore[method-assign, assignment]
        source.readinto_nowait = failing_into  # type: ignore[method-assign]
        return source


async def test_a_source_that_fails_for_a_while(tmp_path: Path) -> None:
    """What could not be pushed is pushed later; the target is let go when all is there."""
    with task() as target:
        images = checkpoint_of(tmp_path / "c", target)
        async with await Checkpoint.open(images) as checkpoint:
            parts = FailingParts(Restores(checkpoint), 3)
            async with daemon(images, tmp_path / "s", service=PUSH, source=parts) as running:
                with Restorer(running.path) as restore:
                    restore.hand_over(target)
                    restore.finish()
                await until(running.detached, "it has all of its memory")
                assert not parts.failures
                assert await holds_all(target)


async def test_files_of_pages_that_are_missing(tmp_path: Path) -> None:
    """A task whose pages cannot be had is refused, settled by the policy, and named."""
    with task() as one, task() as two:
        images = checkpoint_of(tmp_path / "c", one, two)
        (images / "pages-2.img").unlink()
        policy = FailurePolicy(then=Action.KILL)
        service = Service(failure=policy, on_close=Action.KILL, warn_after=None)
        async with daemon(images, tmp_path / "s", service=service) as running:
            with Restorer(running.path) as restore:
                restore.hand_over(two)
                await until(running.refusals, "it is refused")
                assert "pages-2.img" in running.refusals()[0]
                assert two.reap() == -signal.SIGKILL
                restore.hand_over(one)
                assert await words(one) == expected(one)
                restore.finish()
            await until(running.finished, "the rest goes on")
            one.kill()
