"""Arrays that end, or begin, where memory ends: a kernel that reads or writes beyond them is killed on the spot.

The emulator watches every index of a kernel's plain text; what the vectors of the fast host target do, nobody else would see.
"""

import ctypes
import itertools
import math
import mmap

import numpy as np

LARGEST = 1 << 18  # bytes: what is larger goes the same ways, and fresh pages take time
_LIBC = ctypes.CDLL(None, use_errno=True)
_NO_ACCESS = 0  # PROT_NONE
_turns = itertools.count()


def empty(shape, dtype):
    """An uninitialized array with an inaccessible page right behind it, every fifth one right in front of it."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    if size > LARGEST:
        return np.empty(shape, dtype)
    inside = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, mmap.PAGESIZE + inside + mmap.PAGESIZE)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (begin, begin + mmap.PAGESIZE + inside):
        if _LIBC.mprotect(ctypes.c_void_p(page), mmap.PAGESIZE, _NO_ACCESS):
            raise OSError(ctypes.get_errno(), "mprotect")
    ctypes.memset(begin + mmap.PAGESIZE, 0xFF, inside)  # NaN, of all types: what is read before it is written shows
    at_the_end = next(_turns) % 5 > 0
    return np.ndarray(shape, dtype, memory, mmap.PAGESIZE + at_the_end * (inside - size))


def copy(array):
    """Its values, contiguous, in such an array."""
    result = empty(array.shape, array.dtype)
    result[...] = array
    return result
