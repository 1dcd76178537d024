"""What the C library's heap does with the memory that tensors on a CPU give back: it keeps it.

glibc cuts the free end off its heap when that is about twice as large as the largest block, and the next step's tensors
fault it in again, page by page. Kept, the process stays as large as it was at its largest; where blocks lie does not
change: up to 32 MiB in the heap, which is as far as glibc itself goes once such blocks were freed, larger ones on their
own. Knows nothing of tensors.
"""

import ctypes
import os
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_KEPT_BYTES, _IN_HEAP_BYTES = 1 << 30, 32 << 20  # naming one alone would leave the other at 128 KiB, for good
_CHOICES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")


def keep_freed_memory() -> bool:
    """Whether glibc keeps what is freed from now on: not where there is another C library, or the user has chosen."""
    if platform.libc_ver()[0] != "glibc" or any(os.environ.get(name) for name in _CHOICES):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES), mallopt(_M_MMAP_THRESHOLD, _IN_HEAP_BYTES)])
