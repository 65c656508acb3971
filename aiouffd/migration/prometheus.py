"""A migration's figures in Prometheus' text format.

Knows: prometheus_client, the names and labels of the metrics.
Must not know: HTTP, how figures are collected.

Laws of this file:

* What is shown is what the report says (``report``), under the same names.
* They are of one migration, that under way or the last: with the next one counters begin anew.
* Series that can come are there from the start, at zero.

prometheus_client (extra ``metrics``) is imported by ``text_of``.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

from .. import __version__
from .stages import Stage

if TYPE_CHECKING:
    from prometheus_client import Metric

#: The figure, the metric's name behind ``aiouffd_migration_``, what it is.
_COUNTERS: Final = (
    ("sent_bytes", "sent_bytes", "Sent on the connections, heads and all"),
    ("page_bytes", "page_bytes", "Memory sent with its contents, each time"),
    ("zero_bytes", "zero_bytes", "Memory that was only said to be zeros, each time"),
    ("again_bytes", "again_bytes", "Memory sent again after a connection broke"),
    ("rounds", "rounds", "Rounds of pre-copy, with the one under way"),
    ("demand", "demands", "Runs of pages that the destination has asked for"),
    ("demand_bytes", "demand_bytes", "Memory in these"),
    ("connections", "connections", "Times that there was a line"),
    ("disconnected", "disconnected_seconds", "Time without one, after the first"),
    ("faults", "faults", "Page faults of the program at the destination"),
    ("demand_faults", "demand_faults", "Those that waited for the network"),
    ("failures", "fault_failures", "Page faults that ended in the failure policy"),
)
_GAUGES: Final = (
    ("memory_bytes", "memory_bytes", "The program's memory"),
    ("left_bytes", "left_bytes", "Memory that is still to be sent"),
    ("dirty_rate", "dirty_bytes_per_second", "What the program writes, as of the last round"),
    ("sent_over_memory", "sent_over_memory_ratio", "Bytes sent for each byte of memory"),
    ("downtime", "downtime_seconds", "From the order to stop until it ran at the destination"),
    ("seconds", "seconds", "What the migration has taken in all"),
)
_QUANTILES: Final = (("0.5", "demand_p50"), ("0.99", "demand_p99"), ("1", "demand_longest"))


def text_of(report: Callable[[], dict[str, Any] | None]) -> Callable[[], Awaitable[bytes]]:
    """Make the function that gives the text of a scrape.

    Args:
        report: Gives the report as it is now; None: there is no migration yet.

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
        def collect(self) -> Iterator[Metric]:
            return collect(report())

    async def text() -> bytes:
        registry = CollectorRegistry(auto_describe=False)
        ProcessCollector(registry=registry)
        registry.register(_Figures())
        return generate_latest(registry)

    return text


def collect(report: dict[str, Any] | None) -> Iterator[Metric]:
    """Give every metric with its present value."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily

    yield InfoMetricFamily("aiouffd", "What runs here", {"version": __version__})
    value = report or {}
    figures = value.get("figures", {})
    about = {name: str(value.get(name, "")) for name in ("side", "name", "peer")}
    yield InfoMetricFamily("aiouffd_migration", "Which migration it is", about)
    stages = GaugeMetricFamily(
        "aiouffd_migration_stage", "1 for the stage that it has come to", labels=["stage"]
    )
    for stage in Stage:
        stages.add_metric([stage.value], int(value.get("stage") == stage.value))
    yield stages
    for figure, name, text in _COUNTERS:
        yield CounterMetricFamily(f"aiouffd_migration_{name}", text, figures.get(figure, 0))
    for figure, name, text in _GAUGES:
        yield GaugeMetricFamily(f"aiouffd_migration_{name}", text, figures.get(figure, 0))
    times = GaugeMetricFamily(
        "aiouffd_migration_demand_fault_seconds",
        "From a page fault's message to its page, over the network",
        labels=["quantile"],
    )
    for quantile, figure in _QUANTILES:
        times.add_metric([quantile], figures.get(figure, 0))
    yield times
    stall = CounterMetricFamily(
        "aiouffd_migration_stall_seconds", "What threads have waited for memory", labels=["thread"]
    )
    for thread, seconds in figures.get("stall_by_thread", {}).items():
        stall.add_metric([thread], seconds)
    yield stall
