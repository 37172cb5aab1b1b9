"""Shapes: of windows that slide over images, of batches and results; and what is refused."""

import functools
import numbers

from minidl.device import Array, empty


def check_sizes(op: str, least: int = 1, **sizes: object) -> None:
    """Raise ValueError, naming `op` and the first of the sizes that is no whole number of at least `least`."""
    for name, size in sizes.items():
        if not isinstance(size, numbers.Integral) or size < least:
            raise ValueError(f"{op}: {name} is {size}, which must be a whole number of at least {least}")


def pair(size: int | tuple[int, ...] | list[int]) -> tuple[int, ...]:
    """A number, or a pair (height, width) -> the pair. Raises ValueError for another count of numbers."""
    sides = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if len(sides) != 2:
        raise ValueError(f"a window has two sides, (height, width): {size} has {len(sides)}")
    return sides


def check_window(op: str, window: tuple[int, ...], stride: int, padding: int) -> None:
    """Raise ValueError, naming `op`, for a window (height, width), stride or padding that no image could have."""
    check_sizes(op, kernel_height=window[0], kernel_width=window[1], stride=stride)
    check_sizes(op, least=0, padding=padding)


def check_pool_padding(op: str, window: tuple[int, ...], padding: int) -> None:
    """Raise ValueError, naming `op`, for a padding of more than half of the window (height, width), as PyTorch does."""
    if 2 * padding > min(window):
        raise ValueError(f"{op}: padding {padding} is more than half of the window {window[0]}x{window[1]}")


@functools.lru_cache(maxsize=1 << 12)  # each step asks the same again
def output_size(op: str, size: tuple[int, ...], window: tuple[int, ...], stride: int, padding: int) -> tuple[int, ...]:
    """(H, W) of the input, (kh, kw) of the window -> (H', W') of the output.

    H' = floor((H + 2 * padding - kh) / stride) + 1. Raises ValueError, naming `op`, for an impossible window.
    """
    check_window(op, window, stride, padding)
    padded = tuple(length + 2 * padding for length in size)
    if window[0] > padded[0] or window[1] > padded[1]:
        raise ValueError(f"{op}: window {window[0]}x{window[1]} is larger than the padded image {padded[0]}x{padded[1]}")
    return tuple((length - side) // stride + 1 for length, side in zip(padded, window))


def check_batch(op: str, batch: int) -> None:
    """Raise ValueError, naming `op`, for a batch without images."""
    if batch < 1:
        raise ValueError(f"{op}: a batch of {batch} images")


def image_sizes(op: str, x: Array) -> tuple[int, ...]:
    """x (C, H, W, N) -> C, H, W, N. Raises ValueError, naming `op`, for other dimensions, and for a batch without images."""
    if x.ndim != 4:
        raise ValueError(f"{op}: an input (C, H, W, N) is needed, got one of {x.ndim} dimensions")
    check_batch(op, x.shape[3])
    return x.shape


def result(op: str, name: str, given: Array | None, shape: tuple[int, ...], like: Array) -> Array:
    """Where a result of this shape goes: the array that the caller gave, or a new one, like `like`. Raises ValueError, naming
    `op` and the argument `name`, for one of another shape, and TypeError for one that is not contiguous."""
    if given is None:
        return empty(shape, like.dtype, like=like)
    if given.shape != shape:
        raise ValueError(f"{op}: {name} has shape {given.shape}, the result {shape}")
    if not given.flags.c_contiguous:  # whose reshape would be a copy
        raise TypeError(f"{op}: {name} must be contiguous")
    return given
