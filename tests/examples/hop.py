"""A machine of examples/kvm_guest.py goes on with a state, for a while, in a process of its own.

    python -m tests.examples.hop RAM PASSES SECONDS      state on stdin, and on stdout

It runs for so many passes, and is stopped after so many seconds more, wherever it is then.
"""

from __future__ import annotations

import mmap
import os
import sys
import time

from kvm_guest import Machine


def main(ram: int, passes: int, seconds: float) -> None:
    state = sys.stdin.buffer.read()
    with mmap.mmap(ram, os.fstat(ram).st_size) as memory, Machine(memory) as machine:
        if state:
            machine.load(state)
        machine.start()
        machine.wait_for_pass(machine.passes + passes)
        time.sleep(seconds)  # an instant; nobody waits for anything
        machine.stop()
        sys.stdout.buffer.write(machine.save())


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
