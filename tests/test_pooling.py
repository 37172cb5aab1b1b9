"""Max and average pooling, windowed and global. Formulas: minidl/ops/maxpool.cu, avgpool.cu."""

import numpy as np
import pytest

import reference
from minidl.ops import avgpool, maxpool
from reference import assert_close, distinct, numerical_vjp, tolerance

# (C, H, W, N), window, stride, padding
CASES = [
    ((3, 4, 4, 2), (2, 2), 2, 0),
    ((2, 5, 7, 3), (3, 3), 2, 1),   # overlapping windows, a column that no window sees
    ((2, 6, 5, 1), (3, 2), 1, 1),
    ((1, 7, 4, 33), (2, 2), 3, 0),  # gaps between windows
    ((2, 4, 3, 2), (4, 3), 1, 0),   # global
    ((1, 4, 5, 32), (2, 2), 2, 0),  # whole vectors of images
    ((1, 5, 5, 16), (3, 3), 2, 1),
    ((1, 2, 2, 35), (2, 2), 2, 0),  # images beside whole vectors of them, in the last pixel too
]
OPS = {"max": reference.max_pool, "average": reference.avg_pool}


def forward_backward(op, target, x, dy, dtype, *geometry):
    """-> y, dx on the host."""
    return of_device_arrays(op, target, target.array(x, dtype), target.array(dy, dtype), *geometry)


def of_device_arrays(op, target, device_x, device_dy, window, stride, padding):
    if op == "max":
        y, winner = maxpool.forward(device_x, window, stride, padding)
        dx = maxpool.backward(device_dy, winner, device_x.shape, window, stride, padding)
    else:
        y = avgpool.forward(device_x, window, stride, padding)
        dx = avgpool.backward(device_dy, device_x.shape, window, stride, padding)
    return target.host(y), target.host(dx)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape, window, stride, padding", CASES, ids=str)
def test_forward_and_gradient(target, rng, op, dtype, shape, window, stride, padding):
    x = target.host(target.array(distinct(rng, shape, gap=2.0**-4 if shape[3] < 33 else 2.0), dtype))
    expected = OPS[op](x, window, stride, padding)
    dy = np.round(rng.normal(size=expected.shape) * 16) / 16  # which all types can hold: one gradient for all
    y, dx = forward_backward(op, target, x, dy, dtype, window, stride, padding)
    assert_close(y, expected, tolerance(dtype, terms=window[0] * window[1]), "y")
    vjp = numerical_vjp(OPS[op], [x, window, stride, padding], 0, dy)
    assert_close(dx, vjp, tolerance(dtype, terms=window[0] * window[1]), "dx")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_arrays_that_begin_anywhere(target, rng, op, dtype):
    """Where 16 bytes of images cannot be read at once, though the batch has as many."""
    def shifted(values):
        return target.array(np.concatenate([[0], values.ravel()]), dtype)[1:].reshape(values.shape)

    x = target.host(target.array(distinct(rng, (2, 4, 4, 16), gap=2.0**-4), dtype))
    dy = rng.integers(-8, 9, size=(2, 2, 2, 16)).astype(float)
    y, dx = of_device_arrays(op, target, shifted(x), shifted(dy), (2, 2), 2, 0)
    expected, expected_dx = forward_backward(op, target, x, dy, dtype, (2, 2), 2, 0)
    assert np.array_equal(y, expected) and np.array_equal(dx, expected_dx)


@pytest.mark.parametrize("op", OPS)
def test_backward_twice_is_bit_equal(target, rng, op):
    x, dy = rng.normal(size=(3, 7, 7, 5)), rng.normal(size=(3, 4, 4, 5))
    first, second = (forward_backward(op, target, x, dy, "float32", (3, 3), 2, 1)[1] for _ in range(2))
    assert np.array_equal(first, second)


def test_of_equal_values_the_first_gets_the_gradient(target):
    x, dy = np.ones((1, 4, 4, 2)), np.ones((1, 2, 2, 2))
    _, dx = forward_backward("max", target, x, dy, "float32", (2, 2), 2, 0)
    expected = np.zeros((1, 4, 4, 2))
    expected[:, ::2, ::2] = 1
    assert np.array_equal(dx, expected)


@pytest.mark.parametrize("batch", [1, 16])
def test_minus_infinity_and_nan(target, batch):
    x = np.full((1, 2, 4, batch), -np.inf)
    x[0, 1, 3] = np.nan
    y, dx = forward_backward("max", target, x, np.ones((1, 1, 2, batch)), "float32", (2, 2), 2, 0)
    assert (y[0, 0, 0] == -np.inf).all() and np.isnan(y[0, 0, 1]).all()
    for n in range(batch):
        assert dx[0, :, :, n].tolist() == [[1, 0, 0, 0], [0, 0, 0, 1]]


@pytest.mark.parametrize("side", [2, 3, 4])
def test_the_first_nan_wins(target, side):
    """Image n has its first NaN at place n, a second one behind it, and larger numbers before and after."""
    places = side * side
    x = np.zeros((places, places))
    for n in range(places):
        x[:, n] = np.arange(places)
        x[[n, min(n + 2, places - 1)], n] = np.nan
    y, dx = forward_backward("max", target, x.reshape(1, side, side, places), np.ones((1, 1, 1, places)), "float32",
                             (side, side), side, 0)
    assert np.isnan(y).all() and np.array_equal(dx.reshape(places, places), np.eye(places))


@pytest.mark.parametrize("forward", [maxpool.forward, avgpool.forward])
@pytest.mark.parametrize("window, stride, padding, message", [
    ((5, 5), 2, 0, "pool: window 5x5 is larger than the padded image 4x4"),
    ((2, 2), 0, 0, "pool: stride is 0"),
    ((2, 2), 1, -1, "pool: padding is -1"),
    ((4, 3), 1, 2, "pool: padding 2 is more than half of the window 4x3"),
])
def test_refused(target, forward, window, stride, padding, message):
    with pytest.raises(ValueError, match=message):
        forward(target.array(np.zeros((1, 4, 4, 2))), window, stride, padding)


def test_windows_too_large_to_number_are_refused(target):
    with pytest.raises(ValueError, match="max-pool: window 257x256 has more than 65536 pixels"):
        maxpool.forward(target.array(np.zeros((1, 257, 256, 1), np.float32)), (257, 256), 1)


def test_average_into_given_arrays(target, rng):
    x, dy = rng.normal(size=(3, 7, 7, 5)), rng.normal(size=(3, 4, 4, 5))
    y, dx = forward_backward("average", target, x, dy, "float64", (3, 3), 2, 1)
    out, given_dx = target.poison((4, 4, 4, 5), "float64"), target.poison((4, 7, 7, 5), "float64")
    avgpool.forward(target.array(x), (3, 3), 2, 1, out=out[1:])
    avgpool.backward(target.array(dy), x.shape, (3, 3), 2, 1, dx=given_dx[1:])
    assert np.array_equal(target.host(out)[1:], y) and np.array_equal(target.host(given_dx)[1:], dx)
    assert np.isnan(target.host(out)[0]).all() and np.isnan(target.host(given_dx)[0]).all()
    with pytest.raises(ValueError, match=r"average pool: out has shape \(4, 4, 4, 5\), the result \(3, 4, 4, 5\)"):
        avgpool.forward(target.array(x), (3, 3), 2, 1, out=out)
