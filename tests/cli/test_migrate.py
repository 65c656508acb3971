"""``aiouffd migrate``: programs that move between processes, by command."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import trustme

from aiouffd.cli import main
from tests.stand_in_vmm import ROOT

pytestmark = pytest.mark.once

_MIB: Final = 1 << 20


class Running:
    """A process whose lines of JSON are read one by one."""

    def __init__(self, *arguments: str, folder: Path, stdin: int = subprocess.DEVNULL) -> None:
        self.first: dict[str, Any] = {}
        self.errors = folder / f"errors-{len(os.listdir(folder))}"
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "error", *arguments],
                cwd=ROOT,
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def until(self, word: str) -> dict[str, Any]:
        """Read up to the line that has this key, or is this event."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            value: dict[str, Any] = json.loads(line)
            if word in value or value.get("event") == word:
                return value
        raise AssertionError(f"it ended without {word}: {self.errors.read_text()}")

    def close_stdin(self) -> None:
        stdin, self.process.stdin = self.process.stdin, None
        assert stdin is not None
        stdin.close()

    def end(self) -> tuple[int, str]:
        """Wait for its end; give the status and what it has said on stderr."""
        self.process.communicate(timeout=60)
        return self.process.returncode, self.errors.read_text()


class Bench:
    """Starts processes that end with the test."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self.folder = folder
        self.here, self.there = str(folder / "here"), str(folder / "there")
        self._stack = stack

    def start(self, *arguments: str, stdin: int = subprocess.DEVNULL) -> Running:
        running = Running(*arguments, folder=self.folder, stdin=stdin)
        self._stack.enter_context(running.process)
        self._stack.callback(running.process.kill)
        return running

    def program(self, *options: str) -> Running:
        """Start the program that can move, here."""
        program = self.start("-m", "tests.cli.movable", self.here, *options)
        program.until("ready")
        return program

    def receive(
        self, *options: str, program: tuple[str, ...] = (), stdin: int = subprocess.DEVNULL
    ) -> tuple[Running, str]:
        """Start the command there; give it, and where it listens."""
        program = program or (sys.executable, "-m", "tests.cli.movable", self.there)
        command = ("migrate", "receive", "127.0.0.1:0", "--json", *options, "--", *program)
        receive = self.start("-m", "aiouffd", *command, stdin=stdin)
        listening = receive.first = receive.until("listening")
        return receive, f"{listening['address']}:{listening['port']}"

    def send(self, to: str, *options: str) -> Running:
        return self.start("-m", "aiouffd", "migrate", "send", self.here, to, "--json", *options)

    def run(self, *arguments: str) -> tuple[int, str, str]:
        """Run a command to its end."""
        done = subprocess.run(
            [sys.executable, "-W", "error", "-m", "aiouffd", "migrate", *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with contextlib.ExitStack() as stack:
        yield Bench(tmp_path, stack)


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An authority and two certificates, as files."""
    folder = tmp_path_factory.mktemp("pem")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(os.fspath(folder / "ca"))
    for name in ("source.example", "there.example"):
        authority.issue_cert(name).private_key_and_cert_chain_pem.write_to_path(
            os.fspath(folder / name)
        )
    return {name: os.fspath(folder / name) for name in ("ca", "source.example", "there.example")}


def tls(pem: dict[str, str], name: str, *options: str) -> tuple[str, ...]:
    return ("--tls-cert", pem[name], "--tls-cacert", pem["ca"], *options)


# --- it moves --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plan",
    [
        ["--rounds", "0"],
        ["--rounds", "1", "--downtime", "0"],
        ["--behind", "0", "--downtime", "5", "--checksums", "--compress", "zstd"],
    ],
    ids=["post-copy", "hybrid", "pre-copy"],
)
def test_a_program_moves(bench: Bench, plan: list[str]) -> None:
    """It goes on where it had stopped, and both sides say what that has cost."""
    if "zstd" in plan:
        from aiouffd.migration.packing import available

        if "zstd" not in available():
            plan = plan[:-2]
    program = bench.program()
    reports = [str(bench.folder / name) for name in ("sent", "received")]
    receive, to = bench.receive("--wait", "--report", reports[1])
    send = bench.send(to, *plan, "--report", reports[0])
    sending = send.until("sending")
    assert (sending["name"], sending["memory_bytes"]) == ("movable", 4 * _MIB)
    moved = send.until("moved")
    assert send.end() == (0, "")
    left = program.until("left")["left"]
    assert program.end() == (0, "")
    assert receive.until("began")["began"] == left
    assert receive.until("ended")["ended"] >= left + 100
    assert receive.end() == (0, "")

    sent, received = (json.loads(Path(each).read_text()) for each in reports)
    assert (sent["side"], received["side"]) == ("source", "destination")
    for report in (sent, received):
        assert (report["version"], report["outcome"], report["error"]) == (1, "moved", "")
        assert (report["stage"], report["name"]) == ("done", "movable")
    assert sent["peer"] == to
    figures = sent["figures"]
    assert moved.items() >= figures.items()
    assert received["figures"]["downtime"] == figures["downtime"] > 0
    assert figures["seconds"] > figures["downtime"]
    assert figures["memory_bytes"] == 4 * _MIB
    assert figures["page_bytes"] + figures["zero_bytes"] >= 4 * _MIB
    assert figures["zero_bytes"] >= _MIB
    assert figures["sent_over_memory"] == figures["sent_bytes"] / (4 * _MIB)
    assert len(figures["stall_by_thread"]) == min(figures["faults"], 1)
    assert sum(figures["stall_by_thread"].values()) == pytest.approx(figures["stall"])
    assert sent["plan"]["checksums"] is ("--checksums" in plan)
    assert sent["source"]["samples"][-1]["stage"] == "done"
    timeline = sent["destination"]["timeline"]
    assert sum(timeline["faults"]) == figures["faults"]
    if plan[:2] == ["--rounds", "0"]:
        assert figures["demand_faults"] > 0
        assert 0 < figures["demand_p50"] <= figures["demand_p99"] <= figures["demand_longest"]
        assert figures["rounds"] == 0
    if "--behind" in plan:
        assert (figures["faults"], figures["demand"]) == (0, 0)
        assert figures["rounds"] >= 1


def test_the_program_outlives_who_has_received_it(bench: Bench) -> None:
    """Without --wait the command ends when all memory is there, and says which process it is."""
    bench.program()
    program = (sys.executable, "-m", "tests.cli.movable", bench.there, "4", "stays")
    receive, to = bench.receive(program=program, stdin=subprocess.PIPE)
    bench.send(to).until("moved")
    pid = receive.until("moved")["pid"]
    assert receive.process.wait(60) == 0
    pidfd = os.pidfd_open(pid)
    try:
        said = f"movable (pid {pid}) runs; nothing to do\n"
        assert bench.run("restart", bench.there) == (0, said, "")
    finally:
        receive.close_stdin()
        assert select.select([pidfd], [], [], 60)[0] == [pidfd]
        os.close(pidfd)


def test_many_programs_come_one_after_the_other(bench: Bench) -> None:
    """--times counts them; one that fails does not end the others."""
    first = bench.program()
    receive, to = bench.receive("--times", "2", program=(sys.executable, "-c", "exit(5)"))
    for _ in range(2):
        send = bench.send(to)
        assert send.end()[0] == 1
        assert receive.until("failed")["outcome"] == "source"
    assert receive.end() == (1, "")
    first.process.kill()


def test_it_says_how_it_goes(bench: Bench) -> None:
    """Every half second, for programs: round, dirty rate, sent, zero, demand, stall, end."""
    bench.program()
    receive, to = bench.receive("--wait")
    send = bench.send(to, "--bandwidth", "2M", "--rounds", "1", "--downtime", "0")
    progress: dict[str, Any] = {"sent_bytes": 0}
    while progress["sent_bytes"] < 4096:
        progress = send.until("progress")
    assert (progress["stage"], progress["round"]) == ("copying", 1)
    assert progress["sent_bytes"] < 4 * _MIB
    assert progress["left_bytes"] > 0
    assert progress["connected"] is True
    assert {"dirty_rate", "zero_bytes", "demand", "stall", "estimated_end"} < progress.keys()
    while not receive.until("progress")["sent_bytes"]:
        pass
    moved = send.until("moved")
    assert moved["rounds"] == 1
    receive.until("ended")


def test_people_are_told_in_sentences(bench: Bench) -> None:
    """Where it goes, what it has cost."""
    bench.program()
    _, to = bench.receive("--wait")
    status, printed, errors = bench.run("send", bench.here, to)
    assert (status, errors) == (0, "")
    lines = printed.splitlines()
    assert lines[0].startswith("sending movable (pid ")
    assert lines[0].endswith(f"4.0 MiB in 1 region to {to}, not encrypted")
    assert lines[1] == f"moved movable to {to}"
    assert [line[2:15].rstrip() for line in lines[2:]] == [
        "stood still",
        "in all",
        "sent",
        "demand faults",
        "stall",
    ]


# --- who is trusted --------------------------------------------------------------------


def test_certificates_are_shown_and_checked(bench: Bench, pem: dict[str, str]) -> None:
    """Each side says by name whom it expects."""
    bench.program()
    receive, to = bench.receive(
        "--wait", *tls(pem, "there.example", "--client-name", "source.example")
    )
    send = bench.send(to, *tls(pem, "source.example", "--server-name", "there.example"))
    assert send.until("sending")["tls"] is True
    send.until("moved")
    receive.until("ended")


@pytest.mark.parametrize(
    ("client", "server_name", "text"),
    [
        ("source.example", "else.example", "not valid for 'else.example'"),
        ("there.example", "there.example", "certificate that is not for source.example"),
    ],
)
def test_another_name_is_refused(
    bench: Bench, pem: dict[str, str], client: str, server_name: str, text: str
) -> None:
    """On either side, and the program runs on."""
    program = bench.program()
    _, to = bench.receive(*tls(pem, "there.example", "--client-name", "source.example"))
    send = bench.send(to, *tls(pem, client, "--server-name", server_name))
    assert text in send.until("failed")["error"]
    status, errors = send.end()
    assert status == 1
    assert text in errors
    assert program.process.poll() is None


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["receive", "0.0.0.0:0", "--", "true"], "--plain"),
        (["receive", "[::]:0", "--", "true"], "--plain"),
        (["send", "/nowhere", "192.0.2.1:7440"], "--plain"),
        (["receive", "127.0.0.1:0", "--tls-cert", "x", "--", "true"], "--tls-cacert"),
        (
            ["receive", ":0", "--tls-cert", "x", "--tls-cacert", "y", "--", "true"],
            "--client-name",
        ),
        (["receive", ":0", "--any-client", "--", "true"], "--tls-cert"),
        (["send", "/nowhere", ":1", "--tls-cert", "x", "--plain"], "leave it out"),
        (["send", "/nowhere", ":1", "--server-name", "x"], "--tls-cert"),
        (["receive", ":0", "--", "/no/such/program"], "/no/such/program"),
        (["receive", ":0", "--wait", "--times", "2", "--", "true"], "--times"),
        (["send", "/nowhere", ":1"], "/nowhere: No such file"),
        (["send", "/nowhere", "no.such.host.invalid:1"], "no.such.host.invalid: "),
    ],
)
def test_what_cannot_be_meant_is_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str], text: str
) -> None:
    """In one line that says what to do, before anything happens."""
    assert main(["migrate", *arguments]) == 1
    printed, errors = capsys.readouterr()
    assert printed == ""
    assert text in errors
    assert errors.startswith("aiouffd: ")
    assert errors.count("\n") == 1


# --- it fails --------------------------------------------------------------------------


def failed(bench: Bench, to: str, *options: str) -> tuple[int, dict[str, Any]]:
    """Send to where it fails; give the status, and the report that says so."""
    report = bench.folder / "failed"
    send = bench.send(to, *options, "--report", str(report))
    event = send.until("failed")
    status, errors = send.end()
    assert errors == f"aiouffd: {event['error']}\n"
    value: dict[str, Any] = json.loads(report.read_text())
    assert value["outcome"] == event["outcome"]
    assert value["error"] == event["error"]
    return status, value


def test_nobody_listens(bench: Bench) -> None:
    """The program runs on, and it is said what is missing there."""
    program = bench.program()
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        status, report = failed(bench, f"127.0.0.1:{nobody.getsockname()[1]}")
    assert (status, report["outcome"]) == (1, "source")
    assert "is `aiouffd migrate receive` running there?" in report["error"]
    assert program.process.poll() is None


def test_the_program_does_not_run_there(bench: Bench) -> None:
    """It does not take its memory: it runs on here, and both sides say why."""
    bench.program()
    program = (sys.executable, "-m", "tests.cli.movable", bench.there, "4", "ends")
    receive, to = bench.receive("--report", str(bench.folder / "there"), program=program)
    status, report = failed(bench, to)
    assert (status, report["outcome"]) == (1, "source")
    assert "the program does not" in report["error"]
    assert receive.until("failed")["outcome"] == "source"
    assert receive.end()[0] == 1
    assert json.loads((bench.folder / "there").read_text())["outcome"] == "source"
    assert bench.run("restart", bench.here)[1].endswith("runs; nothing to do\n")


def test_the_program_fails_when_it_is_let_run(bench: Bench) -> None:
    """What it has done by then nobody knows: it does not go on here by itself, but can be let."""
    bench.program()
    program = (sys.executable, "-m", "tests.cli.movable", bench.there, "4", "fails")
    receive, to = bench.receive("--report", str(bench.folder / "there"), program=program)
    status, report = failed(bench, to)
    assert (status, report["outcome"]) == (8, "lost")
    assert "was let run, and failed" in report["error"]
    assert receive.until("failed")["outcome"] == "lost"
    assert receive.end()[0] == 8
    assert json.loads((bench.folder / "there").read_text())["outcome"] == "lost"
    assert bench.run("restart", bench.here)[0] == 0


def test_it_does_not_converge(bench: Bench) -> None:
    """It writes faster than it can be sent, and nothing may follow: it stays, with advice."""
    bench.program()
    _, to = bench.receive()
    options = ("--behind", "0", "--rounds", "2", "--downtime", "0", "--bandwidth", "4M")
    status, report = failed(bench, to, *options)
    assert (status, report["outcome"]) == (1, "source")
    assert "does not converge" in report["error"]
    assert report["figures"]["rounds"] == 2


def test_a_signal_in_time_lets_the_program_run_on(bench: Bench) -> None:
    """Before the switch the first one is enough; the other side hears of it."""
    program = bench.program()
    receive, to = bench.receive()
    report = bench.folder / "report"
    send = bench.send(to, "--bandwidth", "1M", "--report", str(report))
    receive.until("progress")
    send.process.send_signal(signal.SIGINT)
    send.until("cancelled")
    assert send.end() == (130, "")
    assert json.loads(report.read_text())["outcome"] == "cancelled"
    assert "cancelled" in receive.until("failed")["error"]
    assert receive.end()[0] == 1
    assert program.process.poll() is None


def test_a_signal_too_late_changes_nothing(bench: Bench) -> None:
    """It is said, and the program goes on there with all of its memory."""
    bench.program()
    receive, to = bench.receive("--wait")
    send = bench.send(to, "--rounds", "0", "--bandwidth", "2M")
    receive.until("running")
    send.process.send_signal(signal.SIGTERM)
    send.until("too_late")
    send.until("moved")
    assert send.end() == (0, "")
    receive.until("ended")


def test_a_second_signal_gives_up(bench: Bench) -> None:
    """The program stands still here, and goes on by an operator's order alone."""
    program = bench.program()
    receive, to = bench.receive("--deadline", "0.2")
    send = bench.send(to, "--rounds", "0", "--bandwidth", "1M")
    receive.until("running")
    send.process.send_signal(signal.SIGTERM)
    send.until("too_late")
    send.process.send_signal(signal.SIGTERM)
    event = send.until("failed")
    assert event["outcome"] == "unknown"
    status, errors = send.end()
    assert status == 7
    assert f"aiouffd migrate restart {bench.here}" in errors
    assert receive.until("failed")["outcome"] == "lost"
    assert receive.end()[0] == 8

    status, _, errors = bench.run("send", bench.here, to)
    assert status == 1
    assert "stands still" in errors
    status, printed, _ = bench.run("restart", bench.here)
    assert status == 0
    assert "goes on here" in printed
    assert bench.run("restart", bench.here)[1].endswith("runs; nothing to do\n")

    _, to = bench.receive("--wait")
    bench.send(to).until("moved")
    assert program.until("left")["left"] > 0


def test_the_receiver_is_told_to_end(bench: Bench) -> None:
    """The first signal refuses what has not been switched; with nothing received that is all."""
    program = bench.program()
    receive, to = bench.receive()
    send = bench.send(to, "--bandwidth", "1M")
    send.until("progress")
    receive.process.send_signal(signal.SIGTERM)
    assert "told to end" in send.until("failed")["error"]
    assert send.end()[0] == 1
    assert receive.end()[0] == 1
    assert program.process.poll() is None

    receive, _ = bench.receive()
    receive.process.send_signal(signal.SIGTERM)
    assert receive.until("stopped")["programs"] == 0
    assert receive.end() == (1, "")


def test_the_receiver_ends_a_program_that_lacks_memory_by_a_second_signal(bench: Bench) -> None:
    """After the first it goes on; after the second the source hears that it is lost."""
    bench.program()
    receive, to = bench.receive()
    send = bench.send(to, "--rounds", "0", "--bandwidth", "1M")
    receive.until("running")
    receive.process.send_signal(signal.SIGTERM)
    receive.until("draining")
    receive.process.send_signal(signal.SIGTERM)
    assert receive.until("failed")["outcome"] == "lost"
    assert receive.end()[0] == 8
    assert send.until("failed")["outcome"] == "lost"
    status, errors = send.end()
    assert status == 8
    assert f"aiouffd migrate restart {bench.here}" in errors


def test_a_report_that_cannot_be_written_hides_nothing(bench: Bench) -> None:
    """It is said, and the status is that of the migration."""
    bench.program()
    _, to = bench.receive("--wait")
    send = bench.send(to, "--report", str(bench.folder / "no" / "report"))
    assert "cannot be written" in send.until("warning")["error"]
    send.until("moved")
    assert send.end() == (0, "")


# --- metrics ---------------------------------------------------------------------------


def test_both_sides_give_metrics(bench: Bench) -> None:
    """While it goes on, and on the receiving side as long as the command waits."""
    pytest.importorskip("aiohttp", reason="needs aiohttp: pip install 'aiouffd[web]'")
    pytest.importorskip("prometheus_client", reason="needs it: pip install 'aiouffd[metrics]'")
    from urllib.request import urlopen

    bench.program()
    program = (sys.executable, "-m", "tests.cli.movable", bench.there, "4", "stays")
    options = ("--metrics", "127.0.0.1:0")
    receive, to = bench.receive("--wait", *options, program=program, stdin=subprocess.PIPE)
    send = bench.send(to, "--rounds", "0", "--bandwidth", "4M", *options)
    sending = send.until("sending")

    def value(url: str, name: str) -> float:
        with urlopen(url, timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        return float(next(line for line in lines if line.startswith(f"{name} ")).split()[-1])

    assert value(sending["metrics"], "aiouffd_migration_memory_bytes") == 4 * _MIB
    moved = send.until("moved")
    receive.until("ended")
    for name, figure in (
        ("faults_total", "faults"),
        ("downtime_seconds", "downtime"),
        ("sent_bytes_total", "sent_bytes"),
        ('demand_fault_seconds{quantile="0.5"}', "demand_p50"),
        ("sent_over_memory_ratio", "sent_over_memory"),
    ):
        found = value(receive.first["metrics"], f"aiouffd_migration_{name}")
        assert found == pytest.approx(moved[figure], rel=0.1)
    assert value(receive.first["metrics"], 'aiouffd_migration_stage{stage="done"}') == 1
    receive.close_stdin()
    assert receive.process.wait(60) == 0
