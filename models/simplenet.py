"""SimpleNet v1: thirteen plain convolutions. Hasanpour et al., "Lets keep it simple", arXiv 1608.06037.

    conv 3x3 - BN - ReLU, thirteen times (two of them 1x1 in the wide part), a 2x2 max-pool after layers 4, 7, 9 and
    12, the global maximum after layer 13, one linear classifier. Maps: 32 - 16 - 8 - 4 - 2 - 1 pixels.

Channels and kernels follow the authors' Caffe definitions (github.com/Coderx7/SimpleNet); batch norm on all thirteen
layers, with momentum 0.05 and in the order conv - BN - ReLU - pool, their PyTorch version.
"""

import math

from minidl.initializers import xavier_uniform
from minidl.layers import BatchNorm2d, ChannelDropout, Conv2d, GlobalMaxPool2d, Layer, Linear, MaxPool2d, Sequential

# version: (channels of layers 1..13, layers whose kernel is 1x1, rate of channel dropout after each pool)
VERSIONS: dict[str, tuple[tuple[int, ...], tuple[int, ...], float]] = {
    "5m": ((64, 128, 128, 128, 128, 128, 256, 256, 256, 512, 2048, 256, 256), (11, 12), 0.1),
    "310k": ((64, 32, 32, 32, 32, 32, 64, 64, 64, 128, 256, 64, 64), (11, 12), 0.0),
    "460k": ((32, 32, 32, 64, 64, 64, 64, 64, 64, 96, 96, 96, 100), (13,), 0.0),
}
POOL_AFTER = (4, 7, 9, 12)


def simplenet(version: str, classes: int = 100) -> Sequential:
    """SimpleNet of a version of the table above, for images 3 x 32 x 32 -> Sequential, logits (classes, N)."""
    channels, pointwise, dropout = VERSIONS[version]
    layers: dict[str, Layer] = {}

    def drop(number: int) -> None:
        if dropout:
            layers[f"drop{number}"] = ChannelDropout(dropout)

    for number, (inputs, outputs) in enumerate(zip((3, *channels), channels), start=1):
        kernel = 1 if number in pointwise else 3
        layers[f"conv{number}"] = Conv2d(inputs, outputs, kernel, padding=kernel // 2,
                                         initializer=xavier_uniform(math.sqrt(2)))
        layers[f"bn{number}"] = BatchNorm2d(outputs, momentum=0.05, relu=True)
        if number in POOL_AFTER:
            layers[f"pool{number}"] = MaxPool2d(2)
            drop(number)
    layers["pool13"] = GlobalMaxPool2d()
    drop(13)
    layers["classifier"] = Linear(channels[-1], classes)
    return Sequential(**layers)
