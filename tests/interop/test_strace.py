"""strace: a decoder of the same interface that nobody here wrote, and a foreign reader."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from aiouffd.kernel import abi
from tests.interop.serving import LIMIT, command, environment, serving

STRACE = shutil.which("strace")
pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(STRACE is None, reason="needs strace: apt-get install strace"),
]

#: What strace prints of a call, with -X verbose: numbers, and their names in comments.
_CALL = re.compile(
    r"^\d+ +(?:ioctl\(\d+, (?P<request>0x[0-9a-f]+) /\* (?P<name>.+?) \*/, (?P<argument>.*)"
    r"|userfaultfd\((?P<flags>.*))\) += (?P<result>-?\d+)(?: (?P<error>E\w+))?.*$",
    re.MULTILINE,
)
_FIELD = re.compile(r"(\w+)=(0x[0-9a-f]+|\d+)(?: /\* (.*?) \*/)?")


class Decoded(NamedTuple):
    """One call as strace understood it."""

    name: str
    request: int
    argument: str
    result: int
    error: str | None

    @property
    def fields(self) -> dict[str, list[tuple[int, str]]]:
        """Numbers by field name, with the names that strace gives them; two if in and out."""
        found: dict[str, list[tuple[int, str]]] = {}
        for key, number, names in _FIELD.findall(self.argument):
            found.setdefault(key, []).append((int(number, 0), names))
        return found


def _decoded(text: str) -> list[Decoded]:
    calls = [
        Decoded(
            match["name"] or "userfaultfd",
            int(match["request"] or "0", 0),
            match["argument"] or f"flags={match['flags']}",
            int(match["result"]),
            match["error"],
        )
        for match in _CALL.finditer(text)
    ]
    return [call for call in calls if call.request >> 8 & 0xFF == abi.UFFDIO or not call.request]


def _number(name: str) -> int:
    """What a name of strace's is in our tables; ``1<<_X`` is a bit of an ioctl mask."""
    if name.startswith("1<<"):
        return 1 << int(getattr(abi, name.removeprefix("1<<")))
    if name.startswith("O_"):
        return int(getattr(os, name))
    return int(name, 0) if name.startswith("0x") else int(getattr(abi, name))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Decoded, dict[str, object]]]:
    """Every call of every_ioctl.py: as strace saw it, and as we issued it."""
    log = tmp_path_factory.mktemp("strace") / "log"
    strace = ["strace", "-f", "-v", "-X", "verbose", "-e", "trace=ioctl,userfaultfd"]
    done = subprocess.run(
        [*strace, "-o", str(log), *command("every_ioctl.py")],
        check=True,
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        env=environment(),
        timeout=LIMIT,
    )
    issued = [json.loads(line) for line in done.stdout.splitlines()]
    decoded = _decoded(log.read_text(encoding="ascii"))
    assert len(decoded) == len(issued)
    return list(zip(decoded, issued, strict=True))


def test_strace_knows_each_call_by_the_same_name(
    pairs: list[tuple[Decoded, dict[str, object]]],
) -> None:
    """What strace calls a request is what we call it, in order; what it does not know is ours."""
    known = 0
    for decoded, issued in pairs:
        name = str(issued["name"])
        if decoded.request:
            assert decoded.request == getattr(abi, name), name
        if not decoded.name.startswith("_IOC("):
            known += 1
            assert decoded.name == name
    assert known >= 12, "a strace that knows nothing proves nothing"
    names = {str(issued["name"]) for _, issued in pairs}
    assert names >= {f"UFFDIO_{name}" for name in abi.IOCTLS}, "every_ioctl.py leaves one out"


def test_strace_sees_the_arguments_that_we_gave(
    pairs: list[tuple[Decoded, dict[str, object]]],
) -> None:
    """Addresses, lengths and modes arrive in the fields that they were meant for."""
    compared = 0
    for decoded, issued in pairs:
        arguments = issued["arguments"]
        assert isinstance(arguments, dict)
        for key, value in arguments.items():
            if key in decoded.fields:
                compared += 1
                assert decoded.fields[key][0][0] == value, (decoded, key)
    assert compared >= 30


def test_strace_gives_bits_the_same_names(pairs: list[tuple[Decoded, dict[str, object]]]) -> None:
    """Flags, modes, features and ioctl masks: each name that strace prints is ours, and its bit."""
    compared = 0
    for decoded, _ in pairs:
        for numbers in decoded.fields.values():
            for number, names in numbers:
                if names:
                    total = 0
                    for name in names.split("|"):
                        total |= _number(name)
                        compared += 1
                    assert total == number, names
    assert compared >= 20


def test_strace_sees_the_results_that_we_report(
    pairs: list[tuple[Decoded, dict[str, object]]],
) -> None:
    """Bytes done, descriptors, masks and errnos are those that the kernel gave."""
    for decoded, issued in pairs:
        result = issued["result"]
        if isinstance(result, list):  # UFFDIO_API: features and ioctls
            out = [decoded.fields[key][-1][0] for key in ("features", "ioctls")]
            assert out == result
        elif isinstance(result, int) and result < 0:
            assert decoded.error == errno.errorcode[-result], decoded
        else:
            assert decoded.result >= 0, decoded
            for key in ("copy", "zeropage", "mapped", "move", "updated", "ioctls"):
                if key in decoded.fields:
                    assert decoded.fields[key][-1][0] == result, decoded
            if decoded.result:
                assert decoded.result == result, "a new descriptor"


async def test_strace_reads_served_memory(tmp_path: Path, seed: int) -> None:
    """strace shows what write(2) writes: it faults on the target's memory, and is served.

    It reads with process_vm_readv: a fault of another process, in the kernel, on memory that is
    not its own.
    """
    log = tmp_path / "log"
    strace = ["strace", "-o", str(log), "-e", "trace=write", "-s", "100000", "-xx"]
    async with serving(4, seed, under=strace) as served:
        await served.write()
        strangers = {fault.thread_id for fault in served.faults}
        assert strangers == {served.popen.pid}, "strace itself took the faults, before write(2)"
        assert sorted(fault.offset for fault in served.faults) == [0, 4096, 8192, 12288]
    shown = re.search(
        r'^write\(1, "((?:\\x[0-9a-f]{2}){16384})", 16384\)', log.read_text(), re.MULTILINE
    )
    assert shown is not None, log.read_text()[-500:]
    assert bytes.fromhex(shown[1].replace("\\x", "")) == served.content
