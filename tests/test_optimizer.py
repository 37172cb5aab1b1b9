"""SGD and Adam over flat buffers, loss scaling, schedules. Formulas: minidl/ops/optimizer.cu."""

import numpy as np
import pytest

import reference
from minidl import optim
from minidl.kernels import storage_dtype
from minidl.layers import Parameter, Parameters
from minidl.ops import optimizer
from reference import assert_close, tolerance

SIZE = 5000  # more than one block of elements
OPTIMIZERS = {
    "sgd": (optim.SGD, reference.sgd, dict(momentum=0.9, weight_decay=5e-4, nesterov=False)),
    "nesterov": (optim.SGD, reference.sgd, dict(momentum=0.9, weight_decay=5e-4, nesterov=True)),
    "plain": (optim.SGD, reference.sgd, dict(momentum=0.0, weight_decay=0.0, nesterov=False)),
    "adam": (optim.Adam, reference.adam, dict(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0)),
    "adam with decay": (optim.Adam, reference.adam, dict(beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=1e-2)),
}


def parameters(target, values, dtype):
    result = Parameters({"w": Parameter(values.shape, None)}, target.place, storage_dtype(dtype))
    result.by_name["w"].master[...] = target.acc(values, dtype)
    result.cast()
    return result


def set_gradient(target, flat, values):
    flat.by_name["w"].grad[...] = target.array(values.astype(flat.grad.dtype))


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_equal_the_definition(target, rng, name, dtype):
    make, definition, settings = OPTIMIZERS[name]
    w, grads = rng.normal(size=SIZE), rng.normal(size=(4, SIZE))
    flat = parameters(target, w, dtype)
    stepper = make(flat, **settings)
    for grad in grads:
        set_gradient(target, flat, grad)
        stepper.step(lr=0.05)
    expected = definition(w, grads, lr=0.05, **settings)
    assert_close(target.host(flat.by_name["w"].master), expected, 1e-12 if dtype == "float64" else 1e-5, "master")
    assert_close(target.host(flat.by_name["w"].data), expected, tolerance(dtype), "data")
    assert float(target.host(stepper.state)[optimizer.STEP]) == 4


def test_the_gaps_between_parameters_stay_zero(target, rng):
    flat = Parameters({"a": Parameter((3,), None), "b": Parameter((5, 2), None)}, target.place, storage_dtype("float32"))
    assert flat.count() == 13 and flat.master.size == 128
    stepper = optim.Adam(flat, weight_decay=0.1)
    for parameter in flat.by_name.values():
        parameter.master[...] = 1
        parameter.grad[...] = 2
    stepper.step(lr=0.1)
    changed = target.host(flat.master)
    assert not changed[3:64].any() and not changed[74:].any() and (changed[:3] != 1).all()


def test_a_step_with_an_infinite_gradient_is_skipped_in_float16(target, rng):
    flat = parameters(target, rng.normal(size=SIZE), "float16")
    stepper = optim.SGD(flat)
    before = target.host(flat.master)
    for bad in (np.inf, -np.inf, np.nan):
        gradient = np.zeros(SIZE)
        gradient[4321] = bad
        set_gradient(target, flat, gradient)
        stepper.step(lr=0.1)
    state = target.host(stepper.state)
    assert np.array_equal(target.host(flat.master), before)
    assert state[optimizer.SCALE] == 65536 / 8 and state[optimizer.SKIPPED_IN_ROW] == 3 and state[optimizer.STEP] == 0
    set_gradient(target, flat, np.full(SIZE, 8192.0))  # 1 after unscaling
    stepper.step(lr=0.1)
    assert_close(target.host(flat.by_name["w"].master), before[:SIZE] - 0.1 * 1.9, 1e-5)
    assert target.host(stepper.state)[optimizer.SKIPPED_IN_ROW] == 0


def test_the_loss_scale_doubles_after_good_steps(target, rng, monkeypatch):
    monkeypatch.setattr(optim.Optimizer, "GROWTH_INTERVAL", 3)
    flat = parameters(target, rng.normal(size=10), "float16")
    stepper = optim.SGD(flat)
    scales = []
    for _ in range(7):
        set_gradient(target, flat, np.ones(10))
        stepper.step(lr=0.0)
        scales.append(target.host(stepper.scale)[0] / 65536)
    assert scales == [1, 1, 2, 2, 2, 4, 4]


def test_other_types_keep_scale_one_and_do_not_hide_nan(target, rng):
    flat = parameters(target, rng.normal(size=10), "float32")
    stepper = optim.SGD(flat)
    set_gradient(target, flat, np.full(10, np.nan))
    stepper.step(lr=0.1)
    assert np.isnan(target.host(flat.by_name["w"].master)).all() and target.host(stepper.scale)[0] == 1


# ---- schedules


@pytest.mark.parametrize("schedule", optim.SCHEDULES.values())
@pytest.mark.parametrize("warmup", [0, 10])
def test_schedules_start_low_reach_the_peak_and_never_exceed_it(schedule, warmup):
    rates = [schedule(step, 100, 0.4, warmup) for step in range(100)]
    assert rates[warmup] == pytest.approx(0.4) and max(rates) == pytest.approx(0.4)
    if warmup:
        assert rates[0] == pytest.approx(0.04) and rates[5] == pytest.approx(0.22)


def test_cosine_ends_at_zero_and_multistep_falls_to_a_fifth():
    assert optim.cosine(99, 100, 0.1) < 1e-4
    assert optim.cosine(50, 100, 0.1) == pytest.approx(0.05)
    assert [optim.multistep(step, 200, 0.1) for step in (59, 60, 120, 160)] == pytest.approx([0.1, 0.02, 0.004, 0.0008])
    assert {optim.constant(step, 9, 0.1) for step in range(9)} == {0.1}
