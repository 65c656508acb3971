"""Sources that wait for their own target, and what is said about them."""

from __future__ import annotations

import asyncio
import logging
import os
import re
from typing import Any

import pytest

from aiouffd import DeadlineExceeded, PageFault, Pager, Resolution
from tests.serving import Record, from_image, serving
from tests.targets import PAGE, Signal, until


async def test_a_source_that_waits_for_its_target_is_named_and_ended(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A handler that waits for bytes only its target could send: named, then failed closed."""
    record = Record()
    ours, theirs = os.pipe()
    loop = asyncio.get_running_loop()

    async def from_the_target(fault: PageFault) -> Resolution:
        if fault.offset == PAGE:
            arrived = asyncio.Event()
            loop.add_reader(ours, arrived.set)
            try:
                await arrived.wait()  # the line that the watchdog is to name
            finally:
                loop.remove_reader(ours)
        return await from_image(fault)

    caplog.set_level(logging.WARNING, "aiouffd")
    settings: dict[str, Any] = {"warn_after": 0.1, "deadline": 0.5, "observers": [record]}
    try:
        async with serving(from_the_target, **settings) as served:
            target = served.target
            stuck = target.start_read(1)
            await until(lambda: "overdue" in caplog.text, "the watchdog speaks")
            line = next(text for text in caplog.messages if "overdue" in text)
            assert re.search(r"test_watchdog\.py:\d+ in .*from_the_target", line), line
            assert "offset 0x1000" in line
            assert await target.start_read(2, thread=1) == 3  # others go on
            assert isinstance(await stuck, Signal)
            assert isinstance(record.failures[0], DeadlineExceeded)
            assert served.pager.counters.overdue == 1
    finally:
        os.close(ours)
        os.close(theirs)


async def test_quiet_targets_are_asked_ever_more_rarely() -> None:
    """An idle target costs no wake-ups in the long run; one that was heard of is asked soon."""
    async with serving() as served, serving(know_target=False) as unknown:
        loop = asyncio.get_running_loop()

        def next_question(pager: Pager, after: float, *, heard_something: bool) -> float:
            dispatcher = pager._dispatcher
            counters = dispatcher.counters
            heard = counters.faults + counters.events
            dispatcher.timers.cancel_all()
            dispatcher.watchdog._ask_alive(after, heard - heard_something)
            return dispatcher.timers._handles["alive"].when() - loop.time()

        assert await served.target.start_read(0) == 1
        assert next_question(served.pager, 64.0, heard_something=False) > 120
        assert next_question(served.pager, 64.0, heard_something=True) < 2  # one, and rounding
        assert next_question(unknown.pager, 64.0, heard_something=False) < 2  # its exit, too
