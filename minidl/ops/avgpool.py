"""Average pooling. Formulas: avgpool.cu."""

from minidl.device import Array, empty
from minidl.kernels import Kernels
from minidl.ops.window import output_size, threads_along

KERNELS = Kernels("avgpool.cu")


def forward(x: Array, window: tuple[int, ...], stride: int, padding: int = 0) -> Array:
    """x (C, H, W, N), window (kh, kw) -> y (C, H', W', N), the means; zeros of the padding count.

    H' = floor((H + 2 * padding - kh) / stride) + 1. Raises ValueError for a window larger than the padded image.
    """
    channels, height, width, batch = x.shape
    out_height, out_width = output_size("average pool", (height, width), window, stride, padding)
    y = empty((channels, out_height, out_width, batch), x.dtype, like=x)
    KERNELS.avgpool_forward[channels * out_height, threads_along(batch)](
        x, y, height, width, out_height, out_width, batch, *window, stride, padding)
    return y


def backward(dy: Array, x_shape: tuple[int, ...], window: tuple[int, ...], stride: int, padding: int = 0) -> Array:
    """dy (C, H', W', N) -> dx of shape x_shape (C, H, W, N)."""
    channels, height, width, batch = x_shape
    dx = empty(x_shape, dy.dtype, like=dy)
    KERNELS.avgpool_backward[channels * height, threads_along(batch)](
        dy, dx, height, width, *dy.shape[1:3], batch, *window, stride, padding)
    return dx
