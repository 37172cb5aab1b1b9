"""The fully connected layer. Formulas: minidl/ops/linear.py."""

import numpy as np
import pytest

import reference
from minidl.ops import linear
from reference import assert_close, numerical_vjp, tolerance


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("features, outputs, batch", [(5, 3, 4), (1, 2, 1), (7, 1, 33)])
def test_forward_and_gradients(target, rng, features, outputs, batch, dtype):
    x, weight, dy = (target.host(target.array(rng.normal(size=shape), dtype))
                     for shape in ((features, batch), (outputs, features), (outputs, batch)))
    value = rng.normal(size=outputs).astype(np.float32).astype(float)
    device_x, device_weight = target.array(x, dtype), target.array(weight, dtype)
    y = linear.forward(device_x, device_weight, target.acc(value, dtype))
    rtol = (1 if dtype in ("float64", "float32") else 2) * tolerance(dtype, terms=max(features, batch))
    assert_close(target.host(y), reference.linear(x, weight, value), rtol, "y")
    acc = "float64" if dtype == "float64" else "float32"
    dweight, dbias = target.poison(weight.shape, acc), target.poison(outputs, acc)
    dx = linear.backward(target.array(dy, dtype), device_x, device_weight, dweight, dbias)
    for index, got in enumerate((dx, dweight, dbias)):
        expected = numerical_vjp(reference.linear, [x, weight, value], index, dy, h=1.0)
        assert_close(target.host(got), expected, rtol, ("dx", "dweight", "dbias")[index])


def test_without_bias_and_input_gradient(target, rng):
    x, weight, dy = (target.array(rng.normal(size=shape)) for shape in ((5, 4), (3, 5), (3, 4)))
    dweight = target.poison((3, 5), "float64")
    assert linear.backward(dy, x, weight, dweight, input_gradient=False) is None
    assert_close(target.host(dweight), target.host(dy) @ target.host(x).T, 1e-12)
    assert_close(target.host(linear.forward(x, weight)), target.host(weight) @ target.host(x), 1e-12)


def test_refused(target):
    with pytest.raises(ValueError, match=r"linear: input \(4, 2\) does not fit weight \(3, 5\)"):
        linear.forward(target.array(np.zeros((4, 2))), target.array(np.zeros((3, 5))))
