"""Convolution with 3x3 windows and stride 1 by Winograd's F(4x4, 3x3) or F(2x2, 3x3), for ops/conv.py.

That checks sizes and chooses. Formulas: winograd.cu.
"""

from __future__ import annotations

import math
from typing import Any

from minidl.device import Array, empty
from minidl.kernels import Kernels, acc_dtype, blocks_for
from minidl.ops import chunks
from minidl.ops.conv_product import THREADS, Blas, Packed, product_for
from minidl.ops.threads import threads_along

KERNELS = Kernels("winograd.cu")
# Results of a tile, along a side: whichever multiplies less. Of y always 2, which round less than a direct sum: 4 round twice as
# much, and after some layers a network would be further than 1e-5 from the same one elsewhere.
OUTPUTS_OF_Y, OUTPUTS_OF_GRADIENTS = (2,), (4, 2)
DW_COLUMNS = 256        # of V, at least, that one sum for dU takes: each sum costs a pass over dU
WEIGHT_PAIRS = 512      # windows (pairs of a source and a result) that a block transforms, about
STRIP_BYTES = 512 << 10  # of V and M in a step of a block on the CPU, which has one tile at least


def forward(x: Array, weight: Array, y: Array, bias: Array | None, plus: Array | None, *, padding: int, groups: int) -> None:
    """x (C, H, W, N), weight (O, C/groups, 3, 3): overwrites y (O, H', W', N), bias and plus added, H' = H + 2 * padding - 2."""
    _multiply(x, weight, y, bias, plus, padding, groups, adjoint=False)


def backward_x(dy: Array, weight: Array, dx: Array, plus: Array | None, *, padding: int, groups: int) -> None:
    """dy (O, H', W', N), weight (O, C/groups, 3, 3): overwrites dx (C, H, W, N), plus added. `padding` is that of `forward`."""
    _multiply(dy, weight, dx, None, plus, 2 - padding, groups, adjoint=True)


def backward_weight(dy: Array, x: Array, dweight: Array, *, padding: int, groups: int) -> None:
    """dy (O, H', W', N), x (C, H, W, N): overwrites dweight (O, C/groups, 3, 3), of the type of accumulation."""
    g = _Geometry(x, dy, padding, groups, OUTPUTS_OF_GRADIENTS)
    du = empty((g.elements * groups, len(dy) // groups, len(x) // groups), dweight.dtype, like=dweight)
    for begin, end in g.split(fewest=-(-DW_COLUMNS // g.padded)):
        columns = (end - begin) * g.padded
        v, pitch = g.transform_input(x, begin, end)
        e, rows = g.stack(len(dy), pitch)
        KERNELS.winograd_output_gradient[(end - begin, len(dy)), threads_along(g.batch)](
            dy, e, g.outputs, *dy.shape[1:], g.padded, g.tiles_x, begin, rows, pitch, e.shape[1])
        g.product.multiply_rows(e, v, du, pitch, columns, begin > 0)
        del e, v  # their memory, in the cache still, is that of the next
    windows = dweight.size // 9
    KERNELS.winograd_weight_gradient[blocks_for(windows, 512), 128](du, dweight, g.outputs, windows)


def workspace_bytes(x: Array, y: Array, *, padding: int, groups: int) -> int:
    """Bytes of V and M that `forward` holds at a time. Of x and y, only device, shape and type matter."""
    g = _Geometry(x, y, padding, groups, OUTPUTS_OF_Y)
    if isinstance(g.product, Packed):
        return sum(math.prod(shape) for shape in _parts(x, y, g, g.product)[2:]) * x.itemsize
    largest = max(end - begin for begin, end in g.split()) * g.padded
    return g.elements * x.itemsize * (len(x) + len(y)) * largest


def _multiply(x: Array, weight: Array, y: Array, bias: Array | None, plus: Array | None, padding: int, groups: int, *,
              adjoint: bool) -> None:
    """y = the convolution of x with weight, or, with `adjoint`, with the turned and transposed weight; + bias + plus."""
    g = _Geometry(x, y, padding, groups, OUTPUTS_OF_GRADIENTS if adjoint else OUTPUTS_OF_Y)
    u, element = _transform_weight(weight, g, adjoint)
    if isinstance(g.product, Packed):
        strip, images, *shapes = _parts(x, y, g, g.product)
        v, m = (empty(shape, x.dtype, like=x) for shape in shapes)
        KERNELS.winograd_conv[len(v), THREADS](
            x, u, element, v, m, y, bias, plus, g.outputs, groups, len(x) // groups, len(y) // groups, *x.shape[1:3],
            *y.shape[1:], padding, strip, images, v.shape[3], m.shape[3])
        return
    for begin, end in g.split():
        columns = (end - begin) * g.padded
        m = empty((g.elements * groups, len(y) // groups, columns), y.dtype, like=y)
        v, pitch = g.transform_input(x, begin, end)
        g.product.multiply(u.reshape(len(v), 1, -1, len(y) // groups), v.reshape(len(v), -1, pitch), m, 0)
        KERNELS.winograd_output[(end - begin, len(y)), threads_along(g.batch)](
            m, y, bias, plus, g.outputs, *y.shape[1:], g.padded, g.tiles_x, begin)


def _parts(x: Array, y: Array, g: _Geometry, product: Packed) -> tuple[Any, ...]:
    """For winograd_conv: tiles and images of a step, and the shapes of V and M (blocks, tiles, elements, ...)."""
    images, rows = product.images(g.batch), product.tile_rows(len(y) // g.groups)
    sources, results = len(x) // g.groups, -(-len(y) // g.groups // rows) * rows
    sizes = [product.apart(channels * images) for channels in (sources, results)]
    tile_bytes = g.elements * sum(sizes) * x.itemsize
    strip = max(1, min(g.tiles_x, STRIP_BYTES // tile_bytes))
    steps = g.groups * g.tiles // g.tiles_x * -(-g.tiles_x // strip) * -(-g.batch // images)
    blocks = max(1, min(steps, chunks.fitting(strip * tile_bytes, x)))
    return strip, images, *((blocks, strip, g.elements, size) for size in sizes)


class _Geometry:
    """Sizes, and how V is made."""

    product: Blas | Packed

    def __init__(self, x: Array, y: Array, padding: int, groups: int, outputs: tuple[int, ...]) -> None:
        """outputs: of a tile, along a side, of which one is chosen."""
        self.product = product_for(x)
        self.padding, self.groups, self.batch, self._like = padding, groups, x.shape[3], x
        self.padded = -(-self.batch // self.product.unit) * self.product.unit
        self.outputs = min(outputs, key=lambda outputs: _products(outputs, *y.shape[1:3]))
        self.elements = (self.outputs + 2)**2  # of a tile: as many matrix products
        self.tiles_x, tiles_y = (-(-size // self.outputs) for size in (y.shape[2], y.shape[1]))
        self.tiles = self.tiles_x * tiles_y
        self.tile_bytes = self.elements * (len(x) + len(y)) * self.padded * x.itemsize

    def split(self, fewest: int = 1) -> list[tuple[int, int]]:
        """Ranges of tiles, of at least `fewest`, that are computed one after another."""
        return chunks.split(self.tiles, self.tile_bytes, self._like, fewest)

    def stack(self, channels: int, pitch: int) -> tuple[Array, int]:
        """A new array (elements * groups, matrix) for V or E of so many channels, and the rows of a matrix, `pitch` apart."""
        rows = channels // self.groups
        return empty((self.elements * self.groups, self.product.apart(rows * pitch)), self._like.dtype, like=self._like), rows

    def transform_input(self, x: Array, begin: int, end: int) -> tuple[Array, int]:
        """V of the tiles begin .. end-1 of x, as in `stack`, and how far apart its rows begin."""
        channels, height, width, batch = x.shape
        pitch = self.product.pitch((end - begin) * self.padded)
        v, rows = self.stack(channels, pitch)
        KERNELS.winograd_input[(end - begin, channels), threads_along(batch)](
            x, v, self.outputs, height, width, batch, self.padded, self.padding, self.tiles_x, begin, rows, pitch, v.shape[1])
        return v, pitch


def _transform_weight(weight: Array, g: _Geometry, adjoint: bool) -> tuple[Array, int]:
    """U (elements, groups, tiles, sources, rows), flat, packed for `g.product`, and how far apart its elements begin."""
    sources, results = weight.shape[1], len(weight) // g.groups
    if adjoint:
        sources, results = results, sources
    rows = g.product.tile_rows(results)
    tiles, parts = -(-results // rows), -(-sources * rows // WEIGHT_PAIRS)
    element = g.product.apart(g.groups * tiles * sources * rows)
    u = empty((g.elements * element,), acc_dtype(weight.dtype), like=weight)
    KERNELS.winograd_weight[g.groups * tiles * parts, 128](
        weight, u, element, g.outputs, g.groups, results, sources, rows, int(adjoint))
    return u, element


def _products(outputs: int, height: int, width: int) -> int:
    """Multiplications of one channel with one result, of an image of results height x width in tiles of so many outputs."""
    return (outputs + 2)**2 * -(-height // outputs) * -(-width // outputs)
