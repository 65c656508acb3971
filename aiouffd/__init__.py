"""aiouffd: page faults as coroutines.  An asyncio-native userfaultfd framework for Linux.

::

    async def fill(fault: aiouffd.PageFault) -> aiouffd.Resolution:
        return aiouffd.Copy(await store.read(fault.offset, fault.length))

    async with aiouffd.Pager(uffd) as pager:
        pager.register(start, length, fill)
        await pager.wait_closed()

Importing works anywhere; using it takes Linux (elsewhere NotSupported is raised).
"""

from .errors import (
    ClosedError,
    DeadlineExceeded,
    FaultError,
    HandlerError,
    LayoutChanging,
    MigrationFailed,
    NoHandler,
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

__version__ = "0.1.0"

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
    "LayoutChanging",
    "Metrics",
    "MigrationFailed",
    "Mode",
    "Move",
    "NoHandler",
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
