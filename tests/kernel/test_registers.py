"""What a system call needs in which register, on each machine."""

from __future__ import annotations

import pytest

from aiouffd.errors import NotSupported
from aiouffd.kernel.registers import MACHINES, machine_named


@pytest.mark.parametrize("name", MACHINES)
def test_a_call_changes_what_it_needs_and_nothing_else(name: str) -> None:
    """Number, program counter and the arguments given; on x86 also what restarts go by."""
    machine = machine_named(name)
    before = [1000 + word for word in range(machine.words)]
    after = machine.calling(before, 28, (0x7000, -1), 0x5000)
    first, second = machine.arguments[:2]
    wanted = {machine.number: 28, machine.pc: 0x5000, first: 0x7000, second: (1 << 64) - 1}
    if machine.original is not None:
        wanted[machine.original] = (1 << 64) - 1
    assert {at: now for at, now in enumerate(after) if now != before[at]} == wanted
    assert before[0] == 1000


def test_six_arguments_are_all() -> None:
    """A seventh is refused before anything is changed."""
    machine = machine_named("x86_64")
    changed = machine.calling([0] * machine.words, 9, range(1, 7), 0)
    assert [changed[at] for at in machine.arguments] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(ValueError, match="7 arguments"):
        machine.calling([0] * machine.words, 9, range(7), 0)


def test_each_word_has_one_meaning() -> None:
    """But for the number and the result, which share one on x86, and the first argument's."""
    x86, arm = machine_named("x86_64"), machine_named("aarch64")
    assert len({x86.number, x86.pc, x86.original, *x86.arguments}) == 9
    assert len({arm.number, arm.pc, *arm.arguments}) == 8
    assert all(max(m.number, m.pc, m.result, *m.arguments) < m.words for m in MACHINES.values())


def test_an_instruction_is_found_where_one_may_begin() -> None:
    """Anywhere on x86, at multiples of four on aarch64."""
    x86, arm = machine_named("x86_64"), machine_named("aarch64")
    assert x86.gate_in(b"\x90\x0f\x05\x0f\x05") == 1
    assert x86.gate_in(b"\x90\x0f") == -1
    svc = arm.gate
    assert arm.gate_in(svc) == 0
    assert arm.gate_in(b"\0\0" + svc + b"\0\0" + svc) == 8
    assert arm.gate_in(b"\0\0" + svc) == -1


def test_other_machines_are_named() -> None:
    """With those that are known."""
    with pytest.raises(NotSupported, match=r"on riscv64. .* x86_64 and aarch64"):
        machine_named("riscv64")
    with pytest.raises(NotSupported, match="on this system"):
        machine_named("")
