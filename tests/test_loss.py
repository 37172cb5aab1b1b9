"""Softmax cross-entropy and top-1 / top-5 counts. Formulas: minidl/ops/loss.cu."""

import numpy as np
import pytest

import reference
from minidl.ops import loss
from reference import assert_close, numerical_vjp, tolerance


def run(target, logits, labels, dtype="float64", valid=None, smoothing=0.0, scale=1.0):
    """-> dlogits, totals (sum of losses, top-1, top-5, images) on the host."""
    totals = target.place.array(np.array([0.5, 0, 0, 0]))  # added to, not overwritten
    dlogits = loss.forward_backward(target.array(logits, dtype), target.place.array(labels.astype(np.int32)), totals,
                                    target.acc([scale], dtype), valid=valid, smoothing=smoothing)
    return target.host(dlogits), target.host(totals) - [0.5, 0, 0, 0]


def mean_loss(logits, labels, smoothing):
    return reference.cross_entropies(logits, labels, smoothing).mean()


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("classes, batch", [(7, 5), (2, 1), (100, 3), (10, 130)])
def test_loss_and_gradient(target, rng, classes, batch, dtype, smoothing):
    logits = target.host(target.array(rng.normal(size=(classes, batch)), dtype))
    labels = rng.integers(0, classes, batch)
    dlogits, totals = run(target, logits, labels, dtype, smoothing=smoothing)
    # The loss is computed in the accumulation type whatever the logits are stored in.
    of_loss = tolerance("float64" if dtype == "float64" else "float32", classes)
    assert_close(totals[0], reference.cross_entropies(logits, labels, smoothing).sum(), of_loss, "loss")
    if classes * batch <= 300:
        expected = numerical_vjp(mean_loss, [logits, labels, smoothing], 0, 1.0)
        assert_close(dlogits, expected, tolerance(dtype, classes), "dlogits")


@pytest.mark.parametrize("classes", [3, 10, 100])
def test_top1_and_top5_with_ties(target, rng, classes):
    logits, labels = rng.integers(0, 4, (classes, 200)).astype(float), rng.integers(0, classes, 200)
    ranks = reference.ranks(logits, labels)
    _, totals = run(target, logits, labels, "float32")
    assert totals[1:].tolist() == [(ranks < 1).sum(), (ranks < 5).sum(), 200]


@pytest.mark.parametrize("valid", [1, 3, 4])
def test_padding_columns_do_not_count(target, rng, valid):
    logits, labels = rng.normal(size=(6, 4)), rng.integers(0, 6, 4)
    dlogits, totals = run(target, logits, labels, valid=valid)
    alone, expected = run(target, logits[:, :valid], labels[:valid])
    assert_close(totals, expected, 1e-12)
    assert_close(dlogits[:, :valid], alone, 1e-12)
    assert not dlogits[:, valid:].any()


def test_a_large_common_offset_does_not_overflow(target, rng):
    logits, labels = rng.normal(size=(10, 4)).astype(np.float32), np.arange(4)
    shifted = run(target, logits + np.float32(1024), labels, "float32")
    assert np.isfinite(shifted[0]).all()
    assert_close(shifted[1], run(target, (logits + np.float32(1024)).astype(float), labels)[1], 1e-5)


def test_scale_multiplies_the_gradient_only(target, rng):
    logits, labels = rng.normal(size=(5, 3)), np.array([0, 4, 2])
    dlogits, totals = run(target, logits, labels, scale=1024.0)
    unscaled, same = run(target, logits, labels)
    assert_close(dlogits, 1024 * unscaled, 1e-12)
    assert np.array_equal(totals, same)


@pytest.mark.parametrize("label", [-1, 5, 2**31 - 1, -2**31])
def test_a_label_out_of_range_makes_the_loss_nan_and_is_never_right(target, rng, label):
    dlogits, totals = run(target, rng.normal(size=(5, 3)), np.array([0, label, 2]))
    assert np.isnan(totals[0]) and totals[2] == 2


def test_a_network_of_nans_is_never_right(target):
    _, totals = run(target, np.full((10, 4), np.nan), np.arange(4))
    assert np.isnan(totals[0]) and totals[1] == totals[2] == 0


@pytest.mark.parametrize("logits, labels, settings, message", [
    ((5, 3), (4,), {}, r"loss: logits \(5, 3\) and labels \(4,\) do not fit"),
    ((5, 3), (3,), dict(smoothing=1.5), "label smoothing 1.5 is not in 0..1"),
    ((5, 3), (3,), dict(valid=4), "4 valid columns in a batch of 3"),
    ((5, 3), (3,), dict(valid=0), "0 valid columns"),
])
def test_refused(target, logits, labels, settings, message):
    with pytest.raises(ValueError, match=message):
        run(target, np.zeros(logits), np.zeros(labels), **settings)
