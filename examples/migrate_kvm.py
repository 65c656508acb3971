"""A virtual machine moves to another process while it runs, and checks its memory all the while.

    sudo python examples/migrate_kvm.py             all of it, on this machine
    sudo python examples/migrate_kvm.py SOCKET      a VMM alone, for `aiouffd migrate send SOCKET`

There are three processes: two VMMs, and this one, which sends the machine away from the one and
receives it for the other, over TCP.  Its RAM is copied while it runs, twice over; then it stops,
goes on at the destination, and what it has written since the last look follows: page by page
where its vCPU waits for one, and the rest as fast as the connection takes it.
"""

import asyncio
import signal
import subprocess
import sys
import tempfile
from typing import Final

from aiouffd import NotSupported, Userfaultfd
from aiouffd.kernel.parent import die_with_parent
from aiouffd.migration.listener import Listener
from aiouffd.migration.moving import Leaving, arriving
from aiouffd.migration.outgoing import Outgoing, Plan
from aiouffd.migration.program import Arrival, Movable, ProgramMemory, arrive
from kvm_guest import Machine, errors_in, fill_ram, why_not

RAM: Final = 64 << 20  # bytes
BEFORE: Final = 10  # passes of the guest over its memory that the source waits for
AFTER: Final = 50  # and the destination, once all of its memory is there
PLAN: Final = Plan(rounds=2, downtime=0.0, bandwidth=40e6)  # nothing is waited for at the switch


def source(path: str) -> None:
    """Run a new machine, until it has moved."""
    die_with_parent(signal.SIGKILL)  # nobody else would look after it
    memory = ProgramMemory.create("ram", RAM)
    fill_ram(memory.map)
    with Machine(memory.map) as machine:
        machine.start()
        machine.wait_for_pass(BEFORE)

        def stop() -> bytes:
            machine.stop()
            return machine.save()

        with Movable(path, [memory], stop=stop, restart=machine.start) as movable:
            print(f"it runs: {RAM >> 20} MiB, checked {machine.passes} times by now", flush=True)
            movable.wait_ended()


def destination(arrival: Arrival) -> None:
    """Run the machine that arrives; it is right if it finds its memory as it has left it."""
    with Machine(arrival.memory["ram"].map) as machine:
        machine.load(arrival.state)
        first = machine.passes
        machine.start()
        arrival.note_running()
        arrival.wait_complete()
        machine.wait_for_pass(machine.passes + AFTER)
        machine.stop()
        errors = errors_in(machine.save())
        print(
            f"it moved after {first} passes, and has made {machine.passes - first} since then:"
            f" {errors} wrong pages in all",
            flush=True,
        )
        sys.exit(errors != 0)


async def receive(listener: Listener) -> int:
    """Start a VMM for the machine that comes, bring its memory, and see it live on by itself."""
    incoming = await listener.accept()
    async with arriving(incoming, [sys.executable, __file__]) as program:
        await program.run()
        await program.complete()
    return await asyncio.to_thread(program.process.wait)


async def send(path: str, port: int) -> Outgoing:
    """Send the machine behind a socket away."""
    async with await Leaving.open(path) as leaving:
        outgoing = Outgoing(leaving.memory, "127.0.0.1", port, tracker=leaving.tracker, plan=PLAN)
        await outgoing.run(leaving)
        await leaving.end()
    return outgoing


async def migrate(path: str) -> int:
    """Move the machine, say what it has cost, and give the status that its VMM ends with."""
    async with Listener() as listener, asyncio.TaskGroup() as group:
        received = group.create_task(receive(listener))
        outgoing = await send(path, listener.port)
    figures, there = outgoing.figures, outgoing.destination
    print(
        f"downtime {figures.downtime * 1e3:.1f} ms; {there['faults']} pages were waited for,"
        f" {there['longest'] * 1e3:.1f} ms at the longest;"
        f" {figures.sent_bytes / figures.memory_bytes:.2f} bytes sent per byte of memory"
    )
    return received.result()


def main() -> None:
    """Start the first VMM, and move its machine."""
    try:
        Userfaultfd.open().close()  # as the destination will need it: KVM's faults are the kernel's
    except NotSupported as error:
        print(f"No machine can move here: {error}")
        return
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(
            [sys.executable, __file__, f"{folder}/vmm.sock"], stdout=subprocess.PIPE, text=True
        ) as vmm,
    ):
        try:
            assert vmm.stdout is not None
            print(vmm.stdout.readline(), end="", flush=True)
            status = asyncio.run(migrate(f"{folder}/vmm.sock"))
        except BaseException:
            vmm.kill()  # the machine runs on there
            raise
    sys.exit(status)


if missing := why_not():
    print(f"No machine can be made here: {missing}.")
elif arrival := arrive():
    destination(arrival)
elif len(sys.argv) > 1:
    source(sys.argv[1])
else:
    main()
