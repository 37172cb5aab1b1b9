"""Max-pooling. Formulas: maxpool.cu."""

import numpy as np

from minidl.device import Array, empty
from minidl.kernels import Kernels
from minidl.ops.shapes import check_pool_padding, image_sizes, output_size
from minidl.ops.threads import threads_of_row

KERNELS = Kernels("maxpool.cu")


def forward(x: Array, window: tuple[int, ...], stride: int, padding: int = 0) -> tuple[Array, Array]:
    """x (C, H, W, N), window (kh, kw) -> y (C, H', W', N), winner (C, H', W', N).

    H' = floor((H + 2 * padding - kh) / stride) + 1. winner, uint16: the place ky * kw + kx of each maximum in its
    window, for `backward`. Raises ValueError for a window larger than the padded image or of more than 65,536
    pixels, and for a padding of more than half of it.
    """
    channels, height, width, batch = image_sizes("max-pool", x)
    out_height, out_width = output_size("max-pool", (height, width), window, stride, padding)
    check_pool_padding("max-pool", window, padding)
    if window[0] * window[1] > 1 << 16:
        raise ValueError(f"max-pool: window {window[0]}x{window[1]} has more than 65536 pixels")
    y = empty((channels, out_height, out_width, batch), x.dtype, like=x)
    winner = empty(y.shape, np.uint16, like=x)
    KERNELS.maxpool_forward[channels * out_height, threads_of_row(out_width, batch, x.itemsize)](
        x, y, winner, height, width, out_height, out_width, batch, *window, stride, padding)
    return y, winner


def backward(dy: Array, winner: Array, x_shape: tuple[int, ...], window: tuple[int, ...], stride: int,
             padding: int = 0) -> Array:
    """dy, winner (C, H', W', N) as in `forward` -> dx of shape x_shape (C, H, W, N). Raises ValueError for other shapes."""
    channels, height, width, batch = x_shape
    y_shape = channels, *output_size("max-pool", (height, width), window, stride, padding), batch
    if not dy.shape == winner.shape == y_shape:
        raise ValueError(f"max-pool: dy {dy.shape} and winner {winner.shape} of an output of shape {y_shape}")
    dx = empty(x_shape, dy.dtype, like=dy)
    KERNELS.maxpool_backward[channels * height, threads_of_row(width, batch, dx.itemsize)](
        dy, winner, dx, height, width, *dy.shape[1:3], batch, *window, stride, padding)
    return dx
