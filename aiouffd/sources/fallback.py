"""A source that is asked again when it fails, and a second one behind it.

Knows: errors of reads, time limits, which of the two sources answers now.
Must not know: what the sources are; page faults, whose failure policy comes after this.

Laws of this file:

* Whatever a source raises is a failure and is retried, but for ClosedError, and for a read
  that lies outside: those no retry cures.
* When the first source has failed a read for good, the second one answers.  Now and then the
  first is asked for a page again, for nobody: no read waits to find out that it still hangs.
* A change of state is logged once, not once per page.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ..errors import ClosedError, SourceError
from . import Source, check_read, identity_of
from .reads import ReadsUnderWay

if TYPE_CHECKING:
    from typing_extensions import Buffer

log: Final = logging.getLogger("aiouffd.sources")

#: Seconds for which a first source that failed is not asked, as long as there is a second.
LEFT_ALONE: Final = 5.0

_PROBE_BYTES: Final = 4096
_MAX_DELAY: Final = 5.0  # seconds between two tries


@dataclass(slots=True)
class FallbackFigures:
    """What became of reads that did not work at once.

    Attributes:
        retries: Tries after a first one.
        timeouts: Tries that took too long.
        fall_overs: How often the second source took over.
        second_reads: Reads that the second source answered, those at hand not counted.
        failures: Reads that nobody answered.
    """

    retries: int = 0
    timeouts: int = 0
    fall_overs: int = 0
    second_reads: int = 0
    failures: int = 0


class FallbackSource:
    """Asks a source again when it fails, then a second source that holds the same bytes.

    Attributes:
        figures: What was retried so far, and what fell over.
    """

    def __init__(
        self,
        first: Source,
        second: Source | None = None,
        *,
        retries: int = 2,
        backoff: float = 0.1,
        timeout: float | None = 10.0,
    ) -> None:
        """Put retries in front of a source, and another source behind it.

        Args:
            first: Asked first.  Both are closed with this one.
            second: Asked when the first has failed; the same bytes.
            retries: Tries of the first after a failed one.
            backoff: Seconds before the first retry, at most; doubled for each further one.
            timeout: Seconds that one try may take; None is for ever.

        Raises:
            SourceError: The two sources differ in size.
            ValueError: Less than no retries, or a time below zero.
        """
        if second is not None and second.size != first.size:
            raise SourceError(
                f"the fallback has {second.size} bytes and the image {first.size}: they are not"
                " the same"
            )
        if retries < 0 or backoff < 0 or (timeout is not None and timeout <= 0):
            raise ValueError(f"retries {retries}, backoff {backoff}, timeout {timeout}")
        self.figures: Final = FallbackFigures()
        self._first = first
        self._second = second
        self._tries = retries + 1
        self._backoff = backoff
        self._timeout = timeout
        self._size = first.size
        self._failing = False  # the first source; with a second one that means: not asked
        self._ask_again_at = 0.0  # by the loop's clock
        self._probe: asyncio.Task[None] | None = None
        self._reads = ReadsUnderWay("this source")

    @property
    def size(self) -> int:
        """Length of either source, in bytes."""
        return self._size

    @property
    def identity(self) -> str:
        """That of the first source."""
        return identity_of(self._first)

    def extents(self) -> Iterator[tuple[int, int]]:
        """Give those of the first source."""
        return self._first.extents()

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        """Read what the source that answers now has at hand; its failures are for ``read``."""
        self._reads.check()
        check_read(offset, length, self._size)
        second = self._second
        source = self._first if second is None or not self._failing else second
        try:
            return source.read_nowait(offset, length)
        except ClosedError:
            raise
        except Exception:
            return None

    async def read(self, offset: int, length: int) -> Buffer:
        """Read from the first source, again and again, then from the second.

        Raises:
            SourceError: No try worked; the last one's error is its cause.
            ClosedError: The source is closed.

        Cancellation: the try under way is cancelled, and there is no other.
        """
        self._reads.check()
        check_read(offset, length, self._size)
        with self._reads:
            if self._second is None:
                return await self._read_first(offset, length, self._tries)
            if not self._failing:
                try:
                    return await self._read_first(offset, length, self._tries)
                except SourceError as error:
                    self._fall_over(error)
            elif self._is_time():
                self._probe = asyncio.get_running_loop().create_task(
                    self._ask_again(offset, min(length, _PROBE_BYTES)), name="aiouffd fallback"
                )
            return await self._read_second(self._second, offset, length)

    def _is_time(self) -> bool:
        """Say whether the first source is to be asked again; once each time."""
        now = asyncio.get_running_loop().time()
        if now < self._ask_again_at or (self._probe is not None and not self._probe.done()):
            return False
        self._ask_again_at = now + LEFT_ALONE + (self._timeout or 0)
        return True

    async def _ask_again(self, offset: int, length: int) -> None:
        """See whether the first source answers again."""
        with contextlib.suppress(SourceError, ClosedError):
            await self._read_first(offset, length, 1)

    def _fall_over(self, error: SourceError) -> None:
        self._ask_again_at = asyncio.get_running_loop().time() + LEFT_ALONE
        if not self._failing:  # by another read, meanwhile
            self._failing = True
            self.figures.fall_overs += 1
            log.warning("%s; from now on the fallback is asked", error)

    async def _read_first(self, offset: int, length: int, tries: int) -> Buffer:
        failed: Exception | None = None
        for attempt in range(tries):
            if attempt:
                self.figures.retries += 1
                delay = min(self._backoff * 2 ** (attempt - 1), _MAX_DELAY)
                # Many readers fail together: let them not come back together.
                await asyncio.sleep(delay * random.uniform(0.5, 1))  # noqa: S311
            try:
                data = await self._try(self._first, offset, length)
            except ClosedError:
                raise
            except Exception as error:
                failed = error
                continue
            if self._failing:
                self._failing = False
                log.warning("the source answers again")
            return data
        if self._second is None:
            self.figures.failures += 1
            if not self._failing:
                self._failing = True
                log.warning("the source fails, after %d tries: %s", tries, failed)
        raise _source_error(failed, f"{tries} tries") from failed

    async def _read_second(self, second: Source, offset: int, length: int) -> Buffer:
        self.figures.second_reads += 1
        try:
            return await self._try(second, offset, length)
        except ClosedError:
            raise
        except Exception as error:
            self.figures.failures += 1
            raise _source_error(error, "the fallback too") from error

    async def _try(self, source: Source, offset: int, length: int) -> Buffer:
        try:
            async with asyncio.timeout(self._timeout):
                return await source.read(offset, length)
        except TimeoutError as error:
            self.figures.timeouts += 1
            raise SourceError(f"no answer within {self._timeout} s") from error
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise SourceError("the read was cancelled by its source") from error

    async def aclose(self) -> None:
        """Let reads in flight end, then close both sources.

        Cancellation: the sources may still be open; call again.
        """
        await self._reads.end()
        if self._probe is not None:
            self._probe.cancel()
            await asyncio.wait([self._probe])
        try:
            await self._first.aclose()
        finally:
            if self._second is not None:
                await self._second.aclose()


def _source_error(error: Exception | None, tried: str) -> SourceError:
    return SourceError(f"the bytes could not be read ({tried}): {error}")
