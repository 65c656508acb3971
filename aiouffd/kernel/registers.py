"""A thread's registers: what a system call needs in which, on each machine.

Knows: the layout of NT_PRSTATUS (``elf_gregset_t``), the calling conventions of syscall(2).
Must not know: how registers are read and written.

Laws of this file:

* No system call is made here, so each machine is tested on every other.
* Restoring all words lets a thread go on as if nothing had been called, also where a system call
  of its own was interrupted and is to be restarted.  x86 decides that
  when the thread goes on, by ``orig_rax`` and the result: a call of ours has -1 in the first, so
  that nothing is restarted in its middle, and what is put back has both again.  aarch64 has moved
  the program counter back before the thread is seen to stand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from ..errors import NotSupported

_WORD: Final = 1 << 64


class Machine(NamedTuple):
    """Which word of NT_PRSTATUS is what."""

    words: int  #: how many there are, of 8 bytes each
    number: int  #: the system call's number
    arguments: tuple[int, ...]  #: its arguments
    result: int  #: its result, or minus an errno
    pc: int  #: the program counter
    original: int | None  #: the number again, as the kernel keeps it for restarts; None: hidden
    gate: bytes  #: the instruction that makes a system call
    alignment: int  #: where an instruction may begin

    def calling(
        self, registers: Sequence[int], number: int, arguments: Sequence[int], gate: int
    ) -> list[int]:
        """Change registers so that the next instruction makes a system call.

        Args:
            registers: What the thread has now.
            number: The system call's number.
            arguments: Up to six; negative ones are two's complements.
            gate: The address of such an instruction.

        Raises:
            ValueError: There are too many arguments.
        """
        if len(arguments) > len(self.arguments):
            raise ValueError(f"{len(arguments)} arguments; a system call has up to six")
        changed = list(registers)
        changed[self.number] = number
        changed[self.pc] = gate
        for index, value in zip(self.arguments, arguments, strict=False):
            changed[index] = value % _WORD
        if self.original is not None:
            changed[self.original] = _WORD - 1
        return changed

    def gate_in(self, code: bytes) -> int:
        """Find an instruction that makes a system call.

        Args:
            code: From an aligned address on.

        Returns:
            Where in it the first one is, or -1.
        """
        at = code.find(self.gate)
        while at > 0 and at % self.alignment:
            at = code.find(self.gate, at + 1)
        return at


MACHINES: Final = {
    # struct user_regs_struct: r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi orig_rax
    # rip cs eflags rsp ss fs_base gs_base ds es fs gs
    "x86_64": Machine(
        words=27,
        number=10,
        arguments=(14, 13, 12, 7, 9, 8),
        result=10,
        pc=16,
        original=15,
        gate=b"\x0f\x05",  # syscall
        alignment=1,
    ),
    # struct user_pt_regs: x0 ... x30 sp pc pstate
    "aarch64": Machine(
        words=34,
        number=8,
        arguments=(0, 1, 2, 3, 4, 5),
        result=0,
        pc=32,
        original=None,
        gate=b"\x01\x00\x00\xd4",  # svc #0
        alignment=4,
    ),
}


def machine_named(name: str) -> Machine:
    """Say how registers lie on a machine.

    Args:
        name: As ``os.uname().machine`` has it.

    Raises:
        NotSupported: That is not known here.
    """
    if name not in MACHINES:
        raise NotSupported(
            f"aiouffd cannot make system calls in other processes on {name or 'this system'}",
            f"It knows the registers of {' and '.join(MACHINES)} under Linux.",
        )
    return MACHINES[name]
