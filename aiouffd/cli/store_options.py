"""Options of commands that keep their sessions in the fd store.

Knows: --no-store, which of the descriptors that we were started with are whose.
Must not know: what is kept in the store.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..errors import StoreError
from ..fd_store import FdStore
from ..fds import OwnedFd
from ..protection import PREFIX
from ..server import LISTENER
from . import restore_count


def add_store_options(parser: argparse.ArgumentParser) -> None:
    """Add them to a command."""
    parser.add_argument(
        "--no-store",
        action="store_true",
        help="do not outlive a crash, though systemd or `aiouffd keep` would keep the sessions",
    )


def _is_stored(name: str) -> bool:
    return name.startswith((PREFIX, LISTENER)) or name == restore_count.NAME


def not_stored(taken: Sequence[tuple[str, OwnedFd]]) -> list[tuple[str, OwnedFd]]:
    """Give those descriptors that come from socket units."""
    return [(name, fd) for name, fd in taken if not _is_stored(name)]


def open_store(args: argparse.Namespace, taken: Sequence[tuple[str, OwnedFd]]) -> FdStore | None:
    """Open the fd store, if there is one and it is wanted.

    Args:
        args: Of the command.
        taken: What this process was started with; what the store gave back is taken over.

    Raises:
        StoreError: It gave sessions back, and is not wanted or not there any more.
    """
    stored = [(name, fd) for name, fd in taken if _is_stored(name)]
    store = None if args.no_store else FdStore.from_environment(stored)
    if store is None and stored:
        raise StoreError(
            f"{len(stored)} stored descriptors of living sessions were given back, but there is"
            " no fd store to go on with (--no-store?)"
        )
    return store
