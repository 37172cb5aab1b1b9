"""Matrix products on every kind of operand that the layers use, and refusals of all others."""

import ctypes
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

from conftest import CUPY
from minidl import blas, device
from minidl.blas import gemm
from minidl.kernels import storage_dtype
from reference import assert_close, tolerance

DTYPES = ["float64", "float32", "float16", "bfloat16"]
M, K, N = 5, 7, 3


class Matrices:
    """Random matrices, or stacks of them, on a device, and float64 copies of them on the host."""

    def __init__(self, place, rng, dtype="float32"):
        self.place, self.rng, self.dtype = place, rng, dtype

    def new(self, *shape):
        return self.place.array(self.rng.normal(size=shape).astype(storage_dtype(self.dtype)))

    def host(self, array):
        return np.array(self.place.to_host(array)).astype(np.float64)

    def check(self, a, b, out, alpha=1.0, beta=0.0):
        """gemm into `out`, against the product in float64."""
        expected = alpha * (self.host(a) @ self.host(b))
        if beta:
            expected += beta * self.host(out)
        gemm(a, b, out, alpha, beta)
        assert_close(self.host(out), expected, tolerance(out.dtype.name))


class OnGpu(np.ndarray):
    """An array of the host with the attribute that CuPy's have: where it begins."""

    @property
    def data(self):
        return SimpleNamespace(ptr=self.ctypes.data)


class DocumentedCublas:
    """What cuBLAS's documentation says that its two functions do, done by NumPy: matrices are stored by columns, `leading`
    elements apart."""

    TYPES = {2: "float16", 14: "bfloat16", 0: "float32", 1: "float64"}

    def call(self, function, op_a, op_b, m, n, k, alpha, *rest):
        strided = {"cublasGemmEx": False, "cublasGemmStridedBatchedEx": True}[function]
        rest = list(rest)

        def take_matrix():
            pointer, kind, leading = (rest.pop(0) for _ in range(3))
            return pointer.value, storage_dtype(self.TYPES[kind]), leading, rest.pop(0).value if strided else 0

        a, b, beta, c = take_matrix(), take_matrix(), rest.pop(0), take_matrix()
        batch = rest.pop(0) if strided else 1
        compute, algorithm = rest
        assert algorithm == -1
        scalar = {68: ctypes.c_float, 77: ctypes.c_float, 70: ctypes.c_double}[compute]
        assert type(alpha._obj) is type(beta._obj) is scalar
        for index in range(batch):
            left, right = (self.factor(matrix, index, shape, op, compute)
                           for matrix, shape, op in ((a, (m, k), op_a), (b, (k, n), op_b)))
            target = self.stored(c, index, m, n)
            product = alpha._obj.value * (left @ right)
            with np.errstate(over="ignore"):
                target[...] = product + beta._obj.value * target.astype(product.dtype) if beta._obj.value else product

    def factor(self, matrix, index, shape, op, compute):
        stored = self.stored(matrix, index, *(shape[::-1] if op else shape))
        wide = stored.astype(np.float64 if compute == 70 else np.float32)
        rounded = blas._round_to_tf32(wide) if compute == 77 else wide
        return rounded.T if op else rounded

    def stored(self, matrix, index, rows, columns):
        pointer, dtype, leading, stride = matrix
        assert leading >= max(1, rows)
        count = (columns - 1) * leading + rows
        memory = (ctypes.c_byte * (count * dtype.itemsize)).from_address(pointer + index * stride * dtype.itemsize)
        return as_strided(np.frombuffer(memory, dtype), (rows, columns), (dtype.itemsize, leading * dtype.itemsize))


@pytest.fixture(params=["cpu", "cuBLAS as it is documented", *(["cuda"] if CUPY else [])])
def place(request, monkeypatch):
    if request.param == "cuBLAS as it is documented":
        gemm_on_gpu = blas._gemm_on_gpu
        monkeypatch.setattr(blas._Cublas, "of_current_device", DocumentedCublas)
        monkeypatch.setattr(blas, "_gemm_on_host", lambda a, b, out, alpha, beta: gemm_on_gpu(
            *(array.view(OnGpu) for array in (a, b, out)), alpha, beta))
    return device.select("cuda" if request.param == "cuda" else "cpu")


@pytest.fixture
def matrices(place, rng):
    return Matrices(place, rng)


def transposed(array):
    return array.swapaxes(-1, -2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stack", [(), (1,), (4,)], ids=["matrix", "stack of one", "stack"])
@pytest.mark.parametrize("a_transposed", [False, True])
@pytest.mark.parametrize("b_transposed", [False, True])
def test_transpositions(place, rng, dtype, stack, a_transposed, b_transposed):
    matrices = Matrices(place, rng, dtype)
    a = transposed(matrices.new(*stack, K, M)) if a_transposed else matrices.new(*stack, M, K)
    b = transposed(matrices.new(*stack, N, K)) if b_transposed else matrices.new(*stack, K, N)
    matrices.check(a, b, matrices.new(*stack, M, N))


@pytest.mark.parametrize("few_tiles, function", [(8, "cublasGemmEx"), (7, "cublasGemmStridedBatchedEx")])
def test_long_sums_of_few_results(rng, monkeypatch, few_tiles, function):
    """2 x (65 x 128) are 2 x 2 x 2 tiles: cuBLAS splits the sums of one matrix only."""
    called = []
    monkeypatch.setattr(blas, "FEW_TILES", few_tiles)
    monkeypatch.setattr(blas._Cublas, "of_current_device", lambda: SimpleNamespace(
        call=lambda name, *arguments: (called.append(name), DocumentedCublas().call(name, *arguments))))
    a, b, out = (rng.normal(size=shape).view(OnGpu) for shape in ((2, 65, 4096), (2, 4096, 128), (2, 65, 128)))
    expected = 2 * (a @ b) + 0.5 * out
    blas._gemm_on_gpu(a, b, out, 2.0, 0.5)
    assert np.allclose(out, expected, rtol=1e-12, atol=1e-10) and set(called) == {function}


@pytest.mark.parametrize("stack", [(), (4,)], ids=["matrix", "stack"])
@pytest.mark.parametrize("alpha, beta", [(1, 0), (1, 1), (-0.5, 2)])
def test_sub_matrices(matrices, stack, alpha, beta):
    """Every operand lies within a larger matrix, and of the one around `out` nothing else is touched."""
    a = matrices.new(*stack, M + 2, K + 3)[..., 1:-1, 2:-1]
    b = transposed(matrices.new(*stack, N + 1, K + 4)[..., 1:, 4:])
    whole = matrices.new(*stack, M + 3, N + 4)
    before = matrices.host(whole)
    inner = (..., slice(1, -2), slice(3, -1))
    matrices.check(a, b, whole[inner], alpha, beta)
    after = matrices.host(whole)
    before[inner] = after[inner] = 0
    assert np.array_equal(after, before)


def test_stacks_across_memory(matrices):
    """Stacks whose matrices are interleaved, or one and the same."""
    interleaved = matrices.new(M, 4, K).transpose(1, 0, 2)
    one = matrices.place.xp.broadcast_to(matrices.new(K, N), (4, K, N))
    matrices.check(interleaved, one, matrices.new(M, 4, N).transpose(1, 0, 2))


@pytest.mark.parametrize("m, k, n", [(1, 1, 1), (1, K, N), (M, 1, N), (M, K, 1), (1, K, 1), (M, 1, 1), (1, 1, N)])
def test_single_rows_and_columns(matrices, m, k, n):
    """Of larger matrices: what is one row or column wide may have any stride along it, and across it."""
    with_gaps = lambda rows, columns: matrices.new(rows, 2, columns, 3)[:, 0, :, 0]  # noqa: E731
    a = with_gaps(m, k) if m == 1 or k == 1 else matrices.new(m, k)
    b = with_gaps(k, n) if k == 1 or n == 1 else matrices.new(k, n)
    matrices.check(a, b, matrices.new(m, 2 * n)[:, n:], 0.5, 2)
    matrices.check(a, b, matrices.new(m, 9)[:, :n], 1, 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alpha, beta", [(1, 0), (2, 0), (1, 1), (0, 1), (-0.5, 0.25)])
def test_alpha_and_beta(place, rng, dtype, alpha, beta):
    matrices = Matrices(place, rng, dtype)
    matrices.check(matrices.new(M, K), matrices.new(K, N), matrices.new(M, N), alpha, beta)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alpha", [1, 2])
def test_beta_0_does_not_read_out(place, rng, dtype, alpha):
    matrices = Matrices(place, rng, dtype)
    out = place.array(np.full((M, N), np.nan, storage_dtype(dtype)))
    matrices.check(matrices.new(M, K), matrices.new(K, N), out, alpha)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("alpha, beta", [(1, 0), (2, 0.5)])
def test_16_bit_factors_with_a_float32_product(place, rng, dtype, alpha, beta):
    matrices = Matrices(place, rng, dtype)
    out = place.array(rng.normal(size=(M, N)).astype(np.float32))
    matrices.check(matrices.new(M, K), matrices.new(K, N), out, alpha, beta)  # to the tolerance of float32


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_sums_are_accumulated_in_float32(place, dtype):
    """4096 times 1: a 16-bit sum would stop at 2048 or 256."""
    ones = place.array(np.ones((1, 4096), storage_dtype(dtype)))
    out = place.array(np.zeros((1, 1), storage_dtype(dtype)))
    gemm(ones, ones.T, out)
    assert float(place.to_host(out)[0, 0]) == 4096


@pytest.mark.filterwarnings("error")
def test_overflow_is_infinity_without_a_warning(place):
    factor = place.array(np.full((2, 2), 300, np.float16))
    out = place.array(np.zeros((2, 2), np.float16))
    gemm(factor, factor, out)
    assert np.isposinf(place.to_host(out)).all()


@pytest.mark.parametrize("alpha, beta", [(1, 0), (2, 0), (1, 1), (3, 0.5)])
def test_sums_of_nothing_are_0(matrices, alpha, beta):
    out = matrices.new(M, N)
    expected = beta * matrices.host(out)
    gemm(matrices.new(M, 0), matrices.new(0, N), out, alpha, beta)
    assert_close(matrices.host(out), expected, 1e-6)


@pytest.mark.parametrize("m, n, stack", [(0, N, ()), (M, 0, ()), (0, 0, ()), (M, N, (0,))], ids=str)
def test_empty_products(matrices, m, n, stack):
    gemm(matrices.new(*stack, m, K), matrices.new(*stack, K, n), matrices.new(*stack, m, n))


# ---- TF32 ----------------------------------------------------------------------------------------------------------


def test_float32_products_are_not_rounded(matrices):
    x = matrices.place.array(np.full((64, 64), 1024.5, np.float32))
    out = matrices.new(64, 64)
    gemm(x, matrices.place.array(np.eye(64, dtype=np.float32)), out)
    assert (matrices.host(out) == 1024.5).all()


def rounded_to_10_bits(x):
    """float64 -> float64 with 10 bits after the leading one, to nearest, ties away from 0."""
    fraction, exponent = np.frexp(x)  # 0.5 <= |fraction| < 1
    return np.ldexp(np.copysign(np.floor(np.abs(fraction) * 2**11 + 0.5), x), exponent - 11)


def test_tf32_rounds_the_factors(matrices, monkeypatch):
    monkeypatch.setattr(blas, "allow_tf32", True)
    a, b, out = matrices.new(64, 64), matrices.new(64, 64), matrices.new(64, 64)  # of other sizes a GPU may be exact
    exact = matrices.host(a) @ matrices.host(b)
    gemm(a, b, out)
    assert np.abs(matrices.host(out) - exact).max() > 1e-5  # it does round,
    assert_close(matrices.host(out), exact, 2.0**-9)         # and by no more
    if matrices.place.name == "cpu":  # tensor cores need not round to nearest
        assert_close(matrices.host(out), rounded_to_10_bits(matrices.host(a)) @ rounded_to_10_bits(matrices.host(b)), 1e-6)


@pytest.mark.filterwarnings("error")
def test_tf32_of_special_numbers(monkeypatch):
    """Ties, the largest numbers, infinity and NaN, each times 1, on the host."""
    monkeypatch.setattr(blas, "allow_tf32", True)
    finite = np.array([1024.5, -1024.5, 1024.49, 3e38, 1e-45, 0], np.float32)
    special = np.array([0x7F800000, 0xFF800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF], np.uint32).view(np.float32)
    x = np.append(finite, special)[:, None]
    out = np.empty_like(x)
    gemm(x, np.ones((1, 1), np.float32), out)
    expected = np.append(rounded_to_10_bits(finite), [np.inf, -np.inf, np.nan, np.nan, np.nan])
    expected[4] = 0  # the least subnormal: TF32 has 10 bits of those, too
    assert np.array_equal(out[:, 0], expected, equal_nan=True)
    assert list(out[:2, 0]) == [1025, -1025]


@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_tf32_leaves_other_types_alone(place, rng, monkeypatch, dtype):
    matrices = Matrices(place, rng, dtype)
    a, b, results = matrices.new(M, K), matrices.new(K, N), []
    for allowed in (False, True):
        monkeypatch.setattr(blas, "allow_tf32", allowed)
        out = matrices.new(M, N)
        gemm(a, b, out)
        results.append(matrices.host(out))
    assert np.array_equal(*results)


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("a, b, out, message", [
    ((M, K), (M, K), (M, K), r"shapes do not fit: \(5, 7\) @ \(5, 7\) -> \(5, 7\)"),
    ((M, K), (K, N), (N, M), r"shapes do not fit: \(5, 7\) @ \(7, 3\) -> \(3, 5\)"),
    ((M, K), (K, N), (M, 1), "shapes do not fit"),
    ((2, M, K), (3, K, N), (2, M, N), "shapes do not fit"),
    ((1, M, K), (2, K, N), (2, M, N), "shapes do not fit"),
    ((2, M, K), (2, K, N), (1, M, N), "shapes do not fit"),
    ((2, M, K), (K, N), (2, M, N), r"three matrices or three stacks of them, got shapes \(2, 5, 7\), \(7, 3\), \(2, 5, 3\)"),
    ((K,), (K,), (1,), "three matrices or three stacks"),
    ((1, 2, M, K), (1, 2, K, N), (1, 2, M, N), "three matrices or three stacks"),
], ids=str)
def test_refused_shapes(matrices, a, b, out, message):
    with pytest.raises(ValueError, match=f"gemm: .*{message}"):
        gemm(matrices.new(*a), matrices.new(*b), matrices.new(*out))


@pytest.mark.parametrize("a, b, out, message", [
    ("float32", "float64", "float32", "float32 @ float64 -> float32"),
    ("float32", "float32", "float64", "float32 @ float32 -> float64"),
    ("float64", "float64", "float32", "float64 @ float64 -> float32"),
    ("float32", "float32", "float16", "float32 @ float32 -> float16"),
    ("float16", "bfloat16", "float32", "float16 @ bfloat16 -> float32"),
    ("float16", "float16", "float64", "float16 @ float16 -> float64"),
    ("int32", "int32", "int32", "int32 @ int32 -> int32"),
    ("complex64", "complex64", "complex64", "complex64 @ complex64 -> complex64"),
])
def test_refused_types(place, matrices, a, b, out, message):
    storage_dtype("bfloat16")  # teaches NumPy the name
    place.check_type(np.dtype(b))
    with pytest.raises(TypeError, match=f"gemm: types do not fit: {message}"):
        gemm(matrices.new(M, K).astype(a), matrices.new(K, N).astype(b), matrices.new(M, N).astype(out))


def test_a_stream_that_could_not_be_set_is_set_again():
    calls = []

    class Library:
        def __getattr__(self, name):
            return lambda *arguments: calls.append(name) or 7 * (len(calls) == 2)

    cublas = object.__new__(blas._Cublas)
    vars(cublas).update(_library=Library(), _handle=None, _stream=0, _workspace=SimpleNamespace(ptr=8),
                        _current_stream=lambda: SimpleNamespace(ptr=16))
    with pytest.raises(RuntimeError, match="^cublasSetWorkspace_v2 failed with status 7$"):
        cublas.call("product")
    cublas._current_stream = lambda: SimpleNamespace(ptr=0)
    cublas.call("product")
    assert calls == [*["cublasSetStream_v2", "cublasSetWorkspace_v2"] * 2, "product"]


@pytest.mark.parametrize("spoil, operand, message", [
    (lambda x: x[:, ::2], "a", "a is neither a sub-matrix nor a transposed one"),
    (lambda x: x[::-1, :K], "a", r"a is neither a sub-matrix nor a transposed one: shape \(5, 7\), strides \(-56, 4\)"),
    (lambda x: x[:, K:][:, ::-1], "a", "a is neither"),
    (lambda x: x[:, ::2].T.copy().T[:, ::-1], "a", "a is neither"),
    (lambda x: x[:, ::2], "b", "b is neither"),
    (lambda x: x[:, ::2], "out", "out is neither"),
    (lambda x: x[:, ::2].T.copy().T, "out", "rows of out are not contiguous"),
])
def test_refused_strides(matrices, spoil, operand, message):
    shapes = {"a": (M, K), "b": (K, N), "out": (M, N)}
    operands = {name: matrices.new(*shape) for name, shape in shapes.items()}
    rows, columns = shapes[operand]
    operands[operand] = spoil(matrices.new(rows, 2 * columns))
    assert operands[operand].shape == shapes[operand]
    with pytest.raises(ValueError, match=f"gemm: {message}"):
        gemm(**operands)


def test_refused_devices(monkeypatch):
    class Elsewhere:
        """An array of another module."""

    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(ndarray=Elsewhere))
    matrix = np.ones((2, 2), np.float32)
    for operands in ([Elsewhere(), matrix, matrix], [matrix, Elsewhere(), matrix], [matrix, matrix, Elsewhere()]):
        with pytest.raises(TypeError, match="gemm: operands on different devices"):
            gemm(*operands)
    with pytest.raises(TypeError, match="a numpy or cupy array is needed, got builtins.list"):
        gemm(matrix, matrix.tolist(), matrix)
