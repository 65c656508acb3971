"""``aiouffd info``: for people, for programs, for scripts."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest

import aiouffd
from aiouffd.cli import info
from aiouffd.kernel.capabilities import NAMES, Observation, capabilities
from aiouffd.kernel.gates import Attempt, Circumstances
from aiouffd.kernel.probe import Report, probe


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "aiouffd", "info", *arguments],
        check=False,
        timeout=60,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def test_the_table_has_every_capability() -> None:
    """One row each with yes or no, the version and what it is; plain text in a pipe."""
    told = run()
    assert (told.returncode, told.stderr) == (0, "")
    assert "\x1b" not in told.stdout
    for one in probe().capabilities:
        word = "yes" if one.available else "no"
        row = rf"^{one.name} +{word} +{re.escape(one.since)} *{re.escape(one.about)}$"
        assert re.search(row, told.stdout, re.MULTILINE)
        assert len(one.about) <= 47  # the row fits in 80 columns
    first, second = told.stdout.splitlines()[:2]
    assert os.uname().release in first
    assert "CAP_SYS_PTRACE" in second


def test_the_json_is_for_programs() -> None:
    """Every capability with its facts; masks are text, since bit 63 is in use."""
    told = run("--json")
    assert (told.returncode, told.stderr) == (0, "")
    found: dict[str, Any] = json.loads(told.stdout)
    assert found["aiouffd"] == aiouffd.__version__
    assert list(found["capabilities"])[: len(NAMES)] == list(NAMES)
    for one in found["capabilities"].values():
        assert set(one) == {"available", "since", "about", "how", "remedy"}
        assert type(one["available"]) is bool
    assert int(found["ioctls"], 16) >> 63 == 1
    assert {gate["gate"] for gate in found["gates"]} == {"/dev/userfaultfd", "userfaultfd(2)"}


def test_what_is_there_is_status_0() -> None:
    """--require says nothing if all is well; any spelling, several at once or one by one."""
    told = run("--require", "userfaultfd,WP", "--require", "UFFD_FEATURE_MISSING_SHMEM, move,move")
    assert (told.returncode, told.stdout, told.stderr) == (0, "", "")


def test_what_is_missing_is_status_1() -> None:
    """Each missing thing is a line on stderr with its remedy; what is there is not mentioned."""
    told = run("--require", "wp,bit-60,ioctl-59")
    assert (told.returncode, told.stdout) == (1, "")
    assert told.stderr.splitlines() == [
        "aiouffd: bit-60 is missing. It takes a newer kernel.",
        "aiouffd: ioctl-59 is missing. It takes a newer kernel.",
    ]


def test_json_of_what_is_required() -> None:
    """Both together: the JSON of just those, and the status."""
    told = run("--json", "--require", "wp,bit-60")
    assert told.returncode == 1
    found = json.loads(told.stdout)["capabilities"]
    assert {name: one["available"] for name, one in found.items()} == {"wp": True, "bit-60": False}


def test_an_unknown_name_is_status_2() -> None:
    """The names that there are are listed, whole."""
    told = run("--require", "wp,teleport,warp")
    assert (told.returncode, told.stdout) == (2, "")
    assert "no capability is called teleport, warp" in told.stderr
    for name in NAMES:
        assert re.search(rf"(^| ){name}(,|$)", told.stderr, re.MULTILINE)


def test_requiring_nothing_is_status_2() -> None:
    """A script whose list came out empty should not pass."""
    told = run("--require", " , ")
    assert (told.returncode, told.stdout) == (2, "")
    assert "names nothing" in told.stderr


@pytest.mark.parametrize("plain", [False, True])
def test_colour_is_for_terminals(plain: bool) -> None:
    """On a terminal yes is green; NO_COLOR is honoured."""
    ours, theirs = os.openpty()
    environment = {**os.environ, "COLUMNS": "80"} | ({"NO_COLOR": "1"} if plain else {})
    if not plain:
        environment.pop("NO_COLOR", None)
    try:
        subprocess.run(
            [sys.executable, "-m", "aiouffd", "info", "--require", "wp"],
            check=True,
            timeout=60,
            stdout=theirs,
            env=environment,
        )
        with subprocess.Popen(
            [sys.executable, "-m", "aiouffd", "info"], stdout=theirs, env=environment
        ) as process:
            os.close(theirs)
            theirs = -1
            text = b""
            while True:
                try:
                    chunk = os.read(ours, 4096)
                except OSError:  # EIO: the last writer has closed
                    break
                if not chunk:
                    break
                text += chunk
            assert process.wait(timeout=60) == 0
    finally:
        os.close(ours)
        if theirs >= 0:
            os.close(theirs)
    assert (b"\x1b[32myes\x1b[0m" in text) == (not plain)


def lacking() -> Report:
    """A report of a container on an old kernel."""
    seen = Observation(
        release="5.4.0",
        machine="x86_64",
        uid=1000,
        circumstances=Circumstances(
            seccomp=True, ptrace=False, initial_namespace=False, sysctl=None
        ),
        attempts=tuple(
            Attempt(gate, limited, number)
            for limited in (False, True)
            for gate, number in (("/dev/userfaultfd", 2), ("userfaultfd(2)", 1))
        ),
        features=None,
    )
    return Report(seen, capabilities(seen))


@pytest.mark.parametrize("width", [40, 80, 120])
def test_remedies_stand_below_what_they_help(width: int) -> None:
    """They are broken into lines, but no command in them at its hyphens."""
    lines = info._table(lacking(), colour=False, width=width).splitlines()
    assert "a child user namespace, a seccomp filter, no sysctl" in lines[1]
    assert "features unknown" in lines[0]
    assert not any(line.endswith(("--", "-")) for line in lines)
    text = re.sub(r"\s+", " ", "\n".join(lines))
    assert "`--device /dev/userfaultfd`" in text
    assert lines[-1].startswith("missing: userfaultfd, kernel-faults")
    assert all(len(line) <= max(width, 80) for line in lines[4:-2])


def test_a_machine_with_everything() -> None:
    """The last line says so."""
    seen = lacking().seen
    there = tuple(dataclasses.replace(one, available=True, remedy="") for one in capabilities(seen))
    table = info._table(Report(seen, there), colour=True, width=80)
    assert table.endswith("\n\nnothing is missing")
    assert table.count("\x1b[32myes\x1b[0m") == len(there)


def test_json_without_a_userfaultfd() -> None:
    """A features word that nobody could ask for is null."""
    assert info._as_json(lacking(), [])["features"] is None
