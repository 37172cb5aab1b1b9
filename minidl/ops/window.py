"""Sliding windows, for convolution and pooling, and batches: sizes, and what is refused."""


def pair(size: int | tuple[int, ...] | list[int]) -> tuple[int, ...]:
    """A number, or a pair (height, width) -> the pair. Raises ValueError for another count of numbers."""
    sides = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if len(sides) != 2:
        raise ValueError(f"a window has two sides, (height, width): {size} has {len(sides)}")
    return sides


def output_size(op: str, size: tuple[int, ...], window: tuple[int, ...], stride: int, padding: int) -> tuple[int, ...]:
    """(H, W) of the input, (kh, kw) of the window -> (H', W') of the output.

    H' = floor((H + 2 * padding - kh) / stride) + 1. Raises ValueError, naming `op`, for an impossible window.
    """
    if stride < 1 or padding < 0 or min(window) < 1:
        raise ValueError(f"{op}: window {window}, stride {stride}, padding {padding}: "
                         "window and stride must be at least 1, padding at least 0")
    padded = tuple(length + 2 * padding for length in size)
    if window[0] > padded[0] or window[1] > padded[1]:
        raise ValueError(f"{op}: window {window[0]}x{window[1]} is larger than the padded image {padded[0]}x{padded[1]}")
    return tuple((length - side) // stride + 1 for length, side in zip(padded, window))


def check_batch(op: str, batch: int) -> None:
    """Raise ValueError, naming `op`, for a batch without images."""
    if batch < 1:
        raise ValueError(f"{op}: a batch of {batch} images")


def threads_of_row(pixels: int, batch: int, itemsize: int) -> int:
    """Threads of a block that share so many pixels and their images (pixels.cuh), 16 bytes each: whole warps, at most 256."""
    return min(256, -(-pixels * -(-batch * itemsize // 16) // 32) * 32)


def threads_along(batch: int) -> int:
    """Threads of a block whose loops run along the batch: whole warps, at most 256."""
    return min(256, -(-batch // 32) * 32)
