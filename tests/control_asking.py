"""Ask a control socket, and hold every answer to docs/reference/openapi.json.

Knows: HTTP over a Unix socket, the description of the API.
Must not know: what a test is about.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import jsonschema

OPENAPI: Final[dict[str, Any]] = json.loads(
    Path(__file__).parent.parent.joinpath("docs/reference/openapi.json").read_text("utf-8")
)


class Asking(HTTPConnection):
    """HTTP to a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=30)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(30)
        self.sock.connect(str(self.path))


def _operation(method: str, target: str) -> dict[str, Any] | None:
    """Find what the description says of a request."""
    path = urlsplit(target).path
    for template, methods in OPENAPI["paths"].items():
        pattern = re.sub(r"\\{\w+\\}", "[^/]+", re.escape(template))
        if re.fullmatch(pattern, path) and method.lower() in methods:
            found: dict[str, Any] = methods[method.lower()]
            return found
    return None


def check(method: str, target: str, status: int, answer: object) -> None:
    """Hold an answer to the description; what it does not know must be an Error."""
    operation = _operation(method, target)
    schema: dict[str, Any] = {"$ref": "#/components/schemas/Error"}
    if operation is not None and status != 403:  # which every path may say
        assert str(status) in operation["responses"], (method, target, status, answer)
        content = operation["responses"][str(status)]["content"]
        schema = content["application/json"]["schema"]
    jsonschema.validate(
        answer,
        schema | {"components": OPENAPI["components"]},
        cls=jsonschema.Draft202012Validator,
    )


def ask_now(path: Path, method: str, target: str) -> tuple[int, Any]:
    """Ask, in a thread; an answer in JSON is held to the description."""
    connection = Asking(path)
    try:
        connection.request(method, target)
        response: HTTPResponse = connection.getresponse()
        body = response.read()
    finally:
        connection.close()
    if response.headers.get_content_type() != "application/json":
        return response.status, body.decode()
    answer = json.loads(body)
    check(method, target, response.status, answer)
    return response.status, answer


async def ask(path: Path, method: str, target: str) -> tuple[int, Any]:
    """Ask from a test on a loop."""
    return await asyncio.to_thread(ask_now, path, method, target)
