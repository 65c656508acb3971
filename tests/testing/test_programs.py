"""Child programs on the real kernel: a C program maps a region and touches it."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest

from aiouffd import NotSupported
from aiouffd.testing import Freeze, FreezeTimeout, Harness, HarnessError, Region, waiting
from aiouffd.testing.programs import Program
from aiouffd.testing.watching import has_ended
from tests import unprivileged
from tests.native import build
from tests.targets import wait_until

PAGE = os.sysconf("SC_PAGE_SIZE")
CONTENTS = bytes(range(256)) * (2 * PAGE // 256)


@pytest.fixture(scope="module")
def mapper() -> str:
    """mapper.c, built."""
    return str(build(Path(__file__).with_name("mapper.c"), library=False))


@pytest.fixture
def uffd() -> Iterator[Harness]:
    """A harness."""
    with Harness(timeout=20) as harness:
        yield harness


@pytest.fixture
def region(uffd: Harness) -> Region:
    """Two pages of known bytes."""
    return uffd.region(2, contents=CONTENTS, name="packet")


def start(uffd: Harness, mapper: str, region: Region, *words: object) -> Program:
    """Have the C program do what some words say."""
    return uffd.program(
        [mapper, *map(str, words)],
        {"AIOUFFD_REGION": region},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def said(program: Program, told: bytes | None = None) -> list[str]:
    """Tell a program something, wait until it has ended well, and give what it has said."""
    output, _ = program.communicate(told, timeout=30)
    assert program.returncode == 0
    return output.decode().split()


THREADS = ("map", "threads", PAGE)
TOUCHING = ("load", "store", "threads", "write") + (("fork",) if os.geteuid() == 0 else ())


def ended_or_stopped(programs: list[Program], freeze: Freeze) -> bool:
    """Say whether something can be done: a thread stands, or there is nobody left to wait for."""
    return bool(freeze.frozen) or all(program.poll() is not None for program in programs)


def descriptors(process: int) -> int:
    """Give how many descriptors a process has."""
    return len(os.listdir(f"/proc/{process}/fd"))


# --- what a program touches ----------------------------------------------------------------


def test_a_program_stands_at_its_access(uffd: Harness, mapper: str, region: Region) -> None:
    """What is changed while a program stands before its access is what it finds."""
    with region.page(1).freeze("read") as freeze:
        program = start(uffd, mapper, region, "map", "load", 7, "load", PAGE + 7)
        frozen = freeze.wait()
        assert (frozen.process, frozen.thread) == (program.pid, program.pid)
        assert frozen.touch.offset == PAGE + 7
        assert frozen.held_by == "page"
        assert frozen.where.startswith("mapper+0x")
        assert program.mapped == (region,)
        region.poke(PAGE + 7, b"\xaa")
        frozen.release()
        assert said(program) == ["7", str(0xAA)]


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_the_nth_touch_of_a_program_stops(
    uffd: Harness, mapper: str, region: Region, nth: int
) -> None:
    """A program is stepped over the touches before the n-th, each of which it makes."""
    with region.page(0).freeze(nth=nth) as freeze:
        program = start(uffd, mapper, region, "map", *("load", 5) * 3)
        frozen = freeze.wait()
        assert frozen.touch.number == nth
        region.poke(5, b"\x01")
        frozen.release()
        assert said(program) == ["5"] * (nth - 1) + ["1"] * (4 - nth)


def test_a_program_finds_changed_slow_and_failing_memory(
    uffd: Harness, mapper: str, region: Region
) -> None:
    """Rules are about the region, whoever touches it."""
    with region.at(3).change(b"\x10", b"\xff"):
        assert said(start(uffd, mapper, region, "map", *("load", 3) * 3)) == ["16", "255", "255"]
    with region.page(1).slow(0.001):
        assert said(start(uffd, mapper, region, "map", "load", PAGE)) == ["0"]
    with region.page(1).fail():
        program = start(uffd, mapper, region, "map", "load", 4, "load", PAGE)
        assert program.communicate(timeout=30)[0] == b"4\n"
        assert program.returncode == -signal.SIGBUS
    outcomes = [touch.outcome for touch in uffd.touches()]
    assert outcomes == ["changed"] * 2 + ["delayed", "passed", "failed"]


def test_a_program_is_recorded(uffd: Harness, mapper: str, region: Region) -> None:
    """What a program stores is in the region, and its touches are in the record."""
    with uffd.record(every=True) as record:
        said(start(uffd, mapper, region, "map", "load", 1, "store", 1, "load", 1))
    assert region.peek(0, 3) == b"\x00\x63\x02"
    assert [touch.access.value for touch in record] == ["read", "write", "read"]


@pytest.mark.root
def test_a_system_call_of_a_program_stands(uffd: Harness, mapper: str, region: Region) -> None:
    """A write(2) of a program stands in the kernel, and writes what is changed meanwhile."""
    with region.page(1).freeze() as freeze:
        program = start(uffd, mapper, region, "map", "write", PAGE)
        frozen = freeze.wait()
        assert frozen.touch.system_call is not None
        region.poke(PAGE, b"!")
        frozen.release()
        assert said(program) == ["!", "1"]


def test_two_programs_and_the_test_on_one_page(
    uffd: Harness, mapper: str, region: Region, seed: int
) -> None:
    """Each of them has a touch of its own, and they go on in any order, one at a time."""
    print(f"seed {seed}")
    order = random.Random(seed)
    view = region.view
    for _ in range(5):
        with region.page(1).freeze() as freeze:
            programs = [start(uffd, mapper, region, "map", "load", PAGE + n) for n in (1, 2)]
            mine = uffd.start(view.__getitem__, PAGE + 3)
            standing = {each.process: each for each in (freeze.wait() for _ in range(3))}
            assert set(standing) == {programs[0].pid, programs[1].pid, os.getpid()}
            left = [*standing]
            order.shuffle(left)
            while left:
                chosen = left.pop()
                standing[chosen].release()
                if chosen == os.getpid():
                    assert mine.result() == 3
                else:
                    number = [each.pid for each in programs].index(chosen)
                    assert said(programs[number]) == [str(number + 1)]
                assert not any(each.poll() is not None for each in programs if each.pid in left)
                assert not (os.getpid() in left and mine.done)
    view.release()


def test_threads_of_a_program_stand_one_by_one(
    uffd: Harness, mapper: str, region: Region, seed: int
) -> None:
    """Threads of one program at one place are let go in any order."""
    print(f"seed {seed}")
    with region.page(1).freeze() as freeze:
        program = start(uffd, mapper, region, "map", "threads", PAGE + 9)
        standing = [freeze.wait() for _ in range(3)]
        assert {frozen.process for frozen in standing} == {program.pid}
        assert len({frozen.thread for frozen in standing}) == 3
        random.Random(seed).shuffle(standing)
        for frozen in standing:
            frozen.release()
        assert said(program) == ["27"]


def test_reports_name_programs(uffd: Harness, mapper: str, region: Region) -> None:
    """Who stands in a program is called as the program, and so is who is waited for."""
    with region.page(1).freeze() as freeze, start(uffd, mapper, region, *THREADS) as program:
        waiter = uffd.start_named("waiter", program.wait)
        frozen = [freeze.wait() for _ in range(3)]
        told = waiting.lines(uffd)
        assert sum(line.startswith("mapper (tid ") for line in told) == 3
        assert any(f"waits for the end of mapper (pid {program.pid})" in line for line in told)
        for each in frozen:
            each.release()
        assert waiter.result() == 0


@pytest.mark.root
def test_a_child_of_a_program_is_watched(uffd: Harness, mapper: str, region: Region) -> None:
    """What a program forks inherits the region, and stands as itself."""
    with region.page(1).freeze() as freeze:
        program = start(uffd, mapper, region, "map", "load", 1, "fork", PAGE + 5)
        frozen = freeze.wait()
        assert frozen.process not in (program.pid, os.getpid())
        region.poke(PAGE + 5, b"\x2a")
        frozen.release()
        assert said(program) == ["1", "42"]


def test_without_privilege_a_child_of_a_program_has_no_region(mapper: str) -> None:
    """Where forks cannot be watched the child does not get the memory, so it reads no zeros."""
    with Harness(user_mode_only=True) as uffd:
        region = uffd.region(2, contents=CONTENTS)
        words = ("nobody", "map") if os.geteuid() == 0 else ("map",)
        program = start(uffd, mapper, region, *words, "load", 1, "fork", 2)
        assert said(program) == ["1", str(-signal.SIGSEGV)]


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_a_program_with_a_sanitizer_is_watched(
    uffd: Harness, region: Region, sanitizer: str
) -> None:
    """Sanitizers stand before mmap themselves; both are heard."""
    source = Path(__file__).with_name("mapper.c")
    program = str(build(source, library=False, sanitizer=sanitizer))
    with region.page(1).freeze() as freeze:
        started = start(uffd, program, region, "map", "load", PAGE + 7)
        freeze.wait().release()
        assert said(started) == ["7"]


# --- what a program does with its mapping --------------------------------------------------


def test_a_program_that_maps_nothing_is_as_it_was(uffd: Harness, region: Region) -> None:
    """A program that does not map a region has no descriptor more than without the harness."""
    command = ["/bin/ls", "/proc/self/fd"]
    alone = subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL)
    program = uffd.program(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert program.communicate() == (alone.stdout, b"")
    assert program.mapped == ()


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(("map-filled",), id="populated"),
        pytest.param(("map-path",), id="opened by its path"),
        pytest.param(("map", "unmap", "map"), id="mapped anew"),
        pytest.param(("map", "exec", "map"), id="run anew"),
        pytest.param(("close-all", "map"), id="without other descriptors"),
        pytest.param(("map", "close-all", "move"), id="moved"),
        pytest.param(("map", "load", PAGE + 1, "move"), id="moved when present"),
        pytest.param(("map-page", "grow"), id="grown"),
        pytest.param(("map", "map"), id="mapped twice"),
    ],
)
def test_no_mapping_is_missed(
    uffd: Harness, mapper: str, region: Region, words: tuple[object, ...]
) -> None:
    """However a program comes to its mapping, its touches stand there."""
    program = start(uffd, mapper, region, *words, "wait", "load", PAGE + 7, "store", 3)
    before = len(words) // 3 if "load" in words else 0
    wait_until(lambda: program.mapped, "a mapping")
    wait_until(lambda: uffd.touch_count() == before, "the touches before")
    with region.all.freeze(every=True) as freeze:
        assert program.stdin is not None
        program.stdin.write(b"!")
        program.stdin.flush()
        reading = freeze.wait()
        assert (reading.touch.offset, reading.touch.access.value) == (PAGE + 7, "read")
        region.poke(PAGE + 7, b"\x01")
        reading.release()
        writing = freeze.wait()
        assert (writing.touch.offset, writing.touch.access.value) == (3, "write")
        writing.release()
        assert said(program)[-1] == "1"
    assert region.peek(3, 1) == b"\x63"


def test_mappings_that_are_gone_are_forgotten(uffd: Harness, mapper: str, region: Region) -> None:
    """The helper keeps no descriptor of what a program has unmapped, nor of one that has ended."""
    said(start(uffd, mapper, region, "map"))
    wait_until(lambda: uffd.touch_count() == 0, "its end")
    before = descriptors(uffd.service_pid)
    program = start(uffd, mapper, region, *("map", "unmap") * 100, "map", "wait")
    wait_until(lambda: len(program._known()[1]) == 101, "the last mapping")
    assert descriptors(uffd.service_pid) <= before + 3
    said(program, b"!")
    wait_until(lambda: descriptors(uffd.service_pid) <= before, "the helper to forget")


def test_a_private_mapping_is_refused(uffd: Harness, mapper: str, region: Region) -> None:
    """What cannot be watched is not mapped; the program gets an error, and so does the test."""
    program = start(uffd, mapper, region, "map-private")
    assert program.stdout is not None
    assert program.stdout.read() == b"errno %d\n" % errno.ENOTSUP
    with pytest.raises(HarnessError, match="could not map region 'packet': MAP_PRIVATE"):
        program.wait()
    program.wait()  # it is said once
    program.end()


def test_a_region_that_was_closed_is_ordinary_memory(
    uffd: Harness, mapper: str, region: Region
) -> None:
    """A program that has a region or maps it when it is closed finds all bytes, unwatched."""
    program = start(
        uffd, mapper, region, "map", "load", 1, "wait", "load", PAGE + 2, "map", "load", 3
    )
    assert program.stdout is not None
    assert program.stdout.readline() == b"1\n"
    region.close()
    assert program.communicate(b"!")[0] == b"2\n3\n"
    assert uffd.touch_count() == 1


def test_huge_pages(uffd: Harness, mapper: str, huge_pages: Callable[[int], None]) -> None:
    """A region of huge pages is watched in a program too."""
    huge_pages(2)
    region = uffd.region(2, contents=b"huge", memory="hugetlb")
    with region.page(0).freeze() as freeze:
        program = start(uffd, mapper, region, "map", "load", 1)
        frozen = freeze.wait()
        assert frozen.touch.offset == 1
        frozen.release()
        assert said(program) == [str(ord("u"))]


# --- what cannot be watched ----------------------------------------------------------------


def test_a_program_that_touches_nothing(uffd: Harness, region: Region) -> None:
    """A wait for a program that never maps the region says so, and what may be the reason."""
    with region.page(0).freeze() as freeze:
        program = uffd.program(["true"], {"AIOUFFD_REGION": region})
        assert program.wait() == 0
        with pytest.raises(FreezeTimeout) as caught:
            freeze.wait(timeout=0)
    assert f"true (pid {program.pid}) has ended with status 0" in str(caught.value)
    assert "it never mapped region 'packet'" in str(caught.value)


@pytest.fixture
def static(tmp_path: Path) -> Path:
    """A program without a dynamic loader."""
    source, program = tmp_path / "static.c", tmp_path / "static"
    source.write_text("int main(void) { return 0; }")
    done = subprocess.run(
        ["cc", "-static", "-o", program, source], check=False, capture_output=True
    )
    if done.returncode:
        pytest.skip("no static C library: apt install libc6-dev")
    return program


def test_a_static_program_is_refused(uffd: Harness, region: Region, static: Path) -> None:
    """A program that loads no library is refused before it starts."""
    with pytest.raises(NotSupported, match="linked statically"):
        uffd.program([static], {"AIOUFFD_REGION": region})


def test_a_static_program_behind_another_is_found_out(
    uffd: Harness, region: Region, static: Path
) -> None:
    """A program that ran without the harness is an error when it has ended."""
    script = static.with_name("script")
    script.write_text(f"#!{static}\n")
    script.chmod(0o755)
    with pytest.raises(HarnessError, match="ran without the harness"):
        uffd.program([script], {"AIOUFFD_REGION": region}).wait()


@pytest.mark.root
def test_a_setuid_program_is_refused(
    uffd: Harness, region: Region, mapper: str, tmp_path: Path
) -> None:
    """A program that runs with other rights loads no library, so it is refused."""
    program = Path(shutil.copy(mapper, tmp_path))
    os.chown(program, 65534, 65534)
    program.chmod(0o755 | stat.S_ISUID)
    with pytest.raises(NotSupported, match="setuid"):
        uffd.program([program], {"AIOUFFD_REGION": region})


@pytest.mark.parametrize("memory", ["anon", "shmem-private"])
def test_memory_that_is_not_shared_is_refused(uffd: Harness, memory: str) -> None:
    """Only memory that a descriptor stands for can be given to a program."""
    region = uffd.region(1, memory=memory)
    with pytest.raises(ValueError, match="cannot be given"):
        uffd.program(["true"], {"AIOUFFD_REGION": region})


def test_a_program_is_no_thread(uffd: Harness, mapper: str, region: Region) -> None:
    """Who asks for a program's touches only is told what can be had."""
    program = start(uffd, mapper, region, "wait")
    with pytest.raises(TypeError, match=r"not <Program 'mapper'.*a region that only this program"):
        region.page(0).slow(0, thread=cast("Any", program))
    with region.page(0).freeze(thread=program.pid) as freeze:
        other = start(uffd, mapper, region, "map", "load", 5)
        assert said(other) == ["5"]
        assert freeze.frozen == ()
    said(program, b"!")


def test_a_region_of_another_harness_is_refused(uffd: Harness, region: Region) -> None:
    """A harness watches its own regions only."""
    with Harness() as other, pytest.raises(ValueError, match="another harness"):
        other.program(["true"], {"AIOUFFD_REGION": region})


# --- ends ----------------------------------------------------------------------------------


def test_a_program_that_is_killed_stands_no_more(
    uffd: Harness, mapper: str, region: Region
) -> None:
    """A program can be killed where it stands, and nobody waits for it any more."""
    with (
        region.page(0).freeze() as freeze,
        start(uffd, mapper, region, "map", "load", 1) as program,
    ):
        frozen = freeze.wait()
        program.kill()
        assert program.wait() == -signal.SIGKILL
        wait_until(lambda: frozen.released, "the end of its touch")
        assert freeze.frozen == ()


def test_a_program_that_is_killed_in_a_signal_handler(
    uffd: Harness, mapper: str, region: Region
) -> None:
    """A touch of a signal handler stands upon that which it interrupts; both end."""
    with region.all.freeze() as freeze:
        program = start(uffd, mapper, region, "map", "handler", 5, "load", PAGE)
        outer = freeze.wait()
        program.send_signal(signal.SIGUSR1)
        inner = freeze.wait()
        assert (outer.touch.offset, inner.touch.offset) == (PAGE, 5)
        program.kill()
        program.communicate()
        wait_until(lambda: outer.released and inner.released, "the end of both")


def test_a_program_that_becomes_another_stands_no_more(
    uffd: Harness, mapper: str, region: Region
) -> None:
    """exec ends the other threads of a program, those that stand too."""
    with region.page(1).freeze() as freeze:
        program = start(uffd, mapper, region, "map", "behind", PAGE, "wait", "exec", "wait")
        frozen = freeze.wait()
        assert program.stdin is not None
        program.stdin.write(b"!")
        program.stdin.flush()
        wait_until(lambda: frozen.released, "the end of its touch")
        assert program.processes() == {program.pid}
        assert said(program, b"!") == []


def test_a_program_that_stands_at_the_end_is_an_error(mapper: str) -> None:
    """A harness that is closed over a standing program kills it and says so."""
    with pytest.raises(HarnessError, match=r"still stood at packet\[0\]"), Harness() as uffd:
        region = uffd.region(1, name="packet")
        region.page(0).slow(10)
        program = start(uffd, mapper, region, "map", "load", 1)
        wait_until(uffd.standing, "the program")
    assert program.returncode == -signal.SIGKILL


def test_a_program_that_runs_at_the_end_is_killed(mapper: str) -> None:
    """A harness leaves no program behind."""
    with Harness() as uffd:
        program = start(uffd, mapper, uffd.region(1), "map", "wait")
        assert repr(program) == f"<Program 'mapper' pid={program.pid} runs>"
    assert program.returncode == -signal.SIGKILL


def test_what_a_program_leaves_behind_is_killed(mapper: str) -> None:
    """A daemon that a program has started ends with the harness."""
    with Harness() as uffd:
        script = f"setsid sleep 1000 > /dev/null 2>&1 & echo $!; exec {mapper} map"
        region = uffd.region(1)
        program = uffd.program(
            ["sh", "-c", script], {"AIOUFFD_REGION": region}, stdout=subprocess.PIPE
        )
        (left,) = map(int, said(program))
        assert program.mapped == (region,)
        assert not has_ended(left, left)
    wait_until(lambda: has_ended(left, left), "its end")


def test_a_wait_has_a_limit(uffd: Harness, mapper: str, region: Region) -> None:
    """A wait for a program that runs on ends after its time, and can be had again."""
    program = start(uffd, mapper, region, "map", "wait")
    with pytest.raises(subprocess.TimeoutExpired):
        program.wait(timeout=0)
    assert said(program, b"!") == []
    assert program.wait(timeout=0) == 0


def test_a_block_that_raises_kills_its_program(uffd: Harness, mapper: str, region: Region) -> None:
    """A program does not outlive the block of a test that has failed."""
    with pytest.raises(KeyError), start(uffd, mapper, region, "map", "wait") as program:
        raise KeyError
    assert program.returncode == -signal.SIGKILL


def test_programs_go_on_without_the_helper(mapper: str) -> None:
    """When the helper has died a program runs on, but maps no region any more."""
    uffd = Harness()
    region = uffd.region(1)
    with contextlib.suppress(HarnessError), region.page(0).freeze() as freeze:
        program = start(uffd, mapper, region, "map", "load", 1, "map")
        freeze.wait()
        os.kill(uffd.service_pid, signal.SIGKILL)
        assert program.stdout is not None
        assert program.stdout.readline() == b"0\n"
        assert program.stdout.readline().startswith(b"errno ")
        with pytest.raises(HarnessError, match="has ended"):
            freeze.wait(timeout=5)
    uffd.close()
    program.end()


def test_the_helper_outlives_programs_that_are_killed_anywhere(
    uffd: Harness, mapper: str, seed: int
) -> None:
    """Programs fork, unmap, move and are killed while others are stepped; nobody is left over."""
    print(f"seed {seed}")
    choose = random.Random(seed)
    regions = [uffd.region(2, contents=CONTENTS) for _ in range(2)]
    before = descriptors(uffd.service_pid)

    def words(page: int) -> list[object]:
        """Give some things to do at a page."""
        found: list[object] = ["map"]
        for _ in range(choose.randint(1, 6)):
            at = page * PAGE + choose.randrange(256)
            kinds = (("unmap", "map"), ("move",), *((word, at) for word in TOUCHING))
            found += choose.choice(kinds)
        return found

    for _ in range(15):
        region = choose.choice(regions)
        page = choose.choice(region.pages)
        every = choose.random() < 0.3
        with page.freeze(nth=choose.choice((1, 1, 2, 3)), every=every) as freeze:
            programs = [
                start(uffd, mapper, region, *words(page.number))
                for _ in range(choose.randint(1, 4))
            ]
            wait_until(partial(ended_or_stopped, programs, freeze), "programs")
            for _ in range(10):
                for frozen in freeze.frozen:
                    if choose.random() < 0.15:
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(frozen.process, signal.SIGKILL)
                    else:
                        frozen.release()
        for program in programs:
            program.communicate(timeout=20)
            assert program.returncode in (0, -signal.SIGKILL)
    wait_until(lambda: descriptors(uffd.service_pid) <= before + 6, "the helper to forget")


# --- users ---------------------------------------------------------------------------------


@pytest.mark.root
def test_a_program_of_another_user(uffd: Harness, region: Region, mapper: str) -> None:
    """A program that runs as another user, or becomes one, is watched."""
    program = start(uffd, mapper, region, "nobody", "map", "wait", "load", PAGE + 1)
    wait_until(lambda: program.mapped, "a mapping")
    with region.page(1).freeze() as freeze:
        assert program.stdin is not None
        program.stdin.write(b"!")
        program.stdin.flush()
        freeze.wait().release()
        assert said(program) == ["1"]


UNPRIVILEGED = """
import subprocess, sys
from aiouffd.testing import Harness
with Harness(timeout=20) as uffd:
    region = uffd.region(2, contents=bytes(range(256)), name="packet")
    with region.page(0).freeze(nth=2) as freeze:
        program = uffd.program(
            [sys.argv[1], "map", "load", "5", "load", "5"],
            {"AIOUFFD_REGION": region},
            stdout=subprocess.PIPE,
        )
        frozen = freeze.wait()
        assert frozen.process == program.pid
        region.poke(5, b"!")
        frozen.release()
        print(program.communicate()[0])
    print(*uffd.limits, sep="\\n")
"""


@pytest.mark.root
def test_without_privilege(mapper: str) -> None:
    """A user without rights freezes the second access of a program of theirs."""
    assert unprivileged.run(UNPRIVILEGED, mapper).startswith("b'5\\n33\\n'\n")
