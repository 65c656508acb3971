"""Many sessions: accept peers, check and pin them, serve them, drain.

Knows: a listening socket, how to receive a hand-over (given as a function), a source.
Must not know: any protocol's bytes; command lines and signals.

Laws of this file:

* The accept loop never waits for a peer: each has a task of its own, with a time limit until
  it is served.
* A hostile or silent peer costs a bounded time and no descriptor; there are never more than
  ``max_handshakes`` of them, since the oldest goes when one more comes.  Who has handed over a
  part of what it has is none of them: others cannot push it out.
* A peer is admitted by the uid that the kernel names, and pinned before its message is read.
  Where others write to its connection (``senders``) it need not live: they have, or will have,
  said all there is.
* Serving begins before the peer's hand-over is acknowledged.
* A peer may hand over piece by piece: each piece is served as soon as it is there.
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
from collections.abc import AsyncGenerator, Callable, Collection, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, Self, TypeAlias, assert_never

from .closing import settle
from .errors import NotSupported, PeerError, StoreError, UffdError
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
    HandedOver,
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
from .source_opening import ImageParts, SourceOpening, SourceOrOpener
from .sources import Source, identity_of
from .takeover import Stored, fail_closed, highest_id, inodes_of, name_sessions, take_groups
from .together import Together
from .totals import Totals
from .unix_socket import Connection, Listener

log: Final = logging.getLogger("aiouffd.server")

_ACCEPT_BATCH: Final = 16  # connections per wake-up: other work of the loop must run too
_QUEUE: Final = 128  # connections that the kernel holds until they are accepted
_SHORTAGE_PAUSE: Final = 0.1  # seconds without accepting while descriptors are short
_LAST_CALL: Final = 10.0  # seconds that a drain gives those who have handed nothing over
_GRACE: Final = 5.0  # seconds that targets may outlive a connection that failed
_SHORTAGES: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

LISTENER: Final = "aiouffd-listener-"  #: in the store; then the device and inode of its name

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
        source: SourceOrOpener | ImageParts,
        *,
        service: ServiceOrChooser | None = None,
        max_sessions: int | None = None,
        uids: Collection[int] | None = None,
        handshake_timeout: float | None = 10.0,
        max_handshakes: int = 64,
        allow_pid_race: bool = False,
        mode: int = 0o600,
        replace: bool = False,
        any_directory: bool = False,
        senders: bool = False,
        listen: bool = True,
        store: FdStore | None = None,
        report: Callable[[Report], None] = log_report,
        observers: Sequence[Observer] = (),
    ) -> None:
        """Prepare; nothing listens before ``async with``.

        Args:
            path: The socket's name; or one that listens already, taken over and closed.
            receive: Takes a new connection and gives the hand-over: a protocol.
            source: A source for all, or a function that opens one per session.  With the
                function a session keeps its file though another takes the name.  Or an image in
                parts, where the protocol says which part each hand-over is.
            service: How sessions serve, or a function that says so for each peer.
            max_sessions: Sessions at once; further peers are refused, and what is missing in
                their memory is settled by their service's ``on_close``.
            uids: Who may connect; None is the server's own user only.
            handshake_timeout: Seconds from the connection to the complete hand-over; None does
                not limit it, where that waits for much else.
            max_handshakes: Peers at once that have not handed over yet.
            allow_pid_race: See pin_peer.
            mode: Rights of the socket.
            replace: Take the name over from a server that still listens there.
            any_directory: See Listener.bind.
            senders: Let ``receive`` know which process sends what (Connection.receive_from).  Who
                has connected may have exited by then, and is None where it cannot be held.
            listen: Set to False to serve only what the store gives back; of a stored listening
                socket, who has connected before.
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
        self._sources = SourceOpening(source)
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
        self._senders = senders
        self._listen = listen
        self._store = store
        self._report = report
        self._observers = tuple(observers)
        self._listener: Listener | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._handshakes: dict[asyncio.Task[None], Handshake] = {}  # oldest first
        self._in_part: set[asyncio.Task[None]] = set()  # of these: have handed something over
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
        await self._sources.try_it()
        self._take_over()
        if not self._listen:
            # A process before us may have died while it listened.
            self._listener = self._passed or self._take_listener()
            self._stop_listening()
            return
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
        if self._senders:
            self._listener.pass_senders()
        self._loop.add_reader(self._listener.fileno(), self._on_connection)

    async def wait_closed(self) -> None:
        """Wait until the server was drained or closed.

        Cancellation: nothing happens to the server.
        """
        await self._over.wait()

    async def drain(self) -> None:
        """Refuse new peers, serve the living to their end, then close.

        The socket's name is free from the start on: a newer server may take it.  Peers that
        have connected before may still hand over, within the time limit; where there is none,
        they have ten seconds to begin.

        Cancellation: new peers stay refused; call again, or ``aclose``.
        """
        self._stop_listening()
        last_call = None
        if self._loop is not None and self._handshake_timeout is None:
            last_call = self._loop.call_later(_LAST_CALL, self._end_silent)
        try:
            while self._tasks:
                await asyncio.wait(tuple(self._tasks))
        finally:
            if last_call is not None:
                last_call.cancel()
        self._over.set()

    def _end_silent(self) -> None:
        for task in [one for one in self._handshakes if one not in self._in_part]:
            self._end_handshake(task, "the server is draining, and nothing was handed over")

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
            self._spawn(self._serve_stored(group), "aiouffd take-over")

    async def _serve_stored(self, group: Stored) -> None:
        """Take one session from the store to its end."""
        assert self._store is not None  # noqa: S101 - the group comes from it
        manifest = group.manifest
        who = f"session {manifest.session}" if manifest is not None else group.name
        try:
            async with contextlib.AsyncExitStack() as stack:
                session = await self._resume(group, stack)
                self._announce(session, taken_over=True)
                await self._run_session(session)
        except (UffdError, OSError) as error:
            group.trouble = group.trouble or str(error)
            part = manifest.part if manifest is not None else ""
            self._refuse(who, f"is not served on: {group.trouble}", part)
            if await fail_closed(group):
                with contextlib.suppress(StoreError):
                    self._store.remove(group.name)
        finally:
            group.close()

    async def _resume(self, group: Stored, stack: contextlib.AsyncExitStack) -> Session:
        manifest = group.manifest
        if group.trouble or manifest is None or self._store is None:
            raise PeerError(group.trouble)
        source, extents = await stack.enter_async_context(self._sources.open(manifest.part))
        if (manifest.image, manifest.image_size) != (identity_of(source), source.size):
            raise PeerError("the image is not the one that it was served from")
        peer, handover = group.peer(), group.handover()
        if callable(self._service) and peer is None:
            service = Service(on_close=Action(manifest.on_close))
        else:
            service = self._service_for(peer, handover)
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
        self, session: str, handover: Handover, peer: Peer | None, source: Source, service: Service
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
            peer=None if peer is None else (peer.pid, peer.uid, peer.gid),
            others=inodes_of(handover.others),
            part=handover.part,
            zero_elsewhere=handover.zero_elsewhere,
            alone=handover.alone,
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
        task = self._spawn(self._serve_peer(handshake), "aiouffd peer")
        self._handshakes[task] = handshake
        if len(self._handshakes) - len(self._in_part) > self._max_handshakes:
            slowest = next(one for one in self._handshakes if one not in self._in_part)
            self._end_handshake(slowest, "too many peers are connecting; it was the slowest")

    def _end_handshake(self, task: asyncio.Task[None], reason: str) -> None:
        handshake = self._handshakes.pop(task)
        self._in_part.discard(task)
        self._ended_why[task] = reason
        task.cancel()
        # A task that is cancelled before its first step never runs at all.
        handshake.connection.close()

    def _spawn(self, coro: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Let something go on by itself, until a drain waits for it."""
        assert self._loop is not None  # noqa: S101 - set in start()
        task = self._loop.create_task(coro, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._forget_task)
        return task

    def _forget_task(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._handshakes.pop(task, None)
        self._in_part.discard(task)
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
        with self._refusing(who):
            try:
                with contextlib.closing(connection):
                    async with contextlib.AsyncExitStack() as stack:
                        async with asyncio.timeout(self._handshake_timeout):
                            peer = self._admit_peer(connection, stack)
                            received = self._receive(connection)
                            if isinstance(received, AsyncGenerator):
                                await self._serve_together(received, who, task)
                                return
                            session = await self._begin_session(await received, peer, stack)
                            # Only now, being served, does the peer hear of it.
                            if session.handover.acknowledge:
                                await connection.send(session.handover.acknowledge)
                        self._handshakes.pop(task, None)
                        self._announce(session)
                        await self._run_session(session)
            except asyncio.CancelledError:
                reason = self._ended_why.get(task)
                if reason is None:
                    raise
                self._refuse(who, reason)

    @contextlib.contextmanager
    def _refusing(self, who: str, part: str = "") -> Iterator[None]:
        """Tell of a peer that cannot be served."""
        try:
            yield
        except TimeoutError as error:  # ours, or what a system call has met
            limit = self._handshake_timeout
            within = "in time" if limit is None else f"within {limit:g} s"
            self._refuse(who, str(error) or f"no complete hand-over {within}", part)
        except PeerError as error:
            self._refuse(who, str(error.args[0]), part)
        except (UffdError, OSError) as error:
            self._refuse(who, str(error), part)

    def _refuse(self, who: str, reason: str, part: str = "") -> None:
        self.refused += 1
        self._report(Refused(who, reason, part))

    def _admit_peer(self, connection: Connection, stack: contextlib.AsyncExitStack) -> Peer | None:
        """Check who has connected, and pin it as long as the stack lasts.

        Returns:
            None if it cannot be pinned, and others speak for themselves.

        Raises:
            PeerError: It may not connect, or has exited.
        """
        _, uid, _ = peer_credentials(connection.socket)
        if uid not in self._uids:
            allowed = ", ".join(map(str, sorted(self._uids)))
            raise PeerError(f"uid {uid} may not connect; allowed: {allowed}")
        try:
            peer = pin_peer(connection.socket, allow_pid_race=self._allow_pid_race)
        except (PeerError, NotSupported) as error:
            if not self._senders:
                raise
            log.debug("who has connected is not held: %s", error)
            return None
        return stack.enter_context(peer)

    async def _serve_together(
        self, received: AsyncGenerator[Handover, None], who: str, task: asyncio.Task[None]
    ) -> None:
        """Serve what one peer hands over piece by piece; return when that was all."""
        together = Together()
        try:
            async with contextlib.aclosing(received):
                async for handover in received:
                    if task in self._handshakes:
                        self._in_part.add(task)
                    with self._refusing(who, handover.part):
                        await self._begin_one(handover, together)
        except BaseException:
            self._spawn(together.give_up(_GRACE), "aiouffd give up")
            raise
        together.release()
        self._report(HandedOver(who, len(together.sessions)))

    async def _begin_one(self, handover: Handover, together: Together) -> None:
        """Start the session of one of several hand-overs, which then goes on by itself."""
        async with contextlib.AsyncExitStack() as stack:
            peer = handover.peer
            if peer is not None:
                stack.enter_context(peer)
            try:
                session = await self._begin_session(handover, peer, stack, held=True)
                together.sessions.append(session)
                self._announce(session)
                self._spawn(self._run_to_the_end(session, stack.pop_all()), "aiouffd session")
            finally:
                current_session.set(None)  # the next one is another's

    async def _run_to_the_end(self, session: Session, stack: contextlib.AsyncExitStack) -> None:
        async with stack:
            await self._run_session(session)

    async def _begin_session(
        self,
        handover: Handover,
        peer: Peer | None,
        stack: contextlib.AsyncExitStack,
        *,
        held: bool = False,
    ) -> Session:
        """Start a session; what must be closed later goes onto the stack."""
        service = Service()
        try:
            service = self._service_for(peer, handover)
        finally:
            stack.push_async_callback(settle, handover, service, peer)
        self._admit_session(stack)
        source, extents = await stack.enter_async_context(self._sources.open(handover.part))
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
            held=held,
            id=number,
        )
        current_session.set(session)  # for all that begins here, by whatever way
        await stack.enter_async_context(session)
        return session

    def _service_for(self, peer: Peer | None, handover: Handover) -> Service:
        if not callable(self._service):
            return self._service
        if peer is None:
            raise PeerError("nobody knows whose memory it is, so that no service can be chosen")
        return self._service(peer, handover)

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

    def _announce(self, session: Session, *, taken_over: bool = False) -> None:
        """Count a session that has started, and tell of it."""
        self.sessions.add(session)
        self.served += 1
        self._report(TakenOver(session) if taken_over else Started(session))
        for milestone in tuple(session.milestones):
            self._on_milestone(session, milestone)

    async def _run_session(self, session: Session) -> None:
        """Take a session that was announced to its end."""
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


def _listener_name(listener: Listener) -> str:
    device, inode = listener.identity or (0, 0)
    return f"{LISTENER}{device:x}-{inode:x}"


def _who(connection: Connection) -> str:
    """Name a peer, as far as the kernel does."""
    try:
        return "pid {} (uid {})".format(*peer_credentials(connection.socket))
    except OSError:
        return "a peer"
