"""A look into a step: the first tensor that is not finite, statistics and times of each layer. It changes nothing."""

import json
import time
from functools import partial

import numpy as np
import pytest

import models
from minidl import initializers, inspection
from minidl.layer import Composition, Layer, Parameter
from minidl.layers import AvgPool2d, BatchNorm2d, Conv2d, GlobalAvgPool2d, Linear, MaxPool2d, ReLU, Residual, Sequential
from minidl.optim import SGD, Optimizer
from small_runs import ARGUMENTS, digests, few_digits, rows, train  # noqa: F401


def small_network(place, dtype="float32"):
    """All in a row, so that it can be computed layer by layer; no bias of the convolution, which batch norm takes away."""
    return Sequential(conv=Conv2d(3, 6, 3, bias=False), bn=BatchNorm2d(6), relu=ReLU(), pool=MaxPool2d(2), average=AvgPool2d(2),
                      classifier=Linear(24, 5)).initialize(place, dtype, seed=3)


def residual(place):
    """With branches, whose layers are told where to write or what to add."""
    return Sequential(
        stem=Conv2d(3, 4, 3, padding=1), block=Residual(Conv2d(4, 4, 1), norm=BatchNorm2d(4)), mean=GlobalAvgPool2d(),
        classifier=Linear(4, 5)).initialize(place, seed=3)


def arrays(place, rng, batch=7, side=10):
    x = rng.normal(size=(3, side, side, batch)).astype(np.float32)
    return place.array(x), place.array(rng.normal(size=(5, batch)).astype(np.float32))


def a_step(network, x, dlogits):
    """A forward and a backward."""
    network.forward(x)
    network.backward(dlogits)


def methods(network):
    return [name for _, layer in network.named_layers() for name in vars(layer) if name in ("forward", "backward")]


# ---- the first tensor that is not finite -------------------------------------------------------------------------


def test_all_are_finite(place, rng):
    network = residual(place).train()
    assert inspection.first_nonfinite(network, lambda: a_step(network, *arrays(place, rng))) is None
    assert methods(network) == []


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["stem", "block.body", "block.norm", "classifier"])
def test_the_first_output_is_named(place, rng, name, value):
    network = residual(place).train()
    dict(network.named_layers())[name].bias.master[1] = value
    assert inspection.first_nonfinite(network, lambda: a_step(network, *arrays(place, rng))) == f"layer {name}, its output"


class Spoiled(Conv2d):
    """A convolution one of whose gradients is not finite."""

    spoil = "weight"

    def backward(self, dy, dx=None):
        dx = super().backward(dy, dx)
        (dx if self.spoil == "input" else getattr(self, self.spoil).grad).reshape(-1)[0] = np.inf
        return dx


@pytest.mark.parametrize("spoil", ["weight", "bias", "input"])
def test_the_first_gradient_is_named(place, rng, spoil):
    """The first in the order of the backward: all that come before in the network are not finite either."""
    network = Sequential(first=Conv2d(3, 4, 1), second=Spoiled(4, 4, 1), third=Conv2d(4, 5, 1), mean=GlobalAvgPool2d(),
                       last=Linear(5, 5)).initialize(place, seed=3).train()
    network.second.spoil = spoil
    said = inspection.first_nonfinite(network, lambda: a_step(network, *arrays(place, rng)))
    assert said == f"layer second, the gradient of its {spoil}"


def test_what_is_told_where_to_write_is_seen(place, rng):
    """In a Res2Net, layers write into parts of an array that others share."""
    network = models.create("res2next29-1c4w4s", 5).initialize(place, seed=1).train()
    name = next(name for name, layer in network.named_layers() if isinstance(layer, BatchNorm2d) and ".1." in name)
    dict(network.named_layers())[name].bias.master[0] = np.nan
    assert inspection.first_nonfinite(network, lambda: a_step(network, *arrays(place, rng, 2, 32))) == f"layer {name}, its output"


def test_methods_are_put_back_after_an_error(place):
    network = residual(place).train()
    with pytest.raises(ZeroDivisionError):
        inspection.first_nonfinite(network, lambda: 1 / 0)
    assert methods(network) == []


def test_who_watches_goes_on_watching_after_another(place, rng):
    network, seen = residual(place).train(), []

    def around(name, layer, kind, call, *arguments, **out):
        seen.append(name)
        return call(*arguments, **out)

    step = partial(a_step, network, *arrays(place, rng))
    with inspection.watch(network, around):
        assert inspection.first_nonfinite(network, step) is None
        once = len(seen)
        assert inspection.watched(network)
        step()
    assert once and len(seen) == 2 * once
    assert methods(network) == [] and not inspection.watched(network)


# ---- statistics --------------------------------------------------------------------------------------------------


def by_hand(network, x, dlogits, lr):
    """The same layer by layer, in float64 where it is not the network that computes."""
    host = {}

    def number(array):
        return np.asarray(network.device.to_host(array)).astype(np.float64)

    layers = network.children()
    for name, layer in layers.items():
        x = layer.forward(x)
        y = number(x)
        host[name] = {"output_mean": np.mean(y), "output_std": np.std(y), "output_zeros": np.mean(y == 0)}
    dy = dlogits
    for name, layer in reversed(layers.items()):
        host[name]["gradient_rms"] = np.sqrt(np.mean(number(dy) ** 2))
        dy = layer.backward(dy)
    for name, layer in layers.items():
        if hasattr(layer, "weight"):
            weight, gradient = number(layer.weight.master), number(layer.weight.grad)
            host[name] |= {"weight_rms": np.sqrt(np.mean(weight**2)), "weight_gradient_rms": np.sqrt(np.mean(gradient**2)),
                           "update_ratio": lr * np.linalg.norm(gradient) / np.linalg.norm(weight)}
    return host


def test_statistics_are_those_of_a_computation_by_hand(place, rng):
    x, dlogits = arrays(place, rng)
    network, lr = small_network(place).train(), 0.25
    optimizer = SGD(network.parameters, momentum=0.0, nesterov=False)

    def step():
        a_step(network, x, dlogits)
        optimizer.step(lr)

    expected = by_hand(small_network(place).train(), x, dlogits, lr)
    found = inspection.statistics(network, step)
    assert list(found) == list(expected) == ["conv", "bn", "relu", "pool", "average", "classifier"]
    for name, row in expected.items():
        assert found[name] == pytest.approx(row, rel=1e-4, abs=1e-6), name
    assert found["relu"]["output_zeros"] > 0.3 and found["conv"]["output_zeros"] == 0
    assert {name: set(row) for name, row in found.items()} == {
        name: set(inspection.STATISTICS) if name in ("conv", "bn", "classifier") else set(inspection.STATISTICS[:4])
        for name in found}
    assert methods(network) == []


class Scaled(Composition):
    """y = weight * body(x), weight (1)."""

    def __init__(self, body):
        self.body, self.weight = body, Parameter((1,), initializers.ones)

    def forward(self, x):
        y = self.body.forward(x)
        self._save(y)
        return self.weight.data * y

    def backward(self, dy):
        (y,) = self._take()
        self.weight.grad[...] = (dy * y).sum()
        return self.body.backward(self.weight.data * dy)


def test_statistics_of_a_composition_with_a_weight(place, rng):
    network = Scaled(Linear(48, 5)).initialize(place)
    found = inspection.statistics(network, lambda: a_step(network, *arrays(place, rng, side=4)))
    assert list(found) == ["body", ""] and found[""] == {
        "weight_rms": 1, "weight_gradient_rms": abs(float(network.weight.grad[0])), "update_ratio": 0}


def test_a_weight_of_zeros_has_no_ratio(place, rng):
    network = small_network(place).train()
    network.classifier.weight.master[...] = 0
    row = inspection.statistics(network, lambda: a_step(network, *arrays(place, rng)))["classifier"]
    assert "update_ratio" not in row and row["weight_rms"] == 0 < row["weight_gradient_rms"]


@pytest.mark.parametrize("arguments", [
    "--ema 0.9 --clip-norm 0.1 --cutout 5", "--arch res2next29-1c4w4s --epochs 1 --limit-train-batches 2"])
def test_inspection_changes_nothing(few_digits, tmp_path, arguments):
    results = [train(tmp_path, *ARGUMENTS, *arguments.split(), *more) for more in (("-o", "a"), ("-o", "b", "--inspect"))]
    assert [(result.returncode, result.stderr) for result in results] == [(0, "")] * 2
    assert digests(tmp_path / "a" / "last.npz") == digests(tmp_path / "b" / "last.npz")
    assert rows(tmp_path / "a") == rows(tmp_path / "b")


def test_statistics_of_each_epoch_are_logged_and_the_last_are_printed(few_digits, tmp_path):
    arguments = [argument for argument in ARGUMENTS if argument != "--quiet"]
    result = train(tmp_path, *arguments, "--inspect", "-o", "it")
    assert (result.returncode, result.stderr) == (0, "")
    events = [json.loads(line) for line in (tmp_path / "it" / "events.jsonl").read_text().splitlines()]
    inspected = [event for event in events if event["event"] == "inspect"]
    assert [event["epoch"] for event in inspected] == [1, 2, 3]
    assert {tuple(event["layers"]) for event in inspected} == {("conv", "bn", "drop", "mean", "classifier")}
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("conv ")]
    row = inspected[-1]["layers"]["conv"]
    expected = [f"{row[name]:.2%}" if name == "output_zeros" else f"{row[name]:.1e}" for name in inspection.STATISTICS]
    assert line.split() == ["conv", *expected]


def test_gradients_are_without_the_loss_scale_of_float16(few_digits, tmp_path):
    found = []
    for precision in ("fp32", "fp16"):
        result = train(tmp_path, *ARGUMENTS, "--epochs", "1", "--inspect", "--precision", precision, "-o", precision)
        assert (result.returncode, result.stderr) == (0, "")
        events = [json.loads(line) for line in (tmp_path / precision / "events.jsonl").read_text().splitlines()]
        found += [event["layers"] for event in events if event["event"] == "inspect"]
    gradients = [[row[key] for row in layers.values() for key in ("gradient_rms", "weight_gradient_rms") if key in row]
                 for layers in found]
    assert gradients[1] == pytest.approx(gradients[0], rel=0.1) and min(gradients[0]) > 0


def test_a_step_that_float16_skips_is_told_of_in_json(few_digits, tmp_path):
    """Its gradients are not finite, which JSON has no numbers for."""
    def no_constant(text):
        raise AssertionError(f"{text} is no JSON")

    def too_large():
        Optimizer.INITIAL_SCALE = 2.0**40

    arguments = [argument for argument in ARGUMENTS if argument != "--quiet"]
    result = train(tmp_path, *arguments, "--epochs", "1", "--inspect", "--precision", "fp16", "-o", "it", before=too_large)
    assert (result.returncode, result.stderr) == (0, "")
    assert " inf " in result.stdout
    events = [json.loads(line, parse_constant=no_constant)
              for line in (tmp_path / "it" / "events.jsonl").read_text().splitlines()]
    (layers,) = [event["layers"] for event in events if event["event"] == "inspect"]
    assert layers["classifier"]["gradient_rms"] is None and layers["classifier"]["update_ratio"] == 0


def test_outputs_that_are_not_finite_have_statistics(place, rng, recwarn):
    network, (x, dlogits) = small_network(place).train(), arrays(place, rng)
    x[0, 0, 0, 0] = np.inf
    found = inspection.statistics(network, lambda: a_step(network, x, dlogits))
    assert np.isnan(found["conv"]["output_std"]) and not recwarn.list


# ---- times -------------------------------------------------------------------------------------------------------


class Slow(Layer):
    """The identity, which takes its time."""

    def forward(self, x):
        time.sleep(0.03)
        return x

    def backward(self, dy):
        time.sleep(0.01)
        return dy


def test_times(place, rng):
    x, dlogits = arrays(place, rng)
    network = Sequential(conv=Conv2d(3, 4, 3), slow=Slow(), mean=GlobalAvgPool2d(), classifier=Linear(4, 5))
    network.initialize(place).train()
    calls = []

    def step():
        calls.append(1)
        a_step(network, x, dlogits)

    times = inspection.profile(network, step, repeats=3)
    assert len(calls) == 1 + 3 + 3, "to warm up, as a whole, layer by layer"
    assert list(times) == ["step", "conv", "slow", "mean", "classifier"]
    assert 0.03 <= times["slow"]["forward"] < 0.3 and 0.01 <= times["slow"]["backward"] < 0.3
    assert 0.04 <= times["step"]["step"] and times["conv"]["forward"] < times["step"]["step"]
    assert all(set(row) == {"forward", "backward"} and min(row.values()) > 0 for name, row in times.items() if name != "step")
    assert methods(network) == []
