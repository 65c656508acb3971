"""Break each rule of a migration by a line or two, and see that a test notices.

    sudo python3 -m tests.migration.mutate [WORD...]

As ``tests.mutate_laws``, for what a bad network and dying processes may not do; with words, only
mutations that have one of them in their text.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final, NamedTuple

from tests.mutate_laws import _copy

_LIMIT: Final = 120  # seconds for the tests of one mutation

_CUTS: Final = "test_cuts.py"
_LINES: Final = "test_bad_lines.py"
_ENDS: Final = "test_breaking_off.py"


class Mutation(NamedTuple):
    """One way to break a rule.

    Attributes:
        what: What is broken.
        tests: Who should notice: a file of this folder.
        file: In the package.
        old: Text that is there once.
        new: What it becomes.
    """

    what: str
    tests: str
    file: str
    old: str
    new: str


MUTATIONS: Final = (
    Mutation(
        "what was in doubt when the line broke is not sent again",
        _CUTS,
        "migration/outgoing.py",
        "for taken in in_doubt.give_back():",
        "for taken in list(in_doubt.give_back())[:0]:",
    ),
    Mutation(
        "frames of a line that was given up are taken",
        "test_listener.py",
        "migration/incoming.py",
        "            if not channel.is_parting:\n"
        "                channel.abort()\n"
        "        if self.stage",
        "            pass\n        if self.stage",
    ),
    Mutation(
        "what will follow is not forgotten at the switch",
        _CUTS,
        "migration/incoming.py",
        "                await _discard(landing, landed.runs(where))\n"
        "                landed.discard(where)\n",
        "                pass\n",
    ),
    Mutation(
        "a body goes straight to where no pages are known to be",
        "test_listener.py",
        "migration/incoming.py",
        "            if next(landed.gaps(where), None) is None:\n",
        "            if True:\n",
    ),
    Mutation(
        "a page that is there is written once more",
        _LINES,
        "migration/incoming.py",
        "                    for run in list(missing.runs(Range(offset, length))):\n",
        "                    self._landings[number].view[offset : offset + length] = (\n"
        "                        memoryview(body)[at : at + length]\n"
        "                    )\n"
        "                    for run in list(missing.runs(Range(offset, length))):\n",
    ),
    Mutation(
        "pages that were removed come back",
        _LINES,
        "region.py",
        "space.removed.gaps(where) if space.removed else (where,)",
        "(where,)",
    ),
    Mutation(
        "what was in doubt follows, where nothing may",
        _CUTS,
        "migration/outgoing.py",
        "if self._is_too_much() and self._copies_there:",
        "if False:",
    ),
    Mutation(
        "what was written before the stop is not looked for",
        _CUTS,
        "migration/outgoing.py",
        "self._backlog.add_runs(self._tracker.collect_now().runs)",
        "self._tracker.collect_now()",
    ),
    Mutation(
        "what is waited for is not asked for again",
        _LINES,
        "migration/incoming.py",
        "        self._asked.clear()\n        self._ask_more()\n",
        "        self._asked.clear()\n",
    ),
    Mutation(
        "demands are forgotten as the line comes up",
        _LINES,
        "migration/outgoing.py",
        "        self._flow = Flow()\n        self._copies_there",
        "        self._demands.clear()\n        self._flow = Flow()\n        self._copies_there",
    ),
    Mutation(
        "that all is there is not believed where RUNNING was lost",
        _CUTS,
        "migration/outgoing.py",
        "            if self.stage not in {Stage.SWITCHING, Stage.FOLLOWING}:\n"
        '                raise PeerError("says that all is there',
        "            if not self._running_there:\n"
        '                raise PeerError("says that all is there',
    ),
    Mutation(
        "a second SWITCH begins anew",
        _LINES,
        "migration/incoming.py",
        "            return  # as above\n",
        "            self.stage = Stage.SWITCHING\n",
    ),
    Mutation(
        "silence is not noticed",
        _LINES,
        "migration/channel.py",
        "if self._waiting is None and now - self._heard > self._silence:",
        "if False:",
    ),
    Mutation(
        "there is no deadline at the destination",
        _LINES,
        "migration/incoming.py",
        "            self._no_line = self._loop.call_later(self._deadline, self._give_up, why)\n",
        "            pass\n",
    ),
    Mutation(
        "there is no deadline at the source",
        _LINES,
        "migration/line.py",
        "if final or not self.made or loop.time() - since >= self._deadline:",
        "if final or not self.made:",
    ),
    Mutation(
        "after the deadline it goes on at the source",
        _LINES,
        "migration/outgoing.py",
        "            isinstance(error, ToldError) and error.not_started\n",
        "            isinstance(error, OSError)\n",
    ),
    Mutation(
        "how a migration ended is not remembered",
        _LINES,
        "migration/listener.py",
        "            self._ended[incoming.token] = incoming.ended\n",
        "            pass\n",
    ),
    Mutation(
        "a cancellation is always in time",
        _ENDS,
        "migration/outgoing.py",
        "if self._leaves or self.stage not in {Stage.OFFERED, Stage.COPYING}:\n"
        "            return False",
        "if False:\n            return False",
    ),
    Mutation(
        "the destination is not told of a cancellation",
        _ENDS,
        "migration/outgoing.py",
        "            self._say_last(Kind.CANCEL)\n",
        "            pass\n",
    ),
    Mutation(
        "a program that has stopped is not let go on",
        _ENDS,
        "migration/outgoing.py",
        "await asyncio.shield(program.restart())",
        "pass",
    ),
    Mutation(
        "answers to a cancelled order are taken for later ones",
        _ENDS,
        "migration/moving.py",
        "while self._owed > 1:",
        "while False:",
    ),
)


def _run(at: Path, tests: str) -> tuple[bool, str]:
    """Run a file of tests; say whether they passed, and the first that has not."""
    options = ("-x", "-q", "-k", "not uvloop and not often", "-p", "no:cacheprovider")
    environment = os.environ | {"PYTHONPATH": str(at), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, str(at / "tests" / "migration" / tests)],
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
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR", "Timeout"))]
    return done.returncode == 0, (failed or lines[-1:] or ["no output"])[0]


def main(words: list[str]) -> int:
    """Run all mutations, or those with a word in their text.

    Returns:
        0 if each was noticed, else 1.
    """
    bad = 0
    with tempfile.TemporaryDirectory(prefix="aiouffd-mutations-") as folder:
        at = Path(folder)
        _copy(at)
        for tests in (_CUTS, _LINES, _ENDS):
            passed, text = _run(at, tests)
            print(f"without a mutation, {tests}: {text}", flush=True)
            if not passed:
                return 1
        for mutation in MUTATIONS:
            if words and not any(word in mutation.what for word in words):
                continue
            path = at / "aiouffd" / mutation.file
            source = path.read_text()
            began = time.monotonic()
            if source.count(mutation.old) != 1:
                times = source.count(mutation.old)
                passed, text = True, f"{mutation.file} has its text {times} times"
            else:
                path.write_text(source.replace(mutation.old, mutation.new))
                passed, text = _run(at, mutation.tests)
                path.write_text(source)
            bad += passed
            verdict = "NOT NOTICED" if passed else "noticed"
            print(f"{verdict}, {time.monotonic() - began:.1f} s: {mutation.what}", flush=True)
            print(f"    {text}", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
