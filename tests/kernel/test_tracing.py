"""Tracing: who may, what /proc says of a thread, a signal for one thread."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from aiouffd.kernel import ptrace, tracing
from tests.kernel.test_elsewhere import elsewhere
from tests.targets import Target, wait_until
from tests.tracees import NR, child, fill, parked, seccomp_filter, traced_target


@pytest.fixture
def target() -> Iterator[Target]:
    """A process with four pages of nothing, whose threads may be traced."""
    with traced_target() as target:
        yield target


# --- who may ---------------------------------------------------------------------------


def test_a_child_can_be_traced_here() -> None:
    """And the answer is kept; nothing is left over of the attempt."""
    tracing.can_trace.cache_clear()
    before = set(os.listdir("/proc/self/fd"))
    assert tracing.can_trace() is None
    assert tracing.can_trace() is None
    assert tracing.can_trace.cache_info().hits == 1
    assert set(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def said_by(program: Callable[[], str | None], pid_of: Callable[[int], None]) -> str:
    """Run a function in a child process, and return what it returned."""
    ours, theirs = socket.socketpair()

    def main() -> None:
        theirs.recv(1)
        theirs.send((program() or "nothing").encode())

    with ours, theirs, child(main) as pid:
        pid_of(pid)
        ours.send(b"!")
        said = ours.recv(4096).decode()
        os.waitpid(pid, 0)
        return said


def _asked_anew() -> str | None:
    tracing.can_trace.cache_clear()
    return tracing.can_trace()


def test_a_seccomp_filter_is_named() -> None:
    """With what a container needs."""

    def refused() -> str | None:
        seccomp_filter(NR["ptrace"], 0x0005_0001)  # SECCOMP_RET_ERRNO, EPERM
        return _asked_anew()

    said = said_by(refused, lambda pid: None)
    assert "seccomp filter" in said
    assert "PTRACE_SEIZE" in said
    assert "--cap-add=SYS_PTRACE" in said


def test_a_debugger_that_follows_children_is_named() -> None:
    """With its process id."""
    debuggers: list[int] = []

    def debug(pid: int) -> None:
        ready, done = os.pipe()
        debugger = os.fork()
        if not debugger:
            try:
                follow = ptrace.PTRACE_O_TRACEFORK | ptrace.PTRACE_O_TRACEVFORK
                ptrace.seize(pid, follow | ptrace.PTRACE_O_TRACECLONE)
                os.write(done, b"!")
                while True:
                    tid, status = os.waitpid(-1, 0x40000000)
                    if os.WIFSTOPPED(status):
                        ptrace.cont(tid, ptrace.stopped_by_signal(status))
            finally:
                os._exit(0)
        debuggers.append(debugger)
        assert os.read(ready, 1) == b"!"
        os.close(ready)
        os.close(done)

    said = said_by(_asked_anew, debug)
    assert f"Process {debuggers[0]}, a debugger or strace" in said
    os.waitpid(debuggers[0], 0)


REFUSED = PermissionError(1, "Operation not permitted", "PTRACE_SEIZE of thread 5")


@pytest.mark.parametrize(
    "scope, status, words",
    [
        ("", {}, "security module"),
        ("1\n", {"TracerPid": "0", "Seccomp": "0"}, "security module"),
        ("2\n", {"TracerPid": "0", "Seccomp": "2"}, "sysctl kernel.yama.ptrace_scope=1"),
        ("3\n", {}, "until the next boot"),
        ("0\n", {"Seccomp": "2"}, "--cap-add=SYS_PTRACE"),
        ("3\n", {"TracerPid": "4711"}, "Process 4711"),
    ],
)
def test_each_reason_comes_with_what_helps(scope: str, status: dict[str, str], words: str) -> None:
    """A debugger first, since it is the easiest to do without; what is unknown is said to be."""
    said = tracing.why_not(REFUSED, scope, status)
    assert words in said
    assert "(PTRACE_SEIZE of thread 5: Operation not permitted)" in said


def test_what_cannot_be_read_says_nothing() -> None:
    """There is no Yama everywhere."""
    assert tracing._text("/proc/sys/kernel/yama/no_such_file") == ""


def test_a_tracer_is_allowed_where_yama_forbids() -> None:
    """Everybody, this parent, nobody; elsewhere there is nothing to allow."""
    yama = Path("/proc/sys/kernel/yama/ptrace_scope").exists()
    assert [tracing.allow_tracer(pid) for pid in (-1, os.getppid(), 0)] == [yama] * 3


# --- one thread ------------------------------------------------------------------------


def test_a_signal_reaches_the_thread_it_is_for() -> None:
    """And no other of the process."""
    reached: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda *_: reached.append(1))
    try:
        tracing.tgkill(os.getpid(), threading.get_native_id(), 0)
        assert not reached
        tracing.tgkill(os.getpid(), threading.get_native_id(), signal.SIGUSR1)
        assert reached
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_signal_for_a_thread_of_another_process_is_refused(target: Target) -> None:
    """ESRCH: an id that was used again is not taken for the old one."""
    with pytest.raises(ProcessLookupError, match="tgkill of thread"):
        tracing.tgkill(os.getpid(), target.thread_ids[0], signal.SIGUSR1)


def test_a_thread_says_in_which_system_call_it_is(target: Target) -> None:
    """Its number and the instruction after it; none while its own instruction waits for a page."""
    tid = target.thread_ids[0]
    wait_until(lambda: tracing.in_system_call(target.pid, tid)[0] == NR["read"], "an idle thread")
    _, pc = tracing.in_system_call(target.pid, tid)
    assert pc > 0
    target.start_read(0)
    parked(target)
    number, place = tracing.in_system_call(target.pid, tid)
    assert number is None
    assert place not in (0, pc)


def test_a_thread_that_runs_is_in_none(target: Target) -> None:
    """And nobody knows where."""
    for page in range(4):
        fill(target, page)
    storm = target.start_storm(seed=1, count=200_000_000)
    assert not storm.done
    wait_until(
        lambda: tracing.in_system_call(target.pid, target.thread_ids[0]) == (None, 0), "running"
    )


@pytest.mark.root
def test_a_thread_whose_system_call_waits_for_a_page_is_in_it() -> None:
    """It is the kernel that touches the page then."""
    with traced_target(user_mode_only=False) as target:
        there, here = target.make_memfd("copy", 0, 64)
        os.close(here)
        written = target.call("pwrite", there, target.at(1), 10, 0)
        parked(target)
        assert tracing.in_system_call(target.pid, target.thread_ids[0])[0] == NR["pwrite64"]
        fill(target, 1)
        assert written.result() == 10


def test_a_thread_that_has_ended_is_not_found() -> None:
    """No file has anything to say of it."""
    with child(lambda: None) as pid:
        os.waitpid(pid, 0)
        with pytest.raises(FileNotFoundError):
            tracing.in_system_call(pid, pid)


@pytest.mark.root
def test_a_thread_that_may_not_be_traced_says_nothing(target: Target) -> None:
    """To somebody else's program."""

    def ask() -> str:
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        try:
            tracing.in_system_call(target.pid, target.thread_ids[0])
        except PermissionError as error:
            return f"refused: {error}"
        return "answered"

    assert said_by(ask, lambda pid: None).startswith("refused")


# --- the door, and elsewhere -----------------------------------------------------------


def test_all_of_it_is_to_be_had_here() -> None:
    """Each name that the door lists is there, and none of ptrace's requests is missing."""
    assert all(hasattr(tracing, name) for name in tracing.__all__)
    assert {"seize", "interrupt", "singlestep", "cont", "detach"} <= set(tracing.__all__)


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_there_is_none_elsewhere(system: str) -> None:
    """Asked whether it works it says no; every use raises NotSupported."""
    program = """
from aiouffd.errors import NotSupported
from aiouffd.kernel import tracing
print(tracing.can_trace())
for call in (tracing.allow_tracer, tracing.in_system_call, tracing.tgkill):
    try:
        call(*range(1, 1 + call.__code__.co_argcount))
    except NotSupported as error:
        print(error.missing)
"""
    assert elsewhere(system, program).splitlines() == [
        "ptrace as it is used here exists on Linux only.",
        *["userfaultfd exists on Linux only"] * 3,
    ]
