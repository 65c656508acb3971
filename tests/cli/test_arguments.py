"""What stands behind options: read as people write it, refused in a sentence."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import pytest

from aiouffd.cli import arguments, main


@pytest.mark.parametrize(
    "read, text, value",
    [
        (arguments.byte_count, "4096", 4096),
        (arguments.byte_count, "64k", 64 << 10),
        (arguments.byte_count, "1GiB", 1 << 30),
        (arguments.chunk_bytes, "2M", 2 << 20),
        (arguments.chunk_bytes, "0", 0),
        (arguments.seconds, "0.5", 0.5),
        (arguments.seconds, "30s", 30.0),
        (arguments.seconds_or_none, "0", 0.0),
        (arguments.count, "7", 7),
        (arguments.user, "0", 0),
        (arguments.rights, "660", 0o660),
        (arguments.host_and_port, "10.0.0.5:7433", ("10.0.0.5", 7433)),
        (arguments.host_and_port, "[::1]:0", ("::1", 0)),
        (arguments.host_and_port, ":80", ("127.0.0.1", 80)),
    ],
)
def test_what_is_meant_is_read(read: Callable[[str], object], text: str, value: object) -> None:
    """As people write it."""
    assert read(text) == value


@pytest.mark.parametrize(
    "read, wrong",
    [
        (arguments.byte_count, ("", "x", "-1", "1X", "1.5G", "١")),
        (arguments.chunk_bytes, ("", "3K", "x")),
        (arguments.seconds, ("", "0", "-1", "nan", "inf", "1e3", "s")),
        (arguments.seconds_or_none, ("", "-1", "nan", "inf")),
        (arguments.count, ("", "0", "-1", "x", "1.5")),
        (arguments.user, ("", "root", "-1")),
        (arguments.rights, ("", "999", "-1", "0o600", "777777")),
        (arguments.host_and_port, ("", "host", "host:", "host:x", "1:99999")),
    ],
)
def test_what_makes_no_sense_is_refused(
    read: Callable[[str], object], wrong: tuple[str, ...]
) -> None:
    """With a sentence of ours; argparse's own names the function that was asked."""
    for text in wrong:
        with pytest.raises(argparse.ArgumentTypeError, match=r"(is|are) no"):
            read(text)


@pytest.mark.parametrize(
    "options",
    [
        ("--uid", "root"),
        ("--mode", "999"),
        ("--max-sessions", "x"),
        ("--deadline", "x"),
        ("--chunk", "x"),
        ("--cache", "x"),
        ("--record-window", "x"),
        ("--metrics", "x"),
        ("--export", "x"),
    ],
)
def test_no_option_shows_our_names(
    options: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """``invalid _octal value`` helps nobody."""
    with pytest.raises(SystemExit, match="2"):
        main(["serve", "image", "--socket", "socket", *options])
    said = capsys.readouterr().err
    assert f"argument {options[0]}: {options[1]} " in said
