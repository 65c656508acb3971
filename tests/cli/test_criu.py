"""The group of commands around CRIU's checkpoints: each is there, and loaded when asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest

from aiouffd.cli.criu import COMMANDS


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``aiouffd criu`` as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "aiouffd", "criu", *arguments],
        check=False,
        timeout=60,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str) -> None:
    """Each command's module has its parser."""
    told = run(name, "--help")
    assert told.returncode == 0, told.stderr
    assert f"usage: aiouffd criu {name}" in told.stdout


def test_the_group_lists_its_commands() -> None:
    """Help names every command, with what it does."""
    told = run("--help")
    assert (told.returncode, told.stderr) == (0, "")
    for name in COMMANDS:
        assert told.stdout.partition(f"\n    {name}")[2][:1] in (" ", "\n")  # behind long ones


@pytest.mark.parametrize("arguments", [[], ["teleport"], ["show", "--teleport", "x"]])
def test_a_mistake_is_status_2(arguments: list[str]) -> None:
    """What is missing or not known is said on stderr, with the usage."""
    told = run(*arguments)
    assert (told.returncode, told.stdout) == (2, "")
    assert "usage: aiouffd" in told.stderr
