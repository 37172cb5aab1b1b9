"""Res2NeXt-29: ResNeXt-29 with the Res2Net module. Gao et al., "Res2Net: a new multi-scale backbone architecture",
arXiv 1904.01169.

Stem, stages, shortcuts and head are ResNeXt's (resnext.py). "c x w x s" has cardinality c, base width w and scale s; in
a block, D = floor(n * w / 64) channels a group, W = c * D channels a split, s splits. The 3x3 convolution becomes a ladder:

    x - conv 1x1, W*s - BN - ReLU -+- x_1 - conv 3x3 - BN - ReLU ------------------+- y_1 -+- conv 1x1, out - BN - (+) - ReLU
                                   |                                    |          |       |
                                   +- x_2 ---------------------------- (+) - conv -+- y_2 -+     each conv 3x3 W -> W in
                                   |                          ...                  |       |     c groups, with its own
                                   +- x_s -----------------------------------------+- y_s -+     BN and ReLU

    y_1 = f_1(x_1),   y_i = f_i(x_i + y_(i-1)) for 1 < i < s,   y_s = x_s

Backward, with g_i the gradient of y_i, for i = s-1 .. 1:  dx_i = f_i'(g_i + dx_(i+1) where 1 < i+1 < s),   dx_s = g_s.

The first block of a stage strides, and has one of two forms. A, which the paper's parameter counts show, is a ResNeXt
block with c*s groups: no ladder. B, of the authors' ImageNet code, is the ladder without its sums; x_s is averaged 3x3.
With s = 1 the network is ResNeXt. Source: github.com/Res2Net/Res2Net-PretrainedModels, res2next.py and issue 36.
"""

from __future__ import annotations

from typing import Any

from minidl.device import Array, empty
from minidl.layer import Again, Composition, Layer, Tracer, Value
from minidl.layers import AvgPool2d, BatchNorm2d, Residual, Sequential
from minidl.ops import add
from models.architecture import Architecture, one_of
from models.resnext import bottleneck, conv, network_of_stages, shortcut_of_type


class Splits(Composition):
    """BN and ReLU, then the 3x3 convolutions of the splits: x (W*s, H, W, N) -> y (W*s, H', W', N)."""

    def __init__(self, width: int, scale: int, groups: int, stride: int = 1) -> None:
        self.width, self.scale = width, scale
        self.bn = BatchNorm2d(width * scale, relu=True)
        self._pairs = [(conv(width, width, 3, stride, groups), BatchNorm2d(width, relu=True)) for _ in range(scale - 1)]
        self.convs = Sequential(*(convolution for convolution, _ in self._pairs))
        self.bns = Sequential(*(bn for _, bn in self._pairs))

    def _channels(self, split: int) -> slice:
        return slice(split * self.width, (split + 1) * self.width)

    def _views(self, x: Array) -> list[Array]:
        """The splits of x: rows of the same memory."""
        return [x[self._channels(i)] for i in range(self.scale)]


class Ladder(Splits):
    """The normal block's: y_i = f_i(x_i + y_(i-1)). Without copies: each y_i takes the place of its x_i, which batch norm
    can make again, and x_s is y_s where it stands. Backward overwrites its dy in the same way."""

    def trace(self, x: Value, tracer: Tracer[Value]) -> Value:
        *splits, last = tracer.split(self.bn.trace(x, tracer), self.scale)
        outputs: list[Value] = []
        for split, (convolution, bn) in zip(splits, self._pairs):
            z = tracer.add(split, outputs[-1]) if outputs else split
            outputs.append(bn.trace(convolution.trace(z, tracer), tracer))
        return tracer.concat([*outputs, last])

    def forward(self, x: Array) -> Array:
        y = self.bn.forward(x)
        self._save(x)
        splits = self._views(y)
        for i, (convolution, bn) in enumerate(self._pairs):
            z = convolution.forward(add.forward(splits[i], splits[i - 1]) if i else splits[0])
            if i == 0 and (again := self.bn.output_again(self._channels(0))):
                convolution.forget_input(again)  # the others keep their sum: nobody else does
            bn.forward(z, out=splits[i])
        return y

    def output_again(self) -> Again | None:
        if not self._saved:
            return None
        (x,) = self._saved
        makers: list[Any] = [*(bn.output_again() for _, bn in self._pairs),
                             self.bn.output_again(self._channels(self.scale - 1))]

        def again() -> Array:
            y = empty(x.shape, x.dtype, like=x)
            for make, split in zip(makers, self._views(y)):
                make(out=split)
            return y

        return again

    def backward(self, dy: Array) -> Array:
        """As Layer.backward, but that dy is overwritten: in its block, nobody else reads it."""
        self._take()
        splits = self._views(dy)
        for i, (convolution, bn) in reversed(list(enumerate(self._pairs))):
            if i < self.scale - 2:
                add.forward(splits[i], splits[i + 1], out=splits[i])
            convolution.backward(bn.backward(splits[i]), dx=splits[i])
        return self.bn.backward(dy)


class Apart(Splits):
    """Form B of a stage's first block: y_i = f_i(x_i), strided; y_s = the 3x3 means of x_s."""

    def __init__(self, width: int, scale: int, groups: int, stride: int) -> None:
        super().__init__(width, scale, groups, stride)
        self.pool = AvgPool2d(3, stride, padding=1)

    def trace(self, x: Value, tracer: Tracer[Value]) -> Value:
        *splits, last = tracer.split(self.bn.trace(x, tracer), self.scale)
        outputs = [bn.trace(convolution.trace(split, tracer), tracer) for split, (convolution, bn) in zip(splits, self._pairs)]
        return tracer.concat([*outputs, self.pool.trace(last, tracer)])

    def forward(self, x: Array) -> Array:
        *splits, last = self._views(self.bn.forward(x))
        y = empty(self.output_shape(x.shape[:-1]) + x.shape[-1:], x.dtype, like=x)
        *outputs, last_output = self._views(y)
        for i, (split, output, (convolution, bn)) in enumerate(zip(splits, outputs, self._pairs)):
            bn.forward(convolution.forward(split), out=output)
            if again := self.bn.output_again(self._channels(i)):
                convolution.forget_input(again)
        self.pool.forward(last, out=last_output)
        self._save(x.shape)
        return y

    def backward(self, dy: Array) -> Array:
        (x_shape,) = self._take()
        dx = empty(x_shape, dy.dtype, like=dy)
        *gradients, last_gradient = self._views(dy)
        *slots, last_slot = self._views(dx)
        for gradient, slot, (convolution, bn) in zip(gradients, slots, self._pairs):
            convolution.backward(bn.backward(gradient), dx=slot)
        self.pool.backward(last_gradient, dx=last_slot)
        return self.bn.backward(dx)


def res2next29(classes: int = 100, *, cardinality: int = 6, width: int = 24, scale: int = 4, form: str = "A") -> Sequential:
    """Res2NeXt-29, c x w x s, for images 3 x 32 x 32 -> Sequential, logits (classes, N). form: A or B, of first blocks."""
    one_of("form", form, "A", "B")

    def block(inputs: int, n: int, outputs: int, stride: int) -> Layer:
        split = cardinality * (n * width // 64)  # W
        first = inputs != outputs
        if scale == 1 or first and form == "A":
            return bottleneck(inputs, split * scale, outputs, stride, cardinality * scale)
        splits = Apart(split, scale, cardinality, stride) if first else Ladder(split, scale, cardinality)
        body = Sequential(conv1=conv(inputs, split * scale, 1), split=splits, conv3=conv(split * scale, outputs, 1))
        return Residual(body, shortcut_of_type("B", inputs, outputs, stride), norm=BatchNorm2d(outputs))

    return network_of_stages(block, classes)


PUBLISHED = {(6, 24, 4): "83.02, 300 epochs", (8, 25, 4): "83.07, 300 epochs", (6, 24, 6): "83.21, 300 epochs"}


def architecture(cardinality: int, width: int, scale: int) -> Architecture:
    """Res2NeXt-29 of any c x w x s."""
    return Architecture(res2next29, dict(cardinality=cardinality, width=width, scale=scale),
                        PUBLISHED.get((cardinality, width, scale), "-"), "arXiv 1904.01169")


ARCHITECTURES = {f"res2next29-{c}c{w}w{s}s": architecture(c, w, s)
                 for c, w, s in ((6, 24, 4), (8, 25, 4), (6, 24, 6), (2, 24, 4), (4, 24, 4), (8, 6, 4), (8, 4, 4))}
