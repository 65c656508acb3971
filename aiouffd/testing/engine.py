"""What becomes of a touch: the rules' counts, who stands where, and what is written down.

Knows: rules, touches, whose turn it is.
Must not know: userfaultfds, ptrace, clocks, sockets; ``service`` does what is decided here.

A *touch* is one access of a thread to one page that was not there for it (absent, or
write-protected and written to).  The kernel reports it once, or again after a signal; it ends
when the access is let through.

Laws of this file:

* A thread stands at one touch at a time; a message that repeats it is the same touch.  Only a
  signal handler that runs while it stands can make another, *within* the first, and ends it first.
* Each touch is counted once by every rule that it fits, in the order of arrival.
* A touch is stepped over, and its page taken away again, exactly when a rule would otherwise
  not see what it still waits for.
* Every touch is written down, and ends with what became of it; those for which there is no room
  are counted.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from .rules import Kind, Rule

#: Touches kept; later ones are counted only, and whoever asks for touches is told how many.
KEPT: Final = 1_000_000


@dataclass(slots=True, eq=False)
class Standing:
    """A touch that has not ended: its thread stands in the kernel, or in the trampoline.

    Attributes:
        number: From 1, in order of arrival.
        process: Process id.
        thread: Thread id.
        region: The region's number.
        page: Which page of the region.
        offset: The touched byte's offset in the region.
        access: ``read`` or ``write``.
        system_call: The number of the system call that touched; None for the program itself.
        pc: The program counter; 0 if not known.
        mapping: Where the memory is mapped; the service's own.
        time_ns: When it arrived.
        delay: The distribution of each SLOW rule that fits, in order.
        freeze: The number of the FREEZE rule that stops it; 0 if none does.
        values: (start, bytes) that it is to find.
        failing: It is to fail.
        once: ... and the next one is not.
        held_by: ``page``, ``trampoline``, or empty while it does not stand.
        parked: It has said that it is in the trampoline.
        returning: It was let go, and is on its way out of the trampoline.
        parks: How often it came back from the trampoline by itself.
        comings: How often its page had come when its thread was there last.
        going: It was let go; what remains is up to its thread.
        overdue: Nobody released it in time.
        outer: The touch at which the thread stood when a signal handler of its made this one.
        told: The test process knows that its thread stands, and is to hear when it goes on.
        outcome: What became of it.
    """

    number: int
    process: int
    thread: int
    region: int
    page: int
    offset: int
    access: str
    system_call: int | None
    pc: int
    mapping: Any
    time_ns: int
    where: str = ""
    delay: list[tuple[Any, ...]] = field(default_factory=list)
    freeze: int = 0
    values: list[tuple[int, bytes]] = field(default_factory=list)
    failing: bool = False
    once: bool = False
    held_by: str = ""
    parked: bool = False
    returning: bool = False
    parks: int = 0
    comings: int = 0
    going: bool = False
    overdue: bool = False
    told: bool = False
    outer: Standing | None = None
    outcome: str = ""

    @property
    def stopped_by(self) -> int:
        """The number of its freeze; 0 for a latency, and -1 once nothing stops it any more."""
        return self.freeze or (-1 if self.going else 0)


@dataclass(slots=True)
class Progress:
    """A rule and how far it has come.

    Attributes:
        rule: The rule.
        hits: Touches that it has fitted.
        fired: It has done what it does once.
        spent: It stops nobody any more.
        idle: The threads that it is about make no touches now.
        slowed: Pages that it has slowed down.
    """

    rule: Rule
    hits: int = 0
    fired: bool = False
    spent: bool = False
    idle: bool = False
    slowed: set[int] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Shape:
    """A region as far as deciding needs it."""

    page_size: int
    pages: int


class Engine:
    """The harness's books.

    Sharing: one thread.
    """

    def __init__(self, kept: int = KEPT) -> None:
        """Begin with no region, no rule and no touch.

        Args:
            kept: So many touches are written down.
        """
        self.regions: dict[int, Shape] = {}
        self.armed: dict[int, Progress] = {}
        self.standing: dict[tuple[int, int], Standing] = {}  # innermost, by process and thread
        self.written: list[tuple[Any, ...]] = []
        self.dropped = 0  # touches that have ended and were not written down
        self._kept = kept
        self.count = 0

    # --- what a test orders ------------------------------------------------------------

    def add_region(self, number: int, page_size: int, pages: int) -> None:
        """Know a region."""
        self.regions[number] = Shape(page_size, pages)

    def forget_region(self, number: int) -> None:
        """Forget a region and the rules about it."""
        del self.regions[number]
        for rule in [a.rule.number for a in self.armed.values() if a.rule.region == number]:
            del self.armed[rule]

    def arm(self, rule: Rule) -> None:
        """Have a rule from now on."""
        self.armed[rule.number] = Progress(rule)

    def set_idle(self, threads: Container[int], *, idle: bool) -> None:
        """Note that these threads make no touches for a while, or that they do again.

        Meanwhile what others touch need not be taken away again for the sake of rules that are
        about these threads only.
        """
        for armed in self.armed.values():
            if armed.rule.threads and all(each in threads for each in armed.rule.threads):
                armed.idle = idle

    def disarm(self, number: int) -> list[Standing]:
        """Drop a rule.

        Returns:
            Who stands because of it, in order of arrival.
        """
        self.armed.pop(number, None)
        return [touch for touch in self.all_standing() if touch.freeze == number]

    def spend(self, number: int) -> None:
        """Note that a freeze has let somebody go: unless it is for ever, it stops nobody new."""
        if armed := self.armed.get(number):
            armed.spent = True

    # --- what a thread does ------------------------------------------------------------

    def arrive(
        self,
        *,
        process: int,
        thread: int,
        region: int,
        offset: int,
        access: str,
        mapping: Any,
        time_ns: int,
        system_call: int | None = None,
        pc: int = 0,
        where: str = "",
    ) -> Standing:
        """Take in a touch, and decide what becomes of it.

        If its thread stands already, a signal handler makes it within the touch that stands.
        """
        self.count += 1
        touch = Standing(
            number=self.count,
            process=process,
            thread=thread,
            region=region,
            page=offset // self.regions[region].page_size,
            offset=offset,
            access=access,
            system_call=system_call,
            pc=pc,
            mapping=mapping,
            time_ns=time_ns,
            where=where,
        )
        for armed in self.armed.values():
            if armed.rule.fits(region, offset, access, thread, system_call):
                armed.hits += 1
                _apply(armed, touch)
        touch.outer = self.standing.get((process, thread))
        self.standing[process, thread] = touch
        return touch

    def all_standing(self) -> list[Standing]:
        """Give all touches that have not ended, those within which a thread made others too."""
        found = []
        for touch in self.standing.values():
            chain: Standing | None = touch
            while chain is not None:
                found.append(chain)
                chain = chain.outer
        return found

    def is_innermost(self, touch: Standing) -> bool:
        """Say whether a touch has not ended and is the one at which its thread stands now."""
        return self.standing.get((touch.process, touch.thread)) is touch

    def sees_more(self, touch: Standing) -> bool:
        """Say whether some rule has to see the next touch of this page too."""
        shape = self.regions.get(touch.region)
        if shape is None:  # forgotten, and its rules with it
            return False
        size = shape.page_size
        start = touch.page * size
        return any(
            _waits(armed, touch)
            for armed in self.armed.values()
            if armed.rule.covers(touch.region, start, start + size)
        )

    def others(self, touch: Standing) -> Iterator[Standing]:
        """Give who else stands at this page of this mapping in the kernel."""
        for other in self.all_standing():
            if (
                other is not touch
                and other.mapping is touch.mapping
                and (other.region, other.page) == (touch.region, touch.page)
                and not other.parked
            ):
                yield other

    def returning(self, touch: Standing) -> list[Standing]:
        """Give who is on its way out of the trampoline to the same page."""
        return [
            other
            for other in self.all_standing()
            if other.returning
            and other.mapping is touch.mapping
            and (other.region, other.page) == (touch.region, touch.page)
        ]

    def end(self, touch: Standing, outcome: str, now_ns: int) -> None:
        """Write down that a touch was let through, and how."""
        key = touch.process, touch.thread
        if self.standing.get(key) is not touch:
            return
        if touch.outer is None:
            del self.standing[key]
        else:
            self.standing[key] = touch.outer
        touch.outcome = outcome
        touch.held_by = ""
        if len(self.written) < self._kept:
            self.written.append(wire(touch, now_ns))
        else:
            self.dropped += 1


def wire(touch: Standing, now_ns: int) -> tuple[Any, ...]:
    """Give a touch as ``touches.Touch`` reads it; the region by its number."""
    return (
        touch.number,
        touch.time_ns,
        touch.process,
        touch.thread,
        touch.region,
        touch.page,
        touch.offset,
        touch.access,
        touch.system_call,
        touch.pc,
        touch.where,
        touch.outcome,
        now_ns - touch.time_ns,
    )


def _apply(armed: Progress, touch: Standing) -> None:
    """Let a rule that fits have its say."""
    rule = armed.rule
    due = armed.hits >= rule.nth
    match rule.kind:
        case Kind.FREEZE:
            if due and (rule.every or not armed.spent) and not touch.freeze:
                armed.fired = True
                touch.freeze = rule.number
        case Kind.SLOW:
            if due and (rule.every or touch.page not in armed.slowed):
                armed.slowed.add(touch.page)
                touch.delay.append(rule.latency)
        case Kind.FAIL:
            if due and (rule.every or not armed.fired):
                armed.fired = True
                touch.failing = True
                touch.once = not rule.every
        case Kind.CHANGE:
            if armed.hits <= len(rule.values):  # the last one stays, or what is written over it
                touch.values.append((rule.start, rule.values[armed.hits - 1]))
        case Kind.WATCH:
            pass


def _waits(armed: Progress, touch: Standing) -> bool:
    """Say whether a rule waits for touches that a page which is there would not show."""
    rule = armed.rule
    if armed.idle:
        return False
    if rule.access == "write" and touch.access == "read":
        return False  # the page is filled write-protected: the write will show
    match rule.kind:
        case Kind.WATCH:
            return True
        case Kind.SLOW:
            return rule.every or touch.page not in armed.slowed
        case Kind.FREEZE:
            return rule.every or not armed.fired
        case Kind.FAIL:
            return not armed.fired
        case Kind.CHANGE:
            return armed.hits < len(rule.values)
