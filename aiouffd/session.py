"""One target being served: its pager, its source, its policy and its figures.

Knows: a hand-over, a source, and how long to serve.
Must not know: how peers connect, what their protocol is, other sessions.

Laws of this file:

* Serving begins before the hand-over is acknowledged: a VMM touches its memory while it is
  still loading.
* Every region must lie in the source; one that does not is refused before anything is served.
* The session ends when the target does.  Until then every fault is answered, if only by the
  failure policy.
* What the session was given it closes: the userfaultfd, further descriptors, its own source.
* A state is entered in one place, and only where the table of states lets it follow.
"""

from __future__ import annotations

import asyncio
import copy
import errno
import logging
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from .closing import action_on_close, fail_closed, let_go
from .errors import ClosedError, PeerError, TargetGone
from .events import Event, PageFault
from .failure import Action
from .filled_pages import FilledPages
from .forked_children import ForkedChildren
from .graduation import Graduation, keep_trying, pages_with_data
from .handlers import from_source
from .handover import Handover, Peer
from .metrics import Counters, Metrics, Observer
from .pager import Pager
from .prefetch import Pace, Prefetch
from .protection import Books, Protection
from .ranges import align_up
from .residency import NEVER, Residency
from .resolutions import Handler
from .service import Service
from .session_figures import Figures
from .session_states import AFTER, HOW_IT_ENDED, Milestone, State
from .sources import Extents, Source, identity_of
from .uffd import Feature, Mode, Userfaultfd
from .working_set import WorkingSet

if TYPE_CHECKING:
    from .recording import Recording

log: Final = logging.getLogger("aiouffd.session")

#: Which session the code that runs serves, where a Server has started it: its tasks, readers
#: and timers all have the context that they were started in.  For log lines.
current_session: Final[ContextVar[Session | None]] = ContextVar("current_session", default=None)

#: Outcomes after which a thread that waited has its page.
_SERVED: Final = frozenset(("copy", "zero", "continue", "move"))


class _Watch:
    """The session's own observer: the first fault, the first failure, and a count of faults.

    Attributes:
        left: Faults until ``on_turn`` is called, with the outcome of the last.
    """

    def __init__(self, on_turn: Callable[[str], None]) -> None:
        self.first_fault: float | None = None
        self.error: Exception | None = None
        self.left = 1
        self._on_turn = on_turn

    def begin(self, fault: PageFault) -> None:  # noqa: ARG002 - Observer says so
        if self.first_fault is None:
            self.first_fault = time.monotonic()

    def end(self, fault: PageFault, outcome: str, elapsed_ns: int) -> None:  # noqa: ARG002
        self.left -= 1
        if self.left <= 0:
            self._on_turn(outcome)

    def event(self, event: Event) -> None:
        pass

    def failure(self, fault: PageFault, error: Exception) -> None:  # noqa: ARG002 - as above
        if self.error is None:
            self.error = error


class Session:
    """Serves the memory that one peer has handed over.

    ::

        async with Session(handover, source, peer=peer) as session:
            await session.wait_closed()

    Attributes:
        handover: What was handed over.
        source: Where its bytes come from.
        peer: Who handed it over, if known; pinned.
        id: Its name among the sessions of a server, short and of one word; empty without one.
        pager: Its pager, from ``async with`` on.
        prefetch: What brings its memory ahead of demand, from ``async with`` on.
        metrics: Outcomes and latencies.
        milestones: Those reached so far, in order.

    Sharing: the loop's thread.
    """

    def __init__(
        self,
        handover: Handover,
        source: Source,
        *,
        peer: Peer | None = None,
        service: Service | None = None,
        extents: Extents | None = None,
        observers: Sequence[Observer] = (),
        on_milestone: Callable[[Session, Milestone], object] | None = None,
        protection: Protection | None = None,
        books: Books | None = None,
        held: bool = False,
        id: str = "",  # noqa: A002 - what users call it
    ) -> None:
        """Prepare; nothing is read before ``async with``.

        Args:
            handover: The userfaultfd and its regions; closed with the session.
            source: Stays the caller's to close, after the session.
            peer: Whose memory it is; its exit ends the session, and Action.KILL kills it.
                Stays the caller's to close, after the session.
            service: How to serve.
            extents: The source's extents, when they have been collected before.
            observers: Told of every fault and event.
            on_milestone: Told of each milestone when it is reached; must not block or raise.
            protection: Keeps what the session knows, so that it outlives this process.
            books: What a process before us knew, from its journal: serve on from there.
            held: Bring nothing ahead of demand before ``release``: the memory may not all be
                registered yet.
            id: See the attribute.
        """
        self.id: Final = id
        self.handover: Final = handover
        self.source: Final = source
        self.peer: Final = peer
        self.service: Final = service if service is not None else Service()
        self.metrics: Final = Metrics()
        self.milestones: Final[list[Milestone]] = []
        self.pager: Pager
        self.prefetch: Prefetch
        self._extents = extents
        self._observers: tuple[Observer, ...] = tuple(observers)
        self._recording: Recording | None = None
        self._prefetching: asyncio.Task[None] | None = None
        self._watch = _Watch(self._count_pages)
        self._first_page: float | None = None
        self._residency: Residency | None = None
        self._on_milestone = on_milestone
        self._state = State.HANDSHAKING
        self._resident: float | None = None
        self._began = self._ended = time.monotonic()
        self._aborted: Action | None = None
        self._closing: asyncio.Task[None] | None = None
        self._children: Final = ForkedChildren(handover, self.service, self.name)
        self._protection = protection
        self._books = books
        self._graduation: Graduation
        self._completing: asyncio.Task[None] | None = None
        self._waiting = 0  # callers of complete()
        self._detaching: asyncio.Task[None] | None = None  # behind the point of no return
        self._letting_go: asyncio.Task[None] | None = None
        self._released = asyncio.Event()
        if not held:
            self._released.set()

    @property
    def name(self) -> str:
        """Name the session in messages: who is served."""
        who = str(self.peer) if self.peer is not None else "an unknown peer"
        return f"task {self.handover.part}, {who}" if self.handover.part else who

    @property
    def state(self) -> State:
        """How it stands with the session."""
        return self._state

    def _enter(self, state: State) -> bool:
        """Enter a state.

        Returns:
            Whether it can follow on the present one; else nothing is done.
        """
        if state not in AFTER[self._state]:
            return False
        self._state = state
        if state.ended:
            self._ended = time.monotonic()
        elif state is State.SERVING:
            self._began = time.monotonic()
        elif state is State.RESIDENT:
            self._resident = time.monotonic()
            self._reached(Milestone.RESIDENT)
        return True

    def _count_pages(self, outcome: str) -> None:
        """Look whether a milestone is reached, and say after how many faults to look again."""
        if self._first_page is None:
            if outcome not in _SERVED:
                self._watch.left = 1
                return
            self._first_page = time.monotonic()
            self._reached(Milestone.FIRST_PAGE)
        residency = self._residency if self._state is State.SERVING else None
        self._watch.left = NEVER if residency is None else residency.faults_left()

    def _count_anew(self) -> None:
        self._watch.left = 1

    def _reached(self, milestone: Milestone) -> None:
        self.milestones.append(milestone)
        if self._on_milestone is not None:
            self._on_milestone(self, milestone)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def start(self) -> None:
        """Begin to serve; ``async with`` does this.

        Raises:
            PeerError: A region does not lie in the source, or the userfaultfd cannot be
                used.  The hand-over is closed, its missing pages settled by ``on_close``.
        """
        try:
            await self._start()
        except BaseException:
            self._enter(State.FAILED)
            raise

    async def _start(self) -> None:
        try:
            uffd = Userfaultfd.adopt(self.handover.fd)
        except ValueError as error:
            self.handover.close()
            raise PeerError(str(error), self.name) from error
        except BaseException:
            self.handover.close()
            raise
        try:
            self._begin_recording()
            self.pager = self._make_pager(uffd)
        except BaseException as error:
            await self._end_prefetch()
            await fail_closed(uffd, self.peer, error)
            self.handover.close()
            raise
        try:
            self._serve_regions()
            self._check_regions()  # now that the pager would settle what is refused
            self._protect()
            self._enter(State.SERVING)
            self.pager.start()
            if self._books is not None:
                self.pager.wake_all()
            self._begin_prefetch()
        except BaseException as error:
            await self._close(None)
            if isinstance(error, ValueError):  # regions that no memory can have
                raise PeerError(str(error), self.name) from error
            raise

    def _protect(self) -> None:
        """See that the session outlives this process, from its first fault on."""
        protection, books = self._protection, self._books
        if protection is None:
            return
        self._children.protections[self.pager] = protection
        if books is not None:
            protection.resume(self.pager, self._regions, books)
        else:
            pidfd = () if self.peer is None else (self.peer.pidfd,)
            protection.begin(self.pager, self._regions, (*pidfd, *self.handover.others))

    def _check_regions(self) -> None:
        for number, region in enumerate(self.handover.regions):
            end = align_up(self.source.size, region.page_size)
            if region.offset + region.length > end:
                raise PeerError(
                    f"region {number} ({region}) ends at offset"
                    f" {region.offset + region.length:#x}, but the image at"
                    f" {self.source.size:#x}",
                    self.name,
                )

    def _begin_recording(self) -> None:
        if self._books is not None:
            return  # the file of the process before has what the target needed first
        if self.service.recorder is not None and self.handover.regions:
            self._recording = self.service.recorder.begin(
                self.id,
                part=self.handover.part,
                identity=identity_of(self.source),
                image_size=self.source.size,
                page_size=self.handover.regions[0].page_size,
            )
        if self._recording is not None:
            self._observers = (*self._observers, self._recording)

    def _begin_prefetch(self) -> None:
        self.prefetch = Prefetch(self.pager, self.source, extents=self._extents)
        self._graduation.bring_by(self.pager, self.prefetch)
        service = self.service
        replay = service.replay_of(self.handover.part)
        if replay is not None or service.hydrate is not Pace.OFF:
            self._prefetching = asyncio.create_task(
                self._run_prefetch(replay), name="aiouffd session prefetch"
            )
        if service.let_go:
            self._letting_go = asyncio.create_task(
                self._let_go_when_complete(), name="aiouffd let go"
            )

    async def _run_prefetch(self, replay: WorkingSet | None) -> None:
        service = self.service
        await self._released.wait()
        await self.prefetch.run(
            replay, service.hydrate, any_image=service.any_image, name=self.name
        )
        if self.prefetch.resident:
            self._enter(State.RESIDENT)

    async def _let_go_when_complete(self) -> None:
        await self._released.wait()
        if self._prefetching is not None:
            await asyncio.wait([self._prefetching])
        await keep_trying(self.complete, self.name)

    def release(self) -> None:
        """Let memory be brought ahead of demand: by now all of it is registered."""
        self._released.set()

    async def _end_prefetch(self) -> None:
        if self._residency is not None:
            await self._residency.aclose()
        for task in (self._letting_go, self._prefetching):
            if task is not None:
                task.cancel()
                await asyncio.wait([task])
        if self._recording is not None:
            await self._recording.aclose()

    def _make_pager(self, uffd: Userfaultfd) -> Pager:
        service = self.service
        return Pager(
            uffd,
            failure=service.failure,
            deadline=service.deadline,
            warn_after=service.warn_after,
            max_in_flight=service.max_in_flight,
            on_close=action_on_close(self.handover, service),
            on_fork=self._adopt_child,
            target=self.peer.pidfd.fileno() if self.peer is not None else None,
            zero_elsewhere=self.handover.zero_elsewhere,
            observers=(self.metrics, self._watch, *self._observers),
        )

    def _adopt_child(self, child: Pager) -> None:
        self._children.adopt(child)
        self._graduation.adopted(child)
        if self._state is not State.DETACHED:  # then it is let go in a moment
            self._children.refuse_beyond_limit(child)

    def _serve_regions(self) -> None:
        if self._extents is None:
            self._extents = Extents(self.source.extents())
        self._regions = [
            self.pager.register(
                region.start,
                region.length,
                self._handler(region.offset, region.offset + region.length),
                modes=region.modes,
                page_size=region.page_size,
                offset=region.offset,
                name=f"region {number}",
                registered=True,  # by the peer, before it handed the userfaultfd over
                # Who asks to hear of moves may grow memory; of the new tail nothing is told.
                grows=bool(self.pager.uffd.features & Feature.EVENT_REMAP),
            )
            for number, region in enumerate(self.handover.regions)
        ]
        service = self.service
        if self._protection is None and (service.let_go or service.hydrate is not Pace.OFF):
            # What demand has brought need not be brought again; with a journal it keeps that.
            for region in self._regions:
                region.filled = FilledPages.none_yet(region.offset, region.length, region.page_size)
        self._graduation = Graduation(
            self._serving_pagers,
            self.source,
            self._extents,
            peer=self.peer,
            alone=self.handover.alone,
        )

        self._residency = Residency(
            self.pager,
            [
                (region, start, end)
                for region in self.pager.regions
                if region.modes & Mode.MISSING
                for start, end in pages_with_data(region, self._extents)
            ],
            peer=self.peer,
            most=max(self.service.chunk, *(one.page_size for one in self.handover.regions)),
            on_resident=lambda: self._enter(State.RESIDENT),
            ask_again=self._count_anew,
        )

    def _serving_pagers(self) -> list[Pager]:
        """Give the pagers that serve: the target's, then those of its children."""
        return [
            pager
            for pager in (self.pager, *self._children.pagers)
            if not (pager.target_gone or pager.closing or pager.uffd.closed)
        ]

    def _handler(self, start: int, end: int) -> Handler:
        return from_source(
            self.source, extents=self._extents, chunk=self.service.chunk, within=(start, end)
        )

    @property
    def error(self) -> Exception | None:
        """The first error that a fault ended with, if any did."""
        return self._watch.error

    @property
    def outcome(self) -> str:
        """Say in a few words how it stands with the session, or how it ended."""
        if not self._state.ended:
            return self._state.value
        how = HOW_IT_ENDED.get(self._state, "not served")
        if self._aborted is not None:
            how = f"closed by policy ({self._aborted.value})"
            if self.handover.backed and self._aborted is Action.ZERO:
                how = "let go, to read on from the shared image"
        if self.error is not None:
            return f"{how}; {self.pager.counters.failures} faults failed, first: {self.error}"
        return how

    def counters(self) -> Counters:
        """Add up the counters of the target and of the children that it forked."""
        total = copy.copy(self._children.past)
        for pager in (self.pager, *self._children.pagers):
            total.add(pager.counters)
        return total

    @property
    def in_flight(self) -> int:
        """Faults of the target and its children that have begun and not ended."""
        return sum(pager.in_flight for pager in (self.pager, *self._children.pagers))

    def figures(self) -> Figures:
        """Sum up what was done so far, for the children that the target forked as well."""
        counters = self.counters()
        now = self._ended if self._state.ended else time.monotonic()

        def since(moment: float | None) -> float | None:
            return None if moment is None else round(moment - self._began, 6)

        return Figures(
            seconds=round(now - self._began, 6),
            memory_bytes=sum(region.length for region in self.handover.regions),
            faults=counters.faults,
            copied_bytes=counters.copied_bytes,
            filled_bytes=counters.filled_bytes,
            zero_pages=self.metrics.outcomes.get("zero", 0),
            removed_pages=counters.removed,
            failures=counters.failures,
            parked=counters.parked,
            events=counters.events,
            p50_us=self.metrics.latency.quantile(0.5) / 1000,
            p99_us=self.metrics.latency.quantile(0.99) / 1000,
            first_fault_s=since(self._watch.first_fault),
            first_page_s=since(self._first_page),
            resident_s=since(self._resident),
        )

    async def wait_closed(self) -> None:
        """Wait until the target and the children it forked are gone, or the session is closed.

        Raises:
            FaultError: A fault failed and the policy says Action.RAISE.

        Cancellation: nothing happens to the session.
        """
        await self.pager.wait_closed()
        while self.pager.children and not self.pager.closing:
            for child in tuple(self.pager.children):
                await child.wait_closed()
            await asyncio.sleep(0)

    async def fill(self) -> None:
        """Bring every page that the source has, for the target and its forked children.

        They are served meanwhile and afterwards; the session is resident then.  A session that
        is held waits for ``release`` first.

        Raises:
            SourceError: Bytes could not be had.
            ResolutionRefused: The kernel refused (LayoutChanging: for the deadline).
            NotSupported: A forked child has huge pages: whether they are there is unknown.
            TargetGone: The target has exited, and so have its children.
            ClosedError: The session was closed.

        Cancellation: what was brought so far is there; all is served as before.
        """
        self._check_living()
        if not self._released.is_set():  # a page whose memory is not registered cannot be filled
            await self._released.wait()
            self._check_living()
        await self._graduation.fill()
        self._enter(State.RESIDENT)

    async def complete(self) -> None:
        """Bring every page, then unregister: the target lives on without us.

        A second call while the first is under way joins it; one after it does nothing.  When
        the target is detached, holes of the source and pages that it had removed or grown
        read as the kernel makes them: zeros, in anonymous and shared memory.

        Raises:
            As ``fill``: then nothing is unregistered, and all is served as before.

        Cancellation: all is served as before, unless the last page was there already: then
            the target is detached all the same.  Of several callers the last one counts.
        """
        if self._detaching is not None:
            await asyncio.shield(self._detaching)
            return
        self._check_living()
        if self._completing is None:
            self._completing = asyncio.create_task(self._complete(), name="aiouffd complete")
            self._completing.add_done_callback(self._completed)
        task = self._completing
        self._waiting += 1
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if task.cancelled() and caller is not None and not caller.cancelling():
                raise ClosedError("the session was closed before its target was complete") from None
            if self._waiting == 1 and not task.done() and self._detaching is None:
                task.cancel()
                self._completing = None  # whoever asks from now on begins anew
            raise
        finally:
            self._waiting -= 1

    def _completed(self, task: asyncio.Task[None]) -> None:
        failed = task.cancelled() or task.exception() is not None  # retrieved: nobody may wait
        if failed and self._completing is task:
            self._completing = None

    async def _complete(self) -> None:
        await self.fill()
        # Not a single await from the last look in fill() to the end of detach().
        if self._prefetching is not None:
            self._prefetching.cancel()
        self._graduation.detach()
        self._enter(State.DETACHED)
        self._detaching = asyncio.create_task(self._settle(), name="aiouffd detach")
        self._reached(Milestone.DETACHED)
        await asyncio.shield(self._detaching)

    async def _settle(self) -> None:
        try:
            await self._graduation.settle()
        finally:
            await self._close(Action.ZERO)  # no memory is left that this could be about

    def _check_living(self) -> None:
        """Refuse what takes a living target.

        Raises:
            TargetGone: It is gone.
            ClosedError: The session has ended otherwise, or has not begun.
        """
        if self._state is State.TARGET_GONE:
            raise TargetGone("filling everything", errno.ESRCH, 0, 0)
        if self._state.ended or self._state is State.HANDSHAKING or self._closing is not None:
            raise ClosedError(f"the session is {self._state.value}")

    async def aclose(self, action: Action | None = None) -> None:
        """Stop serving and let go of everything; a second call does nothing more.

        Args:
            action: What becomes of missing pages if the target still lives; None is the
                service's ``on_close``.

        Cancellation: the close goes on by itself; call again to wait for it.
        """
        if self._detaching is not None:
            await asyncio.shield(self._detaching)  # nothing is missing any more
            return
        if self._completing is not None:
            self._completing.cancel()
        pager = self.pager
        if self._closing is None and not pager.closing and not pager.target_gone:
            closing = action_on_close(self.handover, self.service)
            self._aborted = closing if action is None else action
        await self._close(action)

    async def _close(self, action: Action | None) -> None:
        if self._closing is None:
            coro = self._close_all(action)
            self._closing = asyncio.create_task(coro, name="aiouffd session close")
        await asyncio.shield(self._closing)

    async def _close_all(self, action: Action | None) -> None:
        try:
            await self._end_prefetch()
            self._released.set()  # who waits for that learns of the end
            await let_go(self.pager, action, self.handover, self.peer)
        finally:
            await self._children.close(action)
            gone = self.pager.target_gone and self._aborted is None
            self._enter(State.TARGET_GONE if gone else State.FAILED)
