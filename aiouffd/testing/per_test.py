"""The harnesses of one test: opened with its settings, asked what went wrong, closed behind it.

Knows: what a report says of harnesses, and the files that a record becomes.
Must not know: pytest, how a thread is held.

Laws of this file:

* Whatever is asked of a harness here ends: one that cannot answer says so, the others are asked.
* An error is told once: when the test's own part ends, or else when its harnesses are closed.
* All harnesses are closed, whatever the first of them raises.
"""

from __future__ import annotations

import contextlib
import os
import re
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from . import waiting
from .failures import HarnessError
from .harness import Harness
from .settings import Settings

if TYPE_CHECKING:
    from .record import Record
    from .region import Region
    from .touches import Touch

#: How many touches a report shows: the last ones.
SHOWN: Final = 40

#: A thread in what faulthandler writes, and how the harness's own is known.
_THREAD: Final = re.compile(r"^(?:Current t|T)hread 0x.*\n(?:  .*\n?)*\n?", re.MULTILINE)
_PORTER: Final = re.compile(r'aiouffd/testing/helper\.py", line \d+ in _carry')
#: Lines of a stack that are the same in every test.
_MACHINERY: Final = re.compile(r'\s*File ".*(/_pytest/|/pluggy/|/pytest/__main__|<frozen runpy>)')

Section: TypeAlias = tuple[str, str]


class PerTest:
    """The harnesses that a test has opened.

    Sharing: one thread.
    """

    def __init__(self, settings: Settings, seed: int) -> None:
        """Begin with none.

        Args:
            settings: What holds for the test.
            seed: Its own, unless its settings name one.
        """
        self._settings = settings
        self._seed = seed if settings.seed is None else settings.seed
        self._harnesses: list[Harness] = []
        self._lost: list[Harness] = []  # those whose helper has ended, which was told
        self._last: list[Section] = []

    def open(self, **arguments: Any) -> Harness:
        """Start a harness.

        Args:
            arguments: As of ``Harness``; the test's settings where one is missing.

        Raises:
            NotSupported: There can be none here.
        """
        settings = self._settings
        defaults: dict[str, Any] = {
            "timeout": settings.timeout,
            "backend": settings.backend,
            "seed": self._seed,
        }
        harness = Harness(**(defaults | arguments))
        self._harnesses.append(harness.__enter__())
        return harness

    def trouble(self) -> HarnessError | None:
        """Give what a harness had to do by itself: a test in which that happened has failed.

        Returns:
            Once: a thread was let go at the time limit, or a helper process has ended.
        """
        for harness in self._harnesses:
            if harness.closed:
                continue
            found: list[HarnessError] = []
            try:
                harness.settle()  # what the helper has told just now counts too
            except HarnessError as error:
                self._lost.append(harness)
                found.append(error)
            try:
                harness.check()
            except HarnessError as error:  # which knows more than that nobody answers
                found.insert(0, HarnessError(_readable(str(error))))
            if found:
                return found[0]
        return None

    def sections(self) -> list[Section]:
        """Say what was touched, and who stands or waits."""
        return [section for harness in self._harnesses for section in _sections(harness)]

    def closing_sections(self) -> list[Section]:
        """Give the sections as they were when the harnesses were closed, if somebody stood."""
        return self._last

    def forgive(self) -> None:
        """Leave unsaid at the end what started functions have raised: the test fails anyway."""
        for harness in self._harnesses:
            harness.lost()

    def close(self, files: str | None) -> HarnessError | None:
        """Close them all.

        Args:
            files: Where to write what was touched: a path without its end; None: nowhere.

        Returns:
            The first that was wrong: somebody still stood, or was let go at the time limit.

        Raises:
            OSError: A file cannot be written.
        """
        wrong: list[HarnessError] = []
        with contextlib.ExitStack() as stack:  # which ends all of them, whatever one raises
            for number, harness in reversed([*enumerate(self._harnesses)]):
                which = f"-{number + 1}" if number else ""
                stack.callback(self._close, harness, files and files + which, wrong)
        return HarnessError(_readable(str(wrong[0]))) if wrong else None

    def _close(self, harness: Harness, files: str | None, wrong: list[HarnessError]) -> None:
        if harness in self._lost:
            with contextlib.suppress(HarnessError):
                harness.close()
        if harness.closed:
            return
        try:
            left = harness.standing()
            if left:
                self._last += _sections(harness)
                wrong.append(_left(left, harness.ledger.thread_names()))
            if files is not None:
                write(harness.record_so_far, files)
        except HarnessError as error:
            wrong.append(error)
        finally:
            try:
                harness.close()
            except HarnessError as error:
                wrong.append(error)


def _left(left: list[tuple[Touch, str, str]], names: dict[int, str]) -> HarnessError:
    who = ", ".join(
        f"{names.get(touch.thread, 'a thread')} (tid {touch.thread}) at"
        f" {touch.region}[{touch.page}]"
        for touch, _, _ in left
    )
    return HarnessError(
        f"left frozen when the test had ended: {who}."
        " Release them, or leave the freeze's `with` block, before that"
    )


def _readable(text: str) -> str:
    """Leave out of stacks what is the same in all: how pytest came to the test, the porter."""
    text = _THREAD.sub(lambda found: "" if _PORTER.search(found[0]) else found[0], text)
    return "\n".join(line for line in text.splitlines() if not _MACHINERY.match(line))


def region_of(harness: Harness, settings: Settings) -> Region:
    """Make the region that a test's settings describe.

    Raises:
        NotSupported: There is no such memory here.
        ValueError: Its contents do not fit.
    """
    region = harness.region(
        settings.region_pages,
        contents=settings.contents or b"",
        memory=settings.memory,
        name="uffd_region",
    )
    if settings.latency is not None:
        region.all.slow(settings.latency)
    for page in settings.fail_at:
        region.page(page).fail()
    return region


def write(record: Record, files: str) -> None:
    """Write a record in each of its forms; as a picture only where matplotlib is installed.

    Args:
        record: What was touched.
        files: A path without its end; its folder is made if it is not there.

    Raises:
        OSError: A file cannot be written.
    """
    from . import perfetto, record_plot  # which nobody needs who records nothing

    os.makedirs(os.path.dirname(files), exist_ok=True)
    record.save(f"{files}.json")
    perfetto.save(record, f"{files}.perfetto.json")
    try:
        record_plot.plot(record, f"{files}.png")
    except ImportError:
        pass


def _sections(harness: Harness) -> list[Section]:
    found: list[Section] = []
    if not harness.closed:  # by the test; then what it has recorded can still be had
        try:
            harness.settle()
            harness.check()
        except HarnessError as error:  # what the test raised was something else, and came first
            found.append(("uffd harness", _readable(str(error))))
    if lost := harness.lost():
        found.append(("uffd errors", _readable("\n".join(lost))))
    try:
        record = harness.record_so_far
        lines = [record.describe(touch) for touch in record[-SHOWN:]]
        if len(record) > SHOWN:
            lines.insert(0, f"the last {SHOWN} of {len(record)}:")
        found.append(("uffd touches", "\n".join(lines) or "nothing was touched"))
        waits = harness.stood + ([] if harness.closed else waiting.lines(harness))
        if waits:
            found.append(("uffd waits", "\n".join(waits)))
    except HarnessError as error:
        found.append(("uffd touches", f"cannot be had any more: {error}"))
    except Exception as error:  # a report that raises would end the whole run
        found.append(("uffd touches", f"cannot be shown: {error!r}"))
    return found
