"""Interleaving: threads that make their touches one at a time, in a given order or in many.

Knows: the participants' threads, and how the helper is asked for a turn.
Must not know: how an order is chosen (``strategies``), how a thread is stopped (the service).

Laws of this file:

* The participants' threads are made once and run every order; ``reset`` comes before each.
* Between two turns nobody runs but the participant whose turn it was, and whom it woke.
* However a run ends, nobody is left standing: what could not be followed runs freely to its end.
* What was found can be made again: the exception carries the order, and a test to paste.
"""

from __future__ import annotations

import inspect
import linecache
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from .ahead import Ahead
from .asleep import TIMED, Look, call_of, seconds_left
from .channel import pair
from .failures import HarnessError
from .pasting import Span, as_test
from .rules import Kind
from .schedules import (
    ENDED,
    Course,
    Deadlock,
    Endless,
    Move,
    Order,
    Position,
    Step,
    Where,
    order_of,
    runs_of,
)
from .strategies import Fixed, Seeded, Strategy, Systematic
from .threads import own_threads

if TYPE_CHECKING:
    from .arming import Armed
    from .harness import Harness

#: Seconds in which somebody may still wake up by itself before a deadlock is called one.
_PATIENCE: Final = 0.25
#: Seconds that participants have to end after a run that was broken off.
_FAREWELL: Final = 1.0
#: Of the harness's time limit, what a move may take twice: we speak before the helper does.
_SHARE: Final = 0.4

_NO_RESET: Final = "no reset= was given: what earlier orders left behind may be all that is wrong\n"

Participants = Mapping[str, Callable[[], object]]
Check = Callable[..., object]


@dataclass(frozen=True, slots=True)
class Interleaving:
    """A run in a given order.

    Attributes:
        order: What happened, in full: every participant to its end.
        moves: The same, move by move.
        results: What each participant returned.
    """

    order: list[Step]
    moves: list[Move]
    results: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Exploration:
    """Orders that were run, and in which nothing was wrong.

    Attributes:
        orders: How many.
        touches: How many were made in all of them.
        seconds: How long that took.
        seed: Of the random orders; None if all were gone through.
        preemptions: How many an order has at most.
        complete: Every order with no more preemptions was run.  Never of random orders.
        every: There are no other orders, whatever the preemptions.
    """

    orders: int
    touches: int
    seconds: float
    seed: int | None
    preemptions: int | None
    complete: bool
    every: bool

    def __str__(self) -> str:
        bound = "any number of" if self.preemptions is None else f"at most {self.preemptions}"
        what = (
            "every order there is"
            if self.every
            else f"every order with {bound} preemptions"
            if self.complete
            else f"not every order with {bound} preemptions"
            if self.seed is None
            else f"random orders with {bound} preemptions, seed {self.seed}"
        )
        return f"{self.orders} orders, {self.touches} touches, {self.seconds:.3f} s: {what}"


class RaceFound(AssertionError):
    """An order in which something is wrong: a check, a participant that raised, a deadlock.

    Attributes:
        order: The order, for ``Harness.interleave``.
        trace: Each move of it.
        error: What was wrong.
        orders: How many orders were run, with this one.
        seed: Of the random orders, or None.
        test: The text of a test that makes this order again.
    """

    def __init__(
        self,
        moves: list[Move],
        error: BaseException,
        orders: int,
        seed: int | None,
        test: str,
        *,
        notice: str = "",
    ) -> None:
        self.order = order_of(moves)
        self.trace = moves
        self.error = error
        self.orders = orders
        self.seed = seed
        self.test = test
        steps = "\n".join(
            f"  {name} {until}: then {name} {move.after}" for (name, until), move in runs_of(moves)
        )
        random = "" if seed is None else f" (random orders of seed {seed})"
        super().__init__(
            f"order {orders} of those tried{random} goes wrong: {_said(error)}\n{notice}"
            f"The order:\n{steps}\nAs a test:\n\n{test}"
        )


def _said(error: BaseException) -> str:
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class _Participant:
    """A thread that makes the same call once for every run."""

    def __init__(self, name: str, call: Callable[[], object], tell: Callable[[int], None]) -> None:
        self.name = name
        self.ended = True
        self.result: object = None
        self.error: BaseException | None = None
        self.tid = 0
        self._call = call
        self._tell = tell
        self._start, self.starter = os.pipe()
        begun = threading.Event()

        def work() -> None:
            self.tid = threading.get_native_id()
            begun.set()
            try:
                while os.read(self._start, 1):
                    self._run()
            finally:
                os.close(self._start)

        self.thread = threading.Thread(target=work, name=f"participant {name}", daemon=True)
        self.thread.start()
        begun.wait()

    def _run(self) -> None:
        try:
            self.result = self._call()
        except BaseException as error:  # told to whoever asked for the run
            self.error = error
        self.ended = True
        self._tell(self.tid)

    def make_ready(self) -> None:
        """Expect a start, which comes from the helper."""
        self.ended = False
        self.result = self.error = None


class Stage:
    """The participants of one call, and their turns.

    Args:
        harness: Whose regions are watched: all that are open now.
        participants: What each of them calls, by their names.

    Sharing: the thread that made it.
    """

    def __init__(self, harness: Harness, participants: Participants) -> None:
        if not participants:
            raise ValueError("there is nobody to take turns: name two participants or more")
        self._harness = harness
        self._names: dict[int, str] = {}
        self._all: dict[str, _Participant] = {}
        self._armed: list[Armed] = []
        self._deadlocked = False
        self._asking, theirs = pair()
        self._asking.sock.settimeout(harness.timeout * _SHARE)
        try:
            beside = [threading.get_native_id(), harness._helper.porter]
            with theirs:
                harness.order("participants", beside, fds=(theirs.fileno(),))
            for name, call in participants.items():
                each = self._all[name] = _Participant(name, call, self._tell)
                self._names[each.tid] = harness.ledger.threads[each.tid] = name
                try:
                    harness.order("participant", each.tid, fds=(each.starter,))
                finally:
                    os.close(each.starter)
            for region in harness.regions:
                place = region.at(0, region.length)
                threads = list(self._names)
                armed = harness.arm(Kind.FREEZE, place, thread=threads, every=True)
                self._armed.append(armed)
                harness._ordered.add(armed.rule.number)
        except BaseException:
            self._leave()
            raise

    def _tell(self, tid: int) -> None:
        try:
            self._asking.send(("ended", tid))
        except OSError:
            pass  # the run was given up

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._leave()

    def _leave(self) -> None:
        try:
            for armed in self._armed:
                armed.disarm()
        finally:
            self._asking.close()  # with it go the starters, and who waits for its start ends
            end = time.monotonic() + (0.0 if self._deadlocked else _FAREWELL)
            for each in self._all.values():
                each.thread.join(max(0.01, end - time.monotonic()))
                if each.thread.is_alive():  # the memory has to stay for it
                    self._harness._stuck.append(each.thread)

    def run(self, course: Course) -> tuple[dict[str, Any], BaseException | None]:
        """Let everybody run to the end.

        Returns:
            What each returned, and what the first one raised that did.

        Raises:
            Deadlock, Endless: The run has no end.
        """
        for region in self._harness.regions:  # what reset and check have touched is seen again
            region.rearm()
        for each in self._all.values():
            each.make_ready()
        order = "run"
        while True:
            if not course.enabled:
                self._wait_for_somebody(course)
            if not course.enabled:
                self._deadlocked = True
                course.choose()  # which says so, unless all have ended
                self._deadlocked = False
                break
            moves = self._follow(course, order, course.ahead())
            order = "go"
            for tid, came in moves:
                chosen = course.choose() if tid else None
                assert chosen is None or chosen == self._names[tid], "the plan was another"
                self._apply(course, came)
            if not moves and (name := course.choose()) is not None:
                for _, came in self._follow(course, order, Ahead([name], [], stay=False)):
                    self._apply(course, came)
        errors = [each.error for each in self._all.values() if each.error is not None]
        for other in errors[1:]:
            errors[0].add_note(f"another participant raised {_said(other)}")
        results = {name: each.result for name, each in self._all.items()}
        return results, errors[0] if errors else None

    def _wait_for_somebody(self, course: Course) -> None:
        """Before a deadlock is called one, give who is blocked the time to go on by itself.

        A wait with a time limit is over some time; one that is begun again and again is not waited
        for each time.  And the other threads of the process get their time: one that computes or
        sleeps may be what is waited for.
        """
        last = time.monotonic() + self._harness.timeout * _SHARE
        end = time.monotonic() + _PATIENCE
        limits: dict[int, float] = {}
        while not course.enabled and time.monotonic() < min(end, last):
            if all(position.kind is Where.ENDED for position in course.positions.values()):
                return
            for _, came in self._follow(course, "go", Ahead([], [])):
                self._apply(course, came)
                for tid, *_ in came:  # it went on, and waits for something else now
                    limits.pop(tid, None)
            time.sleep(0.005)
            for tid in self._names:
                if tid not in limits and (seconds := seconds_left(_look(tid))) is not None:
                    limits[tid] = time.monotonic() + seconds
                    end = max(end, limits[tid] + _PATIENCE)
            if self._others_are_busy():
                end = max(end, time.monotonic() + _PATIENCE)

    def _others_are_busy(self) -> bool:
        # What another thread waits for with a limit is mostly no matter of ours: the wait of a
        # watchdog would put off every deadlock.
        ours = {threading.get_native_id(), self._harness._helper.porter, *self._names}
        texts = [_look(thread) for thread in own_threads() if thread not in ours]
        return any(text == "running" or call_of(text) in TIMED for text in texts)

    def _follow(
        self, course: Course, order: str, plan: Ahead[str]
    ) -> list[tuple[int, list[tuple[int, tuple[Any, ...], str]]]]:
        """Have a plan followed; give who went in turn, and where everybody came to."""
        by_tid = plan.renamed(lambda name: self._all[name].tid)
        self._asking.send((order, *by_tid.to_wire()))
        received = None
        for word in ("enough", "stop", ""):  # after this move; at once
            try:
                received = self._asking.receive()
                break
            except TimeoutError:
                self._asking.send((word,))
        if received is None:
            self._harness.check()
            raise HarnessError("the helper process has ended in the middle of a run")
        moves: list[tuple[int, list[tuple[int, tuple[Any, ...], str]]]] = received[0][1]
        if moves and not moves[-1][1]:
            self._give_up(course, moves)
        return moves

    def _give_up(self, course: Course, moves: list[Any]) -> None:
        self._harness.check()
        for tid, came in moves:
            if tid and (not course.moves or course.moves[-1].after is not None):
                course.choose()
            self._apply(course, came)
        seconds = self._harness.timeout * _SHARE * 2
        raise Endless(
            f"{self._names[moves[-1][0]]} has run for {seconds:g} s and has neither touched"
            " memory that is watched, nor ended, nor waited for anybody"
        )

    def _apply(self, course: Course, came: list[tuple[int, tuple[Any, ...], str]]) -> None:
        for tid, fields, call in came:
            participant = self._all[self._names[tid]]
            if fields:
                position = Position(Where.TOUCH, self._harness.ledger.touch(fields))
            elif call:
                position = Position(Where.BLOCKED, note=f"in {call}")
            elif participant.error is not None:
                position = Position(Where.ENDED, note=_said(participant.error))
            else:
                position = ENDED
            course.came(participant.name, position)


def _look(thread: int) -> str:
    """Give the line of /proc about a thread of this process; empty if it has ended."""
    with suppress(OSError), closing(Look(os.getpid(), thread)) as look:
        return look.read()
    return ""


def _checked(check: Check | None, results: dict[str, Any]) -> BaseException | None:
    """Call a check; give what it finds wrong."""
    __tracebackhide__ = True  # pytest shows the test's line, not ours
    if check is None:
        return None
    try:
        inspect.signature(check).bind(results)
        arguments = [results]
    except (TypeError, ValueError):  # ValueError: what it takes is not known
        arguments = []
    try:
        check(*arguments)
    except HarnessError:
        raise
    except BaseException as error:
        # pytest.fail() raises what is no Exception; so does what has to end everything.
        if isinstance(error, Exception) or type(error).__name__ == "Failed":
            return error
        raise
    return None


def _check_participants(participants: Participants) -> None:
    """Refuse what cannot be called by its name.

    Raises:
        TypeError: They are no mapping of names to what is called.
    """
    example = "give each a name, as in {'a': first, 'b': second}"
    if not isinstance(participants, Mapping):
        raise TypeError(f"participants are functions by name, not {participants!r}: {example}")
    for name, call in participants.items():
        if not isinstance(name, str):
            raise TypeError(f"a participant's name is a str, not {name!r}: {example}")
        if not callable(call):
            raise TypeError(
                f"participant {name!r} is a function that is called, not {call!r}:"
                " lambda: ... makes one of a call"
            )


def interleave(
    harness: Harness,
    participants: Participants,
    order: Order,
    *,
    reset: Callable[[], object] | None = None,
    check: Check | None = None,
) -> Interleaving:
    """Run threads in one order of their touches; ``Harness.interleave`` has the words."""
    __tracebackhide__ = True
    _check_participants(participants)
    strategy = Fixed(order, participants)
    strategy.begin()
    course = Course(participants, strategy)
    with Stage(harness, participants) as stage:
        if reset is not None:
            reset()
        results, error = stage.run(course)
        if error is None:
            strategy.end(course)
            error = _checked(check, results)
        if error is not None:
            raise error
    return Interleaving(order_of(course.moves), course.moves, results)


def _check_bounds(preemptions: int | None, orders: int, seconds: float) -> None:
    """Refuse bounds within which nothing would be run, and so nothing found.

    Raises:
        TypeError: One is no number.
        ValueError: One is too small.
    """
    for name, count, least in (("orders", orders, 1), ("preemptions", preemptions, 0)):
        if count is None and name == "preemptions":
            continue
        if type(count) is not int:
            raise TypeError(f"{name} is a whole number, not {count!r}")
        if count < least:
            raise ValueError(f"{name} is {least} or more, not {count}: nothing would be run")
    if type(seconds) not in {int, float}:
        raise TypeError(f"seconds is a number, not {seconds!r}")
    if not seconds > 0:
        raise ValueError(f"seconds is above zero, not {seconds}: nothing would be run")


def explore(
    harness: Harness,
    participants: Participants,
    *,
    reset: Callable[[], object] | None = None,
    check: Check | None = None,
    preemptions: int | None = 2,
    orders: int = 1000,
    seconds: float = 60.0,
    seed: int | None = None,
    caller: FrameType | None = None,
) -> Exploration:
    """Run threads in many orders of their touches; ``Harness.explore`` has the words."""
    __tracebackhide__ = True
    _check_participants(participants)
    _check_bounds(preemptions, orders, seconds)
    systematic = Systematic(preemptions)
    strategy: Strategy = systematic
    if seed is not None:
        strategy = Seeded(participants, seed, 2 if preemptions is None else preemptions)
    began = time.monotonic()
    count = touches = 0
    more = True
    with Stage(harness, participants) as stage:
        while more and count < orders and (not count or time.monotonic() - began < seconds):
            count += 1
            strategy.begin()
            course = Course(participants, strategy)
            if reset is not None:
                reset()
            error: BaseException | None
            try:
                results, error = stage.run(course)
                error = error or _checked(check, results)
            except (Deadlock, Endless) as no_end:
                error = no_end
            if isinstance(error, HarnessError):
                raise error
            if error is not None:
                source, place = _call_of(caller)
                test = as_test(course.moves, why=_said(error), source=source, place=place)
                notice = _NO_RESET if reset is None and count > 1 else ""
                raise RaceFound(course.moves, error, count, seed, test, notice=notice) from error
            touches += sum(move.before.kind is Where.TOUCH for move in course.moves)
            more = strategy.end(course)
    return Exploration(
        orders=count,
        touches=touches,
        seconds=time.monotonic() - began,
        seed=seed,
        preemptions=preemptions,
        complete=seed is None and not more,
        every=seed is None and not more and not systematic.cut,
    )


def _call_of(frame: FrameType | None) -> tuple[str, Span | None]:
    """Find the source of the file that a frame runs, and the call in it that it is at."""
    if frame is None:
        return "", None
    source = "".join(linecache.getlines(frame.f_code.co_filename, frame.f_globals))
    positions = list(frame.f_code.co_positions())[frame.f_lasti // 2]
    line, end_line, column, end_column = positions
    if None in positions or not source:
        return "", None
    assert line is not None
    assert end_line is not None
    assert column is not None
    assert end_column is not None
    return source, Span(line, end_line, column, end_column)
