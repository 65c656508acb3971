"""Images of CRIU: real ones, written ones, damaged ones."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiouffd.errors import ImageError, SourceError
from aiouffd.protocols.criu import images
from aiouffd.protocols.criu.images import (
    Core,
    Inventory,
    Pagemap,
    PagemapEntry,
    Task,
    Vma,
    pagemap_head,
    pagemap_record,
    parse_core,
    parse_inventory,
    parse_mm,
    parse_pagemap,
    parse_pstree,
    write_pagemap,
    write_record,
)
from aiouffd.protocols.criu.protobuf import write_bytes, write_number
from tests.protocols.criu import checkpoints
from tests.protocols.criu.checkpoints import PAGE, anonymous, lone_task, of_file

#: Made with CRIU 4.1.1 and 4.2.1 of a small program that has a thread, a child, and a grandchild
#: that is dead; 4.2.1-lazy by ``criu dump --lazy-pages``.  Its pages were not kept.
REAL = Path(__file__).parent / "real"

#: Where the program mapped 64 pages, and filled two of every four.
FILLED = 0x700000000000

#: By version: pid of the program, its thread, its child, its grandchild; size of its pages.
PIDS = {
    "4.1.1": (9069, 9072, 9073, 9074, 208896),
    "4.2.1": (8936, 8938, 8939, 8940, 204800),
    "4.2.1-lazy": (9017, 9021, 9022, 9023, 32768),
}


def real(version: str, name: str) -> bytes:
    """The bytes of a real image."""
    return (REAL / version / name).read_bytes()


@pytest.mark.parametrize("version", PIDS)
def test_real_trees(version: str) -> None:
    """Who descends from whom; of the dead one nothing but its parents is told."""
    first, thread, child, grandchild, _ = PIDS[version]
    tasks = parse_pstree(real(version, "pstree.img"))
    assert tasks[:2] == (
        Task(first, 0, first, first, (first, thread)),
        Task(child, first, first, first, (child,)),
    )
    assert [(task.pid, task.ppid) for task in tasks[2:]] == [(grandchild, child)]
    alive = Core("small", dead=False, stopped=False)
    assert parse_core(real(version, f"core-{first}.img"), "core") == alive
    assert parse_core(real(version, f"core-{child}.img"), "core") == alive
    dead = Core("small", dead=True, stopped=False)
    assert parse_core(real(version, f"core-{grandchild}.img"), "core") == dead


def test_a_real_thread_is_no_task() -> None:
    """The core of a thread that is not the first of its task says nothing of the task."""
    data = real("4.2.1", "core-8938.img")
    with pytest.raises(ImageError, match=r"core-8938.img at offset 12: it tells of a thread"):
        parse_core(data, "core-8938.img")


@pytest.mark.parametrize("version", PIDS)
def test_real_inventories(version: str) -> None:
    """Each run of CRIU names itself."""
    found = parse_inventory(real(version, "inventory.img"))
    assert found.version == 2
    assert len(found.run_id) == 36


@pytest.mark.parametrize("version", PIDS)
def test_real_mappings(version: str) -> None:
    """What is private and anonymous is restored lazily; vdso, vvar and files are not."""
    vmas = parse_mm(real(version, f"mm-{PIDS[version][0]}.img"), "mm")
    assert [vma.start for vma in vmas] == sorted(vma.start for vma in vmas)
    (mine,) = (vma for vma in vmas if vma.start == FILLED)
    assert (mine.length, mine.prot, mine.lazy) == (64 * PAGE, 3, True)
    kinds = {
        images.VMA_AREA_HEAP: True,
        images.VMA_AREA_VDSO: False,
        images.VMA_AREA_VVAR: False,
        images.VMA_FILE_PRIVATE: False,
    }
    for status, lazy in kinds.items():
        found = [vma for vma in vmas if vma.status & status]
        assert found, hex(status)
        assert {vma.lazy for vma in found} == {lazy}, hex(status)
    (stack,) = (vma for vma in vmas if vma.flags & 0x100)  # MAP_GROWSDOWN
    assert stack.lazy


@pytest.mark.parametrize("version", PIDS)
def test_real_pagemaps(version: str) -> None:
    """Both forms are read; what they tell of fits the file of pages."""
    lazy = version.endswith("lazy")
    pagemap = parse_pagemap(real(version, f"pagemap-{PIDS[version][0]}.img"), "pagemap")
    assert pagemap.stored == PIDS[version][4]
    filled = [entry for entry in pagemap.entries if FILLED <= entry.vaddr < FILLED + 64 * PAGE]
    assert filled == [
        PagemapEntry(FILLED + page * PAGE, 2, 2 if lazy else 6) for page in range(0, 64, 4)
    ]
    assert {entry.flags for entry in pagemap.entries} == ({2, 4} if lazy else {4, 6})


@pytest.mark.parametrize("version", PIDS)
@pytest.mark.parametrize("number", [0, 2])
def test_real_pagemaps_are_written_as_they_were(version: str, number: int) -> None:
    """Byte by byte: CRIU itself could not tell."""
    data = real(version, f"pagemap-{PIDS[version][number]}.img")
    wide = version != "4.1.1"
    assert write_pagemap(parse_pagemap(data, ""), wide=wide) == data
    assert write_pagemap(parse_pagemap(data, ""), wide=not wide) != data


# --- what is written -------------------------------------------------------------------


@st.composite
def pagemaps(draw: st.DrawFn) -> Pagemap:
    """Draw runs anywhere in an address space."""
    entries, at = [], 0
    for gap, pages, flags in draw(
        st.lists(st.tuples(st.integers(0, 1 << 36), st.integers(1, 1 << 33), st.integers(0, 7)))
    ):
        if at + gap + pages >= 1 << 52:
            break
        entries.append(PagemapEntry((at + gap) * PAGE, pages, flags))
        at += gap + pages
    return Pagemap(draw(st.integers(0, (1 << 32) - 1)), tuple(entries))


@given(pagemaps(), st.booleans())
def test_pagemaps_come_back(pagemap: Pagemap, wide: bool) -> None:
    """Written in either form and read, a pagemap is itself; older ones cannot count so far."""
    if not wide and any(entry.pages >> 32 for entry in pagemap.entries):
        with pytest.raises(ValueError, match=r"too long for CRIU 4\.1"):
            write_pagemap(pagemap, wide=wide)
        return
    data = write_pagemap(pagemap, wide=wide)
    assert parse_pagemap(data, "pagemap-1.img") == pagemap
    piecewise = pagemap_head(pagemap.pages_id) + b"".join(
        pagemap_record(entry, wide=wide) for entry in pagemap.entries
    )
    assert piecewise == data


def entry_of(*fields: tuple[int, int]) -> PagemapEntry:
    """Read a run that has just these fields."""
    message = b"".join(write_number(number, value) for number, value in fields)
    (entry,) = parse_pagemap(pagemap_head(1) + write_record(message), "pagemap-1.img").entries
    return entry


@pytest.mark.parametrize(
    "fields, pages, flags",
    [
        ([(1, PAGE), (2, 3), (4, 6)], 3, 6),  # as CRIU 4.1 writes it
        ([(1, PAGE), (2, 0), (4, 6), (5, 3)], 3, 6),  # as 4.2 does
        ([(1, PAGE), (2, 0), (4, 1), (5, 1 << 33)], 1 << 33, 1),
        ([(1, PAGE), (2, 3)], 3, 4),  # as 2.x did: present
        ([(1, PAGE), (2, 3), (3, 0)], 3, 4),
        ([(1, PAGE), (2, 3), (3, 1)], 3, 1),  # and in the parent
        ([(1, PAGE), (2, 3), (3, 1), (4, 2)], 3, 3),
        ([(1, PAGE), (2, 3), (4, 0)], 3, 0),
        ([(1, PAGE), (2, 3), (4, 4), (77, 1)], 3, 4),
    ],
)
def test_runs_of_all_times(fields: list[tuple[int, int]], pages: int, flags: int) -> None:
    """What each version of CRIU leaves out means what it meant."""
    assert entry_of(*fields) == PagemapEntry(PAGE, pages, flags)


def test_only_what_is_present_takes_room_in_the_file() -> None:
    """The offset in the file of pages goes on over PRESENT runs alone."""
    entries = [
        PagemapEntry(number * 100 * PAGE, 10, flags) for number, flags in enumerate(range(8))
    ]
    assert Pagemap(1, tuple(entries)).stored == 4 * 10 * PAGE


@pytest.mark.parametrize(
    "vma, lazy",
    [
        (anonymous(PAGE, 1), True),
        (anonymous(PAGE, 1, flags=0x22 | 0x100), True),  # grows down
        (anonymous(PAGE, 1, flags=0x22 | 0x2000), False),  # locked
        (anonymous(PAGE, 1, flags=0x22 | 0x40000), False),  # huge pages
        (anonymous(PAGE, 1, flags=0x21), False),  # shared
        (anonymous(PAGE, 1, flags=0x02), False),
        (of_file(PAGE, 1), False),
        (Vma(PAGE, 2 * PAGE, 0, 0, 5, 0x22, 0x1 | images.VMA_AREA_VDSO), False),
        (Vma(PAGE, 2 * PAGE, 0, 0, 1, 0x22, 0x1 | images.VMA_AREA_VVAR), False),
        (Vma(PAGE, 2 * PAGE, 0, 0, 1, 0x22, images.VMA_AREA_VSYSCALL), False),
        (Vma(PAGE, 2 * PAGE, 0, 0, 0, 0, images.VMA_AREA_GUARD), False),
    ],
)
def test_which_mappings_are_restored_lazily(vma: Vma, lazy: bool) -> None:
    """As CRIU's vma_entry_can_be_lazy has it."""
    assert vma.lazy == lazy
    assert parse_mm(checkpoints.mm([vma]), "mm") == (vma,)


def test_guards_lie_within_mappings() -> None:
    """CRIU 4.2 lists them behind the mappings, over which they lie."""
    guard = Vma(2 * PAGE, 3 * PAGE, 0, 0, 0, 0, images.VMA_AREA_GUARD)
    vmas = (anonymous(PAGE, 5), anonymous(9 * PAGE, 1), guard)
    assert parse_mm(checkpoints.mm(vmas), "mm") == vmas


def test_tasks_come_back() -> None:
    """A tree, and the states of its tasks."""
    tasks = (lone_task(5), lone_task(7, 5, name="é\n", dead=True), lone_task(6, 7))
    assert [
        (task.pid, task.ppid, task.threads) for task in parse_pstree(checkpoints.pstree(tasks))
    ] == [(5, 0, (5,)), (7, 5, (7,)), (6, 7, (6,))]
    assert parse_core(checkpoints.core(tasks[1]), "") == Core("é\n", dead=True, stopped=False)
    stopped = Task(1, 0, 1, 1, (1,), "t", stopped=True)
    assert parse_core(checkpoints.core(stopped), "") == Core("t", dead=False, stopped=True)


def test_inventories_without_a_name() -> None:
    """Older ones have none."""
    assert parse_inventory(checkpoints.inventory("")) == Inventory(2)


# --- what is damaged -------------------------------------------------------------------

Parse = Callable[[bytes, str], Any]

#: Every kind of image, with a good one.
KINDS: dict[str, tuple[Parse, bytes]] = {
    "inventory": (parse_inventory, real("4.2.1", "inventory.img")),
    "pstree": (parse_pstree, real("4.2.1", "pstree.img")),
    "core": (parse_core, real("4.2.1", "core-8936.img")),
    "mm": (parse_mm, real("4.2.1", "mm-8936.img")),
    "pagemap-4.1": (parse_pagemap, real("4.1.1", "pagemap-9069.img")),
    "pagemap-4.2": (parse_pagemap, real("4.2.1", "pagemap-8936.img")),
}


def refusal(parse: Parse, data: bytes) -> ImageError | None:
    """Read an image; say what was wrong with it, and check that this is said in full."""
    try:
        parse(data, "some.img")
    except ImageError as error:
        refused = error
    else:
        return None
    assert refused.file == "some.img"
    assert refused.offset is not None
    assert 0 <= refused.offset <= len(data)
    assert str(refused) == f"some.img at offset {refused.offset}: {refused.problem}"
    return refused


def head_of(kind: str) -> int:
    """How long the magic numbers are."""
    return 4 if kind == "inventory" else 8


def record_ends(data: bytes, at: int) -> set[int]:
    """Where an image may end and be whole."""
    ends = {at}
    while at < len(data):
        at += 4 + int.from_bytes(data[at : at + 4], "little")
        ends.add(at)
    return ends


@pytest.mark.parametrize("kind", KINDS)
def test_cut_short_anywhere(kind: str) -> None:
    """Cut within a record it is damaged, and the offset lies within what is left."""
    parse, data = KINDS[kind]
    ends = record_ends(data, head_of(kind))
    assert refusal(parse, data) is None
    for length in range(len(data)):
        assert refusal(parse, data[:length]) is not None or length in ends


@pytest.mark.parametrize("kind", KINDS)
def test_every_byte_another(kind: str) -> None:
    """Whatever is changed, it is read or refused, and nothing else happens."""
    parse, data = KINDS[kind]
    for at in range(len(data)):
        for change in (0x01, 0x80, 0xFF):
            damaged = bytearray(data)
            damaged[at] ^= change
            assert refusal(parse, bytes(damaged)) is not None or at >= head_of(kind)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.binary(max_size=300))
def test_random_bytes(kind: str, data: bytes) -> None:
    """Behind right magic numbers anything may come: it is read or refused."""
    parse, good = KINDS[kind]
    magic = good[: head_of(kind)]
    for damaged in (data, magic + data, magic + write_record(data)):
        refusal(parse, damaged)


@pytest.mark.parametrize("kind", KINDS)
def test_lengths_that_lie_cost_no_memory(kind: str) -> None:
    """A record, or a field in it, of four gigabytes is not made room for."""
    parse, good = KINDS[kind]
    magic = good[: head_of(kind)]
    field = write_record(b"\x0a\xff\xff\xff\xff\x0f")
    tracemalloc.start()
    try:
        for damaged in (magic + b"\xff\xff\xff\xff", magic + field):
            assert refusal(parse, damaged) is not None
        refusal(parse, good + b"\xff" * 4)  # of some the first record is all that counts
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def vma_image(*vmas: Vma) -> bytes:
    """An image of mappings, right or not."""
    return checkpoints.mm(vmas)


def pagemap_image(*entries: tuple[int, int, int]) -> bytes:
    """A pagemap, right or not."""
    return write_pagemap(Pagemap(1, tuple(PagemapEntry(*entry) for entry in entries)), wide=True)


@pytest.mark.parametrize(
    "parse, data, problem",
    [
        (parse_pstree, b"", "offset 0: it is cut short: its magic numbers are missing"),
        (parse_pstree, KINDS["mm"][1], "offset 4: 0x57492820 where 0x50273030 begins an image"),
        (parse_inventory, KINDS["mm"][1], "offset 0: 0x54564319 where 0x58313116"),
        (parse_mm, KINDS["inventory"][1], "offset 0: 0x58313116 where 0x54564319"),
        (parse_inventory, KINDS["inventory"][1][:4], "offset 4: there is no record in it"),
        (parse_mm, KINDS["mm"][1][:8], "offset 8: there is no record in it"),
        (parse_core, KINDS["core"][1][:8], "offset 8: there is no record in it"),
        (parse_pagemap, KINDS["pagemap-4.2"][1][:8], "offset 8: there is no record in it"),
        (parse_pstree, KINDS["pstree"][1][:8], "offset 8: there is no process in it"),
        (parse_inventory, checkpoints.inventory(version=1), "images of version 1, where 2 is read"),
        (parse_pstree, checkpoints.pstree([lone_task(0)]), "no process can have the id 0"),
        (parse_pstree, checkpoints.pstree([lone_task(5 << 20)]), "can have the id 5242880"),
        (parse_pstree, checkpoints.pstree([lone_task(5)] * 2), "process 5 is there twice"),
        (
            parse_pstree,
            checkpoints.pstree([lone_task(5), lone_task(6, 7)]),
            "process 6 has parent 7, which is not before it",
        ),
        (parse_pstree, checkpoints.pstree([lone_task(5, 5)]), "process 5 has parent 5"),
        (parse_mm, vma_image(Vma(PAGE + 1, 3 * PAGE, 0, 0, 3, 34, 513)), "borders of pages"),
        (parse_mm, vma_image(Vma(PAGE, PAGE, 0, 0, 3, 34, 513)), "mapping 0x1000-0x1000 is empty"),
        (parse_mm, vma_image(Vma(2 * PAGE, PAGE, 0, 0, 3, 34, 513)), "is empty"),
        (
            parse_mm,
            vma_image(anonymous(PAGE, 3), anonymous(2 * PAGE, 3)),
            "mapping 0x2000-0x5000 lies over the one before, which ends at 0x4000",
        ),
        (parse_pagemap, pagemap_image((PAGE + 1, 1, 4)), "a run at 0x1001, inside of a page"),
        (parse_pagemap, pagemap_image((PAGE, 0, 4)), "a run of 0 pages at 0x1000"),
        (parse_pagemap, pagemap_image((PAGE, 1 << 52, 4)), "a run of 4503599627370496 pages"),
        (
            parse_pagemap,
            pagemap_image((PAGE, 3, 4), (2 * PAGE, 1, 4)),
            "over the one before, up to",
        ),
        (parse_pagemap, pagemap_image((PAGE, 3, 1 << 32)), "flags 0x100000000"),
        (
            parse_pagemap,
            pagemap_head(1) + write_record(write_number(1, PAGE)),
            "without an address or a number of pages",
        ),
        (
            parse_pagemap,
            pagemap_head(1) + write_record(write_bytes(1, b"abc") + write_number(2, 1)),
            "without an address or a number of pages",
        ),
        (parse_pagemap, pagemap_head(1) + write_record(b"\x08"), "a number is cut off"),
        (parse_pagemap, pagemap_head(1 << 33), "more than 32 bits hold"),
    ],
)
def test_what_makes_no_sense_is_refused(parse: Parse, data: bytes, problem: str) -> None:
    """The error says what is wrong, and where."""
    with pytest.raises(ImageError, match=problem) as caught:
        parse(data, "some.img")
    assert caught.value.problem in str(caught.value)


def test_a_damaged_image_is_a_source_that_fails() -> None:
    """Who handles sources handles checkpoints, too."""
    assert issubclass(ImageError, SourceError)
    error = ImageError("pages-1.img", None, "it is gone")
    assert str(error) == "pages-1.img: it is gone"


@pytest.mark.parametrize("version", PIDS)
def test_who_wrote_a_pagemap_shows(version: str) -> None:
    """By the field that counts, if it has a run; what is damaged is said as ever."""
    data = real(version, f"pagemap-{PIDS[version][0]}.img")
    assert images.has_wide_counts(data, "") == (version != "4.1.1")
    assert images.has_wide_counts(pagemap_head(1), "") is None
    with pytest.raises(ImageError, match="a number is cut off"):
        images.has_wide_counts(pagemap_head(1) + write_record(b"\x08"), "some.img")
