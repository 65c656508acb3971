"""The mapping under lazy memory: what is there, and how it ends."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from aiouffd.errors import ClosedError, ResolutionRefused
from aiouffd.kernel import abi
from aiouffd.lazy_mapping import LazyMapping, as_bytes

PAGE = 4096


@pytest.fixture(params=[False, True], ids=["private", "shared"])
def mapping(request: pytest.FixtureRequest) -> Iterator[LazyMapping]:
    made = LazyMapping(
        16 * PAGE, shared=request.param, read_only=False, page_size=PAGE, write_protect=True
    )
    yield made
    made.unmap()
    made.close_fds()


@pytest.mark.parametrize("scan", [True, False], ids=["PAGEMAP_SCAN", "pagemap"])
def test_holes(mapping: LazyMapping, scan: bool) -> None:
    """Runs of missing pages are found, with and without the system call of Linux 6.7."""
    mapping.pages._scan_works = scan
    at = mapping.start
    assert list(mapping.pages.holes(at, mapping.end)) == [(at, mapping.end)]
    assert mapping.fill(at + PAGE, b"x" * (2 * PAGE)) == 2 * PAGE
    assert mapping.fill(at, b"y" * (4 * PAGE)) == 2 * PAGE, "what is there is stepped over"
    assert mapping.fill_zeros(at + 8 * PAGE, PAGE) == PAGE
    assert list(mapping.pages.holes(at, mapping.end)) == [
        (at + 4 * PAGE, at + 8 * PAGE),
        (at + 9 * PAGE, mapping.end),
    ]
    assert mapping.filled_bytes() == 5 * PAGE
    assert mapping.view[0:PAGE] == b"y" * PAGE
    assert mapping.view[PAGE : 2 * PAGE] == b"x" * PAGE
    mapping.drop(at, 3 * PAGE)
    assert next(mapping.pages.holes(at, at + 4 * PAGE)) == (at, at + 3 * PAGE)
    assert mapping.fill(at, b"z" * PAGE) == PAGE, "a dropped page can be filled again"


def test_an_old_kernel_is_noticed_once(
    mapping: LazyMapping, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without PAGEMAP_SCAN the classic pagemap is read from then on."""
    import errno

    from aiouffd.kernel import calls

    asked = []

    def unknown(*_: object) -> int:
        asked.append(1)
        raise OSError(errno.ENOTTY, "no such ioctl")

    monkeypatch.setattr(calls, "pagemap_scan", unknown)
    for _ in range(2):
        assert list(mapping.pages.holes(mapping.start, mapping.end)) == [
            (mapping.start, mapping.end)
        ]
    assert asked == [1]


def test_filled_pages_start_protected(mapping: LazyMapping) -> None:
    """With write_protect the first write to each page is reported; unprotecting ends that."""
    at = mapping.start
    mapping.fill(at, b"x" * (2 * PAGE))
    assert mapping.pages.entry(at) & abi.PM_UFFD_WP
    mapping.unprotect(at, PAGE)
    assert not mapping.pages.entry(at) & abi.PM_UFFD_WP
    assert list(mapping.pages.protected(at, mapping.end)) == [(at + PAGE, at + 2 * PAGE)]
    mapping.protect(at, PAGE)
    assert mapping.pages.entry(at) & abi.PM_UFFD_WP


def test_a_placeholder_is_planted_in_holes_only(mapping: LazyMapping) -> None:
    """It is a page of zeros, unprotected, and never replaces anything."""
    at = mapping.start
    assert mapping.plant(at)
    assert not mapping.plant(at)
    assert mapping.view[:PAGE] == bytes(PAGE)
    assert not mapping.pages.entry(at) & abi.PM_UFFD_WP


def test_poison_marks_every_hole(mapping: LazyMapping) -> None:
    """What is there stays readable; the holes are marked once."""
    mapping.fill(mapping.start + PAGE, b"x" * PAGE)
    assert mapping.poison() == 15 * PAGE
    assert mapping.view[PAGE] == ord("x")


def test_the_kernels_refusal_names_the_range(mapping: LazyMapping) -> None:
    """Every operation on pages raises when the range is no longer registered."""
    at = mapping.start + PAGE
    mapping._uffd.unregister(mapping.start, mapping.end - mapping.start)
    for call in (
        lambda: mapping.fill(at, b"x" * PAGE),
        lambda: mapping.plant(at),
        lambda: mapping.protect(at, PAGE),
        mapping.poison,
    ):
        with pytest.raises(ResolutionRefused) as refusal:
            call()
        assert refusal.value.start <= at


def test_nobody_loses_the_memory_he_has_a_view_of(mapping: LazyMapping) -> None:
    """Unmapping is refused while a view exists, and whoever holds the last one ends it."""
    view = mapping.view[:10]
    assert not mapping.unmap()
    mapping.fill(mapping.start, b"x" * PAGE)
    assert view == b"x" * 10
    ended = []
    mapping.let_go(lambda: ended.append(1))
    assert not ended
    with pytest.raises(ClosedError):
        mapping.view  # noqa: B018
    mapping.drop(mapping.start, PAGE)  # still there
    view.release()
    del view
    assert ended == [1]
    mapping.drop(mapping.start, PAGE)  # nothing, and no error
    mapping.let_go(lambda: ended.append(2))
    assert ended == [1, 2]


def test_as_bytes() -> None:
    """A bytes object is taken as it is, a buffer is copied, a number is none."""
    data = b"abc"
    assert as_bytes(data) is data
    assert as_bytes(bytearray(data)) == data
    assert as_bytes(memoryview(data)[::2]) == b"ac"
    with pytest.raises(TypeError):
        as_bytes(5)  # type: ignore[arg-type]


def test_what_was_filled_is_noted_without_taking_memory() -> None:
    """The note has a byte per page, and forgets whole ranges at once."""
    pages = 3 * PAGE
    made = LazyMapping(
        pages * PAGE, shared=False, read_only=False, page_size=PAGE, write_protect=False
    )
    try:
        for at in (0, 10, PAGE, 2 * PAGE + 5, pages - 1):
            made.fill(made.start + at * PAGE, bytes(PAGE))
            assert made.maybe_filled[at] == 1
        made.drop(made.start + 5 * PAGE, (pages - 6) * PAGE)
        assert [at for at, noted in enumerate(made.maybe_filled[:]) if noted] == [0, pages - 1]
        made.fill_zeros(made.start, 20 * PAGE)
        assert made.maybe_filled[:20] == b"\1" * 20
    finally:
        made.unmap()
        made.close_fds()
