"""Options of ``aiouffd serve`` about what is brought before it is asked for, and recorded.

Knows: the options, and the settings of a Service that they are.
Must not know: how anything is brought.
"""

from __future__ import annotations

import argparse
import errno
import os
from typing import TypedDict

from ..prefetch import Pace
from ..recording import Recorder
from ..working_set import WorkingSet
from .arguments import seconds


class Settings(TypedDict):
    """The part of a Service that is set here."""

    replay: WorkingSet | None
    any_image: bool
    hydrate: Pace
    recorder: Recorder | None


def add_prefetch_options(parser: argparse.ArgumentParser) -> None:
    """Add the options, as a group."""
    group = parser.add_argument_group("before it is asked for")
    group.add_argument(
        "--record",
        metavar="FILE",
        help="write down which pages are asked for; {id} in the name gives each session a file of"
        " its own, else only the first session is recorded",
    )
    group.add_argument(
        "--record-window",
        type=seconds,
        default=30.0,
        metavar="SECONDS",
        help="how much of a session is recorded, such as 30 or 30s (default: 30)",
    )
    group.add_argument(
        "--replay", metavar="FILE", help="bring the pages of such a recording to every session"
    )
    group.add_argument(
        "--any-image",
        action="store_true",
        help="replay though it is unknown whether the recording is of this image",
    )
    group.add_argument(
        "--hydrate",
        choices=[pace.value for pace in Pace],
        default=Pace.OFF.value,
        help="bring all of the image in the background (default: off)",
    )


def prefetch_settings(args: argparse.Namespace) -> Settings:
    """Make settings of the options; reads the set to replay.

    Raises:
        WorkingSetError: That is none.
        OSError: It cannot be read, or there is no folder for what is recorded.
    """
    if args.record is not None:
        folder = os.path.dirname(args.record) or "."
        if "{" not in folder and not os.path.isdir(folder):  # said now, not to each session
            raise FileNotFoundError(errno.ENOENT, "no folder to put the recording into", folder)
    return {
        "replay": WorkingSet.load(args.replay) if args.replay is not None else None,
        "any_image": args.any_image,
        "hydrate": Pace(args.hydrate),
        "recorder": (
            Recorder(args.record, window=args.record_window) if args.record is not None else None
        ),
    }
