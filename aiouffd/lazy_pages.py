"""Which pages of lazy memory are there: what the page tables say, for us.

Knows: the pagemap's bits, and what they mean on private and on shared memory.
Must not know: how a page gets there or away.

Laws of this file:

* Nothing here touches the memory it asks about: no call can fault.
* The kernel is asked each time: the memory changes under every answer.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from typing import Final

from .errors import NotSupported
from .kernel import abi, pagemap
from .ranges import PAGE_SIZE

_PIECE: Final = 1 << 28  # bytes of memory looked up by one read of the classic pagemap
_THERE: Final = abi.PAGE_IS_PRESENT | abi.PAGE_IS_SWAPPED


class LazyPages:
    """A view of the page tables of this process.

    Sharing: any thread.
    """

    def __init__(self, fd: int, *, shared: bool) -> None:
        """Look through a pagemap.

        Args:
            fd: This process's pagemap; it stays the caller's.
            shared: The memory is shared memory.
        """
        self._fd: Final = fd
        self._shared: Final = shared
        self._scan_works = True

    def entry(self, address: int) -> int:
        """Read the pagemap's word of one page (PM_* bits)."""
        return int.from_bytes(os.pread(self._fd, 8, address // PAGE_SIZE * 8), sys.byteorder)

    def is_missing(self, entry: int) -> bool:
        """Say whether a pagemap word is that of a hole."""
        # On shared memory SWAP without PRESENT is a marker that outlived its page.
        return not entry & (abi.PM_PRESENT if self._shared else abi.PM_PRESENT | abi.PM_SWAP)

    def holes(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Find the runs of missing pages within a range, in order.

        On shared memory a page that the kernel has pushed out to swap counts as missing.

        Kernel: PAGEMAP_SCAN (6.7), else the classic pagemap.
        """
        mask = abi.PAGE_IS_PRESENT if self._shared else _THERE
        return self._runs(start, end, mask, mask, self.is_missing)

    def protected(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Find the runs of pages that are there and write-protected."""
        for at in range(start, end, _PIECE):
            yield from self._runs_by_entry(
                at, min(end, at + _PIECE), lambda entry: bool(entry & abi.PM_UFFD_WP)
            )

    def _runs(
        self, start: int, end: int, required: int, inverted: int, wanted: Callable[[int], bool]
    ) -> Iterator[tuple[int, int]]:
        if self._scan_works:
            try:
                for found in pagemap.regions(
                    self._fd, start, end, required=required, inverted=inverted
                ):
                    yield found.start, found.end
                return
            except NotSupported:
                self._scan_works = False
        for at in range(start, end, _PIECE):
            yield from self._runs_by_entry(at, min(end, at + _PIECE), wanted)

    def _runs_by_entry(
        self, start: int, end: int, wanted: Callable[[int], bool]
    ) -> Iterator[tuple[int, int]]:
        first: int | None = None
        address = start
        for entry in pagemap.entries(self._fd, start, end - start):
            if wanted(entry):
                if first is None:
                    first = address
            elif first is not None:
                yield first, address
                first = None
            address += PAGE_SIZE
        if first is not None:
            yield first, address
