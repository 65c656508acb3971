"""examples/migrate_kvm.py, run as its first lines say."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from kvm_guest import why_not
from tests.examples.running import ROOT, run_example


@pytest.mark.once
@pytest.mark.root
@pytest.mark.skipif(bool(why_not()), reason=f"{why_not()}: it takes KVM on x86-64")
def test_the_machine_goes_on_and_finds_its_memory_as_it_was() -> None:
    """It runs on either side, no page is wrong, and memory has followed it."""
    before, after, cost = run_example("migrate_kvm.py")
    assert before == "it runs: 64 MiB, checked 10 times by now"
    first, further, wrong = map(int, re.findall(r"\d+", after))
    assert first >= 10
    assert further >= 50
    assert wrong == 0
    downtime, _, _, sent = map(float, re.findall(r"\d+(?:\.\d+)?", cost))
    assert downtime > 0
    assert sent > 1.0, "nothing that the guest has written went twice"


@pytest.mark.once
@pytest.mark.root
def test_it_says_what_is_missing() -> None:
    """Where there is no KVM it does nothing, and says so in a sentence."""
    command = [sys.executable, "examples/migrate_kvm.py"]
    if os.path.exists("/dev/kvm"):
        hide = 'mount --bind /dev/null /dev/kvm && exec "$0" "$@"'
        command = ["unshare", "--mount", "sh", "-c", hide, *command]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.fspath(ROOT)},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    if done.stderr.startswith(("mount: ", "unshare: ")):
        pytest.skip(f"may not hide /dev/kvm here: {done.stderr.strip()}")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"No machine can be made here: .*/dev/kvm .*\.\n", done.stdout)
