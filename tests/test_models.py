"""The architectures: their sizes as exact integers, their maps, their loss before training, and their names."""

import math
import re

import numpy as np
import pytest

import models
from minidl.errors import UsageError
from minidl.layers import BatchNorm2d, Conv2d
from minidl.ops import loss
from models.report import report_resnext

# SimpleNet as its authors' definitions have it: channels-kernel of each convolution, P a 2x2 max-pool.
SIMPLENETS = {
    "simplenet-5m": "64-3 128-3 128-3 128-3 P 128-3 128-3 256-3 P 256-3 256-3 P 512-3 2048-1 256-1 P 256-3",
    "simplenet-310k": "64-3 32-3 32-3 32-3 P 32-3 32-3 64-3 P 64-3 64-3 P 128-3 256-1 64-1 P 64-3",
    "simplenet-460k": "32-3 32-3 32-3 64-3 P 64-3 64-3 64-3 P 64-3 64-3 P 96-3 96-3 96-3 P 100-1",
}


# Every network that the papers' tables, the authors' code and the report give a size to: name, classes, options, parameters,
# multiply-accumulates, and those as published, in millions ("" where nobody does).
SIZES = [
    ("simplenet-5m", 100, {}, 5_521_508, 652_174_336, "652.2"),
    ("simplenet-5m", 10, {}, 5_498_378, 652_151_296, ""),
    ("simplenet-5m", 100, dict(form="caffe"), 5_516_388, 652_174_336, ""),
    ("simplenet-5m", 10, dict(form="caffe"), 5_493_258, 652_151_296, ""),
    ("simplenet-5m", 100, dict(extra_pool=True), 5_521_508, 631_530_496, "631.5"),
    ("simplenet-310k", 100, {}, 318_212, 55_793_920, "55.8"),
    ("simplenet-310k", 100, dict(form="caffe"), 317_444, 55_793_920, ""),
    ("simplenet-460k", 100, {}, 465_536, 75_250_960, "75.3"),
    ("resnext29-1x64d", 100, {}, 5_006_500, 748_457_984, "748.5"),
    ("resnext29-32x4d", 100, {}, 4_868_004, 774_148_096, "774.1"),
    ("resnext29-8x4d", 100, {}, 1_809_828, 257_855_488, "257.9"),
    ("resnext29-8x16d", 100, {}, 5_738_916, 901_550_080, "901.6"),
    ("resnext29-2x64d", 100, {}, 9_222_564, 1_411_158_016, "1411.2"),
    ("resnext29-4x64d", 100, {}, 17_654_692, 2_736_558_080, "2736.6"),
    ("resnext29-8x64d", 100, {}, 34_518_948, 5_387_358_208, "5387.4"),
    ("resnext29-16x64d", 100, {}, 68_247_460, 10_688_958_464, "10689.0"),
    ("resnext29-8x64d", 10, {}, 34_426_698, 5_387_266_048, ""),
    ("resnext29-16x64d", 10, {}, 68_155_210, 10_688_866_304, ""),
    ("res2next29-6c24w4s", 100, {}, 24_360_932, 3_947_925_504, "3947.9"),
    ("res2next29-6c24w4s", 10, {}, 24_268_682, 3_947_833_344, ""),
    ("res2next29-6c24w4s", 100, dict(form="B"), 23_705_732, 3_852_374_016, "3852.4"),
    ("res2next29-8c25w4s", 100, {}, 33_905_236, 5_505_175_552, "5505.2"),
    ("res2next29-8c25w4s", 10, {}, 33_812_986, 5_505_083_392, ""),
    ("res2next29-8c25w4s", 100, dict(form="B"), 32_957_436, 5_366_935_552, "5366.9"),
    ("res2next29-6c24w6s", 100, {}, 36_801_380, 5_974_560_768, "5974.6"),
    ("res2next29-6c24w6s", 10, {}, 36_709_130, 5_974_468_608, ""),
    ("res2next29-6c24w6s", 100, dict(form="B"), 36_146_180, 5_879_009_280, "5879.0"),
    ("res2next29-2c24w4s", 100, {}, 8_647_268, 1_373_147_136, "1373"),
    ("res2next29-2c24w4s", 100, dict(form="B"), 8_428_868, 1_341_296_640, ""),
    ("res2next29-4c24w4s", 100, {}, 16_504_100, 2_660_536_320, "2661"),
    ("res2next29-4c24w4s", 100, dict(form="B"), 16_067_300, 2_596_835_328, ""),
    ("res2next29-8c6w4s", 100, {}, 7_014_308, 1_134_268_416, "1134"),
    ("res2next29-8c6w4s", 100, dict(form="B"), 6_959_204, 1_126_305_792, ""),
    ("res2next29-8c4w4s", 100, {}, 4_818_724, 767_070_208, "767"),
    ("res2next29-8c4w4s", 100, dict(form="B"), 4_794_084, 763_531_264, ""),
    ("wrn-16-2", 100, {}, 703_284, 101_118_464, "101.1"),
    ("wrn-16-4", 100, {}, 2_772_020, 392_635_392, "392.6"),
    ("wrn-16-8", 100, {}, 11_007_540, 1_548_191_744, "1548.2"),
    ("wrn-16-10", 100, {}, 17_174_324, 2_412_231_168, "2412.2"),
    ("wrn-16-16", 100, {}, 43_870_772, 6_149_394_432, "6149.4"),
    ("wrn-22-8", 100, {}, 17_204_276, 2_454_161_408, "2454.2"),
    ("wrn-22-10", 100, {}, 26_855_604, 3_827_808_768, "3827.8"),
    ("wrn-28-2", 100, {}, 1_479_220, 214_364_672, "214.4"),
    ("wrn-28-4", 100, {}, 5_872_180, 845_620_224, "845.6"),
    ("wrn-28-10", 100, {}, 36_536_884, 5_243_386_368, "5243.4"),
    ("wrn-28-12", 100, {}, 52_587_060, 7_543_974_912, "7544.0"),
    ("wrn-40-1", 100, {}, 569_780, 83_286_272, "83.3"),
    ("wrn-40-2", 100, {}, 2_255_156, 327_610_880, "327.6"),
    ("wrn-40-4", 100, {}, 8_972_340, 1_298_605_056, "1298.6"),
    ("wrn-40-8", 100, {}, 35_794_484, 5_172_070_400, "5172.1"),
    ("wrn-40-10", 100, {}, 55_899_444, 8_074_541_568, "8074.5"),
    ("report-resnext1", 100, {}, 13_188, 5_652_728, "5.65"),
    ("report-resnext1-stride1", 100, {}, 13_188, 10_390_400, "10.4"),
    ("report-resnext1-halve1x1", 100, {}, 8_068, 4_665_592, ""),
    ("report-resnext1-flatten", 100, {}, 63_588, 5_703_128, ""),
    ("report-resnext1", 100, dict(head="flatten", halve_stride=1), 732_388, 11_109_600, ""),
    ("report-resnext2", 100, {}, 49_188, 21_134_720, "21.1"),
    ("report-resnext2-stride1", 100, {}, 49_188, 41_926_400, "41.9"),
    ("report-resnext2-halve1x1", 100, {}, 27_684, 17_169_792, ""),
    ("report-resnext2-flatten", 100, {}, 61_188, 21_146_720, ""),
    ("report-resnext2", 100, dict(head="flatten", halve_stride=1), 768_388, 42_645_600, ""),
    ("report-resnext3", 100, {}, 4_334, 1_628_764, "1.63"),
    ("report-resnext3-stride1", 100, {}, 4_334, 3_062_200, "3.06"),
    ("report-resnext3-halve1x1", 100, {}, 2_926, 1_379_932, ""),
    ("report-resnext3-flatten", 100, {}, 10_334, 1_634_764, ""),
    ("report-resnext3", 100, dict(head="flatten", halve_stride=1), 363_934, 3_421_800, ""),
    ("report-wideresnet1", 100, {}, 703_284, 101_118_464, "101"),
    ("report-wideresnet2", 100, {}, 2_772_020, 392_635_392, "393"),
    ("report-wideresnet3", 100, {}, 11_007_540, 1_548_191_744, "1548"),
    ("report-wideresnet4", 100, {}, 43_870_772, 6_149_394_432, "6149"),
    ("report-wideresnet5", 100, {}, 1_479_220, 214_364_672, "214"),
    ("report-wideresnet6", 100, {}, 5_872_180, 845_620_224, "846"),
    ("report-simplenet", 100, {}, 5_521_508, 652_174_336, "652.2"),
    ("the report's section on architecture", 100, {}, 47_636, 21_054_112, "21.1"),
    ("the report's section on architecture", 100, dict(halve_stride=1), 47_636, 40_004_800, "40.0"),
    ("the report's section on architecture", 100, dict(halve_kernel=1), 27_156, 17_105_568, ""),
    ("the report's section on architecture", 100, dict(head="flatten"), 148_436, 21_154_912, ""),
    ("the report's section on architecture", 100, dict(head="flatten", halve_stride=1), 1_486_036, 41_443_200, ""),
]


def network_of(name, classes, options):
    if name in models.REGISTRY:
        return models.create(name, classes, **options)
    return report_resnext(classes, stages=((64, 32), (32, 16)), **options)


@pytest.mark.parametrize("name, classes, options, parameters, macs, published", SIZES)
def test_sizes(name, classes, options, parameters, macs, published):
    network = network_of(name, classes, options)
    assert sum(parameter.size for parameter in network.named_parameters().values()) == parameters
    assert network.macs((3, 32, 32)) == macs
    if published:
        assert f"{macs / 1e6:.{len(published.partition('.')[2])}f}" == published


def test_the_table_has_every_name():
    assert {name for name, *_ in SIZES} >= {name for name in models.REGISTRY if not name.endswith("-fixed")}


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


@pytest.mark.parametrize("name, classes", [
    ("simplenet-5m", 100), ("simplenet-5m", 10), ("simplenet-310k", 100), ("simplenet-460k", 100)])
def test_simplenet_counted_by_hand(name, classes):
    sizes = {(row, count): (parameters, macs) for row, count, options, parameters, macs, _ in SIZES if not options}
    assert sizes[name, classes] == simplenet_counts(SIMPLENETS[name], classes)


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
    assert shape == (100,)


@pytest.mark.parametrize("name, options, expected", [
    ("simplenet-5m", {}, 4.89), ("resnext29-2x64d", {}, 4.75), ("res2next29-2c24w4s", {}, 4.73), ("wrn-16-4", {}, 4.62),
    ("wrn-16-4", dict(gamma="uniform"), 4.62), ("wrn-16-4", dict(classifier="he"), 4.76)])
def test_loss_before_training(name, options, expected):
    """As in PyTorch builds of these networks; ln(100) = 4.6. Wrong initial values show: a He-normal classifier gives
    SimpleNet 5.66."""
    network = models.create(name, **options).initialize(seed=0)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 32, 32, 64), np.float32)
    totals = np.zeros(4)
    loss.forward_backward(network.forward(x), rng.integers(0, 100, 64, np.int32), totals, np.ones(1, np.float32))
    assert abs(totals[0] / 64 - expected) < 0.15


# The cheapest member of each family.
SMALL = ["simplenet-310k", "resnext29-2x4d", "res2next29-2c4w3s", "wrn-10-1", "report-resnext3"]


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("classes, side, batch", [(10, 32, 3), (1000, 32, 2), (100, 64, 2), (7, 37, 9)])
def test_odd_sizes(name, classes, side, batch):
    """A step of training, then a single image."""
    network = models.create(name, classes).initialize()
    x = np.random.default_rng(0).standard_normal((3, side, side, batch), np.float32)
    logits = network.forward(x)
    dx = network.backward(np.ones_like(logits))
    assert logits.shape == (classes, batch) and dx.shape == x.shape
    one = network.eval().forward(np.ascontiguousarray(x[..., :1]))
    assert one.shape == (classes, 1) and np.isfinite(one).all() and np.isfinite(network.parameters.grad).all()


def without_kinks(network, rng):
    """Small weights and large biases of batch norm switch each channel on or, but for sums, off: no ReLU is near its edge."""
    for name, layer in network.named_layers():
        if isinstance(layer, BatchNorm2d):
            signs = rng.choice([-1, 1], layer.channels)
            layer.weight.master[...] = network.device.array(signs * rng.uniform(0.4, 0.6, layer.channels))
            ends_branch = name.endswith((".norm", "shortcut.bn"))
            on = np.ones(layer.channels) if ends_branch else rng.choice([1, 1, 1, -1], layer.channels)
            layer.bias.master[...] = network.device.array(on * rng.uniform(4, 5, layer.channels))
    return network


@pytest.mark.parametrize("name, options", [
    ("simplenet-310k", {}), ("simplenet-460k", dict(rate=0.1)), ("resnext29-2x4d", {}), ("resnext29-2x4d", dict(shortcut="A")),
    ("resnext29-1x8d", dict(shortcut="C")), ("res2next29-2c4w4s", {}), ("res2next29-2c4w3s", dict(form="B")),
    ("res2next29-2c4w1s", {}), ("wrn-10-1", {}), ("wrn-16-1", dict(dropout=0.3)), ("report-resnext2-fixed", {}),
    ("report-resnext3-flatten", dict(logits="linear"))])
def test_gradients_in_random_directions(machine, name, options):
    """<v, backward(u)> = <u, d forward / d v> for the image and for all parameters, by central differences in float64.

    On the first of some random inputs on which no maximum of a pool changes its place within reach of the differences.
    """
    for seed in range(20):
        differences = directional_derivatives(machine, name, options, np.random.default_rng(seed))
        if differences:
            break
    for what, expected, numerical in differences:
        assert numerical == pytest.approx(expected, rel=1e-6), what


def directional_derivatives(machine, name, options, rng, h=3e-4):
    """[(what moves, derivative by backward, derivative by differences), ...], or None where a maximum changes its place.

    h: with a third of it, the rounding of outputs near 10 is a millionth of the smallest derivatives, 7e-5; with three times as
    much, maxima change on every input.
    """
    network = without_kinks(models.create(name, 10, **options).initialize(machine.place, "float64", seed=3), rng)
    x, u = rng.normal(size=(3, 32, 32, 2)), rng.normal(size=(10, 2))
    winners = set()

    def value(at_x, at_parameters):
        network.parameters.master[...] = machine.array(at_parameters)
        logits = machine.host(network.forward(machine.array(at_x)))
        winners.add(b"".join(machine.host(layer._saved[0]).tobytes() for _, layer in network.named_layers()
                             if layer.keeps == ("winner",)))
        return (u * logits).sum()

    start = machine.host(network.parameters.master).copy()
    value(x, start)
    dx, grad = machine.host(network.backward(machine.array(u))), machine.host(network.parameters.grad)
    results = []
    for what, vx, vp in (("x", direction(rng, dx), 0), ("parameters", 0, direction_of_parameters(machine, rng, network))):
        points = [value(x + k * h * vx, start + k * h * vp) for k in (-2, -1, 1, 2)]
        results.append((what, (vx * dx).sum() + (vp * grad).sum(),
                        (points[0] - 8 * points[1] + 8 * points[2] - points[3]) / (12 * h)))
    return results if len(winners) == 1 else None


def direction(rng, gradient):
    """Half of it the gradient's own, so that the derivative stands clear of rounding."""
    random = rng.normal(size=gradient.shape)
    return gradient / np.linalg.norm(gradient) + random / np.linalg.norm(random)


def direction_of_parameters(machine, rng, network):
    """Each moves in inverse proportion to its gradient: the error of one is not lost beside another's."""
    grads = {key: machine.host(parameter.grad) for key, parameter in network.named_parameters().items()}
    sizes = {key: np.linalg.norm(grad) for key, grad in grads.items()}
    floor = 1e-9 * max(sizes.values())  # below: rounding errors of a gradient that is 0
    smallest = min(size for size in sizes.values() if size > floor)
    flat, begin = np.zeros(network.parameters.master.size), 0
    for key, grad in grads.items():
        if sizes[key] > floor:
            flat[begin:begin + grad.size] = (direction(rng, grad) * smallest / sizes[key]).ravel()
        begin += -(-grad.size // network.parameters.ALIGNMENT) * network.parameters.ALIGNMENT
    return flat


@pytest.mark.parametrize("name, shape, message", [
    ("report-resnext1-flatten", (3, 64, 64), "Linear: 512 input features are needed, got (8, 16, 16)"),
    ("simplenet-310k", (3, 8, 8), "window 2x2 is larger than the padded image 1x1"),
    ("wrn-10-1", (1, 32, 32), "Conv2d: 3 input channels are needed, got (C, H, W) = (1, 32, 32)"),
    ("res2next29-2c4w3s", (4, 32, 32), "Conv2d: 3 input channels are needed"),
])
def test_images_that_do_not_fit(name, shape, message):
    network = models.create(name)
    with pytest.raises(ValueError, match=re.escape(message)):
        network.output_shape(shape)
    with pytest.raises(ValueError, match=re.escape(message)):
        network.initialize().forward(np.zeros((*shape, 2), np.float32))


# ---- names


def test_aliases():
    assert [models.find(alias)[0] for alias in ("simplenet", "resnext", "res2net", "wideresnet")] == [
        "simplenet-5m", "resnext29-2x64d", "res2next29-2c24w4s", "wrn-28-4"]


@pytest.mark.parametrize("name, parameters", [
    ("resnext29-16x64d", 68_247_460), ("wrn-10-1", 83_700), ("res2next29-1c64w1s", 5_006_500)])
def test_families_take_any_numbers(name, parameters):
    """Res2NeXt with scale 1 and cardinality 1 is the plain bottleneck network, ResNeXt 1x64d."""
    assert sum(parameter.size for parameter in models.create(name).named_parameters().values()) == parameters


@pytest.mark.parametrize("name, message", [
    ("simplenet-5n", "unknown architecture 'simplenet-5n': did you mean simplenet-5m"),
    ("SimpleNet-310k", "unknown architecture 'SimpleNet-310k': did you mean simplenet-310k"),
    ("resnxt", "unknown architecture 'resnxt': did you mean resnext"),
    ("resnext29-0x64d", "did you mean resnext29-"),
    ("wrn-10-99999999999999999999", "unknown architecture 'wrn-10-99999999999999999999'"),
    ("%", "unknown architecture '%': `minidl train --arch list` prints those that are known"),
    ("", "unknown architecture '': `minidl train --arch list`"),
])
def test_unknown_names(name, message):
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        models.create(name)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("name, options, message", [
    ("wrn-28-10", dict(drpout=0.3), "unknown model option 'drpout': this architecture has dropout, gamma, classifier"),
    ("wrn-28-10", dict(depth=16), "unknown model option 'depth'"),
    ("wrn-28-10", dict(dropout=1.5), "model options dropout=1.5: Dropout: rate 1.5 is not in 0 <= rate < 1"),
    ("wrn-28-10", dict(gamma="two"), "model options gamma=two: gamma is 'two', not one of one, uniform"),
    ("wrn-17-2", {}, "a Wide ResNet has depth 6 N + 4, such as 16, 22, 28 or 40, not 17"),
    ("resnext", dict(shortcut="D"), "shortcut is 'D', not one of A, B, C"),
    ("res2net", dict(form="C"), "form is 'C', not one of A, B"),
    ("simplenet", dict(form="torch"), "form is 'torch', not one of pytorch, caffe"),
    ("simplenet", dict(extra_pool="no"), "extra_pool is 'no', not one of False, True"),
    ("wrn-28-10", dict(dropout="abc"), "model options dropout=abc: a value is of the wrong type"),
    ("report-resnext1", dict(halve_kernel=2), "halve_kernel is 2, not one of 3, 1"),
])
def test_refused_options(name, options, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        models.create(name, **options)


@pytest.mark.parametrize("arch, name, fan", [
    ("wrn-10-4", "group2.0.body.conv1", 9 * 64), ("wrn-10-4", "group2.0.shortcut", 64), ("report-resnext1", "halve1.conv", 9 * 32),
    ("resnext29-2x64d", "stage2.0.body.conv1", 256), ("resnext29-2x64d", "stage2.0.body.conv2", 9 * 256),
    ("resnext29-2x64d", "stage2.0.shortcut.conv", 512)])
def test_the_first_weights_of_convolutions(arch, name, fan):
    """He's, normal: of Wide ResNets and the report's over the inputs, of ResNeXts over the outputs of all groups."""
    weight = models.create(arch).named_parameters()[f"{name}.weight"]
    values = weight.initializer(np.random.default_rng(0), weight.shape)
    assert values.std() == pytest.approx(math.sqrt(2 / fan), rel=0.05) and abs(values).max() > 2.5 * values.std()


@pytest.mark.parametrize("arch", ["wrn-10-1", "resnext", "res2net"])
def test_the_first_bias_of_a_classifier_is_0(arch):
    bias = models.create(arch, 10).classifier.bias
    assert not bias.initializer(np.random.default_rng(0), bias.shape).any()


def test_the_first_weights_of_simplenet():
    """Xavier's, uniform, with a gain of sqrt(2)."""
    weight = models.create("simplenet-310k").initialize().conv3.weight
    bound = math.sqrt(2 * 6 / (9 * 32 + 9 * 32))
    assert 0.99 * bound < abs(weight.data).max() <= bound
