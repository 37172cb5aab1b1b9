"""Softmax cross-entropy and top-1 / top-5 counts. Formulas: minidl/ops/loss.cu."""

import numpy as np
import pytest

import reference
from minidl.kernels import Kernels
from minidl.ops import loss
from reference import assert_close, numerical_vjp, tolerance
from test_kernels import FOLDER


def run(target, logits, labels, dtype="float64", valid=None, smoothing=0.0, scale=1.0, other_labels=None, share=None):
    """-> dlogits, totals (sum of losses, top-1, top-5, images) on the host."""
    totals = target.place.array(np.array([0.5, 0, 0, 0]))  # added to, not overwritten
    mixup = {} if other_labels is None else {"other_labels": target.place.array(other_labels.astype(np.int32))}
    mixup |= {} if share is None else {"share": target.acc([share], dtype)}
    dlogits = loss.forward_backward(target.array(logits, dtype), target.place.array(labels.astype(np.int32)), totals,
                                    target.acc([scale], dtype), valid=valid, smoothing=smoothing, **mixup)
    return target.host(dlogits), target.host(totals) - [0.5, 0, 0, 0]


def mean_loss(*arguments):
    return reference.cross_entropies(*arguments).mean()


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("classes, batch", [(7, 5), (2, 1), (100, 3), (10, 130), (5, 32)])
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


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_mixup(target, rng, share, smoothing, dtype):
    logits = target.host(target.array(rng.normal(size=(6, 9)), dtype))
    labels = np.array([0, 5, 5, 1, 2, 3, 5, 4, 4])  # some partners share a label
    others = labels[::-1]
    dlogits, totals = run(target, logits, labels, dtype, smoothing=smoothing, other_labels=others, share=share)
    losses = reference.cross_entropies(logits, labels, smoothing, others, share)
    assert_close(totals[0], losses.sum(), 1e-10 if dtype == "float64" else 1e-5, "loss")
    expected = numerical_vjp(mean_loss, [logits, labels, smoothing, others, share], 0, 1.0)
    assert_close(dlogits, expected, tolerance(dtype, 6), "dlogits")
    assert totals[1] == (reference.ranks(logits, labels) < 1).sum(), "hits of the image itself"


def test_mixup_with_all_of_itself_is_none_bit_for_bit(target, rng):
    logits, labels = rng.normal(size=(100, 33)), rng.integers(0, 100, 33)
    plain = run(target, logits, labels, "float32", smoothing=0.1)
    mixed = run(target, logits, labels, "float32", smoothing=0.1, other_labels=labels[::-1], share=1.0)
    assert all(np.array_equal(*pair) for pair in zip(plain, mixed))


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


def test_a_share_of_nothing_takes_nothing_of_minus_infinity(target):
    """A class that is masked out, or a logit below what float16 holds."""
    logits = np.array([[1.0, 0.5], [-np.inf, 0.0], [0.0, -np.inf]])
    for more in ({}, dict(other_labels=np.array([1, 2]), share=1.0)):
        dlogits, totals = run(target, logits, np.array([0, 1]), **more)
        assert_close(totals[0], np.log1p(np.exp(-1)) + np.log1p(np.exp(0.5)), 1e-12)
        assert np.isfinite(dlogits).all()
    _, totals = run(target, logits, np.array([0, 1]), smoothing=0.1)
    assert totals[0] == np.inf


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
    _, totals = run(target, rng.normal(size=(5, 3)), np.array([0, 1, 2]), other_labels=np.array([2, label, 0]), share=0.5)
    assert np.isnan(totals[0]) and totals[2] == 2


def test_a_network_of_nans_is_never_right(target):
    _, totals = run(target, np.full((10, 4), np.nan), np.arange(4))
    assert np.isnan(totals[0]) and totals[1] == totals[2] == 0


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_exponentials_and_logarithms(target, rng, dtype):
    """Within 1.5 units in the last place, from results below the normal numbers to infinity; a GPU makes zeros of those, in
    float32, as CuPy tells its compiler."""
    kernels = Kernels(FOLDER / "lanes.cu")
    x = np.array([*rng.uniform(-104, 90, 2000), *rng.uniform(-1, 1, 2000), 0, -0.0, -np.inf, np.inf, np.nan, -1e30, 1e30,
                  88.7, -87.5], dtype)
    for name, of_numpy, values in (("exponentials", np.exp, x), ("logarithms", np.log, abs(x))):
        y = target.poison(x.shape, dtype)
        getattr(kernels, name)[1, 32](target.array(values), y, x.size)
        y = target.place.to_host(y)
        with np.errstate(all="ignore"):
            exact = of_numpy(values.astype(np.longdouble))
            expected = exact.astype(dtype)
            close = abs(y - exact) <= 1.5 * np.spacing(abs(expected))
        if target.flushes(dtype):
            close |= (y == 0) & (abs(expected) < np.finfo(dtype).tiny)
        assert (close | (y == expected) | (np.isnan(y) & np.isnan(expected))).all()


@pytest.mark.parametrize("logits, labels, settings, message", [
    ((5, 3), (4,), {}, r"loss: logits \(5, 3\) and labels \(4,\) do not fit"),
    ((5, 3), (3,), dict(smoothing=1.5), "label smoothing 1.5 is not in 0..1"),
    ((5, 3), (3,), dict(valid=4), "4 valid columns in a batch of 3"),
    ((5, 3), (3,), dict(valid=0), "0 valid columns"),
    ((5, 3), (3,), dict(share=0.5), r"loss: mixup needs a share, and other labels \(N,\), not None"),
    ((5, 3), (3,), dict(other_labels=np.zeros(3)), r"loss: mixup needs a share"),
    ((5, 3), (3,), dict(share=0.5, other_labels=np.zeros(4)), r"other labels \(N,\), not \(4,\)"),
])
def test_refused(target, logits, labels, settings, message):
    with pytest.raises(ValueError, match=message):
        run(target, np.zeros(logits), np.zeros(labels), **settings)


@pytest.mark.parametrize("scale", [1.0, None, np.ones(()), np.ones(2)])
def test_a_scale_that_is_no_array_of_one_element(scale):
    with pytest.raises(TypeError, match="loss: scale must be an array of one element, such as an optimizer's, got "):
        loss.forward_backward(np.zeros((5, 3), np.float32), np.zeros(3, np.int32), np.zeros(4), scale)


def test_totals_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"loss: totals \(3,\) are not 4 numbers"):
        loss.forward_backward(np.zeros((5, 3), np.float32), np.zeros(3, np.int32), np.zeros(3), np.ones(1, np.float32))
