"""QMP, the language in which QEMU takes orders: one JSON object a line, on a Unix socket.

    with Qmp.connect(path, process) as qmp:
        qmp.execute("migrate", uri="tcp:127.0.0.1:4444")
        qmp.wait_for("MIGRATION", status="completed", seconds=30)

Knows: the greeting, orders and their answers, events and their times.
Must not know: migration.

Law of this file: every wait has a deadline, and an event that comes during an order is kept.
"""

from __future__ import annotations

import json
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

#: How long QEMU may take to answer an order, in seconds.
ANSWER_SECONDS: Final = 30.0


class QmpError(Exception):
    """QEMU refused an order, ended, or did not answer in time."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that QEMU told of its own accord.

    Attributes:
        name: Its name, as ``STOP``.
        at_us: The machine's clock when it happened, in microseconds since 1970.
        data: What belongs to it.
    """

    name: str
    at_us: int
    data: dict[str, Any]

    def matches(self, name: str, **data: object) -> bool:
        """Say whether it has this name, and these values among its data."""
        return self.name == name and all(self.data.get(key) == data[key] for key in data)


class Qmp:
    """A connection to one QEMU.

    Attributes:
        events: All that it told so far, the oldest first.

    Sharing: one thread.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.events: list[Event] = []
        self._connection = connection
        self._rest = b""

    @classmethod
    def connect(cls, path: Path, process: subprocess.Popen[bytes], seconds: float = 30.0) -> Self:
        """Connect as soon as QEMU listens, and leave the negotiation mode.

        Args:
            path: The socket of ``-qmp unix:PATH,server=on,wait=off``.
            process: The QEMU; its end ends the waiting.
            seconds: When to give up.

        Raises:
            QmpError: It ended, or did not listen in time.
        """
        end = time.monotonic() + seconds
        while True:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                connection.connect(str(path))
                break
            except (FileNotFoundError, ConnectionRefusedError):
                connection.close()
                if process.poll() is not None:
                    raise QmpError(f"QEMU ended with {process.returncode}") from None
                if time.monotonic() > end:
                    raise QmpError(f"QEMU did not listen on {path} in {seconds:g} s") from None
                time.sleep(0.005)
        qmp = cls(connection)
        try:
            qmp._message(end)  # the greeting
            qmp.execute("qmp_capabilities")
        except BaseException:
            connection.close()
            raise
        return qmp

    def execute(self, order: str, **arguments: object) -> Any:
        """Give an order and return its answer; names have ``_`` for each ``-``.

        Raises:
            QmpError: QEMU refused it, with its reason.
        """
        # No order's own name needs the change; those of arguments do.
        named = {key.replace("_", "-"): value for key, value in arguments.items()}
        text = json.dumps({"execute": order, "arguments": named})
        self._connection.settimeout(ANSWER_SECONDS)
        try:
            self._connection.sendall(text.encode())
        except OSError as error:
            raise QmpError(f"QEMU is gone before {order}: {error}") from error
        end = time.monotonic() + ANSWER_SECONDS
        while True:
            message = self._message(end)
            if "error" in message:
                raise QmpError(f"{order}: {message['error']['desc']}")
            if "return" in message:
                return message["return"]

    def wait_for(self, name: str, *, seconds: float, **data: object) -> Event:
        """Give the first event of a name with some data, of the past or to come.

        Raises:
            QmpError: It did not come in time.
        """
        end = time.monotonic() + seconds
        while (found := self.find(name, **data)) is None:
            self._message(end)
        return found

    def find(self, name: str, **data: object) -> Event | None:
        """Give the first event of a name with some data, of those that came."""
        return next((each for each in self.events if each.matches(name, **data)), None)

    def close(self) -> None:
        """Hang up."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _message(self, end: float) -> dict[str, Any]:
        """Read one message, and keep it if it is an event."""
        while b"\n" not in self._rest:
            left = end - time.monotonic()
            if left <= 0:
                raise QmpError("QEMU did not say what was waited for in time")
            self._connection.settimeout(left)
            try:
                more = self._connection.recv(1 << 16)
            except TimeoutError:
                continue
            except OSError as error:
                raise QmpError(f"QEMU is gone: {error}") from error
            if not more:
                raise QmpError("QEMU hung up")
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        if "event" in message:
            stamp = message["timestamp"]
            at_us = stamp["seconds"] * 1_000_000 + stamp["microseconds"]
            self.events.append(Event(message["event"], at_us, message.get("data", {})))
        return message
