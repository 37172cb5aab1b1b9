"""Convolution in narrow groups, directly, for ops/conv.py, which checks sizes and chooses. Formulas: group_conv.cu."""

from minidl.device import Array, empty
from minidl.kernels import Kernels, acc_dtype, blocks_for
from minidl.ops.sum_parts import parts_of, sum_parts
from minidl.ops.threads import threads_along

KERNELS = Kernels("group_conv.cu")
OUTPUTS = 4           # group_conv.cu
BLOCK_TAPS = 6        # how many (c, ky, kx), about, a block sums for dweight
TILE_PIXELS = 128     # how many output pixels, about, in whole rows, a block sums for dweight


def forward(x: Array, weight: Array, y: Array, bias: Array | None, plus: Array | None, *, stride: int, padding: int,
            groups: int) -> None:
    """x (C, H, W, N), weight (O, C/groups, kh, kw): overwrites y (O, H', W', N), bias and plus added."""
    packed, tiles = _pack(weight, groups, adjoint=False)
    KERNELS.group_conv_forward[groups * y.shape[1] * tiles, threads_along(x.shape[3])](
        x, packed, y, bias, plus, *_sizes(x, weight, y, groups), stride, padding)


def backward_x(dy: Array, weight: Array, dx: Array, plus: Array | None, *, stride: int, padding: int, groups: int) -> None:
    """dy (O, H', W', N), weight (O, C/groups, kh, kw): overwrites dx (C, H, W, N), plus added."""
    packed, tiles = _pack(weight, groups, adjoint=True)
    KERNELS.group_conv_backward_x[groups * dx.shape[1] * tiles, threads_along(dx.shape[3])](
        dy, packed, dx, plus, *_sizes(dx, weight, dy, groups), stride, padding)


def backward_weight(dy: Array, x: Array, dweight: Array, *, stride: int, padding: int, groups: int) -> None:
    """dy (O, H', W', N), x (C, H, W, N): overwrites dweight (O, C/groups, kh, kw), of the type of accumulation."""
    outputs, out_height, out_width, batch = dy.shape
    rows = max(1, TILE_PIXELS // out_width)
    row_tiles = -(-out_height // rows)
    tile_dweight = parts_of(dweight, row_tiles)
    tiles, k_blocks = -(-(outputs // groups) // OUTPUTS), -(-(dweight.size // outputs) // BLOCK_TAPS)
    KERNELS.group_conv_tile_dweight[row_tiles * groups * tiles * k_blocks, threads_along(batch)](
        x, dy, tile_dweight, groups, *_sizes(x, dweight, dy, groups), stride, padding, rows, k_blocks)
    sum_parts(tile_dweight, dweight)


def _pack(weight: Array, groups: int, *, adjoint: bool) -> tuple[Array, int]:
    """weight (O, C/groups, kh, kw) -> packed as the kernels read it, tiles of each group's results."""
    outputs, group_channels, *kernel = weight.shape
    group_outputs = outputs // groups
    results, sources = (group_channels, group_outputs) if adjoint else (group_outputs, group_channels)
    tiles = -(-results // OUTPUTS)
    packed = empty((groups, tiles, sources, *kernel, OUTPUTS), acc_dtype(weight.dtype), like=weight)
    KERNELS.group_conv_pack[blocks_for(packed.size), 128](
        weight, packed, group_outputs, group_channels, kernel[0] * kernel[1], tiles, int(adjoint), packed.size)
    return packed, tiles


def _sizes(x: Array, weight: Array, y: Array, groups: int) -> tuple[int, ...]:
    """What the kernels are told of the shapes, from group_channels to kernel_w."""
    return x.shape[0] // groups, *x.shape[1:3], y.shape[0] // groups, *y.shape[1:], *weight.shape[2:]
