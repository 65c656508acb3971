"""The books balance: after errors, cancellations, removals and joins, exactly."""

from __future__ import annotations

import asyncio
import random
from typing import Any

from aiouffd import Action, FailurePolicy, Feature, Metrics, PageFault, Resolution
from tests.serving import MADV_DONTNEED, check_books, from_image, image, serving
from tests.targets import PAGE


async def test_a_fill_counts_what_it_installed_before_it_had_to_wait(seed: int) -> None:
    """A fill that is held up in the middle, over and over, still adds up to every page."""
    print(f"seed {seed}")
    pages, rounds = 512, 8
    async with serving(features=Feature.EVENT_REMOVE, pages=2 * pages * rounds) as served:
        target = served.target
        for page in range(pages * rounds, 2 * pages * rounds, 8):  # many ioctls for each piece
            served.uffd.copy(target.at(page), image(page * PAGE))
        target.pages //= 2  # what is freed meanwhile; the other half is what is filled
        churn = target.start_churn(MADV_DONTNEED, seed, 3, pause_us=20)
        for round_ in range(rounds):
            first = (rounds + round_) * pages
            installed = await served.region.fill(first * PAGE, image(first * PAGE, pages * PAGE))
            assert installed == pages * PAGE * 7 // 8
        await target.stop(2)
        assert await churn > 0
        assert served.pager.counters.filled_bytes == rounds * pages * PAGE * 7 // 8


async def test_every_fault_is_accounted_for(seed: int) -> None:
    """Errors, retries, fallbacks, removals and prefetch: the sums hold while serving and after."""
    print(f"seed {seed}")
    rng = random.Random(seed)
    pages = 512

    async def moody(fault: PageFault) -> Resolution:
        choice = rng.random()
        if choice < 0.1:
            raise RuntimeError("moody")
        if choice < 0.15:
            raise asyncio.CancelledError
        if choice < 0.4:
            await asyncio.sleep(rng.random() / 1000)
        if choice > 0.98:
            await asyncio.sleep(60)
        return await from_image(fault)

    metrics = Metrics()
    failure = FailurePolicy(retries=1, backoff=0.001, then=Action.ZERO, fallback=from_image)
    settings: dict[str, Any] = {
        "deadline": 0.4,
        "failure": failure,
        "observers": [metrics],
        "pages": pages,
    }
    async with serving(moody, features=Feature.EVENT_REMOVE, threads=6, **settings) as served:
        target, counters = served.target, served.pager.counters
        churn = target.start_churn(MADV_DONTNEED, rng.randrange(2**63), 5, pause_us=300)
        storms = [target.start_storm(rng.randrange(2**63), 4000, thread) for thread in range(4)]
        filled = 0
        for at in range(0, pages, 64):
            filled += await served.region.fill(at * PAGE, image(at * PAGE, 16 * PAGE))
            check_books(served.pager)
        for storm in storms:
            found = await storm
            assert found.wrong == 0
            assert found.stopped == 0
        await target.stop(2)
        assert await churn > 0
        assert served.pager.in_flight == 0
        assert counters.faults == counters.joined + counters.ended
        assert counters.filled_bytes == filled
        assert counters.copied_bytes == metrics.outcomes.get("copy", 0) * PAGE
        assert counters.ended == sum(metrics.outcomes.values()) == metrics.latency.count
        assert counters.failures == sum(metrics.failures.values())
        assert counters.events == sum(metrics.events.values())
        assert counters.fallbacks <= counters.retries
