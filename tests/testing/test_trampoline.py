"""Threads that stand in a page fault with the GIL, parked by a signal: each in a real child."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys

import pytest

from aiouffd.kernel import tracing
from tests.lazy_harness import run_script
from tests.testing.standing import PAGE, standing, until

#: Python warns of forks beside threads from 3.12 on; here they are the point.
FORKS = ("-W", "ignore::DeprecationWarning")


def wchan(pid: int) -> str:
    """Say in which kernel function a process's main thread waits."""
    with open(f"/proc/{pid}/task/{pid}/wchan", encoding="ascii") as file:
        return file.read()


def test_a_parked_thread_gives_the_gil_away() -> None:
    """A Python access that stands stops the porter; once parked it does not, and it ends right."""
    with standing("say(view[3 * PAGE + 7])") as child:
        offset, tid = child.fault()
        assert offset == 3 * PAGE + 7
        child.ask()
        child.interrupt(tid)
        # In this order: the porter could not take the GIL before.
        assert child.told() == tid
        assert child.said() == "here"
        child.fill(offset, 42)
        child.go(tid)
        assert child.said() == 42


def test_other_threads_tick_meanwhile() -> None:
    """While a worker is parked the main thread runs on."""
    script = """
        worker = threading.Thread(target=lambda: say(view[0]))
        worker.start()
        while not told:
            pass
        say([worker.native_id, list(trampoline.parked())])
        for ticks in range(100_000):
            pass
        say(ticks)
        worker.join()
        say(list(trampoline.parked()))
    """
    with standing(script) as child:
        _, tid = child.park()
        assert child.said() == [tid, [tid]]
        assert child.said() == 99_999
        child.fill(0, 1)
        child.go(tid)
        assert child.said() == 1
        assert child.said() == []


def test_threads_are_released_in_any_order(seed: int) -> None:
    """Twelve threads stand on pages of their own, and each goes when it is told to."""
    script = """
        def touch(page):
            say([page, view[page * PAGE]])
        threads = [threading.Thread(target=touch, args=(page,)) for page in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    """
    with standing(script) as child:
        parked = child.park_all(12)
        assert len({tid for _, tid in parked}) == 12
        random.Random(seed).shuffle(parked)
        for offset, tid in parked:
            child.fill(offset, 100 + offset // PAGE)
            child.go(tid)
            assert child.said() == [offset // PAGE, 100 + offset // PAGE]


def test_threads_on_one_page() -> None:
    """Several threads stand on the same page; the page comes once, each is told to go."""
    script = """
        def touch(offset):
            say(view[offset])
        threads = [threading.Thread(target=touch, args=(offset,)) for offset in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    """
    with standing(script) as child:
        parked = child.park_all(5)
        child.fill(0, 5)
        for _, tid in reversed(parked):
            child.go(tid)
            assert child.said() == 5


def test_thousands_of_rounds(seed: int) -> None:
    """Two threads are parked 3000 times, answered before or after, or sent back unanswered."""
    script = f"""
        done = threading.Lock()
        def touch(page):
            for _ in range(1500):
                value = view[page * PAGE + 5]
                with done:
                    say([page, value])
                mapping.madvise(mmap.MADV_DONTNEED, page * PAGE, PAGE)
        seed = {seed}
        threads = [threading.Thread(target=touch, args=(page,)) for page in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    """
    rng = random.Random(seed)
    with standing(script) as child:
        standing_now = dict(child.park_all(2))
        left = {5: 1500, PAGE + 5: 1500}
        while standing_now:
            offset = rng.choice(sorted(standing_now))
            tid = standing_now.pop(offset)
            way = rng.randrange(4)
            if way == 0:  # for nothing: the access runs again, and stands again
                child.go(tid)
                assert child.park() == (offset, tid)
            value = rng.randrange(256)
            child.fill(offset, value)
            child.go(tid)
            assert child.said() == [offset // PAGE, value]
            left[offset] -= 1
            if left[offset]:
                assert child.park() == (offset, tid)
                standing_now[offset] = tid
        assert left == {5: 0, PAGE + 5: 0}


def test_without_an_answer_the_access_stands_again() -> None:
    """A thread that was let go without its page can be parked as often as one likes."""
    with standing("say(view[9])") as child:
        offset, tid = child.park()
        for _ in range(50):
            child.go(tid)
            assert child.park() == (offset, tid)
        child.fill(offset, 6)
        child.go(tid)
        assert child.said() == 6


def test_a_thread_without_python_is_parked_too() -> None:
    """A thread that Python did not start has no GIL to give, and stands all the same."""
    script = """
        thread, result = ctypes.c_ulong(), ctypes.c_ulong()
        libc.pthread_create(ctypes.byref(thread), None, libc.strlen, ctypes.c_void_p(address))
        libc.pthread_join(thread, ctypes.byref(result))
        names = [thread.name for thread in threading.enumerate()]
        say([result.value, [name for name in names if "Dummy" in name]])
    """
    with standing(script) as child:
        offset, tid = child.park()
        child.fill(offset, 0)
        child.go(tid)
        assert child.said() == [0, []]


def test_go_for_nobody() -> None:
    """Who is not parked cannot be told to go, and nobody is parked where nothing stands."""
    done = run_script(
        """
from aiouffd.testing import trampoline
trampoline.install(print)
assert not trampoline.go(1)
assert trampoline.release_all() == 0
assert trampoline.parked() == ()
"""
    )
    assert done.returncode == 0, done.stderr


# --- signals ----------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["itself", "another process", "not to a thread"])
def test_signals_of_others_change_nothing(who: str) -> None:
    """Only the service parks threads, by tgkill: whoever else sends the signal is ignored."""
    script = """
        say(os.getpid())
        signal.raise_signal(number)
        os.kill(os.getpid(), number)
        count = libc.read(0, ctypes.create_string_buffer(1), 1)
        say([count, view[0], list(trampoline.parked())])
    """
    send = "import os, sys; os.kill(int(sys.argv[1]), int(sys.argv[2]))"
    with standing(script, stdin=subprocess.PIPE) as child:
        pid = child.said()
        until(lambda: "pipe" in wchan(pid))  # in C code that knows nothing of EINTR
        if who == "another process":
            subprocess.run([sys.executable, "-c", send, str(pid), str(child.number)], check=True)
        elif who == "not to a thread":
            os.kill(pid, child.number)
        child.finish_stdin()
        offset, tid = child.park()  # nothing was told before
        child.fill(offset, 1)
        child.go(tid)
        assert child.said() == [0, 1, []]


def test_two_installations_share_one_signal() -> None:
    """The second harness of a process gets the signal of the first, and it is a real-time one."""
    done = run_script(
        """
import signal
from aiouffd.testing import trampoline
first, second = trampoline.install(print), trampoline.install(repr)
assert first == second
assert signal.SIGRTMIN <= first <= signal.SIGRTMAX
signal.signal(first, signal.SIG_DFL)
third = trampoline.install(print)  # somebody took it away: another one
signal.signal(third, lambda *_: None)
assert trampoline.install(print) not in {third}
"""
    )
    assert done.returncode == 0, done.stderr


def test_signals_in_use_are_left_alone() -> None:
    """With one signal left it is taken by nobody but us; with none the error says so."""
    done = run_script(
        """
import signal
from aiouffd.errors import NotSupported
from aiouffd.testing import trampoline
numbers = range(signal.SIGRTMIN, signal.SIGRTMAX + 1)
for number in numbers:
    if number == 40:
        signal.pthread_sigmask(signal.SIG_BLOCK, {number})  # of no use to us
    elif number not in {36, 50}:
        signal.signal(number, signal.SIG_IGN)
assert trampoline.install(print) == 50
signal.signal(50, signal.SIG_IGN)
for attempt in trampoline.install, lambda _: trampoline.StackDump():
    try:
        attempt(print)
    except NotSupported as error:
        print(error)
"""
    )
    assert done.returncode == 0, done.stderr
    sentence = f"every real-time signal ({int(signal.SIGRTMIN)} to {int(signal.SIGRTMAX)}) has"
    assert done.stdout.count(sentence) == 2, done.stdout


def test_a_service_needs_a_way_to_be_told() -> None:
    """Naming a service before anything is installed is a mistake of the caller's."""
    done = run_script(
        """
from aiouffd.testing import trampoline
try:
    trampoline.set_service(1)
except RuntimeError as error:
    print(error)
"""
    )
    assert done.stdout == "install() comes before set_service()\n", done


# --- interruptions ----------------------------------------------------------------------


def test_ctrl_c_during_the_wait() -> None:
    """Ctrl-C asks the service to let go, and is raised once the access is done; only once."""
    script = """
        try:
            view[0] = 9
            sum(range(1000))
        except KeyboardInterrupt:
            say(["interrupted", view[0]])
        sum(range(1000))
        say(view[0])
    """
    with standing(script) as child:
        offset, tid = child.park()
        for _ in range(5):
            os.kill(child.pid, signal.SIGINT)
            assert child.told() == -tid
        child.fill(offset, 7)
        child.go(tid)
        assert child.said() == ["interrupted", 9]
        assert child.said() == 9


def test_ctrl_c_before_the_wait() -> None:
    """Ctrl-C while the thread still stands in the kernel comes at the callback's first step."""
    script = """
        try:
            view[0] = 9
            sum(range(1000))
        except KeyboardInterrupt:
            say(["interrupted", view[0]])
    """
    with standing(script) as child:
        offset, tid = child.fault()
        os.kill(child.pid, signal.SIGINT)
        assert child.fault() == (offset, tid)  # the handler of Python's has run, in C
        child.interrupt(tid)
        assert child.told() == -tid
        child.fill(offset, 7)
        child.go(tid)
        assert child.said() == ["interrupted", 9]


def test_ctrl_c_and_the_service_does_not_answer_the_fault() -> None:
    """Let go without its page the thread stands again, still interrupted, and says so at once."""
    script = """
        try:
            view[0] = 9
            sum(range(1000))
        except KeyboardInterrupt:
            say(["interrupted", view[0]])
    """
    with standing(script) as child:
        offset, tid = child.park()
        os.kill(child.pid, signal.SIGINT)
        assert child.told() == -tid
        for _ in range(20):
            child.go(tid)
            assert child.fault() == (offset, tid)
            while child.ready_fault():
                child.fault()  # the signal that brings the interrupt back makes a second one
            child.interrupt(tid)
            assert child.told() == -tid
        child.fill(offset, 7)
        child.go(tid)
        assert child.said() == ["interrupted", 9]


def test_a_signal_handler_that_raises_something_else() -> None:
    """What a handler of the test's own raises during the wait arrives as that very object."""
    script = """
        def handler(*_):
            global failure
            failure = LookupError("too late")
            raise failure
        signal.signal(signal.SIGALRM, handler)
        for page in range(3):
            try:
                view[page * PAGE] = 9
                sum(range(1000))
            except LookupError as error:
                say([error is failure, view[page * PAGE]])
    """
    with standing(script) as child:
        for _ in range(3):
            offset, tid = child.park()
            os.kill(child.pid, signal.SIGALRM)
            assert child.told() == -tid
            child.fill(offset, 7)
            child.go(tid)
            assert child.said() == [True, 9]


def test_an_interruption_of_a_wait_that_is_over() -> None:
    """Told to go and interrupted at once, a thread goes, says nothing more, and is interrupted."""
    script = """
        def handler(*_):
            say(trampoline.go(threading.get_native_id()))
            raise LookupError("too late")
        signal.signal(signal.SIGALRM, handler)
        try:
            view[0] = 9
            sum(range(1000))
        except LookupError:
            say(["interrupted", view[0]])
    """
    with standing(script) as child:
        offset, _ = child.park()
        child.fill(offset, 7)
        os.kill(child.pid, signal.SIGALRM)
        assert child.said() is True
        assert child.said() == ["interrupted", 9]


def test_a_signal_handler_that_returns() -> None:
    """A handler of the test's own that only looks ends nothing."""
    script = """
        signal.signal(signal.SIGALRM, lambda *_: say(list(trampoline.parked())))
        say(view[0])
    """
    with standing(script) as child:
        offset, tid = child.park()
        for _ in range(5):
            os.kill(child.pid, signal.SIGALRM)
            assert child.said() == [tid]
        child.fill(offset, 7)
        child.go(tid)
        assert child.said() == 7


def test_parking_nests() -> None:
    """A handler that runs in the wait touches memory too; the inner access ends first."""
    script = """
        signal.signal(signal.SIGALRM, lambda *_: say(["inner", view[PAGE]]))
        say(["outer", view[0]])
    """
    with standing(script) as child:
        outer, tid = child.park()
        os.kill(child.pid, signal.SIGALRM)
        inner, again = child.park()
        assert (inner, again) == (PAGE, tid)
        child.fill(outer, 1)
        child.fill(inner, 2)
        child.go(tid)
        assert child.said() == ["inner", 2]
        child.go(tid)
        assert child.said() == ["outer", 1]


def test_a_second_signal_waits_until_the_first_is_told(seed: int) -> None:
    """Of two signals to one thread the second parks it once more, at a point where it can."""
    script = """
        for page in range(16):
            say(view[page * PAGE])
            say(list(trampoline.parked()))
    """
    rng = random.Random(seed)
    with standing(script) as child:
        for page in range(16):
            offset, tid = child.fault()
            count = rng.randrange(2, 9)
            for _ in range(count):
                child.interrupt(tid)
            for number in range(count):
                assert child.told() == tid
                if number == count - 1:
                    child.fill(offset, page)
                child.go(tid)
            assert child.said() == page
            assert child.said() == []


def test_the_signal_is_let_through_once_the_callback_is_in_python() -> None:
    """Until then it is blocked, or a second one would run on top of half-done things."""
    script = """
        seen = []
        def blocked():
            return number in signal.pthread_sigmask(signal.SIG_BLOCK, ())
        class Services(dict):  # the first that the callback looks at
            def __contains__(self, pid):
                seen.append(blocked())
                return super().__contains__(pid)
        def tell_too(tid):
            seen.append(blocked())
            tell(tid)
        trampoline._services = Services()
        trampoline.set_service(os.getppid(), tell_too)
        view[0]
        say([seen[0], seen[-1], blocked()])
    """
    with standing(script) as child:
        offset, tid = child.park()
        child.fill(offset, 7)
        child.go(tid)
        assert child.said() == [True, False, False]


def test_errno_survives() -> None:
    """C code that was interrupted finds its errno again, whatever was done in the wait."""
    script = """
        def handler(*_):
            libc.close(-1)
            say([ctypes.get_errno(), view[PAGE]])
        signal.signal(signal.SIGALRM, handler)
        libc.strlen.argtypes = [ctypes.c_void_p]
        ctypes.set_errno(77)
        length = libc.strlen(address)
        say([ctypes.get_errno(), length])
    """
    with standing(script) as child:
        outer, tid = child.park()
        os.kill(child.pid, signal.SIGALRM)
        inner, _ = child.park()
        child.fill(inner, 2)
        child.go(tid)
        assert child.said() == [9, 2]
        child.fill(outer, 0)
        child.go(tid)
        assert child.said() == [77, 0]


# --- every wait ends --------------------------------------------------------------------


def test_a_wait_has_a_limit() -> None:
    """If nobody says go the access runs again at the limit, and stands again."""
    script = """
        trampoline.set_service(os.getppid(), tell, limit=0.02)
        say(view[0])
    """
    with standing(script) as child:
        offset, tid = child.park()
        assert child.park() == (offset, tid)
        assert child.fault() == (offset, tid)
        child.fill(offset, 3)
        assert child.said() == 3


def test_release_all_lets_everybody_go_and_nobody_in() -> None:
    """After it the service's signals change nothing: the access stands in the kernel again."""
    script = """
        threads = [threading.Thread(target=lambda page=page: view[page * PAGE]) for page in (0, 1)]
        for thread in threads:
            thread.start()
        assert sys.stdin.read() == ""
        released = trampoline.release_all(os.getppid())
        for thread in threads:
            thread.join()
        say([released, list(trampoline.parked())])
    """
    with standing(script, stdin=subprocess.PIPE) as child:
        parked = child.park_all(2)
        child.finish_stdin()
        seen: list[tuple[int, int]] = []
        while len(seen) < 4:
            offset, tid = child.fault()
            if (offset, tid) in seen:  # the signal came, and it stands in the kernel again
                child.fill(offset, 1)
            else:
                child.interrupt(tid)
            seen.append((offset, tid))
        assert sorted(seen) == sorted(parked * 2)
        assert child.said() == [2, []]


def test_all_are_released_while_one_comes() -> None:
    """A thread whose signal was under way when all were released does not wait."""
    script = """
        def getpid():  # what the callback asks for, between its look for the service and its wait
            trampoline.release_all()
            return os.getpid()
        trampoline._getpid = getpid
        say([view[0], list(trampoline.parked())])
    """
    with standing(script) as child:
        offset, tid = child.fault()
        child.interrupt(tid)
        assert child.fault() == (offset, tid)
        child.fill(offset, 4)
        assert child.said() == [4, []]


def test_the_service_dies_before_it_is_told() -> None:
    """A thread that cannot tell anybody does not wait."""
    script = """
        def tell(tid):
            raise BrokenPipeError(32, "nobody there")
        trampoline.set_service(os.getppid(), tell)
        say([view[0], list(trampoline.parked())])
    """
    with standing(script) as child:
        offset, tid = child.fault()
        child.interrupt(tid)
        assert child.fault() == (offset, tid)
        child.fill(offset, 4)
        assert child.said() == [4, []]


def test_each_service_is_told_in_its_own_way() -> None:
    """Two harnesses in one process do not hear of each other's threads, nor release them."""
    script = """
        def tell_other(tid):
            say(["other", tid])
            told.append(tid)
        trampoline.set_service(os.getppid(), tell_other)
        trampoline.set_service(1)
        threading.Thread(target=lambda: say(view[0])).start()
        while not told:
            pass
        say(trampoline.release_all(1))
    """
    with standing(script) as child:
        offset, tid = child.fault()
        child.interrupt(tid)
        assert child.said() == ["other", tid]
        assert child.said() == 0
        child.fill(offset, 1)
        child.go(tid)
        assert child.said() == 1


@pytest.mark.parametrize("how", ["os.fork", "ctypes.PyDLL(None).fork"])
def test_a_forked_child_does_not_wait(how: str) -> None:
    """In a child, made by Python or behind its back, the service's signal returns at once."""
    script = f"""
        r, w = os.pipe()
        pid = {how}()
        if pid == 0:
            control.send(b"s" + json.dumps([os.getpid(), threading.get_native_id()]).encode())
            os.read(r, 1)
            control.send(b"s" + json.dumps(list(trampoline.parked())).encode())
            os._exit(0)
        sys.stdin.read()
        os.write(w, b"x")
        os.waitpid(pid, 0)
    """
    with standing(script, *FORKS, stdin=subprocess.PIPE) as child:
        pid, tid = child.said()
        tracing.tgkill(pid, tid, child.number)
        child.finish_stdin()
        assert child.said() == []


def test_a_child_forked_in_the_wait_does_not_wait() -> None:
    """A signal handler forks while its thread is parked: the child's half of the wait ends."""
    script = """
        def handler(*_):
            pid = os.fork()
            if pid == 0:
                # the access that runs again finds a page here: nothing is registered in a child
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.signal(signal.SIGALRM, handler)
        home = os.getpid()
        value = view[0]
        if os.getpid() != home:
            say("child")
            os._exit(0)
        os.wait()
        say(value)
    """
    with standing(script, *FORKS) as child:
        offset, tid = child.park()
        os.kill(child.pid, signal.SIGALRM)
        assert child.said() == "child"
        child.fill(offset, 8)
        child.go(tid)
        assert child.said() == 8


@pytest.mark.parametrize("distance", range(8))
def test_near_the_recursion_limit(distance: int) -> None:
    """At the last depths before the limit a thread parks, or faults again until it may pass."""
    script = f"""
        import threading
        def frames():
            frame, count = sys._getframe(), 0
            while frame is not None:
                frame, count = frame.f_back, count + 1
            return count
        def descend(levels):
            if levels:
                return descend(levels - 1)
            value = view[0]
            return value
        def touch():
            levels = sys.getrecursionlimit() - frames() - {distance}
            try:
                result = descend(levels)
            except RecursionError:
                result = "RecursionError"
            say(result)
        sys.setrecursionlimit(300)
        sys.unraisablehook = lambda _: None
        thread = threading.Thread(target=touch)
        thread.start()
        thread.join()
        sys.stderr.close()
    """
    with standing(script, quiet=False) as child:
        offset, tid = child.fault()
        parked = False
        for _ in range(3):  # what the service has to do: a few times, then the thread passes
            child.interrupt(tid)
            parked = child.parked_or_fault() == tid
            if parked:
                break
        child.fill(offset, 5)
        if parked:
            child.go(tid)
        assert child.said() in {5, "RecursionError"}
        assert parked or distance < 5


# --- stacks -----------------------------------------------------------------------------


def test_stacks_of_a_process_that_stands() -> None:
    """While a thread holds the GIL in a fault, others can have the stacks of all threads."""
    script = """
        dump = trampoline.StackDump()
        say([dump.signal, dump.fd])
        def stuck():
            return view[0]
        def beside():
            sys.stdin.read()
        for function in beside, stuck:
            threads = threading.Thread(target=function)
            threads.start()
        threads.join()
        text = dump.text()
        dump.clear()
        empty = dump.text()
        signal.raise_signal(dump.signal)
        again = dump.text()
        dump.close()
        dump.close()
        say(["in stuck" in text, empty, "in stuck" in again, "in <module>" in again])
        say(again[:6])
    """
    with standing(script, stdin=subprocess.PIPE) as child:
        number, fd = child.said()
        assert number != child.number
        offset, tid = child.fault()
        with open(f"/proc/{child.pid}/fd/{fd}", "rb") as memory:

            def dumped() -> bytes:
                memory.seek(0)
                return memory.read()

            os.kill(child.pid, number)
            until(lambda: b"in stuck" in dumped() and b"in beside" in dumped())
        child.ask()
        child.interrupt(tid)  # the GIL was held all the time
        assert child.told() == tid
        assert child.said() == "here"
        child.fill(offset, 1)
        child.go(tid)
        assert child.said() == [True, "", False, True]
        assert child.said() == "Thread"
        child.finish_stdin()


def test_a_closed_stack_dump_leaves_nothing() -> None:
    """Its signal is free again, its memory closed; to use it further is an error."""
    done = run_script(
        """
import os
from aiouffd.errors import ClosedError
from aiouffd.testing import trampoline
before = os.listdir("/proc/self/fd")
with trampoline.StackDump() as dump, trampoline.StackDump() as other:
    assert dump.signal != other.signal
    assert dump.text() == ""
    with trampoline.StackDump() as third:
        pass
    with trampoline.StackDump() as fourth:
        assert fourth.signal == third.signal
assert os.listdir("/proc/self/fd") == before
for use in dump.text, dump.clear, lambda: dump.fd:
    try:
        use()
    except ClosedError as error:
        print(error)
""",
        "-X",
        "dev",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "this stack dump is closed\n" * 3
    assert not done.stderr


def test_a_lost_stack_dump_warns() -> None:
    """One that nobody closed says so when it is dropped."""
    done = run_script("from aiouffd.testing import trampoline; trampoline.StackDump()", "-X", "dev")
    assert "ResourceWarning: unclosed <aiouffd.testing.trampoline.StackDump" in done.stderr
