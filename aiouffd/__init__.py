"""aiouffd: page faults as coroutines.  An asyncio-native userfaultfd framework for Linux.

::

    async def fill(fault: aiouffd.PageFault) -> aiouffd.Resolution:
        return aiouffd.Copy(await store.read(fault.offset, fault.length))

    async with aiouffd.Pager(uffd) as pager:
        pager.register(start, length, fill)
        await pager.wait_closed()

Importing works anywhere; using it takes Linux (elsewhere NotSupported is raised).
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .errors import (
        ClosedError,
        DeadlineExceeded,
        FaultError,
        HandlerError,
        LayoutChanging,
        LoopThreadTouch,
        MigrationFailed,
        NoHandler,
        NotPaused,
        NotSupported,
        PeerError,
        RangeGone,
        ResolutionRefused,
        SourceError,
        StuckPage,
        TargetGone,
        UffdError,
    )
    from .events import Event, Forked, PageFault, Remapped, Removed, Unmapped
    from .failure import Action, FailurePolicy
    from .fds import OwnedFd
    from .lazy_memory import Holes, LazyMemory
    from .metrics import Counters, Histogram, Metrics, Observer
    from .pager import Pager
    from .ranges import PAGE_SIZE, Range
    from .region import Region
    from .resolutions import (
        Answer,
        Continue,
        Copy,
        Handler,
        Move,
        Poison,
        Resolution,
        Unprotect,
        Wake,
        Zero,
    )
    from .uffd import Feature, Mode, Userfaultfd

#: Where each public name lives.  They are imported when first asked for (PEP 562): the
#: command line and pytest plugins import this package and need neither asyncio nor the pager.
_EXPORTS = {
    "errors": (
        "ClosedError",
        "DeadlineExceeded",
        "FaultError",
        "HandlerError",
        "LayoutChanging",
        "LoopThreadTouch",
        "MigrationFailed",
        "NoHandler",
        "NotPaused",
        "NotSupported",
        "PeerError",
        "RangeGone",
        "ResolutionRefused",
        "SourceError",
        "StuckPage",
        "TargetGone",
        "UffdError",
    ),
    "events": (
        "Event",
        "Forked",
        "PageFault",
        "Remapped",
        "Removed",
        "Unmapped",
    ),
    "failure": (
        "Action",
        "FailurePolicy",
    ),
    "fds": ("OwnedFd",),
    "lazy_memory": ("Holes", "LazyMemory"),
    "metrics": (
        "Counters",
        "Histogram",
        "Metrics",
        "Observer",
    ),
    "pager": ("Pager",),
    "ranges": (
        "PAGE_SIZE",
        "Range",
    ),
    "region": ("Region",),
    "resolutions": (
        "Answer",
        "Continue",
        "Copy",
        "Handler",
        "Move",
        "Poison",
        "Resolution",
        "Unprotect",
        "Wake",
        "Zero",
    ),
    "uffd": (
        "Feature",
        "Mode",
        "Userfaultfd",
    ),
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
    "PAGE_SIZE",
    "Action",
    "Answer",
    "ClosedError",
    "Continue",
    "Copy",
    "Counters",
    "DeadlineExceeded",
    "Event",
    "FailurePolicy",
    "FaultError",
    "Feature",
    "Forked",
    "Handler",
    "HandlerError",
    "Histogram",
    "Holes",
    "LayoutChanging",
    "LazyMemory",
    "LoopThreadTouch",
    "Metrics",
    "MigrationFailed",
    "Mode",
    "Move",
    "NoHandler",
    "NotPaused",
    "NotSupported",
    "Observer",
    "OwnedFd",
    "PageFault",
    "Pager",
    "PeerError",
    "Poison",
    "Range",
    "RangeGone",
    "Region",
    "Remapped",
    "Removed",
    "Resolution",
    "ResolutionRefused",
    "SourceError",
    "StuckPage",
    "TargetGone",
    "UffdError",
    "Unmapped",
    "Unprotect",
    "Userfaultfd",
    "Wake",
    "Zero",
]
