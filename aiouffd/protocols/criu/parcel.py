"""The images of a checkpoint as one value that can be sent, without what is brought lazily.

Knows: which images there are, what of the files of pages a lazy restore reads at once.
Must not know: connections; who sends it where.

A parcel begins with a line that says what it is, then come the length of its list (u32) and the
list, in JSON: notes of the sender, and of each file its name, length and the stretches of it that
follow.  Behind the list lie their bytes, one after the other.

Laws of this file:

* A parcel comes from elsewhere, and is unpacked by root: names are plain names of images, numbers
  are checked before they are used, and nothing is written but into new files of one folder.
* Pages that a lazy restore does not read are holes where it is unpacked, and the folder is marked
  as a stripped copy: nobody serves the holes as pages.
"""

from __future__ import annotations

import json
import os
import re
import struct
from typing import Any, Final

from ...errors import PeerError, SourceError
from .checkpoint import STRIPPED, Checkpoint

_MAGIC: Final = b"aiouffd checkpoint 1\n"
_LENGTH: Final = struct.Struct("<I")
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@+-]{0,200}\.img")
_MOST_FILES: Final = 1 << 17
_MOST_LENGTH: Final = 1 << 46  # bytes of one file, holes and all
_FLAGS: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def pack(checkpoint: Checkpoint, notes: dict[str, Any]) -> bytes:
    """Put the images of a checkpoint into a parcel.

    Args:
        checkpoint: In a folder of this machine, without parents.
        notes: What else the receiver is to know, for JSON.

    Raises:
        SourceError: It lies elsewhere, or leans on a parent.
        OSError: An image cannot be read.
    """
    folder = checkpoint.chain.folders[0].path
    if folder is None:
        raise SourceError(f"{checkpoint.location} is no folder of this machine")
    stretches = _at_once(checkpoint)
    files: list[tuple[str, int, list[tuple[int, int]]]] = []
    bodies: list[bytes] = []
    for name in sorted(
        entry.name
        for entry in os.scandir(folder)
        if entry.name.endswith(".img") and entry.is_file(follow_symlinks=False)
    ):
        fd = os.open(os.path.join(folder, name), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with open(fd, "rb") as file:
            length = os.fstat(fd).st_size
            runs = stretches.get(name, [(0, length)] if length else [])
            for offset, size in runs:
                file.seek(offset)
                body = file.read(size)
                if len(body) != size:
                    raise SourceError(f"{name} is cut short")
                bodies.append(body)
        files.append((name, length, runs))
    head = json.dumps({"notes": notes, "files": files}).encode()
    return b"".join((_MAGIC, _LENGTH.pack(len(head)), head, *bodies))


def unpack(parcel: bytes, folder: str) -> dict[str, Any]:
    """Lay the images of a parcel into a folder, which has none of their names.

    Returns:
        The sender's notes.

    Raises:
        PeerError: It is no parcel, or one that cannot be right.
        OSError: The images cannot be written.
    """
    at = len(_MAGIC) + _LENGTH.size
    if not parcel.startswith(_MAGIC) or len(parcel) < at:
        raise PeerError("sent something that is no checkpoint")
    (size,) = _LENGTH.unpack_from(parcel, len(_MAGIC))
    try:
        head = json.loads(parcel[at : at + size])
    except (ValueError, RecursionError) as error:
        raise PeerError(f"sent a checkpoint whose list cannot be read: {error}") from error
    at += size
    notes, files = _checked(head, len(parcel) - at)
    view = memoryview(parcel)
    directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.close(os.open(STRIPPED, _FLAGS, 0o600, dir_fd=directory))
        for name, length, runs in files:
            fd = os.open(name, _FLAGS, 0o600, dir_fd=directory)
            with open(fd, "wb") as file:
                for offset, count in runs:
                    file.seek(offset)
                    file.write(view[at : at + count])
                    at += count
                file.truncate(length)
    finally:
        os.close(directory)
    return notes


_Files = list[tuple[str, int, list[tuple[int, int]]]]


def _checked(head: object, rest: int) -> tuple[dict[str, Any], _Files]:
    """Look whether a list can be right.

    Args:
        head: What the JSON was.
        rest: Bytes that follow it.
    """
    if not isinstance(head, dict):
        raise PeerError("sent a checkpoint without a list")
    notes, listed = head.get("notes"), head.get("files")
    if not isinstance(notes, dict) or not isinstance(listed, list) or len(listed) > _MOST_FILES:
        raise PeerError("sent a checkpoint without notes and a list of files")
    files: _Files = []
    names: set[str] = set()
    for each in listed:
        if not isinstance(each, list) or len(each) != 3:
            raise PeerError("sent a checkpoint with a file that is not described")
        name, length, runs = each
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name in names:
            raise PeerError(f"sent a checkpoint with a file named {str(name)[:80]!r}")
        if not _is_count(length) or length > _MOST_LENGTH or not isinstance(runs, list):
            raise PeerError(f"sent a checkpoint whose {name} has no length")
        end, checked = 0, []
        for run in runs:
            if not isinstance(run, list) or len(run) != 2 or not all(map(_is_count, run)):
                raise PeerError(f"sent a checkpoint whose {name} has a piece without a place")
            offset, count = run
            if offset < end or offset + count > length:
                raise PeerError(f"sent a checkpoint whose {name} has pieces that do not fit in")
            end = offset + count
            rest -= count
            checked.append((offset, count))
        names.add(name)
        files.append((name, length, checked))
    if rest:
        raise PeerError("sent a checkpoint that is shorter or longer than its list says")
    return notes, files


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _at_once(checkpoint: Checkpoint) -> dict[str, list[tuple[int, int]]]:
    """Find what of each process's file of pages a lazy restore reads itself."""
    found: dict[str, list[tuple[int, int]]] = {}
    for task in checkpoint.tasks:
        if task.dead:
            continue
        memory = checkpoint.memory(task.pid)
        for file in memory.files:
            if file.level:
                raise SourceError(f"{checkpoint.location} leans on a parent")
            found.setdefault(file.name, [])
        for run in memory.runs:
            if run.file >= 0 and not run.lazy:
                found[memory.files[run.file].name].append((run.place, run.length))
    return {name: _joined(sorted(runs)) for name, runs in found.items()}


def _joined(runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for offset, length in runs:
        if joined and offset <= joined[-1][0] + joined[-1][1]:
            start, before = joined[-1]
            joined[-1] = start, max(before, offset + length - start)
        else:
            joined.append((offset, length))
    return joined
