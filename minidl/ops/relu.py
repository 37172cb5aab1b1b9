"""Rectifier. Formulas: relu.cu."""

from minidl.device import Array, empty
from minidl.kernels import Kernels, blocks_for

KERNELS = Kernels("relu.cu")
THREADS = 256


def forward(x: Array) -> Array:
    """x of any shape -> y of the same shape, max(x, 0); NaN stays NaN."""
    y = empty(x.shape, x.dtype, like=x)
    KERNELS.relu_forward[blocks_for(x.size), THREADS](x, y, x.size)
    return y


def backward(dy: Array, y: Array) -> Array:
    """dy, y of one shape -> dx: dy where y is positive, else 0. Raises ValueError for different shapes."""
    if dy.shape != y.shape:
        raise ValueError(f"relu: dy {dy.shape} has another shape than y {y.shape}")
    dx = empty(dy.shape, dy.dtype, like=dy)
    KERNELS.relu_backward[blocks_for(dy.size), THREADS](dy, y, dx, dy.size)
    return dx
