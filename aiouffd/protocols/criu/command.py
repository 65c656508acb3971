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

#: What is said in every container, and is no reason for anything.
_NOISE: Final = ("RLIMIT_NOFILE", "kdat cache")
_MOST_TEXT: Final = 500  # characters of a reason


class Criu:
    """One run of CRIU.

    Attributes:
        log: The file that it writes to.

    Sharing: the loop's thread.
    """

    def __init__(self, process: asyncio.subprocess.Process, verb: str, log: str) -> None:
        self.log: Final = log
        self._verb = verb
        self._process = process
        self._exited = asyncio.ensure_future(process.wait())

    @classmethod
    async def start(
        cls, program: str, verb: str, folder: str, *options: str, before: Sequence[str] = ()
    ) -> Criu:
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
        log = os.path.join(folder, f"{verb}.log")
        with open(os.path.join(folder, f"{verb}.out"), "wb") as out:  # noqa: ASYNC230 - empty
            process = await asyncio.create_subprocess_exec(
                *(*before, found, verb, "-D", folder, "-W", folder, "-o", log, "-v3", *options),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        return cls(process, verb, log)

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    @property
    def status(self) -> int | None:
        """Its exit status; None while it runs."""
        return self._process.returncode

    async def wait(self) -> int:
        """Wait for its end; give the exit status.

        Cancellation: it runs on; call again.
        """
        return await asyncio.shield(self._exited)

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
