"""``aiouffd keep -- COMMAND``: hold a server's descriptors, and start it again when it dies.

Knows: options, what is written.
Must not know: how descriptors are kept; the keeper does.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Final

from ..keeper import FailClosed, Keeper, Kept, Patience, kill_targets
from ..sd_notify import take_listen_fds
from .arguments import count, seconds_or_none

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

log: Final = logging.getLogger("aiouffd.keeper")

_DEFAULT: Final = Patience()
_OWN_FDS: Final = 64  # of the keeper; what it keeps is there twice while the command is started

_EPILOG: Final = """\
examples:
  aiouffd keep -- aiouffd serve memory.img --socket /run/aiouffd/vm.sock
  aiouffd keep --tries 5 --give-up hold -- aiouffd serve memory.img --socket vm.sock

It does what systemd does with FileDescriptorStoreMax= and Restart=on-failure, where there is no
systemd: the server stores the userfaultfds of its targets here, and gets them back when it
is started again.  Threads that wait for a page wait on until then.

signals:
  SIGTERM, SIGINT  passed on; the end of the command is the end of the keeper
  SIGHUP           start the command anew beside the old one (serve needs --replace), and let
                   the old one end once the new one is ready: a change of version

when the command is given up, and when it ends and leaves descriptors behind, missing memory must
not come to read as zeros:
  policy  as the server's --policy says
  kill    the targets are killed
  hold    the descriptors are held and the targets wait, until this process is killed
"""


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    """Add the command and its options."""
    parser = subparsers.add_parser(
        "keep",
        help="run a server so that nothing is lost when it dies",
        description="Run a command, keep its descriptors, start it again when it dies.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command_line", metavar="COMMAND", nargs="+", help="after --: what to run")
    parser.add_argument(
        "--tries",
        type=count,
        default=_DEFAULT.tries,
        metavar="N",
        help="give up after so many deaths in a row (default: %(default)s)",
    )
    parser.add_argument(
        "--healthy-after",
        type=seconds_or_none,
        default=_DEFAULT.healthy_after,
        metavar="SECONDS",
        help="a run that lived so long is no part of a row (default: %(default)s)",
    )
    parser.add_argument(
        "--max-delay",
        type=seconds_or_none,
        default=_DEFAULT.max_delay,
        metavar="SECONDS",
        help="the longest wait before a restart; the first is at once (default: %(default)s)",
    )
    parser.add_argument(
        "--max-fds",
        type=count,
        default=4096,
        metavar="N",
        help="descriptors to keep at most: three for each target (default: %(default)s)",
    )
    parser.add_argument(
        "--give-up",
        choices=("policy", "kill", "hold"),
        default="policy",
        help="see below (default: policy)",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Keep until the command is through; give its exit status."""
    logging.basicConfig(format="aiouffd keep: %(message)s", level=logging.INFO)
    max_fds = min(args.max_fds, (_raise_descriptor_limit() - _OWN_FDS) // 2)
    if max_fds < args.max_fds:
        log.warning("keeping %d descriptors at most: ulimit -n allows no more", max_fds)
    ways: dict[str, FailClosed] = {"policy": _settle, "kill": _kill, "hold": _hold}
    keeper = Keeper(
        args.command_line,
        fail_closed=ways[args.give_up],
        patience=Patience(
            tries=args.tries, healthy_after=args.healthy_after, max_delay=args.max_delay
        ),
        max_fds=max_fds,
        permanent=take_listen_fds(),
    )
    return asyncio.run(keeper.run())


async def _settle(kept: Kept) -> set[str]:
    from ..takeover import fail_all_closed  # in most lives of a keeper nobody asks for it

    return await fail_all_closed(kept)


async def _kill(kept: Kept) -> set[str]:
    """Kill what can be killed; forked children, which cannot, are settled."""
    left = await kill_targets(kept)
    return await _settle({name: kept[name] for name in left})


async def _hold(kept: Kept) -> set[str]:
    return set(kept)


def _raise_descriptor_limit() -> int:
    """Allow as many descriptors as we may, and say how many: the kernel drops what is beyond."""
    import resource  # not on every system: importing this module must not fail there

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
