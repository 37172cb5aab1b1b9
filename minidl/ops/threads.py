"""How many threads a block has: whole warps, at most 256, no more than there is work for."""


def threads_of_row(pixels: int, batch: int, itemsize: int) -> int:
    """Of a block that shares so many pixels and their images (pixels.cuh), 16 bytes a thread."""
    return min(256, -(-pixels * -(-batch * itemsize // 16) // 32) * 32)


def threads_along(batch: int) -> int:
    """Of a block whose loops run along the batch."""
    return min(256, -(-batch // 32) * 32)
