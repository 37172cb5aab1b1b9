"""Wide ResNet. Zagoruyko, Komodakis, "Wide residual networks", arXiv 1605.07146.

    stem     conv 3x3, 16                                                          16 x 32 x 32
    group 1  N blocks, 16 k                                                      16 k x 32 x 32
    group 2  N blocks, 32 k, the first with stride 2                             32 k x 16 x 16
    group 3  N blocks, 64 k, the first with stride 2                             64 k x  8 x  8
    head     BN - ReLU - global average - linear                                 classes

    block B(3,3), pre-activation:

    x -+- BN - ReLU -+- conv 3x3, stride - BN - ReLU - dropout - conv 3x3 - (+)      no ReLU after the sum
       |             +--------------- conv 1x1, stride ---------------------/|       where the channels change, or else
       +---------------------------------- identity -------------------------/       the raw x

"WRN-d-k" has depth d = 6 N + 4 and width k. Layers and initial values follow
github.com/szagoruyko/wide-residual-networks, models/wide-resnet.lua.
"""

from __future__ import annotations

from minidl import initializers
from minidl.device import Array
from minidl.initializers import he_normal, uniform, zeros
from minidl.layer import Composition, Tracer, Value
from minidl.layers import BatchNorm2d, Conv2d, Dropout, GlobalAvgPool2d, Linear, Sequential
from models.architecture import Architecture, one_of

STAGES = ((16, 1), (32, 2), (64, 2))  # (width / k, stride of the first block)


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> Conv2d:
    """Without bias. Normal with std sqrt(2 / (kernel^2 * inputs))."""
    return Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False, initializer=he_normal("fan_in"))


class PreActivationBlock(Composition):
    """The block of the head of this file: x (inputs, H, W, N) -> y (outputs, H', W', N)."""

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float, gamma: initializers.Initializer) -> None:
        self.bn1 = BatchNorm2d(inputs, relu=True, initializer=gamma)
        drop = {"drop": Dropout(dropout)} if dropout else {}
        self.body = Sequential(conv1=conv(inputs, outputs, 3, stride),
                               bn2=BatchNorm2d(outputs, relu=True, initializer=gamma), **drop,
                               conv2=conv(outputs, outputs, 3))
        self.shortcut = conv(inputs, outputs, 1, stride) if inputs != outputs else None

    def trace(self, x: Value, tracer: Tracer[Value]) -> Value:
        a = self.bn1.trace(x, tracer)
        return tracer.add(self.body.trace(a, tracer), self.shortcut.trace(a, tracer) if self.shortcut else x)

    def forward(self, x: Array) -> Array:
        a = self.bn1.forward(x)
        y = self.body.forward(a, self.shortcut.forward(a) if self.shortcut else x)
        if again := self.bn1.output_again():
            for layer in (self.body, self.shortcut) if self.shortcut else (self.body,):
                layer.forget_input(again)
        return y

    def backward(self, dy: Array) -> Array:
        da = self.body.backward(dy)
        dx: Array
        if self.shortcut:  # both branches started from a
            dx = self.bn1.backward(self.shortcut.backward(dy, dx=da, plus=da))
        else:
            dx = self.bn1.backward(da, plus=dy)
        return dx


def wide_resnet(classes: int = 100, *, depth: int = 28, width: int = 10, dropout: float = 0.0, gamma: str = "one",
                classifier: str = "uniform") -> Sequential:
    """WRN-depth-width for images 3 x 32 x 32 -> Sequential, logits (classes, N).

    dropout: between the convolutions of a block; the authors use 0.3 on CIFAR. gamma: initial weights of batch norm,
    "one", or "uniform" in 0..1, which was Torch's default. classifier: "uniform" within 1 / sqrt(inputs) as in the
    authors' Lua code, or "he", normal, as in their PyTorch code; its bias starts with 0. Raises ValueError for a depth
    that is not 6 N + 4.
    """
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(f"a Wide ResNet has depth 6 N + 4, such as 16, 22, 28 or 40, not {depth}")
    of_gamma = {"one": initializers.ones, "uniform": uniform(0.0, 1.0)}[one_of("gamma", gamma, "one", "uniform")]
    of_classifier = {"uniform": initializers.uniform_fan_in(), "he": he_normal()}[
        one_of("classifier", classifier, "uniform", "he")]
    groups, channels = {}, 16
    for number, (n, stride) in enumerate(STAGES, start=1):
        blocks = []
        for i in range((depth - 4) // 6):
            blocks.append(PreActivationBlock(channels, n * width, stride if i == 0 else 1, dropout, of_gamma))
            channels = n * width
        groups[f"group{number}"] = Sequential(*blocks)
    return Sequential(conv1=conv(3, 16, 3), **groups, bn=BatchNorm2d(channels, relu=True, initializer=of_gamma),
                      pool=GlobalAvgPool2d(), classifier=Linear(channels, classes, initializer=of_classifier,
                                                                bias_initializer=zeros))


PUBLISHED = {
    (16, 4): "75.97; with dropout 76.09", (16, 8): "79.57", (16, 10): "78.41 (ZCA)", (22, 8): "78.78 (ZCA)",
    (22, 10): "79.25 (ZCA)", (28, 10): "80.75; with dropout 81.15", (28, 12): "79.57 (ZCA)", (40, 1): "69.11 (ZCA)",
    (40, 2): "73.96 (ZCA)", (40, 4): "78.82", (40, 10): "81.7 with dropout, single run",
}


def architecture(depth: int, width: int) -> Architecture:
    """WRN of any depth 6 N + 4 and width."""
    return Architecture(wide_resnet, dict(depth=depth, width=width), PUBLISHED.get((depth, width), "-"), "arXiv 1605.07146")


ARCHITECTURES = {f"wrn-{d}-{k}": architecture(d, k) for d, k in (
    (16, 2), (16, 4), (16, 8), (16, 10), (16, 16), (22, 8), (22, 10), (28, 2), (28, 4), (28, 10), (28, 12),
    (40, 1), (40, 2), (40, 4), (40, 8), (40, 10))}
