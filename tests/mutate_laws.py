"""Break each law of the pager by a line or two, and see that its test notices.

    sudo python3 -m tests.mutate_laws [LAW...]

Each mutation is made in a copy of the checkout, where the tests of its law (``tests/laws``) are run
with a time limit and must fail; before that they must pass unchanged.  A mutation whose text is no
longer in the source is an error: bring it up to date with what the law is held by now.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final, NamedTuple

ROOT: Final = Path(__file__).resolve().parent.parent
_LIMIT: Final = 90  # seconds for the tests of one law


class Mutation(NamedTuple):
    """One way to break a law.

    Attributes:
        law: Its number.
        what: What is broken.
        file: In the package.
        old: Text that is there once.
        new: What it becomes.
    """

    law: int
    what: str
    file: str
    old: str
    new: str


MUTATIONS: Final = (
    Mutation(
        1,
        "faults are served before the events that were read with them",
        "reader.py",
        "faults.append((flags, address, thread_id))",
        "self._dispatcher.fault(flags, address, thread_id)",
    ),
    Mutation(
        2,
        "a page in flight is asked for again",
        "dispatcher.py",
        "if page in space.in_flight or (",
        "if (",
    ),
    Mutation(
        2,
        "a page that was served in this batch is asked for again",
        "dispatcher.py",
        "self._served.add(fault.address)",
        "pass",
    ),
    Mutation(
        3,
        "the deadline is not looked at",
        "watchdog.py",
        "if self.deadline is not None and age >= self.deadline:",
        "if False:",
    ),
    Mutation(
        3,
        "a handler that failed is nobody's business",
        "recovery.py",
        "        self.last_action(flight, action)\n",
        "",
    ),
    Mutation(
        4,
        "EEXIST wakes nobody",
        "resolver.py",
        "        self._dispatcher.wake(flight.fault.address, flight.fault.length)\n",
        "",
    ),
    Mutation(
        4,
        "the same page again and again is no error",
        "resolver.py",
        "if count < _STUCK_AFTER or flight.final:",
        "if True:",
    ),
    Mutation(
        5,
        "a parked fault waits for an event",
        "parking.py",
        "        flight.stage = stage\n"
        '        self._dispatcher.timers.set("park", self._delay, self._retry)\n',
        "        flight.stage = stage\n",
    ),
    Mutation(
        5,
        "EAGAIN is an error",
        "resolver.py",
        "            case errno.EAGAIN:\n                self._dispatcher.parking.add(flight)\n",
        "",
    ),
    Mutation(
        6,
        "a removed page is asked of its handler",
        "dispatcher.py",
        "            zero = self._reads_zero(fault)\n        if zero is None:",
        "            pass\n        if zero is None:",
    ),
    Mutation(
        6,
        "a fill brings removed pages back",
        "region.py",
        "space.removed.gaps(where) if space.removed else (where,)",
        "(where,)",
    ),
    Mutation(
        6,
        "a piece is filled at once although something was removed",
        "region.py",
        "            not space.removed\n            and (filled",
        "            (filled",
    ),
    Mutation(
        6,
        "a long answer brings removed pages back",
        "resolver.py",
        "region.fillable(where)",
        "(where,)",
    ),
    Mutation(
        7,
        "nobody asks whether the target is alive",
        "watchdog.py",
        "            self._dispatcher.target_is_gone()\n",
        "            self._ask_later(delay)\n",
    ),
    Mutation(
        7,
        "the pidfd is not watched",
        "dispatcher.py",
        "            self._loop.add_reader(self.target.fileno(), self.target_is_gone)\n",
        "            pass\n",
    ),
    Mutation(
        8,
        "the descriptor is closed before the reader leaves the loop",
        "pager.py",
        "                dispatcher.stop()\n            dispatcher.end_all",
        "                self.uffd.close()\n"
        "                dispatcher.stop()\n            dispatcher.end_all",
    ),
    Mutation(
        9,
        "closing leaves missing pages to the kernel",
        "pager.py",
        "                await self.poison(region)\n            except",
        "                pass\n            except",
    ),
    Mutation(
        10,
        "pieces have no bound",
        "performer.py",
        "PIECE_BYTES: Final = 512 * 1024",
        "PIECE_BYTES: Final = 1 << 40",
    ),
    Mutation(
        10,
        "a target that asks again and again is served until it is through",
        "readiness.py",
        "rounds if alone else 1",
        "rounds",
    ),
    Mutation(
        10,
        "the next piece goes before a fault that came during the last",
        "readiness.py",
        "    if readiness is not None:\n        readiness.wake_up()\n",
        "",
    ),
    Mutation(
        11,
        "every handler is a task",
        "eager.py",
        "def start(\n",
        "def start(loop, awaitable, name=None):\n"
        "    return loop.create_task(_await(awaitable), name=name), None\n\n\n"
        "def _start_eagerly(\n",
    ),
    Mutation(
        11,
        "nobody waits for handlers that are cancelled at the close",
        "pager.py",
        "                    await asyncio.wait(tasks)\n",
        "                    pass\n",
    ),
    Mutation(
        12,
        "fork events of the process's own memory are taken",
        "pager.py",
        "if self.uffd.features & Feature.EVENT_FORK and",
        "if False and",
    ),
    Mutation(
        12,
        "children that are forked during the close are forgotten",
        "pager.py",
        "                await self._close_children(action)\n",
        "                pass\n",
    ),
)


def _copy(to: Path) -> None:
    ignore = shutil.ignore_patterns("__pycache__", ".*")
    for folder in ("aiouffd", "tests"):
        shutil.copytree(ROOT / folder, to / folder, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", to)


def _run(at: Path, law: int | None) -> tuple[bool, str]:
    """Run the tests of a law.

    Returns:
        Whether they passed, and the last line that pytest printed.
    """
    pattern = "test_law_*.py" if law is None else f"test_law_{law:02}_*.py"
    files = [str(path) for path in sorted((at / "tests" / "laws").glob(pattern))]
    options = ["-x", "-q", "-k", "not uvloop", "-p", "no:cacheprovider", "--no-header"]
    environment = os.environ | {"PYTHONPATH": str(at), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *files],
            cwd=at,
            env=environment,
            capture_output=True,
            text=True,
            timeout=_LIMIT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False, f"no end within {_LIMIT} s"
    lines = (done.stdout + done.stderr).strip().splitlines()
    if done.returncode not in (0, 1) and not any("passed" in line for line in lines[-3:]):
        return False, f"pytest ended with status {done.returncode}"
    failed = [line for line in lines if line.startswith("FAILED")]
    return done.returncode == 0, (failed or lines[-1:] or ["no output"])[0]


def main(arguments: list[str]) -> int:
    """Run all mutations, or those of some laws.

    Returns:
        0 if each was noticed, else 1.
    """
    wanted = {int(argument) for argument in arguments}
    bad = 0
    with tempfile.TemporaryDirectory(prefix="aiouffd-mutations-") as folder:
        at = Path(folder)
        _copy(at)
        passed, text = _run(at, None)
        print(f"without a mutation: {text}", flush=True)
        if not passed:
            return 1
        for mutation in MUTATIONS:
            if wanted and mutation.law not in wanted:
                continue
            path = at / "aiouffd" / mutation.file
            source = path.read_text()
            began = time.monotonic()
            if source.count(mutation.old) != 1:
                passed, text = (
                    True,
                    f"{mutation.file} has its text {source.count(mutation.old)} times",
                )
            else:
                path.write_text(source.replace(mutation.old, mutation.new))
                passed, text = _run(at, mutation.law)
                path.write_text(source)
            bad += passed
            verdict = "NOT NOTICED" if passed else "noticed"
            took = time.monotonic() - began
            print(f"law {mutation.law:2}: {verdict}, {took:.1f} s: {mutation.what}", flush=True)
            print(f"    {text}", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
