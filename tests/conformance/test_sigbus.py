"""Feature SIGBUS: faults that become signals instead of messages, as uffd-unit-tests.c has them."""

from __future__ import annotations

import signal

from aiouffd import Forked, Userfaultfd
from tests.conformance.support import (
    ALL,
    EVENT_FORK,
    MISSING,
    SIGBUS,
    WP,
    WP_FEATURES,
    MakeMemory,
    page_bytes,
    read_everything,
    read_one,
    unit,
)
from tests.targets import Signal, Target


def touch_all(
    target: Target, uffd: Userfaultfd, first: int, last: int, *, protect: bool = False
) -> None:
    """Every page: one SIGBUS, filled after it, then its bytes; and one more for its first write."""
    for page in range(first, last):
        at = target.at(page)
        assert target.start_read(page).result() == Signal(signal.SIGBUS, 2, at)
        assert uffd.copy(at, page_bytes(target, page), protect=protect) == target.page_size
        assert target.start_read(page).result() == page + 1
        if protect:
            assert target.start_write(page, 9).result() == Signal(signal.SIGBUS, 2, at)
            uffd.unprotect(at, target.page_size)
        assert target.start_write(page, 9).result() == 9


def touch_in_parent_and_child(target: Target, uffd: Userfaultfd, *, protect: bool) -> None:
    half = target.pages // 2
    touch_all(target, uffd, 0, half, protect=protect)
    forking = target.start_fork()
    forked = read_one(uffd, Forked)
    with Userfaultfd.adopt(forked.fd) as childs:
        child = forking.result()
        assert isinstance(child, Target)
        child.ready.result()
        touch_all(child, childs, half, target.pages, protect=protect)
        assert read_everything(childs) == []
    assert read_everything(uffd) == []


@unit(
    "sigbus",
    "each missing page is exactly one SIGBUS, in parent and child; no message is ever read",
)
@ALL
def test_sigbus(kind: str, memory: MakeMemory) -> None:
    """With feature SIGBUS a missing page is a signal; filled after it, the retry goes through."""
    with memory(kind, features=SIGBUS | EVENT_FORK) as (target, uffd):
        touch_in_parent_and_child(target, uffd, protect=False)


@unit("sigbus-wp", "and a second SIGBUS for the write to a protected page, cleared by unprotect")
@ALL
def test_sigbus_wp(kind: str, memory: MakeMemory) -> None:
    """With feature SIGBUS a write to a protected page is a signal too."""
    features = SIGBUS | EVENT_FORK | WP_FEATURES
    with memory(kind, features=features, register=MISSING | WP) as (target, uffd):
        touch_in_parent_and_child(target, uffd, protect=True)
