"""A stage on which trees of processes move: one that counts, and another machine for it.

Knows: our two commands, the counting tree, how a second machine is made of namespaces.
Must not know: how a tree is moved; pytest.

The other machine has pids of its own, and where that is asked for a network of its own.  Both have
the same files, which a move takes for granted: so one log has the numbers that were counted on
either.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, Final

from tests.interop.criu import HERE, Stage, at_page_start
from tests.interop.criu_running import Running, children_of, descendants, free_port
from tests.suites import Foreign

PROCESSES: Final = 4
OURS: Final = (sys.executable, "-m", "aiouffd", "migrate")

_ALONE: Final = ("unshare", "--fork", "--pid", "--mount-proc", "--kill-child")
_LIVE_ON: Final = (
    '"$@"; echo "ended here with $?"; exec sleep 1000000'  # as the first process there
)
#: CRIU looks at what TCP can do, on the loopback address.
_PLUG_IN: Final = (
    "ip link set lo up; until ip addr add $0/30 dev aiouffd; do sleep 0.01; done 2> /dev/null;"
    " ip link set aiouffd up; "
)


class Machine:
    """Where a tree is received.

    Attributes:
        at: HOST:PORT.
        folder: Of the images.
    """

    def __init__(self, stage: MovingStage, running: Running, at: str, folder: Path) -> None:
        self.running, self.at, self.folder = running, at, folder
        self._stage = stage
        self._init = next(iter(descendants(running.pid)), 0)

    @property
    def address(self) -> str:
        """Its address."""
        return self.at.rpartition(":")[0]

    def said(self, text: str) -> None:
        """Wait until the command has said something."""
        self._stage.until(lambda: text in self.running.text(), f"{text!r} is said there")

    def status(self) -> int:
        """Wait for the command's end; give its status."""
        self.said("ended here with ")
        return int(self.running.text().rpartition("ended here with ")[2])

    def receiver(self) -> int:
        """Give the process that brings memory; another one keeps what it must not lose."""
        return next(
            pid
            for pid in descendants(self.running.pid)
            if Path(f"/proc/{pid}/cmdline").read_bytes().endswith(b"\0--kept\0")
        )

    def others(self) -> list[str]:
        """Name what lives there besides its first process."""
        init = self._init
        place = os.readlink(f"/proc/{init}/ns/pid")
        found = []
        for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
            with suppress(OSError):
                if pid != init and os.readlink(f"/proc/{pid}/ns/pid") == place:
                    name = Path(f"/proc/{pid}/comm").read_text().strip()
                    found.append(f"{name} ({state_of(pid)})")
        return [each for each in found if "(Z)" not in each]

    def end(self) -> None:
        """Switch it off."""
        self.running.end()
        if self._init:
            self._stage.until_gone(self._init)


class MovingStage(Stage):
    """Trees that count, and move."""

    def __init__(self, criu: Foreign) -> None:
        super().__init__(criu)
        self.environment["TMPDIR"] = str(self.folder)  # who is killed cannot tidy up

    def counting(self, *more: object, seed: int = 1, last: int = 4) -> Running:
        """Start a tree that counts, and wait until all of it does.

        Args:
            more: What it is given besides.
            seed: For what is in its memory.
            last: Memory of the last process, in MiB; the others have 4.
        """
        words = (HERE / "counting_tree.py", self.run, seed, f"4,{last}")
        program = (sys.executable, "-I", "-S", *words)
        while True:
            self._count += 1
            running = Running(self, f"{self._count}-tree", (*program, *more), mute=True)
            self._running.append(running)
            self.until(lambda: len(set(self._names())) == PROCESSES, "all processes count")
            if not any(map(at_page_start, (running.pid, *descendants(running.pid)))):
                return running
            self.stop_counting()
            running.wait()
            for path in self.run.iterdir():
                path.unlink()

    def receive(
        self,
        *options: object,
        alone: bool = True,
        network: bool = False,
        criu: object = None,
    ) -> Machine:
        """Start another machine, and wait until it can be sent a tree.

        Args:
            options: Of ``receive-tree``, besides.
            alone: It has pids of its own.
            network: It has a network of its own, with a cable to ours.
            criu: The program.
        """
        folder = self.folder / f"there-{self._count}"
        here, address = _cable(self._count) if network else ("", "127.0.0.1")
        at = f"{address}:{free_port()}"
        command = (*OURS, "receive-tree", at, "--criu", criu or self.criu.command, "-D", folder)
        apart = (*_ALONE, *(["--net"] if network else [])) if alone else ()
        script = (_PLUG_IN if network else "") + _LIVE_ON
        shell = ("sh", "-c", script, address)
        running = self.start("there", *apart, *shell, *command, *options)
        self.until(lambda: not alone or descendants(running.pid), "the machine is there")
        machine = Machine(self, running, at, folder)
        if network:
            self._lay_cable(machine._init, here)
        machine.said("waiting for processes")
        return machine

    def _lay_cable(self, pid: int, address: str) -> None:
        """Connect a network with ours; the cable goes with it."""
        name = f"aiouffd{pid}"
        for words in (
            f"link add {name} type veth peer name aiouffd netns {pid}",
            f"addr add {address}/30 dev {name}",
            f"link set {name} up",
        ):
            self.start("cable", "ip", *words.split()).wait()

    def send(
        self, tree: Running, machine: Machine, *options: object, criu: object = None
    ) -> Running:
        """Send a tree to another machine."""
        self.here = self.folder / f"here-{self._count}"
        command = (*OURS, "send-tree", tree.pid, machine.at, "-D", self.here)
        return self.start("send", *command, "--criu", criu or self.criu.command, *options)

    # --- what was counted --------------------------------------------------------------

    def _lines(self) -> list[list[str]]:
        with suppress(FileNotFoundError):
            text = (self.run / "log").read_text()
            return [line.split() for line in text.splitlines() if line.count(" ") == 2]
        return []

    def _names(self) -> list[str]:
        return [name for name, _, _ in self._lines()]

    def until_counted_on(self) -> None:
        """Wait until each process has counted further."""
        before = len(self._lines())

        def all_have() -> bool:
            return len({name for name, _, _ in self._lines()[before:]}) == PROCESSES

        self.until(all_have, "all processes count on")

    def stop_counting(self) -> None:
        """Let all processes compare their memory, and end."""
        (self.run / "stop").touch()

    def left_to_us(self, name: str) -> int:
        """Give the process of a name that has outlived who started it."""
        ours = {running.pid for running in self._running}
        return next(
            pid
            for pid in children_of("self")
            if pid not in ours and Path(f"/proc/{pid}/comm").read_text().strip() == name
        )

    def check(self, *, machines: int) -> None:
        """See that each process has counted on so many machines, each number once, all right."""
        self.until_counted_on()
        self.stop_counting()
        paths = [self.run / f"result-{name}" for name in range(PROCESSES)]
        self.until(lambda: all(map(_is_whole, paths)), "all processes have compared their memory")
        lines = self._lines()
        for name, path in enumerate(paths):
            result: dict[str, Any] = json.loads(path.read_text())
            assert not result["wrong"], result
            counted = [int(number) for each, number, _ in lines if each == str(name)]
            assert counted == list(range(1, result["count"] + 1)), f"process {name}: {counted}"
            places = [place for each, _, place in lines if each == str(name)]
            assert len(set(places)) == machines, set(places)
            assert places == sorted(places, key=places.index), "back and forth"

    def was_continued(self) -> bool:
        """Say whether a process has seen a SIGCONT."""
        return (self.run / "continued").exists()


def _cable(number: int) -> tuple[str, str]:
    """Give both addresses of a cable; others test at the same time."""
    first = ((os.getpid() * 16 + number) % (1 << 14)) * 4 + 1
    return tuple(str(IPv4Address("10.203.0.0") + first + end) for end in range(2))  # type: ignore[return-value]


def _is_whole(path: Path) -> bool:
    with suppress(FileNotFoundError):
        return path.read_text().endswith("}")
    return False


def files_of(folder: Path, endings: Sequence[str]) -> list[str]:
    """List the files of a folder that end like one of these."""
    return sorted(path.name for path in folder.iterdir() if path.name.endswith(tuple(endings)))


def state_of(pid: int) -> str:
    """Give a process's state, as /proc says it: T is stopped by a signal."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
