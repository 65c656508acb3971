"""Move a running program from one network to another, and prove that nothing is lost on the way.

    sudo python examples/migrate_worker.py [OPTIONS of aiouffd migrate send]

worker.py (256 MiB, four threads that write all the time) runs in one network namespace, and moves
into another while it runs: one round of copying, then it goes on there, and what it has written
meanwhile follows.  Without root both are on the loopback address.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

WORKER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "worker.py")
MIGRATE = [sys.executable, "-m", "aiouffd", "migrate"]


@contextlib.contextmanager
def two_places() -> Iterator[tuple[list[str], list[str], str]]:
    """Give what to put before a command to run it here or there, and the address of there."""
    if os.geteuid() or not shutil.which("ip"):
        print("network   loopback; two namespaces take root and the ip command")
        yield [], [], "127.0.0.1"
        return
    here, there = f"aiouffd-{os.getpid()}-a", f"aiouffd-{os.getpid()}-b"

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    try:
        for name in (here, there):
            ip("netns", "add", name)
        ip("link", "add", "veth0", "netns", here, "type", "veth", "peer", "veth0", "netns", there)
        for name, address in ((here, "10.77.0.1/24"), (there, "10.77.0.2/24")):
            ip("-n", name, "address", "add", address, "dev", "veth0")
            ip("-n", name, "link", "set", "veth0", "up")
        print("network   two namespaces, joined by a veth pair")
        yield ["ip", "netns", "exec", here], ["ip", "netns", "exec", there], "10.77.0.2"
    finally:  # with the namespaces the pair goes, too
        for name in (here, there):
            subprocess.run(["ip", "netns", "delete", name], check=False)


def trust(folder: str) -> tuple[list[str], list[str]]:
    """Give the options of who sends and who receives that say whom they trust."""
    if not shutil.which("openssl"):
        print("trust     none: there is no openssl to make certificates")
        return ["--plain"], ["--plain"]
    # One certificate for both, which vouches for itself; in earnest each machine has its own.
    own = [f"{folder}/{name}" for name in ("key.pem", "cert.pem")]
    request = "openssl req -x509 -nodes -newkey ec -pkeyopt ec_paramgen_curve:P-256 -days 1"
    names = ["-subj", "/CN=worker", "-addext", "subjectAltName=DNS:worker.example"]
    files = ["-keyout", own[0], "-out", own[1]]
    subprocess.run([*request.split(), *names, *files], check=True, capture_output=True)
    tls = ["--tls-key", own[0], "--tls-cert", own[1], "--tls-cacert", own[1]]
    print("trust     TLS, certificates on both sides")
    return (
        [*tls, "--server-name", "worker.example"],
        [*tls, "--client-name", "worker.example"],
    )


def said(process: subprocess.Popen[str], word: str) -> dict[str, Any]:
    """Wait for the line of JSON that has this word."""
    assert process.stdout is not None
    for line in process.stdout:
        value: dict[str, Any] = json.loads(line)
        if word in (value.get("event"), *value):
            return value
    raise SystemExit(f"{process.args!r} has ended before it said {word!r}")


def main() -> None:
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        here, there, address = stack.enter_context(two_places())
        sends, receives = trust(folder)

        def start(*command: str) -> subprocess.Popen[str]:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        worker = start(*here, sys.executable, WORKER, f"{folder}/here")
        ready = said(worker, "ready")["ready"]
        program = [sys.executable, WORKER, f"{folder}/there"]
        receiver = [*MIGRATE, "receive", f"{address}:0", "--wait", "--json", *receives]
        receive = start(*there, *receiver, "--", *program)
        port = said(receive, "listening")["port"]
        plan = ["--rounds", "1", "--downtime", "0", "--bandwidth", "150M", *sys.argv[1:]]
        sender = [*MIGRATE, "send", f"{folder}/here", f"{address}:{port}", *plan, *sends]
        subprocess.run([*here, *sender], check=True)
        left = said(worker, "left")["left"]
        found = said(receive, "began")
        ended, wrong = found["ended"], found["wrong"]
        moving, since = sum(left) - sum(ready), sum(ended) - sum(left)
        print(f"steps     {moving} here while it moved, {since} there since")
        assert found["began"] == left, "it went on from another step than it had stopped at"
        assert not wrong, f"{wrong} pages are not what the steps have written"
        print(
            "proof     each thread goes on where it stopped; all 65536 pages follow from its steps"
        )


if __name__ == "__main__":
    main()
