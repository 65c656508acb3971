"""examples/races: each bug is found, each repair passes; run as their first lines say."""

from __future__ import annotations

import re

import pytest

import lost_push
from aiouffd.testing import Harness, RaceFound
from tests.examples.running import run_example


def numbers(lines: list[str]) -> dict[str, list[int]]:
    """What each line says, by its words before the colon."""
    named = dict(line.split(": ", 1) for line in lines)
    return {name: [int(each) for each in re.findall(r"\d+", said)] for name, said in named.items()}


def test_the_double_fetch_is_found_every_time() -> None:
    """With the harness each run overflows; by luck less than one of a thousand does."""
    said = numbers(run_example("races/double_fetch.py"))
    assert said["parse with the harness"] == [100, 100]
    assert said["parse_repaired with the harness"] == [0, 100]
    seen, runs = said["parse by luck"]
    assert runs >= 10_000
    assert seen < runs / 1000
    assert said["parse_repaired by luck"] == [0, runs]


def test_the_double_fetch_is_found_through_cffi() -> None:
    """The parser believes the length that came after its check; the repair fetches once."""
    assert run_example("races/with_cffi.py") == [
        "parse: payload of 64 bytes, length 255",
        "parse_repaired: payload of 64 bytes, length 16",
    ]


def test_the_lost_push_is_found_and_printed_as_a_test() -> None:
    """Exploring finds an order that loses a push; as a test it fails, and passes the repair."""
    with Harness() as uffd, pytest.raises(RaceFound, match="1 and 2 were pushed") as found:
        lost_push.test_no_push_is_lost(uffd, "ring.c")
    pasted = dict(vars(lost_push))
    exec(found.value.test, pasted)
    (test,) = (pasted[name] for name in pasted.keys() - vars(lost_push).keys())
    for _ in range(10):
        with Harness() as uffd, pytest.raises(AssertionError, match="1 and 2 were pushed"):
            test(uffd, "ring.c")
    with Harness() as uffd:
        test(uffd, "ring_repaired.c")


def test_no_order_loses_a_push_of_the_repaired_ring() -> None:
    """Exploring the repaired ring goes through every order with two preemptions or fewer."""
    said = run_example("races/lost_push.py")
    assert said[-1].startswith("ring_repaired.c: ")
    assert said[-1].endswith("every order with at most 2 preemptions")


@pytest.mark.root
def test_the_path_changes_under_the_kernels_hands() -> None:
    """The guest gets out while the kernel reads the path, and nowhere through the repair."""
    said = numbers(run_example("races/changed_path.py"))
    _, _, got_out, accesses = said["sandbox_open"]
    assert got_out == accesses == 1
    got_out, accesses, *kernels = said["sandbox_open_repaired"]
    assert got_out == 0
    assert accesses > 10  # a byte at a time
    assert kernels == [0, 0]  # it has a copy


def test_the_loop_stalls_until_the_access_gives_the_gil_back() -> None:
    """No heartbeat falls into a plain access, nor into one in a thread that keeps the GIL."""
    said = numbers(run_example("races/stalled_loop.py"))
    assert said["plainly"] == said["in_a_thread"] == [0]
    assert said["without_the_gil"][0] > 0


@pytest.mark.root
def test_short_transfers_are_what_the_manuals_say() -> None:
    """write and fread keep their word; what gzread has lost is what the page says."""
    said = run_example("races/short_transfers.py")
    assert said[1:7] == [
        "write: 16384, then -1 (Bad address)",
        "       16384 bytes are in the file",
        "fread: 16384, ferror 1 (Bad address)",
        "       the position is 16384",
        "gzread: -1 (Bad address)",
        "       16384 bytes are in the memory, the position is 8192",
    ]
    version = tuple(map(int, re.findall(r"\d+", said[0])))
    if version < (1, 3, 2):  # seen up to 1.3.1
        assert said[7] == "       cleared and read again, it goes on at byte 16384"
    assert said[8] == "       rewound to 8192 first, it goes on at byte 8192"
