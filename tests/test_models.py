"""The architectures: their sizes as exact integers, their maps, their loss before training, and their names."""

import math
import re

import numpy as np
import pytest

import models
from minidl.errors import UsageError
from minidl.layers import Conv2d
from minidl.ops import loss

# SimpleNet as its authors' definitions have it: channels-kernel of each convolution, P a 2x2 max-pool.
SIMPLENETS = {
    "simplenet-5m": "64-3 128-3 128-3 128-3 P 128-3 128-3 256-3 P 256-3 256-3 P 512-3 2048-1 256-1 P 256-3",
    "simplenet-310k": "64-3 32-3 32-3 32-3 P 32-3 32-3 64-3 P 64-3 64-3 P 128-3 256-1 64-1 P 64-3",
    "simplenet-460k": "32-3 32-3 32-3 64-3 P 64-3 64-3 64-3 P 64-3 64-3 P 96-3 96-3 96-3 P 100-1",
}


def simplenet_counts(plan, classes):
    """Parameters and multiply-accumulates by hand: every convolution has a bias and batch norm's gamma and beta."""
    parameters = macs = 0
    channels, side = 3, 32
    for word in plan.split():
        if word == "P":
            side //= 2
            continue
        outputs, kernel = map(int, word.split("-"))
        weights = outputs * channels * kernel**2
        parameters, macs, channels = parameters + weights + 3 * outputs, macs + weights * side**2, outputs
    return parameters + classes * channels + classes, macs + classes * channels


@pytest.mark.parametrize("name, classes, parameters, macs", [
    ("simplenet-5m", 100, 5_521_508, 652_174_336),
    ("simplenet-5m", 10, 5_498_378, 652_174_336 - 90 * 256),
    ("simplenet-310k", 100, 318_212, 55_793_920),
    ("simplenet-460k", 100, 465_536, 75_250_960),
])
def test_simplenet_has_exactly_the_published_size(name, classes, parameters, macs):
    network = models.create(name, classes)
    count = sum(math.prod(parameter.shape) for parameter in network.named_parameters().values())
    assert (count, network.macs((3, 32, 32))) == (parameters, macs) == simplenet_counts(SIMPLENETS[name], classes)


@pytest.mark.parametrize("name", SIMPLENETS)
def test_simplenet_has_thirteen_convolutions_on_maps_of_32_16_8_4_2_pixels(name):
    network, shape, maps = models.create(name), (3, 32, 32), []
    for layer in network.children().values():
        if isinstance(layer, Conv2d):
            maps.append(shape[1:])
        shape = layer.output_shape(shape)
        if layer is network.pool13:
            assert shape[1:] == (1, 1)
    assert maps == [(side, side) for side in (32,) * 4 + (16,) * 3 + (8,) * 2 + (4,) * 3 + (2,)]
    assert shape == (100, 1, 1)


def test_loss_of_simplenet_before_training():
    """4.89 in a PyTorch build of it, ln(100) = 4.6; 5.66 where the classifier starts with He's larger weights."""
    network = models.create("simplenet-5m").initialize(seed=0)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 32, 32, 64), np.float32)
    totals = np.zeros(4)
    loss.forward_backward(network.forward(x), rng.integers(0, 100, 64, np.int32), totals, np.ones(1, np.float32))
    assert 4.5 < totals[0] / 64 < 5.1


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("name", models.REGISTRY)
def test_every_name_builds(name, classes):
    assert models.create(name, classes).output_shape((3, 32, 32)) == (classes, 1, 1)


@pytest.mark.parametrize("name, message", [
    ("simplenet-5n", "unknown architecture 'simplenet-5n': did you mean simplenet-5m"),
    ("SimpleNet-310k", "unknown architecture 'SimpleNet-310k': did you mean simplenet-310k"),
    ("simplenet", "did you mean simplenet-"),
    ("%", "unknown architecture '%': known are simplenet-5m, "),
    ("", "unknown architecture '': known are "),
])
def test_unknown_names(name, message):
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        models.create(name)
    assert caught.value.exit_code == 2
