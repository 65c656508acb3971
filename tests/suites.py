"""Programs of another Debian suite, unpacked beside the system, which stays as it is.

    python3 -m tests.suites        fetches what tests/interop uses, and says where it is

Knows: how to let apt fetch packages of a suite that is not configured, and how to run a program
    with the loader and the libraries that came with it.
Must not know: pytest, aiouffd.  Any Python 3.8 can read this file: it is what ``make`` starts.

Laws of this file:

* The mirror is the one that apt is configured with; apt checks the signatures.
* apt works with lists, a cache and a package state of its own, under ``build/suites``: what the
  system has installed, and what it knows of packages, does not change.
* A folder appears under its final name when it is complete and its program has run.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

SUITES = Path(__file__).resolve().parent.parent / "build" / "suites"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"


class Unavailable(Exception):
    """A program cannot be had here; the text says what is missing."""


@dataclass(frozen=True)
class Foreign:
    """A program in the versions that suites have.

    Attributes:
        name: What it is called here.
        package: The Debian package that has it.
        program: Its path in the package.
        suites: Where to look, the first that has the wanted version is taken.
        version: A pattern that the output of ``--version`` must match.
    """

    name: str
    package: str
    program: str
    suites: tuple[str, ...]
    version: str

    @property
    def folder(self) -> Path:
        return SUITES / self.name

    @property
    def command(self) -> Path:
        """What to start: a script that runs the program with its own libraries."""
        return self.folder / self.name

    def is_there(self) -> bool:
        return self.command.exists()

    def said(self) -> str:
        """What it says of itself, in one line."""
        return " ".join([self.name, *_run(str(self.command), "--version").split()])


#: CRIU's two page protocols: headers of 24 bytes until 4.1, of 32 bytes from 4.2 on.
CRIU = (
    Foreign("criu-4.1", "criu", "usr/sbin/criu", ("trixie",), r"Version: 4\.[01]\b"),
    Foreign("criu-4.2", "criu", "usr/sbin/criu", ("forky", "sid"), r"Version: (4\.[2-9]|[5-9]\.)"),
)


def fetch(foreign: Foreign) -> None:
    """Fetch a program unless it is there.

    Raises:
        Unavailable: It cannot be had.
    """
    if foreign.is_there():
        return
    mirror = _mirror()
    refused = []
    for suite in foreign.suites:
        partial = SUITES / f"{foreign.name}.{suite}.{os.getpid()}"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            _unpack(mirror, suite, foreign.package, partial)
            script = partial / foreign.name
            _wrap(partial / "root", foreign.program, script)
            said = _run(str(script), "--version").strip()
            if re.search(foreign.version, said):
                shutil.rmtree(foreign.folder, ignore_errors=True)
                partial.rename(foreign.folder)
                return
            refused.append(f"{suite} has {said.splitlines()[0] if said else 'one that is mute'}")
        except Unavailable as error:
            refused.append(f"{suite}: {error}")
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    raise Unavailable(f"{foreign.name} ({foreign.version}): {'; '.join(refused)}")


def _mirror() -> str:
    """Ask apt where it gets Debian's packages from."""
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        raise Unavailable("only a Debian with apt-get can fetch packages of another suite")
    if not os.path.exists(KEYRING):
        raise Unavailable(f"{KEYRING} is missing: apt-get install debian-archive-keyring")
    form = ("--format", "$(ORIGIN) $(REPO_URI)", "Created-By: Packages")
    found = _mirror_in(_run("apt-get", "indextargets", *form))
    if found is None and os.geteuid() == 0:
        _run("apt-get", "update", "-qq")  # a fresh machine has no lists, and so no origins
        found = _mirror_in(_run("apt-get", "indextargets", *form))
    if found is None:
        raise Unavailable("apt is configured with no mirror of Debian: apt-get update?")
    return found


def _mirror_in(targets: str) -> str | None:
    for line in targets.splitlines():
        origin, _, uri = line.partition(" ")
        if origin == "Debian" and "security" not in uri:
            return uri
    return None


def _unpack(mirror: str, suite: str, package: str, folder: Path) -> None:
    """Unpack a package of a suite, and all that it needs, into ``folder/root``."""
    apt = folder / "apt"
    for path in ("lists/partial", "cache/archives/partial"):
        (apt / path).mkdir(parents=True)
    (folder / "root").mkdir()
    (apt / "status").touch()
    (apt / "sources.list").write_text(f"deb [signed-by={KEYRING}] {mirror} {suite} main\n")
    options: dict[str, object] = {
        "Dir::Etc::sourcelist": apt / "sources.list",
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::State::lists": apt / "lists",
        "Dir::Cache": apt / "cache",
        "Dir::State::status": apt / "status",
        "APT::Sandbox::User": "root",
    }
    words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    _run("apt-get", "-qq", *words, "update")
    wanted = ("install", "-y", "--download-only", "--no-install-recommends", package)
    _run("apt-get", "-qq", *words, *wanted)
    archives = sorted((apt / "cache" / "archives").glob("*.deb"))
    if not archives:
        raise Unavailable(f"apt fetched nothing for {package}")
    for archive in archives:
        _run("dpkg", "-x", str(archive), str(folder / "root"))
    shutil.rmtree(apt)


def _wrap(root: Path, program: str, script: Path) -> None:
    """Write the script that runs a program with the loader and libraries beside it."""
    loaders = sorted(root.glob("usr/lib*/ld-linux*.so.*"))
    folders = sorted(root.glob("usr/lib/*-linux-gnu*"))
    if not loaders or not folders:
        raise Unavailable(f"what was unpacked has no loader for {platform.machine()}")
    loader, folder = (each[0].relative_to(root) for each in (loaders, folders))
    script.write_text(
        "#!/bin/sh\nroot=${0%/*}/root\n"
        f'exec "$root/{loader}" --library-path "$root/{folder}" "$root/{program}" "$@"\n'
    )
    script.chmod(0o755)


def _run(
    *command: str,
) -> str:
    """Run a command and give what it printed.

    Raises:
        Unavailable: It failed, or took minutes.
    """
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=300,
        )
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{command[0]} did not end within 300 s") from None
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise Unavailable(f"{' '.join(command[:1])}: {lines[-1] if lines else done.returncode}")
    return done.stdout.decode(errors="replace")


def main() -> int:
    missing: list[str] = []
    for foreign in CRIU:
        try:
            fetch(foreign)
            print(f"{foreign.name}: {foreign.command}")
        except Unavailable as error:
            missing.append(str(error))
    print("\n".join(missing), end="")
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main())
