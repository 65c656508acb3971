"""Child programs that are given a harness's memory.

Knows: how to start a program so that its mappings of regions are watched.
Must not know: how that is done in the program (``preload.c``) or in the helper.

A program gets each region as an inherited descriptor of its memfd, whose number stands in an
environment variable.  It maps the descriptor shared; from then on its touches are touches like
those of any thread of the test.

Laws of this file:

* A program in which nobody watches is never taken for one that was: it would find zeros.
* No program outlives the harness, nor do those that it has started; one that stood when it was
  closed is an error.
* What a program has announced is asked of the helper, which knew it before the program went on.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any, Final

from ..errors import ClosedError, NotSupported
from ..fds import OwnedFd
from . import descendants
from .announcements import KEY_BYTES
from .failures import HarnessError
from .preload import library, why_not

if TYPE_CHECKING:
    from .harness import Harness
    from .region import Region

#: What ``preload.c`` reads.
_VARIABLE: Final = "AIOUFFD_HARNESS"
_BACKLOG: Final = 64
_KINDS: Final = ("shmem", "hugetlb")  # shared, and of a file
_HINTS: Final = (
    "A program is watched where it calls mmap of the C library with MAP_SHARED."
    " It is not where it makes the system call itself (Go), was started through a static or"
    " setuid program, or without LD_PRELOAD and AIOUFFD_HARNESS in its environment."
)

#: What Popen takes for a standard stream.
Stream = int | IO[Any] | None


class Program(subprocess.Popen[bytes]):
    """A child program that was given regions; otherwise a ``subprocess.Popen``.

    As a context manager it waits for the program, and kills it if the block has raised.

    Attributes:
        name: What reports call it.
        regions: What it was given, by the name of the environment variable.

    Sharing: as Popen: one thread at a time.
    """

    def __init__(
        self,
        harness: Harness,
        number: int,
        argv: Sequence[str | os.PathLike[str]],
        regions: Mapping[str, Region],
        *,
        name: str,
        env: Mapping[str, str],
        stdin: Stream,
        stdout: Stream,
        stderr: Stream,
        cwd: str | os.PathLike[str] | None,
        pass_fds: Sequence[int],
        user: str | int | None,
    ) -> None:
        """Use ``Harness.program``."""
        self.name = name
        self.regions = dict(regions)
        self._harness = harness
        self._number = number
        self._checked = False
        super().__init__(
            argv,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            cwd=cwd,
            env=env,
            pass_fds=(*pass_fds, *{region.memfd for region in regions.values()}),
            user=user,
        )

    def __repr__(self) -> str:
        return f"<Program {self.name!r} pid={self.pid} {self.state}>"

    @property
    def state(self) -> str:
        """What it does, in words: it runs, or how it has ended."""
        if (code := self.poll()) is None:
            return "runs"
        return f"has ended with status {code}" if code >= 0 else f"was ended by signal {-code}"

    def wait(self, timeout: float | None = 30.0) -> int:
        """Wait until it has ended.

        Args:
            timeout: Seconds; None waits for ever.

        Returns:
            Its exit status; minus the number of the signal that has ended it.

        Raises:
            subprocess.TimeoutExpired: It runs on.
            HarnessError: It ran without the harness, or a mapping of a region was refused: what
                it has found in the memory may not be what was there.
        """
        if timeout is not None and self.returncode is None:
            self._await_end(timeout)
        code = super().wait()
        if not self._checked and not self._harness.closed:
            self.check()
        return code

    def _await_end(self, timeout: float) -> None:
        """Wait at once; Popen looks in ever longer pauses."""
        try:
            pidfd = os.pidfd_open(self.pid)
        except ProcessLookupError:  # somebody else has heard of its end
            return
        try:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            if not poll.poll(max(0.0, timeout) * 1e3):
                raise subprocess.TimeoutExpired(self.args, timeout)
        finally:
            os.close(pidfd)

    async def async_wait(self, timeout: float | None = 30.0) -> int:
        """Wait until it has ended, on a loop; arguments, result and errors as of ``wait``.

        Kernel: pidfd_open(2), since Linux 5.3.

        Cancellation: it runs on, and may be waited for again.
        """
        if self.poll() is None:
            loop = asyncio.get_running_loop()
            ended = asyncio.Event()
            with OwnedFd(os.pidfd_open(self.pid)) as pidfd:
                loop.add_reader(pidfd.fileno(), ended.set)
                try:
                    async with asyncio.timeout(timeout):
                        await ended.wait()
                except TimeoutError:
                    assert timeout is not None
                    raise subprocess.TimeoutExpired(self.args, timeout) from None
                finally:
                    loop.remove_reader(pidfd.fileno())
        return self.wait()  # which is over at once

    def check(self) -> None:
        """Raise what has kept the harness from watching it, once.

        Raises:
            HarnessError: It ran without the harness, or a mapping of a region was refused.
        """
        loaded, _, refused = self._known()
        self._checked = self.poll() is not None
        text = ""
        if refused:
            process, region, error, reason = refused[0]
            self._checked = True
            text = (
                f"{self.name} (pid {process}) could not map region"
                f" {self._region_name(region)!r}: {reason} ({os.strerror(error)})"
            )
        elif not loaded and self.returncode is not None and self.returncode >= 0:
            text = (
                f"{self.name} (pid {self.pid}) ran without the harness, so nobody saw what it"
                f" touched and its memory was zeros where nobody had been: it did not load"
                f" {library()}. {_HINTS}"
            )
        if text:
            raise HarnessError(text)

    @property
    def mapped(self) -> tuple[Region, ...]:
        """The regions that it, or a process that it has started, has mapped so far."""
        _, mapped, _ = self._known()
        numbers = {region for _, region in mapped}
        return tuple(each for each in self.regions.values() if each.number in numbers)

    def processes(self) -> frozenset[int]:
        """Give the ids of its process and of those it has started that said so."""
        loaded, mapped, _ = self._known()
        return frozenset({self.pid, *loaded, *(process for process, _ in mapped)})

    def account(self) -> list[str]:
        """Say in lines what it does and what it has not mapped; for the texts of errors."""
        lines = [f"  {self.name} (pid {self.pid}) {self.state}"]
        try:
            loaded, mapped, refused = self._known()
        except (HarnessError, ClosedError) as trouble:
            return [*lines, f"    (no more is known: {trouble})"]
        numbers = {region for _, region in mapped}
        for region in self.regions.values():
            if region.number not in numbers and not region.closed:
                ever = "has not mapped" if self.poll() is None else "never mapped"
                lines.append(f"    it {ever} region {region.name!r}. {_HINTS}")
        if not loaded:
            lines.append("    it has not loaded the harness's library")
        for process, number, error, reason in refused:
            lines.append(
                f"    pid {process} could not map region {self._region_name(number)!r}:"
                f" {reason} ({os.strerror(error)})"
            )
        return lines

    def _region_name(self, number: int) -> str:
        names = {region.number: region.name for region in self.regions.values()}
        return names.get(number, str(number))

    def _known(
        self,
    ) -> tuple[list[int], list[tuple[int, int]], list[tuple[int, int, int, str]]]:
        loaded, mapped, refused = self._harness.order("known", self._number)
        return loaded, mapped, refused

    def end(self) -> None:
        """Kill it if it runs, and close its pipes."""
        if self.poll() is None:
            self.kill()
        super().wait()
        for pipe in (self.stdin, self.stdout, self.stderr):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def __exit__(self, kind: Any, value: Any, traceback: Any) -> None:
        if value is not None:
            self.end()
            return
        try:
            super().__exit__(kind, value, traceback)
        except subprocess.TimeoutExpired:
            self.end()
            raise


class Programs:
    """The programs of one harness.

    Sharing: any thread of the test process.
    """

    def __init__(self, harness: Harness) -> None:
        """Begin with none."""
        self._harness = harness
        self._programs: list[Program] = []
        self._socket = ""  # the name on which the helper hears programs
        self._keys: list[bytes] = []  # in their environments

    def start(
        self,
        argv: Sequence[str | os.PathLike[str]],
        regions: Mapping[str, Region],
        *,
        number: int,
        name: str,
        env: Mapping[str, str] | None,
        user_mode_only: bool,
        **popen: Any,
    ) -> Program:
        """Start one; see ``Harness.program``."""
        for region in regions.values():
            if region.harness is not self._harness:
                raise ValueError(f"region {region.name!r} is another harness's")
            if region.memory not in _KINDS:
                raise ValueError(
                    f"region {region.name!r} is of {region.memory} memory, which cannot be given"
                    " to another program: make it with memory='shmem'"
                )
        around = dict(os.environ if env is None else env)
        path = os.fspath(argv[0])
        # As execvp finds it, in the folder where it starts.
        found = shutil.which(
            os.path.join(popen["cwd"] or "", path) if os.sep in path else path,
            path=around.get("PATH", os.defpath),
        )
        if found is not None and (reason := why_not(found)) is not None:
            raise NotSupported(
                f"the harness cannot see what {path} touches: {reason}",
                "Build it as an ordinary dynamically linked program of this user's.",
            )
        key = os.urandom(KEY_BYTES)
        around[_VARIABLE] = " ".join(
            [
                *(self._listen(), key.hex(), str(self._harness.service_pid)),
                str(int(user_mode_only)),
                *map(_described, {region.number: region for region in regions.values()}.values()),
            ]
        )
        _append(around, "LD_PRELOAD", " ", library())
        # Else AddressSanitizer ends a program that loads any library before its own.
        _append(around, "ASAN_OPTIONS", ":", "verify_asan_link_order=0")
        for variable, region in regions.items():
            around[variable] = str(region.memfd)
        self._harness.order("program", number, key)
        self._keys.append(key.hex().encode())
        program = Program(
            *(self._harness, number, argv, regions),
            name=name or os.path.basename(path),
            env=around,
            **popen,
        )
        self._programs.append(program)
        return program

    def _listen(self) -> str:
        """Have the helper hear programs; give the name of its socket."""
        if not self._socket:
            # Of no file, since a program may see other files; the key says who may speak.
            name = f"aiouffd-testing-{os.urandom(8).hex()}"
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
                listener.bind("\0" + name)
                listener.listen(_BACKLOG)
                self._harness.order("listen", fds=(listener.fileno(),))
            self._socket = name
        return self._socket

    def close(self) -> list[str]:
        """End all programs; give what a test has to know of them."""
        troubles = []
        for program in self._programs:
            try:
                if program.poll() is None:
                    processes = program.processes()
                    troubles += [
                        f"{program.name} (pid {touch.process}) still stood at"
                        f" {touch.region}[{touch.page}] when the harness was closed; it was killed"
                        for touch, _, _ in self._harness.standing()
                        if touch.process in processes
                    ]
                elif not program._checked:
                    program.check()
            except (HarnessError, ClosedError) as error:
                troubles.append(str(error))
            if program.poll() is None:
                program.end()
        if self._keys:
            descendants.end(self._keys)
        return troubles

    def account(self) -> list[str]:
        """Say in lines what the programs do; for the texts of errors."""
        lines = [line for program in self._programs for line in program.account()]
        return ["programs:", *lines] if lines else []


def _append(environment: dict[str, str], name: str, separator: str, value: str) -> None:
    before = environment.get(name)
    environment[name] = f"{before}{separator}{value}" if before else value


def _described(region: Region) -> str:
    status = os.fstat(region.memfd)
    return f"{status.st_dev}:{status.st_ino}:{region.number}:{region.page_size}"
