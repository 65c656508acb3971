"""Asks a running server over its control socket; for the commands that show and order.

Knows: HTTP over a Unix socket, where the socket is found, how errors are said to people.
Must not know: what is asked.

Standard library only: the server needs aiohttp, who asks it does not.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import socket
from http.client import HTTPConnection, HTTPException
from typing import Any, Final, cast
from urllib.parse import quote, urlencode

from .arguments import CONTROL_VARIABLE
from .statuses import NO_SERVER, NO_SESSION, REFUSED, USAGE, CommandError

_CONNECT_S: Final = 10.0
_SAY_NO: Final = (errno.EACCES, errno.EPERM)


def add_option(parser: argparse.ArgumentParser) -> None:
    """Add the option that says which server."""
    parser.add_argument(
        "--control",
        metavar="PATH",
        default=os.environ.get(CONTROL_VARIABLE, ""),
        help=f"the server's control socket (default: ${CONTROL_VARIABLE})",
    )


def path_from(args: argparse.Namespace) -> str:
    """Give the control socket's path.

    Raises:
        CommandError: Nothing says where it is.
    """
    if not args.control:
        raise CommandError(
            USAGE,
            f"which server?  Say --control PATH, or set {CONTROL_VARIABLE};"
            " aiouffd serve --control says its path when it starts",
        )
    return str(args.control)


class _Unix(HTTPConnection):
    def __init__(self, path: str, timeout: float | None) -> None:
        super().__init__("localhost", timeout=_CONNECT_S)
        self._path = path
        self._patience = timeout

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(_CONNECT_S)
        self.sock.connect(self._path)
        self.sock.settimeout(self._patience)


def ask(
    path: str,
    method: str,
    *place: str,
    query: dict[str, object] | None = None,
    timeout: float | None = 30.0,
) -> tuple[int, dict[str, Any]]:
    """Ask, and give what was answered.

    Args:
        path: Of the control socket.
        method: GET or POST.
        place: The parts of the path behind ``/v1``.
        query: Parameters.
        timeout: Seconds to wait for the answer; None is as long as it takes.

    Returns:
        The HTTP status and the answer.

    Raises:
        CommandError: Nobody answers, or the answer is no.
    """
    target = "/".join(("/v1", *(quote(part, safe="") for part in place)))
    if query:
        target += "?" + urlencode(query)
    connection = _Unix(path, timeout)
    try:
        connection.request(method, target)
        response = connection.getresponse()
        body = response.read()
    except OSError as error:
        if error.errno in _SAY_NO:
            raise CommandError(
                REFUSED,
                f"{path}: this user may not use the control socket; ask as the server's user"
                " or as root",
            ) from error
        raise CommandError(
            NO_SERVER, f"{path}: no server answers there ({error.strerror or error})"
        ) from error
    except HTTPException as error:
        raise CommandError(NO_SERVER, f"{path}: no aiouffd server answers there") from error
    finally:
        connection.close()
    return response.status, _checked(path, response.status, body)


def _checked(path: str, status: int, body: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(body)
    except ValueError as error:
        raise CommandError(NO_SERVER, f"{path}: no aiouffd server answers there") from error
    if status < 400:
        return cast("dict[str, Any]", answer)
    text = "; ".join(part for part in (answer.get("error"), answer.get("hint")) if part)
    raise CommandError(NO_SESSION if status == 404 else REFUSED, text)
