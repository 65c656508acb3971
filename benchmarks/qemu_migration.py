"""QEMU's own live migration between two QEMUs on loopback, as a yardstick for ours.

    python -m benchmarks.qemu_migration --memory 256 --writes 0.1 --mode postcopy --rounds 3

    figures = run(QemuSettings(memory_mib=256, writes=0.1, mode="hybrid", bandwidth=100 << 20))
    figures.downtime_ms, figures.p50_us, figures.sent_ratio

Knows: QEMU's orders and counters for migration (7.2 and later), and its trace of page requests.
Must not know: aiouffd.

Laws of this file:

* No figure without proof: after each migration the guest (guest.py) has gone on to check all of its
  memory, on the destination, and found it right.  A guest that found it wrong, or a QEMU that ends,
  raises.
* Both QEMUs are new in each run, and both have ended when it returns.

The guest runs in TCG unless told otherwise: it then writes hundreds of times faster than any
network carries, and faults as any program does, from user mode.  With KVM inside a virtual machine
each of its instructions may be emulated, about 1 µs each, and there may be no /dev/kvm at all; on
bare metal ``accel="kvm"`` is the better yardstick.

What was seen of QEMU 7.2, 256 MiB on two cores of a virtual machine, and matters to who compares:

* With no cap, its bulk fills the socket's buffers, and a demanded page comes behind: 4 ms.  With
  ``preempt`` it has a connection of its own: 0.3 ms.  The latter is the strict yardstick.
* A cap is kept by pauses of 100 ms, in which many demanded pages wait too, preempt or not: the
  99th percentile is then 0.1 s, and the median anything from 0.2 ms to that, from run to run.
* A last pass of pre-copy is sent without the cap.  Whether pre-copy converges hangs on
  ``downtime_limit_ms``: 10 % of 256 MiB at 100 MiB/s does with 300 ms, and does not with 100.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from .contest import RunFailed
from .figures import Sample
from .guest import PAGE, READY, ROUND, WRONG, firmware
from .qmp import Qmp, QmpError

PROGRAM: Final = "qemu-system-x86_64"

#: How the memory goes over: before the switch, after it, or one pass before and the rest after.
Mode = Literal["precopy", "postcopy", "hybrid"]
MODES: Final[tuple[Mode, ...]] = ("precopy", "postcopy", "hybrid")

#: What stands for no limit of bandwidth, in bytes/s; QEMU's own default is 128 MiB/s.
UNLIMITED: Final = 1 << 40

# Two lines for each page that was waited for.  Others, as postcopy_place_page, would come for each
# page there is, and slow the whole down.
_ASKED: Final = "postcopy_ram_fault_thread_request"
_CAME: Final = "postcopy_page_req_del"
_ASKED_LINE: Final = re.compile(rf"@(\d+)\.(\d+):{_ASKED} Request for HVA=(0x[0-9a-f]+)")
_CAME_LINE: Final = re.compile(rf"@(\d+)\.(\d+):{_CAME} resolved page req (0x[0-9a-f]+)")

_ENDS_WITH_US: Final = ("setpriv", "--pdeathsig", "KILL", "--")
_READY_SECONDS: Final = 60.0
_ROUNDS_AFTER: Final = 2  # the second has begun after the migration's end
_LOG_END: Final = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class QemuSettings:
    """What is migrated, and how.

    Attributes:
        memory_mib: The guest's memory, in MiB.
        writes: Which part of it the guest rewrites all the time, from 0 to 1.
        mode: See ``Mode``.
        bandwidth: The most that both phases may send, in bytes/s; None for no limit.
        preempt: Whether demanded pages have a connection of their own (``postcopy-preempt``).
        scattered: Whether the guest reads its memory in scattered order, or page after page.
        downtime_limit_ms: How long pre-copy may stop the guest for its last pass; 300 is QEMU's
            default.  For hybrid it is 1: otherwise the guest would be stopped for all that remains
            after the first pass wherever that fits, and nothing be left to ask for.
        seconds: How long the migration may take; what has not ended by then is cancelled.
        accel: "tcg" or "kvm".
        traced: Whether each demanded page is timed.  It costs two lines in a log for each.
    """

    memory_mib: int = 256
    writes: float = 0.0
    mode: Mode = "postcopy"
    bandwidth: int | None = None
    preempt: bool = False
    scattered: bool = True
    downtime_limit_ms: int = 300
    seconds: float = 30.0
    accel: str = "tcg"
    traced: bool = True

    @property
    def memory(self) -> int:
        """The guest's memory, in bytes."""
        return self.memory_mib << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class QemuFigures:
    """What one migration took.

    Attributes:
        converged: Whether it ended within its time.  If not, it was cancelled: the guest went on
            at the source, and only ``total_ms``, ``sent``, ``memory`` and ``passes`` mean anything.
        downtime_ms: QEMU's own, in whole milliseconds.
        stopped_us: From the source's STOP to the destination's RESUME, by one clock.
        total_ms: From the order until both sides had all done, by QEMU.
        sent: Bytes of memory on the wire, headers included.
        memory: Bytes of memory there are.
        passes: How often the source began to go through its memory.
        requests: Pages that the destination asked for.
        blocked_ms: How long the guest's processor waited for pages, in all; QEMU's own.
        faults: How many faults the destination read, also those on pages already under way.
        latencies_us: For each page that was waited for, from the fault's message to its copy being
            done, in microseconds, sorted.  Without the way into the message, and that back to
            the thread.
    """

    converged: bool
    downtime_ms: int
    stopped_us: int
    total_ms: int
    sent: int
    memory: int
    passes: int
    requests: int
    blocked_ms: int
    faults: int
    latencies_us: tuple[int, ...]

    @property
    def sent_ratio(self) -> float:
        """How many times the memory was sent."""
        return self.sent / self.memory

    @property
    def p50_us(self) -> int | None:
        """The median wait for a page; None if none was waited for."""
        return _quantile(self.latencies_us, 0.5)

    @property
    def p99_us(self) -> int | None:
        """The wait that 99 % of the pages stay below; None if none was waited for."""
        return _quantile(self.latencies_us, 0.99)

    def as_sample(self) -> Sample:
        """Give what ``figures.interleave`` takes: times in ns, whatever the unit here.

        Raises:
            RunFailed: It did not converge, so that nothing can be compared.
        """
        if not self.converged:
            raise RunFailed(f"QEMU did not converge in {self.total_ms} ms")
        sample = {
            "stopped_ns": self.stopped_us * 1e3,
            "total_ns": self.total_ms * 1e6,
            "sent_ratio": self.sent_ratio,
            "requests": float(self.requests),
            "waits": float(len(self.latencies_us)),
        }
        for name, value in (("p50_ns", self.p50_us), ("p99_ns", self.p99_us)):
            if value is not None:
                sample[name] = value * 1e3
        return sample


def _quantile(ordered: Sequence[int], q: float) -> int | None:
    return ordered[math.ceil(q * len(ordered)) - 1] if ordered else None


def missing(accel: str = "tcg") -> str:
    """Say what must be installed before ``run`` can; "" if nothing."""
    if shutil.which(PROGRAM) is None:
        return "there is no QEMU: apt install --no-install-recommends qemu-system-x86"
    if accel == "kvm" and not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "/dev/kvm is not there, or not for this user"
    return ""


def version() -> str:
    """Say which QEMU it is, in its own words; "" if there is none."""
    if shutil.which(PROGRAM) is None:
        return ""
    command = [PROGRAM, "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.splitlines()[0]


def run(settings: QemuSettings) -> QemuFigures:
    """Migrate a guest once.

    Raises:
        RunFailed: Its memory arrived damaged, a QEMU failed, or there is none.
    """
    if reason := missing(settings.accel):
        raise RunFailed(reason)
    window = int(settings.memory * settings.writes)
    with tempfile.TemporaryDirectory(prefix="aiouffd-bench-") as folder:
        rom = firmware(settings.memory, window, scattered=settings.scattered)
        Path(folder, "guest.rom").write_bytes(rom)
        try:
            with (
                qemu(settings, Path(folder), "source") as source,
                qemu(settings, Path(folder), "destination", incoming=True) as destination,
            ):
                return _Migration(settings, source, destination).figures()
        except QmpError as error:
            raise RunFailed(f"{settings}: {error}\n{_logs(Path(folder))}") from error


# --- one QEMU --------------------------------------------------------------------------


@dataclass(frozen=True)
class Qemu:
    """A QEMU that runs.

    Attributes:
        qmp: Its ear.
        process: Its process.
        serial: What its guest says goes here.
        trace: Its trace goes here, if it has one.
    """

    qmp: Qmp
    process: subprocess.Popen[bytes]
    serial: Path
    trace: Path

    def said(self) -> bytes:
        """Give all that the guest said.

        Raises:
            RunFailed: A check of its memory failed.
        """
        text = self.serial.read_bytes() if self.serial.exists() else b""
        if WRONG in text:
            raise RunFailed(f"the guest found its memory damaged: {text[-20:]!r}")
        return text

    def rounds(self) -> int:
        """Say how often the guest has checked all of its memory here."""
        return self.said().count(ROUND)

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for something that the guest says."""
        end = time.monotonic() + _READY_SECONDS
        while not condition():
            if self.process.poll() is not None:
                raise QmpError(f"QEMU ended with {self.process.returncode}")
            if time.monotonic() > end:
                raise QmpError(f"not within {_READY_SECONDS:g} s: {what}")
            time.sleep(0.002)


@contextlib.contextmanager
def qemu(
    settings: QemuSettings, folder: Path, name: str, *, incoming: bool = False
) -> Iterator[Qemu]:
    """Run a QEMU over the guest that lies in ``folder/guest.rom``.

    Args:
        settings: How much memory it has, and what runs it.
        folder: Where its files go.
        name: Of its files.
        incoming: Whether it waits for a guest that comes from elsewhere.
    """
    serial, socket = folder / f"{name}.serial", folder / f"{name}.qmp"
    trace, log = folder / f"{name}.trace", folder / f"{name}.log"
    command = [*_ENDS_WITH_US, PROGRAM, "-accel", settings.accel, "-m", str(settings.memory_mib)]
    command += ["-machine", "pc", "-nodefaults", "-display", "none", "-no-reboot"]
    command += ["-bios", str(folder / "guest.rom"), "-serial", f"file:{serial}"]
    command += ["-qmp", f"unix:{socket},server=on,wait=off", "-msg", "timestamp=on"]
    if incoming:
        command += ["-incoming", "defer", "-D", str(trace)]
        command += ["-trace", _ASKED, "-trace", _CAME] if settings.traced else []
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=folder
        )
    with process:
        try:
            with Qmp.connect(socket, process) as qmp:
                yield Qemu(qmp, process, serial, trace)
        finally:
            process.kill()


def _logs(folder: Path) -> str:
    logs = sorted(folder.glob("*.log"))
    return "\n".join(f"{log.name}: {log.read_text(errors='replace')[-_LOG_END:]}" for log in logs)


# --- one migration ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Migration:
    """Two QEMUs, and what goes on between them."""

    settings: QemuSettings
    source: Qemu
    destination: Qemu

    def figures(self) -> QemuFigures:
        """Migrate, see that the guest's memory is right, and count."""
        self.source.until(lambda: READY in self.source.said(), "the guest has filled its memory")
        address = self._prepare()
        if not self._migrate(address):
            return self._cancelled()
        rounds = self.destination.rounds() + _ROUNDS_AFTER
        self.destination.until(
            lambda: self.destination.rounds() >= rounds, "the guest has checked its memory"
        )
        self.source.said()
        return self._counted()

    def _prepare(self) -> str:
        """Tell both sides how; return where the destination listens."""
        settings = self.settings
        on = {"events": True, "postcopy-ram": settings.mode != "precopy"}
        on["postcopy-preempt"] = settings.preempt
        for side in (self.source, self.destination):
            if side is self.destination:
                on = {**on, "postcopy-blocktime": settings.mode != "precopy"}
            states = [{"capability": name, "state": state} for name, state in on.items()]
            side.qmp.execute("migrate-set-capabilities", capabilities=states)
        limit = settings.bandwidth or UNLIMITED
        self.source.qmp.execute(
            "migrate-set-parameters",
            max_bandwidth=limit,
            max_postcopy_bandwidth=limit,
            # With 0, QEMU 7.2 does not even look again for what was written before it stops.
            downtime_limit=1 if settings.mode == "hybrid" else settings.downtime_limit_ms,
        )
        self.destination.qmp.execute("migrate-incoming", uri="tcp:127.0.0.1:0")
        listening = self.destination.qmp.execute("query-migrate")["socket-address"]
        return f"tcp:127.0.0.1:{listening[0]['port']}"

    def _migrate(self, address: str) -> bool:
        """Say whether the migration came to its end."""
        settings, order = self.settings, self.source.qmp.execute
        end = time.monotonic() + settings.seconds
        try:
            order("migrate", uri=address)
            if settings.mode == "hybrid":  # the second pass begins: the first is over
                self.source.qmp.wait_for("MIGRATION_PASS", seconds=settings.seconds, **{"pass": 2})
            if settings.mode != "precopy":
                order("migrate-start-postcopy")
            for side in (self.source, self.destination):
                left = end - time.monotonic()
                side.qmp.wait_for("MIGRATION", seconds=left, status="completed")
        except QmpError:
            for side in (self.source, self.destination):
                failed = side.qmp.find("MIGRATION", status="failed")
                if failed or side.process.poll() is not None or side.qmp.find("RESUME"):
                    raise
            return False
        return True

    def _cancelled(self) -> QemuFigures:
        """Call it off, and see the guest go on where it was."""
        before: dict[str, Any] = self.source.qmp.execute("query-migrate")
        self.source.qmp.execute("migrate_cancel")
        rounds = self.source.rounds() + _ROUNDS_AFTER
        self.source.until(lambda: self.source.rounds() >= rounds, "the guest goes on here")
        return QemuFigures(
            converged=False,
            downtime_ms=0,
            stopped_us=0,
            total_ms=before["total-time"],
            sent=before["ram"]["transferred"],
            memory=self.settings.memory,
            passes=before["ram"]["dirty-sync-count"],
            requests=0,
            blocked_ms=0,
            faults=0,
            latencies_us=(),
        )

    def _counted(self) -> QemuFigures:
        sent: dict[str, Any] = self.source.qmp.execute("query-migrate")
        received: dict[str, Any] = self.destination.qmp.execute("query-migrate")
        stop = self.source.qmp.wait_for("STOP", seconds=1)
        resume = self.destination.qmp.wait_for("RESUME", seconds=1)
        faults, latencies = _waits(self.destination.trace)
        return QemuFigures(
            converged=True,
            downtime_ms=sent["downtime"],
            stopped_us=resume.at_us - stop.at_us,
            total_ms=sent["total-time"],
            sent=sent["ram"]["transferred"],
            memory=self.settings.memory,
            passes=sent["ram"]["dirty-sync-count"],
            requests=sent["ram"]["postcopy-requests"],
            blocked_ms=received.get("postcopy-blocktime", 0),
            faults=faults,
            latencies_us=tuple(sorted(latencies)),
        )


def _waits(trace: Path) -> tuple[int, list[int]]:
    """Count the faults in a trace, and give how long each page was waited for, in µs.

    A page that several threads ask for counts from the first.  One that arrived while its fault
    was on the way is among the faults only: nobody had to be asked for it.
    """
    asked: dict[int, int] = {}
    faults, waits = 0, []
    for line in trace.read_text(encoding="ascii").splitlines() if trace.exists() else ():
        if found := _ASKED_LINE.search(line):
            faults += 1
            page = int(found[3], 16) // PAGE
            asked.setdefault(page, _at(found))
        elif found := _CAME_LINE.search(line):
            page = int(found[3], 16) // PAGE
            if page in asked:
                waits.append(_at(found) - asked.pop(page))
    return faults, waits


def _at(found: re.Match[str]) -> int:
    return int(found[1]) * 1_000_000 + int(found[2])


# --- by hand ---------------------------------------------------------------------------


def line(figures: QemuFigures) -> str:
    """Say it in one line."""
    if not figures.converged:
        return f"did not converge in {figures.total_ms} ms: sent {figures.sent_ratio:.2f} × memory"
    waits = f"{figures.p50_us} / {figures.p99_us} µs" if figures.latencies_us else "none"
    return (
        f"down {figures.downtime_ms} ms ({figures.stopped_us / 1000:.1f}), "
        f"total {figures.total_ms} ms, sent {figures.sent_ratio:.3f} × memory, "
        f"passes {figures.passes}, requests {figures.requests}, faults {figures.faults}, "
        f"waits p50 / p99 {waits}, blocked {figures.blocked_ms} ms"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Migrate some times and print what each took."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--memory", type=int, default=256, help="MiB")
    parser.add_argument("--writes", type=float, default=0.1, help="part of the memory, 0 to 1")
    parser.add_argument("--mode", choices=MODES, default="postcopy")
    parser.add_argument("--bandwidth", type=int, help="MiB/s; no limit if not given")
    parser.add_argument("--preempt", action="store_true", help="demanded pages on their own line")
    parser.add_argument("--sequential", action="store_true", help="read page after page")
    parser.add_argument("--downtime-limit", type=int, default=300, help="ms")
    parser.add_argument("--seconds", type=float, default=30.0, help="cancel after")
    parser.add_argument("--accel", choices=("tcg", "kvm"), default="tcg")
    parser.add_argument("--no-trace", action="store_true", help="do not time demanded pages")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    settings = QemuSettings(
        memory_mib=options.memory,
        writes=options.writes,
        mode=options.mode,
        bandwidth=None if options.bandwidth is None else options.bandwidth << 20,
        preempt=options.preempt,
        scattered=not options.sequential,
        downtime_limit_ms=options.downtime_limit,
        seconds=options.seconds,
        accel=options.accel,
        traced=not options.no_trace,
    )
    all_of_them = []
    for _ in range(options.rounds):
        figures = run(settings)
        all_of_them.append(figures)
        if not options.json:
            print(line(figures), flush=True)
    if options.json:
        print(json.dumps([_summary(figures) for figures in all_of_them], indent=1))
    elif len(all_of_them) > 1:
        print(f"median of the totals: {statistics.median(f.total_ms for f in all_of_them):g} ms")


def _summary(figures: QemuFigures) -> dict[str, object]:
    names = [name for name in QemuFigures.__slots__ if name != "latencies_us"]
    named: dict[str, object] = {name: getattr(figures, name) for name in names}
    return {**named, "p50_us": figures.p50_us, "p99_us": figures.p99_us}


if __name__ == "__main__":
    main()
