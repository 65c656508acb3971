"""What ``make`` does: a virtual environment per interpreter, and the project's checks inside it.

    python3 -m tests.run test|lint|types|docs|coverage|bench|mutations|chaos|interop|check
        [arguments for the tool]

Knows: where interpreters are, how to make ``.venv/<version>`` in the checkout, what each check is.
Must not know: pytest, aiouffd; it runs before either is installed, on any Python 3.8 and newer.

Laws of this file:

* Nothing outside the checkout is touched, with two exceptions that are printed before they
  happen: Debian keeps Python's venv module in a package of its own, and ``interop`` is there to
  fetch foreign programs.  Both need root and apt-get; without them it says what to type.
  CRIU comes from other suites than this system's, into the checkout (tests/suites.py).
  Services that come with a package are not started: the tests start what they need.
* Every interpreter found is used, each under its heading; if one fails, the whole fails.

Settings from the environment: PYTHONS ("3.12 3.13") restricts ``test`` to some versions;
AIOUFFD_SOAK_SECONDS is the length of the soak test (60 on the first interpreter, else 10).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from tests import suites
from tests.interpreters import Interpreter, find_all

ROOT = Path(__file__).resolve().parent.parent
VENVS = ROOT / ".venv"

NO_TESTS_COLLECTED = 5  # pytest's exit status

#: Debian packages that have the programs of tests/interop, by program.
FOREIGN_PROGRAMS = {
    "strace": "strace",
    "dd": "coreutils",
    "sha256sum": "coreutils",
    "nginx": "nginx-light",
    "redis-server": "redis-server",
    "redis-cli": "redis-tools",
    "ceph": "ceph-common",
    "radosgw-admin": "ceph-common",
    "radosgw": "radosgw",
    "qemu-system-x86_64": "qemu-system-x86",
    **{daemon: daemon for daemon in ("ceph-mon", "ceph-mgr", "ceph-osd")},
}

#: What Debian asks before a package starts a service of its own; 101 is "no".
SERVICE_POLICY = Path("/usr/sbin/policy-rc.d")


def say(text: str) -> None:
    print(text, flush=True)


def stop(text: str) -> NoReturn:
    say(text)
    raise SystemExit(1)


def run(*command: str | Path, env: dict[str, str] | None = None) -> int:
    """Run a command in the checkout and return its exit status."""
    say("+ " + shlex.join(map(str, command)))
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **(env or {})}, check=False
    ).returncode


# --- the system ------------------------------------------------------------------------


def get_packages(*packages: str, why: str) -> None:
    """Install Debian packages if we may; else say what to type, and stop."""
    command = ["apt-get", "install", "-y", "--no-install-recommends", *packages]
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        stop(f"{why}\nType:  sudo {shlex.join(command)}\n(or what your distribution has instead)")
    say(why)
    quiet = {"DEBIAN_FRONTEND": "noninteractive"}
    run("apt-get", "update", "-qq", env=quiet)  # a fresh machine has no lists; stale ones may do
    with no_services():
        status = run(*command, env=quiet)
    if status != 0:
        stop(f"Could not get {' '.join(packages)}.")


def get_other_suites() -> None:
    """Unpack CRIU, whose own Debian release may be another than this one, in the checkout."""
    missing = []
    for foreign in suites.CRIU:
        if not foreign.is_there():
            where = " or ".join(foreign.suites)
            say(f"Fetching {foreign.name} from {where}, into {foreign.folder}")
        try:
            suites.fetch(foreign)
        except suites.Unavailable as error:
            missing.append(foreign)
            say(f"The tests with {foreign.name} will be skipped: {error}")
    if len(missing) == len(suites.CRIU) and "CI" in os.environ:
        stop("Here some CRIU must be tested with, and none can be had; the reasons are above.")


@contextlib.contextmanager
def no_services() -> Iterator[None]:
    """Keep packages from starting services while they are installed, unless somebody decides."""
    if SERVICE_POLICY.exists():
        yield
        return
    say(f"(for as long as that takes, {SERVICE_POLICY} says not to start services)")
    SERVICE_POLICY.write_text("#!/bin/sh\nexit 101\n", encoding="ascii")
    try:
        SERVICE_POLICY.chmod(0o755)
        yield
    finally:
        SERVICE_POLICY.unlink()


# --- virtual environments --------------------------------------------------------------


def environment(python: Interpreter, *extras: str) -> Path:
    """Make ``.venv/<version>`` with the package and some of its extras; return its Python."""
    folder = VENVS / python.version
    inside = folder / "bin" / "python"
    project = (ROOT / "pyproject.toml").read_bytes()
    state = hashlib.sha256(project + python.path.encode()).hexdigest()
    stamps = [folder / f"installed-{extra}" for extra in extras]
    if all(stamp.exists() and stamp.read_text() == state for stamp in stamps):
        return inside
    if not inside.exists():
        if not python.has_ensurepip:
            package = f"python{python.version}-venv"
            get_packages(package, why=f"{python.path} has no ensurepip, which venv needs.")
        if run(python.path, "-m", "venv", "--clear", folder) != 0:
            stop(f"Could not make {folder} with {python.path}.")
    pip = {
        "PIP_CACHE_DIR": str(VENVS / "cache"),
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_ROOT_USER_ACTION": "ignore",
    }
    wanted = f".[{','.join(extras)}]"
    if run(inside, "-m", "pip", "install", "--quiet", "--editable", wanted, env=pip) != 0:
        stop(f"pip could not install {wanted} into {folder}; its message is above.")
    for stamp in stamps:
        stamp.write_text(state)
    return inside


def pythons() -> list[Interpreter]:
    """List the interpreters to use, the oldest that we support first."""
    found = find_all()
    if not found:
        stop("No Python 3.11 or newer found on PATH or in ~/.pyenv/versions.")
    chosen = os.environ.get("PYTHONS", "").split()
    missing = set(chosen) - {python.version for python in found}
    if missing:
        stop(f"PYTHONS asks for {' '.join(sorted(missing))}, which was not found here.")
    return [python for python in found if not chosen or python.version in chosen]


# --- the checks ------------------------------------------------------------------------


def test(arguments: list[str]) -> int:
    """Run the whole suite on every interpreter."""
    results: list[str] = []
    failed = False
    for number, python in enumerate(pythons()):
        say(f"\n===== Python {python.version} ({python.path}) =====")
        inside = environment(python, "test")
        first = number == 0  # what only takes longer is done on one interpreter
        soak = os.environ.get("AIOUFFD_SOAK_SECONDS", "60" if first else "10")
        longer = ["--hypothesis-profile=ci"] if first and "CI" in os.environ else []
        longer += [] if first else ["-m", "not once"]
        start = time.monotonic()
        # Two at once, for many tests wait: for a child to start, for the kernel, for a deadline.
        spread = ["-n", "2", "--dist", "worksteal"]
        status = run(
            inside, "-m", "pytest", *spread, *longer, *arguments, env={"AIOUFFD_SOAK_SECONDS": soak}
        )
        failed = failed or status != 0
        outcome = "passed" if status == 0 else f"FAILED (exit status {status})"
        results.append(f"Python {python.version}: {outcome} in {time.monotonic() - start:.0f} s")
    say("\n" + "\n".join(results))
    return int(failed)


def lint(arguments: list[str]) -> int:
    """Check style and format."""
    inside = environment(pythons()[0], "lint")
    checked = run(inside, "-m", "ruff", "check", *arguments)
    return run(inside, "-m", "ruff", "format", "--check", *arguments) or checked


def types(arguments: list[str]) -> int:
    """Check types, strictly, over package, tests, examples and benchmarks."""
    return run(environment(pythons()[0], "test", "lint"), "-m", "mypy", *arguments)


def docs(arguments: list[str]) -> int:
    """Build the pages into docs/_build; a warning is an error."""
    inside = environment(pythons()[0], "docs")
    build = (inside, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet")
    status = run(*build, *arguments, "docs", "docs/_build")
    if status == 0:
        say("The pages are in docs/_build/index.html.")
    return status


def bench(arguments: list[str]) -> int:
    """Measure every figure that the project quotes."""
    return run(environment(pythons()[0], "test"), "-m", "benchmarks", *arguments)


def interop(arguments: list[str]) -> int:
    """Fetch programs that nobody here wrote, and run them against us."""
    missing = sorted(
        {package for program, package in FOREIGN_PROGRAMS.items() if shutil.which(program) is None}
    )
    if missing:
        get_packages(*missing, why="The interop tests run foreign programs that are missing.")
    get_other_suites()
    inside = environment(pythons()[0], "test")
    spread = ("-n", "2", "--dist", "loadfile")  # what a file starts it starts once
    status = run(inside, "-m", "pytest", *spread, "tests/interop", *arguments)
    return 0 if status == NO_TESTS_COLLECTED else status


def coverage(arguments: list[str]) -> int:
    """Hold the floors of facts and values at every branch."""
    inside = environment(pythons()[0], "test")
    with tempfile.TemporaryDirectory(prefix="aiouffd-coverage-") as folder:
        os.chmod(folder, 0o1777)  # children of the tests that gave up their rights write here too
        data = {"COVERAGE_FILE": f"{folder}/data"}
        tests = ("tests/kernel", *PURE_TESTS)
        status = run(inside, "-m", "coverage", "run", "-m", "pytest", "-q", *tests, env=data)
        run(inside, "-m", "coverage", "combine", "--quiet", env=data)
        wanted = (f"--include={','.join(COVERED)}", "--show-missing", "--skip-covered")
        report = (*wanted, "--fail-under=100", *arguments)
        return run(inside, "-m", "coverage", "report", *report, env=data) or status


def mutations(arguments: list[str]) -> int:
    """Break each law of the pager in a copy, and see its test notice."""
    return run(environment(pythons()[0], "test"), "-m", "tests.mutate_laws", *arguments)


def chaos(arguments: list[str]) -> int:
    """Kill servers at random moments under load, a thousand times, and see that nothing is lost."""
    return run(environment(pythons()[0], "test"), "-m", "tests.chaos", *arguments)


def check(arguments: list[str]) -> int:
    """Check what takes seconds: style, types, and the tests that need no kernel."""
    status = lint([])
    status = types([]) or status
    inside = environment(pythons()[0], "test")
    tests = ("tests/test_floors.py", *PURE_TESTS)
    return run(inside, "-m", "pytest", "-q", *tests, *arguments) or status


#: Modules without a loop; their tests need no kernel.
PURE = ("errors", "fds", "ranges", "events", "resolutions", "failure", "address_space", "flow")
PURE_TESTS = tuple(f"tests/test_{module}.py" for module in PURE)
COVERED = ("aiouffd/kernel/*", *(f"aiouffd/{module}.py" for module in PURE))

CHECKS = {
    each.__name__: each
    for each in (test, lint, types, docs, coverage, bench, mutations, chaos, interop, check)
}


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in CHECKS:
        stop(f"usage: python3 -m tests.run {'|'.join(CHECKS)} [arguments for the tool]")
    return CHECKS[arguments[0]](arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
