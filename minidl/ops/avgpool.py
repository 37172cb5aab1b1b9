"""Average pooling. Formulas: avgpool.cu."""

from minidl.device import Array
from minidl.kernels import Kernels
from minidl.ops.shapes import check_pool_padding, image_sizes, output_size, result
from minidl.ops.threads import threads_of_row

KERNELS = Kernels("avgpool.cu")


def forward(x: Array, window: tuple[int, ...], stride: int, padding: int = 0, out: Array | None = None) -> Array:
    """x (C, H, W, N), window (kh, kw) -> y (C, H', W', N), the means, written to `out` if given; zeros of the padding count.

    H' = floor((H + 2 * padding - kh) / stride) + 1. Raises ValueError for a window larger than the padded image, a padding of
    more than half of it, and an `out` of another shape than y.
    """
    channels, height, width, batch = image_sizes("average pool", x)
    out_height, out_width = output_size("average pool", (height, width), window, stride, padding)
    check_pool_padding("average pool", window, padding)
    y = result("average pool", "out", out, (channels, out_height, out_width, batch), x)
    KERNELS.avgpool_forward[channels * out_height, threads_of_row(out_width, batch, x.itemsize)](
        x, y, height, width, out_height, out_width, batch, *window, stride, padding)
    return y


def backward(dy: Array, x_shape: tuple[int, ...], window: tuple[int, ...], stride: int, padding: int = 0,
             dx: Array | None = None) -> Array:
    """dy (C, H', W', N) -> dx of shape x_shape (C, H, W, N), written to `dx` if given. Raises ValueError for other shapes."""
    channels, height, width, batch = x_shape
    y_shape = channels, *output_size("average pool", (height, width), window, stride, padding), batch
    if dy.shape != y_shape:
        raise ValueError(f"average pool: dy {dy.shape} of an output of shape {y_shape}")
    dx = result("average pool", "dx", dx, x_shape, dy)
    KERNELS.avgpool_backward[channels * height, threads_of_row(width, batch, dx.itemsize)](
        dy, dx, height, width, *dy.shape[1:3], batch, *window, stride, padding)
    return dx
