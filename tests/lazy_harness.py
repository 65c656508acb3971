"""Run named cases in a child process, each within a hard time limit, and tell which one hung.

Knows: how to start the child, read its reports, show where it hangs and go on behind a crash.
Must not know: what the cases do.

A module of cases has ``CASES``: names to functions that take a loop factory and raise if the
behaviour is not there.  One child runs as many of them as it survives; each is a test of its own.

    python -m tests.lazy_harness tests.lazy_access asyncio NAME...
"""

from __future__ import annotations

import asyncio
import faulthandler
import functools
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCALE = float(os.environ.get("AIOUFFD_TIME_SCALE", "1"))
LIMIT = 20.0 * SCALE  # seconds for one case; a deadlock needs no fine measure

#: Children measure no coverage: its tracer is just what some of them assert the absence of.
ENVIRONMENT = {key: value for key, value in os.environ.items() if not key.startswith("COVERAGE")}

NewLoop = Callable[[], asyncio.AbstractEventLoop]
Case = Callable[[NewLoop], None]


def loops() -> list[str]:
    """Name the event loops that are to be had here."""
    try:
        import uvloop  # noqa: F401
    except ImportError:
        return ["asyncio"]
    return ["asyncio", "uvloop"]


def check(module: str, loop: str, name: str, limit: float = LIMIT) -> None:
    """Fail with the child's account of a case unless it passed."""
    outcome = _outcomes(module, loop, limit)[name]
    assert outcome == "ok", f"{name} on {loop}: {outcome}"


@functools.cache
def _outcomes(module: str, loop: str, limit: float) -> dict[str, str]:
    outcomes: dict[str, str] = {}
    names = list(importlib.import_module(module).CASES)
    while names:
        outcomes.update(_run(module, loop, names, limit))
        names = [name for name in names if name not in outcomes]
    return outcomes


def _run(module: str, loop: str, names: Sequence[str], limit: float) -> dict[str, str]:
    """Run a child until it ends, crashes or hangs; at least one name has an outcome then."""
    command = [sys.executable, "-m", "tests.lazy_harness", module, loop, *names]
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
        ) as child,
    ):
        outcomes: dict[str, str] = {}
        running = names[0]
        assert child.stdout is not None
        lines = _lines(child.stdout.fileno(), limit)
        for line in lines:
            if line is None:
                outcomes[running] = f"hung; {_where(child.pid)}"
                child.send_signal(signal.SIGUSR1)  # all stacks
                _wait_for_growth(errors.fileno())
                child.kill()
                break
            report = json.loads(line)
            if "start" in report:
                running = report["start"]
            else:
                outcomes[running] = report["end"]
        status = child.wait()
        errors.seek(0)
        said = errors.read().decode(errors="replace")
        if running not in outcomes:
            outcomes[running] = f"the child ended with status {status}"
        if outcomes[running] != "ok":
            outcomes[running] += "\n" + said[-4000:]
        return outcomes


def _lines(fd: int, limit: float) -> Iterator[bytes | None]:
    """Yield whole lines; None once nothing came for ``limit`` seconds."""
    rest = b""
    while True:
        ready, _, _ = select.select([fd], [], [], limit)
        if not ready:
            yield None
            return
        data = os.read(fd, 65536)
        if not data:
            return
        *lines, rest = (rest + data).split(b"\n")
        yield from lines


def _where(pid: int) -> str:
    """Say in which kernel function each thread of a process waits."""
    found = []
    for thread in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{thread}/wchan", encoding="ascii") as file:
            found.append(f"{thread}: {file.read() or 'running'}")
    return ", ".join(found)


def _wait_for_growth(fd: int) -> None:
    before = os.fstat(fd).st_size
    end = time.monotonic() + 1
    while os.fstat(fd).st_size == before and time.monotonic() < end:
        time.sleep(0.01)


def run_script(text: str, *options: str, limit: float = LIMIT) -> subprocess.CompletedProcess[str]:
    """Run Python text in a child that may crash; it must end within ``limit`` seconds."""
    return subprocess.run(
        [sys.executable, *options, "-c", text],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=limit,
        check=False,
    )


def loop_factory(name: str) -> NewLoop:
    """Find the maker of an event loop by its name."""
    if name == "uvloop":
        import uvloop

        factory: NewLoop = uvloop.new_event_loop
        return factory
    return asyncio.new_event_loop


def main(module: str, loop: str, *names: str) -> None:
    """Be the child."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    cases: dict[str, Case] = importlib.import_module(module).CASES
    new_loop = loop_factory(loop)
    for name in names:
        print(json.dumps({"start": name}), flush=True)
        try:
            cases[name](new_loop)
        except BaseException:
            print(json.dumps({"end": traceback.format_exc()[-3000:]}), flush=True)
        else:
            print(json.dumps({"end": "ok"}), flush=True)
        gc.collect()  # failures' tracebacks hold views of their memory


if __name__ == "__main__":
    main(*sys.argv[1:])
