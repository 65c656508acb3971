"""Participants: threads that go on one at a time, each looked at until it stands still.

Knows: a plan of moves, and what /proc says of a thread that does not run.
Must not know: pages, rules; why this is the order.

This is the helper's side.  The test process sends a plan (``ahead``) and hears what came of each
move only when the plan is over; what it takes to make a move is all here.

A participant stands still if it stands before a touch, has ended (it says so), or is asleep.
Asleep in a system call means that it waits for somebody: a lock, a pipe.  Asleep outside of one
means that a page is on its way, its own touch for one.  And a thread that waits for the GIL is
asleep as well, though all it needs is a moment.  So the two threads of the test process that
need the GIL again and again, the one that asks and the porter, are looked at too: the GIL is
free if both stand in their calls after the porter has answered.

Laws of this file:

* A participant is said to be asleep only if two looks in a row find it in the same call, the GIL
  is free, and all messages were read: nobody is at a touch that is not known yet.
* One look is enough for who was asleep already and still is: whoever is woken runs at once.
* A thread that sleeps for a time (``clock_nanosleep``) is not still: it goes on by itself.
* Nobody stands for longer than the harness's time limit without a word of the test process.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from .ahead import Ahead
from .asleep import TIMED, Look, call_of
from .channel import Channel
from .engine import Engine, Standing, wire
from .holding import Holder
from .performing import Performer
from .turning import Turning

_FIRST_LOOK_NS: Final = 150_000  # by then a step is made, and mostly the way to the next touch
_NEXT_LOOK_NS: Final = 50_000
_LAST_LOOK_NS: Final = 2_000_000
#: Looks at who makes a touch in a system call: being stepped over, it sleeps for moments as well.
_LOOKS_IN_CALL: Final = 10
_SILENCE_NS: Final = 15_000_000  # without an answer for that long, somebody has the GIL

_AT_HOME: Final = frozenset({"recvmsg", "recvfrom", "poll", "ppoll"})


class State(Enum):
    """Where a participant is."""

    WAITING = "waits for its start"
    GOING = "going"
    STANDING = "stands before a touch"
    ASLEEP = "asleep in a call"
    ENDED = "ended"


@dataclass(slots=True, eq=False)
class _Watched:
    look: Look
    starter: int  # a byte written here starts its call
    state: State = State.WAITING
    asleep_in: str = ""


class Participants:
    """Participants of the test process, and the moves that it has planned for them.

    Sharing: one thread.
    """

    def __init__(
        self,
        channel: Channel,
        process: int,
        beside: Iterable[int],
        *,
        engine: Engine,
        turning: Turning,
        performer: Performer,
        holder: Holder,
        take_in: Callable[[], None],
    ) -> None:
        """Serve one call of the test process, to the end of its channel.

        Args:
            channel: Where plans come and are answered.
            process: The test process.
            beside: Those of its threads that need the GIL: the one that asks, and the porter.
            engine: The books.
            turning: The loop.
            performer: Lets touches through.
            holder: Asks the porter, and has threads wait in the trampoline.
            take_in: Reads and takes in all faults.
        """
        self.channel = channel
        self._process = process
        self._beside = [Look(process, each) for each in beside]
        self._engine = engine
        self._turning = turning
        self._performer = performer
        self._holder = holder
        self._take_in = take_in
        self._all: dict[int, _Watched] = {}
        self._plan: Ahead[int] | None = None
        self._moves: list[tuple[int, list[tuple[Any, ...]]]] = []
        self._came: list[int] = []  # who has come to a stand in this move
        self._move = 0  # so that a look that was planned for another one is told apart
        self._pause_ns = _FIRST_LOOK_NS
        self._last: dict[int, str] = {}
        self._alike = 0  # looks that have found what the one before them found
        self._asked = 0  # the porter, in this move
        self._answered = 0
        # Where participants stood without the GIL; a ctypes call there gives it away.  The same
        # code may be reached with it in hands another time, which is noticed by the silence.
        self._without_gil: set[tuple[int, int]] = set()
        self._unsure: dict[int, tuple[int, int]] = {}  # where they stand, and the question
        self._moved_ns = time.monotonic_ns()
        self._closed = False
        self._limit()

    def __contains__(self, thread: object) -> bool:
        return thread in self._all

    def add(self, thread: int, starter: int) -> None:
        """Take in a participant.

        Args:
            thread: Who.
            starter: A descriptor: one byte written there starts its call; it is ours now.
        """
        self._all[thread] = _Watched(Look(self._process, thread), starter)

    def close(self) -> None:
        """Give up; who stands is let go by whoever disarms its rule."""
        self._plan = None
        self._closed = True
        for each in self._all.values():
            each.look.close()
            os.close(each.starter)
        self._all.clear()
        for look in self._beside:
            look.close()
        self._beside.clear()
        self.channel.close()

    # --- what is said to it ------------------------------------------------------------

    def on_message(self) -> bool:
        """Take a message; say whether there may be more."""
        try:
            received = self.channel.receive()
        except OSError:
            received = None
        self._moved_ns = time.monotonic_ns()
        match received:
            case None:
                return False
            case (("ended", thread), _):
                self._note(thread, State.ENDED)
            case (("run", *plan), _):
                for each in self._all.values():
                    each.state = State.WAITING
                self._engine.set_idle(self._all, idle=False)
                self._came = []
                self._follow(plan)
            case (("go", *plan), _):
                self._follow(plan)
            case (("enough",), _) if self._plan is not None:
                self._plan.most = 0
            case (("stop",), _) if self._plan is not None:
                self._answer()
        return True

    def on_touch(self, touch: Standing) -> None:
        """Take note that a participant is stopped at a touch, maybe with the GIL in its hands."""
        if (touch.thread, touch.pc) in self._without_gil:
            self._asked = 0  # but if it has the GIL this time, nobody has answered since
            self.on_stand(touch.thread)
        else:
            self._unsure[touch.thread] = touch.pc, self._ask()

    def on_stand(self, thread: int) -> None:
        """Take note that a participant stands before a touch, without the GIL."""
        self._note(thread, State.STANDING)

    def on_pong(self, number: int) -> None:
        """Take note that the porter has answered a question, so that the GIL was free."""
        self._answered = max(self._answered, number)
        for thread, (pc, asked) in list(self._unsure.items()):
            if asked <= number:
                del self._unsure[thread]
                self._without_gil.add((thread, pc))
                self.on_stand(thread)

    def _ask(self) -> int:
        number = self._holder.ping()
        self._turning.after(_SILENCE_NS, lambda: self._on_silence(number))
        return number

    def _on_silence(self, number: int) -> None:
        if self._answered >= number:
            return
        for thread, each in self._all.items():
            touch = self._touch_of(thread)
            if touch is not None and (thread in self._unsure or each.state is State.STANDING):
                self._holder.park_for_gil(touch)
        self._unsure.clear()

    def _limit(self) -> None:
        """See to it that nobody stands for ever while the test process says nothing."""
        if self._closed:
            return
        if time.monotonic_ns() - self._moved_ns > self._holder.timeout_ns:
            for touch in list(self._engine.standing.values()):
                if touch.thread in self._all:
                    self._holder.on_limit(touch)
        self._turning.after(self._holder.timeout_ns // 4, self._limit)

    def _note(self, thread: int, state: State, asleep_in: str = "") -> None:
        participant = self._all[thread]
        participant.state = state
        participant.asleep_in = asleep_in
        self._came.append(thread)
        if self._plan is not None:
            self._settle()

    # --- the plan ----------------------------------------------------------------------

    def _follow(self, plan: list[Any]) -> None:
        self._plan = Ahead(*plan)
        self._moves = []
        if self._came:  # by themselves, between two plans
            self._moves.append((0, self._those_who_came()))
        self._go_on()

    def _answer(self) -> None:
        self._plan = None
        if all(each.state is State.ENDED for each in self._all.values()):
            self._engine.set_idle(self._all, idle=True)
        self._move += 1
        self._ask()  # who hears the answer needs the GIL
        try:
            self.channel.send(("moves", self._moves))
        except OSError:
            pass  # nobody asks any more

    def _go_on(self) -> None:
        assert self._plan is not None
        can = (State.WAITING, State.STANDING)
        thread = self._plan.next([tid for tid, each in self._all.items() if each.state in can])
        if thread is None:
            self._answer()
            return
        self._moved_ns = time.monotonic_ns()
        self._last = {}
        self._alike = 0
        self._move += 1
        self._asked = 0
        participant = self._all[thread]
        waiting = participant.state is State.WAITING
        participant.state = State.GOING
        self._moves.append((thread, []))
        if waiting:
            os.write(participant.starter, b"!")
        else:
            touch = self._touch_of(thread)
            if touch is not None:  # else it was let go at the time limit
                self._performer.let_go(touch, "frozen")
        self._pause_ns = _FIRST_LOOK_NS
        self._look_later()

    def _settle(self) -> None:
        """End the move if everybody stands still for sure; else the next look will tell."""
        states = [each.state for each in self._all.values()]
        if State.GOING in states:
            return
        if State.ASLEEP in states:
            self._look(self._move)
        else:
            self._end_move()

    def _end_move(self) -> None:
        self._moves[-1][1].extend(self._those_who_came())
        self._go_on()

    def _those_who_came(self) -> list[tuple[Any, ...]]:
        came, self._came = self._came, []
        return [self._told(each) for each in dict.fromkeys(came)]

    def _told(self, thread: int) -> tuple[Any, ...]:
        participant = self._all[thread]
        touch = self._touch_of(thread)
        if participant.state is State.STANDING and touch is not None:
            return (thread, wire(touch, time.monotonic_ns()), "")
        return (thread, (), call_of(participant.asleep_in))

    # --- looking -----------------------------------------------------------------------

    def _look_later(self) -> None:
        move = self._move
        self._turning.after(self._pause_ns, lambda: self._look(move))
        self._pause_ns = (
            _NEXT_LOOK_NS
            if self._pause_ns == _FIRST_LOOK_NS
            else min(self._pause_ns * 3 // 2, _LAST_LOOK_NS)
        )

    def _look(self, move: int) -> None:
        if move != self._move or self._plan is None:
            return
        texts = {
            tid: each.look.read()
            for tid, each in self._all.items()
            if each.state in (State.GOING, State.ASLEEP)
        }
        new = {tid: text for tid, text in texts.items() if self._all[tid].asleep_in != text}
        asleep = self._are_asleep(new)
        still = asleep and (not new or self._is_home())
        self._alike = self._alike + 1 if still and new == self._last else 0
        enough = _LOOKS_IN_CALL if any(each in self._performer.stepper for each in new) else 1
        if still and (not new or (self._alike >= enough and self._answered >= self._asked > 0)):
            number = len(self._came)
            self._take_in()  # which may tell us that somebody stands, and end the move
            if move != self._move or len(self._came) != number:
                return
            if any(map(self._is_at_touch, new)):
                self._look_later()
                return
            for tid, text in new.items():
                participant = self._all[tid]
                participant.state = State.ASLEEP
                participant.asleep_in = text
                self._came.append(tid)
            self._end_move()
            return
        if asleep and not self._asked:  # who is not at home may wait for the GIL, too
            self._asked = self._ask()
        self._last = new
        self._look_later()

    def _are_asleep(self, texts: dict[int, str]) -> bool:
        calls = [call_of(text) for text in texts.values()]
        return all(calls) and TIMED.isdisjoint(calls) and not any(map(self._is_at_touch, texts))

    def _is_home(self) -> bool:
        """Say whether those who need the GIL again and again want nothing now."""
        return all(call_of(look.read()) in _AT_HOME for look in self._beside)

    def _touch_of(self, thread: int) -> Standing | None:
        return self._engine.standing.get((self._process, thread))

    def _is_at_touch(self, thread: int) -> bool:
        return self._touch_of(thread) is not None
