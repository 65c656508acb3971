"""aiouffd.manifest: what is written of a session, and what is refused."""

from __future__ import annotations

import json

import pytest

from aiouffd.errors import PeerError
from aiouffd.handover import HandedRegion
from aiouffd.manifest import Manifest
from aiouffd.uffd import Mode

MANIFEST = Manifest(
    session="3",
    name="aiouffd-session-x",
    regions=(HandedRegion(0x1000, 0x2000, 0, 0x1000, Mode.MISSING | Mode.WP),),
    image="file 1",
    image_size=0x2000,
    dialect="Firecracker",
    on_close="poison",
    peer=(1, 2, 3),
    others=((4, 5),),
    alone=True,
)


def test_round_trip() -> None:
    """What is written is read again; a child's has its own name and no pinned process."""
    assert Manifest.from_json(MANIFEST.to_json()) == MANIFEST
    grandchild = MANIFEST.child(1).child(2)
    assert (grandchild.session, grandchild.name) == ("3.1.2", "aiouffd-session-x.1.2")
    assert grandchild.peer is None
    assert Manifest.from_json(grandchild.to_json()) == grandchild


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"version": 2}, "version 2"),
        ({"regions": [{}]}, "cannot be read"),
        ({"peer": 5}, "cannot be read"),
        ({"unheard of": 1}, "cannot be read"),
        ({"others": [1]}, "cannot be read"),
    ],
)
def test_refuses_what_it_cannot_read(change: dict[str, object], why: str) -> None:
    """Another version, and whatever is no manifest, is refused with a reason."""
    fields = json.loads(MANIFEST.to_json()) | change
    with pytest.raises(PeerError, match=why):
        Manifest.from_json(json.dumps(fields).encode())


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b"\xff", b"7"])
def test_refuses_what_is_none(text: bytes) -> None:
    """Bytes of any kind are refused, not crashed on."""
    with pytest.raises(PeerError, match="cannot be read"):
        Manifest.from_json(text)
