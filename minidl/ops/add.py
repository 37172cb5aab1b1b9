"""The sum where two branches meet. Formula: add.cu."""

from minidl.device import Array, empty
from minidl.kernels import Kernels, blocks_for

KERNELS = Kernels("add.cu")
THREADS = 256


def forward(a: Array, b: Array, out: Array | None = None) -> Array:
    """a, b of one shape -> y = a + b, written to `out` if given, which may be a or b. Its gradient is dy for both.

    Raises ValueError for different shapes.
    """
    y = empty(a.shape, a.dtype, like=a) if out is None else out
    if not a.shape == b.shape == y.shape:
        raise ValueError(f"add: shapes {a.shape} and {b.shape} differ" if a.shape != b.shape else
                         f"add: out {y.shape} has another shape than the sum {a.shape}")
    KERNELS.add[blocks_for(a.size), THREADS](a, b, y, a.size)
    return y
