"""The last step of sums that are computed in parts, such as weight gradients."""

from minidl.device import Array
from minidl.kernels import Kernels, blocks_for

KERNELS = Kernels("sum_parts.cu")
THREADS = 128


def sum_parts(parts: Array, total: Array) -> None:
    """parts (P, ...), of the type of accumulation: overwrites total (...) with their sum, in their order."""
    # An element a thread: there are few elements, and a GPU has many threads.
    KERNELS.sum_parts[blocks_for(total.size, THREADS), THREADS](parts, total, len(parts), total.size)
