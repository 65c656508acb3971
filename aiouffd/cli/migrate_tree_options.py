"""Options that both sides of moving a tree of processes have: CRIU, and its images.

Knows: what they mean, and which files CRIU leaves.
Must not know: migrations.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile

from ..errors import UffdError
from .diagnostics import LEVELS
from .migrate_options import add_deadline_option


def add_criu_options(parser: argparse.ArgumentParser, verb: str) -> argparse._ArgumentGroup:
    """Add those around CRIU; give their group."""
    group = parser.add_argument_group("CRIU")
    group.add_argument(
        "--criu", metavar="PATH", default="criu", help="the program, 4.1 or newer (default: criu)"
    )
    group.add_argument(
        "--criu-option",
        metavar="OPTION",
        action="append",
        default=[],
        help=f"one more option for criu {verb}, such as --criu-option=--tcp-established; may be"
        " repeated",
    )
    group.add_argument(
        "-D",
        "--images-dir",
        metavar="DIR",
        help="for CRIU's images and logs: an empty folder, or one to be made (default: a temporary"
        " one, with $TMPDIR)",
    )
    return group


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add how long the line may be broken, and how things are said."""
    add_deadline_option(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    parser.add_argument(
        "--log-level", choices=LEVELS, default="warning", help="on stderr (default: warning)"
    )


class Images:
    """The folder for CRIU's images and logs: the user's, or one that goes when all went well.

    Attributes:
        path: Of it.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        """Make it, if it is not there.

        Raises:
            OSError: It cannot be made or looked into.
            UffdError: It is not empty.
        """
        self._is_ours = args.images_dir is None
        if self._is_ours:
            self.path = tempfile.mkdtemp(prefix="aiouffd-images-")
            return
        self.path = os.path.abspath(args.images_dir)
        os.makedirs(self.path, mode=0o700, exist_ok=True)
        if os.listdir(self.path):
            raise UffdError(f"{self.path} is not empty: name another folder with --images-dir")

    def remove(self) -> None:
        """Remove all that is in it, and the folder if it is ours."""
        if self._is_ours:
            shutil.rmtree(self.path, ignore_errors=True)
        else:
            self.remove_images(logs=True)

    def remove_images(self, *, logs: bool = False) -> None:
        """Remove the images, which may be large; the logs say what went wrong."""
        for entry in list(os.scandir(self.path)):
            is_image = entry.name.endswith(".img") or entry.name in {
                "stats-dump",
                "stats-restore",
                "stripped",
            }
            if is_image or (logs and entry.name.endswith((".log", ".out"))):
                os.unlink(entry.path)
