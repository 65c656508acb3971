"""What an operator sees of a running ``aiouffd serve``: control socket, metrics, service manager.

Knows: the options for these.
Must not know: how to serve, or to answer whoever asks (``operating`` does).
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Final

from ..errors import UffdError
from ..fds import OwnedFd
from ..source_opening import SourceOrOpener
from ..sources.measured import MeasuredSource, Reads
from ..unix_socket import Listener
from .arguments import CONTROL_VARIABLE, host_and_port
from .diagnostics import LEVELS

if TYPE_CHECKING:
    from ..server import Server
    from ..sources.shared import SharedImage

#: ``--socket fd:NAME``: a socket of this name came from the service manager.
PASSED: Final = "fd:"


def raise_descriptor_limit() -> None:
    """Allow as many descriptors as we may: a session takes five, and 1,024 is a usual limit."""
    import resource  # not on every system: importing this module must not fail there

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def descriptor_limit() -> int:
    """Say how many descriptors we may have."""
    import resource  # not on every system: importing this module must not fail there

    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_control_options(parser)
    parser.add_argument(
        "--log-level", choices=LEVELS, default="warning", help="on stderr (default: warning)"
    )


def add_control_options(parser: argparse.ArgumentParser) -> None:
    """Add those without --log-level, for who has another option for that."""
    group = parser.add_argument_group("how to be operated")
    group.add_argument(
        "--control",
        metavar="PATH",
        nargs="?",
        const="",
        default=os.environ.get(CONTROL_VARIABLE),
        help="answer aiouffd sessions, top, complete and drain on this socket"
        f" (default: ${CONTROL_VARIABLE}; without PATH: the serving socket's path and .control)",
    )
    group.add_argument(
        "--metrics",
        metavar="HOST:PORT",
        type=host_and_port,
        help="give Prometheus metrics on this TCP address, to whoever asks",
    )


def wanted(args: argparse.Namespace) -> bool:
    """Say whether anybody can ask for figures."""
    return args.control is not None or args.metrics is not None


def measured(source: SourceOrOpener, accounts: Sequence[Reads]) -> SourceOrOpener:
    """Measure what sessions read, on the first account; without accounts it is not measured."""
    if not accounts:
        return source
    reads = accounts[0]
    if callable(source):
        opener = source
        return lambda: MeasuredSource(opener(), reads.name, reads)
    return MeasuredSource(source, reads.name, reads)


@contextlib.asynccontextmanager
async def operating(
    args: argparse.Namespace,
    server: Server,
    name: str,
    reads: Sequence[Reads],
    drain: Callable[[], object],
    *,
    shared: SharedImage | None = None,
) -> AsyncIterator[dict[str, str]]:
    """Offer what the options ask for, as long as the block runs.

    Args:
        args: With our options, and ``replace``, ``any_directory``.
        server: That listens.
        name: What it serves, for people.
        reads: Accounts of its sources.
        drain: Begins a drain.
        shared: The copy of the image that clones share, if they do.

    Yields:
        Where what can be reached, for the line that says so.
    """
    if not wanted(args):
        yield {}
        return
    from .operating import around  # what it takes to answer is imported only where somebody asks

    async with around(args, server, name, reads, drain, shared) as where:
        yield where


def passed_listener(name: str, passed: Sequence[tuple[str, OwnedFd]]) -> Listener:
    """Choose the socket to listen on among what the service manager passed.

    Args:
        name: ``fd:NAME``.
        passed: From ``take_listen_fds``; the others are closed.

    Raises:
        UffdError: None has this name, or it is no listening Unix socket.
    """
    wanted = name.removeprefix(PASSED)
    found = None
    for each, fd in passed:
        if each == wanted and found is None:
            found = fd
        else:
            fd.close()
    if found is None:
        names = ", ".join(each for each, _ in passed) or "none at all"
        raise UffdError(
            f"the service manager passed no socket named {wanted} (passed: {names});"
            " see FileDescriptorName= of its socket unit"
        )
    try:
        return Listener.adopt(found)
    except ValueError as error:
        raise UffdError(f"what the service manager passed as {wanted}: {error}") from error
