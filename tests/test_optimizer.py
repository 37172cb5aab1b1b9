"""Optimizers over flat buffers, clipping, loss scaling, failures, schedules. Formulas: minidl/ops/optimizer.cu."""

import inspect
import re

import numpy as np
import pytest

import reference
from minidl import optim
from minidl.errors import UsageError
from minidl.host_build import OPS
from minidl.kernels import storage_dtype
from minidl.layer import Parameter, Parameters
from minidl.layers import BatchNorm2d, Conv2d, Sequential
from minidl.ops import optimizer
from reference import assert_close, tolerance

SIZE = 5000  # more than one tile, and than one block of elements
OPTIMIZERS = {
    "sgd": (optim.SGD, reference.sgd, dict(momentum=0.9, weight_decay=5e-4, nesterov=False)),
    "nesterov": (optim.SGD, reference.sgd, dict(momentum=0.9, weight_decay=5e-4, nesterov=True)),
    "plain": (optim.SGD, reference.sgd, dict(momentum=0.0, weight_decay=0.0, nesterov=False)),
    "adam": (optim.Adam, reference.adam, dict(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0)),
    "adam with decay": (optim.Adam, reference.adam, dict(beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=1e-2)),
    "adamw": (optim.AdamW, reference.adamw, dict(beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=0.1)),
    "adadelta": (optim.AdaDelta, reference.adadelta, dict(rho=0.9, eps=1e-6, weight_decay=0.0)),
    "adadelta with decay": (optim.AdaDelta, reference.adadelta, dict(rho=0.8, eps=1e-3, weight_decay=1e-2)),
}


def parameters(target, values, dtype):
    result = Parameters({"w": Parameter(values.shape, None)}, target.place, storage_dtype(dtype), target.place.xp.zeros(1, np.int64))
    result.by_name["w"].master[...] = target.acc(values, dtype)
    result.cast()
    return result


def take_steps(target, stepper, grads, lr=0.05):
    parameter = stepper.parameters.by_name["w"]
    for grad in grads:
        parameter.grad[...] = target.array(grad.astype(parameter.grad.dtype))
        stepper.step(lr)


def weights(target, stepper):
    return target.host(stepper.parameters.by_name["w"].master)


def state_of(target, stepper, place):
    return float(target.host(stepper.state)[place])


def test_places_in_the_state_are_those_of_the_kernels():
    names = re.search(r"enum State \{(.*?)\}", (OPS / "optimizer.cu").read_text())[1].split(", ")
    assert [getattr(optimizer, name.strip()) for name in names] == list(range(optimizer.STATE_SIZE))


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_equal_the_definition(target, rng, name, dtype):
    make, definition, settings = OPTIMIZERS[name]
    w, grads = rng.normal(size=SIZE), rng.normal(size=(4, SIZE))
    stepper = make(parameters(target, w, dtype), **settings)
    take_steps(target, stepper, grads)
    expected = definition(w, grads, lr=0.05, **settings)
    assert_close(weights(target, stepper), expected, 1e-12 if dtype == "float64" else 1e-5, "master")
    assert_close(target.host(stepper.parameters.by_name["w"].data), expected, tolerance(dtype), "data")
    assert [state_of(target, stepper, place) for place in (optimizer.STEP, optimizer.CALLS, optimizer.FAILED)] == [4, 4, 0]


def test_the_gaps_between_parameters_stay_zero(target):
    flat = Parameters({"a": Parameter((3,), None), "b": Parameter((5, 2), None)}, target.place, storage_dtype("float32"),
                      target.place.xp.zeros(1, np.int64))
    assert flat.count() == 13 and flat.master.size == 128
    steppers = [make(flat, weight_decay=0.1, clip_norm=1.0) for make in optim.OPTIMIZERS.values()]
    for stepper in steppers:
        for parameter in flat.by_name.values():
            parameter.master[...] = 1
            parameter.grad[...] = 2
        stepper.step(lr=0.1)
        changed = target.host(flat.master)
        assert not changed[3:64].any() and not changed[74:].any() and (changed[:3] != 1).all()
        assert state_of(target, stepper, optimizer.GRAD_NORM) == pytest.approx(2 * 13**0.5, rel=1e-6), "gaps do not count"


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_what_a_checkpoint_holds_is_all_that_a_later_step_needs(target, rng, name):
    make, w, grads = optim.OPTIMIZERS[name], rng.normal(size=300), rng.normal(size=(6, 300))
    one = make(parameters(target, w, "bfloat16"), clip_norm=10.0)
    take_steps(target, one, grads[:3])
    other = make(parameters(target, weights(target, one), "bfloat16"), clip_norm=10.0)
    assert one.arrays().keys() == other.arrays().keys()
    for key, array in one.arrays().items():
        other.arrays()[key][...] = array.copy()
    for stepper in (one, other):
        take_steps(target, stepper, grads[3:])
    assert np.array_equal(weights(target, one), weights(target, other))
    assert all(np.array_equal(target.host(array), target.host(other.arrays()[key])) for key, array in one.arrays().items())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_restart_forgets_the_moments_and_nothing_else(target, rng, name):
    make, definition, settings = OPTIMIZERS[name]
    w, grads = rng.normal(size=SIZE), rng.normal(size=(4, SIZE))
    stepper = make(parameters(target, w, "float64"), **settings)
    take_steps(target, stepper, grads[:2])
    stepper.restart()
    take_steps(target, stepper, grads[2:])
    expected = definition(definition(w, grads[:2], lr=0.05, **settings), grads[2:], lr=0.05, **settings)
    assert_close(weights(target, stepper), expected, 1e-12)
    assert state_of(target, stepper, optimizer.STEP) == 4


def test_restart_keeps_the_loss_scale(target, rng):
    stepper = optim.SGD(parameters(target, rng.normal(size=10), "float16"))
    take_steps(target, stepper, [np.full(10, np.inf), np.ones(10)])
    stepper.restart()
    state = target.host(stepper.state)
    assert state[optimizer.SCALE] == 32768 and state[optimizer.GOOD_STEPS] == 1 and state[optimizer.CALLS] == 2


# ---- clipping


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
@pytest.mark.parametrize("size", [1, 4096, 9000])
@pytest.mark.parametrize("clip_norm", [0.0, 3.0, 1e4])
def test_the_gradient_is_clipped_by_the_norm_of_all_of_it(target, rng, size, clip_norm, dtype):
    w, grads = rng.normal(size=size), 10 * rng.normal(size=(2, size))
    stepper = optim.SGD(parameters(target, w, dtype), clip_norm=clip_norm)
    scale = float(target.host(stepper.scale)[0])
    take_steps(target, stepper, scale * grads)
    clipped = [reference.clip(grad, clip_norm) if clip_norm else grad for grad in grads]
    expected = reference.sgd(w, clipped, lr=0.05, momentum=0.9, weight_decay=0.0, nesterov=True)
    rtol = 1e-12 if dtype == "float64" else 1e-5
    assert_close(weights(target, stepper), expected, rtol, "master")
    assert state_of(target, stepper, optimizer.GRAD_NORM) == pytest.approx(np.linalg.norm(grads[1]), rel=rtol)


@pytest.mark.parametrize("count", [1, 2])
def test_a_norm_beyond_the_largest_number_is_no_failure(target, count):
    """Squares overflow where the gradient does not."""
    stepper = optim.SGD(parameters(target, np.ones(count), "float32"), clip_norm=1.0)
    take_steps(target, stepper, [np.full(count, 3e30)])
    assert weights(target, stepper).tolist() == [1.0] * count
    assert [state_of(target, stepper, place) for place in (optimizer.GRAD_NORM, optimizer.FAILED)] == [np.inf, 0]


# ---- gradients that are not finite


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("place", [0, 4095, 4096, SIZE - 1])
def test_a_step_with_such_a_gradient_is_skipped_in_float16(target, rng, bad, place):
    stepper = optim.SGD(parameters(target, rng.normal(size=SIZE), "float16"))
    before = weights(target, stepper)
    gradient = np.zeros(SIZE)
    gradient[place] = bad
    take_steps(target, stepper, [gradient] * 3)
    state = target.host(stepper.state)
    assert np.array_equal(weights(target, stepper), before)
    assert state[optimizer.SCALE] == 65536 / 8 and state[optimizer.SKIPPED_IN_ROW] == 3 and state[optimizer.STEP] == 0
    take_steps(target, stepper, [np.full(SIZE, 8192.0)], lr=0.1)  # 1 after unscaling
    assert_close(weights(target, stepper), before - 0.1 * 1.9, 1e-5)
    state = target.host(stepper.state)
    assert state[optimizer.SKIPPED_IN_ROW] == 0 and state[optimizer.CALLS] == 4 and state[optimizer.FAILED] == 0


def test_the_loss_scale_doubles_after_good_steps(target, rng, monkeypatch):
    monkeypatch.setattr(optim.Optimizer, "GROWTH_INTERVAL", 3)
    stepper = optim.SGD(parameters(target, rng.normal(size=10), "float16"))
    scales = []
    for _ in range(7):
        take_steps(target, stepper, [np.ones(10)], lr=0.0)
        scales.append(target.host(stepper.scale)[0] / 65536)
    assert scales == [1, 1, 2, 2, 2, 4, 4]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_without_loss_scaling_all_stays_as_before_the_first_such_gradient(target, rng, name, dtype):
    stepper = optim.OPTIMIZERS[name](parameters(target, rng.normal(size=SIZE), dtype))
    grads = rng.normal(size=(3, SIZE))
    take_steps(target, stepper, grads[:2])
    before = {key: target.host(array) for key, array in [("w", stepper.parameters.master), *stepper.moments.items()]}
    bad = grads[2].copy()
    bad[4321] = np.nan
    take_steps(target, stepper, [bad, *grads, bad])
    for key, array in [("w", stepper.parameters.master), *stepper.moments.items()]:
        assert np.array_equal(target.host(array), before[key]), key
    state = target.host(stepper.state)
    assert [state[place] for place in (optimizer.FAILED, optimizer.CALLS, optimizer.STEP, optimizer.SCALE)] == [3, 7, 2, 1]


# ---- the average of the weights


def network(target, dtype):
    layers = dict(norm=BatchNorm2d(3, relu=True), conv=Conv2d(3, 70, 1), norm2=BatchNorm2d(70))
    return Sequential(**layers).initialize(target.place, dtype, seed=3)


def train(target, net, stepper, rng, average, bad=()):
    """Five steps of noise, those in `bad` with a gradient that is not finite -> states before them and after each."""
    states = [net.state_dict()]
    for step in range(5):
        for array in (*(parameter.grad for parameter in net.named_parameters().values()), *net.named_buffers().values()):
            array[...] = target.array(rng.normal(size=array.shape), array.dtype)
        if step in bad:
            net.parameters.grad[1] = np.inf
        stepper.step(lr=0.05)
        average.update()
        states.append(net.state_dict())
    return states


def test_running_statistics_lie_in_one_array_and_move_there(machine, rng):
    net = network(machine, "float32")
    net.forward(machine.array(rng.normal(2, 3, size=(3, 5, 4, 6)), "float32"))
    flat = machine.host(net.parameters.buffers)
    for begin, array in zip((0, 64, 128, 256), net.named_buffers().values()):
        assert np.array_equal(flat[begin:begin + array.size], machine.host(array)) and array[0] not in (0, 1)


@pytest.mark.parametrize("decay", [0.999, 0.3, 0.0])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_average_of_weights_and_running_statistics(target, rng, dtype, decay):
    net = network(target, dtype)
    stepper = optim.SGD(net.parameters)
    average = optim.Average(stepper, decay)
    states = train(target, net, stepper, rng, average)
    with average.swapped():
        averages = net.state_dict()
    for key, array in averages.items():
        expected = reference.average([state[key].astype(np.float64) for state in states], decay)
        assert_close(array, expected, 1e-12 if dtype == "float64" else 1e-5, key)


@pytest.mark.parametrize("dtype, bad", [("float16", [0, 3]), ("float32", [3])])
def test_a_skipped_step_does_not_move_the_average(target, rng, dtype, bad):
    net = network(target, dtype)
    stepper = optim.SGD(net.parameters)
    average = optim.Average(stepper, 0.999)
    states = train(target, net, stepper, rng, average, bad)
    counted = [1, 2, 4] if dtype == "float16" else [0, 1, 2]  # in float32 the first such step was the last
    with average.swapped():
        averages = net.state_dict()
    for key, array in averages.items():
        expected = reference.average([states[0][key], *(states[step + 1][key] for step in counted)], 0.999)
        assert_close(array, expected, 1e-5, key)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_the_network_gets_its_own_weights_back(target, rng, dtype):
    net = network(target, dtype)
    stepper = optim.SGD(net.parameters)
    average = optim.Average(stepper, 0.999)
    train(target, net, stepper, rng, average)

    def everything():
        flat = net.parameters
        arrays = flat.master, flat.data, flat.buffers, *average.arrays().values(), *net.named_buffers().values()
        return [target.host(array).tobytes() for array in arrays]

    before = everything()
    with pytest.raises(KeyError), average.swapped():
        within = everything()
        assert within[0] == before[3] != before[0] and within[2] == before[4] != before[2]
        assert_close(target.host(net.parameters.data), target.host(net.parameters.master), tolerance(dtype), "data")
        raise KeyError
    assert everything() == before


def test_an_average_goes_on_from_its_arrays(target, rng):
    net = network(target, "float32")
    stepper = optim.SGD(net.parameters)
    one = optim.Average(stepper, 0.9)
    train(target, net, stepper, rng, one)
    other = optim.Average(stepper, 0.9)
    for key, array in one.arrays().items():
        assert not np.array_equal(target.host(array), target.host(other.arrays()[key]))
        other.arrays()[key][...] = array
    one.update(), other.update()
    assert all(np.array_equal(target.host(array), target.host(other.arrays()[key])) for key, array in one.arrays().items())


# ---- settings


@pytest.mark.parametrize("name, defaults", [
    ("sgd", dict(momentum=0.9, weight_decay=0.0, nesterov=True, clip_norm=0.0)),
    ("adam", dict(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, clip_norm=0.0)),
    ("adamw", dict(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, clip_norm=0.0)),
    ("adadelta", dict(rho=0.9, eps=1e-6, weight_decay=0.0, clip_norm=0.0))])
def test_an_optimizer_tells_its_settings(name, defaults):
    told = list(inspect.signature(optim.OPTIMIZERS[name]).parameters.values())[1:]
    assert {parameter.name: parameter.default for parameter in told} == defaults
    assert optim.OPTIMIZERS[name].default_lr == {"sgd": 0.1, "adam": 1e-3, "adamw": 1e-3, "adadelta": 1.0}[name]


@pytest.mark.parametrize("name, settings, message", [
    ("sgd", dict(clip_norm=-1.0), "SGD: clip_norm -1.0 is not in 0 <= clip_norm < inf"),
    ("sgd", dict(momentum=1.0), "SGD: momentum 1.0 is not in 0 <= momentum < 1"),
    ("adam", dict(beta2=1.5), "Adam: beta2 1.5 is not in"),
    ("adamw", dict(weight_decay=np.nan), "AdamW: weight_decay nan is not in"),
    ("adadelta", dict(rho=-0.1), "AdaDelta: rho -0.1 is not in"),
    ("adadelta", dict(rho=1.0), "AdaDelta: rho 1.0 is not in 0 <= rho < 1"),
    ("adam", dict(eps=0.0), "Adam: eps must be more than 0, as it is divided by"),
])
def test_refused(target, name, settings, message):
    with pytest.raises(UsageError, match=message):
        optim.OPTIMIZERS[name](parameters(target, np.ones(3), "float32"), **settings)


def test_a_network_is_not_its_parameters():
    with pytest.raises(TypeError, match="^SGD takes the `parameters` of a network, not BatchNorm2d$"):
        optim.SGD(BatchNorm2d(3).initialize())


@pytest.mark.parametrize("decay", [1.0, -0.1, np.nan])
def test_refused_average(target, decay):
    with pytest.raises(UsageError, match=f"average of the weights: decay {decay} is not in 0 <= decay < 1"):
        optim.Average(optim.SGD(parameters(target, np.ones(3), "float32")), decay)


# ---- schedules


@pytest.mark.parametrize("name", optim.SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 10])
def test_schedules_start_low_reach_the_peak_and_only_fall_from_there(name, warmup):
    schedule = optim.Schedule(name, 100, 0.4, warmup, drops=(30, 60))
    rates = [schedule(step) for step in range(100)]
    assert rates[warmup] == max(rates) == pytest.approx(0.4)
    assert (np.diff(rates[warmup:]) <= 0).all() and (np.diff(rates[:warmup + 1]) > 0).all()
    if warmup:
        assert rates[0] == pytest.approx(0.04) and rates[5] == pytest.approx(0.22)
    assert rates == [schedule(step) for step in range(100)]


@pytest.mark.parametrize("name, rates", [  # of the steps 0, 49, 50, 99 after the warm-up
    ("constant", [0.2, 0.2, 0.2, 0.2]),
    ("cosine", [0.2, 0.2 * np.cos(0.245 * np.pi)**2, 0.1, 0.2 * np.sin(0.005 * np.pi)**2]),
    ("multistep", [0.2, 0.2, 0.04, 0.008]),
    ("onecycle", [0.2, 0.2 - 0.1998 * 49 / 99, 0.2 - 0.1998 * 50 / 99, 0.0002])])
def test_rates_of_a_schedule(name, rates):
    for warmup in (0, 10):
        schedule = optim.Schedule(name, warmup + 100, 0.2, warmup, drops=(warmup + 50, warmup + 80), factor=0.2)
        assert [schedule(warmup + step) for step in (0, 49, 50, 99)] == pytest.approx(rates, rel=1e-9)


def test_a_run_of_one_step_has_a_rate():
    assert {optim.Schedule(name, 1, 0.3)(0) for name in optim.SCHEDULES} == {0.3}
    assert all(optim.Schedule(name, 1, 0.3, warmup=1)(0) == pytest.approx(0.03) for name in optim.SCHEDULES)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(UsageError, match="schedule 'linear' is not one of cosine, multistep, onecycle, constant"):
        optim.Schedule("linear", 10, 0.1)


def test_arrays_of_other_sizes_are_refused():
    few, many, state = np.zeros(3, np.float32), np.zeros(4, np.float32), np.zeros(optimizer.STATE_SIZE, np.float32)
    for step in (lambda: optimizer.sgd(many, few, many, many, state, momentum=0.9, weight_decay=0.0, nesterov=True),
                 lambda: optimizer.adam(many, many, many, few, many, state, beta1=0.9, beta2=0.9, eps=1e-8, weight_decay=0.0),
                 lambda: optimizer.adadelta(many, many, many, many, few, state, rho=0.9, eps=1e-8, weight_decay=0.0),
                 lambda: optimizer.average(few, many, state, 0.9), lambda: optimizer.cast(many, few)):
        with pytest.raises(ValueError, match=r"optimizer: arrays of [34, ]+ elements"):
            step()


def test_scaling_begins_anew():
    it = optim.SGD(Sequential(conv=Conv2d(3, 4, 1)).initialize(dtype="float16").parameters)
    before = it.state.copy()
    it.state[[optimizer.SCALE, optimizer.GOOD_STEPS, optimizer.SKIPPED_IN_ROW]] = 3
    it.restart_scaling()
    assert np.array_equal(it.state, before)
