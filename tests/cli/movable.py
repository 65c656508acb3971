"""A small program that can move, for tests of what moves it.

    python -m tests.cli.movable SOCKET [MIB [FLAW]]

It writes one page after the other, all the time, and looks at each before it writes it again: a
step that is lost or done twice ends it with status 3.  FLAW is what it does wrong on arrival:
``ends`` (before it takes its memory) or ``fails`` (when it should run).  ``stays`` is none: it runs
until its stdin ends.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
import threading
from typing import Any, Final

from aiouffd.kernel.parent import die_with_parent
from aiouffd.migration.program import ARRIVAL_VARIABLE, Movable, ProgramMemory, arrive

PAGE: Final = 4096
_AFTERWARDS: Final = 100  # steps once all memory is here
_COUNT: Final = struct.Struct("<Q")


def _say(**value: Any) -> None:
    sys.stdout.write(json.dumps(value) + "\n")  # at once: others write there, too
    sys.stdout.flush()


def written(memory: ProgramMemory) -> int:
    """Say how much of it is ever written to, in bytes: the last quarter stays zeros."""
    return memory.length * 3 // 4


class _Writer(threading.Thread):
    def __init__(self, memory: ProgramMemory, steps: int) -> None:
        super().__init__(daemon=True)
        self.memory = memory
        self.steps = steps
        self.turn = threading.Lock()  # held during a step
        self.pause = threading.Event()

    def run(self) -> None:
        pages = written(self.memory) // PAGE
        while True:
            with self.turn:
                at = self.steps % pages * PAGE
                (before,) = _COUNT.unpack_from(self.memory.map, at)
                if before != max(self.steps - pages, 0):
                    _say(wrong=[self.steps, before])
                    os._exit(3)
                _COUNT.pack_into(self.memory.map, at, self.steps)
                self.steps += 1
            self.pause.wait(0.0005)

    def stop(self) -> bytes:
        self.turn.acquire()
        return str(self.steps).encode()


def main(path: str, mib: str = "4", flaw: str = "") -> None:
    """Run until it has moved, or until it has all of its memory."""
    if flaw == "ends" and ARRIVAL_VARIABLE in os.environ:
        sys.exit(5)
    arrival = arrive()
    if arrival is None:
        die_with_parent(signal.SIGKILL)
        memory, steps = ProgramMemory.create("heap", int(mib) << 20), 0
        memory.map[: written(memory)] = os.urandom(PAGE) * (written(memory) // PAGE)
        for page in range(written(memory) // PAGE):
            _COUNT.pack_into(memory.map, page * PAGE, 0)
    else:
        memory, steps = arrival.memory["heap"], int(arrival.state)
    if flaw == "fails" and arrival is not None:
        sys.exit(5)
    writer = _Writer(memory, steps)
    with Movable(
        path, [memory], stop=writer.stop, restart=writer.turn.release, name="movable"
    ) as movable:
        writer.start()
        if arrival is None:
            _say(ready=writer.steps, pid=os.getpid())
            movable.wait_ended()
            _say(left=writer.steps)
            return
        arrival.note_running()
        _say(began=steps, pid=os.getpid())
        arrival.wait_complete()
        complete = writer.steps
        while writer.steps < complete + _AFTERWARDS:
            writer.pause.wait(0.001)
        _say(ended=writer.steps)
        if flaw == "stays":
            sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
