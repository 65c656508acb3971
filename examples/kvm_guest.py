"""A virtual machine of one vCPU, driven over /dev/kvm by ioctl and mmap; migrate_kvm.py moves it.

Its program checks its own memory for ever.  Pass ``n`` takes all pages in a scattered order,
compares every byte of each with what pass ``n - 1`` has left there, and writes some of them anew.
After each pass it says so on one port, and names a page that was not as it should be on another.

All that the machine is lies in two places: its RAM, which holds the program and its page tables
too, and the registers that ``save`` gives.  This program takes no interrupts and has no use for
the FPU, MSRs (but EFER, which is among the special registers) or a local APIC: those belong to the
state of a machine that uses them (KVM_GET_XSAVE, KVM_GET_MSRS, KVM_GET_LAPIC).

The program runs in 64-bit mode with paging, in ring 3.  A KVM that itself runs in a virtual machine
may have to emulate everything else, some hundred times slower.
"""

import ctypes
import errno
import fcntl
import math
import mmap
import os
import platform
import signal
import struct
import threading
import time
from typing import Final, Self

PAGE: Final = 4096

# Where things lie in the guest's physical memory, which its page tables show as it is.
CODE: Final = 0x1000
TABLES: Final = 0x2000  # three pages, good for the first GiB
FIRST: Final = 1 << 20  # of the pages that are checked

PASS_PORT: Final = 0x10
WRONG_PORT: Final = 0x11
MIX: Final = 0x9E3779B1  # spreads page numbers over 32 bits

# linux/kvm.h
KVM_GET_API_VERSION: Final = 0xAE00
KVM_CREATE_VM: Final = 0xAE01
KVM_GET_VCPU_MMAP_SIZE: Final = 0xAE04
KVM_CREATE_VCPU: Final = 0xAE41
KVM_SET_USER_MEMORY_REGION: Final = 0x4020AE46
KVM_RUN: Final = 0xAE80
KVM_GET_REGS: Final = 0x8090AE81
KVM_SET_REGS: Final = 0x4090AE82
KVM_GET_SREGS: Final = 0x8138AE83
KVM_SET_SREGS: Final = 0x4138AE84
KVM_EXIT_IO: Final = 2

MEMORY_REGION: Final = struct.Struct("<IIQQQ")  # slot, flags, guest address, size, our address
REGS: Final = struct.Struct("<18Q")  # rax rbx rcx rdx rsi rdi rsp rbp r8-r15 rip rflags
SREGS_BYTES: Final = 312
PASSES: Final = struct.Struct("<Q")  # behind the registers, what the VMM itself has to remember
SEGMENT: Final = struct.Struct("<QIH10B")  # base, limit, selector, then a byte per attribute
CONTROL: Final = struct.Struct("<6Q")  # cr0 cr2 cr3 cr4 cr8 efer
CONTROL_AT: Final = 224
# struct kvm_run, the page that vCPU and VMM share
IMMEDIATE_EXIT_AT: Final = 1
EXIT_REASON_AT: Final = 8
EXIT_AT: Final = 32
EXIT_IO: Final = struct.Struct("<BBHIQ")  # direction, size, port, count, where the data is

_libc = ctypes.CDLL(None, use_errno=True)


def why_not() -> str:
    """Say why there can be no machine here; nothing if there can."""
    if platform.machine() != "x86_64":
        return f"the guest's program is for x86-64, this is {platform.machine()}"
    try:
        fd = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return f"/dev/kvm cannot be opened here ({error.strerror})"
    try:
        fcntl.ioctl(fd, KVM_GET_API_VERSION, 0)
    except OSError as error:
        return f"/dev/kvm is no KVM ({error.strerror})"
    finally:
        os.close(fd)
    return ""


def is_written(page: int, written: int) -> bool:
    """Say whether each pass writes a page anew, if it does so with ``written`` of 256 pages."""
    return (page * MIX & 0xFFFFFFFF) >> 24 < written


def program(pages: int, step: int, written: int) -> bytes:
    """Assemble what the guest runs.

    Args:
        pages: How many it checks.
        step: From one to the next; has no factor in common with ``pages``, and is less.
        written: How many of 256 pages are written anew in each pass.
    """

    def u32(value: int) -> str:
        return value.to_bytes(4, "little").hex()

    listing = f"""
        be {u32(pages)}   ; pass:  mov esi, PAGES        esi: pages left in this pass
        89 df             ; page:  mov edi, ebx          ebx: the page's number
        c1 e7 0c          ;        shl edi, 12
        81 c7 {u32(FIRST)};        add edi, FIRST        edi: where it lies
        69 c3 {u32(MIX)}  ;        imul eax, ebx, MIX
        89 c2             ;        mov edx, eax
        c1 ea 18          ;        shr edx, 24
        81 fa {u32(written)};      cmp edx, WRITTEN
        19 d2             ;        sbb edx, edx          edx: all ones if it is written, else 0
        8d 4d ff          ;        lea ecx, [rbp - 1]    ebp: number of this pass
        21 d1             ;        and ecx, edx
        01 c8             ;        add eax, ecx          eax: what the page must be full of
        b9 {u32(1024)}    ;        mov ecx, 1024
        f3 af             ;        repe scasd
        74 06             ;        je right
        ff c4             ;        inc esp               esp: wrong pages so far; no stack
        93                ;        xchg eax, ebx
        e7 {WRONG_PORT:x} ;        out WRONG_PORT, eax
        93                ;        xchg eax, ebx
        85 d2             ; right: test edx, edx
        74 14             ;        jz next
        89 df             ;        mov edi, ebx
        c1 e7 0c          ;        shl edi, 12
        81 c7 {u32(FIRST)};        add edi, FIRST
        ff c0             ;        inc eax
        b9 {u32(1024)}    ;        mov ecx, 1024
        f3 ab             ;        rep stosd
        81 c3 {u32(step)} ; next:  add ebx, STEP
        81 fb {u32(pages)};        cmp ebx, PAGES
        72 06             ;        jb more
        81 eb {u32(pages)};        sub ebx, PAGES
        ff ce             ; more:  dec esi
        75 9c             ;        jnz page
        89 e8             ;        mov eax, ebp
        e7 {PASS_PORT:x}  ;        out PASS_PORT, eax
        ff c5             ;        inc ebp
        eb 8f             ;        jmp pass
    """
    return b"".join(bytes.fromhex(line.partition(";")[0]) for line in listing.splitlines())


def fill_ram(ram: mmap.mmap, *, written: int = 26) -> None:
    """Write what a machine that has not run yet has in its RAM.

    Args:
        ram: All of it, from 2 MiB to 1 GiB.
        written: How many of 256 pages each pass will write anew.
    """
    pages = (len(ram) - FIRST) // PAGE
    step = 6007 % pages
    assert math.gcd(step, pages) == 1, "some pages would never be reached"
    code = program(pages, step, written)
    ram[CODE : CODE + len(code)] = code
    # Three levels of tables, with pages of 2 MiB: present, writable, for ring 3 (7), accessed and
    # dirty (0x60), large (0x80).
    struct.pack_into("<Q", ram, TABLES, TABLES + PAGE | 0x67)
    struct.pack_into("<Q", ram, TABLES + PAGE, TABLES + 2 * PAGE | 0x67)
    large = (number << 21 | 0xE7 for number in range(512))
    struct.pack_into("<512Q", ram, TABLES + 2 * PAGE, *large)
    for page in range(pages):
        at, value = FIRST + page * PAGE, page * MIX & 0xFFFFFFFF
        ram[at : at + PAGE] = value.to_bytes(4, "little") * (PAGE // 4)


def first_state(sregs: bytes) -> bytes:
    """Give the state in which a machine begins, as ``Machine.load`` takes it.

    Args:
        sregs: Special registers of a new vCPU.
    """
    registers = [0] * 18
    registers[7] = 1  # rbp: the first pass
    registers[16] = CODE  # rip
    registers[17] = 0x3002  # rflags: ring 3 may use ports, no interrupts
    #            base, limit, selector, type, present, dpl, db, s, l, g, avl, unusable
    code = SEGMENT.pack(0, 0xFFFFFFFF, 0x33, 0xB, 1, 3, 0, 1, 1, 1, 0, 0, 0)
    data = SEGMENT.pack(0, 0xFFFFFFFF, 0x2B, 0x3, 1, 3, 1, 1, 0, 1, 0, 0, 0)
    special = bytearray(sregs)
    special[: 6 * SEGMENT.size] = code + 5 * data
    # Protection, paging, write-protection (cr0); PAE (cr4); long mode, no-execute (efer)
    CONTROL.pack_into(special, CONTROL_AT, 0x8005_0033, 0, TABLES, 0x620, 0, 0xD00)
    return REGS.pack(*registers) + special + PASSES.pack(0)


def errors_in(state: bytes) -> int:
    """Say how many wrong pages the guest has found in all its life.

    Args:
        state: From ``Machine.save``.
    """
    return int(REGS.unpack_from(state)[6])  # rsp


class Machine:
    """One vCPU and its RAM.

    ::

        ram = mmap.mmap(-1, 64 << 20)
        fill_ram(ram)
        with Machine(ram) as machine:
            machine.start()
            machine.wait_for_pass(10)
            machine.stop()
            state = machine.save()

    Attributes:
        passes: Number of the last pass that has ended, on whatever machine.
        wrong: Numbers of pages that the guest has found wrong, on this one.
    """

    def __init__(self, ram: mmap.mmap) -> None:
        """Make the machine; it does not run yet.  In the main thread, for it installs a signal.

        Args:
            ram: From ``fill_ram``, or empty if a state is loaded and the RAM follows; it stays
                the caller's.  Pages that are missing are waited for by the vCPU's thread alone.
        """
        kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
        vm = fcntl.ioctl(kvm, KVM_CREATE_VM, 0)
        address = ctypes.addressof(ctypes.c_char.from_buffer(ram))
        region = MEMORY_REGION.pack(0, 0, 0, len(ram), address)
        fcntl.ioctl(vm, KVM_SET_USER_MEMORY_REGION, region)
        self._vcpu = fcntl.ioctl(vm, KVM_CREATE_VCPU, 0)
        self._run = mmap.mmap(self._vcpu, fcntl.ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0))
        self._fds = self._vcpu, vm, kvm
        self.wrong: list[int] = []
        self._changed = threading.Condition()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self.load(first_state(self._get(KVM_GET_SREGS, SREGS_BYTES)))
        signal.signal(signal.SIGUSR1, lambda *_: None)  # it need only interrupt KVM_RUN

    def _get(self, request: int, size: int) -> bytes:
        answer = bytearray(size)
        fcntl.ioctl(self._vcpu, request, answer)
        return bytes(answer)

    # --- the state ---------------------------------------------------------------------

    def save(self) -> bytes:
        """Give what the machine is besides its RAM; it is stopped."""
        assert self._thread is None, "a running machine has no state to save"
        registers = self._get(KVM_GET_REGS, REGS.size), self._get(KVM_GET_SREGS, SREGS_BYTES)
        return b"".join((*registers, PASSES.pack(self.passes)))

    def load(self, state: bytes) -> None:
        """Go on with what ``save`` has given; the machine is stopped."""
        assert self._thread is None, "a running machine has its state already"
        special, rest = REGS.size, REGS.size + SREGS_BYTES
        fcntl.ioctl(self._vcpu, KVM_SET_SREGS, state[special:rest])
        fcntl.ioctl(self._vcpu, KVM_SET_REGS, state[:special])
        (self.passes,) = PASSES.unpack(state[rest:])

    # --- running -----------------------------------------------------------------------

    def start(self) -> None:
        """Let the vCPU run, in a thread of its own."""
        assert self._thread is None
        self._run[IMMEDIATE_EXIT_AT] = 0
        self._stopping.clear()
        self._thread = threading.Thread(target=self._drive, name="vcpu", daemon=True)
        self._thread.start()

    def stop(self) -> float:
        """Stop the vCPU, in the middle of whatever it does, and wait until it stands.

        A vCPU that waits for a page stops as well, with the access still to be done.

        Returns:
            Seconds that took.

        Raises:
            RuntimeError: It had stopped by itself, for a reason that the message says.
        """
        assert self._thread is not None
        began = time.perf_counter()
        # A signal between two KVM_RUN would be lost by itself; the byte makes the next one return.
        self._run[IMMEDIATE_EXIT_AT] = 1
        assert self._thread.ident is not None
        signal.pthread_kill(self._thread.ident, signal.SIGUSR1)
        self._stopping.set()
        self._thread.join()
        self._thread = None
        if self._failure is not None:
            raise self._failure
        return time.perf_counter() - began

    def wait_for_pass(self, number: int, timeout: float = 30.0) -> None:
        """Wait until the guest has said that a pass is done.

        Args:
            number: Of the pass; the first is 1.
            timeout: Seconds.

        Raises:
            TimeoutError: It did not come.
            RuntimeError: The vCPU cannot go on.
        """
        with self._changed:
            came = self._changed.wait_for(lambda: self.passes >= number or self._failure, timeout)
        if self._failure is not None:
            raise self._failure
        if not came:
            raise TimeoutError(f"the guest is still in pass {self.passes + 1}, not {number}")

    def _drive(self) -> None:
        try:
            while self._enter():
                self._serve_exit()
        except Exception as error:
            with self._changed:
                self._failure = error
                self._changed.notify_all()
        self._stopping.wait()  # the thread is there as long as it may be sent a signal

    def _enter(self) -> bool:
        """Run the vCPU until it needs something; say no if it was stopped instead.

        What an exit asked for is completed by the next entry, even by one that returns at once.
        So a stop always ends in an entry of its own, and after that the registers say all.
        """
        # By ctypes: newer Pythons repeat an fcntl.ioctl that a signal has interrupted.
        while _libc.ioctl(self._vcpu, KVM_RUN, 0) < 0:
            number = ctypes.get_errno()
            if number != errno.EINTR:
                raise OSError(number, os.strerror(number), "KVM_RUN")
            if self._run[IMMEDIATE_EXIT_AT]:
                return False
        return True

    def _serve_exit(self) -> None:
        reason = int.from_bytes(self._run[EXIT_REASON_AT : EXIT_REASON_AT + 4], "little")
        if reason != KVM_EXIT_IO:
            raise RuntimeError(f"the vCPU stopped with KVM's exit reason {reason}")
        _, size, port, _, where = EXIT_IO.unpack_from(self._run, EXIT_AT)
        value = int.from_bytes(self._run[where : where + size], "little")
        with self._changed:
            if port == PASS_PORT:
                if value != self.passes + 1:
                    raise RuntimeError(f"pass {value} after pass {self.passes}")
                self.passes = value
            else:
                self.wrong.append(value)
            self._changed.notify_all()

    # --- the end -----------------------------------------------------------------------

    def close(self) -> None:
        """Stop the machine if it runs, and give everything back."""
        try:
            if self._thread is not None:
                self.stop()
        finally:
            self._run.close()
            for fd in self._fds:
                os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
