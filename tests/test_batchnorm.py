"""Batch norm, alone and fused, in training and evaluation. Formulas: minidl/ops/batchnorm.cu."""

import inspect

import numpy as np
import pytest

import reference
from minidl.ops import batchnorm
from reference import assert_close, distinct, numerical_vjp, tolerance

EPS, MOMENTUM = 1e-5, 0.1
SHAPES = [(3, 4, 5, 2), (1, 1, 1, 2), (2, 7, 3, 33), (2, 9, 16, 32)]  # (C, H, W, N); the last has more than one tile
VARIANTS = ["plain", "relu", "add_relu"]
WAYS = {"a block two channels": 2, "a block a tile": 0}
channels_together = batchnorm._channels_together  # how a launcher chooses


def go(way, monkeypatch):
    monkeypatch.setattr(batchnorm, "_channels_together", lambda x: WAYS[way])


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    go(request.param, monkeypatch)


in_both_ways = pytest.mark.usefixtures("way")  # no argument: test_mutations.py calls tests of this file as functions


def definition(x, gamma, beta, z, variant, statistics=None):
    y = reference.batch_norm(x, gamma, beta, *(statistics or reference.batch_moments(x)), EPS)
    if variant == "add_relu":
        y = y + z
    return y if variant == "plain" else reference.relu(y)


class Case:
    """One batch norm with inputs, run on a target."""

    def __init__(self, rng, shape, variant, dtype, target, training=True):
        self.variant, self.dtype, self.target, self.training = variant, dtype, target, training
        channels = shape[0]
        self.gamma, self.beta = rng.uniform(0.5, 1.5, channels), rng.normal(size=channels)
        self.running = rng.normal(size=channels), rng.uniform(0.5, 2, channels)
        self.x, self.z, self.dy = (self.stored(a) for a in (rng.normal(1, 2, shape), rng.normal(size=shape), rng.normal(size=shape)))
        self.move_from_kinks()

    def stored(self, values):
        """The values as the type of storage can hold them, in float64."""
        return self.target.host(self.target.array(values, self.dtype))

    def move_from_kinks(self):
        """Of the ReLU: z carries the sum away from 0; without z, x is moved where the result would be near 0."""
        statistics = None if self.training else self.running
        if self.variant == "add_relu":
            y = definition(self.x, self.gamma, self.beta, self.z, "plain", statistics) + self.z
            self.z = self.stored(np.where(np.abs(y) < 0.1, self.z + 0.5, self.z))
        if self.variant == "relu":
            for _ in range(100):
                y = definition(self.x, self.gamma, self.beta, None, "plain", statistics)
                if (np.abs(y) > 0.02).all():
                    break
                self.x = self.stored(np.where(np.abs(y) <= 0.02, self.x + 0.17, self.x))

    def forward(self):
        array, acc = self.target.array, self.target.acc
        self.device_x = array(self.x, self.dtype)
        self.affine = acc(self.gamma, self.dtype), acc(self.beta, self.dtype)
        self.device_running = [acc(a, self.dtype) for a in self.running]
        z = array(self.z, self.dtype) if self.variant == "add_relu" else None
        self.y, self.mean, self.rstd = batchnorm.forward(
            self.device_x, *self.affine, *self.device_running, training=self.training, momentum=MOMENTUM, eps=EPS,
            relu=self.variant == "relu", z=z)
        return self.y

    def backward(self, plus=None):
        dgamma, dbeta = (self.target.acc(np.full(len(self.gamma), np.nan), self.dtype) for _ in range(2))
        result = batchnorm.backward(
            self.target.array(self.dy, self.dtype), self.device_x, *self.affine, self.mean, self.rstd, dgamma, dbeta,
            training=self.training, relu=self.variant == "relu", y=self.y if self.variant == "add_relu" else None,
            plus=plus)
        return (*result, dgamma, dbeta) if self.variant == "add_relu" else (result, dgamma, dbeta)

    def expected(self):
        return definition(self.x, self.gamma, self.beta, self.z, self.variant, None if self.training else self.running)


@in_both_ways
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(target, rng, shape, variant, dtype, training):
    case = Case(rng, shape, variant, dtype, target, training)
    y = case.forward()
    assert_close(target.host(y), case.expected(), tolerance(dtype, terms=np.prod(shape[1:])), "y")


@in_both_ways
@pytest.mark.parametrize("variant", VARIANTS)
def test_results_that_go_past_the_caches(machine, rng, variant):
    """As they are many; rows begin anywhere."""
    case = Case(rng, (3, 27, 27, 501), variant, "float32", machine)
    y = machine.host(case.forward())
    assert_close(y, case.expected(), tolerance("float32", terms=27 * 27 * 501), "y")
    some = Case(rng, (3, 27, 27, 3), variant, "float32", machine, training=False)
    some.x, some.z, some.gamma, some.beta = case.x[..., :3], case.z[..., :3], case.gamma, case.beta
    some.running = machine.host(case.mean), 1 / machine.host(case.rstd) ** 2 - EPS
    assert_close(y[..., :3], machine.host(some.forward()), tolerance("float32"), "y of some images")


@in_both_ways
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_running_statistics(target, rng, shape, dtype):
    case = Case(rng, shape, "plain", dtype, target)
    case.forward()
    mean, var = case.x.mean(axis=(1, 2, 3)), case.x.var(axis=(1, 2, 3), ddof=1)
    for got, old, batch in zip(case.device_running, case.running, (mean, var)):
        assert_close(target.host(got), 0.9 * old + 0.1 * batch, tolerance(dtype, np.prod(shape[1:])), "running")


@in_both_ways
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_gradients(target, rng, shape, variant, training):
    case = Case(rng, shape, variant, "float64", target, training)
    case.forward()
    results = case.backward()
    statistics = None if training else case.running
    arguments = [case.x, case.gamma, case.beta, case.z, variant, statistics]
    indices = (0, 3, 1, 2) if variant == "add_relu" else (0, 1, 2)
    for got, index in zip(results, indices):
        assert_close(target.host(got), numerical_vjp(definition, arguments, index, case.dy, h=1e-4), 1e-6,
                     ("dx", "dgamma", "dbeta", "dz")[index])


@in_both_ways
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape, tile", [((3, 4, 5, 2), 16), ((2, 4, 5, 15), 2)], ids=["3 tiles", "more than are fetched at a time"])
def test_gradients_over_many_tiles(target, rng, shape, tile, variant, monkeypatch):
    monkeypatch.setattr(batchnorm, "TILE", tile)
    test_gradients(target, rng, shape, variant, True)


@in_both_ways
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_of_other_types_follow_float64(target, rng, variant, dtype):
    case = Case(rng, (2, 9, 16, 32), variant, dtype, target)
    exact = Case(rng, (2, 9, 16, 32), variant, "float64", target)
    exact.x, exact.z, exact.dy, exact.gamma, exact.beta = case.x, case.z, case.dy, case.gamma, case.beta
    case.forward(), exact.forward()
    for got, expected in zip(case.backward(), exact.backward()):
        assert_close(target.host(got), target.host(expected), (1 if dtype == "float32" else 4) * tolerance(dtype, terms=9 * 16 * 32))


@in_both_ways
def test_backward_twice_is_bit_equal(target, rng):
    case = Case(rng, (2, 9, 16, 32), "relu", "float32", target)
    case.forward()
    for first, second in zip(case.backward(), case.backward()):
        assert np.array_equal(target.host(first), target.host(second))


@in_both_ways
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("variant", ["plain", "relu"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_another_array_is_added_to_the_gradient(target, rng, shape, variant, dtype):
    case = Case(rng, shape, variant, dtype, target)
    case.forward()
    plus = case.stored(rng.normal(size=shape))
    for got, expected, added in zip(case.backward(target.array(plus, dtype)), case.backward(), (plus, 0, 0)):
        assert_close(target.host(got), target.host(expected) + added, 1e-12 if dtype == "float64" else 2 * tolerance(dtype))


@in_both_ways
def test_nothing_is_added_where_the_forward_had_z(target, rng):
    case = Case(rng, SHAPES[0], "add_relu", "float64", target)
    case.forward()
    with pytest.raises(ValueError, match="batch norm: nothing is added to the gradient of a forward with z"):
        case.backward(target.array(case.dy))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape, tile", [((3, 32, 32, 32), 4096), ((5, 9, 11, 37), 4096), ((5, 9, 11, 37), 16)], ids=str)
def test_both_ways_give_the_same_bits(machine, rng, shape, tile, variant, training, monkeypatch):
    """Also where a row has more tiles than a block fetches at a time."""
    monkeypatch.setattr(batchnorm, "TILE", tile)
    case = Case(rng, shape, variant, "float32", machine, training)
    results = []
    for way in WAYS:
        go(way, monkeypatch)
        results.append((case.forward(), case.mean, case.rstd, *case.device_running, *case.backward()))
        if variant != "add_relu":
            results[-1] += case.backward(machine.array(case.z, "float32"))
    for by_channels, by_tiles in zip(*results):
        assert np.array_equal(machine.host(by_channels), machine.host(by_tiles))


@in_both_ways
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", ["plain", "relu"])
@pytest.mark.parametrize("shape", [(3, 32, 32, 32), (5, 9, 11, 37)], ids=str)
def test_apply_gives_the_same_bits_as_forward(machine, rng, shape, variant, dtype):
    case = Case(rng, shape, variant, dtype, machine)
    y = case.forward()
    again = batchnorm.apply(case.device_x, *case.affine, case.mean, case.rstd, relu=variant == "relu")
    assert np.array_equal(machine.host(y), machine.host(again))


def test_a_block_takes_whole_channels_where_that_leaves_no_thread_without(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert [channels_together(np.empty((channels, row))) for channels, row in
            [(3, 32769), (2, 32769), (2, 32768), (100, 512)]] == [1, 0, 1, 64]


@pytest.mark.parametrize("row, tile, tiles", [(1, 4096, 1), (64 * 4096, 4096, 64), (64 * 4096 + 1, 8192, 33), (2**20, 16384, 64)])
def test_tiles_are_larger_where_there_would_be_many(monkeypatch, row, tile, tiles):
    monkeypatch.setattr(batchnorm, "MOST_TILES", {"numpy": batchnorm.MOST_TILES["cupy"]})
    assert batchnorm._tiles(np.empty((3, row))) == (3, row, tile, tiles)


@in_both_ways
def test_large_mean_does_not_cancel(target, rng):
    """Deviation 1 around a mean of 10,000: sums of squares in float32 would lose all digits."""
    case = Case(rng, (1, 9, 16, 32), "plain", "float32", target)
    case.x = case.stored(10_000 + distinct(rng, (1, 9, 16, 32), gap=1e-3))
    case.forward()
    assert_close(target.host(case.y), case.expected(), 1e-3, "y")


@in_both_ways
def test_constant_channel_is_finite(target, rng):
    case = Case(rng, (2, 3, 3, 4), "plain", "float32", target)
    case.x[1] = 3.0
    y = target.host(case.forward())
    assert_close(y[1], np.full((3, 3, 4), case.beta[1]), 1e-6)
    assert all(np.isfinite(target.host(result)).all() for result in case.backward())


@in_both_ways
def test_one_value_per_channel_is_refused_in_training(target, rng):
    case = Case(rng, (2, 1, 1, 1), "plain", "float32", target)
    with pytest.raises(ValueError, match="batch norm: 1 value per channel in training; a variance needs 2 or more"):
        case.forward()
    case.training = False
    assert_close(target.host(case.forward()), case.expected(), 1e-5)


@pytest.mark.parametrize("z", [False, True])
@pytest.mark.parametrize("place", [0, 39])
def test_nan_stays_nan(target, place, z):
    """A ReLU that makes zeros of them would hide that a network has diverged."""
    x = np.ones((1, 2, 4, 5))
    x.flat[place] = np.nan
    ones = [target.array(np.ones(1)) for _ in range(4)]
    y, _, _ = batchnorm.forward(target.array(x), *ones, training=False, momentum=0.1, eps=1e-5, relu=not z,
                                z=target.array(np.ones(x.shape)) if z else None)
    assert np.array_equal(np.isnan(target.host(y)), np.isnan(x))


@pytest.mark.parametrize("function, name", [
    *((batchnorm.forward, name) for name in ("gamma", "beta", "running_mean", "running_var", "z", "out")),
    *((batchnorm.backward, name) for name in ("dy", "gamma", "beta", "mean", "rstd", "dgamma", "dbeta", "y", "plus"))])
def test_arrays_of_other_shapes_are_refused(function, name):
    """Kernels would read and write beyond them."""
    channels = "gamma", "beta", "running_mean", "running_var", "mean", "rstd", "dgamma", "dbeta"
    images = np.ones((2, 3, 3, 4))
    given = {**dict.fromkeys(channels, np.ones(2)), "x": images, "dy": images, "training": True, "momentum": 0.1, "eps": 1e-5}
    given[name] = given.get(name, images)[:1]
    known = inspect.signature(function).parameters
    with pytest.raises(ValueError, match=f"batch norm: {name} has shape"):
        function(**{argument: value for argument, value in given.items() if argument in known})
