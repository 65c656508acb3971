"""The manifest: what must be known of a session to serve it on in another process.

Knows: regions, the peer, the image, how they are written down.
Must not know: descriptors, where the manifest is kept.

Law of this file: what it cannot read it refuses with a reason.  A manifest is written by a
program of perhaps another version, and guessing would serve wrong bytes.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Final, Self

from .errors import PeerError
from .handover import HandedRegion
from .uffd import Mode

VERSION: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """One session, or one child that its target has forked.

    Attributes:
        session: The session's id, ``3``; a child's is ``3.1``, its child's ``3.1.1``.
        name: Under which its descriptors are stored.
        regions: The memory, as it was handed over.
        image: The identity of the source; empty if it has none.
        image_size: Of the source, in bytes.
        dialect: Which protocol the peer spoke.
        on_close: What becomes of missing pages; the value of an Action.
        peer: (pid, uid, gid) of the target; None for a forked child.
        others: (device, inode) of further descriptors that were handed over, in order.
        part: Which part of the image it is, where images have parts.
        zero_elsewhere: What is registered and lies in no region reads zero.
        alone: The target has no copy of its own of the userfaultfd.
    """

    session: str
    name: str
    regions: tuple[HandedRegion, ...]
    image: str
    image_size: int
    dialect: str
    on_close: str
    peer: tuple[int, int, int] | None = None
    others: tuple[tuple[int, int], ...] = ()
    part: str = ""
    zero_elsewhere: bool = False
    alone: bool = False

    def child(self, fork: int) -> Self:
        """Give the manifest of a forked child."""
        return dataclasses.replace(
            self,
            session=f"{self.session}.{fork}",
            name=f"{self.name}.{fork}",
            peer=None,
            others=(),
        )

    def to_json(self) -> bytes:
        """Write it down."""
        fields = {"version": VERSION} | dataclasses.asdict(self)
        return json.dumps(fields, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """Read what ``to_json`` wrote.

        Raises:
            PeerError: It is of another version, or none at all.
        """
        try:
            fields: dict[str, Any] = json.loads(data)
            version = fields.pop("version")
            if version == VERSION:
                fields["regions"] = tuple(
                    HandedRegion(**one | {"modes": Mode(one["modes"])}) for one in fields["regions"]
                )
                fields["others"] = tuple((dev, ino) for dev, ino in fields["others"])
                if fields["peer"] is not None:
                    pid, uid, gid = fields["peer"]
                    fields["peer"] = (pid, uid, gid)
                return cls(**fields)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PeerError(f"the manifest of a stored session cannot be read: {error}") from error
        raise PeerError(
            f"the manifest of a stored session is of version {version!r}; this program reads"
            f" version {VERSION}"
        )
