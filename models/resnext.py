"""ResNeXt-29 for CIFAR. Xie et al., "Aggregated residual transformations for deep neural networks", arXiv 1611.05431.

    stem     conv 3x3, 64 - BN - ReLU                                              64 x 32 x 32
    stage 1  3 blocks, n =  64, out  256                                          256 x 32 x 32
    stage 2  3 blocks, n = 128, out  512, the first with stride 2                 512 x 16 x 16
    stage 3  3 blocks, n = 256, out 1024, the first with stride 2                1024 x  8 x  8
    head     global average - linear                                              classes

    block    x - conv 1x1, W - BN - ReLU - conv 3x3, W, in C groups, stride - BN - ReLU - conv 1x1, out - BN - (+) - ReLU
               \\____________________________ identity, or conv 1x1 - BN (type B) ____________________________/

"29, C x d" has cardinality C and base width d: W = C * floor(n * d / 64). The form is C of the paper's figure 3,
post-activation. Layers, initial values and shortcut types follow github.com/facebookresearch/ResNeXt, models/resnext.lua.
"""

from __future__ import annotations

from collections.abc import Callable

from minidl.initializers import he_normal, zeros
from minidl.layer import Layer
from minidl.layers import AvgPool2d, BatchNorm2d, Conv2d, GlobalAvgPool2d, Linear, Residual, Sequential, ZeroPadChannels
from models.architecture import Architecture, one_of

BLOCKS = 3                                    # of each stage
STAGES = ((64, 1), (128, 2), (256, 2))        # (n, stride of the first block)
EXPANSION = 4                                 # a block has 4 n output channels


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> Conv2d:
    """Without bias, as batch norm follows. Normal with std sqrt(2 / (kernel^2 * outputs)), the outputs of all groups."""
    return Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups, bias=False, initializer=he_normal("fan_out"))


def bottleneck(inputs: int, width: int, outputs: int, stride: int, groups: int, shortcut: str = "B") -> Residual:
    """The block of the head of this file, with W = width and C = groups."""
    body = Sequential(conv1=conv(inputs, width, 1), bn1=BatchNorm2d(width, relu=True),
                      conv2=conv(width, width, 3, stride, groups), bn2=BatchNorm2d(width, relu=True),
                      conv3=conv(width, outputs, 1))
    return Residual(body, shortcut_of_type(shortcut, inputs, outputs, stride), norm=BatchNorm2d(outputs))


def shortcut_of_type(kind: str, inputs: int, outputs: int, stride: int) -> Layer | None:
    """A: identity, strided and filled up with channels of zeros; B: a projection where the channels change; C: everywhere."""
    if one_of("shortcut", kind, "A", "B", "C") == "C" or kind == "B" and inputs != outputs:
        return Sequential(conv=conv(inputs, outputs, 1, stride), bn=BatchNorm2d(outputs))
    if inputs != outputs:
        return Sequential(subsample=AvgPool2d(1, stride), pad=ZeroPadChannels(outputs))
    return None


def network_of_stages(block: Callable[[int, int, int, int], Layer], classes: int) -> Sequential:
    """Stem, stages and head; block(inputs, n, outputs, stride) makes each block."""
    stages: dict[str, Layer] = {}
    channels = 64
    for number, (n, stride) in enumerate(STAGES, start=1):
        blocks = []
        for i in range(BLOCKS):
            blocks.append(block(channels, n, EXPANSION * n, stride if i == 0 else 1))
            channels = EXPANSION * n
        stages[f"stage{number}"] = Sequential(*blocks)
    return Sequential(conv1=conv(3, 64, 3), bn1=BatchNorm2d(64, relu=True), **stages, pool=GlobalAvgPool2d(),
                      classifier=Linear(channels, classes, bias_initializer=zeros))


def resnext29(classes: int = 100, *, cardinality: int = 8, width: int = 64, shortcut: str = "B") -> Sequential:
    """ResNeXt-29, cardinality x width d, for images 3 x 32 x 32 -> Sequential, logits (classes, N). shortcut: A, B or C."""
    def block(inputs: int, n: int, outputs: int, stride: int) -> Layer:
        return bottleneck(inputs, cardinality * (n * width // 64), outputs, stride, cardinality, shortcut)

    return network_of_stages(block, classes)


PUBLISHED = {(8, 64): "82.23, mean of 10, 300 epochs", (16, 64): "82.69, mean of 10, 300 epochs"}


def architecture(cardinality: int, width: int) -> Architecture:
    """ResNeXt-29 of any C x d."""
    return Architecture(resnext29, dict(cardinality=cardinality, width=width), PUBLISHED.get((cardinality, width), "-"),
                        "arXiv 1611.05431")


ARCHITECTURES = {f"resnext29-{c}x{d}d": architecture(c, d)
                 for c, d in ((1, 64), (2, 64), (4, 64), (8, 64), (16, 64), (32, 4), (8, 4), (8, 16))}
