"""Pictures in a terminal: rows of cells, the darker the more; and text that does it no harm.

Knows: what stdout can show.
Must not know: what is drawn.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Final

CELLS: Final = 64  #: in a row
ROWS: Final = 8

_BLOCKS: Final = " ░▒▓█"
_ASCII: Final = " .:*#"


def can_show(text: str) -> bool:
    """Say whether stdout has all characters of a text."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def shades() -> str:
    """Give five characters, from nothing to all."""
    return _BLOCKS if can_show(_BLOCKS) else _ASCII


def shade_of(density: float, of: str) -> str:
    """Choose one of the ``shades`` for a share from 0 to 1."""
    return of[min(int(density * 4) + 1, 4) if density else 0]


def scale(of: str) -> str:
    """Say what the ``shades`` mean."""
    return ", ".join(
        f"{of[n]} {text}" for n, text in ((1, "up to 1/4"), (2, "1/2"), (3, "3/4"), (4, "all"))
    )


def rows(cells: Iterable[str], labels: Iterable[str]) -> Iterator[str]:
    """Lay cells out in rows, each behind its label."""
    text = "".join(cells)
    for at, label in zip(range(0, len(text), CELLS), labels, strict=True):
        yield f"{label:>14} |{text[at : at + CELLS]}|"


def printable(text: str) -> str:
    """Make text of a file harmless for a terminal."""
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in text)
