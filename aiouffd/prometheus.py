"""A server's figures in Prometheus' text format.

Knows: prometheus_client, the names and labels of the metrics.
Must not know: HTTP, how figures are collected.

Laws of this file:

* Nothing here runs per fault: plain counters are read when somebody scrapes, and the sums over
  hundreds of sessions do not hold the loop.  What clones share is looked up then, in threads.
* What is a counter only grows: ended sessions stay in the sums.
* Series that can come are there from the start, at zero: a first failure is an increase.

prometheus_client (extra ``metrics``) is imported by ``text_of``.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Final

from . import __version__
from .failure import Action
from .metrics import Histogram
from .session_states import State
from .sharing import SharingFigures
from .status import Status
from .totals import Totals

if TYPE_CHECKING:
    from prometheus_client import Metric

#: Outcomes of faults, as Observer.end names them.
OUTCOMES: Final = (
    *("copy", "zero", "continue", "move", "unprotect", "poison", "wake"),
    *("already", "gone", "killed", "hanging"),
)

#: Histogram buckets that are shown: 1 us to 34 s in powers of two.
_BUCKETS: Final = range(10, 36)

_COUNTS: Final = (
    ("faults", "faults", "Page faults reported, duplicates included"),
    ("joined", "faults_joined", "Faults that waited for one on the same page"),
    ("removed", "faults_removed", "Faults answered with zeros: the target had freed the page"),
    ("parked", "faults_parked", "Times that a fault had to wait: the layout was changing"),
    ("queued", "faults_queued", "Faults that waited for a free place among max_in_flight"),
    ("already", "faults_already_there", "Faults woken because the page was there (EEXIST)"),
    ("retries", "handler_retries", "Times that a handler was asked again"),
    ("fallbacks", "handler_fallbacks", "Times that the second handler was asked"),
    ("overdue", "faults_overdue", "Faults that took longer than warn_after"),
)

#: What clones of one image share now, by the names of SharingFigures.
_SHARING: Final = {
    "clones": "Targets that map the shared image",
    "image_bytes": "What its one copy takes",
    "hole_bytes": "Of these, zeros that clones have put into holes",
    "mapped_bytes": "Pages of the copy that clones map, over all of them",
    "private_bytes": "Pages that clones have written, over all of them",
    "saved_bytes": "What sharing saves; below zero if it costs",
}


def text_of(status: Status) -> Callable[[], Awaitable[bytes]]:
    """Make the function that gives the text of a scrape.

    Args:
        status: The server's.

    Raises:
        ImportError: prometheus_client is missing; the message names the extra.
    """
    try:
        from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
        from prometheus_client.registry import Collector
    except ImportError as error:
        raise ImportError(
            "metrics need prometheus-client: pip install 'aiouffd[metrics]'"
        ) from error

    class _Figures(Collector):
        def __init__(self, totals: Totals, shares: SharingFigures | None) -> None:
            self._totals = totals
            self._shares = shares

        def collect(self) -> Iterator[Metric]:
            return collect(status, self._totals, self._shares)

    async def text() -> bytes:
        registry = CollectorRegistry(auto_describe=False)  # one each: scrapes may overlap
        ProcessCollector(registry=registry)  # descriptors, memory, CPU time of this process
        shares = await status.sharing()
        registry.register(_Figures(await status.totals(), shares))
        return generate_latest(registry)

    return text


def collect(status: Status, totals: Totals, shares: SharingFigures | None) -> Iterator[Metric]:
    """Give every metric with its present value."""
    from prometheus_client.core import InfoMetricFamily

    yield InfoMetricFamily("aiouffd", "What runs here", {"version": __version__})
    yield from _faults(totals)
    yield from _sessions(status, totals)
    yield from _sources(status)
    if shares is not None:
        yield from _sharing(shares)


def _faults(totals: Totals) -> Iterator[Metric]:
    from prometheus_client.core import GaugeMetricFamily

    counters, metrics = totals.counters, totals.metrics
    for field, name, text in _COUNTS:
        yield _counter(name, text, getattr(counters, field))
    yield _by("faults_ended", "Faults that have ended", "outcome", metrics.outcomes, OUTCOMES)
    yield _by(
        "faults_failed",
        "Faults that ended in the failure policy's last action",
        "policy",
        totals.failures,
        (action.value for action in Action),
    )
    yield _by("fault_errors", "Why faults failed", "error", metrics.failures)
    yield GaugeMetricFamily(
        "aiouffd_faults_in_flight", "Faults that have begun and not ended", totals.in_flight
    )
    yield from _prefetch(totals)
    installed = {"demand": counters.copied_bytes, "ahead": counters.filled_bytes}
    yield _by("installed_bytes", "Memory filled, in bytes", "how", installed)
    yield _by("layout_events", "Changes of targets' address spaces", "event", metrics.events)
    yield _histogram(
        "fault_seconds", "From a fault's message to its answer", "", {"": metrics.latency}
    )


def _prefetch(totals: Totals) -> Iterator[Metric]:
    figures = totals.prefetch
    how = {"replay": figures.replayed_bytes, "hydration": figures.hydrated_bytes}
    yield _by("prefetched_bytes", "Installed by working sets and in the background", "how", how)
    text = "Brought in vain: there already, removed or gone"
    yield _counter("prefetched_in_vain_bytes", text, figures.already_bytes)
    yield _counter("prefetch_refused", "Stretches that were left out", figures.refused)
    yield _counter("prefetch_read_bytes", "Read ahead from the source", figures.read_bytes)


def _sessions(status: Status, totals: Totals) -> Iterator[Metric]:
    from prometheus_client.core import GaugeMetricFamily

    server = status.server
    living = GaugeMetricFamily(
        "aiouffd_sessions", "Sessions that live, and handshakes", labels=["state"]
    )
    for state in State:
        if not state.ended:
            name = state.name.lower()
            begins = len(server.handshakes) if state is State.HANDSHAKING else 0
            living.add_metric([name], begins + totals.sessions.get(name, 0))
    yield living
    over = [state.name.lower() for state in State if state.ended]
    ended = {name: count for name, count in totals.sessions.items() if name in over}
    yield _by("sessions_ended", "Sessions that have ended", "state", ended, over)
    yield _counter("sessions_started", "Sessions that have begun", sum(totals.sessions.values()))
    yield _counter("sessions_failed", "Ended sessions with a fault that failed", server.failed)
    yield _counter("peers_refused", "Peers that were not served", server.refused)
    yield GaugeMetricFamily(
        "aiouffd_memory_bytes",
        "Memory of the living sessions, in bytes",
        sum(region.length for one in server.sessions for region in one.handover.regions),
    )
    yield GaugeMetricFamily(
        "aiouffd_draining", "1 if new targets are refused", int(server.draining)
    )


def _sources(status: Status) -> Iterator[Metric]:
    from prometheus_client.core import CounterMetricFamily

    amount = CounterMetricFamily("aiouffd_source_bytes", "Bytes read", labels=["source", "how"])
    reads = CounterMetricFamily(
        "aiouffd_source_reads", "Reads, by how they ended", labels=["source", "result"]
    )
    for one in status.reads:
        amount.add_metric([one.name, "at_hand"], one.at_hand_bytes)
        amount.add_metric([one.name, "waited"], one.waited_bytes)
        reads.add_metric([one.name, "at_hand"], one.at_hand)
        reads.add_metric([one.name, "waited"], one.latency.count)
        reads.add_metric([one.name, "error"], one.errors + one.errors_at_hand)
        reads.add_metric([one.name, "cancelled"], one.cancelled)
    yield amount
    yield reads
    yield _histogram(
        "source_read_seconds",
        "Reads that had to wait",
        "source",
        {one.name: one.latency for one in status.reads},
    )


def _sharing(shares: SharingFigures) -> Iterator[Metric]:
    from prometheus_client.core import GaugeMetricFamily

    for name, text in _SHARING.items():
        yield GaugeMetricFamily(f"aiouffd_sharing_{name}", text, getattr(shares, name))


def _counter(name: str, text: str, value: float) -> Metric:
    from prometheus_client.core import CounterMetricFamily

    return CounterMetricFamily(f"aiouffd_{name}", text, value)


def _by(
    name: str, text: str, label: str, values: Mapping[str, int], known: Iterable[str] = ()
) -> Metric:
    """Make a counter with one label, whose known values are there at zero."""
    from prometheus_client.core import CounterMetricFamily

    family = CounterMetricFamily(f"aiouffd_{name}", text, labels=[label])
    for value, count in (dict.fromkeys(known, 0) | dict(values)).items():
        family.add_metric([value], count)
    return family


def _histogram(name: str, text: str, label: str, values: Mapping[str, Histogram]) -> Metric:
    from prometheus_client.core import HistogramMetricFamily

    family = HistogramMetricFamily(f"aiouffd_{name}", text, labels=[label] if label else [])
    for value, histogram in values.items():
        seen = sum(histogram.buckets[: _BUCKETS.start])
        buckets = []
        for number in _BUCKETS:
            seen += histogram.buckets[number]
            buckets.append((repr((1 << number) / 1e9), seen))
        buckets.append(("+Inf", histogram.count))
        family.add_metric([value] if label else [], buckets, histogram.total_ns / 1e9)
    return family
