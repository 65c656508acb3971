"""Where a thread stands: in which system call, and in which file's code: ``libparse.so+0x1139``.

Knows: a thread's file in /proc that says so, the executable mappings of /proc/PID/maps.
Must not know: symbols; ``addr2line -e FILE OFFSET`` has those.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from contextlib import suppress
from typing import Final

from ..kernel import tracing

_AT_MOST: Final = 64  # processes whose maps are kept, threads whose files are


class Calls:
    """Which system calls threads are in; their files are kept open, for each touch asks.

    Sharing: one thread.
    """

    def __init__(self) -> None:
        """Begin with no thread known."""
        self._files: dict[tuple[int, int], int] = {}

    def find(self, process: int, thread: int) -> tuple[int | None, int]:
        """Give a thread's system call or None, and its program counter; 0 if not known."""
        key = process, thread
        try:
            if (file := self._files.get(key)) is not None:
                with suppress(ProcessLookupError):
                    return tracing.read_call_file(file)
                os.close(self._files.pop(key))  # of a thread that had the number before
            if len(self._files) >= _AT_MOST:
                self.close()
            self._files[key] = file = tracing.open_call_file(process, thread)
            return tracing.read_call_file(file)
        except OSError:
            return None, 0

    def forget(self, process: int) -> None:
        """Close what belongs to a process that has ended."""
        for key in [key for key in self._files if key[0] == process]:
            os.close(self._files.pop(key))

    def close(self) -> None:
        """Close what it looks with."""
        while self._files:
            os.close(self._files.popitem()[1])


class Places:
    """Code addresses of processes, by their maps; read again when an address is in none.

    Sharing: one thread.
    """

    def __init__(self) -> None:
        """Begin with no process known."""
        self._maps: dict[int, list[tuple[int, int, int, str]]] = {}

    def name(self, process: int, pc: int) -> str:
        """Name the file and the offset in it at which an address lies; empty if in none."""
        if not pc:
            return ""
        found = self._find(process, pc)
        if found is None:
            self._read(process)
            found = self._find(process, pc)
        if found is None:
            return ""
        start, _, offset, path = found
        return f"{path}+{pc - start + offset:#x}"

    def _find(self, process: int, pc: int) -> tuple[int, int, int, str] | None:
        maps = self._maps.get(process, ())
        index = bisect_right(maps, pc, key=lambda each: each[0]) - 1
        if index >= 0 and maps[index][0] <= pc < maps[index][1]:
            return maps[index]
        return None

    def _read(self, process: int) -> None:
        found = []
        try:
            with open(f"/proc/{process}/maps", encoding="utf-8", errors="replace") as file:
                for line in file:
                    fields = line.split(maxsplit=5)
                    if "x" in fields[1] and len(fields) == 6:
                        start, _, end = fields[0].partition("-")
                        path = os.path.basename(fields[5].rstrip("\n"))
                        found.append((int(start, 16), int(end, 16), int(fields[2], 16), path))
        except OSError:
            pass  # ended, or not ours to look into: its code has no name
        if len(self._maps) >= _AT_MOST:
            self._maps.clear()
        self._maps[process] = found
