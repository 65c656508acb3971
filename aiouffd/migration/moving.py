"""Moving: a program that can move (``program.Movable``), sent away or received.

Knows: what is said to such a program, who it is, how one is started for what arrives.
Must not know: what goes over the network, and when.

Laws of this file:

* A program is held by a pidfd from the first word on: its number may come to mean another.
* What a program says is checked like what any peer says.
* A program that does not run where it has arrived is ended, and the other side hears of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import subprocess
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Any, Final, Self

from ..dirty import DirtyTracker
from ..errors import MigrationFailed, PeerError, UffdError
from ..failure import Action, FailurePolicy
from ..fds import OwnedFd
from ..handover import Peer, pin_peer
from ..pager import Pager
from ..threads import in_thread
from ..uffd import Userfaultfd
from ..unix_socket import Connection
from . import program
from .incoming import Incoming
from .memory import Landing, SourceMemory, is_memfd, seal
from .stages import Stage
from .wire import Extent, text_of

log: Final = logging.getLogger("aiouffd.migration")


_SHORT_STATE: Final = 1 << 20  # bytes
_A_MOMENT: Final = 2.0  # seconds that a program which says nothing may take to end
_ENDED: Final = "the program has ended"


class _Line:
    """Lines of JSON and descriptors, asked and answered in turn."""

    def __init__(self, connection: Connection) -> None:
        self.connection: Final = connection
        self._rest = b""
        self._owed = 0  # answers that have not been heard yet

    async def hear(self) -> tuple[dict[str, Any], list[OwnedFd]]:
        """Wait for what is said.

        Raises:
            PeerError: It is no JSON object, too long, an error, or there is nothing any more.
        """
        fds: list[OwnedFd] = []
        try:
            while b"\n" not in self._rest:
                if len(self._rest) > program.MAX_LINE:
                    raise PeerError(f"said a line of more than {program.MAX_LINE} bytes")
                data, more = await self.connection.receive()
                fds += more
                if len(fds) > program.MAX_FDS:
                    raise PeerError("sent more descriptors than there is room for")
                if not data:
                    raise PeerError("has gone without an answer")
                self._rest += data
            line, _, self._rest = self._rest.partition(b"\n")
            value = json.loads(line)
            if not isinstance(value, dict):
                raise PeerError("said something that is no JSON object")
            if "error" in value:
                raise PeerError(f"cannot: {str(value['error'])[:200]}")
        except ValueError as error:
            _close(fds)
            raise PeerError(f"said something that is no JSON: {error}") from error
        except OSError as error:
            _close(fds)
            raise PeerError(f"has gone: {error.strerror}") from error
        except BaseException:
            _close(fds)
            raise
        return value, fds

    async def say(self, value: dict[str, Any], fds: Sequence[OwnedFd | int] = ()) -> None:
        """Say something.

        Raises:
            PeerError: Nobody listens any more.
        """
        try:
            await self.connection.send(json.dumps(value).encode() + b"\n", fds)
        except OSError as error:
            raise PeerError(f"has gone: {error.strerror}") from error

    async def ask(self, **order: Any) -> tuple[dict[str, Any], list[OwnedFd]]:
        """Say something, and wait for the answer.

        Cancellation: the answer is dropped before the next one is taken.
        """
        await self.say(order)
        self._owed += 1
        while self._owed > 1:
            with contextlib.suppress(PeerError):  # of no interest any more; it may have gone, too
                _close((await self._answer())[1])
        return await self._answer()

    async def _answer(self) -> tuple[dict[str, Any], list[OwnedFd]]:
        try:
            found = await self.hear()
        except PeerError:
            self._owed -= 1
            raise
        self._owed -= 1
        return found


class Leaving:
    """A program that is to be sent away; an ``outgoing.Program``.

    ::

        async with await Leaving.open("/run/worker.sock") as leaving:
            outgoing = Outgoing(leaving.memory, host, port, tracker=leaving.tracker)
            await outgoing.run(leaving)
            await leaving.end()

    Attributes:
        name: What it calls itself.
        peer: Who it is.
        memory: Its regions.
        tracker: Knows them, too; None where it could not be had, see ``untracked``.
        untracked: Why there is no tracker.
        stage: How it stood when it was asked: ``running``, ``stopped`` or ``left``.

    Sharing: the loop's thread.
    """

    def __init__(self, line: _Line, peer: Peer) -> None:
        self.name = ""
        self.peer: Final = peer
        self.memory: list[SourceMemory] = []
        self.tracker: DirtyTracker | None = None
        self.untracked = ""
        self.stage = ""
        self._line: Final = line
        self._uffd: Userfaultfd | None = None

    @classmethod
    async def open(cls, path: str | os.PathLike[str], *, timeout: float = 10.0) -> Self:
        """Connect to a program that can move.

        Args:
            path: Of its socket.
            timeout: Seconds until it has said what there is to move.

        Raises:
            OSError: Nobody listens there.
            PeerError: It says something else than it should, or nothing.

        Cancellation: the program runs on.
        """
        line = _Line(await Connection.open(path))
        try:
            leaving = cls(line, pin_peer(line.connection.socket, allow_pid_race=True))
        except BaseException:
            line.connection.close()
            raise
        try:
            async with asyncio.timeout(timeout):
                description, fds = await line.ask(do="describe")
            try:
                leaving._take(description, fds)
            finally:
                _close(fds)
        except TimeoutError as error:
            leaving.close()
            raise PeerError(f"said nothing for {timeout:g} s", str(leaving.peer)) from error
        except PeerError as error:
            leaving.close()
            raise PeerError(str(error), str(leaving.peer)) from error
        except BaseException:
            leaving.close()
            raise
        return leaving

    def _take(self, description: dict[str, Any], fds: list[OwnedFd]) -> None:
        regions = description.get("regions")
        if description.get("version") != program.VERSION:
            raise PeerError(f"speaks version {description.get('version')!r} of the protocol")
        if not isinstance(regions, list) or not 0 < len(regions) <= program.MAX_REGIONS:
            raise PeerError("has no regions that can move")
        tracked = "untracked" not in description
        if len(fds) != len(regions) + tracked:
            raise PeerError(f"gave {len(fds)} descriptors for {len(regions)} regions")
        self.name = text_of(description.get("name"))
        self.stage = text_of(description.get("stage"))
        self.untracked = text_of(description.get("untracked"))
        starts = []
        for each, fd in zip(regions, fds, strict=False):
            if not isinstance(each, dict) or not isinstance(each.get("start"), int):
                raise PeerError("described a region without a start")
            if not 0 <= each["start"] < 1 << 56:
                raise PeerError(f"has a region at {each['start']:#x}")
            extent = Extent.checked(each.get("name"), each.get("length"), each.get("page_size"))
            if os.fstat(fd.fileno()).st_size < extent.length:
                raise PeerError(f"has a region {extent.name!r} whose memfd is shorter than it says")
            self.memory.append(SourceMemory(fd.fileno(), extent))
            starts.append(each["start"])
        if not tracked:
            return
        self._uffd = Userfaultfd.adopt(fds[-1].detach())
        self.tracker = DirtyTracker(self._uffd, pid=self.peer.pid, pidfd=self.peer.pidfd.fileno())
        for start, memory, fd in zip(starts, self.memory, fds, strict=False):
            extent = memory.extent
            self.tracker.add(start, extent.length, page_size=extent.page_size, file=fd.fileno())

    async def stop(self) -> bytes:
        """Let it stand still; give its state."""
        _, fds = await self._line.ask(do="stop")
        try:
            if len(fds) != 1:
                raise PeerError("stopped without giving its state")
            fd = fds[0].fileno()
            if is_memfd(fd) and os.fstat(fd).st_size <= _SHORT_STATE:
                return program.read_state(fd)  # a thread would take longer, and nothing runs now
            return await in_thread(program.read_state, fd)
        finally:
            _close(fds)

    async def restart(self) -> None:
        """Let it go on here."""
        _close((await self._line.ask(do="restart"))[1])

    async def leave(self) -> None:
        """Tell it that it may run elsewhere from now on."""
        _close((await self._line.ask(do="leave"))[1])

    async def end(self) -> None:
        """Tell it that it has moved: it may exit."""
        _close((await self._line.ask(do="end"))[1])

    def close(self) -> None:
        """Let go of it: unless it has left, it runs on."""
        if self.tracker is not None:
            self.tracker.close()
        if self._uffd is not None:
            self._uffd.close()
        for memory in self.memory:
            memory.close()
        self.peer.close()
        self._line.connection.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class Arriving:
    """A program that is started for what arrives, and gets its memory from there.

    Made by ``arriving``.

    Attributes:
        process: The program.
        pager: Serves its faults.
        is_complete: It has all of its memory, and lives on by itself.

    Sharing: the loop's thread.
    """

    def __init__(
        self,
        incoming: Incoming,
        process: subprocess.Popen[bytes],
        line: _Line,
        pager: Pager,
    ) -> None:
        self.process: Final = process
        self.pager: Final = pager
        self.is_complete = False
        self._incoming = incoming
        self._line = line

    async def run(self, *, timeout: float = 60.0) -> None:
        """Wait for the switch, and let the program run.

        Args:
            timeout: Seconds that the program may take to say that it runs.

        Raises:
            MigrationFailed: It runs on at the source; or, with outcome ``lost``, it was let run and
                has not said that it does: what it has done by then nobody knows.

        Cancellation: the migration fails.
        """
        incoming = self._incoming
        state = await self._switched()
        fd = OwnedFd(program.state_file(state))
        if incoming.stage is not Stage.SWITCHING:  # the source has heard by then that it failed
            fd.close()
            await incoming.wait_done()  # says why there is no going on
        incoming.note_starting()  # from here to the word itself nothing may come between
        try:
            async with asyncio.timeout(timeout):
                await self._line.say({"do": "run"}, [fd])
                answer, fds = await self._line.hear()
            _close(fds)
            if answer.get("stage") != "running":
                raise PeerError(f"said {str(answer)[:80]} where it should run")
        except (PeerError, TimeoutError) as error:
            _kill(self.process)  # before the source hears of it
            text = str(error) or f"it has not said within {timeout:g} s that it runs"
            incoming.note_failed(f"the program was let run, and failed: {text}")
            raise MigrationFailed(
                f"the program was let run here, and failed: {text}",
                stage="switching",
                outcome="lost",
            ) from error
        finally:
            fd.close()
        if incoming.stage is not Stage.SWITCHING:  # there has been no line for too long
            await incoming.wait_done()  # says why there is no going on
        incoming.note_running(more=True)

    async def _switched(self) -> bytes:
        """Wait for the switch; give the state."""
        switched = asyncio.ensure_future(self._incoming.switched())
        gone = asyncio.ensure_future(self.pager.wait_closed())
        try:
            await asyncio.wait((switched, gone), return_when=asyncio.FIRST_COMPLETED)
            if self.process.poll() is not None or not switched.done():
                # Nothing has run here, and the source can go on with it.
                self._incoming.note_failed("the program has ended before it was let run")
            return await (self._incoming.switched() if switched.done() else switched)
        finally:
            for task in (switched, gone):
                task.cancel()
            await asyncio.wait((switched, gone))
            if not gone.cancelled():
                gone.exception()  # the program's end is said above

    async def complete(self, *, timeout: float = 60.0) -> None:
        """Wait until all of its memory is here, and let it live on by itself.

        Only then does the source hear that all is there: whoever ends this process before ends
        the program as well.

        Args:
            timeout: Seconds that the program may take to say that it lives by itself.

        Raises:
            MigrationFailed: That will not be.

        Cancellation: nothing happens; call again.
        """
        incoming, pager = self._incoming, self.pager
        here = asyncio.ensure_future(incoming.wait_here())
        gone = asyncio.ensure_future(pager.wait_closed())
        try:
            await asyncio.wait((here, gone), return_when=asyncio.FIRST_COMPLETED)
            if not here.done():
                failed = gone.exception()
                incoming.note_failed(
                    f"the program cannot be served: {failed}" if failed else _ENDED
                )
            await here
        finally:
            for task in (here, gone):
                task.cancel()
            await asyncio.wait((here, gone))
        # What is missing now was said to be zeros: that is what the kernel makes of it.
        try:
            await pager.aclose(Action.ZERO)
        except (UffdError, OSError) as error:
            incoming.note_failed(f"its memory cannot be left to it: {error}")
            raise MigrationFailed(str(error), stage="following", outcome="lost") from error
        try:
            async with asyncio.timeout(timeout):
                _close((await self._line.ask(do="complete"))[1])
        except (PeerError, TimeoutError) as error:
            if not await self._has_ended():
                text = str(error) or f"nothing for {timeout:g} s"
                text = f"it does not say that it lives by itself: {text}"
                incoming.note_failed(text)
                raise MigrationFailed(text, stage="following", outcome="lost") from error
            log.warning("the program has ended; it had all of its memory")
        if incoming.stage is not Stage.FOLLOWING:  # there has been no line for too long
            await incoming.wait_done()  # says so
        self.is_complete = True
        incoming.note_all_here()

    async def _has_ended(self) -> bool:
        """Say whether the program has ended, or does in a moment."""
        try:
            await in_thread(self.process.wait, _A_MOMENT)
        except subprocess.TimeoutExpired:
            return False
        return True

    def end(self) -> None:
        """Kill a program that has been let run and is not complete."""
        if self._incoming.may_run and not self.is_complete:
            self.process.kill()


@contextlib.asynccontextmanager
async def arriving(
    incoming: Incoming,
    command: Sequence[str],
    *,
    timeout: float = 60.0,
    failure: FailurePolicy | None = None,
    features: Sequence[str] | None = None,
) -> AsyncIterator[Arriving]:
    """Start a program for a migration, and serve its memory as long as the block runs.

    ::

        async with arriving(incoming, ["python", "worker.py"]) as program:
            await program.run()
            await program.complete()

    A program that is not complete at the end of the block is killed.

    Args:
        incoming: Not prepared yet; closed at the end.
        command: The program, which calls ``program.arrive``.
        timeout: Seconds that it may take until it has mapped its memory.
        failure: What becomes of faults that cannot be served; by default poison, at once.
        features: See ``Incoming.prepare``.

    Raises:
        MigrationFailed: The program cannot be started, or does not take its memory.

    Cancellation: the program is killed, the source hears that it failed.
    """
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(incoming.aclose)
        if len(incoming.extents) > program.MAX_REGIONS:
            text = f"a program takes {program.MAX_REGIONS} regions; it has {len(incoming.extents)}"
            incoming.refuse(text)
            raise MigrationFailed(text, outcome="source")
        fds = [stack.enter_context(_memfd(each.name, each.length)) for each in incoming.extents]
        landings = []
        for fd, extent in zip(fds, incoming.extents, strict=True):
            landing = Landing(fd.fileno(), extent.length)
            stack.callback(landing.close)
            landings.append(landing)
        try:
            process, line = _start(command)
        except OSError as error:
            incoming.refuse(f"the program cannot be started: {error}")
            raise MigrationFailed(
                f"{command[0]} cannot be started: {error.strerror}", outcome="source"
            ) from error
        stack.callback(line.connection.close)
        try:
            async with asyncio.timeout(timeout):
                uffd, starts = await _hand_over(incoming, line, fds)
            pidfd = stack.enter_context(OwnedFd(os.pidfd_open(process.pid)))
            pager = Pager(
                uffd,
                failure=failure if failure is not None else FailurePolicy(retries=0),
                deadline=None,  # the migration has one of its own
                target=pidfd.fileno(),
                observers=(incoming.stalls,),
            )
            await stack.enter_async_context(pager)
            for number, (start, extent) in enumerate(zip(starts, incoming.extents, strict=True)):
                region = pager.register(
                    start,
                    extent.length,
                    incoming.handler(number),
                    page_size=extent.page_size,
                    name=extent.name,
                )
                incoming.attach(number, region)
            await incoming.prepare(landings, features=features)
        except (UffdError, OSError) as error:
            _kill(process)
            text = str(error) or f"it did not take its memory within {timeout:g} s"
            incoming.refuse(f"the program does not arrive: {text}")
            raise MigrationFailed(
                f"{command[0]} does not arrive: {text}", outcome="source"
            ) from error
        except BaseException:
            _kill(process)
            raise
        arrived = Arriving(incoming, process, line, pager)
        incoming.before_end = arrived.end
        try:
            yield arrived
        finally:
            if not arrived.is_complete:  # before its pager goes
                _kill(process)


def _start(command: Sequence[str]) -> tuple[subprocess.Popen[bytes], _Line]:
    """Start a program that can arrive."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with theirs:
            process = subprocess.Popen(
                list(command),
                pass_fds=(theirs.fileno(),),
                env={**os.environ, program.ARRIVAL_VARIABLE: str(theirs.fileno())},
            )
    except BaseException:
        ours.close()
        raise
    return process, _Line(Connection(ours))


async def _hand_over(
    incoming: Incoming, line: _Line, fds: Sequence[OwnedFd]
) -> tuple[Userfaultfd, list[int]]:
    """Give a program its memory; get its userfaultfd, and where the regions are."""
    await line.say(
        {
            "do": "arrive",
            "version": program.VERSION,
            "regions": [each._asdict() for each in incoming.extents],
        },
        fds,
    )
    answer, given = await line.hear()
    try:
        regions = answer.get("regions")
        if len(given) != 1 or not isinstance(regions, list) or len(regions) != len(fds):
            raise PeerError("did not give a userfaultfd and the places of its regions")
        starts = [each.get("start") if isinstance(each, dict) else None for each in regions]
        if not all(isinstance(start, int) and 0 <= start < 1 << 56 for start in starts):
            raise PeerError("gave a region without a start, or one that is no address")
        try:
            return Userfaultfd.adopt(given[0].detach()), [int(start or 0) for start in starts]
        except ValueError as error:
            raise PeerError(str(error)) from error
    finally:
        _close(given)


def _memfd(name: str, length: int) -> OwnedFd:
    short = name.encode()[:200].decode(errors="ignore")  # the kernel takes 249 bytes
    fd = OwnedFd(os.memfd_create(short, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    try:
        os.ftruncate(fd.fileno(), length)
        seal(fd.fileno())
    except BaseException:
        fd.close()
        raise
    return fd


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a program that must not run on; it is ours to reap."""
    process.kill()
    process.wait()


def _close(fds: Sequence[OwnedFd]) -> None:
    for fd in fds:
        fd.close()
