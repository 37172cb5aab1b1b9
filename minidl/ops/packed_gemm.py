"""Matrix products of a convolution, in stacks of B: by BLAS, or on the CPU by kernels that read their operands packed.

    product = product_for(x)
    w = product.pack(weight)                        # (B, M, K) -> (B, tiles, K, rows)
    cols = empty((B, K, product.step(P)))           # P columns, written by whoever unfolds x
    product.multiply(w, cols, y, begin, P)          # y (B, M, all columns), from column `begin` on; or with bias and plus
    product.multiply_rows(dy, cols, dw, step, P, False)   # dw (B, M, K) = dy (B, M, step) @ cols^T

To BLAS a matrix is one tile. Formulas, and what the packing is good for: packed_gemm.cu.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from minidl import blas
from minidl.device import Array, array_module, empty, workers
from minidl.kernels import Kernels, acc_dtype, launch_mode
from minidl.ops import bias as bias_op

KERNELS = Kernels("packed_gemm.cu")
THREADS = 32  # of a block, where these kernels run on threads at all
STRIP = 16  # tiles of a row of dw, at most, that are summed beside the same rows of dy
SHARES = 6  # of a product for each core, at least, where it has so many blocks: they are dealt out evenly
LINE = 16  # numbers, of a cache line
CACHE_WAY = 4096  # bytes: addresses a multiple of this apart meet in the same set of the first cache; `step` avoids that


class Blas:
    """Operands are plain matrices."""

    packs = False
    unit = 1  # a batch is padded to a multiple of this, so that whole vectors can be loaded

    def tile_rows(self, m: int) -> int:
        """Rows of a tile of a matrix of m rows."""
        return m

    def step(self, columns: int) -> int:
        """From one row of so many columns to the next."""
        return columns

    def pack(self, w: Array, transposed: bool = False) -> Array:
        """w (B, M, K), or (B, K, M) if it is given transposed -> (B, tiles, K, rows)."""
        return (w if transposed else w.transpose(0, 2, 1))[:, None]

    def multiply(self, w: Array, cols: Array, y: Array, begin: int, columns: int, bias: Array | None = None,
                 plus: Array | None = None) -> None:
        """w as packed, cols (B, K, step): overwrites those columns of y (B, M, all columns) with w @ cols + bias (B * M) + plus,
        which is like y, and may be y."""
        target = y[:, :, begin:begin + columns]
        if plus is not None and plus is not y:
            target[...] = plus[:, :, begin:begin + columns]
        blas.gemm(w[:, 0].transpose(0, 2, 1), cols, target, beta=float(plus is not None))
        if bias is not None:
            bias_op.add(y.reshape(len(bias), -1), bias, slice(begin, begin + columns))

    def apart(self, size: int) -> int:
        """How far apart arrays of so many numbers begin, to which a loop writes in turn."""
        return size

    def multiply_rows(self, dy: Array, cols: Array, dw: Array, step: int, columns: int, accumulate: bool) -> None:
        """dy (B, M * step), cols (B, K * step), or longer rows; of each step, `columns` count: overwrites dw (B, M, K), or adds
        to it."""
        matrices = len(dw)
        blas.gemm(dy.reshape(matrices, -1, step), cols.reshape(matrices, -1, step).transpose(0, 2, 1), dw, beta=float(accumulate))


class Packed:
    """Operands are packed: the micro-tiles of packed_gemm.cu. For what each method does, see Blas."""

    packs = True

    def __init__(self, sizes: list[int], acc_bytes: int) -> None:
        """sizes: as gemm_sizes gives them."""
        self._rows, self._panel, self._vector, self._dw_block, self._dw_columns, self.unit = sizes
        self._acc_bytes = acc_bytes

    def images(self, batch: int) -> int:
        """Images whose pixels fit a panel, a multiple of a vector: a batch in as few and as equal parts as there can be."""
        parts = -(-batch // self._panel)
        return -(-batch // (parts * self._vector)) * self._vector

    def tile_rows(self, m: int) -> int:
        return self._rows

    def step(self, columns: int) -> int:
        filled = -(-columns // self._panel) * self._panel
        return filled + self.unit if filled * self._acc_bytes % (CACHE_WAY // 2) == 0 else filled

    def pack(self, w: Array, transposed: bool = False) -> Array:
        matrices, m, k = w.shape
        if transposed:
            m, k = k, m
        packed = empty((matrices, -(-m // self._rows), k, self._rows), acc_dtype(w.dtype), like=w)
        steps = (1, m) if transposed else (k, 1)
        KERNELS.gemm_pack[matrices * packed.shape[1], THREADS](w, packed, m, k, *steps, self._rows)
        return packed

    def multiply(self, w: Array, cols: Array, y: Array, begin: int, columns: int, bias: Array | None = None,
                 plus: Array | None = None) -> None:
        matrices, m, y_step = y.shape
        _, k, step = cols.shape
        panels = matrices * -(-columns // self._panel)
        parts = min(w.shape[1], -(-SHARES * workers(y) // panels))
        KERNELS.gemm_panels[panels * parts, THREADS](w, cols, y, bias, plus, m, k, columns, step, begin, y_step, parts)

    def apart(self, size: int) -> int:
        return (-(-size // LINE) | 1) * LINE  # an odd number of cache lines: in different sets of a cache

    def multiply_rows(self, dy: Array, cols: Array, dw: Array, step: int, columns: int, accumulate: bool) -> None:
        matrices, m, k = dw.shape
        blocks, tiles = matrices * -(-m // self._dw_block), -(-k // self._dw_columns)
        strip = max(1, min(STRIP, blocks * tiles // (SHARES * workers(dy))))
        KERNELS.gemm_rows[blocks * -(-tiles // strip), THREADS](
            dy, cols, dw, m, k, columns, step, dy.size // matrices, cols.size // matrices, int(accumulate), strip)


_BLAS = Blas()


def product_for(like: Array) -> Blas | Packed:
    """How convolutions of arrays like this one multiply: packed on the CPU, unless factors are to be rounded to TF32."""
    if array_module(like) is not np or blas.allow_tf32 and like.dtype == np.float32:
        return _BLAS
    return _packed(like.dtype, launch_mode())


@functools.cache
def _packed(dtype: np.dtype[Any], mode: str) -> Packed:
    """mode: that in which the sizes, which depend on it, are asked for now."""
    sizes = np.empty(6, np.int32)
    KERNELS.gemm_sizes[1, 1](np.empty(1, dtype), sizes)
    return Packed(sizes.tolist(), acc_dtype(dtype).itemsize)
