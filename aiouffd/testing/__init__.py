"""Tools for tests of code that uses memory, and of code that uses aiouffd; public.

``Harness`` makes memory whose touches a test sees, stops, delays, changes and fails::

    with Harness() as uffd:
        region = uffd.region(2, contents=packet)
        with region.page(1).freeze() as freeze:
            parsing = uffd.start(library.parse, region.pointer(), len(packet))
            thread = freeze.wait()  # it stands exactly at its access
            region.poke(0, b"other bytes")
            thread.release()
        parsing.result()

``aiouffd.testing.sources`` has the tests that every source passes, to be inherited;
``aiouffd.testing.pytest_plugin`` brings the fixtures.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .arming import Armed
    from .failures import FreezeTimeout, HarnessError
    from .freezing import AsyncFreeze, AsyncFrozen, Freeze, Frozen, freeze
    from .harness import Harness
    from .interleaving import Exploration, Interleaving, RaceFound
    from .programs import Program
    from .record import Record, RecordMismatch
    from .recording import Recording
    from .region import Page, Place, Region
    from .running import Running
    from .schedules import END, Before, CannotFollow, Deadlock, Endless, NotDeterministic
    from .touches import Access, Touch

#: Where each public name lives.  They are imported when first asked for (PEP 562): a pytest
#: plugin is imported in every run, and most runs need none of it.
_EXPORTS = {
    "arming": ("Armed",),
    "failures": ("FreezeTimeout", "HarnessError"),
    "freezing": ("AsyncFreeze", "AsyncFrozen", "Freeze", "Frozen", "freeze"),
    "harness": ("Harness",),
    "interleaving": ("Exploration", "Interleaving", "RaceFound"),
    "programs": ("Program",),
    "record": ("Record", "RecordMismatch"),
    "recording": ("Recording",),
    "region": ("Page", "Place", "Region"),
    "running": ("Running",),
    "schedules": ("END", "Before", "CannotFollow", "Deadlock", "Endless", "NotDeterministic"),
    "touches": ("Access", "Touch"),
}
_HOMES = {name: home for home, names in _EXPORTS.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


__all__ = [
    "END",
    "Access",
    "Armed",
    "AsyncFreeze",
    "AsyncFrozen",
    "Before",
    "CannotFollow",
    "Deadlock",
    "Endless",
    "Exploration",
    "Freeze",
    "FreezeTimeout",
    "Frozen",
    "Harness",
    "HarnessError",
    "Interleaving",
    "NotDeterministic",
    "Page",
    "Place",
    "Program",
    "RaceFound",
    "Record",
    "RecordMismatch",
    "Recording",
    "Region",
    "Running",
    "Touch",
    "freeze",
]
