"""What write, fread and gzread say when memory fails in the middle of a transfer.

    python examples/races/short_transfers.py

Nothing here is ours: it is the C library and the zlib of this system.  Memory of eight pages
fails from its fifth on, and each call is handed all of it.
"""

import ctypes
import os
import tempfile
from pathlib import Path

from aiouffd.testing import Harness, Region

GOOD = 4  # pages
TYPES: dict[str, type] = {
    "i": ctypes.c_int,
    "I": ctypes.c_uint,
    "l": ctypes.c_long,
    "n": ctypes.c_size_t,
    "s": ctypes.c_char_p,
    "p": ctypes.c_void_p,
}
LINES = b"".join(b"%07d\n" % number for number in range(8192))

libc = ctypes.CDLL(None, use_errno=True)
libz = ctypes.CDLL("libz.so.1", use_errno=True)
for function, result, arguments in (
    (libc.write, ctypes.c_ssize_t, "ipn"),
    (libc.fopen, ctypes.c_void_p, "ss"),
    (libc.fread, ctypes.c_size_t, "pnnp"),
    (libc.ferror, ctypes.c_int, "p"),
    (libc.ftell, ctypes.c_long, "p"),
    (libc.fclose, ctypes.c_int, "p"),
    (libz.zlibVersion, ctypes.c_char_p, ""),
    (libz.gzdopen, ctypes.c_void_p, "is"),
    (libz.gzread, ctypes.c_int, "ppI"),
    (libz.gzerror, ctypes.c_char_p, "pp"),
    (libz.gztell, ctypes.c_long, "p"),
    (libz.gzseek, ctypes.c_long, "pli"),
    (libz.gzrewind, ctypes.c_int, "p"),
    (libz.gzclearerr, None, "p"),
    (libz.gzclose, ctypes.c_int, "p"),
):
    function.restype = result
    function.argtypes = [TYPES[letter] for letter in arguments]


def writing(region: Region, file: Path) -> None:
    """write(2): a short count first, the error from the call after it."""
    with file.open("wb", buffering=0) as out:
        first = libc.write(out.fileno(), region.address, region.length)
        assert first > 0
        second = libc.write(out.fileno(), region.address + first, region.length - first)
        print(f"write: {first}, then {second} ({os.strerror(ctypes.get_errno())})")
        print(f"       {file.stat().st_size} bytes are in the file")


def reading(region: Region, file: Path) -> None:
    """fread(3): a short count and the error together, and the position is that of the count."""
    stream = libc.fopen(bytes(file), b"rb")
    count = libc.fread(region.address, 1, region.length, stream)
    error = os.strerror(ctypes.get_errno())
    print(f"fread: {count}, ferror {libc.ferror(stream)} ({error})")
    print(f"       the position is {libc.ftell(stream)}")
    libc.fclose(stream)


def gzreading(region: Region, file: Path) -> None:
    """gzread: only the error.  What it has delivered is not counted, nor delivered again."""
    stream = libz.gzdopen(os.open(file, os.O_RDONLY), b"rb")
    count = libz.gzread(stream, region.address, region.length)
    reason = os.fsdecode(libz.gzerror(stream, ctypes.byref(ctypes.c_int())))
    told = libz.gztell(stream)
    print(f"gzread: {count} ({reason.rpartition(': ')[2]})")
    print(f"       {delivered(region)} bytes are in the memory, the position is {told}")

    line = ctypes.create_string_buffer(8)
    libz.gzclearerr(stream)
    libz.gzread(stream, line, 8)
    print(f"       cleared and read again, it goes on at byte {int(line.value) * 8}")

    libz.gzrewind(stream)  # the repair: say where, counted from the beginning
    libz.gzseek(stream, told, os.SEEK_SET)
    libz.gzread(stream, line, 8)
    print(f"       rewound to {told} first, it goes on at byte {int(line.value) * 8}")
    libz.gzclose(stream)


def delivered(region: Region) -> int:
    """Count the bytes that have come out of the file into the memory that is good."""
    good = region.peek(0, GOOD * region.page_size)
    return next((at for at in range(len(good)) if good[at] != LINES[at]), len(good))


print(f"zlib {libz.zlibVersion().decode()}")
with tempfile.TemporaryDirectory() as folder, Harness() as uffd:
    if unseen := [limit for limit in uffd.limits if "System calls" in limit]:
        raise SystemExit(unseen[0])
    file = Path(folder, "lines")
    for transfer in (writing, reading, gzreading):
        region = uffd.region(2 * GOOD, name=transfer.__name__)
        for page in range(GOOD, 2 * GOOD):
            region.page(page).fail()
        file.write_bytes(LINES)
        transfer(region, file)
