"""Which process of this machine a restored task is.

Knows: pidfds, pid namespaces, what /proc says of parents.
Must not know: the socket's bytes, sessions.

The images number tasks as they were numbered where they were dumped.  A task is restored under
that number, but mostly in a pid namespace of its own: for us it is another.

Laws of this file:

* What the kernel says of the sender of a message cannot name a stranger (SCM_PIDFD, Linux 6.5):
  each task sends its own.  It counts only if the process is called in its own namespace as the
  task is in the images.
* On older kernels it is looked for among the descendants of who has connected, and held only if
  one alone can be meant: first by a pidfd, then it is looked at again.  So no stranger is held,
  whatever becomes of the number meanwhile.  Whoever is not found is served all the same; that it
  has exited is noticed late.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from ...fds import OwnedFd
from ...handover import Peer
from ...kernel import calls


def pin_task(pid: int, sender: OwnedFd | None, client: tuple[int, int, int]) -> Peer | None:
    """Hold the process that a task has become.

    Args:
        pid: Of the task in the images.
        sender: A pidfd of who has sent its userfaultfd; taken over.
        client: (pid, uid, gid) of who has connected: ``criu restore``.

    Returns:
        The process, which may have exited by now; None if it is not to be found.
    """
    _, uid, gid = client
    if sender is not None:
        number = calls.pid_of(sender.fileno()) or 0
        # Below one: it has exited, or runs where we see no processes.
        if number < 1 or _own_pid(number) in (pid, None):
            return Peer(number, uid, gid, sender)
        sender.close()
    found = _find(pid, client[0])
    return None if found is None else Peer(found[0], uid, gid, found[1])


def _find(pid: int, ancestor: int) -> tuple[int, OwnedFd] | None:
    """Look for a process by its number in its own namespace, below another one."""
    found = [number for number in _processes() if _is_it(number, pid, ancestor)]
    if len(found) != 1:  # namespaces may number two processes alike: then it is not guessed
        return None
    (number,) = found
    try:
        pidfd = OwnedFd(os.pidfd_open(number))
    except ProcessLookupError:
        return None
    # It is held now: if the number means such a process still, it is this one.
    if _is_it(number, pid, ancestor) and calls.pid_of(pidfd.fileno()) == number:
        return number, pidfd
    pidfd.close()
    return None


def _is_it(number: int, pid: int, ancestor: int) -> bool:
    return _own_pid(number) == pid and _descends(number, ancestor)


def _processes() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdecimal())


def _own_pid(number: int) -> int | None:
    """Say which number a process has in its innermost namespace; None if it is gone."""
    pids = _status(number, "NSpid:")
    return int(pids[-1]) if pids else None


def _descends(number: int, ancestor: int) -> bool:
    """Say whether a process is below another one."""
    for _ in range(256):  # generations: parents may change while we climb
        parent = _status(number, "PPid:")
        if not parent or parent[0] == "0":
            return False
        number = int(parent[0])
        if number == ancestor:
            return True
    return False


def _status(number: int, field: str) -> list[str]:
    try:
        with open(f"/proc/{number}/status", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith(field):
                    return line.split()[1:]
    except (FileNotFoundError, ProcessLookupError, PermissionError):  # gone, or not to be seen
        pass
    return []
