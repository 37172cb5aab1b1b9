"""The layers: each owns its parameters and composes the stateless functions of minidl.ops. What they share is in layer.py.

    net = Sequential(conv=Conv2d(3, 16, 3, padding=1), norm=BatchNorm2d(16, relu=True))
    net.initialize(device.select("cpu"), seed=0)
    y = net.forward(x)
    dx = net.backward(dy)          # and the gradients in net.parameters.grad, overwritten at each backward
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from minidl import initializers
from minidl.device import Array, Device, empty
from minidl.initializers import Initializer
from minidl.kernels import acc_dtype
from minidl.layer import Again, Composition, Layer, Parameter, Shape, Tracer, Value
from minidl.ops import add, avgpool, batchnorm, conv, dropout, linear, maxpool, relu
from minidl.ops.shapes import check_pool_padding, check_sizes, check_window, output_size, pair

# ---- layers with parameters --------------------------------------------------------------------------------------


class Conv2d(Layer):
    """Convolution: x (C, H, W, N) -> y (O, H', W', N), H' = floor((H + 2 * padding - kh) / stride) + 1.

    weight (O, C/groups, kh, kw), by default He's normal initialization over the fan-in; bias (O), at first 0. Raises ValueError
    for groups that do not divide the channels, and for sizes that are none.
    """

    keeps = ("x",)

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, ...] | list[int], stride: int = 1,
                 padding: int = 0, groups: int = 1, bias: bool = True,
                 initializer: Initializer = initializers.he_normal()) -> None:
        self.kernel_size = pair(kernel_size)
        check_window("Conv2d", self.kernel_size, stride, padding)
        check_sizes("Conv2d", in_channels=in_channels, out_channels=out_channels, groups=groups)
        for what, channels in (("input", in_channels), ("output", out_channels)):
            if channels % groups:
                raise ValueError(f"Conv2d: {channels} {what} channels do not divide into {groups} groups")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.stride, self.padding = stride, padding
        self.weight = Parameter((out_channels, in_channels // groups, *self.kernel_size), initializer)
        self.bias = Parameter((out_channels,), initializers.zeros) if bias else None
        self.input_gradient = True

    def output_shape(self, shape: Shape) -> Shape:
        self._fits(shape, self.in_channels)
        return self.out_channels, *output_size("Conv2d", shape[1:], self.kernel_size, self.stride, self.padding)

    def macs(self, shape: Shape) -> int:
        return self.weight.size * math.prod(self.output_shape(shape)[1:])

    def skip_input_gradient(self) -> None:
        self.input_gradient = False

    def forget_input(self, again: Again) -> None:
        if self._saved:
            self._saved = (again,)

    def forward(self, x: Array, plus: Array | None = None) -> Array:
        """As Layer.forward; adds `plus` (O, H', W', N) if given."""
        self._fits(x.shape[:-1], self.in_channels)
        self._save(x)
        return conv.forward(x, self.weight.data, self.bias and self.bias.master,
                            stride=self.stride, padding=self.padding, groups=self.groups, plus=plus)

    def backward(self, dy: Array, dx: Array | None = None, plus: Array | None = None, centred: bool = False) -> Any:
        """As Layer.backward; adds `plus` and writes to `dx` (C, H, W, N) if given, which may be the same. centred: see
        `backward_of`."""
        (x,) = self._take()
        if centred and self.bias:
            self.bias.grad[...] = 0
        return conv.backward(dy, x() if callable(x) else x, self.weight.data, self.weight.grad,
                             self.bias.grad if self.bias and not centred else None, stride=self.stride, padding=self.padding,
                             groups=self.groups, input_gradient=self.input_gradient, dx=dx, plus=plus)


class BatchNorm2d(Layer):
    """Batch normalization over (H, W, N) of each channel, optionally with the ReLU that follows it.

    weight (gamma) and bias (beta) (C); running_mean, running_var (C), the variance unbiased, move by `momentum`
    towards each batch (0.1 keeps 90 %). `forward(x, z)` is max(norm(x) + z, 0), the end of a residual block; its
    backward then returns (dx, dz).
    """

    buffer_names = ("running_mean", "running_var")
    keeps = ("x", "statistics")  # and "y" of a forward with z
    running_mean: Array
    running_var: Array

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1, relu: bool = False,
                 initializer: Initializer = initializers.ones) -> None:
        """initializer: of gamma."""
        check_sizes("BatchNorm2d", channels=channels)
        self.channels, self.eps, self.momentum, self.relu = channels, eps, momentum, relu
        self.weight = Parameter((channels,), initializer)
        self.bias = Parameter((channels,), initializers.zeros)

    def prepare(self, device: Device, dtype: np.dtype[Any], key: int, index: int, step: Array) -> None:
        self.running_mean = device.xp.zeros(self.channels, acc_dtype(dtype))
        self.running_var = device.xp.ones(self.channels, acc_dtype(dtype))

    def output_shape(self, shape: Shape) -> Shape:
        self._fits(shape, self.channels)
        return shape

    def forward(self, x: Array, z: Array | None = None, out: Array | None = None) -> Array:
        """As Layer.forward; writes to `out` (C, H, W, N) if given."""
        self._fits(x.shape[:-1], self.channels)
        y, mean, rstd = batchnorm.forward(
            x, self.weight.master, self.bias.master, self.running_mean, self.running_var,
            training=self.training, momentum=self.momentum, eps=self.eps, relu=self.relu, z=z, out=out)
        self._save(x, mean, rstd, y if z is not None else None)
        return y

    def remakes_output(self, remakes_input: bool) -> bool:
        return True  # but not that of a forward with z

    def output_again(self, channels: slice = slice(None)) -> Again | None:
        """As in Layer; of some channels only."""
        if not self._saved or self._saved[3] is not None:
            return None  # with z, y is kept: its sign is needed
        x, mean, rstd, _ = self._saved
        per_channel = [array[channels] for array in (self.weight.master, self.bias.master, mean, rstd)]
        return lambda out=None: batchnorm.apply(x[channels], *per_channel, relu=self.relu, out=out)

    def backward(self, dy: Array, plus: Array | None = None) -> Any:  # dx, or (dx, dz)
        """As Layer.backward; adds `plus` (C, H, W, N) to dx if given, after a forward without z."""
        x, mean, rstd, y = self._take()
        return batchnorm.backward(dy, x, self.weight.master, self.bias.master, mean, rstd, self.weight.grad,
                                  self.bias.grad, training=True, relu=self.relu, y=y, plus=plus)


class Linear(Layer):
    """Fully connected: x (C, H, W, N), C*H*W = in_features, or (in_features, N) -> y (out_features, N)."""

    keeps = ("x",)

    def __init__(self, in_features: int, out_features: int, bias: bool = True,
                 initializer: Initializer = initializers.uniform_fan_in(), bias_initializer: Initializer | None = None) -> None:
        """bias_initializer: by default uniform within 1 / sqrt(in_features)."""
        check_sizes("Linear", in_features=in_features, out_features=out_features)
        self.in_features, self.out_features = in_features, out_features
        self.weight = Parameter((out_features, in_features), initializer)
        self.bias = Parameter((out_features,), bias_initializer or initializers.uniform_fan_in(in_features)) if bias else None
        self.input_gradient = True

    def output_shape(self, shape: Shape) -> Shape:
        if math.prod(shape) != self.in_features:
            raise ValueError(f"Linear: {self.in_features} input features are needed, got {tuple(shape)}")
        return (self.out_features,)

    def macs(self, shape: Shape) -> int:
        return self.weight.size

    def skip_input_gradient(self) -> None:
        self.input_gradient = False

    def forward(self, x: Array) -> Array:
        self.output_shape(x.shape[:-1])
        self._save(x)
        return linear.forward(x.reshape(self.in_features, -1), self.weight.data, self.bias and self.bias.master)

    def backward(self, dy: Array) -> Array | None:
        (x,) = self._take()
        dx = linear.backward(dy, x.reshape(self.in_features, -1), self.weight.data, self.weight.grad,
                             self.bias and self.bias.grad, input_gradient=self.input_gradient)
        return dx.reshape(x.shape) if dx is not None else None


# ---- layers without parameters -----------------------------------------------------------------------------------


class ReLU(Layer):
    """max(x, 0). After a BatchNorm2d, its `relu=True` does the same in one pass less."""

    keeps = ("y",)

    def forward(self, x: Array) -> Array:
        y = relu.forward(x)
        self._save(y)
        return y

    def backward(self, dy: Array) -> Array:
        (y,) = self._take()
        return relu.backward(dy, y)


class _Pool2d(Layer):
    """A window that slides over each channel; its stride is its size unless given, its padding at most half of it."""

    def __init__(self, kernel_size: int | tuple[int, ...] | list[int], stride: int | None = None, padding: int = 0) -> None:
        self.kernel_size, self.padding = pair(kernel_size), padding
        self.stride = self.kernel_size[0] if stride is None else stride
        if stride is None and self.kernel_size[0] != self.kernel_size[1]:
            raise ValueError(f"{type(self).__name__}: window {self.kernel_size} is not square and needs a stride")
        check_window(type(self).__name__, self.kernel_size, self.stride, padding)
        check_pool_padding(type(self).__name__, self.kernel_size, padding)

    def output_shape(self, shape: Shape) -> Shape:
        self._fits(shape)
        return shape[0], *output_size(type(self).__name__, shape[1:], self.kernel_size, self.stride, self.padding)


class MaxPool2d(_Pool2d):
    """Maximum over windows. Of equal values the first in reading order gets the gradient."""

    keeps = ("winner",)

    def forward(self, x: Array) -> Array:
        y, winner = maxpool.forward(x, self.kernel_size, self.stride, self.padding)
        self._save(winner, x.shape)
        return y

    def backward(self, dy: Array) -> Array:
        winner, x_shape = self._take()
        return maxpool.backward(dy, winner, x_shape, self.kernel_size, self.stride, self.padding)


class AvgPool2d(_Pool2d):
    """Mean over windows; zeros of the padding count."""

    def forward(self, x: Array, out: Array | None = None) -> Array:
        """As Layer.forward; writes to `out` (C, H', W', N) if given."""
        self._save(x.shape)
        return avgpool.forward(x, self.kernel_size, self.stride, self.padding, out)

    def backward(self, dy: Array, dx: Array | None = None) -> Array:
        """As Layer.backward; writes to `dx` (C, H, W, N) if given."""
        (x_shape,) = self._take()
        return avgpool.backward(dy, x_shape, self.kernel_size, self.stride, self.padding, dx)


class GlobalMaxPool2d(Layer):
    """Maximum over all pixels: x (C, H, W, N) -> y (C, 1, 1, N)."""

    keeps = ("winner",)

    def output_shape(self, shape: Shape) -> Shape:
        self._fits(shape)
        return shape[0], 1, 1

    def forward(self, x: Array) -> Array:
        y, winner = maxpool.forward(x, x.shape[1:3], stride=1)
        self._save(winner, x.shape)
        return y

    def backward(self, dy: Array) -> Array:
        winner, x_shape = self._take()
        return maxpool.backward(dy, winner, x_shape, x_shape[1:3], stride=1)


class GlobalAvgPool2d(Layer):
    """Mean over all pixels: x (C, H, W, N) -> y (C, 1, 1, N)."""

    def output_shape(self, shape: Shape) -> Shape:
        self._fits(shape)
        return shape[0], 1, 1

    def forward(self, x: Array) -> Array:
        self._save(x.shape)
        return avgpool.forward(x, x.shape[1:3], stride=1)

    def backward(self, dy: Array) -> Array:
        (x_shape,) = self._take()
        return avgpool.backward(dy, x_shape, x_shape[1:3], stride=1)


class Flatten(Layer):
    """The features of an image, channel by channel: x (C, H, W, N) -> y (C*H*W, N), the same memory. A Linear does without."""

    def output_shape(self, shape: Shape) -> Shape:
        return (math.prod(shape),)

    def forward(self, x: Array) -> Array:
        self._save(x.shape)
        return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])

    def backward(self, dy: Array) -> Array:
        (x_shape,) = self._take()
        return dy.reshape(x_shape)


class ZeroPadChannels(Layer):
    """Channels of zeros after the given ones: x (C, H, W, N) -> y (channels, H, W, N), and of features (F, N) alike."""

    def __init__(self, channels: int) -> None:
        check_sizes("ZeroPadChannels", channels=channels)
        self.channels = channels

    def output_shape(self, shape: Shape) -> Shape:
        if shape[0] > self.channels:
            raise ValueError(f"ZeroPadChannels: {shape[0]} channels are more than {self.channels}")
        return self.channels, *shape[1:]

    def forward(self, x: Array) -> Array:
        y = empty(self.output_shape(x.shape), x.dtype, like=x)
        y[:len(x)], y[len(x):] = x, 0
        self._save(len(x))
        return y

    def backward(self, dy: Array) -> Array:
        (channels,) = self._take()
        return dy[:channels]


class Dropout(Layer):
    """In training, sets each element to 0 with probability `rate` and divides the rest by 1 - rate."""

    keeps = ("step",)
    _apply = staticmethod(dropout.apply)
    _key: int
    _index: int
    _step: Array

    def __init__(self, rate: float) -> None:
        if not 0 <= rate < 1:
            raise ValueError(f"{type(self).__name__}: rate {rate} is not in 0 <= rate < 1")
        self.rate = rate

    def prepare(self, device: Device, dtype: np.dtype[Any], key: int, index: int, step: Array) -> None:
        self._key, self._index, self._step = key, index, step

    def forward(self, x: Array) -> Array:
        if not self.training or self.rate == 0:
            self._save(None, None)
            return x
        # A copy: the step may have moved on when backward draws the same mask again.
        step = self._step.copy()
        self._save(step, None)
        return self._apply(x, self.rate, self._key, self._index, step)

    def forget_input(self, again: Again) -> None:
        if self._saved:
            self._saved = (self._saved[0], again)

    def remakes_output(self, remakes_input: bool) -> bool:
        return remakes_input

    def output_again(self) -> Again | None:
        step, again = self._saved or (None, None)
        if again is None or step is None:
            return again
        return lambda: self._apply(again(), self.rate, self._key, self._index, step)

    def backward(self, dy: Array) -> Array:
        step, _ = self._take()
        return dy if step is None else self._apply(dy, self.rate, self._key, self._index, step)


class ChannelDropout(Dropout):
    """Dropout of whole channels: one decision for each channel of each image."""

    def output_shape(self, shape: Shape) -> Shape:
        self._fits(shape)
        return shape

    _apply = staticmethod(dropout.apply_to_channels)


# ---- compositions ------------------------------------------------------------------------------------------------


class Sequential(Composition):
    """Layers one after another: Sequential(a, b) names them "0", "1"; Sequential(conv=a, norm=b) as given."""

    def __init__(self, *layers: Layer, **named_layers: Layer) -> None:
        if not layers and not named_layers:
            raise ValueError("Sequential: there are no layers")
        for name, layer in {**{str(i): layer for i, layer in enumerate(layers)}, **named_layers}.items():
            if not isinstance(layer, Layer):
                raise TypeError(f"Sequential: {name} is {layer!r}, not a Layer")
            if hasattr(self, name) or name in Layer.__annotations__:
                raise ValueError(f"Sequential: a layer cannot be named {name!r}")
            setattr(self, name, layer)

    def trace(self, x: Value, tracer: Tracer[Value]) -> Value:
        for layer in self:
            x = layer.trace(x, tracer)
        return x

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.children().values())

    def skip_input_gradient(self) -> None:
        next(iter(self)).skip_input_gradient()

    def forward(self, x: Array, plus: Array | None = None) -> Array:
        """As Layer.forward; adds `plus`, like y, if given."""
        again, layers = None, list(self)
        for number, layer in enumerate(layers, start=1):
            x = layer.forward(x) if plus is None or number < len(layers) else forward_plus(layer, x, plus)
            if again:
                layer.forget_input(again)
            again = layer.output_again()
        return x

    def forget_input(self, again: Again) -> None:
        for layer in self:
            layer.forget_input(again)
            # A dropout can make its output again only since it was told how its input is made.
            output_again = layer.output_again()
            if not output_again:
                break
            again = output_again

    def output_again(self) -> Again | None:
        return list(self)[-1].output_again()

    def backward(self, dy: Array, plus: Array | None = None, dx: Array | None = None, centred: bool = False) -> Any:
        """As Layer.backward; adds `plus`, like dx, if given. dx, centred: see `backward_of`."""
        first, *others = self
        for layer in reversed(others):
            dy, centred = backward_of(layer, dy, centred=centred), _centres(layer)
        return backward_of(first, dy, plus, dx, centred)


def _centres(layer: Layer) -> bool:
    """Whether what `layer.backward` returns is centred: see `backward_of`."""
    return isinstance(layer, BatchNorm2d) or isinstance(layer, Sequential) and _centres(next(iter(layer)))


def forward_plus(layer: Layer, x: Array, plus: Array) -> Array:
    """layer.forward(x) + plus, in one pass where the layer can."""
    if isinstance(layer, (Conv2d, Sequential)):
        return layer.forward(x, plus=plus)
    return add.forward(layer.forward(x), plus)


def backward_of(layer: Layer, dy: Array, plus: Array | None = None, dx: Array | None = None, centred: bool = False) -> Any:
    """layer.backward(dy) + plus, in one pass where the layer can.

    dx: an array in no place of which dy is, which the result may be written to: it may be plus. Or None. centred: each channel
    of dy is known to add up to 0, as it comes from a batch norm. That takes the mean out, and with it a bias in front of it,
    whose gradient is 0: the sum over dy would be a pass over it for rounding errors, of which Adam makes whole steps.
    """
    if isinstance(layer, (Conv2d, Sequential)) and (centred or plus is not None):
        return layer.backward(dy, plus=plus, dx=dx, centred=centred)
    if plus is None:
        return layer.backward(dy)
    if isinstance(layer, BatchNorm2d):
        return layer.backward(dy, plus=plus)
    return add.forward(layer.backward(dy), plus)


class Residual(Composition):
    """y = body(x) + shortcut(x), or with `norm`, a BatchNorm2d, y = max(norm(body(x)) + shortcut(x), 0).

    shortcut: a Layer, or None for the identity.
    """

    def __init__(self, body: Layer, shortcut: Layer | None = None, norm: BatchNorm2d | None = None) -> None:
        self.body, self.norm, self.shortcut = body, norm, shortcut

    def trace(self, x: Value, tracer: Tracer[Value]) -> Value:
        y = self.body.trace(x, tracer)
        z = self.shortcut.trace(x, tracer) if self.shortcut else x
        return tracer.layer(self.norm, y, z) if self.norm else tracer.add(y, z)

    def forward(self, x: Array) -> Array:
        z = self.shortcut.forward(x) if self.shortcut else x
        return self.norm.forward(self.body.forward(x), z) if self.norm else forward_plus(self.body, x, z)

    def forget_input(self, again: Again) -> None:
        self.body.forget_input(again)
        if self.shortcut:
            self.shortcut.forget_input(again)

    def backward(self, dy: Array) -> Array:
        dz = dy
        if self.norm:
            dy, dz = self.norm.backward(dy)
        plus = self.shortcut.backward(dz) if self.shortcut else dz
        # Without norm, plus is, or may be a part of, what the caller goes on reading.
        return backward_of(self.body, dy, plus, dx=plus if self.norm else None, centred=self.norm is not None)
