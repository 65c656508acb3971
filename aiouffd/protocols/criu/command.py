"""CRIU itself, run as a command.

Knows: how it is started, and where it says what went wrong.
Must not know: what for.

Law of this file: CRIU is in a session of its own.  What a terminal sends to us (Ctrl-C) must not
end it in the middle of a process that it has stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from typing import Final, TextIO

from ...errors import NotSupported
from ...fds import OwnedFd

#: What is said in every container, and is no reason for anything.
_NOISE: Final = ("RLIMIT_NOFILE", "kdat cache")
_MOST_TEXT: Final = 500  # characters of a reason


class Criu:
    """One run of CRIU.

    Attributes:
        log: The file that it writes to.

    Sharing: the loop's thread.
    """

    def __init__(
        self, program: str, verb: str, folder: str, *options: str, before: Sequence[str] = ()
    ) -> None:
        """Start it; its log lies in the folder.

        Args:
            program: Its name or path.
            verb: ``dump``, ``restore``.
            folder: Of the images.
            options: All others.
            before: A command that starts it, with its options.

        Raises:
            NotSupported: There is no such program.
            OSError: It cannot be started.
        """
        found = shutil.which(program)
        if found is None:
            raise NotSupported(
                f"there is no program {program}",
                "Install CRIU 4.1 or newer, or say where it is (--criu PATH)",
            )
        self.log: Final = os.path.join(folder, f"{verb}.log")
        self._verb = verb
        words = (*before, found, verb, "-D", folder, "-W", folder, "-o", self.log, "-v3", *options)
        with open(os.path.join(folder, f"{verb}.out"), "wb") as out:
            self._process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    @property
    def status(self) -> int | None:
        """Its exit status; None while it runs."""
        return self._process.poll()

    async def wait(self) -> int:
        """Wait for its end; give the exit status.

        Cancellation: it runs on; call again.
        """
        while (status := self._process.poll()) is None:
            loop, exited = asyncio.get_running_loop(), asyncio.Event()
            with OwnedFd(os.pidfd_open(self.pid)) as pidfd:  # it is ours: the number is not reused
                loop.add_reader(pidfd.fileno(), exited.set)
                try:
                    await exited.wait()
                finally:
                    loop.remove_reader(pidfd.fileno())
        return status

    def let_go(self) -> None:
        """Let it run on, if it does, without us."""
        self._process.returncode = self._process.poll() or 0  # else it is missed when we end

    def why(self) -> str:
        """Say how it has ended: the first error of its log, and where that lies."""
        return f"criu {self._verb} ended with status {self.status}: {self._reason()}"

    def _reason(self) -> str:
        with contextlib.suppress(OSError), _reading(self.log) as file:
            for line in file:
                if " Error (" in line and not any(noise in line for noise in _NOISE):
                    text = line.partition(" Error ")[2].partition(": ")[2].strip()
                    return f"{text[:_MOST_TEXT]} ({self.log})"
        said = ""
        out = self.log.removesuffix(".log") + ".out"
        with contextlib.suppress(OSError), _reading(out) as file:
            said = file.read(_MOST_TEXT).strip().replace("\n", "; ")
        return said or f"see {self.log}"


def _reading(path: str) -> TextIO:
    return open(path, encoding="utf-8", errors="replace")
