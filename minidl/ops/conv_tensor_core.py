"""3x3 convolution on tensor cores, for ops/conv.py, which checks sizes. Formulas: conv_tensor_core.cu.

A path beside the portable kernels, for NVIDIA GPUs from Ampere (sm_80) on, that needs no `cols` in memory. `applies` says where
it may be taken; the other functions do not ask again.
"""

from __future__ import annotations

import functools

import numpy as np

from minidl import blas
from minidl.device import Array, address, array_module, empty
from minidl.kernels import Kernels
from minidl.ops.sum_parts import parts_of, sum_parts

KERNELS = Kernels("conv_tensor_core.cu", fixed_threads=True)
THREADS, COLUMNS, CHUNK_BYTES, PIECE_BYTES = 128, 128, 64, 16  # conv_tensor_core.cu
# Groups of fewer channels, in or out, leave most of a tile empty. A guess, not measured.
LEAST_CHANNELS = 16
# A weight gradient is summed in so many parts that each multiprocessor has about as many blocks, all at a time, but each at
# least so many chunks long. More parts are more to write and to add up. Not measured.
BLOCKS, LEAST_STEPS = 2, 32


def applies(x: Array, weight: Array, padding: int, groups: int) -> bool:
    """Whether x (C, H, W, N) and weight (O, C/groups, kh, kw) may take this path, forward and in both gradients; that of x
    with stride 1 only.
    """
    xp = array_module(x)
    return (xp.__name__ == "cupy" and fits(x, weight, padding, groups)
            and _has_tensor_cores(xp.cuda.runtime.getDevice()))


def fits(x: Array, weight: Array, padding: int, groups: int) -> bool:
    """`applies`, wherever the arrays are. Of both, only shape and type matter."""
    outputs, group_channels, *kernel = weight.shape
    for_tensor_cores = x.dtype.name in ("float16", "bfloat16") or x.dtype.name == "float32" and blas.allow_tf32
    return (for_tensor_cores and kernel == [3, 3] and 0 <= padding <= 2 and x.shape[3] * x.itemsize % PIECE_BYTES == 0
            and min(group_channels, outputs // groups) >= LEAST_CHANNELS)


@functools.cache
def _has_tensor_cores(device: int) -> bool:
    import cupy

    return int(cupy.cuda.Device(device).compute_capability) >= 80


def forward(x: Array, weight: Array, y: Array, bias: Array | None, plus: Array | None, *, stride: int, padding: int,
            groups: int) -> None:
    """x (C, H, W, N), weight (O, C/groups, 3, 3): overwrites y (O, H', W', N), bias and plus added.

    H' = floor((H + 2 * padding - 3) / stride) + 1. Raises ValueError, as the functions below, for images or gradients of them
    that do not begin at a multiple of 16 bytes, as new arrays and slices of their channels do.
    """
    _multiply(x, weight, y, bias, plus, stride, padding, groups, adjoint=False)


def backward_x(dy: Array, weight: Array, dx: Array, plus: Array | None, *, stride: int, padding: int, groups: int) -> None:
    """dy (O, H', W', N), weight (O, C/groups, 3, 3): overwrites dx (C, H, W, N), plus added. stride: 1, as the
    adjoint of others is no convolution."""
    _multiply(dy, weight, dx, None, plus, stride, 2 - padding, groups, adjoint=True)


def backward_weight(dy: Array, x: Array, dweight: Array, *, stride: int, padding: int, groups: int) -> None:
    """dy (O, H', W', N), x (C, H, W, N): overwrites dweight (O, C/groups, 3, 3), of the type of accumulation."""
    _check_begin(dy=dy, x=x)
    outputs, group_channels = dweight.shape[:2]
    all_steps, multiprocessors = _tiles(dy.size // outputs * dy.itemsize, CHUNK_BYTES), _multiprocessors(x)
    most_parts, column_tiles = max(1, all_steps // LEAST_STEPS), _tiles(group_channels * 9, COLUMNS) * groups
    rows = _tile_rows(outputs // groups, column_tiles * most_parts, multiprocessors)
    tiles = _tiles(outputs // groups, rows) * column_tiles
    steps = _tiles(all_steps, max(1, min(BLOCKS * multiprocessors // tiles, most_parts)))
    parts = _tiles(all_steps, steps)
    tile_dweight = parts_of(dweight, parts)
    kernel = KERNELS.conv_tensor_core_dweight_64 if rows == 64 else KERNELS.conv_tensor_core_dweight_128
    kernel[parts * tiles, THREADS](dy, x, tile_dweight, groups, *_sizes(x, dy, groups), stride, padding, steps)
    sum_parts(tile_dweight, dweight)


def _check_begin(**arrays: Array | None) -> None:
    """Elsewhere a GPU would end the work of the whole process."""
    for name, array in arrays.items():
        if array is not None and address(array) % PIECE_BYTES:
            raise ValueError(f"conv: {name} {array.shape} does not begin at a multiple of {PIECE_BYTES} bytes, as tensor cores "
                             "need: copy it")


def _multiply(x: Array, weight: Array, y: Array, bias: Array | None, plus: Array | None, stride: int, padding: int, groups: int,
              *, adjoint: bool) -> None:
    """y = the convolution of x with weight, or, with `adjoint`, with the turned and transposed weight; + bias + plus."""
    _check_begin(input=x, result=y, plus=plus)
    sources, results = x.shape[0] // groups, y.shape[0] // groups
    run, box_width, box_height = _box(y.shape[3])
    boxes = _tiles(y.shape[3], run) * _tiles(y.shape[2], box_width) * _tiles(y.shape[1], box_height) * groups
    rows, chunk = _tile_rows(results, boxes, _multiprocessors(x)), CHUNK_BYTES // x.itemsize
    row_tiles, chunks = _tiles(results, rows), _tiles(sources, chunk)
    packed = empty((groups, row_tiles, chunks, 9, rows, chunk), weight.dtype, like=x)
    group_outputs, group_channels = (sources, results) if adjoint else (results, sources)
    KERNELS.conv_tensor_core_pack[groups * row_tiles * chunks * 9, THREADS](
        weight, packed, group_outputs, group_channels, rows, int(adjoint))
    kernel = KERNELS.conv_tensor_core_forward_64 if rows == 64 else KERNELS.conv_tensor_core_forward_128
    kernel[boxes * row_tiles, THREADS](x, packed, y, bias, plus, *_sizes(x, y, groups), stride, padding, run, box_width)


def _tiles(size: int, tile: int) -> int:
    return -(-size // tile)


def _tile_rows(results: int, beside: int, multiprocessors: int) -> int:
    """Rows of a tile, for a group of so many results: 128, unless 64 leave fewer of them empty, or give work to multiprocessors
    that had none. beside: how many tiles there are for the same rows, of all groups."""
    few = 2 * _tiles(results, 128) * beside <= multiprocessors
    return 64 if few or _tiles(results, 64) % 2 else 128


def _multiprocessors(like: Array) -> int:
    """Of the GPU that computes beside an array; in the emulator, one."""
    xp = array_module(like)
    if xp is np:
        return 1
    runtime = xp.cuda.runtime
    return int(runtime.deviceGetAttribute(runtime.cudaDevAttrMultiProcessorCount, runtime.getDevice()))


def _box(batch: int) -> tuple[int, int, int]:
    """Images, width and height of the box of results that one tile is: the most images that leave the fewest empty."""
    run = min((32, 16, 8), key=lambda images: _tiles(batch, images) * images)
    return run, *{32: (2, 2), 16: (4, 2), 8: (4, 4)}[run]


def _sizes(x: Array, y: Array, groups: int) -> tuple[int, ...]:
    """What the kernels are told of the shapes, from group_channels to batch."""
    return x.shape[0] // groups, *x.shape[1:3], y.shape[0] // groups, *y.shape[1:]
