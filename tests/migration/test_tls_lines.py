"""Migrations over TLS: who is let in, who is not, and that both sides say why."""

from __future__ import annotations

import asyncio
import datetime as dt
import logging
import os
import re
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest
import trustme

from aiouffd.errors import MigrationFailed
from aiouffd.migration.listener import Listener
from aiouffd.migration.outgoing import Outgoing, Plan
from aiouffd.migration.tls import client_context, server_context
from tests.migration.ends import Raw, Standing, contents, goes_through, memory_of
from tests.migration.frames import EXTENTS, preamble
from tests.serving import within

EXTENT = EXTENTS[1]


class Authority:
    """An authority, and certificates of its making, as files."""

    def __init__(self, folder: Path) -> None:
        self._ca = trustme.CA()
        self._folder = folder
        self._count = 0
        self.file = os.fspath(folder / "authority.pem")
        self._ca.cert_pem.write_to_path(self.file)

    def issue(self, *names: str, days: int = 1) -> str:
        """Write a certificate and its key into one file; one of fewer days than 0 has expired."""
        until = dt.datetime.now(dt.UTC) + dt.timedelta(days=days)
        issued = self._ca.issue_cert(*names, not_after=until)
        self._count += 1
        file = os.fspath(self._folder / f"{self._count}.pem")
        issued.private_key_and_cert_chain_pem.write_to_path(file)
        return file

    def client(self, *names: str, days: int = 1) -> ssl.SSLContext:
        return client_context(self.issue(*names, days=days), None, self.file)

    def server(self, *names: str, days: int = 1) -> ssl.SSLContext:
        return server_context(self.issue(*names, days=days), None, self.file)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("others"))


async def test_two_of_one_authority_understand_each_other(ours: Authority) -> None:
    """With names checked on both sides, and everything else that can be agreed on."""
    client = ours.client("source.example")
    async with Listener(ssl=ours.server("127.0.0.1"), client_name="source.example") as listener:
        for compress in ("", "zstd"):
            plan = Plan(rounds=0, compress=compress, checksums=True)
            await goes_through(listener, ssl=client, plan=plan)


async def is_refused(
    listener: Listener, caplog: pytest.LogCaptureFixture, ssl: ssl.SSLContext | None, *says: str
) -> None:
    """Let a source come that is not let in.

    Args:
        says: What the source hears, and what the destination logs.
    """
    caplog.clear()
    program = Standing()
    refused = listener.refused
    with memory_of([EXTENT], contents([EXTENT])) as memory:
        outgoing = Outgoing(memory, "127.0.0.1", listener.port, plan=Plan(rounds=0), ssl=ssl)
        with pytest.raises(MigrationFailed) as caught:
            await within(outgoing.run(program))
    assert re.search(says[0], str(caught.value)), caught.value
    assert (caught.value.outcome, program.told) == ("source", [])
    async with asyncio.timeout(10):
        while listener.refused == refused:
            await asyncio.sleep(0.001)
    assert re.search(says[1], caplog.text), caplog.text


#: Contexts of the source and the destination, a name that the source must have, and what the two
#: say of it.
Make = Callable[[Authority, Authority], tuple[ssl.SSLContext, ssl.SSLContext]]


def without_certificate(ours: Authority) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=ours.file)


#: Where the other side's handshake fails: no alert is sent, so that one can but guess.
ACCEPT = "said nothing: .*does it accept our certificate"
BROKEN_OFF = "broke the handshake off .does it accept our certificate"

WRONG: dict[str, tuple[Make, str, str, str]] = {
    "no certificate": (
        lambda ours, others: (without_certificate(ours), ours.server("127.0.0.1")),
        "",
        ACCEPT,
        "(?i)peer.did.not.return.a.certificate",
    ),
    "a source of another authority": (
        lambda ours, others: (
            client_context(others.issue("source.example"), None, ours.file),
            ours.server("127.0.0.1"),
        ),
        "",
        ACCEPT,
        "certificate verify failed: unable to get local issuer",
    ),
    "a destination of another authority": (
        lambda ours, others: (
            ours.client("source.example"),
            server_context(others.issue("127.0.0.1"), None, ours.file),
        ),
        "",
        "shows a certificate that does not hold: unable to get local issuer",
        BROKEN_OFF,
    ),
    "a destination of another name": (
        lambda ours, others: (ours.client("source.example"), ours.server("there.example")),
        "",
        "certificate that does not hold: IP address mismatch, .* '127[.]0[.]0[.]1'",
        BROKEN_OFF,
    ),
    "a source of another name": (
        lambda ours, others: (ours.client("else.example"), ours.server("127.0.0.1")),
        "source.example",
        "shows a certificate that is not for source.example",
        "shows a certificate that is not for source.example",
    ),
    "a source's has expired": (
        lambda ours, others: (ours.client("source.example", days=-1), ours.server("127.0.0.1")),
        "",
        ACCEPT,
        "certificate verify failed: certificate has expired",
    ),
    "a destination's has expired": (
        lambda ours, others: (ours.client("source.example"), ours.server("127.0.0.1", days=-1)),
        "",
        "certificate that does not hold: certificate has expired",
        BROKEN_OFF,
    ),
}


@pytest.mark.parametrize("name", WRONG)
async def test_what_is_wrong_is_named_on_both_sides(
    name: str, ours: Authority, others: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    """Who should be let in is, behind it."""
    make, client_name, source_says, destination_says = WRONG[name]
    client, server = make(ours, others)
    caplog.set_level(logging.INFO)
    async with Listener(ssl=server, client_name=client_name) as listener:
        await is_refused(listener, caplog, client, source_says, destination_says)
        if "destination" not in name:
            right = ours.client(client_name or "source.example")
            await goes_through(listener, ssl=right)
    assert not listener.connections


async def test_one_without_tls_is_told_so(
    ours: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    """By either side, whichever lacks it."""
    caplog.set_level(logging.INFO)
    async with Listener(ssl=ours.server("127.0.0.1")) as listener:
        await is_refused(
            listener, caplog, None, "does it ask for TLS", "(?i)wrong.version|packet|request"
        )
        await goes_through(listener, ssl=ours.client("source.example"))
    async with Listener() as listener:
        client = ours.client("source.example")
        await is_refused(listener, caplog, client, "does not speak TLS", "but TLS, which this side")
        await goes_through(listener)


async def test_a_handshake_that_goes_nowhere_keeps_nobody_out(ours: Authority) -> None:
    """Half of one, or something else than one."""
    async with Listener(ssl=ours.server("127.0.0.1")) as listener:
        raws = [await Raw.open(listener.port) for _ in range(20)]
        for number, raw in enumerate(raws):
            raw.say((b"", b"\x16\x03\x01\x02\x00\x01", preamble(), b"\x80" * 100)[number % 4])
        await goes_through(listener, ssl=ours.client("source.example"))
        for raw in raws:
            raw.close()


def test_contexts_that_let_everybody_in_are_refused(ours: Authority) -> None:
    """TLS that asks for no certificate is no check of who comes."""
    context = server_context(ours.issue("127.0.0.1"), None, ours.file)
    for mode in (ssl.CERT_NONE, ssl.CERT_OPTIONAL):
        context.verify_mode = mode
        with pytest.raises(ValueError, match="CERT_REQUIRED"):
            Listener("0.0.0.0", ssl=context)
    context.verify_mode = ssl.CERT_REQUIRED
    Listener("0.0.0.0", ssl=context)
