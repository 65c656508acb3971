"""``aiouffd working-set``: showing, combining, comparing."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from aiouffd.cli import main
from aiouffd.working_set import GRANULE, Header, WorkingSet, pack_record

HEADER = Header(identity="image-1", image_size=2048 * GRANULE, when=1.7e9, window=30.0)


def recorded(path: Path, *pages: int, header: Header = HEADER) -> str:
    """Write a set as a recording does."""
    records = b"".join(pack_record(page * GRANULE, 1000 * page, 1) for page in pages)
    path.write_bytes(header.encode() + records)
    return str(path)


def test_show_says_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """How much, of which image, from when; and where it lies, a row per eighth."""
    path = recorded(tmp_path / "set", *range(256, 512), 700, 701, 1024)
    assert main(["working-set", "show", path]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "image    8.0 MiB, image-1"
    assert lines[1] == "set      1.0 MiB, 12.6% of the image, in 3 runs"
    assert "recorded for 30 s, 259 records, pages of 4096 bytes" in lines[2]
    picture = lines[4:12]
    assert [line[15:] for line in picture[:2]] == [f"|{' ' * 64}|", f"|{'█' * 64}|"]
    assert picture[2].count("▓") == 1
    assert picture[4][15:18] == "|▒ "
    assert picture[1].startswith("     1,048,576 |")
    assert lines[12].endswith("a cell is 16.0 KiB: ░ up to 1/4, ▒ 1/2, ▓ 3/4, █ all")


def test_a_file_says_nothing_to_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Control characters of an identity are spelled out."""
    header = replace(HEADER, identity="it\x1b[2Jem \u202eé")
    path, other = recorded(tmp_path / "set", header=header), recorded(tmp_path / "other")
    assert main(["working-set", "show", path]) == 0
    assert capsys.readouterr().out.splitlines()[0] == r"image    8.0 MiB, it\x1b[2Jem \u202eé"
    assert main(["working-set", "compare", path, other]) == 1
    assert r"it\x1b[2Jem" in capsys.readouterr().err


def test_a_terminal_without_blocks_gets_letters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ASCII says the same."""
    path = recorded(tmp_path / "set", *range(256, 512))
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert main(["working-set", "show", path]) == 0
    sys.stdout.flush()
    assert f"|{'#' * 64}|" in raw.getvalue().decode("ascii")


def test_show_for_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Everything by name; bad records are counted and said on stderr."""
    path = recorded(tmp_path / "set", 1, 2, 4000)
    assert main(["working-set", "show", path, "--json"]) == 0
    out, error = capsys.readouterr()
    fields = json.loads(out)
    assert fields["bytes"] == 2 * GRANULE
    assert fields["share"] == 2 / 2048
    assert (fields["runs"], fields["records"], fields["skipped"]) == (1, 2, 1)
    assert (fields["identity"], fields["image_size"]) == ("image-1", 2048 * GRANULE)
    assert fields["densities"][:2] == [0.5, 0]
    assert len(fields["densities"]) == 512
    assert "1 bad records left out; the first: 1 granules at offset 0xfa0000" in error


def test_a_tiny_image_is_drawn_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fewer pages than cells; a set whose image is not known."""
    header = Header(identity="", image_size=3 * GRANULE)
    path = recorded(tmp_path / "set", 1, header=header)
    assert main(["working-set", "show", path]) == 0
    out = capsys.readouterr().out
    assert "| █ |" in out
    assert "which one is not known" in out


@pytest.mark.parametrize(
    ("options", "expected"),
    [((), {1, 2, 3, 4}), (("--at-least", "2"), {2, 3}), (("--all",), {3})],
)
def test_combine(
    options: tuple[str, ...],
    expected: set[int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Union, at least so many, intersection; the result is a set like any other."""
    files = [
        recorded(tmp_path / str(number), *pages)
        for number, pages in enumerate([(1, 2, 3), (2, 3, 4), (3,)])
    ]
    output = str(tmp_path / "all")
    assert main(["working-set", "combine", *files, "-o", output, *options]) == 0
    assert "of the image" in capsys.readouterr().out
    one = WorkingSet.load(output)
    assert {page for page in range(2048) if page in one} == expected
    assert main(["working-set", "combine", output, "-o", output, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == len(expected) * GRANULE
    assert main(["working-set", "show", output]) == 0
    assert "combined" in capsys.readouterr().out


def test_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What both have, what only one has, and one number for it."""
    first = recorded(tmp_path / "a", 1, 2, 3)
    second = recorded(tmp_path / "b", 2, 3, 4, 5)
    assert main(["working-set", "compare", first, second]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["8.0", "KiB", "40.0%", "in", "both"]
    assert lines[1].endswith(f"20.0%  only in {first}")
    assert lines[3] == "alike (Jaccard): 0.400"
    assert main(["working-set", "compare", first, second, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "both_bytes": 2 * GRANULE,
        "only_first_bytes": GRANULE,
        "only_second_bytes": 2 * GRANULE,
        "jaccard": 0.4,
    }


def test_what_does_not_belong_together_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Status 1 and one line; what cannot be asked for is status 2."""
    first = recorded(tmp_path / "a", 1)
    other = recorded(
        tmp_path / "b", 1, header=Header(identity="image-2", image_size=2048 * GRANULE)
    )
    unknown = recorded(tmp_path / "c", 2, header=Header(identity="", image_size=2048 * GRANULE))
    output = str(tmp_path / "out")
    assert main(["working-set", "compare", first, other]) == 1
    assert "another generation" in capsys.readouterr().err
    assert main(["working-set", "combine", first, unknown, "-o", output]) == 1
    assert "does not say which image" in capsys.readouterr().err
    assert main(["working-set", "combine", first, unknown, "-o", output, "--any-image"]) == 0
    for wrong in ("0", "3"):
        arguments = ["working-set", "combine", first, unknown, "-o", output, "--at-least", wrong]
        assert main(arguments) == 2
    (tmp_path / "none").write_bytes(b"none")
    assert main(["working-set", "show", str(tmp_path / "none")]) == 1
    assert main(["working-set", "show", str(tmp_path / "nothing")]) == 1
    with pytest.raises(SystemExit):
        main(["working-set"])
