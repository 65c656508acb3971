"""What a web server's answer to a ranged request says: pure, from status and headers.

Knows: RFC 9110: Content-Range, validators (ETag, Last-Modified), Retry-After, redirects.
Must not know: connections, aiohttp, the event loop.

Laws of this file:

* An image is pinned to its length and its validators.  A strong ETag is proof: it changes
  with every byte.  A weak one (``W/"..."``) and Last-Modified (which ticks in seconds) are
  compared as well; that they are the same proves less, that they differ proves a change.
* An image of which no answer says any of the three cannot be told from its successor: refused.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final

REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})

#: "Not now": the same request may well succeed later.  All of 5xx but these two count too.
_LATER: Final = frozenset({408, 425, 429})
_NEVER: Final = frozenset({501, 505})

_CONTENT_RANGE: Final = re.compile(
    r"bytes\s+(?:(\d{1,19})-(\d{1,19})|\*)/(\d{1,19})", re.IGNORECASE | re.ASCII
)


def may_help_later(status: int) -> bool:
    """Say whether a status asks to try the same request again."""
    return status in _LATER or (500 <= status < 600 and status not in _NEVER)


@dataclass(frozen=True, slots=True)
class ContentRange:
    """Which bytes of how many an answer carries; ``start`` is -1 where it carries none."""

    start: int
    length: int
    size: int

    @classmethod
    def parse(cls, text: str | None) -> ContentRange | None:
        """Read a Content-Range header; None if it is not one, or does not say the size."""
        match = _CONTENT_RANGE.fullmatch((text or "").strip())
        if match is None:
            return None
        first, last, size = match.groups()
        if first is None:
            return cls(-1, 0, int(size))
        return cls(int(first), int(last) - int(first) + 1, int(size))


@dataclass(frozen=True, slots=True)
class Generation:
    """One generation of an image, as its server tells it.

    Attributes:
        size: Its length, in bytes.
        etag: Its ETag, or "".
        modified: Its Last-Modified, or "".
    """

    size: int
    etag: str
    modified: str

    @classmethod
    def of(cls, size: int, headers: Mapping[str, str]) -> Generation:
        """Take the validators from an answer's headers."""
        return cls(size, headers.get("ETag", ""), headers.get("Last-Modified", ""))

    @property
    def known(self) -> bool:
        """Say whether a later generation could be told from this one."""
        return bool(self.etag or self.modified)

    @property
    def strong(self) -> bool:
        """Say whether the ETag proves that no byte differs."""
        return self.etag.startswith('"')

    @property
    def condition(self) -> dict[str, str]:
        """Give the header that has the server itself refuse (412) another generation."""
        if self.strong:
            return {"If-Match": self.etag}
        return {"If-Unmodified-Since": self.modified} if self.modified else {}

    def identity(self, name: str) -> str:
        """Name the generation in a word.

        Args:
            name: The image's URL: two images may have the same time and length, and in some
                servers an ETag is no more than that.
        """
        best = self.etag if self.strong or not self.modified else self.modified
        return "http:" + hashlib.sha256(f"{name}\n{best}\n{self.size}".encode()).hexdigest()

    def difference(self, other: Generation) -> str:
        """Say in words what differs; "" if nothing does that both have.

        With equal strong ETags Last-Modified may differ: several servers behind one name
        often disagree on it.
        """
        if other.size != self.size:
            return f"its size went from {self.size} to {other.size} bytes"
        if self.etag and other.etag and self.etag != other.etag:
            return f"its ETag went from {self.etag} to {other.etag}"
        if not self.strong and self.modified and other.modified and self.modified != other.modified:
            return f"its Last-Modified went from {self.modified!r} to {other.modified!r}"
        return ""

    def is_shown_by(self, other: Generation) -> bool:
        """Say whether an answer carries enough to be compared with this generation."""
        return bool(other.etag) if self.etag else bool(other.modified)


def retry_after(text: str | None, now: datetime | None = None) -> float:
    """Read a Retry-After header: the seconds to wait, 0 if it says nothing usable."""
    text = (text or "").strip()
    if text.isdecimal():
        return float(text[:9])
    try:
        when = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return 0.0
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    return max((when - (now or datetime.now(UTC))).total_seconds(), 0.0)
