"""Recovery: what happens to a fault whose handler did not answer it.

Knows: the failure policy and how each of its steps is carried out.
Must not know: how faults are read.

Law of this file: every fault ends.  If the policy's last action is refused by the kernel the
target is killed, and where nobody can be killed the thread is left hanging and that is said:
nothing here makes up bytes unless Action.ZERO asks for it.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from typing import TYPE_CHECKING, Final

from .errors import FaultError, HandlerError
from .failure import Action, FailurePolicy
from .flight import Flight, Stage
from .performer import resolution_of
from .resolutions import Continue, Handler, Poison, Resolution, Unprotect, Zero

if TYPE_CHECKING:
    from .dispatcher import Dispatcher

log: Final = logging.getLogger("aiouffd")

_LOGGED_EACH: Final = 32  # failures of one pager that are logged one by one; then 64th, 128th ...


class Recovery:
    """The failure policy of one pager, at work."""

    def __init__(self, dispatcher: Dispatcher, policy: FailurePolicy) -> None:
        self._dispatcher = dispatcher
        self.policy = policy

    def handler_failed(self, flight: Flight, error: BaseException) -> None:
        """A handler raised or made no sense: retry, or give up."""
        failure = _fault_error(flight, error)
        policy = self.policy
        if flight.recovering or flight.region is None or not (policy.retries or policy.fallback):
            self.give_up(flight, failure)
            return
        flight.recovering = True
        dispatcher = self._dispatcher
        recovering = self._recover(flight, flight.region.handler, failure)
        task = dispatcher.loop.create_task(recovering, name="aiouffd retry")
        dispatcher.await_handler(flight, task)

    async def _recover(self, flight: Flight, handler: Handler, error: Exception) -> Resolution:
        """Ask again with backoff, then the fallback; what failed last is raised."""
        fault, policy, counters = flight.fault, self.policy, self._dispatcher.counters
        for attempt in range(policy.retries):
            await asyncio.sleep(policy.delay(attempt))
            counters.retries += 1
            try:
                return resolution_of(await handler(fault), fault)
            except asyncio.CancelledError as cancelled:
                # A source that was cancelled, unless we are: then nobody waits any more.
                if flight.task is not asyncio.current_task() or self._dispatcher.closing:
                    raise
                error = _fault_error(flight, cancelled)
            except Exception as failed:
                error = failed
            log.debug("retry %d of the fault at %#x failed", attempt + 1, fault.address)
        if policy.fallback is None:
            raise error
        counters.fallbacks += 1
        return resolution_of(await policy.fallback(fault), fault)

    def give_up(self, flight: Flight, error: Exception) -> None:
        """Nothing answered a fault: the policy's last action."""
        dispatcher = self._dispatcher
        dispatcher.counters.failures += 1
        flight.cancel()
        for observer in dispatcher.observers:
            observer.failure(flight.fault, error)
        action = self.policy.then
        failures = dispatcher.counters.failures
        if failures <= _LOGGED_EACH or failures & (failures - 1) == 0:
            # A source that is gone fails every fault there is: the counters have the rest.
            log.error("%s; then: %s", error, action.value, exc_info=error.__cause__)
        if action is Action.RAISE or (flight.fault.wp and action is Action.POISON):
            # A page that is there cannot be poisoned.  Its writer goes on, so whoever tracks
            # the writes must learn that one was missed.
            dispatcher.fail(error)
        self.last_action(flight, action)

    def last_action(self, flight: Flight, action: Action) -> None:
        """End a fault without its handler."""
        fault, dispatcher = flight.fault, self._dispatcher
        if action is Action.KILL or flight.final:
            if self.kill():
                dispatcher.end(flight, "killed")
                return
            if flight.final:  # the kernel refused the poison, and there is nobody to kill
                action = Action.HANG
        flight.final = True
        if action is Action.HANG:
            flight.stage = Stage.HANGING
            dispatcher.parking.discard(flight)
            log.critical("the thread at %#x is left hanging", fault.address)
        elif fault.wp:
            dispatcher.resolver.carry_out(flight, Unprotect())
        elif action is Action.ZERO:
            dispatcher.resolver.carry_out(flight, Continue() if fault.minor else Zero())
        else:
            dispatcher.resolver.carry_out(flight, Poison())

    def kill(self) -> bool:
        """Send SIGKILL to the target, if there is a pidfd of it.

        Returns:
            Whether it is dead or dying now.
        """
        target = self._dispatcher.target
        if target is None or target.closed:
            return False
        try:
            signal.pidfd_send_signal(target.fileno(), signal.SIGKILL)
        except ProcessLookupError:
            self._dispatcher.target_is_gone()
        return True


def _fault_error(flight: Flight, error: BaseException) -> FaultError:
    """Give what a handler raised as an error that names the fault."""
    if isinstance(error, FaultError):
        return error
    page = flight.fault.address
    failure = HandlerError(
        f"the handler of the fault at {page:#x} raised {type(error).__name__}: {error}", page
    )
    failure.__cause__ = error
    return failure
