"""ReLU, the sum of branches, and the bias. Formulas: minidl/ops/relu.cu, add.cu, bias.cu."""

import numpy as np
import pytest

import reference
from minidl.ops import add, bias, relu
from reference import assert_close, distinct, numerical_vjp, tolerance

DTYPES = ["float64", "float32", "bfloat16", "float16"]
SHAPES = [(1,), (3, 2, 2, 5), (2, 70, 9, 8)]  # the last: more than one block of elements and more than one tile


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_relu(target, rng, shape, dtype):
    x = target.host(target.array(distinct(rng, shape, gap=2.0**-3), dtype))
    dy = target.host(target.array(rng.normal(size=shape), dtype))
    y = relu.forward(target.array(x, dtype))
    dx = relu.backward(target.array(dy, dtype), y)
    assert np.array_equal(target.host(y), reference.relu(x))
    if x.size < 100:
        assert_close(target.host(dx), numerical_vjp(reference.relu, [x], 0, dy), tolerance(dtype), "dx")
    assert np.array_equal(target.host(dx), np.where(x > 0, dy, 0))


def test_relu_at_its_kink_and_beyond_numbers(target):
    x = target.array(np.array([0.0, -0.0, np.nan, np.inf, -np.inf]), "float32")
    y = relu.forward(x)
    assert np.array_equal(target.host(y), [0, 0, np.nan, np.inf, 0], equal_nan=True)
    dx = relu.backward(target.array(np.ones(5), "float32"), y)
    assert np.array_equal(target.host(dx), [0, 0, 0, 1, 0])


def test_relu_of_nothing(target):
    assert relu.forward(target.array(np.zeros((0, 3)))).shape == (0, 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_add(target, rng, shape, dtype):
    a, b = (target.host(target.array(rng.normal(size=shape), dtype)) for _ in range(2))
    assert_close(target.host(add.forward(target.array(a, dtype), target.array(b, dtype))), a + b, tolerance(dtype))


def test_add_in_place(target, rng):
    a, b = rng.normal(size=(3, 2, 2, 5)), rng.normal(size=(3, 2, 2, 5))
    for first in (True, False):
        device_a, device_b = target.array(a), target.array(b)
        out = device_a if first else device_b
        assert add.forward(device_a, device_b, out=out) is out
        assert np.array_equal(target.host(out), a + b)


def test_add_refuses_different_shapes(target):
    with pytest.raises(ValueError, match=r"add: shapes \(2, 3\) and \(3, 2\) differ"):
        add.forward(target.array(np.zeros((2, 3))), target.array(np.zeros((3, 2))))
    with pytest.raises(ValueError, match=r"add: out has shape \(2, 2\), the result \(2, 3\)"):
        add.forward(target.array(np.zeros((2, 3))), target.array(np.zeros((2, 3))), out=target.array(np.zeros((2, 2))))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 2, 2, 5), (2, 70, 9, 8)], ids=str)
def test_bias(target, rng, shape, dtype):
    y = target.host(target.array(rng.normal(size=shape), dtype))
    value = rng.normal(size=shape[0]).astype(np.float32).astype(float)
    device_y, dbias = target.array(y, dtype), target.acc(np.full(shape[0], np.nan), dtype)
    bias.add(device_y, target.acc(value, dtype))
    assert_close(target.host(device_y), y + value.reshape(-1, 1, 1, 1), tolerance(dtype), "y")
    bias.gradient(target.array(y, dtype), dbias)
    assert_close(target.host(dbias), y.sum(axis=(1, 2, 3)), tolerance("float64" if dtype == "float64" else "float32", y[0].size))


@pytest.mark.parametrize("of", [bias.add, bias.gradient])
@pytest.mark.parametrize("count", [1, 3])
def test_bias_refuses_another_number_of_rows(of, count):
    with pytest.raises(ValueError, match=rf"bias: \({count},\) is not one number for each of the 2 rows"):
        of(np.zeros((2, 3, 3, 4)), np.zeros(count))


def test_bias_of_some_columns(target):
    y = target.array(np.zeros((2, 3, 4)))
    bias.add(y, target.array(np.array([1.0, 2.0])), slice(5, 9))
    expected = np.zeros((2, 12))
    expected[:, 5:9] = [[1], [2]]
    assert np.array_equal(target.host(y).reshape(2, 12), expected)
