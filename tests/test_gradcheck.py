"""The gradient check must pass what is right, catch what is planted and name its place, and tell kinks from faults."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import minidl
from minidl import gradient_check, initializers, layers, optim
from minidl.commands.gradcheck import CASES
from minidl.gradient_check import LIMIT, STEP, check, check_directions
from minidl.layer import Layer, Parameter
from minidl.layers import BatchNorm2d, Conv2d, GlobalAvgPool2d, Linear, ReLU, Sequential

SHAPE = (3, 2, 4, 2)


class Scale(Layer):
    """A user's layer, y = gamma * x + beta, gamma and beta (C); the gradients of its backward pass through `change`."""

    def __init__(self, change=lambda layer, dx: dx):
        self.change, self.passes = change, 0
        self.gamma, self.beta = Parameter((3,), initializers.ones), Parameter((3,), initializers.zeros)

    def forward(self, x):
        self._save(x)
        return self.gamma.data[:, None, None, None] * x + self.beta.data[:, None, None, None]

    def backward(self, dy):
        (x,) = self._take()
        self.passes += 1
        self.gamma.grad[...] = (dy * x).sum(axis=(1, 2, 3))
        self.beta.grad[...] = dy.sum(axis=(1, 2, 3))
        return self.change(self, self.gamma.data[:, None, None, None] * dy)


def verdicts(results):
    return {result.argument: result.verdict for result in results}


def test_a_layer_of_a_user_is_right(place):
    results = check(Scale(), SHAPE, device=place)
    assert verdicts(results) == {"x": "ok", "gamma": "ok", "beta": "ok"}
    assert [result.size for result in results] == [48, 3, 3]
    assert all(0 < result.error < 1e-9 and result.got == pytest.approx(result.expected, rel=1e-9) for result in results)


def at(name, index, fault):
    """A function for Scale that makes one gradient wrong at `index`."""
    def change(layer, dx):
        array = dx if name == "x" else getattr(layer, name).grad
        array[index] = fault(array[index])
        return dx

    return change


@pytest.mark.parametrize("fault", [lambda v: -v, lambda v: v * 1.0001, lambda v: 0 * v, lambda v: v * np.nan,
                                   lambda v: v + np.inf], ids=["sign", "1e-4", "lost", "NaN", "Inf"])
@pytest.mark.parametrize("name, index", [("x", (2, 1, 3, 0)), ("gamma", (1,)), ("beta", (2,))])
def test_one_wrong_element_is_named(place, name, index, fault):
    results = check(Scale(at(name, index, fault)), SHAPE, device=place)
    assert verdicts(results) == {"x": "ok", "gamma": "ok", "beta": "ok"} | {name: "wrong"}
    result, = (result for result in results if result.verdict == "wrong")
    assert result.index == index and result.wrong == 1 and result.kinks == 0 and result.error > LIMIT
    assert result.coarse == pytest.approx(result.expected, rel=1e-6)
    place_of_it = ", ".join(map(str, index))
    assert str(result).startswith(f"wrong: {name}[{place_of_it}]: got {result.got:.9g}, expected {result.expected:.9g} (step")


def test_a_wrong_sign_is_wrong_everywhere(place):
    result = check(Scale(lambda layer, dx: -dx), SHAPE, device=place)[0]
    assert (result.verdict, result.wrong, result.size) == ("wrong", 48, 48) and result.got == pytest.approx(-result.expected)


def test_factors_and_terms_that_initial_values_hide(place):
    """gamma starts at 1: a backward that forgets it would pass there."""
    forgets = Scale(lambda layer, dx: dx / layer.gamma.data[:, None, None, None])
    assert verdicts(check(forgets, SHAPE, device=place)) == {"x": "wrong", "gamma": "ok", "beta": "ok"}


def accumulate(layer, dx):
    layer.gamma.grad[...] *= layer.passes  # as if added to what was there
    return dx


def test_a_gradient_that_is_added_to_the_last_one(place):
    assert verdicts(check(Scale(accumulate), SHAPE, device=place)) == {"x": "ok", "gamma": "unrepeatable", "beta": "ok"}


def test_one_such_parameter_of_many(place):
    results = check_directions(Scale(accumulate), SHAPE, device=place)
    assert verdicts(results)["parameters"] == "unrepeatable"


class Hinge(Layer):
    """max(x - c, 0), with c so that the first x that it sees is `distance` above the kink in one element."""

    def __init__(self, distance, factor=1.0):
        self.distance, self.factor, self.c = distance, factor, None

    def forward(self, x):
        if self.c is None:
            self.c = float(x[1, 0, 2, 1]) - self.distance
        self._save(x > self.c)
        return (x - self.c) * (x > self.c)

    def backward(self, dy):
        (mask,) = self._take()
        return self.factor * dy * mask


@pytest.mark.parametrize("steps", [0, 0.001, 0.3, 0.5, 2 / 3, 1, 1.7, 2.5, 3.9, -0.3, -3.9])
def test_a_kink_within_reach_is_no_fault(place, steps):
    """Also where both step sizes agree: at the kink itself."""
    result, = check(Hinge(steps * STEP), SHAPE, device=place)
    assert (result.verdict, result.kinks, result.wrong, result.index) == ("kink", 1, 0, (1, 0, 2, 1))
    assert str(result).endswith("0 of 48 wrong, 1 at kinks")


def test_rounding_where_a_derivative_is_0_is_no_kink(place):
    """Batch norm takes the bias in front of it away: differences along it are rounding alone."""
    network = Sequential(conv=Conv2d(2, 3, 1), norm=BatchNorm2d(3))
    results = [result for seed in range(2) for result in check(network, (2, 3, 2, 3), device=place, seed=seed)]
    assert {result.verdict for result in results} == {"ok"}


def test_kinks_out_of_reach_and_faults_beside_kinks(place):
    assert verdicts(check(Hinge(4.1 * STEP), SHAPE, device=place)) == {"x": "ok"}
    result, = check(Hinge(0, factor=1.001), SHAPE, device=place)
    assert result.verdict == "wrong" and result.kinks == 1 and 0 < result.wrong < 47 and result.index != (1, 0, 2, 1)


class Wavering(Layer):
    """Its mask is another one at each pass."""

    def __init__(self):
        self.passes = 0

    def forward(self, x):
        self.passes += 1
        self._save(self.passes % 3 + 1)
        return x * (self.passes % 3 + 1)

    def backward(self, dy):
        (factor,) = self._take()
        return dy * factor


def test_a_layer_that_wavers():
    assert verdicts(check(Wavering(), SHAPE)) == {"x": "unrepeatable"}


class Wrapped(Layer):
    """Any two functions as a layer."""

    def __init__(self, forward, backward):
        self.forward, self.backward = forward, backward


@pytest.mark.parametrize("forward, backward, message", [
    (lambda x: x / 0, lambda dy: dy, "Wrapped: forward gives values that are not finite"),
    (lambda x: x * np.nan, lambda dy: dy, "Wrapped: forward gives values that are not finite"),
    (lambda x: x[:, :, ::2].copy(), lambda dy: dy.repeat(2, axis=2),
     r"Wrapped: forward gives \(3, 2, 2, 2\), and output_shape says \(3, 2, 4, 2\)"),
    (lambda x: x * np.ones(1), lambda dy: dy, "Wrapped: forward gives float64 where x is float32, whose type it must have"),
    (lambda x: 1 * x, lambda dy: dy * np.ones(1), "Wrapped: backward gives float64 where x is float32"),
    (lambda x: x[:, :, ::-1], lambda dy: dy[:, :, ::-1].copy(), "Wrapped: forward gives an array that is not contiguous"),
    (lambda x: x[:, :, ::-1].copy(), lambda dy: dy[:, :, ::-1], "Wrapped: backward gives an array that is not contiguous"),
    (lambda x: np.multiply(x, 2, out=x), lambda dy: 2 * dy, "Wrapped: forward changes x, which must stay as it is"),
    (lambda x: 2 * x, lambda dy: np.multiply(dy, 2, out=dy), "Wrapped: backward changes dy, which must stay as it is"),
    (lambda x: x, lambda dy: dy[:1], r"Wrapped: the gradient to x has shape \(1, 2, 4, 2\), x \(3, 2, 4, 2\)"),
])
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_refused(forward, backward, message):
    with pytest.raises(ValueError, match=message):
        check(Wrapped(forward, backward), SHAPE)


def test_a_layer_without_gradient_to_x(place):
    layer = Conv2d(2, 2, 1)
    layer.skip_input_gradient()
    assert verdicts(check(layer, (2, 2, 2, 1), device=place)) == {"weight": "ok", "bias": "ok"}


def test_distinct_values():
    """Few or many, they keep their distance from each other and from 0."""
    for shape in ((1, 1, 1, 1), (3, 5, 7, 1), (10, 10, 10, 2)):
        values = np.sort(gradient_check._distinct(np.random.default_rng(0), shape).ravel())
        assert np.abs(values).min() > 0.49 * gradient_check.GAP and (np.diff(values) > 0.99 * gradient_check.GAP).all()
        assert shape == (10, 10, 10, 2) or np.abs(values).max() <= 2


# ---- along random directions


def network(middle):
    return Sequential(stem=Conv2d(3, 3, 3, padding=1, bias=False), norm=BatchNorm2d(3, relu=True), middle=middle,
                      pool=GlobalAvgPool2d(), classifier=Linear(3, 4))


def test_a_network_is_right(place):
    results = check_directions(network(Scale()), (3, 8, 8, 4), device=place)
    assert verdicts(results) == {"x": "ok", "parameters": "ok"}
    assert all(result.error < 1e-6 and result.index is None for result in results)


def test_the_parameter_that_is_wrong_is_named(place):
    results = check_directions(network(Scale(at("beta", (1,), lambda v: 1.001 * v))), (3, 8, 8, 4), device=place)
    assert verdicts(results) == {
        "x": "ok", "parameters": "wrong", "stem.weight": "ok", "norm.weight": "ok", "norm.bias": "ok", "middle.gamma": "ok",
        "middle.beta": "wrong", "classifier.weight": "ok", "classifier.bias": "ok"}


def test_one_wrong_element_of_dx_shows_along_a_direction(place):
    results = check_directions(Scale(at("x", (0, 0, 0, 0), lambda v: -v)), (3, 8, 8, 4), device=place)
    assert verdicts(results) == {"x": "wrong", "parameters": "ok"}


def test_a_network_without_parameters(place):
    assert verdicts(check_directions(ReLU(), (3, 8, 8, 4), device=place)) == {"x": "ok"}


# ---- the command


def gradcheck(*arguments, before=""):
    """Run the command in a process, on the CPU's first core, after the Python code `before`."""
    code = f"import sys\nfrom minidl import __main__\n{before}\nsys.exit(__main__.script())"
    return subprocess.run([sys.executable, "-c", code, "gradcheck", *arguments], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_every_layer_has_cases():
    own = {name for name, value in vars(layers).items() if isinstance(value, type) and issubclass(value, Layer)
           and value.__module__ == layers.__name__ and not name.startswith("_")}
    assert set(CASES) == own - {"Layer", "Composition"}
    assert all(type(case.make()).__name__ == name for name in CASES for case in CASES[name])


def test_layers_and_optimizers_are_public():
    assert {*CASES, *(optimizer.__name__ for optimizer in optim.OPTIMIZERS.values())} <= set(minidl.__all__)


def test_all_layers_are_right():
    result = gradcheck("--json", "--device", "cpu")
    assert result.returncode == 0 and result.stderr == ""
    cases = json.loads(result.stdout)["cases"]
    assert [(case["layer"], case["case"]) for case in cases] == [(name, case.name) for name in CASES for case in CASES[name]]
    assert {case["verdict"] for case in cases} == {"ok"}
    assert all(0 <= row["error"] < 1e-8 for case in cases for row in case["results"])


def test_a_network_by_its_name():
    result = gradcheck("wrn-10-1", "--model-kwargs", "dropout=0.3")
    assert result.returncode == 0, result.stderr
    assert [line.split()[:2] for line in result.stdout.splitlines()[1:]] == [["ok", "wrn-10-1"], ["1", "ok"]]


def test_a_fault_in_an_op_is_printed_and_fails():
    result = gradcheck("Linear", before="""
from minidl.ops import linear
right = linear.backward

def backward(dy, x, weight, dweight, dbias=None, **settings):
    dx = right(dy, x, weight, dweight, dbias, **settings)
    if dbias is not None:
        dbias[3] *= 2
    return dx

linear.backward = backward
""")
    assert result.returncode == 1 and result.stderr == "error: 1 of 2 gradient checks failed\n"
    first, wrong, second, count = result.stdout.splitlines()[1:]
    assert first.split()[:5] == ["wrong", "Linear", "of", "an", "image"] and second.startswith("ok ")
    assert wrong.startswith("  wrong: bias[3]: got ") and wrong.endswith("; 1 of 5 wrong")
    assert count == "1 ok, 1 wrong"


@pytest.mark.parametrize("way", ["winograd", "group_conv"])
def test_a_fault_in_one_of_the_ways_of_convolutions_is_seen(way):
    result = gradcheck("Conv2d", before=f"""
from minidl.ops import {way}
right = {way}.backward_weight

def backward_weight(dy, x, dweight, **settings):
    right(dy, x, dweight, **settings)
    dweight[-1] = 0

{way}.backward_weight = backward_weight
""")
    assert result.returncode == 1 and "wrong: weight" in result.stdout


@pytest.mark.parametrize("arguments, message", [
    (["Conv3d"], "error: unknown layer 'Conv3d': did you mean Conv2d?\n"),
    (["relu"], "error: unknown layer 'relu': did you mean ReLU?\n"),
    (["resnxt"], "error: unknown architecture 'resnxt': did you mean resnext"),
    (["ReLU", "--model-kwargs", "dropout=0.1"], "error: --model-kwargs are options of a network, not of a layer\n"),
    (["wrn-10-1", "--model-kwargs", "depth=3"], "error: unknown model option 'depth'"),
])
def test_command_refuses(arguments, message):
    result = gradcheck(*arguments)
    assert result.returncode == 2 and result.stdout == "" and result.stderr.startswith(message)
