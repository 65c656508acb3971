"""``aiouffd criu lazy-pages`` as a process: its options, its lines, its ends.

The restores are stand-ins (tests/protocols/criu/restoring.py); tests/interop has CRIU itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import mmap
import os
import resource
import signal
import socket
import sys
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import pytest

from aiouffd.cli import main
from aiouffd.working_set import WorkingSet
from tests.protocols.criu.restoring import (
    FEATURES,
    Restorer,
    checkpoint_of,
    image_of,
    page_of,
    task,
)
from tests.stand_in_vmm import ROOT
from tests.targets import DEADLINE, MAP_FIXED, PAGE, Signal, Target, until

pytestmark = [pytest.mark.root, pytest.mark.once]

_PASSED_OVER: Final = {"first_page", "resident"}


class Daemon:
    """A running ``aiouffd criu lazy-pages --json``."""

    def __init__(self, process: asyncio.subprocess.Process, path: Path) -> None:
        self.process = process
        self.path = path

    async def event(self, name: str) -> dict[str, Any]:
        """Read its next line, which has to be this event; milestones are passed over."""
        (fields,) = await self.events(name)
        return fields

    async def events(self, *names: str) -> list[dict[str, Any]]:
        """Read its next lines, which have to be these events, in whatever order they come."""
        found = [await self._next(set(names)) for _ in names]
        assert sorted(fields["event"] for fields in found) == sorted(names), found
        return sorted(found, key=lambda fields: names.index(fields["event"]))

    async def _next(self, names: set[str]) -> dict[str, Any]:
        while True:
            assert self.process.stdout is not None
            async with asyncio.timeout(DEADLINE):
                line = await self.process.stdout.readline()
            if not line:
                assert self.process.stderr is not None
                raise AssertionError((await self.process.stderr.read()).decode())
            fields: dict[str, Any] = json.loads(line)
            if fields["event"] not in _PASSED_OVER - names:
                return fields

    def kill(self) -> None:
        """Kill the daemon that a keeper runs."""
        (child,) = self.children()
        os.kill(child, signal.SIGKILL)

    def children(self) -> list[int]:
        """Give the daemon that a keeper runs."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        try:
            return [int(pid) for pid in children.read_text().split()]
        except (FileNotFoundError, ProcessLookupError):  # it has ended
            return []

    async def end(self) -> int:
        """Wait for its exit status."""
        async with asyncio.timeout(DEADLINE):
            return await self.process.wait()

    async def errors(self) -> str:
        """Read what it said on stderr, to its end."""
        assert self.process.stderr is not None
        return (await self.process.stderr.read()).decode()


@contextlib.asynccontextmanager
async def lazy_pages(
    images: Path,
    *options: object,
    listens: bool = True,
    work: Path | None = None,
    keep: bool = False,
) -> AsyncIterator[Daemon]:
    """Run the command, until it listens."""
    process = await asyncio.create_subprocess_exec(
        *((sys.executable, "-m", "aiouffd", "keep", "--") if keep else ()),
        *(sys.executable, "-m", "aiouffd", "criu", "lazy-pages", "-D", os.fspath(images)),
        *(() if work is None else ("-W", os.fspath(work))),
        *map(str, options),
        "--json",
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    daemon = Daemon(process, (work or images) / "lazy-pages.socket")
    try:
        if listens:
            listening = await daemon.event("listening")
            assert listening["socket"] == os.fspath(daemon.path)
        yield daemon
    finally:
        children = daemon.children() if keep else []
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        for child in children:  # it would live on, and hold the pipes that are read here
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        await process.communicate()


async def holds_all(target: Target) -> bool:
    """Whether all of its memory is as in the images."""
    crc = await target.start_crc32(target.base, target.length)
    return crc == zlib.crc32(image_of(target.pid, target.pages))


async def test_one_restore_and_its_end(tmp_path: Path) -> None:
    """The process gets all of its memory and lives on; then the command ends with 0."""
    with task() as target:
        images = checkpoint_of(tmp_path / "c", target, dead=[2])
        async with lazy_pages(images) as daemon:
            with Restorer(daemon.path) as restore:
                restore.hand_over(target)
                started = await daemon.event("started")
                assert started["part"] == str(target.pid)
                assert started["pid"] == target.pid
                assert started["dialect"] == "criu"
                restore.finish()
            assert (await daemon.event("handed_over"))["sessions"] == 1
            await daemon.event("detached")
            assert (await daemon.event("ended"))["filled_bytes"] == target.length
            stopped = await daemon.event("stopped")
            assert (stopped["restores"], stopped["failed_restores"]) == (1, 0)
            assert await daemon.end() == 0
        assert not daemon.path.exists()
        assert await holds_all(target)


async def test_pages_that_are_not_there_are_missed_at_once(tmp_path: Path) -> None:
    """Before a process has been restored that would wait for them."""
    with task() as target:
        images = checkpoint_of(tmp_path / "c", target)
        (images / "pages-1.img").rename(tmp_path / "pages-1.img")
        async with lazy_pages(images, listens=False) as daemon:
            assert await daemon.errors() == "aiouffd: pages-1.img: No such file or directory\n"
            assert await daemon.end() == 1
        assert not daemon.path.exists()
        async with lazy_pages(images, "--images", tmp_path) as daemon:
            daemon.process.terminate()
            await daemon.event("draining")
            await daemon.event("stopped")
            assert await daemon.end() == 0


async def test_no_push_until_it_is_told_to_end(tmp_path: Path) -> None:
    """Nothing comes that nobody touches; SIGTERM brings the rest, and ends with 0."""
    with task() as target:
        images = checkpoint_of(tmp_path / "c", target)
        async with lazy_pages(images, "--no-push", "-W", tmp_path, work=tmp_path) as daemon:
            with Restorer(daemon.path) as restore:
                restore.hand_over(target)
                restore.finish()
            await daemon.event("started")
            await daemon.event("handed_over")
            await until(lambda: not daemon.path.exists(), "no further restore is waited for")
            assert await target.start_peek(target.at(3)) == page_of(target.pid, 3) & 255
            present = [bool(entry >> 63) for entry in target.pagemap(target.base, target.pages)]
            assert [page for page, there in enumerate(present) if there] == [3]
            daemon.process.terminate()
            assert (await daemon.event("draining"))["sessions"] == 1
            await daemon.event("detached")
            assert (await daemon.event("ended"))["copied_bytes"] == PAGE
            await daemon.event("stopped")
            assert await daemon.end() == 0
        assert await holds_all(target)


async def test_it_may_have_as_many_descriptors_as_there_are(tmp_path: Path) -> None:
    """A tree of processes takes more than are usual."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with task() as target:
        images = checkpoint_of(tmp_path / "c", target)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, soft, 512), hard))
        try:
            async with lazy_pages(images) as daemon:
                limits = resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert limits == (hard, hard)


async def test_targets_that_go_end_it(tmp_path: Path) -> None:
    """With everybody gone there is nothing left to do, pushed or not."""
    with task() as target:
        images = checkpoint_of(tmp_path / "c", target)
        async with lazy_pages(images, "--no-push") as daemon:
            with Restorer(daemon.path) as restore:
                restore.hand_over(target)
                restore.finish()
            await daemon.event("started")
            await daemon.event("handed_over")
            target.kill()
            assert (await daemon.event("ended"))["outcome"] == "target exited"
            await daemon.event("stopped")
            assert await daemon.end() == 0


async def test_a_restore_that_fails_ends_it_with_1(tmp_path: Path) -> None:
    """It says why."""
    with task() as target:
        images = checkpoint_of(tmp_path / "c", target)
        async with lazy_pages(images) as daemon:
            with Restorer(daemon.path) as restore:
                restore.hand_over(target)
                await daemon.event("started")
            assert "the restore failed" in (await daemon.event("refused"))["reason"]
            target.kill()
            await daemon.event("ended")
            assert (await daemon.event("stopped"))["failed_restores"] == 1
            assert await daemon.end() == 1


async def test_a_second_signal_closes_by_the_policy(tmp_path: Path) -> None:
    """The first waits for pages that cannot be had; the second poisons, status 3."""
    with task() as target:
        images = checkpoint_of(tmp_path / "c", target)
        async with lazy_pages(images) as daemon:
            with Restorer(daemon.path) as restore:
                restore.hand_over(target)
                await daemon.event("started")
                os.truncate(images / "pages-1.img", 8 * PAGE)  # the rest is gone for good
                restore.finish()
            await daemon.event("handed_over")
            daemon.process.terminate()
            await daemon.event("draining")
            daemon.process.terminate()
            assert (await daemon.event("aborting"))["sessions"] == 1
            await daemon.event("ended")
            await daemon.event("stopped")
            assert await daemon.end() == 3
        touched = await target.start_peek(target.at(60))
        assert isinstance(touched, Signal)
        assert touched.number == signal.SIGBUS


@pytest.mark.parametrize("options", [("--restores", 2), ("--keep-serving",)])
async def test_several_restores(tmp_path: Path, options: tuple[object, ...]) -> None:
    """So many as were asked for, or until it is told to end."""
    with task() as target:
        images = checkpoint_of(tmp_path / "c", target)
        async with lazy_pages(images, *options) as daemon:
            with Restorer(daemon.path) as one:
                one.hand_over(target)
                one.finish()
            await daemon.event("started")
            await daemon.event("handed_over")
            await daemon.event("detached")
            await daemon.event("ended")
            assert daemon.path.exists()
            with Restorer(daemon.path) as two:
                two.finish()
            assert (await daemon.event("handed_over"))["sessions"] == 0
            if "--keep-serving" in options:
                daemon.process.terminate()
                await daemon.event("draining")
            assert (await daemon.event("stopped"))["restores"] == 2
            assert await daemon.end() == 0
        assert await holds_all(target)


async def test_restores_are_counted_over_crashes(tmp_path: Path) -> None:
    """One that was under way has failed by that; the log tells of all lives."""
    with task() as one, task() as two:
        images = checkpoint_of(tmp_path / "c", one, two)
        options = ("--restores", 3, "--no-push", "-o", "log", "-v3")
        async with lazy_pages(images, *options, keep=True) as daemon:
            with Restorer(daemon.path) as restore:
                restore.hand_over(one)
                restore.finish()
            await daemon.event("started")
            await daemon.event("handed_over")
            with Restorer(daemon.path) as cut:
                cut.hand_over(two)
                await daemon.event("started")
                daemon.kill()
            two.kill()
            await daemon.event("listening")
            *_, ended = await daemon.events("taken_over", "taken_over", "ended")
            assert ended["outcome"] == "target exited"
            assert await one.start_peek(one.at(3)) == page_of(one.pid, 3) & 255
            daemon.kill()
            await daemon.event("listening")
            await daemon.event("taken_over")
            with Restorer(daemon.path) as last:
                last.finish()
            await daemon.event("handed_over")
            await until(lambda: not daemon.path.exists(), "no further restore is waited for")
            daemon.kill()
            await daemon.event("listening")
            await daemon.event("taken_over")
            assert not daemon.path.exists()
            assert await one.start_peek(one.at(5)) == page_of(one.pid, 5) & 255
            one.kill()
            await daemon.event("ended")
            stopped = await daemon.event("stopped")
            assert (stopped["restores"], stopped["failed_restores"]) == (2, 1)
            assert await daemon.end() == 0
        log = (images / "log").read_text()
        assert log.count("were under way when the daemon before this one died: 1") == 1


def renew(target: Target) -> None:
    """Give a task fresh memory where its old memory was, to be restored once more."""
    assert target.call("munmap", target.base, target.length).result() == 0
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED
    where = target.call("mmap", target.base, target.length, 3, flags, -1, 0).result()
    assert where == target.base
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    target.uffd_there, target.uffd = target.open_uffd(FEATURES, flags, keep=True)


async def test_record_and_replay(tmp_path: Path) -> None:
    """One set per process, named by its pid in the images, brings what was touched before."""
    pattern, touched = tmp_path / "hot-{part}.set", range(0, 1000, 100)
    with task(1 << 10) as target:
        images = checkpoint_of(tmp_path / "c", target)
        async with lazy_pages(images, "--no-push", "--record", pattern) as daemon:
            with Restorer(daemon.path) as restore:
                restore.hand_over(target)
                restore.finish()
            for page in touched:
                await target.start_peek(target.at(page))
            daemon.process.terminate()
            for name in ("started", "handed_over", "draining", "detached", "ended", "stopped"):
                await daemon.event(name)
            assert await daemon.end() == 0
        pages = WorkingSet.load(tmp_path / f"hot-{target.pid}.set")
        assert list(pages.runs()) == [(page, 1) for page in touched]
        renew(target)
        async with lazy_pages(images, "--no-push", "--replay", pattern, "--any-image") as daemon:
            with Restorer(daemon.path) as restore:
                restore.hand_over(target)
                restore.finish()
            await until(lambda: target.is_present(900), "the set is brought")
            present = [bool(entry >> 63) for entry in target.pagemap(target.base, target.pages)]
            assert [n for n, there in enumerate(present) if there] == list(touched)
            target.kill()
            await daemon.event("started")
            await daemon.event("handed_over")
            assert (await daemon.event("ended"))["faults"] == 0


async def test_the_socket_of_a_dead_daemon_is_replaced(tmp_path: Path) -> None:
    """That of a living one is not, unless one says so; the living one hears nothing of it."""
    with task() as target:
        images = checkpoint_of(tmp_path / "c", target)
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(os.fspath(images / "lazy-pages.socket"))
        async with lazy_pages(images) as daemon:
            async with lazy_pages(images, listens=False) as second:
                assert await second.end() == 1
                assert "a server listens there" in await second.errors()
            async with lazy_pages(images, "--replace") as third:
                with Restorer(third.path) as restore:
                    restore.hand_over(target)
                    restore.finish()
                await third.event("started")
                await third.event("handed_over")
                await third.event("detached")
            assert daemon.process.returncode is None


async def test_in_the_background_as_criu_does(tmp_path: Path) -> None:
    """--daemon returns when it listens; --pidfile and --status-fd say so too, -o has the log."""
    with task() as target:
        images = checkpoint_of(tmp_path / "c", target)
        reading, writing = os.pipe()
        words = (
            "--daemon",
            "--pidfile",
            "lazy.pid",
            "--status-fd",
            writing,
            "-o",
            "lazy.log",
            "-v4",
        )
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "aiouffd", "criu", "lazy-pages", "-D", os.fspath(images)),
            *map(str, words),
            cwd=ROOT,
            pass_fds=[writing],
            stdin=asyncio.subprocess.DEVNULL,
        )
        os.close(writing)
        async with asyncio.timeout(DEADLINE):
            assert await process.wait() == 0
        with open(reading, "rb") as status:
            assert status.read() == b"\0"
        pid = int((images / "lazy.pid").read_text())
        pidfd = os.pidfd_open(pid)
        try:
            with Restorer(images / "lazy-pages.socket") as restore:
                restore.hand_over(target)
                restore.finish()
            await until(lambda: not (images / "lazy.pid").exists(), "it ends by itself")
        finally:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)
        assert await holds_all(target)
        assert "the restore is finished: 1 tasks" in (images / "lazy.log").read_text()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["-D", "{nowhere}"], "inventory.img: there is none in"),
        (
            ["-D", "{images}", "--port", "5"],
            "--address, --port and --tls are those of a --page-server",
        ),
        (["-D", "{images}", "--page-server"], "--page-server needs its --port"),
        (["-D", "{images}", "--page-server", "--port", "1"], "the page server 127.0.0.1:1 cannot"),
        (["-D", "{images}", "--tls-key", "k"], "need --tls"),
        (["-D", "{images}", "-W", "{open}"], "others may write to the socket's directory"),
        (["-D", "{images}", "--replay", "{nowhere}"], "No such file"),
        (["-D", "{damaged}"], "pages-1.img: No such file or directory"),
    ],
)
def test_what_cannot_be_done_is_said(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], options: list[str], reason: str
) -> None:
    """In one line, status 1."""
    with task() as target:
        images = checkpoint_of(tmp_path / "c", target)
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    checkpoint_of(tmp_path / "damaged", target)
    (tmp_path / "damaged" / "pages-1.img").unlink()
    places = {
        "damaged": tmp_path / "damaged",
        "nowhere": tmp_path / "nowhere",
        "images": images,
        "open": tmp_path / "open",
    }
    status = main(["criu", "lazy-pages", *(word.format(**places) for word in options)])
    assert status == 1
    assert reason in capfd.readouterr().err
