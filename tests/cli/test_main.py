"""The command line around the commands: help, version, statuses."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import types
from collections.abc import Callable

import pytest

import aiouffd
from aiouffd.cli import main
from aiouffd.cli.main import COMMANDS
from aiouffd.errors import NotSupported


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "aiouffd", *arguments],
        check=False,
        timeout=60,
        capture_output=True,
        text=True,
    )


def test_without_a_command_there_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    """Help lists every command, and where to start; it is no mistake to ask for nothing."""
    assert main([]) == 0
    text = capsys.readouterr().out
    for name in COMMANDS:
        assert f"aiouffd {name}" in text
    assert "usage: aiouffd" in text


def test_help_and_version_are_statuses_of_success() -> None:
    """--help and --version answer on stdout and end with 0."""
    told = run("--help")
    assert (told.returncode, told.stderr) == (0, "")
    assert "start here" in told.stdout
    told = run("--version")
    assert (told.returncode, told.stdout) == (0, f"aiouffd {aiouffd.__version__}\n")


@pytest.mark.parametrize("arguments", [["teleport"], ["--teleport"], ["info", "--teleport"]])
def test_a_mistake_is_status_2(arguments: list[str]) -> None:
    """What argparse does not know is said on stderr, with the usage."""
    told = run(*arguments)
    assert (told.returncode, told.stdout) == (2, "")
    assert "usage: aiouffd" in told.stderr
    assert "teleport" in told.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str) -> None:
    """Each command's module has its parser."""
    told = run(name, "--help")
    assert told.returncode == 0, told.stderr
    assert f"usage: aiouffd {name}" in told.stdout


def test_only_the_asked_commands_module_is_imported() -> None:
    """Help loads no command, a command no other."""
    program = (
        "import sys\n"
        "from aiouffd.cli import main\n"
        "try: main({arguments})\n"
        "except SystemExit: pass\n"
        "names = ('info', 'serve', 'demo', 'criu', 'criu_show')\n"
        "print([n for n in names if f'aiouffd.cli.{{n}}' in sys.modules],"
        " file=sys.stderr)\n"
    )
    for arguments, loaded in (
        ([], "[]"),
        (["info", "--json"], "['info']"),
        (["criu", "--help"], "['criu']"),
        (["criu", "show", "--help"], "['criu', 'criu_show']"),
    ):
        told = subprocess.run(
            [sys.executable, "-c", program.format(arguments=arguments)],
            check=True,
            timeout=60,
            capture_output=True,
            text=True,
        )
        assert told.stderr.strip() == loaded


Command = Callable[[Callable[[], int]], None]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Command:
    """Add a command named ``trial`` that does what it is given."""

    def add(action: Callable[[], int]) -> None:
        module = types.ModuleType("aiouffd.cli.trial")

        def add_parser(
            subparsers: argparse._SubParsersAction[argparse.ArgumentParser],
        ) -> argparse.ArgumentParser:
            return subparsers.add_parser("trial")

        module.add_parser = add_parser  # type: ignore[attr-defined]
        module.run = lambda args: action()  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(COMMANDS, "trial", "a trial")

    return add


def test_a_commands_status_is_the_programs(command: Command) -> None:
    """What run returns is handed on."""
    command(lambda: 7)
    assert main(["trial"]) == 7


def raising(error: BaseException) -> Callable[[], int]:
    """An action that fails."""

    def action() -> int:
        raise error

    return action


@pytest.mark.parametrize(
    "error, text",
    [
        (NotSupported("no device", "Get one."), "aiouffd: no device. Get one.\n"),
        (
            FileNotFoundError(2, "No such file", "image"),
            "aiouffd: image: No such file\n",
        ),
    ],
)
def test_an_error_is_one_line(
    command: Command, capsys: pytest.CaptureFixture[str], error: Exception, text: str
) -> None:
    """Errors that say what to do need no traceback."""
    command(raising(error))
    if sys.flags.dev_mode:
        with pytest.raises(type(error)):
            main(["trial"])
        return
    assert main(["trial"]) == 1
    assert capsys.readouterr().err == text


def test_a_bug_keeps_its_traceback(command: Command) -> None:
    """What is no UffdError and no OSError is not hidden."""
    command(raising(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        main(["trial"])


def test_an_interrupt_is_130(command: Command) -> None:
    """Ctrl-C ends like a shell's."""
    command(raising(KeyboardInterrupt()))
    assert main(["trial"]) == 130


def test_in_dev_mode_errors_have_tracebacks() -> None:
    """python -X dev is for who develops."""
    program = (
        "import aiouffd.cli.info as info\n"
        "from aiouffd.cli import main\n"
        "def run(args): raise OSError(5, 'broken')\n"
        "info.run = run\n"
        "main(['info'])\n"
    )
    told = subprocess.run(
        [sys.executable, "-X", "dev", "-c", program],
        check=False,
        timeout=60,
        capture_output=True,
        text=True,
    )
    assert told.returncode == 1
    assert "Traceback" in told.stderr


def test_a_reader_that_goes_away_is_141() -> None:
    """``aiouffd info | head -1`` prints no traceback."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        told = subprocess.run(
            [sys.executable, "-m", "aiouffd", "info"],
            check=False,
            timeout=60,
            stdout=writing,
            stderr=subprocess.PIPE,
        )
    finally:
        os.close(writing)
    assert (told.returncode, told.stderr) == (141, b"")


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_what_is_closed_at_the_start_is_left_alone(closed: tuple[int, ...]) -> None:
    """A daemon's parent may close them; no socket or file of ours then takes their numbers."""
    program = (
        "import os, sys\n"
        f"for number in {closed}: os.close(number)\n"
        "os.execv(sys.executable, [sys.executable, '-m', 'aiouffd', 'info'])\n"
    )
    told = subprocess.run(
        [sys.executable, "-c", program], check=False, timeout=60, capture_output=True, text=True
    )
    assert (told.returncode, told.stderr) == (0, "")
    assert ("userfaultfd" in told.stdout) == (1 not in closed)
