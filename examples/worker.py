"""A program that can move: threads that write all the time, and whose every step can be checked.

    python examples/worker.py SOCKET        begins afresh, or arrives (see migrate_worker.py)

Each thread has 64 MiB and writes one page of it after the other, far apart.  Step k fills its page
with k and a hash of what steps k - 1 and k - 1000 have left, read back from memory: a step that
is lost, done twice, or done on old bytes breaks the chain, and later ones cannot mend it.
"""

import hashlib
import json
import sys
import threading
import time
from collections import deque

from aiouffd.migration.program import Movable, ProgramMemory, arrive

PAGE, LINK = 4096, 32
THREADS = 4
PAGES = (256 << 20) // PAGE // THREADS  # of each thread; a power of two
STRIDE = 10007  # odd: every page has its turn
BACK = 1000
AFTERWARDS = 500  # steps of each thread once all memory is here


class Writer(threading.Thread):
    """One thread, and the pages that are its own."""

    def __init__(self, memory: ProgramMemory, number: int, steps: int) -> None:
        super().__init__(daemon=True)
        self.memory, self.number, self.steps = memory.map, number, steps
        self.turn = threading.Lock()  # held during a step: who takes it stops the thread

    def place(self, step: int) -> int:
        return (self.number * PAGES + step * STRIDE % PAGES) * PAGE

    def left_by(self, step: int) -> bytes:
        place = self.place(step)
        return self.memory[place : place + LINK]

    def link(self, step: int, before: bytes, long_before: bytes) -> bytes:
        count = step.to_bytes(8, "little")
        text = count + before + long_before
        return count + hashlib.blake2b(text, digest_size=LINK - 8).digest()

    def step(self) -> None:
        step, here = self.steps, self.place(self.steps)
        link = self.link(step, self.left_by(step - 1), self.left_by(step - BACK))
        self.memory[here : here + PAGE] = link * (PAGE // LINK)
        self.steps += 1

    def run(self) -> None:
        while True:
            with self.turn:
                self.step()
            time.sleep(0.0002 * (1 + self.number))  # each at a speed of its own

    def wrong_pages(self) -> int:
        """Do all steps again, without the memory, and compare every byte of it."""
        links, wrong = deque([bytes(LINK)] * BACK, BACK), 0
        for step in range(self.steps):
            link = self.link(step, links[-1], links[0])
            links.append(link)
            if step >= self.steps - PAGES:
                here = self.place(step)
                wrong += self.memory[here : here + PAGE] != link * (PAGE // LINK)
        return wrong


def say(**value: object) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def main() -> None:
    arrival = arrive()
    if arrival is None:
        memory = ProgramMemory.create("state", THREADS * PAGES * PAGE)
        began = [0] * THREADS
    else:
        memory, began = arrival.memory["state"], json.loads(arrival.state)
    writers = [Writer(memory, number, steps) for number, steps in enumerate(began)]

    def steps() -> list[int]:
        return [writer.steps for writer in writers]

    def stop() -> bytes:
        for writer in writers:
            writer.turn.acquire()
        return json.dumps(steps()).encode()

    def restart() -> None:
        for writer in writers:
            writer.turn.release()

    if arrival is None:
        for writer in writers:
            for _ in range(PAGES):
                writer.step()
    with Movable(sys.argv[1], [memory], stop=stop, restart=restart, name="worker") as movable:
        for writer in writers:
            writer.start()
        if arrival is None:
            say(ready=steps())
            movable.wait_ended()  # it has moved; nothing has run here since
            say(left=steps())
            return
        arrival.note_running()
        arrival.wait_complete()
        complete = steps()
        while any(now < then + AFTERWARDS for now, then in zip(steps(), complete, strict=True)):
            time.sleep(0.01)
        stop()
        wrong = sum(writer.wrong_pages() for writer in writers)
        say(began=began, ended=steps(), wrong=wrong)


if __name__ == "__main__":
    main()
