"""The program that moves in bench_migration: moving.c's work, with the few words that it takes.

    python -m benchmarks.moving_program SOCKET MIB WRITES

It says ``ready`` when it can be sent away, ``complete N`` when it has arrived with all of its
memory and has checked it N times, and ends with status 3 if a check fails.

Knows: program.Movable and program.arrive, how to call C.
Must not know: where it goes.
"""

from __future__ import annotations

import ctypes
import math
import os
import struct
import sys
import threading
import time
from typing import Final, NoReturn

from aiouffd.migration import program

from .build import compile_library

PAGE: Final = 4096
_STATE: Final = struct.Struct("<QQQQ")
_GOLDEN: Final = 0.618
_ROUNDS: Final = 2  # the second has begun behind the end of the migration


class _Worker(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in ("count", "written", "read", "rounds", "may_run", "stands_still", "wrong")
    )


def stride(pages: int) -> int:
    """Give a step that visits each page once, in scattered order."""
    step = int(pages * _GOLDEN) | 1
    while math.gcd(step, pages) != 1:
        step += 2
    return step


def main(path: str, mib: int, writes: float) -> NoReturn:
    """Work until it has moved, or has arrived and is complete."""
    library = ctypes.CDLL(str(compile_library("moving.c")))
    arrived = program.arrive()
    worker = _Worker(count=1)
    if arrived is None:
        memory = program.ProgramMemory.create("memory", mib << 20)
        library.fill(ctypes.c_void_p(memory.address), ctypes.c_uint64(memory.length // PAGE))
    else:
        memory = arrived.memory["memory"]
        worker.count, worker.written, worker.read, worker.rounds = _STATE.unpack(arrived.state)
    pages = memory.length // PAGE
    numbers = (pages, int(pages * writes), stride(pages))
    thread = threading.Thread(
        target=library.work,
        args=(
            ctypes.byref(worker),
            ctypes.c_void_p(memory.address),
            *map(ctypes.c_uint64, numbers),
        ),
        daemon=True,
    )

    def stop() -> bytes:
        worker.stands_still = worker.may_run = 0
        while not worker.stands_still:
            time.sleep(0.00005)
        return _STATE.pack(worker.count, worker.written, worker.read, worker.rounds)

    def restart() -> None:
        worker.may_run = 1

    worker.may_run = 1
    thread.start()
    if arrived is None:
        with program.Movable(path, [memory], stop=stop, restart=restart, name="moving") as movable:
            print("ready", flush=True)
            movable.wait_ended()
        _end(worker)
    arrived.note_running()
    arrived.wait_complete()
    last = worker.rounds + _ROUNDS
    while worker.rounds < last and not worker.wrong:
        time.sleep(0.001)
    print("complete", worker.rounds, flush=True)
    _end(worker)


def _end(worker: _Worker) -> NoReturn:
    """End here: the thread is in C, on memory that Python would unmap beneath it."""
    sys.stdout.flush()
    os._exit(3 if worker.wrong else 0)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
