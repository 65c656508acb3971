"""A child process whose threads stand in page faults that this process holds.

Knows: how to start it, hear of its faults and of its parked threads, and let them go.
Must not know: what a test makes of it.

The child runs a script after PRELUDE: its memory is registered with a userfaultfd that this
process has, so this process plays the service and nothing here can hang but the child.
Whatever is waited for has a limit; past it the child's stacks are in the error.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from typing import Any

from aiouffd.events import RawFault, decode
from aiouffd.kernel import calls, tracing
from tests.lazy_harness import ENVIRONMENT, LIMIT, ROOT

PAGE = 4096
MESSAGE = struct.Struct("=cq")  # what it is, and which thread

PRELUDE = """
import ctypes, faulthandler, json, mmap, os, signal, socket, struct, sys, threading
from aiouffd.kernel import abi, calls, gates, handshake
from aiouffd.testing import trampoline

faulthandler.enable()
faulthandler.register(signal.SIGUSR1, all_threads=True)
PAGE, PAGES = 4096, 16
MESSAGE = struct.Struct("=cq")
control = socket.socket(fileno=int(sys.argv[1]))
mapping = mmap.mmap(-1, PAGES * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
view = memoryview(mapping)
libc = ctypes.CDLL(None, use_errno=True)

told = []
send = ctypes.PyDLL(None).send  # keeps the GIL: what others say once they have it comes later

def tell(tid):
    send(control.fileno(), MESSAGE.pack(b"p", tid), MESSAGE.size, 0)
    told.append(tid)

def say(value):
    control.send(b"s" + json.dumps(value).encode())

def porter():
    while message := control.recv(100):
        kind, tid = MESSAGE.unpack(message)
        if kind == b"g":
            going = trampoline.go(tid)
            assert going, tid
        elif kind == b"?":
            say("here")
    trampoline.release_all()

number = trampoline.install(tell)
trampoline.set_service(os.getppid())
uffd = gates.open_userfaultfd(user_mode_only=True)
handshake.shake_hands(uffd, abi.UFFD_FEATURE_THREAD_ID | abi.UFFD_FEATURE_EXACT_ADDRESS)
calls.register(uffd, address, PAGES * PAGE, abi.UFFDIO_REGISTER_MODE_MISSING)
about = json.dumps({"address": address, "number": number}).encode()
socket.send_fds(control, [about], [uffd])
os.close(uffd)
threading.Thread(target=porter, daemon=True).start()
"""


class Standing:
    """The child: where its threads stand, and what it says."""

    def __init__(self, process: subprocess.Popen[bytes], control: socket.socket) -> None:
        self.process = process
        self.control = control
        self._wait(control.fileno())
        about, fds, _, _ = socket.recv_fds(control, 100, 1)
        self.uffd = fds[0]
        self.__dict__.update(json.loads(about))
        self._faults: list[RawFault] = []
        self._content = ctypes.create_string_buffer(PAGE)

    address: int
    number: int

    @property
    def pid(self) -> int:
        return self.process.pid

    def fault(self) -> tuple[int, int]:
        """Wait for an access; return its offset and its thread."""
        while not self._faults:
            self._wait(self.uffd)
            buffer = bytearray(32)
            length = calls.read_messages(self.uffd, [buffer])
            self._faults += [
                event for event in decode(buffer[:length]) if isinstance(event, RawFault)
            ]
        fault = self._faults.pop(0)
        return fault.address - self.address, fault.thread_id

    def interrupt(self, tid: int) -> None:
        """Send a thread the signal."""
        tracing.tgkill(self.pid, tid, self.number)

    def park(self) -> tuple[int, int]:
        """Wait for an access and park its thread; return its offset and its thread."""
        offset, tid = self.fault()
        self.interrupt(tid)
        assert self.told() == tid
        return offset, tid

    def park_all(self, count: int) -> list[tuple[int, int]]:
        """Park several threads as they come; return their offsets and threads.

        One that was sent the signal may have to wait for the GIL, which the next one has.
        """
        sent: dict[int, int] = {}
        parked: list[tuple[int, int]] = []
        while len(parked) < count:
            come = self.parked_or_fault()
            if isinstance(come, int):
                parked.append((sent[come], come))
            else:
                offset, tid = come
                assert tid not in sent
                sent[tid] = offset
                self.interrupt(tid)
        return parked

    def told(self) -> int:
        """Wait until a thread says that it is parked; return what it said."""
        message = self._receive()
        assert message[:1] == b"p", message
        return int(MESSAGE.unpack(message)[1])

    def said(self) -> Any:
        """Wait for what the script says next."""
        message = self._receive()
        assert message[:1] == b"s", message
        return json.loads(message[1:])

    def ask(self) -> None:
        """Ask the porter whether it is there; it says "here"."""
        self.control.send(MESSAGE.pack(b"?", 0))

    def fill(self, offset: int, value: int) -> None:
        """Answer the fault at an offset with a page of one value."""
        ctypes.memset(self._content, value, PAGE)
        start = self.address + offset // PAGE * PAGE
        assert calls.copy(self.uffd, start, ctypes.addressof(self._content), PAGE) == PAGE

    def go(self, tid: int) -> None:
        """Let a parked thread go on."""
        self.control.send(MESSAGE.pack(b"g", tid))

    def finish_stdin(self) -> None:
        """Let the script go on that reads its standard input to the end."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    def ready_fault(self) -> bool:
        """Say whether an access is waiting to be read about."""
        return bool(self._faults or select.select([self.uffd], [], [], 0)[0])

    def parked_or_fault(self) -> int | tuple[int, int]:
        """Wait until a thread is parked, and return it, or for an access, as ``fault`` does."""
        if not self._faults:
            self._wait(self.uffd, self.control.fileno())
            if select.select([self.control], [], [], 0)[0]:
                return self.told()
        return self.fault()

    def _receive(self) -> bytes:
        self._wait(self.control.fileno())
        message = self.control.recv(65536)
        assert message, "the child has ended"
        return message

    def _wait(self, *fds: int) -> None:
        ready, _, _ = select.select(fds, [], [], LIMIT)
        if not ready:
            self.process.send_signal(signal.SIGUSR1)  # all stacks, on its stderr
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.5)
            raise TimeoutError(errno.ETIMEDOUT, "the child did nothing that was waited for")


@contextlib.contextmanager
def standing(
    script: str, *options: str, stdin: int = subprocess.DEVNULL, quiet: bool = True
) -> Iterator[Standing]:
    """Run a script after PRELUDE; it has to end by itself, well, and without a word on stderr."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, tempfile.TemporaryFile() as errors:
        with theirs:
            process = subprocess.Popen(
                [
                    sys.executable,
                    *options,
                    "-c",
                    PRELUDE + textwrap.dedent(script),
                    str(theirs.fileno()),
                ],
                cwd=ROOT,
                env=ENVIRONMENT,
                pass_fds=[theirs.fileno()],
                stdin=stdin,
                stderr=errors,
            )
        child: Standing | None = None
        try:
            child = Standing(process, ours)
            yield child
            process.wait(LIMIT)
        except BaseException as error:
            process.kill()
            process.wait()
            errors.seek(0)
            error.add_note(errors.read().decode(errors="replace"))
            raise
        finally:
            if child is not None:
                os.close(child.uffd)
            if process.stdin is not None:
                process.stdin.close()
        errors.seek(0)
        said = errors.read().decode(errors="replace")
        assert process.returncode == 0, said
        assert not (quiet and said), said


def until(condition: Any) -> None:
    """Wait for something that happens without telling."""
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)
