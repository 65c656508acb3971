"""One run: a fresh target, a fresh handler, both on one CPU, connected by a socket.

Knows: how to start the two, wait for the target's JSON line and end the handler.
Must not know: which ratio matters.

Both processes are new in each run: memory, page tables and allocator start alike.  A run in
which either side fails raises; it never yields a figure.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec

from .build import HERE, compile_c
from .figures import Sample, Settings


class RunFailed(Exception):
    """A target or a handler ended badly or did not end."""


def _start(command: Sequence[str], side: socket.socket) -> subprocess.Popen[str]:
    environment = dict(os.environ, PYTHONPATH=str(HERE.parent), PYTHONDONTWRITEBYTECODE="1")
    process = subprocess.Popen(
        [part.replace("SOCKET", str(side.fileno())) for part in command],
        pass_fds=[side.fileno()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        env=environment,
        text=True,
    )
    with contextlib.suppress(PermissionError):
        # Before all neighbours; between the two it changes nothing. Threads made later inherit.
        os.setpriority(os.PRIO_PROCESS, process.pid, -20)
    return process


def _wait(process: subprocess.Popen[str], other: subprocess.Popen[str] | None, end: float) -> None:
    """Wait for a process, but no longer than the other one lives well."""
    if process.poll() is not None:
        return
    watched = {os.pidfd_open(process.pid): process}
    if other is not None:
        watched[os.pidfd_open(other.pid)] = other
    try:
        while process.poll() is None:
            ready, _, _ = select.select(list(watched), [], [], max(0.0, end - time.monotonic()))
            if not ready:
                raise RunFailed(f"not done in time: {process.args!r}")
            for fd in ready:
                if watched[fd] is not process and watched[fd].wait() != 0:
                    raise RunFailed(f"{watched[fd].args!r}: {_said(watched[fd])}")
                if watched[fd] is not process:
                    del watched[fd]
                    os.close(fd)
    finally:
        for fd in watched:
            os.close(fd)


def _said(process: subprocess.Popen[str]) -> str:
    return process.stderr.read().strip() if process.stderr else ""


def run(target: Sequence[str], handler: Sequence[str], seconds: float) -> tuple[Sample, Sample]:
    """Run a target and a handler against each other.

    Args:
        target: Command of the target; ``SOCKET`` stands for its end of the socket.
        handler: Command of the handler, likewise.
        seconds: When to give up.

    Returns:
        What the target and what the handler printed as JSON; a handler that ends only by
        being killed has printed nothing.

    Raises:
        RunFailed: One of them failed.
    """
    end = time.monotonic() + seconds
    ours, theirs = socket.socketpair()
    with ours, theirs:
        first = _start(target, ours)
        try:
            second = _start(handler, theirs)
        except BaseException:
            first.kill()
            first.wait()
            raise
    # Nobody but the two holds the socket now: the end of one is the other's end of file.
    with first, second:
        try:
            _wait(first, second, end)
            if first.returncode != 0:
                if "handler" in handler:
                    second.kill()
                _wait(second, None, end)
                said = f"{_said(first)}\n{_said(second)}".strip()
                raise RunFailed(f"{first.args!r}: status {first.returncode}: {said}")
            if "handler" in handler and second.poll() is None:
                second.kill()  # the C floor serves for ever
            else:
                _wait(second, None, end)
                if second.returncode != 0:
                    raise RunFailed(f"{second.args!r}: {_said(second)}")
            return _sample(first), _sample(second)
        finally:
            for process in (first, second):
                if process.poll() is None:
                    process.kill()


def alone(command: Sequence[str], seconds: float) -> Callable[[], Sample]:
    """Make a contestant that is one process, with children if it likes, which takes the times.

    Args:
        command: What to run; it prints JSON.
        seconds: When to give up.
    """
    environment = dict(os.environ, PYTHONPATH=str(HERE.parent))

    def go() -> Sample:
        done = subprocess.run(
            # Before all neighbours, as the two of ``run``; its children inherit that.
            [*(["nice", "-n", "-20"] if os.geteuid() == 0 else []), *command],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        if done.returncode != 0:
            raise RunFailed(f"{command!r}: {done.stderr.strip()}")
        sample: dict[str, float] = json.loads(done.stdout)
        return sample

    return go


def _sample(process: subprocess.Popen[str]) -> Sample:
    text = process.stdout.read() if process.stdout else ""
    loaded: dict[str, float] = json.loads(text) if text.strip() else {}
    return loaded


def target_command(
    settings: Settings, *, ranges: int = 1, uffds: int = 1, threads: int = 1, blocks: bool = False
) -> list[str]:
    """Make the command of a target that faults.

    Args:
        settings: How many faults, and where.
        ranges: Into how many ranges the pages are cut.
        uffds: To how many userfaultfds the ranges belong, in turn.
        threads: How many threads fault.
        blocks: Touch one range to its end before the next; else each fault is in another.
    """
    counts = [settings.faults, ranges, uffds, threads, int(blocks)]
    return [str(compile_c()), "target", "SOCKET", str(settings.cpu), *map(str, counts)]


def floor_command(settings: Settings, *, whole: bool = False) -> list[str]:
    """Make the command of the C floor."""
    return [str(compile_c()), "handler", "SOCKET", str(settings.cpu), str(int(whole))]


def python_command(settings: Settings, kind: str, *options: str) -> list[str]:
    """Make the command of a handler written in Python (see ``serving.py``)."""
    return [
        sys.executable,
        "-m",
        "benchmarks.serving",
        kind,
        "--socket=SOCKET",
        f"--cpu={settings.cpu}",
        *options,
    ]


def faulting(
    settings: Settings,
    handler: Sequence[str],
    *,
    ranges: int = 1,
    uffds: int = 1,
    threads: int = 1,
    blocks: bool = False,
) -> Callable[[], Sample]:
    """Make a contestant: what the faulting threads saw of this handler."""
    target = target_command(settings, ranges=ranges, uffds=uffds, threads=threads, blocks=blocks)
    return lambda: run(target, handler, settings.seconds)[0]


def loops() -> list[str]:
    """List the event loops that can be measured here."""
    return ["asyncio", *(["uvloop"] if find_spec("uvloop") else [])]
