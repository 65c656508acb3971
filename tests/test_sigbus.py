"""The trampoline where a process may die of it: each case is a process of its own."""

from __future__ import annotations

import functools
import signal
import subprocess
import sys
import textwrap

import pytest

from aiouffd import sigbus
from tests.lazy_harness import ENVIRONMENT, ROOT, SCALE, run_script

PRELUDE = """
import asyncio, ctypes, mmap, os, signal, sys, tempfile, threading
from aiouffd import sigbus
from aiouffd.lazy_memory import Holes, LazyMemory
PAGE = 4096

async def fill(fault):
    await asyncio.sleep(0)
    return b"f" * fault.length

async def fail(fault):
    raise LookupError("no such page")
"""


def run(text: str, *options: str) -> subprocess.CompletedProcess[str]:
    return run_script(PRELUDE + textwrap.dedent(text), *options)


def test_failure_on_a_thread_without_python_ends_the_process_with_a_report() -> None:
    """No frame can get the exception: the loop's handler is told, and the process dies."""
    done = run(
        """
        async def main():
            def tell(loop, context):
                print("told:", context["message"], repr(context["exception"]), flush=True)

            asyncio.get_running_loop().set_exception_handler(tell)
            async with LazyMemory(PAGE, fail, name="doomed") as memory:
                libc = ctypes.CDLL(None)
                address = memory._mapping.start
                thread = ctypes.c_ulong()
                # memchr(address, 0, ...): any C function of pointers will do as a thread.
                libc.pthread_create(
                    ctypes.byref(thread), None, libc.strlen, ctypes.c_void_p(address)
                )
                await asyncio.sleep(30)

        asyncio.run(main())
        """
    )
    assert done.returncode == -signal.SIGBUS, done
    assert "aiouffd: fatal: no page at 0x" in done.stderr
    assert "Fatal Python error: Bus error" in done.stderr
    assert "told: doomed: no page at 0x" in done.stdout
    assert "LookupError" in done.stdout


def test_success_on_a_thread_without_python() -> None:
    """A thread that Python did not start is served like any other, and leaves no trace."""
    done = run(
        """
        def inline(fault):
            return b"x" * 4095 + b"\\0"

        async def later(fault):
            return inline(fault)

        async def main():
            libc = ctypes.CDLL(None)
            for handler in inline, later:
                async with LazyMemory(PAGE, handler) as memory:
                    thread, result = ctypes.c_ulong(), ctypes.c_ulong()
                    address = memory._mapping.start
                    libc.pthread_create(
                        ctypes.byref(thread), None, libc.strlen, ctypes.c_void_p(address)
                    )
                    await asyncio.to_thread(libc.pthread_join, thread, ctypes.byref(result))
                    assert result.value == 4095, result
                    assert not [t for t in threading.enumerate() if "Dummy" in t.name]

        asyncio.run(main())
        """
    )
    assert done.returncode == 0, done.stderr


def test_a_foreign_sigbus_dies_with_the_line_that_made_it() -> None:
    """A truncated file's mapping is none of ours: faulthandler names the line, the process dies."""
    done = run(
        """
        def culprit():
            with tempfile.TemporaryFile() as file:
                file.truncate(PAGE)
                other = mmap.mmap(file.fileno(), PAGE)
                file.truncate(0)
                return other[0]

        async def main():
            async with LazyMemory(PAGE, fill) as memory:
                assert await asyncio.to_thread(lambda: memory[0]) == ord("f")
                culprit()

        asyncio.run(main())
        """
    )
    assert done.returncode == -signal.SIGBUS, done
    assert "Bus error" in done.stderr
    assert "in culprit" in done.stderr
    assert "aiouffd: fatal" not in done.stderr


def test_poisoned_holes_kill_who_touches_them_after_closing() -> None:
    """Holes.POISON outlives everything of ours: a touch dies, what is there can be read."""
    done = run(
        """
        async def main():
            memory = await LazyMemory(4 * PAGE, fill).open()
            view = memory.view
            await memory.ensure(0, PAGE)
            await memory.aclose(Holes.POISON)
            assert not sigbus.targets() and not sigbus.installed()
            assert view[0] == ord("f")
            print("alive", flush=True)
            view[PAGE]

        asyncio.run(main())
        """
    )
    assert done.returncode == -signal.SIGBUS, done
    assert "alive" in done.stdout


@pytest.mark.root
def test_needs_no_privilege() -> None:
    """A user without rights, with the sysctl at 0, has lazy memory, write-protect included."""
    done = run(
        """
        def inline(fault):
            return b"i" * fault.length

        async def guard(fault):
            from aiouffd.resolutions import Unprotect
            return Unprotect() if fault.wp else b"g" * fault.length

        async def main():
            async with LazyMemory(PAGE, fill) as memory:
                assert await asyncio.to_thread(lambda: memory[0]) == ord("f")
            async with LazyMemory(PAGE, inline) as memory:
                assert memory[0] == ord("i")
            async with LazyMemory(PAGE, guard, write_protect=True) as memory:
                await asyncio.to_thread(memory.__setitem__, 0, 1)
                assert memory[0:2] == b"\\x01g"
            async with LazyMemory(PAGE, fail) as memory:
                try:
                    await asyncio.to_thread(lambda: memory[0])
                except Exception as error:
                    assert isinstance(error.__cause__, LookupError)
            assert not os.access("/dev/userfaultfd", os.R_OK)

        import concurrent.futures.thread  # its files may be out of reach afterwards
        import aiouffd.resolutions
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        # Not dumpable after setuid: /proc/self/pagemap would belong to root.
        ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
        asyncio.run(main())
        """
    )
    assert done.returncode == 0, done.stderr


_DEPTHS = """
import asyncio, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, (3, 9))  # who spins gets SIGXCPU, on a busy machine too
from aiouffd.lazy_memory import LazyMemory

async def fill(fault):
    return b"f" * fault.length

def inline(fault):
    return b"f" * fault.length

def frames():
    frame, count = sys._getframe(), 0
    while frame is not None:
        frame, count = frame.f_back, count + 1
    return count

def descend(view, levels):
    if levels:
        return descend(view, levels - 1)
    value = view[0]
    return value

async def main(distance, handler):
    async with LazyMemory(4096, handler, deadline=5) as memory:
        view = memory.view

        def touch():
            levels = sys.getrecursionlimit() - frames() - distance
            try:
                return descend(view, levels)
            except Exception as error:
                return type(error).__name__

        print(await asyncio.to_thread(touch), flush=True)

sys.setrecursionlimit(300)
asyncio.run(main(int(sys.argv[1]), {"inline": inline, "loop": fill}[sys.argv[2]]))
"""


@functools.cache
def _depths(handler: str) -> dict[int, str]:
    """Touch a page at each of the last depths before the recursion limit, all at once."""
    children = {
        distance: subprocess.Popen(
            [sys.executable, "-c", _DEPTHS, str(distance), handler],
            cwd=ROOT,
            env=ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for distance in range(12)
    }
    outcomes = {}
    for distance, child in children.items():
        out, errors = child.communicate(timeout=50 * SCALE)
        if child.returncode == 0:
            outcomes[distance] = out.decode().strip()
        elif child.returncode == -signal.SIGXCPU:
            outcomes[distance] = "spins"
        elif child.returncode in {-signal.SIGBUS, -signal.SIGSEGV} and b"Fatal Python" in errors:
            outcomes[distance] = "dies with a report"
        else:
            outcomes[distance] = errors.decode()
    return outcomes


@pytest.mark.parametrize("handler", ["inline", "loop"])
def test_near_the_recursion_limit(handler: str) -> None:
    """At the last depths before the limit an access is served, raises or ends the process."""
    outcomes = _depths(handler)
    allowed = {"102", "RecursionError", "HandlerError", "dies with a report", "spins"}
    assert set(outcomes.values()) <= allowed, outcomes
    assert list(outcomes.values()).count("spins") <= 1, outcomes
    assert outcomes[8] == outcomes[9] == outcomes[10] == outcomes[11] == "102", outcomes


@pytest.mark.parametrize("handler", ["inline", "loop"])
def test_in_the_very_last_frame_before_the_recursion_limit(handler: str) -> None:
    """An access in the last frame that Python allows ends, too.

    It does not: the callback's own frame cannot be created there, ctypes drops the
    RecursionError, and the access faults again for ever.  No pure Python cures that.
    """
    if "spins" in (outcomes := _depths(handler)).values():
        pytest.xfail(f"known: one depth spins ({outcomes})")


def test_the_debug_allocator_and_every_warning_agree() -> None:
    """With -X dev nothing is written where it must not be, and nothing is left open."""
    done = run(
        """
        import warnings
        warnings.simplefilter("error")

        async def main():
            async with LazyMemory(64 * PAGE, fill) as memory:
                for _ in range(3):
                    assert await asyncio.to_thread(lambda: bytes(memory.view)) == b"f" * 64 * PAGE
                    memory.evict()
            async with LazyMemory(64 * PAGE, fail) as memory:
                for _ in range(3):
                    try:
                        await asyncio.to_thread(lambda: bytes(memory.view))
                    except Exception as error:
                        assert isinstance(error.__cause__, LookupError)

        asyncio.run(main())
        """,
        "-X",
        "dev",
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert "ignored" not in done.stderr


def test_removing_what_was_never_added_changes_nothing() -> None:
    """A second close, or one after a failed open, is harmless."""

    class Nothing:
        start = end = 0

    sigbus.remove(Nothing())  # type: ignore[arg-type]
    assert not sigbus.targets()
    assert not sigbus.installed()
