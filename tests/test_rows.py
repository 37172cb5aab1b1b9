"""Rows of memory, read and written in vectors or 16 bytes at a time: minidl/ops/rows.cuh."""

from pathlib import Path

import numpy as np
import pytest

from minidl.kernels import Kernels
from minidl.ops import add, relu

KERNELS = Kernels(Path(__file__).resolve().parent / "kernels" / "rows.cu")
DTYPES = ["float64", "float32", "bfloat16", "float16"]
SIZE = 300
LARGE = 1 << 30  # elements, which no cache holds
# Where the arrays begin, in elements, and which part of them is meant: aligned to 16 bytes and to a vector, or to nothing; whole
# vectors, with a rest, less than one, nothing.
PLACES = [(0, 0, 256), (0, 0, 37), (0, 32, 131), (1, 0, 256), (3, 5, 200), (8, 0, 3), (0, 16, 16), (7, 1, 130)]


def row(target, values, dtype, offset):
    """The array on the device, beginning `offset` elements behind the start of its memory."""
    return target.array(np.concatenate([np.zeros(offset), values]), dtype)[offset:]


def integers(rng):
    """Sums and products of which all types hold."""
    return rng.integers(-8, 9, SIZE).astype(float)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sum_over(target, rng, dtype):
    for offset, begin, end in PLACES:
        x, z, sums = integers(rng), integers(rng), target.acc(np.full(2, np.nan), dtype)
        KERNELS.sum_of_row[1, 128](row(target, x, dtype, offset), row(target, z, dtype, 2 * offset), sums, begin, end)
        assert np.array_equal(target.host(sums), [x[begin:end].sum(), (x * z)[begin:end].sum()])


@pytest.mark.parametrize("whole", [0, LARGE], ids=["kept in caches", "past the caches"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_map_over_a_row(target, rng, dtype, whole):
    for offset, begin, end in PLACES:
        x, z, untouched = integers(rng), integers(rng), np.full(SIZE, np.nan)
        results = [row(target, untouched, dtype, at) for at in (offset, 2 * offset)]
        KERNELS.map_of_row[1, 128](*(row(target, values, dtype, offset) for values in (x, z)), *results, begin, end, whole)
        inside = (np.arange(SIZE) >= begin) & (np.arange(SIZE) < end)
        for result, expected in zip(results, (x + z, x * z)):
            assert np.array_equal(target.host(result), np.where(inside, expected, np.nan), equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocks", [1, 3])
def test_map_over_an_array_in_place(target, rng, dtype, blocks):
    for offset, begin, end in PLACES:
        x, z = integers(rng), integers(rng)
        device_x = row(target, x, dtype, offset)
        KERNELS.map_of_all[blocks, 128](device_x[begin:], row(target, z, dtype, offset), device_x[begin:], end - begin)
        x[begin:end] += z[:end - begin]
        assert np.array_equal(target.host(device_x), x)


@pytest.mark.parametrize("zeros", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_copy_over(target, rng, dtype, zeros):
    for offset, begin, end in PLACES:
        x, y = integers(rng), row(target, np.full(SIZE, np.nan), dtype, offset)
        KERNELS.copy_of_row[1, 128](row(target, x, dtype, 2 * offset), y, begin, end, zeros)
        expected = np.full(SIZE, np.nan)
        expected[begin:end] = 0 if zeros else x[begin:end]
        assert np.array_equal(target.host(y), expected, equal_nan=True)


@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_large_arrays_go_past_the_caches(machine, rng, dtype, offset):
    """Of more than PAST_CACHES bytes, by all threads."""
    a, b = (rng.normal(size=2_100_001).astype(dtype).astype(float) for _ in range(2))
    y = machine.poison(len(a) + offset, dtype)
    add.forward(machine.array(a, dtype), machine.array(b, dtype), out=y[offset:])
    assert np.array_equal(machine.host(y[offset:]), (a.astype(dtype) + b.astype(dtype)))
    assert np.isnan(machine.host(y[:offset])).all()
    assert np.array_equal(machine.host(relu.forward(machine.array(a, dtype))), np.maximum(a, 0))
    assert np.array_equal(machine.host(relu.backward(machine.array(b, dtype), machine.array(a, dtype))), np.where(a > 0, b, 0))
