"""Redis and Valkey as a place for pages: their URLs, and many commands per round trip.

Knows: redis-py (extra ``redis``), what is worth another attempt.
Must not know: how an image is laid out in keys.

Laws of this file:

* Commands that come while others are under way go together in the next round trip; a command
  that comes alone goes at once.
* What a fault waits for does not stand in line behind megabytes: long reads have round trips
  and connections of their own.
* A connection that is lost, a server that loads its data and a cluster that changes are no
  errors: the commands are sent again, until who asked has waited long enough.  So every command
  given must be harmless when it is done twice.
* A mistake in a program is no lost connection: it is raised at once, as what it is.
* Who stops waiting leaves the connection as it is: its answer is thrown away.
* No message holds a password.
"""

from __future__ import annotations

import asyncio
import traceback
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias
from urllib.parse import parse_qsl, unquote, urlsplit

from ..errors import SourceError

try:
    import redis.asyncio as redis
    import redis.exceptions as refusals
    from redis.asyncio.cluster import ClusterNode
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff
except ImportError as error:
    raise ImportError(
        "images in Redis and Valkey are read with redis-py: pip install 'aiouffd[redis]'"
    ) from error

Command: TypeAlias = tuple[str | bytes | int, ...]

#: What may go better the next time, of what redis-py raises.
_TRANSIENT: Final = (
    refusals.ConnectionError,
    refusals.TimeoutError,
    refusals.ClusterDownError,
    refusals.ClusterError,
    refusals.RedisClusterException,
    refusals.TryAgainError,
    refusals.AskError,  # MOVED is one too; redis-py follows them, up to a limit
    OSError,
)
_FINAL: Final = (refusals.AuthenticationError, refusals.AuthorizationError)

_AT_ONCE: Final = 4  # round trips under way, short ones and long ones each
_LONG: Final = 128 << 10  # bytes asked for or sent by one caller, from which on they are long
_COMMANDS: Final = 128  # per round trip
_BYTES: Final = 4 << 20  # per round trip, asked for or sent
_FIRST_PAUSE, _LONGEST_PAUSE = 0.02, 0.5  # seconds between attempts
_SCHEMES: Final = {"redis": False, "valkey": False, "rediss": True, "valkeys": True}
_FORMS: Final = (
    "redis://HOST:PORT/DB/KEY, redis+cluster://HOST:PORT,HOST:PORT/KEY or"
    " redis+unix:///PATH?key=KEY (also rediss for TLS; valkey, valkeys)"
)


@dataclass(frozen=True, slots=True)
class Place:
    """A key in a server or a cluster.

    Attributes:
        key: Of the image.
        shown: How to name it to people.
        timeout: Seconds that a read may take.
    """

    key: bytes
    shown: str
    timeout: float
    nodes: tuple[tuple[str, int], ...]  #: of a cluster, or the one server; empty: a Unix socket
    cluster: bool
    settings: dict[str, Any]  #: redis-py's, for a connection

    @classmethod
    def parse(cls, url: str) -> Place:
        """Read a URL.

        Raises:
            SourceError: It makes no sense; the message does not repeat its password.
        """
        parts = urlsplit(url)
        scheme, _, way = parts.scheme.partition("+")
        who, at, where = parts.netloc.rpartition("@")
        shown = f"{parts.scheme}://{where}{parts.path}"
        try:
            if scheme not in _SCHEMES or way not in {"", "cluster", "unix"}:
                raise ValueError("its scheme is unknown")
            query = dict(parse_qsl(parts.query, strict_parsing=bool(parts.query)))
            timeout = float(query.pop("timeout", "10"))
            settings: dict[str, Any] = {
                "protocol": 2,
                "socket_timeout": timeout,
                "socket_connect_timeout": timeout,
            }
            if at:
                user, _, password = who.partition(":")
                settings |= {"username": unquote(user) or None, "password": unquote(password)}
            if _SCHEMES[scheme]:
                settings |= _tls_settings(query)
            nodes: tuple[tuple[str, int], ...] = ()
            if way == "unix":
                settings |= {"path": unquote(parts.path), "db": int(query.pop("db", "0"))}
                key = query.pop("key", "")
                if where or _SCHEMES[scheme]:
                    raise ValueError("a Unix socket has no host and no TLS")
                shown += f"?key={key}"
            else:
                nodes = tuple(_host_and_port(each) for each in where.split(","))
                path = parts.path[1:]
                if not way:
                    number, _, path = path.partition("/")
                    settings["db"] = int(number)
                    if len(nodes) > 1:
                        raise ValueError("only a cluster has several hosts")
                key = unquote(path)
            if not key:
                raise ValueError("it names no key")
            if query:
                raise ValueError(f"unknown in the query: {', '.join(query)}")
        except ValueError as error:
            raise SourceError(f"{shown}: {error}; an image is {_FORMS}") from None
        return cls(key.encode(), shown, timeout, nodes, way == "cluster", settings)

    def connect(self) -> Any:
        """Make a client; it connects when it is first used."""
        settings = self.settings | {"max_connections": 2 * _AT_ONCE}
        # One place decides about retries, and knows how long somebody waits: Commands.
        once = Retry(NoBackoff(), 0)
        if self.cluster:
            nodes = [ClusterNode(host, port) for host, port in self.nodes]
            return redis.RedisCluster(startup_nodes=nodes, **settings)
        settings["retry"] = once
        if not self.nodes:
            settings["unix_socket_path"] = settings.pop("path")
            return redis.Redis(**settings)
        (host, port), *_ = self.nodes
        return redis.Redis(host=host, port=port, **settings)


def _tls_settings(query: dict[str, str]) -> dict[str, Any]:
    files = {"ca": "ssl_ca_certs", "cert": "ssl_certfile", "cert_key": "ssl_keyfile"}
    given = {ours: query.pop(name) for name, ours in files.items() if name in query}
    return {"ssl": True, **given}


def _host_and_port(text: str) -> tuple[str, int]:
    parts = urlsplit(f"//{text}")
    if not parts.hostname:
        raise ValueError("it names no host")
    return parts.hostname, parts.port or 6379


def _named(error: Exception) -> Exception:
    """Call redis-py's stumble over a connection that was closed under its writer a lost one.

    Its cluster client closes connections that other tasks are using: all that it has when a
    pipeline failed or the cluster is down, and of a node that failed those that were idle a
    moment ago.  The writing task has looked before whether it is connected; then
    ``_send_packed_command``, which is ``self._writer.writelines`` and ``drain``, finds

    * no writer: AttributeError, seen with redis-py 8.1.0 when a node was killed;
    * or a closed transport: uvloop 0.23.0 raises RuntimeError, seen likewise; asyncio of Python
      3.12.1 and 3.13.0 calls None, TypeError; that of 3.11 says ConnectionResetError.

    Who reads keeps its stream and finds its end.  So it is told by the place: the innermost
    frame of redis-py is that method, in which nothing but the writer can fail.
    """
    if type(error) in {AttributeError, TypeError}:
        if not str(error).startswith("'NoneType' object"):
            return error
    elif type(error) is not RuntimeError:
        return error
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    while frames and not frames[-1].f_globals.get("__name__", "").startswith("redis."):
        frames.pop()  # of the event loop
    if not frames or frames[-1].f_code.co_name != "_send_packed_command":
        return error
    lost = refusals.ConnectionError("the connection was closed while a command was written")
    lost.__cause__ = error
    return lost


class _Waiting:
    """One command that somebody waits for."""

    __slots__ = ("answer", "command", "cost")

    def __init__(self, command: Command, cost: int, answer: asyncio.Future[Any]) -> None:
        self.command = command
        self.cost = cost
        self.answer = answer


class _Lane:
    """Commands that wait, and the round trips that take them."""

    __slots__ = ("queue", "trips")

    def __init__(self) -> None:
        self.queue: deque[_Waiting] = deque()
        self.trips: set[asyncio.Task[None]] = set()


class Commands:
    """Sends commands, many per round trip, until they are answered.

    Sharing: any number of callers, all on one event loop.
    """

    def __init__(self, place: Place) -> None:
        """Prepare; the first command connects."""
        self._place = place
        self._client: Any = place.connect()
        self._short = _Lane()
        self._long = _Lane()
        self._why = "no answer"

    async def first(self, *command: str | bytes | int) -> Any:
        """Send a command once: who has just come wants to hear what is wrong.

        Raises:
            SourceError: It was not answered, or refused.
        """
        try:
            async with asyncio.timeout(self._place.timeout):
                return await self._client.execute_command(*command)
        except TimeoutError:
            why = f"no answer within {self._place.timeout:g} s"
            raise SourceError(f"{self._place.shown}: {why}") from None
        except Exception as raised:
            error = _named(raised)
            if isinstance(error, (refusals.RedisError, refusals.RedisClusterException, OSError)):
                raise SourceError(f"{self._place.shown}: {error}") from error
            raise

    async def send(self, commands: Sequence[tuple[Command, int]]) -> list[Any]:
        """Send commands, each with the bytes it costs, and give their answers in order.

        Raises:
            SourceError: One was refused, or not answered in time.

        Cancellation: they may still be done.
        """
        loop = asyncio.get_running_loop()
        lane = self._long if sum(cost for _, cost in commands) > _LONG else self._short
        answers: list[asyncio.Future[Any]] = []
        for command, cost in commands:
            answer = loop.create_future()
            answers.append(answer)
            lane.queue.append(_Waiting(command, cost, answer))
        if len(lane.trips) < _AT_ONCE:
            trip = loop.create_task(self._travel(lane.queue), name="aiouffd redis")
            lane.trips.add(trip)
            trip.add_done_callback(lane.trips.discard)
        try:
            async with asyncio.timeout(self._place.timeout):
                return [await answer for answer in answers]
        except TimeoutError:
            raise SourceError(
                f"{self._place.shown}: not answered within {self._place.timeout:g} s: {self._why}"
            ) from None
        except BaseException as error:
            if isinstance(error, (refusals.RedisError, refusals.RedisClusterException, OSError)):
                raise SourceError(f"{self._place.shown}: {error}") from error
            raise
        finally:
            for answer in answers:
                # Also of those that failed with one that was raised: seen is seen.
                if not answer.cancel() and not answer.cancelled():
                    answer.exception()

    async def _travel(self, queue: deque[_Waiting]) -> None:
        """Send what waits, trip after trip, until nothing does."""
        pause = 0.0
        while batch := self._next_batch(queue):
            if pause:
                await asyncio.sleep(pause)
            again = await self._send(batch)
            queue.extendleft(reversed(again))
            pause = min(max(_FIRST_PAUSE, 2 * pause), _LONGEST_PAUSE) if again else 0.0

    @staticmethod
    def _next_batch(queue: deque[_Waiting]) -> list[_Waiting]:
        batch: list[_Waiting] = []
        cost = 0
        while queue and len(batch) < _COMMANDS and cost < _BYTES:
            waiting = queue.popleft()
            if not waiting.answer.done():
                batch.append(waiting)
                cost += waiting.cost
        return batch

    async def _send(self, batch: list[_Waiting]) -> list[_Waiting]:
        """Make one round trip; give what has to be sent again."""
        try:
            if len(batch) == 1:
                values = [await self._client.execute_command(*batch[0].command)]
            else:
                values = await self._send_together(batch)
        except Exception as error:  # whatever it is: somebody waits
            values = [error] * len(batch)
        again = []
        for waiting, answer in zip(batch, values, strict=True):
            if waiting.answer.done():
                continue
            value = _named(answer) if isinstance(answer, Exception) else answer
            if isinstance(value, _TRANSIENT) and not isinstance(value, _FINAL):
                self._why = str(value) or type(value).__name__
                again.append(waiting)
            elif isinstance(value, Exception):
                waiting.answer.set_exception(value)
            else:
                waiting.answer.set_result(value)
        return again

    async def _send_together(self, batch: list[_Waiting]) -> list[Any]:
        pipeline = self._client.pipeline(**({} if self._place.cluster else {"transaction": False}))
        for waiting in batch:
            pipeline.execute_command(*waiting.command)
        values: list[Any] = await pipeline.execute(raise_on_error=False)
        return values

    async def aclose(self) -> None:
        """Close the connections; who still waits is told so by their time limit."""
        trips = self._short.trips | self._long.trips
        for trip in trips:
            trip.cancel()
        if trips:
            await asyncio.wait(trips)
        try:
            await self._client.aclose()
        except (refusals.RedisError, refusals.RedisClusterException, OSError):
            pass  # a connection that is lost is closed
