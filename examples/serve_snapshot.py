"""Serve the memory of a virtual machine's snapshot, page by page, as it is touched.

    python examples/serve_snapshot.py memory.img /run/vm/uffd.sock

Then load the snapshot with that socket: PUT /snapshot/load to Firecracker, with
"mem_backend": {"backend_type": "Uffd", "backend_path": "/run/vm/uffd.sock"}.  Any number of
machines may start from the same image.  SIGTERM lets those that run finish.
"""

import asyncio
import signal
import sys

from aiouffd import Action, FailurePolicy
from aiouffd.protocols import firecracker
from aiouffd.reports import Report
from aiouffd.server import Server
from aiouffd.service import Service
from aiouffd.sources.file import FileSource

SERVICE = Service(
    # A page that cannot be read twice again ends the machine: better than one that goes on
    # with memory it never had.
    failure=FailurePolicy(retries=2, then=Action.KILL),
    on_close=Action.KILL,
    deadline=10.0,
    chunk=64 * 1024,  # bring the neighbourhood of each page that is touched
)


def show(report: Report) -> None:
    """Say when a machine comes and goes, with its figures."""
    print(report, flush=True)


async def main(image: str, path: str) -> None:
    """Serve until SIGTERM."""
    # A source per machine: one that runs keeps its file though a new image takes the name.
    server = Server(
        path, firecracker.receive, lambda: FileSource(image), service=SERVICE, report=show
    )
    async with server:
        print(f"ready on {server.path}", flush=True)
        stopped = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
        await stopped.wait()
        await server.drain()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:3]))
