"""What a test asks of its harness: the marker's arguments, the options, the ini values.

Knows: every setting by name, what it may be, and who is asked first.
Must not know: pytest, the harness; plain values come in, a Settings goes out.

Laws of this file:

* The nearest wins: the marker of the function, of its class, of its module; then the option on
  the command line; then the ini value; then what stands here.
* Only ``needs`` adds up: what a class needs, each of its tests needs.
* A mistake is told with the name of what is wrong, what was given and what there is.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

from .latency import Distribution
from .latency import of as distribution_of
from .rules import KINDS

TIMEOUT: Final = 10.0
BACKENDS: Final = ("auto", "process", "trampoline")


class SettingsError(ValueError):
    """A setting is not what it may be; the text is for whoever wrote it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What holds for one test.

    Attributes:
        timeout: Seconds that a thread may stand still before it is let go and the test fails.
        backend: How threads are held: one of ``BACKENDS``.
        seed: For whatever is random in the test; None: made of the run's seed and the test's name.
        pages: How many pages ``uffd_region`` has; None: as many as its contents take.
        memory: What kind of memory it is: one of ``rules.KINDS``.
        contents: What it holds before anybody touches it; None: zeros.
        needs: What must be there, or the test is skipped.
        latency: How long an access to each of its pages takes: seconds or a distribution.
        fail_at: Its pages that fail when they are touched.
    """

    timeout: float = TIMEOUT
    backend: str = "auto"
    seed: int | None = None
    pages: int | None = None
    memory: str = "shmem"
    contents: bytes | None = None
    needs: tuple[str, ...] = ()
    latency: Distribution | None = None
    fail_at: tuple[int, ...] = ()

    @property
    def region_pages(self) -> int:
        """How many pages the region has."""
        if self.pages is not None:
            return self.pages
        if self.contents is None or self.memory.startswith("hugetlb"):
            return 1
        return max(-(-len(self.contents) // mmap.PAGESIZE), 1)


def timeout(value: object) -> float:
    """Take seconds: a number above zero, or its text."""
    try:
        seconds = float(value)  # type: ignore[arg-type] # what is no number raises
    except (TypeError, ValueError):
        seconds = -1.0
    if isinstance(value, bool) or not 0 < seconds < float("inf"):
        raise SettingsError(f"must be a number of seconds above 0, not {value!r}")
    return seconds


def seed(value: object) -> int:
    """Take a seed: a whole number from 0, or its text (``0x2a`` too)."""
    try:
        number = int(value, 0) if isinstance(value, str) else value
    except ValueError:
        number = -1
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise SettingsError(f"must be a whole number from 0, not {value!r}")
    return number


def backend(value: object) -> str:
    """Take the name of a back end."""
    return _one_of(BACKENDS, value)


def _memory(value: object) -> str:
    return _one_of(KINDS, value)


def _one_of(names: Iterable[str], value: object) -> str:
    if not isinstance(value, str) or value not in names:
        raise SettingsError(f"must be one of {', '.join(names)}; not {value!r}")
    return value


def _pages(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise SettingsError(f"must be a whole number of pages from 1, not {value!r}")
    return value


def _contents(value: object) -> bytes:
    if not isinstance(value, (bytes, bytearray, memoryview)):
        raise SettingsError(f"must be bytes, not {value!r}")
    return bytes(value)


def _needs(value: object) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else _several(value)
    if not names or not all(isinstance(name, str) for name in names):
        raise SettingsError(f"must be a name or several, such as 'kernel-mode'; not {value!r}")
    return names


def _several(value: object) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, Iterable) else ()


def _latency(value: object) -> Distribution:
    try:
        return distribution_of(value)  # type: ignore[arg-type] # what is none raises
    except (TypeError, ValueError) as error:
        raise SettingsError(f"is of no use: {error}") from None


def _fail_at(value: object) -> tuple[int, ...]:
    pages = (value,) if isinstance(value, int) else _several(value)
    for page in pages or (None,):
        if not isinstance(page, int) or isinstance(page, bool) or page < 0:
            raise SettingsError(f"must be the number of a page, or several; not {value!r}")
    return pages


#: How each argument of the marker is read.
ARGUMENTS: Final[Mapping[str, Callable[[object], object]]] = {
    "timeout": timeout,
    "backend": backend,
    "seed": seed,
    "pages": _pages,
    "memory": _memory,
    "contents": _contents,
    "needs": _needs,
    "latency": _latency,
    "fail_at": _fail_at,
}
assert tuple(ARGUMENTS) == tuple(field.name for field in fields(Settings))


def of_marker(args: tuple[object, ...], kwargs: Mapping[str, object]) -> dict[str, object]:
    """Read the arguments of one marker.

    Raises:
        SettingsError: There is no such argument, or it may not be what it is.
    """
    if args:
        shown = ", ".join(map(repr, args))
        raise SettingsError(f"arguments go by name only, such as pages=4; not {shown}")
    found: dict[str, object] = {}
    for name, value in kwargs.items():
        if name not in ARGUMENTS:
            from difflib import get_close_matches

            meant = get_close_matches(name, ARGUMENTS, n=1)
            hint = f"did you mean {meant[0]!r}? " if meant else ""
            known = ", ".join(ARGUMENTS)
            raise SettingsError(f"there is no argument {name!r}: {hint}there are {known}")
        try:
            found[name] = ARGUMENTS[name](value)
        except SettingsError as error:
            raise SettingsError(f"{name} {error}") from None
    return found


def settle(*sources: Mapping[str, object]) -> Settings:
    """Make one of several: what an earlier one has, a later one does not change.

    Args:
        sources: Values that were read already, the nearest first; None says nothing.

    Raises:
        SettingsError: They are fine one by one, but not together.
    """
    chosen: dict[str, Any] = {}
    needs: dict[str, None] = {}
    for source in sources:
        for name, value in source.items():
            if name == "needs":
                needs.update(dict.fromkeys(_needs(value)))
            elif value is not None:
                chosen.setdefault(name, value)
    settings = Settings(**chosen, needs=tuple(needs))
    beyond = [page for page in settings.fail_at if page >= settings.region_pages]
    if beyond:
        raise SettingsError(
            f"fail_at names page {beyond[0]}, but the region has {settings.region_pages}"
            f" (from 0): give pages={beyond[0] + 1} or more"
        )
    return settings
