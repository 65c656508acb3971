"""One registered range: who serves it, and how to fill it ahead of demand.

Knows: its place in the pager's books, its handler, its modes.
Must not know: how faults are read or dispatched.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from typing import TYPE_CHECKING

from .errors import refusal
from .failure import Action
from .filled_pages import FilledPages
from .kernel import abi, calls
from .kernel.buffers import PinnedBuffer
from .performer import PIECE_BYTES, Walk
from .ranges import Range, align_down, is_aligned
from .readiness import between_pieces
from .resolutions import Handler
from .uffd import Feature, Mode

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from .pager import Pager


class Region:
    """A range of a pager, made by Pager.register.

    Attributes:
        handler: Who answers its faults; may be assigned at any time, for faults from then on.
        start: Where it was registered; the target may have moved it since, see ``ranges``.
        length: In bytes, as registered.
        offset: Where it begins in its source, in bytes.
        page_size: Of its memory, in bytes.
        modes: Which faults are asked for.
        ioctls: The mask that UFFDIO_REGISTER gave; 0 if the peer registered.
        grows: The target may grow it with mremap; the new tail reads zero.
        filled: Which pages were filled, if anybody keeps that.
        filled_before: Those that were filled when the region was taken over from another
            process: what is missing of them was removed.
        name: For messages to people.
        number: Its place in the journal; below zero if that does not know it.

    Sharing: the loop's thread.
    """

    __slots__ = (
        "_pager",
        "_removals_told",
        "filled",
        "filled_before",
        "grows",
        "handler",
        "ioctls",
        "length",
        "modes",
        "name",
        "number",
        "offset",
        "page_size",
        "start",
    )

    def __init__(
        self,
        pager: Pager,
        where: Range,
        handler: Handler,
        *,
        modes: Mode,
        page_size: int,
        offset: int,
        name: str,
        grows: bool,
        ioctls: int,
    ) -> None:
        self._pager = pager
        self._removals_told = bool(pager.uffd.features & Feature.EVENT_REMOVE)
        self.start = where.start
        self.length = where.length
        self.handler = handler
        self.modes = modes
        self.page_size = page_size
        self.offset = offset
        self.name = name
        self.grows = grows
        self.ioctls = ioctls
        self.number = -1
        self.filled: FilledPages | None = None
        self.filled_before: FilledPages | None = None

    def __repr__(self) -> str:
        name = f" {self.name!r}" if self.name else ""
        return f"<Region{name} {Range(self.start, self.length)} {self.modes!r}>"

    def clone_for(self, pager: Pager) -> Region:
        """Make the same region for a forked child's pager."""
        clone = Region(
            pager,
            Range(self.start, self.length),
            self.handler,
            modes=self.modes,
            page_size=self.page_size,
            offset=self.offset,
            name=self.name,
            grows=self.grows,
            ioctls=self.ioctls,
        )
        clone.number = self.number
        clone.filled_before = self.filled_before
        return clone

    @property
    def filled_for_good(self) -> FilledPages | None:
        """Pages that need not be filled: they were, and what is removed since is told."""
        told = self.filled is not None and self._removals_told
        return self.filled if told else self.filled_before

    @property
    def ranges(self) -> list[tuple[Range, int]]:
        """Where it lies in the target now: addresses, each with its offset in the source."""
        return self._pager.space.ranges_of(self)

    def change(self, *, handler: Handler | None = None, modes: int | None = None) -> None:
        """Serve by another handler, or ask for other faults.

        Kernel: UFFDIO_REGISTER replaces the modes of a range, but ignores a subset of what
        is there: so write protection is dropped by unprotecting, and MISSING by
        UFFDIO_UNREGISTER, after which missing pages are zeros.

        Args:
            handler: For faults from now on; those in flight keep theirs.
            modes: The full set wanted.

        Raises:
            ResolutionRefused: The kernel refuses the modes on this memory.
        """
        if handler is not None:
            self.handler = handler
        if modes is None:
            return
        if not modes:
            raise ValueError("a range is registered for at least one mode; see drop()")
        uffd = self._pager.uffd
        fd = uffd.fileno()
        dropped = self.modes & ~modes
        for where, _ in self.ranges:
            if dropped & Mode.WP:
                done = calls.writeprotect(fd, where.start, where.length, 0)
                if done < 0:
                    raise refusal("UFFDIO_WRITEPROTECT", -done, where.start, where.length)
            if dropped & Mode.MISSING and not modes & ~self.modes:
                uffd.unregister(where.start, where.length)
            self.ioctls = uffd.register(where.start, where.length, modes)
            calls.wake(fd, where.start, where.length)
        self.modes = Mode(modes)

    async def drop(self, then: Action | None = None) -> None:
        """Stop serving: settle what is missing, unregister, wake.

        Args:
            then: What becomes of missing pages: Action.POISON, or ZERO, which is what the
                kernel does by itself.  None is the pager's ``on_close``; KILL, HANG and
                RAISE count as POISON here.

        Cancellation: the range stays registered and served; pages settled so far stay so.
        """
        action = self._pager.on_close if then is None else then
        if action is not Action.ZERO:
            await self._pager.poison(self)
        self._pager.forget(self)

    async def fill(
        self, offset: int, data: Buffer, *, protect: bool = False, piece: int = PIECE_BYTES
    ) -> int:
        """Install bytes ahead of demand, in pieces between which faults are served.

        Pages that the target removed stay removed; pages that are there stay as they are.

        Kernel: UFFDIO_COPY, since Linux 4.3.

        Args:
            offset: In the source, in bytes; whole pages.
            data: Any contiguous buffer, whole pages; held until done.
            protect: Leave the pages write-protected (needs Mode.WP).
            piece: Of so many bytes at a time: a fault that comes meanwhile waits for the piece.

        Returns:
            Bytes installed.

        Raises:
            ValueError: Not whole pages.
            TargetGone: The target is gone.
            LayoutChanging: The target's events went unread for the pager's deadline.
            ResolutionRefused: The kernel refused for a reason that time does not cure.
            ClosedError: The pager was closed meanwhile.

        Cancellation: pieces before the cancellation are installed.
        """
        mode = abi.UFFDIO_COPY_MODE_WP if protect else 0
        total = 0
        with PinnedBuffer(data) as pinned:
            end = offset + pinned.length
            if not (is_aligned(offset, self.page_size) and is_aligned(end, self.page_size)):
                raise ValueError(
                    f"{pinned.length} bytes at offset {offset:#x} are no whole pages of"
                    f" {self.page_size} bytes"
                )
            at = offset
            longest = max(align_down(piece, self.page_size), self.page_size)
            while at < end:
                length = min(longest, end - at)
                total += await self.fill_piece(at, length, pinned.address + at - offset, mode)
                at += length
                await between_pieces()
        return total

    async def fill_piece(self, offset: int, length: int, address: int, mode: int = 0) -> int:
        """Install one piece as ``fill`` does; the loop only turns if the layout is changing.

        Args:
            offset: In the source, in bytes; a whole page's.
            length: In bytes; whole pages.
            address: Where the bytes are, in this process; they stay there until it is done.  That
                there are as many, and in whole pages, is for the caller to know.
            mode: UFFDIO_COPY_MODE_WP, or 0.

        Returns:
            Bytes installed.

        Raises:
            TargetGone: As ``fill``.
            LayoutChanging: As ``fill``.
            ResolutionRefused: As ``fill``.
            ClosedError: As ``fill``.

        Cancellation: what was installed so far is there.
        """
        total, settled = self._fill_piece(offset, length, address - offset, mode)
        if settled:
            return total
        patience = self._pager.patience()
        while not settled:
            await patience.wait()
            done, settled = self._fill_piece(offset, length, address - offset, mode)
            total += done
        return total

    def _fill_piece(self, offset: int, length: int, source: int, mode: int) -> tuple[int, bool]:
        """Install one piece of the source, wherever it lies now.

        Returns:
            Bytes installed, and whether that is all.  If not, the layout is changing; what is
            there by then is stepped over by the next try.
        """
        pager = self._pager
        pager.check_serving()
        space, fd = pager.space, pager.uffd.fileno()
        hint = self.start - self.offset
        total = self._fill_untouched(offset, length, source, mode, hint)
        if total == length:
            return total, True
        for where in space.addresses(self, offset, length, hint):
            delta = space.delta(where.start)
            to_source = source + delta

            def fill(start: int, length: int, to_source: int = to_source) -> int:
                return calls.copy(fd, start, start + to_source, length, mode)

            # The removed set is asked right before the ioctl: removal beats filling.
            for run in self.fillable(where):
                walk = Walk(run, self.page_size, length)
                while walk:
                    at = walk.at
                    done = walk.step(fill, pager.uffd.wake)
                    if done > 0:
                        total += done
                        pager.counters.filled_bytes += done
                        if self.filled is not None:
                            self.filled.add_range(at + delta, done)
                    elif done == -errno.EAGAIN:
                        return total, False
                    elif done not in (-errno.EEXIST, -errno.ENOENT):
                        raise pager.refused("UFFDIO_COPY", done, at, run.end - at)
        return total, True

    def _fill_untouched(self, offset: int, length: int, source: int, mode: int, hint: int) -> int:
        """Install a piece with which nothing has happened yet, as nearly all are, in one call.

        Returns:
            Bytes installed; less than all is nobody's answer yet.
        """
        if not self.is_untouched(offset, length, hint):
            return 0
        pager = self._pager
        done = calls.copy(pager.uffd.fileno(), offset + hint, source + offset, length, mode)
        if done <= 0:
            return 0
        pager.counters.filled_bytes += done
        if self.filled is not None:
            self.filled.add_range(offset, done)
        return done

    def is_untouched(self, offset: int, length: int, hint: int) -> bool:
        """Say whether a stretch lies where it did at first, and was neither removed nor filled.

        Args:
            offset: In the source, in bytes.
            length: In bytes.
            hint: Address minus offset, where it did lie.
        """
        space, filled = self._pager.space, self.filled_for_good
        return (
            not space.removed
            and (filled is None or filled.has_none(offset, length))
            and space.lies_at(self, offset, length, hint)
        )

    def fillable(self, where: Range) -> Iterable[Range]:
        """Give the parts of a placed range that may be filled ahead of demand.

        Pages that the target removed may not; nor may those that were filled, where it is told
        what is removed: they are there, or were removed.
        """
        space = self._pager.space
        runs = space.removed.gaps(where) if space.removed else (where,)
        filled = self.filled_for_good
        if filled is None:
            return runs
        delta = space.delta(where.start)
        return [gap.moved(-delta) for run in runs for gap in filled.gaps(run.moved(delta))]
