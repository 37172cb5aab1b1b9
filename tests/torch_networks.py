"""The architectures as a PyTorch user would write them, from the papers and the report, not from minidl's models.

The names of parameters and running statistics are minidl's, so that weights go from one to the other by state_dict.
Flattening is PyTorch's: (N, C, H, W) -> (N, C*H*W), a channel's pixels side by side, as minidl's Linear reads
(C, H, W, N). Each ReLU and pool is a module, so that kinks.py can hook into it.
"""

from collections import OrderedDict

import torch
from torch import nn
from torch.nn import functional as F


def sequence(**modules):
    return nn.Sequential(OrderedDict(modules))


def bottleneck(inputs, width, outputs, stride, groups):
    """The convolutions of a ResNeXt block but for its last batch norm, which stands before the sum."""
    return sequence(conv1=nn.Conv2d(inputs, width, 1, bias=False), bn1=nn.BatchNorm2d(width), relu1=nn.ReLU(),
                    conv2=nn.Conv2d(width, width, 3, stride, padding=1, groups=groups, bias=False),
                    bn2=nn.BatchNorm2d(width), relu2=nn.ReLU(), conv3=nn.Conv2d(width, outputs, 1, bias=False))


class ResidualBlock(nn.Module):
    """relu(norm(body(x)) + shortcut(x)); shortcut None is the identity."""

    def __init__(self, body, channels, shortcut=None):
        super().__init__()
        self.body, self.norm, self.shortcut, self.relu = body, nn.BatchNorm2d(channels), shortcut, nn.ReLU()

    def forward(self, x):
        return self.relu(self.norm(self.body(x)) + (self.shortcut(x) if self.shortcut else x))


# ---- SimpleNet v1 ------------------------------------------------------------------------------------------------

SIMPLENETS = {  # channels-kernel of each convolution, P a 2x2 max-pool
    "simplenet-5m": "64-3 128-3 128-3 128-3 P 128-3 128-3 256-3 P 256-3 256-3 P 512-3 2048-1 256-1 P 256-3",
    "simplenet-310k": "64-3 32-3 32-3 32-3 P 32-3 32-3 64-3 P 64-3 64-3 P 128-3 256-1 64-1 P 64-3",
    "simplenet-460k": "32-3 32-3 32-3 64-3 P 64-3 64-3 64-3 P 64-3 64-3 P 96-3 96-3 96-3 P 100-1",
}


def simplenet(name, classes=100, form="pytorch", extra_pool=False):
    """form "caffe": no batch norm on layers 11 to 13, and layer 7 is pooled before its batch norm.
    extra_pool: another pool, after layer 10.
    """
    parts, channels, number, words = {}, 3, 0, SIMPLENETS[name].split()
    for word, following in zip(words, [*words[1:], ""]):
        if word == "P":
            continue
        number += 1
        outputs, kernel = map(int, word.split("-"))
        norm = {} if form == "caffe" and number > 10 else {f"bn{number}": nn.BatchNorm2d(outputs, momentum=0.05)}
        relu = {f"relu{number}": nn.ReLU()}
        pool = {f"pool{number}": nn.MaxPool2d(2)} if following == "P" or (extra_pool and number == 10) else {}
        parts[f"conv{number}"] = nn.Conv2d(channels, outputs, kernel, padding=kernel // 2)
        parts |= pool | norm | relu if form == "caffe" and number == 7 else norm | relu | pool
        channels = outputs
    return sequence(**parts, pool=nn.AdaptiveMaxPool2d(1), flatten=nn.Flatten(), classifier=nn.Linear(channels, classes))


# ---- ResNeXt-29 and Res2NeXt-29 ----------------------------------------------------------------------------------


class PaddedShortcut(nn.Module):
    """Shortcut A: every stride-th pixel, and channels of zeros behind those that there are."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.pool, self.more = nn.AvgPool2d(1, stride), outputs - inputs

    def forward(self, x):
        return F.pad(self.pool(x), (0, 0, 0, 0, 0, self.more))


def shortcut(kind, inputs, outputs, stride):
    """A: never a projection; B: a projection where the channels change; C: always."""
    if kind == "C" or (kind == "B" and inputs != outputs):
        return sequence(conv=nn.Conv2d(inputs, outputs, 1, stride, bias=False), bn=nn.BatchNorm2d(outputs))
    return None if inputs == outputs else PaddedShortcut(inputs, outputs, stride)


def network29(block, classes):
    """The nine blocks block(n, inputs, outputs, stride) of ResNeXt-29, with its stem and head."""
    parts, inputs = {}, 64
    for stage, n in enumerate((64, 128, 256), start=1):
        blocks = []
        for i in range(3):
            blocks.append(block(n, inputs, 4 * n, 2 if stage > 1 and i == 0 else 1))
            inputs = 4 * n
        parts[f"stage{stage}"] = nn.Sequential(*blocks)
    return sequence(conv1=nn.Conv2d(3, 64, 3, padding=1, bias=False), bn1=nn.BatchNorm2d(64), relu1=nn.ReLU(), **parts,
                    pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), classifier=nn.Linear(1024, classes))


def resnext29(cardinality, base_width, classes=100, shortcuts="B"):
    def block(n, inputs, outputs, stride):
        width = cardinality * (n * base_width // 64)
        return ResidualBlock(bottleneck(inputs, width, outputs, stride, cardinality), outputs,
                             shortcut(shortcuts, inputs, outputs, stride))
    return network29(block, classes)


class Split(nn.Module):
    """Batch norm and ReLU, then the 3x3 convolutions of a Res2Net module on its splits.

    Each split takes the result of the one before it, and the last passes; in a stage's first block of form B (`first`)
    the splits are on their own, and the last is averaged.
    """

    def __init__(self, width, scale, cardinality, first=False, stride=1):
        super().__init__()
        self.bn, self.relu, self.first = nn.BatchNorm2d(width * scale), nn.ReLU(), first
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, stride, padding=1, groups=cardinality, bias=False)
                                   for _ in range(scale - 1))
        self.bns = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(scale - 1))
        self.pool = nn.AvgPool2d(3, stride, padding=1, count_include_pad=True)

    def forward(self, x):
        *splits, last = self.relu(self.bn(x)).chunk(len(self.convs) + 1, dim=1)
        ys = []
        for split, conv, bn in zip(splits, self.convs, self.bns):
            x = split + ys[-1] if ys and not self.first else split
            ys.append(self.relu(bn(conv(x))))
        return torch.cat([*ys, self.pool(last) if self.first else last], dim=1)


def res2next29(cardinality, base_width, scale, classes=100, form="A"):
    """form: of the first block of each stage, A a plain ResNeXt block of cardinality * scale groups."""
    def block(n, inputs, outputs, stride):
        width, first = cardinality * (n * base_width // 64), inputs != outputs
        if scale == 1 or (first and form == "A"):
            body = bottleneck(inputs, width * scale, outputs, stride, cardinality * scale)
        else:
            body = sequence(conv1=nn.Conv2d(inputs, width * scale, 1, bias=False),
                            split=Split(width, scale, cardinality, first, stride),
                            conv3=nn.Conv2d(width * scale, outputs, 1, bias=False))
        return ResidualBlock(body, outputs, shortcut("B", inputs, outputs, stride))
    return network29(block, classes)


# ---- Wide ResNet -------------------------------------------------------------------------------------------------


class WideBlock(nn.Module):
    """Batch norm and ReLU before the convolutions. A projection sees the activated input, the identity the raw one."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.bn1, self.relu1 = nn.BatchNorm2d(inputs), nn.ReLU()
        self.body = sequence(conv1=nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), bn2=nn.BatchNorm2d(outputs),
                             relu2=nn.ReLU(), conv2=nn.Conv2d(outputs, outputs, 3, padding=1, bias=False))
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None

    def forward(self, x):
        a = self.relu1(self.bn1(x))
        return self.body(a) + (self.shortcut(a) if self.shortcut else x)


def wide_resnet(depth, k, classes=100):
    parts, inputs = {}, 16
    for group, outputs in enumerate((16 * k, 32 * k, 64 * k), start=1):
        blocks = []
        for i in range((depth - 4) // 6):
            blocks.append(WideBlock(inputs, outputs, 2 if group > 1 and i == 0 else 1))
            inputs = outputs
        parts[f"group{group}"] = nn.Sequential(*blocks)
    return sequence(conv1=nn.Conv2d(3, 16, 3, padding=1, bias=False), **parts, bn=nn.BatchNorm2d(inputs), relu=nn.ReLU(),
                    pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), classifier=nn.Linear(inputs, classes))


# ---- the report's ResNext1-3 -------------------------------------------------------------------------------------

REPORT_STAGES = {1: ((32, 16), (16, 8)), 2: ((64, 32), (32, 16), (16, 8)), 3: ((16, 8), (8, 4), (4, 4)),
                 "text": ((64, 32), (32, 16))}  # (channels of the blocks, channels after the halving convolution)


def report_resnext(stages, classes=100, kernel=3, stride=2, flatten=False, relu_logits=True):
    """kernel, stride: of the convolution that halves the channels at the end of each stage, after its three blocks."""
    inputs, side = stages[0][0], 30  # the stem has no padding
    parts = {"stem": sequence(conv=nn.Conv2d(3, inputs, 3), bn=nn.BatchNorm2d(inputs), relu=nn.ReLU())}
    for stage, (channels, halved) in enumerate(stages, start=1):
        inner = channels // 2
        parts[f"stage{stage}"] = nn.Sequential(*(
            ResidualBlock(bottleneck(channels, inner, channels, 1, min(8, inner)), channels) for _ in range(3)))
        parts[f"halve{stage}"] = sequence(conv=nn.Conv2d(channels, halved, kernel, stride, padding=kernel // 2),
                                          bn=nn.BatchNorm2d(halved), relu=nn.ReLU())
        side = (side - 1) // stride + 1
    head = {} if flatten else {"pool": nn.AdaptiveAvgPool2d(1)}
    features = halved * (side**2 if flatten else 1)
    return sequence(**parts, **head, flatten=nn.Flatten(), classifier=nn.Linear(features, classes),
                    **({"relu": nn.ReLU()} if relu_logits else {}))
