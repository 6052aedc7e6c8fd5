"""Heap settings of a serving process: memory freed by one answer is retained for the next.

glibc returns large blocks to the system when they are freed, and each of their pages costs a fault when it is used
again. By itself glibc raises its threshold to the largest block freed so far, up to the limits here (mallopt(3),
M_MMAP_THRESHOLD). The cost of a batch would then depend on what the process happened to read before. On 64 queries of
50,000 entries the faults took a quarter of the time.
"""

import ctypes
import functools

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST_BLOCK = 32 << 20  # DEFAULT_MMAP_THRESHOLD_MAX, the most to which glibc raises its threshold


@functools.cache
def keep_freed_memory() -> None:
    """Let this process retain up to 64 MiB of freed memory. Does nothing if the C library is not glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_BLOCK)
        mallopt(_M_TRIM_THRESHOLD, 2 * _LARGEST_BLOCK)
