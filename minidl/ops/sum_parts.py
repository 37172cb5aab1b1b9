"""The last step of sums that are computed in parts, such as weight gradients."""

from minidl.device import Array, empty
from minidl.kernels import Kernels, blocks_for

KERNELS = Kernels("sum_parts.cu")
THREADS = 128


def parts_of(total: Array, count: int) -> Array:
    """Where `count` parts of total (...) are to be written, an array (count, ...): in total itself, if there is one."""
    return total[None] if count == 1 else empty((count, *total.shape), total.dtype, like=total)


def sum_parts(parts: Array, total: Array) -> None:
    """parts (P, ...) as from `parts_of`, of the type of accumulation: overwrites total (...) with their sum, in their order."""
    if len(parts) == 1:
        return
    # An element a thread: there are few elements, and a GPU has many threads.
    KERNELS.sum_parts[blocks_for(total.size, THREADS), THREADS](parts, total, len(parts), total.size)
