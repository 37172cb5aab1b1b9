"""The sum where two branches meet. Formula: add.cu."""

from minidl.device import Array
from minidl.kernels import Kernels, blocks_for
from minidl.ops.shapes import result

KERNELS = Kernels("add.cu")
THREADS = 256


def forward(a: Array, b: Array, out: Array | None = None) -> Array:
    """a, b of one shape -> y = a + b, written to `out` if given, which may be a or b. Its gradient is dy for both.

    Raises ValueError for different shapes.
    """
    if a.shape != b.shape:
        raise ValueError(f"add: shapes {a.shape} and {b.shape} differ")
    y = result("add", "out", out, a.shape, a)
    KERNELS.add[blocks_for(a.size), THREADS](a, b, y, a.size)
    return y
