"""A guest without firmware or operating system: it rewrites some memory, and reads all of it.

Knows: 512 bytes of x86 that run from the reset vector, and the three numbers that they need.
Must not know: QEMU's options, migration.

Laws of this file:

* Each page of the guest's memory from 1 MiB on holds its own address, at 4 and at 4092; its first
  dword counts how often it was written.
* The guest writes the first pages (its window) over and over, one page a step, and checks by the
  count that the last write is still there.  In the same step it reads one page of all of its
  memory, in an order of its own, and checks both addresses.
* It says ``R`` when memory is filled, ``B`` after each round of reading, ``E`` once if a check
  fails; then it stops.

It is an image for ``-bios``: with the usual firmware in front, the guest would start seconds later
where KVM has to emulate what is not 64-bit code.
"""

from __future__ import annotations

import math
import struct
from typing import Final

PAGE: Final = 4096

#: Where memory begins that the guest uses; below are the ROMs and the window of graphics cards.
FIRST: Final = 1 << 20

#: What the guest says through its serial port.
READY: Final = b"R"
ROUND: Final = b"B"
WRONG: Final = b"E"

_ROM: Final = 64 << 10
_CODE: Final = 512  # the last bytes of the ROM, which ends at 4 GiB
_GOLDEN: Final = 0.618

# Offsets are from 0xfffffe00.  All jumps within it are relative; data is addressed absolutely.
_HEADER: Final = struct.Struct("<III HI 6x QQQ")  # limit, window, stride; GDT's size, place; GDT
_GDT: Final = 0xFFFFFE18
_FLAT: Final = (0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF)  # already marked as accessed: it is ROM

_MAIN: Final = """
    b8 10 00 00 00          mov   eax, 16              ; 30 main, in 32 bits
    8e d8                   mov   ds, eax
    8e c0                   mov   es, eax
    8e d0                   mov   ss, eax
    8e e0                   mov   fs, eax
    8e e8                   mov   gs, eax
    66 ba f8 03             mov   dx, 0x3f8            ; serial port
    bf 00 00 10 00          mov   edi, 1 << 20
    89 7f 04                mov   [edi + 4], edi       ; 48 fill
    89 bf fc 0f 00 00       mov   [edi + 4092], edi
    81 c7 00 10 00 00       add   edi, 4096
    3b 3d 00 fe ff ff       cmp   edi, [limit]
    72 e9                   jb    fill
    b0 52                   mov   al, 'R'
    ee                      out   dx, al
    bb 00 00 10 00          mov   ebx, 1 << 20
    31 f6                   xor   esi, esi             ; what is read
    bd 01 00 00 00          mov   ebp, 1               ; the count of this turn
    89 df                   mov   edi, ebx             ; what is written
    3b 3d 04 fe ff ff       cmp   edi, [window]        ; 70 step
    73 3c                   jae   again
    ff 07                   inc   dword [edi]
    39 2f                   cmp   [edi], ebp
    75 30                   jne   bad
    39 7f 04                cmp   [edi + 4], edi
    75 2b                   jne   bad
    81 c7 00 10 00 00       add   edi, 4096
    03 35 08 fe ff ff       add   esi, [stride]        ; 89 read
    3b 35 00 fe ff ff       cmp   esi, [limit]
    72 06                   jb    within
    2b 35 00 fe ff ff       sub   esi, [limit]
    39 de                   cmp   esi, ebx             ; 9d within
    72 18                   jb    below
    39 76 04                cmp   [esi + 4], esi
    75 08                   jne   bad
    39 b6 fc 0f 00 00       cmp   [esi + 4092], esi
    74 c2                   je    step
    b0 45                   mov   al, 'E'              ; ae bad
    ee                      out   dx, al
    f4                      hlt                        ; b1 stop
    eb fd                   jmp   stop
    45                      inc   ebp                  ; b4 again
    89 df                   mov   edi, ebx
    eb d0                   jmp   read
    85 f6                   test  esi, esi             ; b9 below
    75 b3                   jnz   step
    b0 42                   mov   al, 'B'              ; all pages have been read
    ee                      out   dx, al
    eb ae                   jmp   step
"""
_MAIN_AT: Final = 0x30

_START: Final = """
    fa                      cli                        ; in 16 bits
    2e 66 0f 01 16 0c fe    o32 lgdt [cs:0xfe0c]
    0f 20 c0                mov   eax, cr0
    0c 01                   or    al, 1
    0f 22 c0                mov   cr0, eax
    66 ea 30 fe ff ff 08 00 jmp   8:main
"""
_START_AT: Final = 0x1D0

_RESET: Final = "eb de                  jmp   start"
_RESET_AT: Final = 0x1F0  # 0xfffffff0: where an x86 begins


def firmware(memory: int, window: int = 0, *, scattered: bool = True) -> bytes:
    """Make the image of a ROM that is the guest.

    Args:
        memory: Of the guest, in bytes; all from 1 MiB on is filled.
        window: How many bytes from 1 MiB on are rewritten all the time.
        scattered: False reads page after page; True goes through them by a long stride.

    Returns:
        64 KiB, for ``-bios``.
    """
    pages = memory // PAGE
    stride = 1
    if scattered:
        stride = int(pages * _GOLDEN)
        while math.gcd(stride, pages) != 1:  # else some pages would never be read
            stride += 1
    end = min(FIRST + window // PAGE * PAGE, memory)
    code = bytearray(_CODE)
    _HEADER.pack_into(code, 0, memory, end, stride * PAGE, 8 * len(_FLAT) - 1, _GDT, *_FLAT)
    for at, listing in ((_MAIN_AT, _MAIN), (_START_AT, _START), (_RESET_AT, _RESET)):
        bytes_of = _assembled(listing)
        code[at : at + len(bytes_of)] = bytes_of
    return bytes(_ROM - _CODE) + bytes(code)


def _assembled(listing: str) -> bytes:
    """Take the bytes of a listing: the pairs of hexadecimal digits before each instruction."""
    found = bytearray()
    for line in listing.strip().splitlines():
        for word in line.split():
            if len(word) != 2 or not set(word) <= set("0123456789abcdef"):
                break
            found.append(int(word, 16))
    return bytes(found)
