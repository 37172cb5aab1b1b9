"""The networks of a student report on CIFAR-100, kept apart from the papers' networks whose names they bear.

ResNext1-3: two or three stages; a stage is three ResNeXt blocks of constant width and then "a Conv2D layer halving number
of channels". The report leaves much open; the default is the reading in which all its numbers chain:

    stem     conv 3x3, without padding - BN - ReLU                                 32 -> 30 pixels
    stage    3 blocks  a - a/2 - a  in min(8, a/2) groups, identity shortcuts; conv 3x3, a -> b, stride 2 - BN - ReLU
    head     global average - linear - ReLU                                        logits that cannot be negative

That ReLU gives a class whose logit is not positive no gradient; the "-fixed" twins leave it out. Halving the channels
where the map halves inverts the usual rule, and is the main reason why these networks are weak.

WideResnet1-6 are Wide ResNets with N = 2 or 4 blocks a group, SimpleNet is read as the 5M network with Caffe's dropout and
He's initial values.
"""

from __future__ import annotations

from typing import Any

from minidl.initializers import he_normal
from minidl.layer import Layer
from minidl.layers import BatchNorm2d, Conv2d, GlobalAvgPool2d, Linear, ReLU, Residual, Sequential
from models.architecture import Architecture, one_of
from models.simplenet import simplenet
from models.wideresnet import wide_resnet

HE = he_normal()


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int = 0, groups: int = 1, bias: bool = True) -> Conv2d:
    return Conv2d(inputs, outputs, kernel, stride, padding, groups, bias, initializer=HE)


def conv_norm_relu(inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int = 0) -> Sequential:
    return Sequential(conv=conv(inputs, outputs, kernel, stride, padding), bn=BatchNorm2d(outputs, relu=True))


def block(channels: int) -> Residual:
    width = channels // 2
    body = Sequential(conv1=conv(channels, width, 1, bias=False), bn1=BatchNorm2d(width, relu=True),
                      conv2=conv(width, width, 3, 1, 1, min(8, width), bias=False), bn2=BatchNorm2d(width, relu=True),
                      conv3=conv(width, channels, 1, bias=False))
    return Residual(body, norm=BatchNorm2d(channels))


def report_resnext(classes: int = 100, *, stages: tuple[tuple[int, int], ...], halve_kernel: int = 3, halve_stride: int = 2,
                   head: str = "mean", logits: str = "relu") -> Sequential:
    """A ResNext of the report, for images 3 x 32 x 32 -> Sequential, logits (classes, N).

    stages: (channels of the blocks, channels after the halving convolution), each. The other readings: halve_kernel 3 or
    1, halve_stride 2 or 1, head "mean" or "flatten", logits "relu" or "linear".
    """
    one_of("halve_kernel", halve_kernel, 3, 1), one_of("halve_stride", halve_stride, 2, 1)
    one_of("head", head, "mean", "flatten"), one_of("logits", logits, "relu", "linear")
    channels = stages[0][0]
    layers: dict[str, Layer] = {"stem": conv_norm_relu(3, channels, 3)}
    side = 30
    for number, (channels, halved) in enumerate(stages, start=1):
        layers[f"stage{number}"] = Sequential(*(block(channels) for _ in range(3)))
        layers[f"halve{number}"] = conv_norm_relu(channels, halved, halve_kernel, halve_stride, halve_kernel // 2)
        side = (side - 1) // halve_stride + 1
        channels = halved
    if head == "mean":
        layers["pool"] = GlobalAvgPool2d()
    features = channels if head == "mean" else channels * side**2
    layers["classifier"] = Linear(features, classes, initializer=HE)
    if logits == "relu":
        layers["relu"] = ReLU()
    return Sequential(**layers)


STAGES = {1: ((32, 16), (16, 8)), 2: ((64, 32), (32, 16), (16, 8)), 3: ((16, 8), (8, 4), (4, 4))}
READINGS: dict[str, dict[str, Any]] = {
    "": {}, "-fixed": dict(logits="linear"), "-halve1x1": dict(halve_kernel=1), "-stride1": dict(halve_stride=1),
    "-flatten": dict(head="flatten")}
WIDTHS = {1: (16, 2), 2: (16, 4), 3: (16, 8), 4: (16, 16), 5: (28, 2), 6: (28, 4)}  # WideResnet: depth 6 N + 4, k
RESULTS = {"resnext": ("28.57", "30.5", "20.21"), "wideresnet": ("44.26", "45.09", "43.54", "43.72", "42.14", "46.21")}
SOURCE = "student report"

ARCHITECTURES = {
    **{f"report-resnext{i}{reading}": Architecture(report_resnext, dict(stages=stages, **settings),
                                                   RESULTS["resnext"][i - 1] if not reading else "-", SOURCE)
       for i, stages in STAGES.items() for reading, settings in READINGS.items()},
    **{f"report-wideresnet{i}": Architecture(wide_resnet, dict(depth=depth, width=width), RESULTS["wideresnet"][i - 1], SOURCE)
       for i, (depth, width) in WIDTHS.items()},
    "report-simplenet": Architecture(simplenet, dict(version="5m", dropout="elements", rate=0.2, initializer="he"),
                                     "63.56, 50 epochs", SOURCE),
}
