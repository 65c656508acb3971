"""Kill a server at random moments under load, again and again: nothing may be lost.

    python -m tests.chaos --rounds 1000 [--seed N]

Real processes all of them: ``aiouffd keep -- aiouffd serve``, and targets (``soak_target.c``)
whose threads read, write, remove, move and fork their lazily served memory at random, and compare
every byte with a model of their own.  A round is a kill -9 of the server at a random moment, also
while it is still taking over from the one before it.

Knows: how to start all of them, kill the server, and judge the targets.
Must not know: what the server does to survive it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import random
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from aiouffd import Feature
from tests import soak
from tests.serving import LAYOUT, image
from tests.targets import PAGE, TIME_SCALE

ROOT: Final = Path(__file__).resolve().parent.parent
PATIENCE: Final = 30.0 * TIME_SCALE  # seconds without a step of a target: it hangs
THREADS: Final = 3
PAGES: Final = 512  # per thread

#: What targets do: letters with weights, see do_operation in soak_target.c.  Forks are rare: of
#: more than 64 children in a second a server refuses some (see Service.max_children).
OPERATIONS: Final = {
    "balloon": "r20n2w8d12p3k3K2",
    "forks": "r40n4w16d8f1k6K4",
    "moves": "r20n2w8d4m4u1p3k3K2",
    "all": "r60n6w24d12m12u3p9f1k9K6",
}


class Wrong(AssertionError):
    """A target has seen a byte that must not be, or waits for ever."""


class Target:
    """One process that is served."""

    def __init__(self, socket: str, kind: str, operations: str, seed: int, alarm_us: int) -> None:
        self.name = f"{kind} {operations} seed {seed}"
        control_fd = os.memfd_create("control")
        os.ftruncate(control_fd, soak._CONTROL_BYTES)
        self._control = mmap.mmap(control_fd, soak._CONTROL_BYTES)
        features = LAYOUT | (Feature.EVENT_FORK if "f" in operations else 0)
        words = [
            *(socket, control_fd, kind, THREADS, PAGES, PAGE, seed, operations, 0),
            *(int(features), alarm_us),
        ]
        self.popen = subprocess.Popen(
            [soak.executable(), *map(str, words)],
            pass_fds=(control_fd,),
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            process_group=0,
        )
        os.close(control_fd)
        self._last = b""
        self._since = time.monotonic()

    def get(self, name: str) -> int:
        value: int = struct.unpack_from("<Q", self._control, 8 * soak._FIELDS.index(name))[0]
        return value

    def put(self, name: str, value: int) -> None:
        struct.pack_into("<Q", self._control, 8 * soak._FIELDS.index(name), value)

    @property
    def message(self) -> str:
        return self._control[soak._MESSAGE :].split(b"\0", 1)[0].decode()

    def judge(self) -> None:
        """Raise if it has seen a wrong byte, has ended badly, or makes no step."""
        if self.get("errors"):
            raise Wrong(f"{self.name}: {self.message}")
        status = self.popen.poll()
        if status is not None and (status or not self.get("stop")):
            raise Wrong(f"{self.name}: ended with status {status}")
        now = self._control[soak._PROGRESS : soak._MESSAGE]
        if now != self._last or status is not None:
            self._last, self._since = now, time.monotonic()
        elif time.monotonic() - self._since > PATIENCE:
            raise Wrong(f"{self.name}: no step for {PATIENCE:g} s")

    def steps(self) -> list[tuple[int, int]]:
        """Give how far each thread is, and its forked child."""
        words = struct.unpack_from(f"<{2 * soak._THREADS}Q", self._control, soak._PROGRESS)
        return [(words[n], words[soak._THREADS + n]) for n in range(THREADS)]

    def finish(self) -> None:
        """Let it compare everything a last time and end."""
        self.put("stop", 1)
        while self.popen.poll() is None:
            self.judge()
            time.sleep(0.005)
        self.judge()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()
        self._control.close()


class Kept:
    """A server, with a keeper or without, and what it says."""

    def __init__(self, folder: Path, options: list[str], keeper: list[str] | None) -> None:
        self.socket = str(folder / "s" / "vm.sock")
        python = [sys.executable, "-m", "aiouffd"]
        serve = [*python, "serve", str(folder / "image"), "--socket", self.socket, "--json"]
        command = [*serve, *options]
        if keeper is not None:
            command = [*python, "keep", *keeper, "--", *command]
        self.events: Counter[str] = Counter()
        self.ids: list[str] = []  # of sessions, as they were taken over
        self.said: list[str] = []
        self._changed = threading.Condition()
        self.popen = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
        )
        self._kept = keeper is not None
        self._threads = [
            threading.Thread(target=self._listen, args=(self.popen.stdout, self._on_event)),
            threading.Thread(target=self._listen, args=(self.popen.stderr, self.said.append)),
        ]
        for thread in self._threads:
            thread.start()

    def _listen(self, stream: Any, take: Any) -> None:
        for line in stream:
            with self._changed:
                take(line.rstrip("\n"))
                self._changed.notify_all()

    def _on_event(self, line: str) -> None:
        with contextlib.suppress(ValueError):  # a line cut by a kill
            event = json.loads(line)
            self.events[event["event"]] += 1
            if event["event"] == "taken_over":
                self.ids.append(event["session"])
            if event["event"] == "refused":
                self.said.append(line)

    def wait_for(self, event: str, count: int) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: self.events[event] >= count, PATIENCE):
                raise Wrong(f"no {event} within {PATIENCE:g} s: {self.said[-20:]}")

    def server(self) -> int | None:
        """Give the pid of the server, if one runs."""
        if not self._kept:
            return self.popen.pid
        path = f"/proc/{self.popen.pid}/task/{self.popen.pid}/children"
        try:
            pids = Path(path).read_text(encoding="ascii").split()
        except OSError:
            return None
        return int(pids[-1]) if pids else None

    def lost_children(self) -> int:
        """Count the children that died with a server between two instructions, as it says."""
        return sum("forked child of" in line and "was lost" in line for line in self.said)

    def end(self) -> int:
        """Ask both to end; give the keeper's exit status."""
        self.popen.send_signal(signal.SIGTERM)
        return self.popen.wait(PATIENCE)

    def kill(self) -> None:
        """Kill what is left of both."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()
        for thread in self._threads:
            thread.join()
        for stream in (self.popen.stdout, self.popen.stderr):
            assert stream is not None
            stream.close()


@dataclass
class Done:
    """What a run has seen."""

    rounds: int = 0
    during_take_over: int = 0
    checked: int = 0
    forks: int = 0
    removals: int = 0
    moves: int = 0
    targets: int = 0
    lost_children: int = 0
    slowest: float = 0.0
    longest_wait: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.rounds} kills ({self.during_take_over} of them while taking over),"
            f" {self.targets} targets, {self.checked >> 20} MiB compared, {self.forks} forks,"
            f" {self.removals} removals, {self.moves} moves; slowest restart"
            f" {self.slowest:.2f} s, longest wait after one {self.longest_wait:.2f} s; children"
            f" lost between two instructions: {self.lost_children}"
        )


@contextlib.contextmanager
def kept(
    options: list[str] | None = None, keeper: list[str] | None = None, *, alone: bool = False
) -> Iterator[Kept]:
    """Start a keeper and a server in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="aiouffd-chaos-") as name:
        folder = Path(name)
        (folder / "image").write_bytes(image(0, THREADS * PAGES * PAGE))
        patient = ["--tries", "1000000", "--healthy-after", "0"]
        one = Kept(folder, options or [], None if alone else keeper or patient)
        try:
            one.wait_for("listening", 1)
            yield one
        finally:
            one.kill()


class Chaos:
    """A run of rounds."""

    def __init__(self, server: Kept, seed: int, per_life: int) -> None:
        self.server = server
        self.rng = random.Random(seed)
        self.done = Done()
        self.targets: list[Target] = []
        self._per_life = per_life
        self._started = 0

    def run(self, rounds: int, progress: bool = False) -> None:
        try:
            while self.done.rounds < rounds:
                self._start_targets()
                for _ in range(min(self._per_life, rounds - self.done.rounds)):
                    self._round()
                    if progress and self.done.rounds % 50 == 0:
                        print(f"  {self.done}", flush=True)
                self._finish_targets()
        finally:
            for target in self.targets:
                target.kill()

    def _start_targets(self) -> None:
        rng = self.rng
        kinds = [
            ("anon", "all", 0),
            ("anon", rng.choice(["forks", "balloon", "moves"]), rng.choice([0, 2000])),
            (rng.choice(["shmem", "shmem-private"]), rng.choice(["balloon", "moves"]), 0),
        ]
        for kind, operations, alarm_us in kinds:
            target = Target(
                self.server.socket, kind, OPERATIONS[operations], rng.randrange(1 << 31), alarm_us
            )
            self.targets.append(target)
            self._started += 1
            # A peer that is killed's victim while it hands over knows it: its connection ends.
            self.server.wait_for("started", self._started)
        self.done.targets += len(kinds)

    def _round(self) -> None:
        """Kill the server at a random moment, and see everybody go on."""
        server, rng = self.server, self.rng
        listening = server.events["listening"]
        early = rng.random() < 0.2
        time.sleep(rng.uniform(0.0, 0.25) if early else rng.expovariate(8))
        pid = server.server()
        began = time.monotonic()
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            self.done.rounds += 1
            self.done.during_take_over += early
        if not early or rng.random() < 0.5:
            server.wait_for("listening", listening + 1)
            self.done.slowest = max(self.done.slowest, time.monotonic() - began)
        self._judge()
        if rng.random() < 0.3:
            self._see_all_go_on()

    def _see_all_go_on(self) -> None:
        """Wait until every thread of every target has made a step: no wait outlives a restart."""
        began = time.monotonic()
        before = [target.steps() for target in self.targets]
        for target, steps in zip(tuple(self.targets), before, strict=True):
            while any(now == then for now, then in zip(target.steps(), steps, strict=True)):
                self._judge()
                if target not in self.targets:
                    break
                if time.monotonic() - began > PATIENCE:
                    raise Wrong(f"{target.name}: a thread waits on after the restart")
                time.sleep(0.002)
        self.done.longest_wait = max(self.done.longest_wait, time.monotonic() - began)

    def _judge(self) -> None:
        for line in tuple(self.server.said):
            if "is not served on" in line:  # whole groups are in the store, or none
                raise Wrong(line)
        for target in self.targets:
            try:
                target.judge()
            except Wrong:
                if not self._is_lost_child(target):
                    raise
                self.targets.remove(target)
                self._count(target)
                target.kill()
                return

    def _is_lost_child(self, target: Target) -> bool:
        """Say whether a wrong byte is that of a child whose loss was noticed, and said."""
        deadline = time.monotonic() + PATIENCE
        in_child = "depth 0" not in target.message or "ended with status" in target.message
        while in_child and time.monotonic() < deadline:
            if self.done.lost_children > self.done.rounds // 200:
                return False  # the window is some microseconds long: that would be no accident
            if self.server.lost_children() > self.done.lost_children:
                self.done.lost_children += 1
                return True
            time.sleep(0.05)
        return False

    def _count(self, target: Target) -> None:
        self.done.checked += target.get("checked")
        self.done.forks += target.get("forks")
        self.done.removals += target.get("removals")
        self.done.moves += target.get("moves")

    def _finish_targets(self) -> None:
        while self.targets:
            target = self.targets[-1]
            try:
                target.finish()
            except Wrong:
                if not self._is_lost_child(target):
                    raise
            self.targets.pop()
            self._count(target)
            target.kill()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 31))
    parser.add_argument(
        "--per-life", type=int, default=20, help="kills that a target lives through"
    )
    args = parser.parse_args()
    print(f"seed {args.seed}: {args.rounds} rounds", flush=True)
    began = time.monotonic()
    with kept(["--chunk", "16K", "--hydrate", "slow"]) as server:
        chaos = Chaos(server, args.seed, args.per_life)
        try:
            chaos.run(args.rounds, progress=True)
        except Wrong as error:
            print(f"WRONG after {chaos.done}\n  {error}\n  run again with --seed {args.seed}")
            print("\n".join(server.said[-40:]))
            return 1
        status = server.end()
    print(f"{chaos.done}; {time.monotonic() - began:.0f} s; the server ended with {status}")
    return 0 if status == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
