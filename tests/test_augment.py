"""Augmentation: draws, and what is made of them. Formulas: minidl/ops/augment.cu."""

import numpy as np
import pytest

import reference
from minidl.ops import augment
from reference import assert_close, tolerance

MEAN, STD = np.array([0.5, 0.4, 0.3]), np.array([0.25, 0.2, 0.5])
KEY = 0xFEDCBA9876543210


def step(target, number):
    return target.array(np.array([number], np.int64))


def images(rng, count=5, size=(6, 7)):
    return rng.integers(0, 256, (count, 3, *size), dtype=np.uint8)


def draw(target, indices, labels, number=0, size=(6, 7), **settings):
    indices, labels = (target.array(np.asarray(values, np.int32)) for values in (indices, labels))
    draws, chosen = augment.draw(indices, labels, step(target, number), size, key=KEY, **settings)
    return target.place.to_host(draws), target.place.to_host(chosen)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("size, padding, reflect, flips, cutout", [
    ((6, 7), 0, False, False, 0), ((6, 7), 2, False, True, 0), ((6, 7), 3, True, True, 0), ((6, 7), 0, False, True, 3),
    ((6, 7), 4, True, True, 4), ((4, 8), 3, True, True, 2), ((5, 3), 2, True, True, 2), ((3, 1), 2, False, True, 0)])
def test_batch_equals_the_definition(target, rng, size, padding, reflect, flips, cutout, dtype):
    data, indices = images(rng, size=size), rng.integers(0, 5, 40)
    draws, _ = draw(target, indices, np.zeros(5), size=size, padding=padding, flips=flips, cutout=cutout)
    x = augment.apply(target.array(data), target.array(indices.astype(np.int32)), target.array(draws),
                      target.acc(1 / (255 * STD), dtype), target.acc(-MEAN / STD, dtype),
                      dtype=target.array([0], dtype).dtype, reflect=reflect, cutout=cutout)
    expected = np.stack([reference.augment(data[i], *draws[:, n], MEAN, STD, padding, reflect, cutout)
                         for n, i in enumerate(indices)], axis=-1)
    assert_close(target.host(x), expected, tolerance(dtype), "x")


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("batch", [1, 2, 7, 140])
@pytest.mark.parametrize("share", [1.0, 0.3, 0.0])
def test_mixup_equals_the_definition(target, rng, batch, share, dtype):
    x = target.array(rng.normal(size=(3, 2, 5, batch)), dtype)
    expected = reference.mix(target.host(x), share)
    augment.mix(x, target.acc([share], dtype))
    assert_close(target.host(x), expected, tolerance(dtype), "x")


def test_labels_are_those_of_the_images(target, rng):
    labels, indices = rng.integers(0, 100, 50), rng.integers(0, 50, 33)
    assert np.array_equal(draw(target, indices, labels)[1], labels[indices])


def test_draws_are_uniform_and_within_bounds(target):
    n = 6000
    draws, _ = draw(target, np.zeros(n), [0], size=(32, 32), padding=4, flips=True, cutout=8)
    for row, values in zip(draws, (range(-4, 5), range(-4, 5), (0, 1), range(-4, 28), range(-4, 28))):
        counts = np.array([(row == value).sum() for value in values])
        assert counts.sum() == n
        expected = n / len(counts)
        assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all(), counts


def test_draws_depend_on_step_and_position_alone(target):
    settings = dict(padding=4, flips=True, cutout=8, size=(32, 32))
    first, _ = draw(target, np.zeros(64), [0], **settings)
    shorter, _ = draw(target, np.zeros(16), [0], **settings)
    later, _ = draw(target, np.zeros(64), [0], number=1, **settings)
    far, _ = draw(target, np.zeros(64), [0], number=2**32, **settings)
    assert np.array_equal(first[:, :16], shorter)
    assert not np.array_equal(first, later) and not np.array_equal(first, far)


def test_without_augmentation_nothing_is_shifted_or_flipped(target):
    draws, _ = draw(target, np.zeros(100), [0])
    assert not draws[:3].any()


def test_a_batch_without_images(machine):
    nothing = machine.array(np.empty(0, np.int32))
    with pytest.raises(ValueError, match="^augmentation: a batch of 0 images$"):
        augment.draw(nothing, nothing, step(machine, 1), (32, 32), key=KEY)
