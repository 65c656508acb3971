"""The userfaultfd uAPI as numbers and struct layouts: what ``<linux/userfaultfd.h>`` says.

Knows: every constant, struct, ioctl, feature, event, mode and flag through Linux 6.18.
Must not know: how to call anything; nothing here touches the system.

Laws of this file:

* Names are the header's names, so that a reader of the kernel finds them.
* Masks are open-ended: bits of newer kernels are kept and shown, never refused.
* Struct formats are native-endian with standard sizes (``=``), like the kernel's own
  ``__u64`` fields; a test compares them with what a C compiler lays out.

Source: include/uapi/linux/userfaultfd.h and include/uapi/linux/fs.h of Linux 6.18.
"""

from __future__ import annotations

import os
import struct
from typing import Final

# --- opening ---------------------------------------------------------------------------

UFFD_USER_MODE_ONLY: Final = 1  # since Linux 5.11: user-mode faults only, no privilege needed
DEVICE_PATH: Final = "/dev/userfaultfd"  # since Linux 6.1
ANON_INODE_LINK: Final = "anon_inode:[userfaultfd]"  # what /proc/PID/fd/N reads
UNPRIVILEGED_SYSCTL: Final = "/proc/sys/vm/unprivileged_userfaultfd"  # since Linux 5.2

#: Number of the ``userfaultfd`` system call; asm-generic (arm64, riscv64, loongarch64) is 282.
SYSCALL_NUMBERS: Final = {"x86_64": 323, "i386": 374, "i686": 374}
MACHINE: Final = os.uname().machine if hasattr(os, "uname") else ""
NR_USERFAULTFD: Final = SYSCALL_NUMBERS.get(MACHINE, 282)

UFFD_API: Final = 0xAA

#: Number of the ``cachestat`` system call, the same on every machine; since Linux 6.5.
NR_CACHESTAT: Final = 451
#: Number of the ``tgkill`` system call, which the C library has no wrapper for before glibc 2.30.
NR_TGKILL: Final = {"x86_64": 234, "i386": 270, "i686": 270}.get(MACHINE, 131)
#: Number of the ``madvise`` system call.
NR_MADVISE: Final = {"x86_64": 28, "i386": 219, "i686": 219}.get(MACHINE, 233)

# --- ioctl numbers ---------------------------------------------------------------------

UFFDIO: Final = 0xAA  # the ioctl type; numbers 0x00 to 0x3F belong to userfaultfd
USERFAULTFD_IOC: Final = 0xAA  # the same on the device

_UFFDIO_REGISTER: Final = 0x00
_UFFDIO_UNREGISTER: Final = 0x01
_UFFDIO_WAKE: Final = 0x02
_UFFDIO_COPY: Final = 0x03
_UFFDIO_ZEROPAGE: Final = 0x04
_UFFDIO_MOVE: Final = 0x05
_UFFDIO_WRITEPROTECT: Final = 0x06
_UFFDIO_CONTINUE: Final = 0x07
_UFFDIO_POISON: Final = 0x08
_UFFDIO_API: Final = 0x3F

# --- structs, each beside its C fields -------------------------------------------------

UFFDIO_API_STRUCT: Final = struct.Struct("=QQQ")  # api, features (in/out), ioctls (out)
UFFDIO_RANGE_STRUCT: Final = struct.Struct("=QQ")  # start, len
UFFDIO_REGISTER_STRUCT: Final = struct.Struct("=QQQQ")  # start, len, mode, ioctls (out)
UFFDIO_COPY_STRUCT: Final = struct.Struct("=QQQQq")  # dst, src, len, mode, copy (out)
UFFDIO_MOVE_STRUCT: Final = struct.Struct("=QQQQq")  # dst, src, len, mode, move (out)
UFFDIO_ZEROPAGE_STRUCT: Final = struct.Struct("=QQQq")  # start, len, mode, zeropage (out)
UFFDIO_CONTINUE_STRUCT: Final = struct.Struct("=QQQq")  # start, len, mode, mapped (out)
UFFDIO_POISON_STRUCT: Final = struct.Struct("=QQQq")  # start, len, mode, updated (out)
UFFDIO_WRITEPROTECT_STRUCT: Final = struct.Struct("=QQQ")  # start, len, mode

#: ``struct uffd_msg``, one format per event: they share their first byte and their size.
UFFD_MSG_SIZE: Final = 32
UFFD_MSG_PAGEFAULT: Final = struct.Struct("=B7xQQI4x")  # event, flags, address, ptid
UFFD_MSG_FORK: Final = struct.Struct("=B7xI20x")  # event, ufd
UFFD_MSG_REMAP: Final = struct.Struct("=B7xQQQ")  # event, from, to, len (the old one)
UFFD_MSG_RANGE: Final = struct.Struct("=B7xQQ8x")  # event, start, end (exclusive)


def ioc(direction: int, kind: int, number: int, size: int) -> int:
    """Compose an ioctl request number as ``_IOC`` does on x86-64 and aarch64.

    Args:
        direction: 0 none, 1 write, 2 read, 3 both, as the kernel's caller sees it.
        kind: The ioctl type, ``0xAA`` for userfaultfd.
        number: The number within that type.
        size: Size of the argument struct, in bytes.
    """
    return direction << 30 | size << 16 | kind << 8 | number


_READ: Final = 2
_BOTH: Final = 3

UFFDIO_API: Final = ioc(_BOTH, UFFDIO, _UFFDIO_API, UFFDIO_API_STRUCT.size)
UFFDIO_REGISTER: Final = ioc(_BOTH, UFFDIO, _UFFDIO_REGISTER, UFFDIO_REGISTER_STRUCT.size)
# UNREGISTER and WAKE carry the *read* direction although the kernel reads from them: a slip
# of 2015 that stays. With the other direction every wake fails with EINVAL.
UFFDIO_UNREGISTER: Final = ioc(_READ, UFFDIO, _UFFDIO_UNREGISTER, UFFDIO_RANGE_STRUCT.size)
UFFDIO_WAKE: Final = ioc(_READ, UFFDIO, _UFFDIO_WAKE, UFFDIO_RANGE_STRUCT.size)
UFFDIO_COPY: Final = ioc(_BOTH, UFFDIO, _UFFDIO_COPY, UFFDIO_COPY_STRUCT.size)
UFFDIO_ZEROPAGE: Final = ioc(_BOTH, UFFDIO, _UFFDIO_ZEROPAGE, UFFDIO_ZEROPAGE_STRUCT.size)
UFFDIO_MOVE: Final = ioc(_BOTH, UFFDIO, _UFFDIO_MOVE, UFFDIO_MOVE_STRUCT.size)  # 6.8
UFFDIO_WRITEPROTECT: Final = ioc(
    _BOTH, UFFDIO, _UFFDIO_WRITEPROTECT, UFFDIO_WRITEPROTECT_STRUCT.size
)  # 5.7
UFFDIO_CONTINUE: Final = ioc(_BOTH, UFFDIO, _UFFDIO_CONTINUE, UFFDIO_CONTINUE_STRUCT.size)  # 5.13
UFFDIO_POISON: Final = ioc(_BOTH, UFFDIO, _UFFDIO_POISON, UFFDIO_POISON_STRUCT.size)  # 6.6
USERFAULTFD_IOC_NEW: Final = ioc(0, UFFDIO, 0x00, 0)  # on /dev/userfaultfd, since Linux 6.1

#: Every ioctl by name: (number within the type, request, struct, result field's name).
IOCTLS: Final[dict[str, tuple[int, int, struct.Struct, str | None]]] = {
    "REGISTER": (_UFFDIO_REGISTER, UFFDIO_REGISTER, UFFDIO_REGISTER_STRUCT, "ioctls"),
    "UNREGISTER": (_UFFDIO_UNREGISTER, UFFDIO_UNREGISTER, UFFDIO_RANGE_STRUCT, None),
    "WAKE": (_UFFDIO_WAKE, UFFDIO_WAKE, UFFDIO_RANGE_STRUCT, None),
    "COPY": (_UFFDIO_COPY, UFFDIO_COPY, UFFDIO_COPY_STRUCT, "copy"),
    "ZEROPAGE": (_UFFDIO_ZEROPAGE, UFFDIO_ZEROPAGE, UFFDIO_ZEROPAGE_STRUCT, "zeropage"),
    "MOVE": (_UFFDIO_MOVE, UFFDIO_MOVE, UFFDIO_MOVE_STRUCT, "move"),
    "WRITEPROTECT": (_UFFDIO_WRITEPROTECT, UFFDIO_WRITEPROTECT, UFFDIO_WRITEPROTECT_STRUCT, None),
    "CONTINUE": (_UFFDIO_CONTINUE, UFFDIO_CONTINUE, UFFDIO_CONTINUE_STRUCT, "mapped"),
    "POISON": (_UFFDIO_POISON, UFFDIO_POISON, UFFDIO_POISON_STRUCT, "updated"),
    "API": (_UFFDIO_API, UFFDIO_API, UFFDIO_API_STRUCT, "ioctls"),
}

#: Bits of ``uffdio_api.ioctls`` and ``uffdio_register.ioctls``: bit N is ioctl number N.
IOCTL_BITS: Final[dict[str, int]] = {name: 1 << entry[0] for name, entry in IOCTLS.items()}

UFFD_API_IOCTLS: Final = IOCTL_BITS["REGISTER"] | IOCTL_BITS["UNREGISTER"] | IOCTL_BITS["API"]
UFFD_API_RANGE_IOCTLS: Final = (
    IOCTL_BITS["WAKE"]
    | IOCTL_BITS["COPY"]
    | IOCTL_BITS["ZEROPAGE"]
    | IOCTL_BITS["MOVE"]
    | IOCTL_BITS["WRITEPROTECT"]
    | IOCTL_BITS["CONTINUE"]
    | IOCTL_BITS["POISON"]
)
UFFD_API_RANGE_IOCTLS_BASIC: Final = (  # what every kind of memory has, hugetlb too
    IOCTL_BITS["WAKE"]
    | IOCTL_BITS["COPY"]
    | IOCTL_BITS["WRITEPROTECT"]
    | IOCTL_BITS["CONTINUE"]
    | IOCTL_BITS["POISON"]
)

# --- features (uffdio_api.features) ----------------------------------------------------

UFFD_FEATURE_PAGEFAULT_FLAG_WP: Final = 1 << 0  # 5.7
UFFD_FEATURE_EVENT_FORK: Final = 1 << 1  # 4.11; needs CAP_SYS_PTRACE
UFFD_FEATURE_EVENT_REMAP: Final = 1 << 2  # 4.11
UFFD_FEATURE_EVENT_REMOVE: Final = 1 << 3  # 4.11
UFFD_FEATURE_MISSING_HUGETLBFS: Final = 1 << 4  # 4.11
UFFD_FEATURE_MISSING_SHMEM: Final = 1 << 5  # 4.11
UFFD_FEATURE_EVENT_UNMAP: Final = 1 << 6  # 4.11
UFFD_FEATURE_SIGBUS: Final = 1 << 7  # 4.14
UFFD_FEATURE_THREAD_ID: Final = 1 << 8  # 4.14
UFFD_FEATURE_MINOR_HUGETLBFS: Final = 1 << 9  # 5.13
UFFD_FEATURE_MINOR_SHMEM: Final = 1 << 10  # 5.14
UFFD_FEATURE_EXACT_ADDRESS: Final = 1 << 11  # 5.18
UFFD_FEATURE_WP_HUGETLBFS_SHMEM: Final = 1 << 12  # 5.19
UFFD_FEATURE_WP_UNPOPULATED: Final = 1 << 13  # 6.4
UFFD_FEATURE_POISON: Final = 1 << 14  # 6.6
UFFD_FEATURE_WP_ASYNC: Final = 1 << 15  # 6.7
UFFD_FEATURE_MOVE: Final = 1 << 16  # 6.8

#: Features by their short names, in bit order.
FEATURES: Final[dict[str, int]] = {
    "PAGEFAULT_FLAG_WP": UFFD_FEATURE_PAGEFAULT_FLAG_WP,
    "EVENT_FORK": UFFD_FEATURE_EVENT_FORK,
    "EVENT_REMAP": UFFD_FEATURE_EVENT_REMAP,
    "EVENT_REMOVE": UFFD_FEATURE_EVENT_REMOVE,
    "MISSING_HUGETLBFS": UFFD_FEATURE_MISSING_HUGETLBFS,
    "MISSING_SHMEM": UFFD_FEATURE_MISSING_SHMEM,
    "EVENT_UNMAP": UFFD_FEATURE_EVENT_UNMAP,
    "SIGBUS": UFFD_FEATURE_SIGBUS,
    "THREAD_ID": UFFD_FEATURE_THREAD_ID,
    "MINOR_HUGETLBFS": UFFD_FEATURE_MINOR_HUGETLBFS,
    "MINOR_SHMEM": UFFD_FEATURE_MINOR_SHMEM,
    "EXACT_ADDRESS": UFFD_FEATURE_EXACT_ADDRESS,
    "WP_HUGETLBFS_SHMEM": UFFD_FEATURE_WP_HUGETLBFS_SHMEM,
    "WP_UNPOPULATED": UFFD_FEATURE_WP_UNPOPULATED,
    "POISON": UFFD_FEATURE_POISON,
    "WP_ASYNC": UFFD_FEATURE_WP_ASYNC,
    "MOVE": UFFD_FEATURE_MOVE,
}

UFFD_API_FEATURES: Final = sum(FEATURES.values())  # all of Linux 6.18; newer kernels have more

#: The first release that has each feature; distributions backport, so this only informs.
FEATURE_SINCE: Final[dict[str, str]] = {
    "PAGEFAULT_FLAG_WP": "5.7",
    "EVENT_FORK": "4.11",
    "EVENT_REMAP": "4.11",
    "EVENT_REMOVE": "4.11",
    "MISSING_HUGETLBFS": "4.11",
    "MISSING_SHMEM": "4.11",
    "EVENT_UNMAP": "4.11",
    "SIGBUS": "4.14",
    "THREAD_ID": "4.14",
    "MINOR_HUGETLBFS": "5.13",
    "MINOR_SHMEM": "5.14",
    "EXACT_ADDRESS": "5.18",
    "WP_HUGETLBFS_SHMEM": "5.19",
    "WP_UNPOPULATED": "6.4",
    "POISON": "6.6",
    "WP_ASYNC": "6.7",
    "MOVE": "6.8",
}

# --- modes -----------------------------------------------------------------------------

UFFDIO_REGISTER_MODE_MISSING: Final = 1 << 0
UFFDIO_REGISTER_MODE_WP: Final = 1 << 1
UFFDIO_REGISTER_MODE_MINOR: Final = 1 << 2

REGISTER_MODES: Final[dict[str, int]] = {
    "MISSING": UFFDIO_REGISTER_MODE_MISSING,
    "WP": UFFDIO_REGISTER_MODE_WP,
    "MINOR": UFFDIO_REGISTER_MODE_MINOR,
}

UFFD_API_REGISTER_MODES: Final = sum(REGISTER_MODES.values())

UFFDIO_COPY_MODE_DONTWAKE: Final = 1 << 0
UFFDIO_COPY_MODE_WP: Final = 1 << 1
UFFDIO_ZEROPAGE_MODE_DONTWAKE: Final = 1 << 0
UFFDIO_CONTINUE_MODE_DONTWAKE: Final = 1 << 0
UFFDIO_CONTINUE_MODE_WP: Final = 1 << 1
UFFDIO_POISON_MODE_DONTWAKE: Final = 1 << 0
UFFDIO_MOVE_MODE_DONTWAKE: Final = 1 << 0
UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES: Final = 1 << 1
UFFDIO_WRITEPROTECT_MODE_WP: Final = 1 << 0
UFFDIO_WRITEPROTECT_MODE_DONTWAKE: Final = 1 << 1  # the other bit than everywhere else

# --- messages --------------------------------------------------------------------------

UFFD_EVENT_PAGEFAULT: Final = 0x12
UFFD_EVENT_FORK: Final = 0x13
UFFD_EVENT_REMAP: Final = 0x14
UFFD_EVENT_REMOVE: Final = 0x15
UFFD_EVENT_UNMAP: Final = 0x16

EVENTS: Final[dict[str, int]] = {
    "PAGEFAULT": UFFD_EVENT_PAGEFAULT,
    "FORK": UFFD_EVENT_FORK,
    "REMAP": UFFD_EVENT_REMAP,
    "REMOVE": UFFD_EVENT_REMOVE,
    "UNMAP": UFFD_EVENT_UNMAP,
}

UFFD_PAGEFAULT_FLAG_WRITE: Final = 1 << 0
UFFD_PAGEFAULT_FLAG_WP: Final = 1 << 1
UFFD_PAGEFAULT_FLAG_MINOR: Final = 1 << 2

PAGEFAULT_FLAGS: Final[dict[str, int]] = {
    "WRITE": UFFD_PAGEFAULT_FLAG_WRITE,
    "WP": UFFD_PAGEFAULT_FLAG_WP,
    "MINOR": UFFD_PAGEFAULT_FLAG_MINOR,
}

# --- PAGEMAP_SCAN (linux/fs.h, since Linux 6.7) ----------------------------------------

#: struct pm_scan_arg: size, flags, start, end, walk_end (out), vec, vec_len, max_pages,
#: category_inverted, category_mask, category_anyof_mask, return_mask
PM_SCAN_ARG_STRUCT: Final = struct.Struct("=12Q")
PAGE_REGION_STRUCT: Final = struct.Struct("=QQQ")  # start, end, categories
PAGEMAP_SCAN: Final = ioc(_BOTH, ord("f"), 16, PM_SCAN_ARG_STRUCT.size)

PM_SCAN_WP_MATCHING: Final = 1 << 0
PM_SCAN_CHECK_WPASYNC: Final = 1 << 1

PAGE_IS_WPALLOWED: Final = 1 << 0
PAGE_IS_WRITTEN: Final = 1 << 1
PAGE_IS_FILE: Final = 1 << 2
PAGE_IS_PRESENT: Final = 1 << 3
PAGE_IS_SWAPPED: Final = 1 << 4  # also a write-protect marker on a never-populated page
PAGE_IS_PFNZERO: Final = 1 << 5
PAGE_IS_HUGE: Final = 1 << 6
PAGE_IS_SOFT_DIRTY: Final = 1 << 7
PAGE_IS_GUARD: Final = 1 << 8  # 6.16

PAGE_CATEGORIES: Final[dict[str, int]] = {
    "WPALLOWED": PAGE_IS_WPALLOWED,
    "WRITTEN": PAGE_IS_WRITTEN,
    "FILE": PAGE_IS_FILE,
    "PRESENT": PAGE_IS_PRESENT,
    "SWAPPED": PAGE_IS_SWAPPED,
    "PFNZERO": PAGE_IS_PFNZERO,
    "HUGE": PAGE_IS_HUGE,
    "SOFT_DIRTY": PAGE_IS_SOFT_DIRTY,
    "GUARD": PAGE_IS_GUARD,
}

#: Bits of one u64 of /proc/PID/pagemap.
PM_SOFT_DIRTY: Final = 1 << 55
PM_MMAP_EXCLUSIVE: Final = 1 << 56
PM_UFFD_WP: Final = 1 << 57
PM_GUARD_REGION: Final = 1 << 58  # 6.15
PM_FILE: Final = 1 << 61
PM_SWAP: Final = 1 << 62
PM_PRESENT: Final = 1 << 63

# --- sockets ---------------------------------------------------------------------------

SO_PASSPIDFD: Final = 76  # since Linux 6.5: messages come with SCM_PIDFD
SO_PEERPIDFD: Final = 77  # since Linux 6.5
SCM_PIDFD: Final = 4  # a pidfd of who has sent the message


def names(mask: int, table: dict[str, int]) -> tuple[str, ...]:
    """Name the bits of a mask; a bit that the table lacks is shown as ``bit N``.

    Args:
        mask: Any mask the kernel gave.
        table: One of the name-to-bit tables above.
    """
    known = tuple(name for name, bit in table.items() if mask & bit)
    rest = mask & ~sum(table.values())
    return known + tuple(f"bit {n}" for n in range(rest.bit_length()) if rest >> n & 1)
