"""Dropout and channel dropout: masks from Philox, recomputed. Formulas: minidl/ops/dropout.cu."""

import numpy as np
import pytest

from minidl.ops import dropout

KEY, LAYER = 0x123456789ABCDEF0, 7


def step(target, number):
    return target.place.array(np.array([number], np.int64))


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("apply", [dropout.apply, dropout.apply_to_channels])
def test_kept_values_are_scaled_and_the_mask_repeats(target, apply, dtype):
    shape = (3, 2, 5, 33)
    x = np.ones(shape)
    y = target.host(apply(target.array(x, dtype), 0.5, KEY, LAYER, step(target, 3)))
    assert set(np.unique(y)) == {0.0, 2.0}
    dx = target.host(apply(target.array(4 * x, dtype), 0.5, KEY, LAYER, step(target, 3)))
    assert np.array_equal(dx, 4 * y), "backward at the same step draws the same mask"


@pytest.mark.parametrize("apply", [dropout.apply, dropout.apply_to_channels])
def test_masks_differ_between_steps_layers_and_keys(target, apply):
    x = target.array(np.ones((8, 1, 2, 16)), "float32")
    masks = [target.host(apply(x, 0.5, key, layer, step(target, number))).tobytes()
             for key, layer, number in [(1, 0, 0), (1, 0, 1), (1, 1, 0), (2, 0, 0), (1 + 2**32, 0, 0)]]
    assert len(set(masks)) == 5


def random_bits(calls, upper, now):
    """16 bits for each of eight decisions of each of `calls`: Philox4x32-10, its words of KEY and the counter (call, upper,
    now, LAYER), each its lower half first."""
    lower, key = 2**32 - 1, [KEY & 0xFFFFFFFF, KEY >> 32]
    words = [np.full(len(calls), word, np.uint64) for word in (0, upper, now, LAYER)]
    words[0] += calls.astype(np.uint64)
    for _ in range(10):
        products = [words[0] * 0xD2511F53, words[2] * 0xCD9E8D57]
        words = [products[1] >> 32 ^ words[1] ^ key[0], products[1] & lower, products[0] >> 32 ^ words[3] ^ key[1],
                 products[0] & lower]
        key = [(key[0] + 0x9E3779B9) & lower, (key[1] + 0xBB67AE85) & lower]
    return np.stack([word >> shift & 0xFFFF for word in words for shift in (0, 16)], axis=1).ravel()


def test_masks_are_the_same_on_every_target(target):
    """They are defined by their formula, not by the launch: here over more than one tile."""
    size, dropped_below = 9005, round(0.3 * 2**16)
    y = target.host(dropout.apply(target.array(np.ones(size), "float32"), 0.3, KEY, LAYER, step(target, 5)))
    assert np.array_equal(y > 0, random_bits(np.arange(-(-size // 8)), 0, 5)[:size] >= dropped_below)
    batch = 4101
    y = target.host(dropout.apply_to_channels(target.array(np.ones((2, 1, 2, batch)), "float32"), 0.3, KEY, LAYER, step(target, 5)))
    for channel in range(2):
        kept = random_bits(np.arange(-(-batch // 8)), channel, 5)[:batch] >= dropped_below
        assert np.array_equal(y[channel, 0] > 0, [kept, kept])


def test_channel_dropout_drops_whole_channels(target):
    y = target.host(dropout.apply_to_channels(target.array(np.ones((20, 3, 2, 7)), "float32"), 0.5, KEY, LAYER, step(target, 0)))
    assert (y == y[:, :1, :1]).all()
    assert 40 < (y[:, 0, 0] == 0).sum() < 100
    assert (y[:, 0, 0] != y[:1, 0, 0]).any()


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
def test_share_of_dropped_elements(target, rate):
    n = 20_000
    y = target.host(dropout.apply(target.array(np.ones(n), "float32"), rate, KEY, LAYER, step(target, 1)))
    assert abs((y == 0).mean() - rate) < 4.5 * np.sqrt(rate * (1 - rate) / n) + 1e-12
    assert abs(y.mean() - 1) < 5 * np.sqrt(rate / (1 - rate) / n) + 1e-6


def test_sizes_that_are_no_multiple_of_a_call(target):
    for size in (1, 2, 7, 9, 4097):
        longer = target.host(dropout.apply(target.array(np.ones(size + 8), "float32"), 0.5, KEY, LAYER, step(target, 0)))
        y = target.host(dropout.apply(target.array(np.ones(size), "float32"), 0.5, KEY, LAYER, step(target, 0)))
        assert np.array_equal(y, longer[:size])


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, float("nan")])
@pytest.mark.parametrize("apply", [dropout.apply, dropout.apply_to_channels])
def test_refused(target, apply, rate):
    with pytest.raises(ValueError, match="dropout: rate .* is not in 0 <= rate < 1"):
        apply(target.array(np.ones((1, 1, 1, 1))), rate, KEY, LAYER, step(target, 0))


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_arrays_that_begin_anywhere(target, rng, dtype):
    x = rng.integers(-8, 9, 103).astype(float)
    y = target.host(dropout.apply(target.array(x, dtype), 0.5, KEY, LAYER, step(target, 0)))
    for offset in (1, 2):
        moved = target.array(np.concatenate([np.zeros(offset), x]), dtype)[offset:]
        assert np.array_equal(target.host(dropout.apply(moved, 0.5, KEY, LAYER, step(target, 0))), y)


def test_a_block_of_several_tiles(target):
    """As of arrays of more than 2^28 elements."""
    x, y = target.array(np.ones(9005), "float32"), target.poison(9005, "float32")
    dropout.KERNELS.dropout[2, 256](x, step(target, 5), y, 9005, KEY, LAYER, round(0.3 * 2**16), 1 / 0.7)
    assert np.array_equal(target.host(y), target.host(dropout.apply(x, 0.3, KEY, LAYER, step(target, 5))))
