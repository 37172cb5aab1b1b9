"""Matrix products: cuBLAS on CuPy arrays, BLAS through numpy.matmul on NumPy arrays.

cuBLAS is called through a handle and a workspace of our own, because CuPy's wrappers refuse to run while a stream
is captured into a CUDA graph. No other file knows of this. There is one handle for each GPU, and whether TF32 is allowed is one
fact of the process: products on a GPU are for one thread at a time.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from minidl.device import Array, array_module

allow_tf32 = False  # see `tf32`


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Within the `with` block, float32 products may round their factors to TF32, 10 bits of mantissa, or may not."""
    global allow_tf32
    before, allow_tf32 = allow_tf32, allowed
    try:
        yield
    finally:
        allow_tf32 = before


def gemm(a: Array, b: Array, out: Array, alpha: float = 1.0, beta: float = 0.0) -> None:
    """out = alpha * a @ b + beta * out, for matrices or equally long stacks of matrices.

    a (m, k), b (k, n), out (m, n), or each with a leading batch axis. Every operand may be a sub-matrix or a
    transposed view: one of its last two axes must be contiguous, in `out` the last. Types: a and b alike,
    out alike too, or float32 where a and b are float16 or bfloat16. Sums are accumulated in float32 or float64.
    `beta` = 0 does not read `out`. Raises ValueError for shapes or strides, TypeError for types.
    """
    _check(a, b, out)
    if out.size == 0:
        return
    if a.shape[-1] == 0:  # sums of nothing, for which cuBLAS wants addresses nevertheless
        if beta:
            out *= out.dtype.type(beta)
        else:
            out[...] = 0
        return
    product = _gemm_on_host if array_module(out) is np else _gemm_on_gpu
    product(a, b, out, alpha, beta)


def _check(a: Array, b: Array, out: Array) -> None:
    if not array_module(a) is array_module(b) is array_module(out):
        raise TypeError("gemm: operands on different devices")
    if not a.ndim == b.ndim == out.ndim or a.ndim not in (2, 3):
        raise ValueError(f"gemm: needs three matrices or three stacks of them, got shapes {a.shape}, {b.shape}, {out.shape}")
    if a.shape[-1] != b.shape[-2] or out.shape != (*a.shape[:-1], b.shape[-1]) or a.shape[:-2] != b.shape[:-2]:
        raise ValueError(f"gemm: shapes do not fit: {a.shape} @ {b.shape} -> {out.shape}")
    types = a.dtype.name, b.dtype.name, out.dtype.name
    widened = types[0] in ("float16", "bfloat16") and types[2] == "float32"
    if types[0] != types[1] or types[2] != types[0] and not widened or types[0] not in _CUDA_TYPES:
        raise TypeError(f"gemm: types do not fit: {types[0]} @ {types[1]} -> {types[2]}")
    if out.size == 0:
        return  # NumPy gives empty arrays strides of 0
    for name, array in (("a", a), ("b", b), ("out", out)):
        _transposed_and_leading_dimension(name, array)
    if out.shape[-1] > 1 and out.strides[-1] != out.itemsize:
        raise ValueError(f"gemm: rows of out are not contiguous: strides {out.strides}")


def _transposed_and_leading_dimension(name: str, array: Array) -> tuple[bool, int]:
    """A matrix (or stack) -> (whether its columns, not its rows, are contiguous; elements from one to the next)."""
    rows, columns = array.shape[-2:]
    row_stride, column_stride = (stride // array.itemsize for stride in array.strides[-2:])
    if (columns <= 1 or column_stride == 1) and (rows <= 1 or row_stride >= columns):
        return False, max(row_stride if rows > 1 else columns, 1)
    if (rows <= 1 or row_stride == 1) and (columns <= 1 or column_stride >= rows):
        return True, max(column_stride if columns > 1 else rows, 1)
    raise ValueError(f"gemm: {name} is neither a sub-matrix nor a transposed one: shape {array.shape}, strides {array.strides}")


# ---- CPU -------------------------------------------------------------------------------------------------------


def start_on_host() -> None:
    """Let NumPy's BLAS start its threads and take its buffers while memory is free: OpenBLAS ends the process where it cannot
    get them later."""
    factor = np.ones((512, 512), np.float32)
    factor @ factor


@np.errstate(all="ignore")  # overflow and NaN pass without a warning, as they do on a GPU
def _gemm_on_host(a: Array, b: Array, out: Array, alpha: float, beta: float) -> None:
    if a.dtype.itemsize == 2:  # exact in float32
        a, b = a.astype(np.float32), b.astype(np.float32)
    elif allow_tf32 and a.dtype == np.float32:
        a, b = _round_to_tf32(a), _round_to_tf32(b)
    if alpha == 1 and beta == 0 and out.dtype == a.dtype:
        np.matmul(a, b, out=out)
        return
    product = np.matmul(a, b)
    if alpha != 1:
        product *= product.dtype.type(alpha)
    if beta == 1:
        product += out
    elif beta != 0:
        product += product.dtype.type(beta) * out.astype(product.dtype)
    out[...] = product


def _round_to_tf32(array: Array) -> Array:
    """float32 -> float32 with 10 bits of mantissa, to nearest, ties away from zero: what cvt.rna of the GPU does."""
    bits = np.ascontiguousarray(array).view(np.uint32)
    rounded = ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(array), rounded, array)


# ---- GPU -------------------------------------------------------------------------------------------------------

# cudaDataType_t and cublasComputeType_t (library_types.h, cublas_api.h)
_CUDA_TYPES = {"float16": 2, "bfloat16": 14, "float32": 0, "float64": 1}
_COMPUTE_32F, _COMPUTE_32F_FAST_TF32, _COMPUTE_64F = 68, 77, 70
_DEFAULT_ALGORITHM = -1
_NO_SUMS_IN_16_BITS = 16  # cublasMath_t: by default, a sum that is split among blocks may be added up in the type of `out`
WORKSPACE_BYTES = 32 << 20  # of cuBLAS, from CuPy's pool: what NVIDIA advises for Hopper
# A stack whose results have at most FEW_TILES such tiles, of sums of LONG_SUM or more, is multiplied matrix by matrix: cuBLAS
# splits a long sum among blocks for one matrix only, and the tiles alone are less than a GPU has multiprocessors. Guesses.
TILE, FEW_TILES, LONG_SUM = 64, 64, 4096


def _gemm_on_gpu(a: Any, b: Any, out: Any, alpha: float, beta: float) -> None:  # Any: CuPy's `data` is not NumPy's
    stacked = out.ndim == 3 and len(out) > 1
    if stacked and math.prod(-(-size // TILE) for size in out.shape[1:]) * len(out) <= FEW_TILES and a.shape[-1] >= LONG_SUM:
        for matrices in zip(a, b, out):
            _gemm_on_gpu(*matrices, alpha, beta)
        return
    kind = a.dtype.name
    scalar: type[ctypes.c_double | ctypes.c_float]
    if kind == "float64":
        compute, scalar = _COMPUTE_64F, ctypes.c_double
    elif kind == "float32":
        compute, scalar = _COMPUTE_32F_FAST_TF32 if allow_tf32 else _COMPUTE_32F, ctypes.c_float
    else:
        compute, scalar = _COMPUTE_32F, ctypes.c_float
    # cuBLAS counts columns first: out^T (n, m) = b^T (n, k) @ a^T (k, m), so the factors change places.
    operands: list[tuple[Any, ...]] = []
    for name, array in (("b", b), ("a", a), ("out", out)):
        transposed, leading = _transposed_and_leading_dimension(name, array)
        stride = [ctypes.c_longlong(array.strides[0] // array.itemsize)] if stacked else []
        operands.append((int(transposed), ctypes.c_void_p(array.data.ptr), _CUDA_TYPES[array.dtype.name], leading, *stride))
    (b_op, *b_matrix), (a_op, *a_matrix), (_, *out_matrix) = operands
    function, count = ("cublasGemmStridedBatchedEx", [len(out)]) if stacked else ("cublasGemmEx", [])
    _Cublas.of_current_device().call(
        function, b_op, a_op, out.shape[-1], out.shape[-2], a.shape[-1], ctypes.byref(scalar(alpha)), *b_matrix, *a_matrix,
        ctypes.byref(scalar(beta)), *out_matrix, *count, compute, _DEFAULT_ALGORITHM)


class _Cublas:
    """A cuBLAS handle of the device that is current when it is made, bound to CuPy's current stream at each call."""

    def __init__(self) -> None:
        import cupy
        from cupy_backends.cuda.libs import cublas  # loads the library that CuPy was built for

        major = cublas.getVersion(cupy.cuda.device.get_cublas_handle()) // 10000
        self._library = ctypes.CDLL(f"libcublas.so.{major}")  # already in the process: the same copy
        self._current_stream = cupy.cuda.get_current_stream
        self._workspace = cupy.get_default_memory_pool().malloc(WORKSPACE_BYTES)  # for good, not what a step was lent
        self._handle = ctypes.c_void_p()
        self._stream: int | None = None
        self._check("cublasCreate_v2", self._library.cublasCreate_v2(ctypes.byref(self._handle)))
        self._check("cublasSetMathMode", self._library.cublasSetMathMode(self._handle, _NO_SUMS_IN_16_BITS))

    @staticmethod
    def of_current_device() -> _Cublas:
        import cupy

        return _cublas_of_device(cupy.cuda.runtime.getDevice())

    def call(self, function: str, *arguments: Any) -> None:
        stream = self._current_stream().ptr
        if stream != self._stream:
            self._stream = None  # unknown, if one of the two calls fails
            self._check("cublasSetStream_v2", self._library.cublasSetStream_v2(self._handle, ctypes.c_void_p(stream)))
            # Setting the stream puts the handle back to cuBLAS's own workspace, which capture cannot use.
            self._check("cublasSetWorkspace_v2", self._library.cublasSetWorkspace_v2(
                self._handle, ctypes.c_void_p(self._workspace.ptr), ctypes.c_size_t(WORKSPACE_BYTES)))
            self._stream = stream
        self._check(function, getattr(self._library, function)(self._handle, *arguments))

    @staticmethod
    def _check(function: str, status: int) -> None:
        if status:
            raise RuntimeError(f"{function} failed with status {status}")


@functools.cache
def _cublas_of_device(index: int) -> _Cublas:
    """index: of the current device."""
    return _Cublas()
