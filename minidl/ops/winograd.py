"""Convolution with 3x3 windows and stride 1 by Winograd's F(2x2, 3x3), for ops/conv.py, which checks sizes and chooses.

Formulas: winograd.cu.
"""

from __future__ import annotations

import math

from minidl.device import Array, empty
from minidl.kernels import Kernels, acc_dtype, blocks_for
from minidl.ops import chunks
from minidl.ops.packed_gemm import THREADS, Blas, Packed, product_for
from minidl.ops.window import threads_along

KERNELS = Kernels("winograd.cu")
ELEMENTS = 16           # of a tile: as many matrix products
OUTPUTS = 2             # of a tile, along a side
DW_COLUMNS = 256        # of V, at least, that one sum for dU takes: each sum costs a pass over dU
STRIP_BYTES = 256 << 10  # of V in a step of a block on the CPU, which has one tile at least: it stays in the second cache


def forward(x: Array, weight: Array, y: Array, bias: Array | None, plus: Array | None, *, padding: int, groups: int) -> None:
    """x (C, H, W, N), weight (O, C/groups, 3, 3): overwrites y (O, H', W', N), H' = H + 2 * padding - 2."""
    _multiply(x, weight, y, bias, plus, padding, groups, adjoint=False)


def backward_x(dy: Array, weight: Array, dx: Array, plus: Array | None, *, padding: int, groups: int) -> None:
    """dy (O, H', W', N), weight (O, C/groups, 3, 3): overwrites dx (C, H, W, N). `padding` is that of `forward`."""
    _multiply(dy, weight, dx, None, plus, 2 - padding, groups, adjoint=True)


def backward_weight(dy: Array, x: Array, dweight: Array, *, padding: int, groups: int) -> None:
    """dy (O, H', W', N), x (C, H, W, N): overwrites dweight (O, C/groups, 3, 3), of the type of accumulation."""
    g = _Geometry(x, dy, padding, groups)
    du = empty((ELEMENTS * groups, len(dy) // groups, len(x) // groups), dweight.dtype, like=dweight)
    for begin, end in g.split(fewest=-(-DW_COLUMNS // g.padded)):
        columns = (end - begin) * g.padded
        v = g.transform_input(x, begin, end)
        e = empty((ELEMENTS * groups, len(dy) // groups, v.shape[2]), dy.dtype, like=dy)
        KERNELS.winograd_output_gradient[(end - begin, len(dy)), threads_along(g.batch)](
            dy, e, *dy.shape[1:], g.padded, g.tiles_x, begin, v.shape[2])
        g.product.multiply_rows(e, v, du, columns, begin > 0)
        del e, v  # their memory, in the cache still, is that of the next
    windows = dweight.size // 9
    KERNELS.winograd_weight_gradient[blocks_for(windows, 512), 128](du, dweight, windows)


def workspace_bytes(x: Array, y: Array, *, padding: int, groups: int) -> int:
    """Bytes of V and M that `forward` holds at a time. Of x and y, only device, shape and type matter."""
    g = _Geometry(x, y, padding, groups)
    if isinstance(g.product, Packed):
        return sum(math.prod(shape) for shape in _parts(x, y, g, g.product)) * x.itemsize
    largest = max(end - begin for begin, end in g.split()) * g.padded
    return ELEMENTS * x.itemsize * (len(x) + len(y)) * largest


def _multiply(x: Array, weight: Array, y: Array, bias: Array | None, plus: Array | None, padding: int, groups: int, *,
              adjoint: bool) -> None:
    """y = the convolution of x with weight, or, with `adjoint`, with the turned and transposed weight; + bias + plus."""
    g = _Geometry(x, y, padding, groups)
    u = _transform_weight(weight, g, adjoint)
    if isinstance(g.product, Packed):
        v, m = (empty(shape, x.dtype, like=x) for shape in _parts(x, y, g, g.product))
        blocks, strip, _, sources, images = v.shape
        KERNELS.winograd_conv[blocks, THREADS](
            x, u, v, m, y, bias, plus, groups, sources, len(y) // groups, *x.shape[1:3], *y.shape[1:], padding, strip, images)
        return
    for begin, end in g.split():
        columns = (end - begin) * g.padded
        m = empty((ELEMENTS * groups, len(y) // groups, columns), y.dtype, like=y)
        g.product.multiply(u, g.transform_input(x, begin, end), m, 0, columns)
        KERNELS.winograd_output[(end - begin, len(y)), threads_along(g.batch)](
            m, y, bias, plus, *y.shape[1:], g.padded, g.tiles_x, begin)


def _parts(x: Array, y: Array, g: _Geometry, product: Packed) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of V and M for winograd_conv: (blocks, strip, 16, C/groups, images), (blocks, 16, rows, images)."""
    sources, images = len(x) // g.groups, product.images(g.batch)
    tile_bytes = ELEMENTS * sources * images * x.itemsize
    strip = max(1, min(g.tiles_x, STRIP_BYTES // tile_bytes))
    steps = g.groups * g.tiles // g.tiles_x * -(-g.tiles_x // strip) * -(-g.batch // images)
    blocks = max(1, min(steps, chunks.fitting(strip * tile_bytes, x)))
    return (blocks, strip, ELEMENTS, sources, images), (blocks, ELEMENTS, product.tile_rows(len(y) // g.groups), images)


class _Geometry:
    """Sizes, and how V is made."""

    product: Blas | Packed

    def __init__(self, x: Array, y: Array, padding: int, groups: int) -> None:
        self.product = product_for(x)
        self.padding, self.groups, self.batch, self._like = padding, groups, x.shape[3], x
        self.padded = -(-self.batch // self.product.unit) * self.product.unit
        self.tiles_x, tiles_y = (-(-size // OUTPUTS) for size in (y.shape[2], y.shape[1]))
        self.tiles = self.tiles_x * tiles_y
        self.tile_bytes = ELEMENTS * (len(x) + len(y)) * self.padded * x.itemsize

    def split(self, fewest: int = 1) -> list[tuple[int, int]]:
        """Ranges of tiles, of at least `fewest`, that are computed one after another."""
        return chunks.split(self.tiles, self.tile_bytes, self._like, fewest)

    def transform_input(self, x: Array, begin: int, end: int) -> Array:
        """V (16 * groups, C/groups, step) of the tiles begin .. end-1 of x."""
        channels, height, width, batch = x.shape
        step = self.product.step((end - begin) * self.padded)
        v = empty((ELEMENTS * self.groups, channels // self.groups, step), x.dtype, like=x)
        KERNELS.winograd_input[(end - begin, channels), threads_along(batch)](
            x, v, height, width, batch, self.padded, self.padding, self.tiles_x, begin, step)
        return v


def _transform_weight(weight: Array, g: _Geometry, adjoint: bool) -> Array:
    """U (16 * groups, tiles, sources, rows), packed for `g.product`."""
    sources, results = weight.shape[1], len(weight) // g.groups
    if adjoint:
        sources, results = results, sources
    rows = g.product.tile_rows(results)
    u = empty((ELEMENTS * g.groups, -(-results // rows), sources, rows), acc_dtype(weight.dtype), like=weight)
    KERNELS.winograd_weight[g.groups * u.shape[1] * sources, threads_along(rows)](
        weight, u, results, sources, rows, int(adjoint))
    return u
