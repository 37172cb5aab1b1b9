"""Matrix products of a convolution, in stacks of B: by BLAS, or on the CPU by kernels that unfold windows themselves.

    product = product_for(x)
    w = product.pack(weight)                        # (B, M, K) -> (B, tiles, K, rows)

    product.convolve(w, x, windows, y)              # y (B, M, P), of the unfolded x
    product.weight_gradient(dy, x, windows, dw)     # dw (B, M, K) = dy (B, M, P) @ cols^T

    product.multiply_rows(dy, cols, dw, pitch, P, False)    # dw = dy (B, M, pitch) @ cols^T

To BLAS a matrix is one tile. Formulas, and what the packing is good for: packed_gemm.cu.
"""

from __future__ import annotations

import functools
from typing import Any, Protocol

import numpy as np

from minidl import blas
from minidl.device import Array, array_module, empty, workers
from minidl.kernels import Kernels, acc_dtype, launch_mode
from minidl.ops import bias as bias_op
from minidl.ops import chunks
from minidl.ops.sum_parts import parts_of, sum_parts

KERNELS = Kernels("packed_gemm.cu")
THREADS = 32  # of a block, where these kernels run on threads at all
SHARES = 6  # of a product for each core, at least, where it has so many steps: they are dealt out evenly
STRIP_BYTES = 512 << 10  # of cols that a block unfolds at a time for y, which has one panel at least
STRIP = 16  # tiles of a row of dw, at most, that are summed beside the same rows of dy
DW_COLUMNS = 512  # of cols, at least, that BLAS sums at a time for dw: each sum costs a pass over dw
DW_SEGMENTS = 2  # at least, in a part of the columns that a block sums for dw
PART_COST = 8  # bytes of x and dy, at least, for each byte of a part of dw
LINE = 16  # numbers, of a cache line
CACHE_WAY = 4096  # bytes: addresses a multiple of this apart meet in the same set of the first cache; `pitch` avoids that


class Windows(Protocol):
    """What unfolds x (B * channels, H, W, N) to cols (B, K, P), P = pixels of the output * batch.

    One is _Geometry in ops/conv.py.
    """

    pixels: int
    pixel_bytes: int  # of cols
    batch: int
    groups: int  # B
    depth: int   # K
    pointwise: bool  # cols are x
    sizes: tuple[int, ...]  # as kernels take them: Windows in unfold.cuh

    def unfold(self, x: Array, begin: int, end: int) -> Array:
        """The columns of the output pixels begin .. end-1."""


class Blas:
    """Operands are plain matrices, and cols an array, of as many pixels at a time as fit the workspace."""

    unit = 1  # a batch is padded to a multiple of this, so that whole vectors can be loaded

    def tile_rows(self, m: int) -> int:
        """Rows of a tile of a matrix of m rows."""
        return m

    def pitch(self, columns: int) -> int:
        """From one row of so many columns to the next, in elements."""
        return columns

    def pack(self, w: Array, transposed: bool = False) -> Array:
        """w (B, M, K), or (B, K, M) if it is given transposed -> (B, tiles, K, rows)."""
        return (w if transposed else w.transpose(0, 2, 1))[:, None]

    def cols_bytes(self, x: Array, windows: Windows, m: int) -> int:
        """Of what `convolve` unfolds at a time, for a w of m rows."""
        return max(end - begin for begin, end in self._ranges(x, windows)) * windows.pixel_bytes * (not windows.pointwise)

    def convolve(self, w: Array, x: Array, windows: Windows, y: Array, bias: Array | None = None, plus: Array | None = None,
                 pixels: tuple[int, int] | None = None) -> None:
        """w as packed: overwrites y (B, M, P) with w @ cols + bias (B * M) + plus, which is like y, and may be y.

        pixels: (begin, end) of those that are unfolded and that y has, all unless given.
        """
        ranges = [pixels] if pixels else self._ranges(x, windows)
        for begin, end in ranges:
            self.multiply(w, windows.unfold(x, begin, end), y, (begin - ranges[0][0]) * windows.batch, bias, plus)

    def multiply(self, w: Array, cols: Array, y: Array, begin: int, bias: Array | None = None, plus: Array | None = None) -> None:
        """The same for the columns of y (B, M, all columns) from `begin` on, of cols (B, K, columns)."""
        columns = cols.shape[2]
        target = y[:, :, begin:begin + columns]
        if plus is not None and plus is not y:
            target[...] = plus[:, :, begin:begin + columns]
        blas.gemm(w[:, 0].transpose(0, 2, 1), cols, target, beta=float(plus is not None))
        if bias is not None:
            bias_op.add(y.reshape(len(bias), -1), bias, slice(begin, begin + columns))

    def weight_gradient(self, dy: Array, x: Array, windows: Windows, dw: Array) -> None:
        """Overwrites dw (B, M, K) with dy (B, M, P) @ cols^T."""
        for begin, end in self._ranges(x, windows, fewest=-(-DW_COLUMNS // windows.batch)):
            dy_columns = dy[..., begin * windows.batch:end * windows.batch]
            columns = dy_columns.shape[2]
            self.multiply_rows(dy_columns, windows.unfold(x, begin, end), dw, columns, columns, begin > 0)

    @staticmethod
    def _ranges(x: Array, windows: Windows, fewest: int = 1) -> list[tuple[int, int]]:
        """Of output pixels that are unfolded at a time, at least `fewest`."""
        if windows.pointwise:
            return [(0, windows.pixels)]
        return chunks.split(windows.pixels, windows.pixel_bytes, x, fewest)

    def apart(self, size: int) -> int:
        """How far apart arrays of so many numbers begin, to which a loop writes in turn."""
        return size

    def multiply_rows(self, dy: Array, cols: Array, dw: Array, pitch: int, columns: int, accumulate: bool) -> None:
        """dy (B, M * pitch), cols (B, K * pitch), or longer rows; of each pitch, `columns` count: overwrites dw (B, M, K), or
        adds to it."""
        matrices = len(dw)
        blas.gemm(dy.reshape(matrices, -1, pitch), cols.reshape(matrices, -1, pitch).transpose(0, 2, 1), dw,
                  beta=float(accumulate))


class Packed:
    """Operands are packed: the micro-tiles of packed_gemm.cu. For what each method does that is not said, see Blas."""

    def __init__(self, sizes: list[int], acc_bytes: int) -> None:
        """sizes: as gemm_sizes gives them."""
        (self._rows, self._panel, self._vector, self._dw_rows, self._dw_columns, self._segment, self._segment_pitch,
         self.unit) = sizes
        self._acc_bytes = acc_bytes

    def images(self, batch: int) -> int:
        """Images whose pixels fit a panel, a multiple of a vector: a batch in as few and as equal parts as there can be."""
        parts = -(-batch // self._panel)
        return -(-batch // (parts * self._vector)) * self._vector

    def tile_rows(self, m: int) -> int:
        return self._rows

    def pitch(self, columns: int) -> int:
        filled = -(-columns // self._panel) * self._panel
        return filled + self.unit if filled * self._acc_bytes % (CACHE_WAY // 2) == 0 else filled

    def apart(self, size: int) -> int:
        return (-(-size // LINE) | 1) * LINE  # an odd number of cache lines: in different sets of a cache

    def pack(self, w: Array, transposed: bool = False) -> Array:
        matrices, m, k = w.shape
        if transposed:
            m, k = k, m
        packed = empty((matrices, -(-m // self._rows), k, self._rows), acc_dtype(w.dtype), like=w)
        pitches = (1, m) if transposed else (k, 1)
        KERNELS.gemm_pack[matrices * packed.shape[1], THREADS](w, packed, m, k, *pitches, self._rows)
        return packed

    def cols_bytes(self, x: Array, windows: Windows, m: int) -> int:
        strip, _, blocks = self._strips(x, windows, windows.pixels, -(-m // self._rows))
        return blocks * windows.depth * self.pitch(strip) * x.itemsize

    def convolve(self, w: Array, x: Array, windows: Windows, y: Array, bias: Array | None = None, plus: Array | None = None,
                 pixels: tuple[int, int] | None = None) -> None:
        begin, end = pixels or (0, windows.pixels)
        strip, parts, blocks = self._strips(x, windows, end - begin, w.shape[1])
        cols = empty((blocks, windows.depth, self.pitch(strip)), x.dtype, like=x)
        matrices, m, columns = y.shape
        KERNELS.conv_panels[blocks, THREADS](
            w, x, cols, y, bias, plus, matrices, m, len(x) // matrices, *windows.sizes, begin * windows.batch, columns, strip,
            cols.shape[2], parts)

    def weight_gradient(self, dy: Array, x: Array, windows: Windows, dw: Array) -> None:
        matrices, m, k = dw.shape
        columns, shares = dy.shape[2], SHARES * workers(x)
        # A part of the columns is read by few; but it costs two passes over dw, and windows that overlap read its ends twice.
        wanted = shares if k * matrices == len(x) else -(-shares // (matrices * -(-k // (STRIP * self._dw_columns))))
        column_parts = max(1, min(wanted, columns // (DW_SEGMENTS * self._segment),
                                  (x.nbytes + dy.nbytes) // (PART_COST * dw.nbytes)))
        strip, row_parts, steps = self._shares_of_rows(dw, column_parts)
        cols = empty((min(steps, shares), strip * self._dw_columns, self._segment_pitch), x.dtype, like=x)
        parts = parts_of(dw, column_parts)
        KERNELS.conv_rows[len(cols), THREADS](
            dy, x, cols, parts, matrices, m, len(x) // matrices, *windows.sizes, columns, strip, row_parts, column_parts)
        sum_parts(parts, dw)

    def multiply_rows(self, dy: Array, cols: Array, dw: Array, pitch: int, columns: int, accumulate: bool) -> None:
        matrices, m, k = dw.shape
        strip, parts, steps = self._shares_of_rows(dw, 1)
        KERNELS.gemm_rows[steps, THREADS](
            dy, cols, dw, m, k, columns, pitch, dy.size // matrices, cols.size // matrices, int(accumulate), strip, parts)

    def _strips(self, x: Array, windows: Windows, pixels: int, tiles: int) -> tuple[int, int, int]:
        """How a convolution is dealt out: columns of a strip, parts of the tiles of w, and blocks."""
        panels, shares = -(-pixels * windows.batch // self._panel), SHARES * workers(x)
        fitting = max(1, STRIP_BYTES // (windows.depth * self._panel * x.itemsize))
        strip = -(-panels // max(-(-panels // fitting), min(panels, -(-shares // windows.groups))))
        steps = windows.groups * -(-panels // strip)
        parts = min(tiles, -(-shares // steps))
        return strip * self._panel, parts, min(steps * parts, shares)

    def _shares_of_rows(self, dw: Array, column_parts: int) -> tuple[int, int, int]:
        """How the sums for dw (B, M, K) are dealt out: tiles of a strip, parts of the rows, and how many steps that makes."""
        tiles, row_tiles = -(-dw.shape[2] // self._dw_columns), -(-dw.shape[1] // self._dw_rows)
        strip = min(STRIP, tiles)
        strips = column_parts * len(dw) * -(-tiles // strip)
        row_parts = min(row_tiles, -(-SHARES * workers(dw) // strips))
        return strip, row_parts, strips * row_parts


_BLAS = Blas()


def product_for(like: Array) -> Blas | Packed:
    """How convolutions of arrays like this one multiply: packed on the CPU, unless factors are to be rounded to TF32."""
    if array_module(like) is not np or blas.allow_tf32 and like.dtype == np.float32:
        return _BLAS
    return _packed(like.dtype, launch_mode())


@functools.cache
def _packed(dtype: np.dtype[Any], mode: str) -> Packed:
    """mode: that in which the sizes, which depend on it, are asked for now."""
    sizes = np.empty(8, np.int32)
    KERNELS.gemm_sizes[1, 1](np.empty(1, dtype), sizes)
    return Packed(sizes.tolist(), acc_dtype(dtype).itemsize)
