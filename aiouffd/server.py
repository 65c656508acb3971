"""Many sessions: accept peers, check and pin them, serve them, drain.

Knows: a listening socket, how to receive a hand-over (given as a function), a source.
Must not know: any protocol's bytes; command lines and signals.

Laws of this file:

* The accept loop never waits for a peer: each has a task of its own, with a time limit until
  it is served.
* A hostile or silent peer costs a bounded time and no descriptor; there are never more than
  ``max_handshakes`` of them, since the oldest goes when one more comes.
* A peer is admitted by the uid that the kernel names, and pinned before its message is read.
* Serving begins before the peer's hand-over is acknowledged.
* Beyond ``max_sessions`` a peer is refused when it has handed over, never before: what it
  handed over is settled by policy, or it would freeze.
* Draining refuses new peers and serves the living to their end.  A peer that has connected
  before is no new one: it may have handed over already, and would freeze.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import logging
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self, TypeAlias, assert_never

from .closing import settle
from .errors import PeerError, SourceError, StoreError, UffdError
from .failure import Action
from .fd_store import FdStore
from .handover import Handover, Peer, Receive, peer_credentials, pin_peer
from .manifest import Manifest
from .metrics import Observer
from .protection import Protection, new_name
from .reports import (
    Detached,
    Ended,
    FirstPage,
    Refused,
    Report,
    Resident,
    Started,
    TakenOver,
    log_report,
)
from .service import Service
from .session import Session, current_session
from .session_states import Milestone, State
from .sources import Extents, Source, identity_of
from .takeover import Stored, fail_closed, highest_id, inodes_of, name_sessions, take_groups
from .totals import Totals
from .unix_socket import Connection, Listener

log: Final = logging.getLogger("aiouffd.server")

_ACCEPT_BATCH: Final = 16  # connections per wake-up: other work of the loop must run too
_QUEUE: Final = 128  # connections that the kernel holds until they are accepted
_SHORTAGE_PAUSE: Final = 0.1  # seconds without accepting while descriptors are short
_SHORTAGES: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

LISTENER: Final = "aiouffd-listener-"  #: in the store; then the device and inode of its name

#: One source for all sessions, which stays its maker's to close; or a function that opens one
#: for each session, in a thread, which the session closes.
SourceOrOpener: TypeAlias = Source | Callable[[], Source]

#: One service for all sessions; or a function that gives each peer its own.  It may raise
#: PeerError to refuse one, whose memory is settled as ``Service()`` says.
ServiceOrChooser: TypeAlias = Service | Callable[[Peer, Handover], Service]


@dataclass(frozen=True, slots=True, eq=False)
class Handshake:
    """A peer that has connected and is not served yet.

    Attributes:
        peer: Who it is, as far as the kernel says.
        since: When it connected, in seconds of ``time.monotonic``.
        connection: Its connection.
    """

    peer: str
    since: float
    connection: Connection = field(repr=False)


class Server:
    """Serves every peer that hands its memory over on a socket.

    ::

        async with Server(path, firecracker.receive, lambda: FileSource(image)) as server:
            await server.wait_closed()

    Attributes:
        path: Where it listens.
        sessions: Those that live.
        served: How many have begun.
        refused: How many peers were not served.
        failed: How many ended sessions had a fault that failed.

    Sharing: the loop's thread.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | Listener,
        receive: Receive,
        source: SourceOrOpener,
        *,
        service: ServiceOrChooser | None = None,
        max_sessions: int | None = None,
        uids: Collection[int] | None = None,
        handshake_timeout: float = 10.0,
        max_handshakes: int = 64,
        allow_pid_race: bool = False,
        mode: int = 0o600,
        replace: bool = False,
        any_directory: bool = False,
        store: FdStore | None = None,
        report: Callable[[Report], None] = log_report,
        observers: Sequence[Observer] = (),
    ) -> None:
        """Prepare; nothing listens before ``async with``.

        Args:
            path: The socket's name; or one that listens already, taken over and closed.
            receive: Takes a new connection and gives the hand-over: a protocol.
            source: A source for all, or a function that opens one per session.  With the
                function a session keeps its file though another takes the name.
            service: How sessions serve, or a function that says so for each peer.
            max_sessions: Sessions at once; further peers are refused, and what is missing in
                their memory is settled by their service's ``on_close``.
            uids: Who may connect; None is the server's own user only.
            handshake_timeout: Seconds from the connection to the complete hand-over.
            max_handshakes: Peers at once that have not handed over yet.
            allow_pid_race: See pin_peer.
            mode: Rights of the socket.
            replace: Take the name over from a server that still listens there.
            any_directory: See Listener.bind.
            store: Keeps what sessions need to outlive this process, and gives back those that
                have; stays the caller's to close, after the server.
            report: Told of every session's start and end, and of every refusal.
            observers: Told of every fault and event of every session.
        """
        self._passed = path if isinstance(path, Listener) else None
        self.path: Final = path.path if isinstance(path, Listener) else os.fspath(path)
        self.sessions: set[Session] = set()
        self.served = 0
        self.refused = 0
        self.failed = 0
        self._ids = itertools.count(1)
        self._past = Totals()  # of ended sessions
        self._receive = receive
        self._source = source
        self._extents: Extents | None = None
        self._service: ServiceOrChooser = service if service is not None else Service()
        self._max_sessions = max_sessions
        self._admitted = 0  # sessions that live, and those about to
        self._uids = frozenset((os.geteuid(),) if uids is None else uids)
        self._handshake_timeout = handshake_timeout
        self._max_handshakes = max_handshakes
        self._allow_pid_race = allow_pid_race
        self._mode = mode
        self._replace = replace
        self._any_directory = any_directory
        self._store = store
        self._report = report
        self._observers = tuple(observers)
        self._listener: Listener | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._handshakes: dict[asyncio.Task[None], Handshake] = {}  # oldest first
        self._ended_why: dict[asyncio.Task[None], str] = {}  # handshakes that we have ended
        self._tasks: set[asyncio.Task[None]] = set()
        self._pause: asyncio.TimerHandle | None = None
        self._over = asyncio.Event()

    # --- what it knows -----------------------------------------------------------------

    @property
    def handshakes(self) -> list[Handshake]:
        """The peers that have connected and are not served yet, oldest first."""
        return list(self._handshakes.values())

    @property
    def draining(self) -> bool:
        """Whether it takes no new peers any more."""
        return self._loop is not None and self._listener is None

    def totals(self) -> Totals:
        """Add up what all sessions have done, those that have ended included."""
        return self._past.plus(self.sessions)

    async def totals_in_steps(self) -> Totals:
        """Do the same without holding the loop, see Totals.plus_in_steps."""
        return await self._past.plus_in_steps(self.sessions)

    def states(self) -> dict[State, int]:
        """Count the living sessions by state; handshakes are counted as such."""
        counts = Counter(session.state for session in self.sessions)
        counts[State.HANDSHAKING] += len(self._handshakes)
        return {state: counts[state] for state in State if not state.ended}

    # --- life --------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # What an error of ours ends lives on in the store, for the next server.
        left = isinstance(error, Exception) and self._store is not None and self._store.answers()
        await self.aclose(Action.HANG if left else None)

    async def start(self) -> None:
        """Open the source and begin to listen; ``async with`` does this.

        Raises:
            SourceError: The source cannot be opened: better now than with the first peer.
            OSError: The socket cannot be made, see Listener.bind.
        """
        self._loop = asyncio.get_running_loop()
        if callable(self._source):
            async with self._open_source():
                pass
        else:
            self._extents = await asyncio.to_thread(_extents_of, self._source)
        self._take_over()
        self._listener = (
            self._passed
            or self._take_listener()
            or Listener.bind(
                self.path,
                mode=self._mode,
                replace=self._replace,
                any_directory=self._any_directory,
                backlog=_QUEUE - 1,  # the kernel takes one more
            )
        )
        if self._passed is None:
            self._keep_listener(self._listener)
        self._loop.add_reader(self._listener.fileno(), self._on_connection)

    async def wait_closed(self) -> None:
        """Wait until the server was drained or closed.

        Cancellation: nothing happens to the server.
        """
        await self._over.wait()

    async def drain(self) -> None:
        """Refuse new peers, serve the living to their end, then close.

        The socket's name is free from the start on: a newer server may take it.  Peers that
        have connected before may still hand over, within the time limit.

        Cancellation: new peers stay refused; call again, or ``aclose``.
        """
        self._stop_listening()
        while self._tasks:
            await asyncio.wait(tuple(self._tasks))
        self._over.set()

    async def aclose(self, action: Action | None = None) -> None:
        """Refuse new peers and close every session; a second call does nothing more.

        Args:
            action: What becomes of the missing pages of living targets; None is the
                service's ``on_close``.

        Cancellation: some sessions may not be closed yet; call again.
        """
        self._stop_listening()
        for task in tuple(self._handshakes):
            self._end_handshake(task, "the server is closing")
        closing = [session.aclose(action) for session in tuple(self.sessions)]
        for failed in await asyncio.gather(*closing, return_exceptions=True):
            if isinstance(failed, BaseException):
                log.error("a session could not be closed as asked: %s", failed)
        await self.drain()

    def _stop_listening(self) -> None:
        if self._listener is None or self._loop is None:
            return
        listener, self._listener = self._listener, None
        self._loop.remove_reader(listener.fileno())
        if self._pause is not None:
            self._pause.cancel()
        # Who waits in the kernel's queue has connected, and may have handed over already.
        for _ in range(_QUEUE):
            try:
                connection = listener.accept()
            except OSError as error:
                log.warning("peers that had connected are lost: %s", error)
                break
            if connection is None:
                break
            self._admit(connection)
        if self._store is not None:
            try:
                self._store.remove(_listener_name(listener))
            except StoreError as error:  # the living are served to their end all the same
                log.warning("the listening socket stays in the fd store: %s", error)
        listener.close()

    # --- what outlives this process ----------------------------------------------------

    def _take_listener(self) -> Listener | None:
        """Listen on where a process before us did: who has connected meanwhile waits there."""
        if self._store is None:
            return None
        found = None
        for name in [one for one in self._store.taken if one.startswith(LISTENER)]:
            fd, *more = self._store.taken.pop(name)
            device, _, inode = name.removeprefix(LISTENER).partition("-")
            listener = Listener.resume(fd, self.path, (int(device, 16), int(inode, 16)))
            for one in more:
                one.close()
            if listener is not None and found is None:
                found = listener
            else:
                self._store.remove(name)
        return found

    def _keep_listener(self, listener: Listener) -> None:
        if self._store is not None and not self._store.holds(_listener_name(listener)):
            self._store.put(_listener_name(listener), [listener.fileno()])

    def _take_over(self) -> None:
        """Serve on what a process before us had served."""
        if self._store is None:
            return
        assert self._loop is not None  # noqa: S101 - set before
        groups = take_groups(self._store.taken)
        self._ids = itertools.count(highest_id(groups) + 1)
        name_sessions(groups, self._ids)
        for group in groups:
            if group.unstored and group.journal is not None:  # before its parent's forgets it
                try:
                    self._store.put(group.name, [group.journal.fileno()])
                except StoreError as error:  # it alone is settled; the others are served on
                    group.trouble = str(error)
            task = self._loop.create_task(self._serve_stored(group), name="aiouffd take-over")
            self._tasks.add(task)
            task.add_done_callback(self._forget_task)

    async def _serve_stored(self, group: Stored) -> None:
        """Take one session from the store to its end."""
        assert self._store is not None  # noqa: S101 - the group comes from it
        manifest = group.manifest
        who = f"session {manifest.session}" if manifest is not None else group.name
        try:
            async with contextlib.AsyncExitStack() as stack:
                await self._run_session(await self._resume(group, stack), taken_over=True)
        except (UffdError, OSError) as error:
            group.trouble = group.trouble or str(error)
            self._refuse(who, f"is not served on: {group.trouble}")
            if await fail_closed(group):
                with contextlib.suppress(StoreError):
                    self._store.remove(group.name)
        finally:
            group.close()

    async def _resume(self, group: Stored, stack: contextlib.AsyncExitStack) -> Session:
        manifest = group.manifest
        if group.trouble or manifest is None or self._store is None:
            raise PeerError(group.trouble)
        source, extents = await stack.enter_async_context(self._open_source())
        if (manifest.image, manifest.image_size) != (identity_of(source), source.size):
            raise PeerError("the image is not the one that it was served from")
        peer, handover = group.peer(), group.handover()
        if callable(self._service) and peer is None:
            service = Service(on_close=Action(manifest.on_close))
        else:
            service = self._service_for(peer, handover)  # type: ignore[arg-type]
        self._admitted += 1
        stack.callback(self._leave_session)
        session = Session(
            handover,
            source,
            peer=peer,
            service=service,
            extents=extents,
            observers=self._observers,
            on_milestone=self._on_milestone,
            protection=Protection(self._store, manifest, group.journal),
            books=group.books,
            id=group.id,
        )
        await stack.enter_async_context(session)
        return session

    def _protection(
        self, session: str, handover: Handover, peer: Peer, source: Source, service: Service
    ) -> Protection | None:
        """Make the protection of a new session; memory that maps its image needs none."""
        if self._store is None or handover.backed:
            return None
        manifest = Manifest(
            session=session,
            name=new_name(),
            regions=handover.regions,
            image=identity_of(source),
            image_size=source.size,
            dialect=handover.dialect,
            on_close=service.on_close.value,
            peer=(peer.pid, peer.uid, peer.gid),
            others=inodes_of(handover.others),
        )
        return Protection(self._store, manifest)

    # --- peers -------------------------------------------------------------------------

    def _on_connection(self) -> None:
        assert self._loop is not None  # noqa: S101 - the reader was added in start()
        assert self._listener is not None  # noqa: S101 - and is removed with the listener
        for _ in range(_ACCEPT_BATCH):
            try:
                connection = self._listener.accept()
            except OSError as error:
                if error.errno not in _SHORTAGES:
                    log.exception("a connection could not be accepted")
                    return
                # The connection stays in the kernel's queue and the listener readable: pause,
                # or the loop would do nothing but fail.
                log.warning("new peers wait: %s", error)
                self._loop.remove_reader(self._listener.fileno())
                self._pause = self._loop.call_later(_SHORTAGE_PAUSE, self._accept_again)
                return
            if connection is None:
                return
            self._admit(connection)

    def _accept_again(self) -> None:
        if self._listener is not None and self._loop is not None:
            self._loop.add_reader(self._listener.fileno(), self._on_connection)

    def _admit(self, connection: Connection) -> None:
        assert self._loop is not None  # noqa: S101 - as above
        handshake = Handshake(_who(connection), time.monotonic(), connection)
        task = self._loop.create_task(self._serve_peer(handshake), name="aiouffd peer")
        self._tasks.add(task)
        self._handshakes[task] = handshake
        task.add_done_callback(self._forget_task)
        if len(self._handshakes) > self._max_handshakes:
            slowest = next(iter(self._handshakes))
            self._end_handshake(slowest, "too many peers are connecting; it was the slowest")

    def _end_handshake(self, task: asyncio.Task[None], reason: str) -> None:
        handshake = self._handshakes.pop(task)
        self._ended_why[task] = reason
        task.cancel()
        # A task that is cancelled before its first step never runs at all.
        handshake.connection.close()

    def _forget_task(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._handshakes.pop(task, None)
        reason = self._ended_why.pop(task, None)
        if task.cancelled():
            if reason is not None:
                self._refuse("a peer", reason)
        elif task.exception() is not None:
            log.error("serving a peer failed", exc_info=task.exception())

    async def _serve_peer(self, handshake: Handshake) -> None:
        """Take one peer from its connection to the end of its session."""
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - this is one
        who, connection = handshake.peer, handshake.connection
        try:
            with contextlib.closing(connection):
                async with contextlib.AsyncExitStack() as stack:
                    session = await self._begin_session(connection, stack)
                    self._handshakes.pop(task, None)
                    await self._run_session(session)
        except asyncio.CancelledError:
            reason = self._ended_why.get(task)
            if reason is None:
                raise
            self._refuse(who, reason)
        except TimeoutError:
            self._refuse(who, f"no complete hand-over within {self._handshake_timeout:g} s")
        except PeerError as error:
            self._refuse(who, str(error.args[0]))
        except (UffdError, OSError) as error:
            self._refuse(who, str(error))

    def _refuse(self, who: str, reason: str) -> None:
        self.refused += 1
        self._report(Refused(who, reason))

    async def _begin_session(
        self, connection: Connection, stack: contextlib.AsyncExitStack
    ) -> Session:
        """Check, pin, receive and start; what must be closed later goes onto the stack."""
        async with asyncio.timeout(self._handshake_timeout):
            _, uid, _ = peer_credentials(connection.socket)
            if uid not in self._uids:
                allowed = ", ".join(map(str, sorted(self._uids)))
                raise PeerError(f"uid {uid} may not connect; allowed: {allowed}")
            peer = stack.enter_context(
                pin_peer(connection.socket, allow_pid_race=self._allow_pid_race)
            )
            handover = await self._receive(connection)
            service = Service()
            try:
                service = self._service_for(peer, handover)
            finally:
                stack.push_async_callback(settle, handover, service, peer)
            self._admit_session(stack)
            source, extents = await stack.enter_async_context(self._open_source())
            number = str(next(self._ids))
            session = Session(
                handover,
                source,
                peer=peer,
                service=service,
                extents=extents,
                observers=self._observers,
                on_milestone=self._on_milestone,
                protection=self._protection(number, handover, peer, source, service),
                id=number,
            )
            current_session.set(session)  # for all that begins here, by whatever way
            await stack.enter_async_context(session)
            # Only now, being served, does the peer hear of it.
            if handover.acknowledge:
                await connection.send(handover.acknowledge)
        return session

    def _service_for(self, peer: Peer, handover: Handover) -> Service:
        return self._service(peer, handover) if callable(self._service) else self._service

    def _admit_session(self, stack: contextlib.AsyncExitStack) -> None:
        """Take one of the places for sessions until the stack is unwound.

        Raises:
            PeerError: There is none.
        """
        if self._max_sessions is not None and self._admitted >= self._max_sessions:
            raise PeerError(f"there are {self._admitted} sessions already, as many as allowed")
        self._admitted += 1
        stack.callback(self._leave_session)

    def _leave_session(self) -> None:
        self._admitted -= 1

    @contextlib.asynccontextmanager
    async def _open_source(self) -> AsyncIterator[tuple[Source, Extents]]:
        if not callable(self._source):
            assert self._extents is not None  # noqa: S101 - collected in start()
            yield self._source, self._extents
            return
        # A thread cannot be cancelled: whatever it opens is closed, wanted or not.
        opening = asyncio.ensure_future(_open(self._source))
        try:
            source, extents = await asyncio.shield(opening)
        except asyncio.CancelledError:
            with contextlib.suppress(UffdError, OSError):
                await (await opening)[0].aclose()
            raise
        try:
            yield source, extents
        finally:
            await source.aclose()

    def _on_milestone(self, session: Session, milestone: Milestone) -> None:
        if session not in self.sessions:
            return  # not reported as started yet: a peer may touch its memory before that
        figures = session.figures()
        match milestone:
            case Milestone.FIRST_PAGE:
                self._report(FirstPage(session, figures.first_page_s or 0.0))
            case Milestone.RESIDENT:
                self._report(Resident(session, figures.resident_s or 0.0))
            case Milestone.DETACHED:
                self._report(Detached(session))
            case _:
                assert_never(milestone)

    async def _run_session(self, session: Session, *, taken_over: bool = False) -> None:
        self.sessions.add(session)
        self.served += 1
        self._report(TakenOver(session) if taken_over else Started(session))
        for milestone in tuple(session.milestones):
            self._on_milestone(session, milestone)
        try:
            await session.wait_closed()
        except (UffdError, OSError) as error:
            log.warning("%s: the session failed: %s", session.name, error)
        finally:
            try:
                await session.aclose()
            finally:
                self.sessions.discard(session)
                self._past.add(session)
                self.failed += session.error is not None
                self._report(Ended(session))


async def _open(opener: Callable[[], Source]) -> tuple[Source, Extents]:
    """Open a source and collect its extents, in threads: both may take a while."""
    source = await asyncio.to_thread(opener)
    try:
        return source, await asyncio.to_thread(_extents_of, source)
    except BaseException:
        await source.aclose()
        raise


def _extents_of(source: Source) -> Extents:
    try:
        return Extents(source.extents())
    except ValueError as error:
        raise SourceError(f"the source's extents are unusable: {error}") from error


def _listener_name(listener: Listener) -> str:
    device, inode = listener.identity or (0, 0)
    return f"{LISTENER}{device:x}-{inode:x}"


def _who(connection: Connection) -> str:
    """Name a peer, as far as the kernel does."""
    try:
        return "pid {} (uid {})".format(*peer_credentials(connection.socket))
    except OSError:
        return "a peer"
