"""Options that CRIU's own servers have, under CRIU's names: folders, TLS, daemon, log.

Knows: what they mean, which checkpoint they name, and how to run a server as they ask.
Must not know: what the server does.

Laws of this file:

* A name that CRIU has means here what it means there.  ``-o`` and ``--pidfile`` are relative to
  the work directory, all other files to where the command was started.
* Ready means ready: the pid file, the byte on ``--status-fd`` and the end of the command that
  went into the background come after the server has said so, and not at all if it fails.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Final, Literal, TextIO, TypeAlias

from ..errors import UffdError
from . import statuses
from .diagnostics import logging_to
from .output import Lines

if TYPE_CHECKING:
    import ssl

    from ..protocols.criu.checkpoint import Checkpoint
    from ..protocols.criu.tls import TlsFiles

logger: Final = logging.getLogger("aiouffd.criu")

_LEVELS: Final = ("error", "error", "warning", "info", "debug")
_DEFAULT_LEVEL: Final = 2
_LISTEN_FDS_START: Final = 3  # sd_listen_fds(3)

#: Runs until the server ends and gives the exit status.  It is told where lines for people go,
#: and what to call when it is ready to serve.
Serve: TypeAlias = Callable[[Lines, Callable[[], None]], Coroutine[Any, Any, int]]


# --- options ---------------------------------------------------------------------------


def add_folder_options(parser: argparse._ActionsContainer) -> None:
    """Add ``-D`` and ``-W``."""
    parser.add_argument(
        "-D",
        "--images-dir",
        metavar="DIR",
        default=".",
        help="the checkpoint's images (default: the current directory)",
    )
    parser.add_argument(
        "-W",
        "--work-dir",
        metavar="DIR",
        help="where logs, pid files and sockets go (default: the same as --images-dir)",
    )


async def open_checkpoint(args: argparse.Namespace) -> Checkpoint:
    """Open the checkpoint that ``-D`` and ``--images`` name together.

    Where ``-D`` has images, ``--images`` says where the pages are; else it has all.

    Raises:
        OSError: As ``Checkpoint.open``.
        UffdError: As ``Checkpoint.open``.
    """
    from ..protocols.criu.checkpoint import Checkpoint  # who receives a dump has none

    if args.images is None:
        return await Checkpoint.open(args.images_dir)
    if os.path.exists(os.path.join(args.images_dir, "inventory.img")):
        return await Checkpoint.open(args.images_dir, pages=args.images)
    return await Checkpoint.open(args.images)


def add_address_options(parser: argparse._ActionsContainer, *, address: str, port: str) -> None:
    """Add ``--address`` and ``--port``: None and 0 where they are not given.

    Args:
        parser: Of the command.
        address: What the address is for, for the help.
        port: The same of the port.
    """
    parser.add_argument("--address", metavar="ADDRESS", help=address)
    parser.add_argument("--port", metavar="PORT", type=_port, default=0, help=port)


def add_tls_options(parser: argparse._ActionsContainer) -> None:
    """Add ``--tls`` and its files."""
    parser.add_argument(
        "--tls", action="store_true", help="speak TLS; both sides show who they are"
    )
    parser.add_argument(
        "--tls-cacert",
        metavar="FILE",
        help="trust only whom these authorities vouch for (default: the system's, and"
        " /etc/pki/CA/cacert.pem)",
    )
    parser.add_argument("--tls-cacrl", metavar="FILE", help="certificates that were revoked")
    parser.add_argument(
        "--tls-cert", metavar="FILE", help="our certificate (default: /etc/pki/criu/cert.pem)"
    )
    parser.add_argument(
        "--tls-key", metavar="FILE", help="its key (default: /etc/pki/criu/private/key.pem)"
    )
    parser.add_argument(
        "--tls-no-cn-verify",
        action="store_true",
        help="do not ask that the other's certificate is for the --address given here",
    )


def add_process_options(parser: argparse._ActionsContainer) -> None:
    """Add what a server does around its work: ``-d``, ``--pidfile``, ``--status-fd``, ``-o``."""
    parser.add_argument(
        "-d", "--daemon", action="store_true", help="go into the background once it is ready"
    )
    parser.add_argument(
        "--pidfile", metavar="FILE", help="write the pid there once it is ready (not over a file)"
    )
    parser.add_argument(
        "--status-fd",
        type=_descriptor,
        metavar="FD",
        help="write a zero byte to this descriptor and close it once it is ready",
    )
    parser.add_argument("-o", "--log-file", metavar="FILE", help="log there (default: stderr)")
    parser.add_argument(
        "-v",
        "--verbosity",
        action="append",
        nargs="?",
        const="",
        type=_verbosity,
        metavar="NUM",
        help="-v or -v3 logs what happens, -v4 everything, -v1 errors only (default: -v2)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object per line")


def _port(text: str) -> int:
    if not text.isdecimal() or len(text) > 5 or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text} is no port, 0 to 65535")
    return int(text)


def _descriptor(text: str) -> int:
    if not text.isdecimal() or len(text) > 9:
        raise argparse.ArgumentTypeError(f"{text} is no descriptor's number")
    return int(text)


def _verbosity(text: str) -> str:
    if text.strip("v") and not (text.isdecimal() and len(text) < 3):
        raise argparse.ArgumentTypeError(f"{text} is no verbosity, such as 3 or vvv")
    return text


def log_level(args: argparse.Namespace) -> str:
    """Name the level of ``-v``: each v is one more, a number is the level itself."""
    level = _DEFAULT_LEVEL
    for text in args.verbosity or ():
        level = int(text) if text.isdecimal() else level + 1 + len(text)
    return _LEVELS[min(level, len(_LEVELS) - 1)]


def work_directory(args: argparse.Namespace) -> str:
    """Give the work directory: ``-W``, or else the images'."""
    folder: str = args.work_dir or args.images_dir
    return os.path.abspath(folder)


# --- TLS -------------------------------------------------------------------------------


def tls_client_context(args: argparse.Namespace) -> ssl.SSLContext | None:
    """Make the context of a client; None without ``--tls``.

    Raises:
        OSError: A file cannot be read, or is not what it should be.
        UffdError: Files were named without ``--tls``.
    """
    files = _tls_files(args)
    if files is None:
        return None
    from ..protocols.criu.tls import client_context

    return client_context(files, check_name=not args.tls_no_cn_verify)


def tls_server_context(args: argparse.Namespace) -> ssl.SSLContext | None:
    """Make the context of a server; None without ``--tls``.

    Raises:
        OSError: A file cannot be read, or is not what it should be.
        UffdError: Files were named without ``--tls``.
    """
    files = _tls_files(args)
    if files is None:
        return None
    from ..protocols.criu.tls import server_context

    return server_context(files)


def _tls_files(args: argparse.Namespace) -> TlsFiles | None:
    named = (args.tls_cacert, args.tls_cacrl, args.tls_cert, args.tls_key)
    if args.tls:
        from ..protocols.criu.tls import TlsFiles  # ssl is of no use to anybody else

        cacert, cacrl, cert, key = named
        return TlsFiles(cacert=cacert, cacrl=cacrl, cert=cert, key=key)
    if any(one is not None for one in named):
        raise UffdError("--tls-cacert, --tls-cacrl, --tls-cert and --tls-key need --tls")
    return None


# --- running ---------------------------------------------------------------------------


def run_server(args: argparse.Namespace, serve: Serve) -> int:
    """Run a server as the options of ``add_process_options`` ask for.

    With ``--daemon`` the calling process returns as soon as the server is ready, or has failed.

    Args:
        args: With the options of ``add_folder_options``, too.
        serve: The server; see Serve.  It is called in the process that stays.

    Returns:
        The exit status.

    Raises:
        OSError: A log, a pid file or a descriptor cannot be had.
        UffdError: As ``serve``.
    """
    folder = work_directory(args)
    readiness = _Readiness(args, folder)
    log_file = os.path.join(folder, args.log_file) if args.log_file else None
    if args.daemon:
        sys.stdout.flush()
        reading, writing = os.pipe()
        if pid := os.fork():
            os.close(writing)
            return _wait_until_ready(pid, reading)
        os.close(reading)
        os.setsid()
        readiness.background = writing
    with contextlib.ExitStack() as stack:
        stack.callback(readiness.close)
        log: TextIO = sys.stderr
        if log_file is not None:
            # With what a keeper gave back we go on with the work of one that has died.
            how: Literal["a", "w"] = "a" if _listen_fds() else "w"
            log = stack.enter_context(open(log_file, how, encoding="utf-8"))
        diagnostics = stack.enter_context(Lines(log))
        out = diagnostics if args.daemon else stack.enter_context(Lines(sys.stdout))
        stack.enter_context(logging_to(diagnostics, as_json=args.json, level=log_level(args)))
        try:
            return asyncio.run(serve(out, readiness.tell))
        except (UffdError, OSError) as error:
            if log_file is not None:  # as well as on stderr, which may be gone
                logger.error("%s", error)  # noqa: TRY400 - a sentence, for people
            raise


def _wait_until_ready(pid: int, reading: int) -> int:
    """Wait for the process in the background; if it fails, it has said why."""
    with open(reading, "rb", buffering=0) as pipe:
        if pipe.read(1):
            return statuses.DONE
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    return code if code > 0 else statuses.FAILED


class _Readiness:
    """Who is to be told that the server is ready.

    Attributes:
        background: The pipe to the process that started it, with ``--daemon``.
        told: Whether they were.
    """

    def __init__(self, args: argparse.Namespace, folder: str) -> None:
        """Look first whether they can be told at all.

        Raises:
            OSError: They cannot.
        """
        self.background: int | None = None
        self.told = False
        self._status_fd: int | None = None
        self._pidfile: str | None = None
        if args.status_fd is not None and args.status_fd not in _listen_fds():
            try:
                os.fstat(args.status_fd)
                self._status_fd = args.status_fd
            except OSError as error:
                raise OSError(
                    error.errno,
                    "is not open; start the command with 9>FILE or a pipe there",
                    f"--status-fd {args.status_fd}",
                ) from error
        if args.pidfile:
            self._pidfile = os.path.join(folder, args.pidfile)
            _remove_stale(self._pidfile)
            if os.path.lexists(self._pidfile):
                raise UffdError(
                    f"{self._pidfile} is there already: another server runs, or one has left it;"
                    " remove it then"
                )

    def tell(self) -> None:
        """Tell them; a second call does nothing.

        Raises:
            OSError: One cannot be told.
        """
        if self.told:
            return
        if self._pidfile is not None:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            fd = os.open(self._pidfile, flags, 0o644)
            with open(fd, "w", encoding="ascii") as file:
                file.write(str(os.getpid()))
        self.told = True
        if self._status_fd is not None:
            with contextlib.suppress(BrokenPipeError):  # a keeper starts us again: it was told
                os.write(self._status_fd, b"\0")
            _let_go(self._status_fd)
            self._status_fd = None
        if self.background is not None:
            _leave_terminal()
            os.write(self.background, b"\0")
            os.close(self.background)
            self.background = None

    def close(self) -> None:
        """Take the pid file away, if it is ours."""
        if self.told and self._pidfile is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._pidfile)
        if self.background is not None:
            os.close(self.background)
            self.background = None


def _listen_fds() -> range:
    """Give the numbers of descriptors that a keeper, or systemd, has given back.

    When it starts a server again they take the place of what was open under these numbers; what
    was told once need not be told again.
    """
    try:
        count = int(os.environ.get("LISTEN_FDS", "0"))
    except ValueError:
        count = 0
    return range(_LISTEN_FDS_START, _LISTEN_FDS_START + count)


def _remove_stale(pidfile: str) -> None:
    """Remove the file of a server that was killed; then a keeper can start it again."""
    try:
        with open(pidfile, encoding="ascii") as file:
            pid = int(file.read())
        os.kill(pid, 0)
    except (FileNotFoundError, ValueError, OverflowError, PermissionError):
        return
    except ProcessLookupError:
        os.unlink(pidfile)


def _leave_terminal() -> None:
    """Let nothing of ours come to a terminal, or hold one, any more."""
    for number in (0, 1, 2):
        _silence(number)


def _let_go(fd: int) -> None:
    """Close a descriptor; in the place of stdin, stdout and stderr no other may come."""
    if fd > 2:
        os.close(fd)
    else:
        _silence(fd)


def _silence(number: int) -> None:
    nothing = os.open(os.devnull, os.O_RDWR)
    if nothing != number:
        os.dup2(nothing, number)
        os.close(nothing)
