"""Dropout and channel dropout. Formulas: dropout.cu. Each is its own backward: apply it to dy at the same step."""

from minidl.device import Array, array_module, empty
from minidl.kernels import LARGEST_COUNT, Kernels, blocks_for
from minidl.ops.shapes import image_sizes
from minidl.ops.threads import threads_along

KERNELS = Kernels("dropout.cu")
THREADS = 256
STRETCH = {"numpy": LARGEST_COUNT, "cupy": 16}  # pixels of a channel that a block takes, which then decides for its images


def apply(x: Array, rate: float, key: int, layer: int, step: Array) -> Array:
    """x of any shape -> y: each element 0 with probability `rate`, else x / (1 - rate).

    The decision is a pure function of key (64 bits), layer (32 bits), the number in step (an int64 array of one
    element, on the device of x) and the element's position. Its probability is `rate` to 1/65536, so that a rate within
    a few of these of 1 does not keep the mean. Raises ValueError unless 0 <= rate < 1.
    """
    y = empty(x.shape, x.dtype, like=x)
    KERNELS.dropout[blocks_for(x.size), THREADS](x, step, y, x.size, key, layer, *_decision(rate))
    return y


def apply_to_channels(x: Array, rate: float, key: int, layer: int, step: Array) -> Array:
    """x (C, H, W, N) -> y: as `apply`, with one decision for each channel of each image."""
    channels, height, width, batch = image_sizes("dropout", x)
    y = empty(x.shape, x.dtype, like=x)
    pixels = height * width
    stretch = STRETCH[array_module(x).__name__]
    KERNELS.dropout_channels[(channels, -(-pixels // stretch)), threads_along(batch)](
        x, step, y, pixels, stretch, batch, key, layer, *_decision(rate))
    return y


def _decision(rate: float) -> tuple[int, float]:
    """The number below which random 16 bits drop an element, and the factor of those kept."""
    if not 0 <= rate < 1:
        raise ValueError(f"dropout: rate {rate} is not in 0 <= rate < 1")
    return min(round(rate * 2**16), 2**16 - 1), 1 / (1 - rate)
