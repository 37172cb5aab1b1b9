"""SimpleNet v1: thirteen plain convolutions. Hasanpour et al., "Lets keep it simple", arXiv 1608.06037.

    conv 3x3 - BN - ReLU, thirteen times (layers 11 and 12 are 1x1, in 460k only layer 13), a 2x2 max-pool after layers 4,
    7, 9 and 12, the global maximum after layer 13, one linear classifier. Maps: 32 - 16 - 8 - 4 - 2 - 1 pixels.

Channels and kernels follow the authors' Caffe definitions (github.com/Coderx7/SimpleNet); the default form is that of
their PyTorch version (github.com/Coderx7/SimpleNet_Pytorch): batch norm on all thirteen layers, with momentum 0.05 and
in the order conv - BN - ReLU - pool.
"""

import math

from minidl.initializers import he_normal, xavier_uniform
from minidl.layer import Layer
from minidl.layers import BatchNorm2d, ChannelDropout, Conv2d, Dropout, GlobalMaxPool2d, Linear, MaxPool2d, ReLU, Sequential
from models.architecture import Architecture, one_of

# version: (channels of layers 1..13, layers whose kernel is 1x1, rate of channel dropout after each pool)
VERSIONS: dict[str, tuple[tuple[int, ...], tuple[int, ...], float]] = {
    "5m": ((64, 128, 128, 128, 128, 128, 256, 256, 256, 512, 2048, 256, 256), (11, 12), 0.1),
    "310k": ((64, 32, 32, 32, 32, 32, 64, 64, 64, 128, 256, 64, 64), (11, 12), 0.0),
    "460k": ((32, 32, 32, 64, 64, 64, 64, 64, 64, 96, 96, 96, 100), (13,), 0.0),
}
POOL_AFTER = (4, 7, 9, 12)
# Where the authors drop: whole channels after each of the five pools (PyTorch), or elements after layers 1 to 12 (Caffe),
# in these after the pool that follows, in the others before it.
ELEMENTS_DROPPED_AFTER_POOL = (4, 12)


def simplenet(classes: int = 100, *, version: str = "5m", form: str = "pytorch", extra_pool: bool = False,
              dropout: str = "channels", rate: float | None = None, initializer: str = "xavier") -> Sequential:
    """SimpleNet of a version of the table above, for images 3 x 32 x 32 -> Sequential, logits (classes, N).

    form: "pytorch", or "caffe", where layers 11 to 13 have no batch norm and layer 7 is pooled before it. extra_pool:
    one more 2x2 max-pool after layer 10, which the authors' best PyTorch results have and call a mistake. dropout:
    "channels" after the pools or "elements" after layers 1 to 12, with probability `rate`; by default the PyTorch
    version's 0.1 in 5m and 0 in the small ones, or Caffe's 0.2. initializer: of the convolutions, "xavier", uniform with
    gain sqrt(2) as in the PyTorch version, or "he", normal.
    """
    channels, pointwise, default_rate = VERSIONS[version]
    one_of("extra_pool", extra_pool, False, True)
    caffe = one_of("form", form, "pytorch", "caffe") == "caffe"
    elements = one_of("dropout", dropout, "channels", "elements") == "elements"
    weights = {"xavier": xavier_uniform(math.sqrt(2)), "he": he_normal()}[one_of("initializer", initializer, "xavier", "he")]
    if rate is None:
        rate = 0.2 if elements else default_rate
    layers: dict[str, Layer] = {}

    def pool(number: int) -> None:
        layers[f"pool{number}"] = GlobalMaxPool2d() if number == 13 else MaxPool2d(2)
        if rate and not elements:
            layers[f"drop{number}"] = ChannelDropout(rate)

    for number, (inputs, outputs) in enumerate(zip((3, *channels), channels), start=1):
        kernel = 1 if number in pointwise else 3
        layers[f"conv{number}"] = Conv2d(inputs, outputs, kernel, padding=kernel // 2, initializer=weights)
        if caffe and number == 7:
            pool(7)
        if caffe and number > 10:
            layers[f"relu{number}"] = ReLU()
        else:
            layers[f"bn{number}"] = BatchNorm2d(outputs, momentum=0.05, relu=True)
        drops = rate and elements and number < 13
        pools = number in POOL_AFTER and not (caffe and number == 7) or number == 13 or number == 10 and extra_pool
        if drops and number not in ELEMENTS_DROPPED_AFTER_POOL:
            layers[f"drop{number}"] = Dropout(rate)
        if pools:
            pool(number)
        if drops and number in ELEMENTS_DROPPED_AFTER_POOL:
            layers[f"drop{number}"] = Dropout(rate)
    layers["classifier"] = Linear(channels[-1], classes)
    return Sequential(**layers)


SOURCE = "arXiv 1608.06037"
ARCHITECTURES = {
    "simplenet-5m": Architecture(simplenet, dict(version="5m"), "73.42 (Caffe)", SOURCE),
    "simplenet-310k": Architecture(simplenet, dict(version="310k"), "64.68 (Caffe)", SOURCE),
    "simplenet-460k": Architecture(simplenet, dict(version="460k"), "66.82 (Caffe)", SOURCE),
}
