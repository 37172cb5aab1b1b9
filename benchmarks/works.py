"""What the layers of networks do, found by tracing them, as cases to be timed beside NumPy and PyTorch.

A Work is what one layer does at one shape, whatever network it stands in, so that equal work is timed once; its `kernels` are
those of minidl/ops that it launches, on one device or another. Its cases are the passes: functions of minidl and of its peers
that compute the same. `of_network` finds the work of one training step, `others` what the networks of the benchmark leave out.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

import models
from minidl import layers
from minidl.data.dataset import IMAGE_SHAPE
from minidl.kernels import acc_dtype
from minidl.ops import add, augment, avgpool, batchnorm, conv, dropout, linear, loss, maxpool, optimizer, relu

CLASSES = 100
OTHERS = "others"  # in the place of a network's name
NOISE = 4_194_301  # random numbers: a prime, so that no rows of an array are the same


@dataclass
class Case:
    """One pass, and its peers.

    ours, numpy: functions without arguments that return a tuple of arrays; numpy is None where no expression does the same,
    and of use only where the type of storage is that of accumulation, in which it computes.
    torch: functions that return such arrays of PyTorch's, one for each of its layouts, and none without PyTorch.
    bytes: the least traffic of any implementation, each tensor read and written once per pass over it; flops: arithmetic
    operations of the formula, of matrix products two per multiply-accumulate. product: whether these are a matrix product.
    random: nobody draws the same numbers, so that results cannot be compared. also_in: the name of another case of the same
    Work that does this, too, and which a training step has in its place.
    """

    name: str
    ours: object
    bytes: int
    flops: int
    numpy: object = None
    torch: list = field(default_factory=list)
    product: bool = False
    random: bool = False
    also_in: str = ""

    def floor(self, copy, gemm):
        """Seconds at the ceilings: copy in bytes/s, gemm in FLOP/s."""
        return max(self.bytes / copy, self.flops / gemm if self.product else 0)


class Inputs:
    """Makes the arrays of cases: random, on one device, of one type of storage. torch: the module, or None for no such peer."""

    def __init__(self, place, dtype, torch=None):
        self.place, self.xp, self.dtype, self.acc, self.torch = place, place.xp, dtype, acc_dtype(dtype), torch
        self.exact = dtype == self.acc
        self.rng = np.random.default_rng(1)
        noise = self.rng.standard_normal(NOISE, np.float32)
        self._noise = {of: place.array(noise.astype(of)) for of in {dtype, self.acc}}

    def normal(self, *shape):
        return self._normal(shape, self.dtype)

    def master(self, *shape):
        """As `normal`, of the type of accumulation."""
        return self._normal(shape, self.acc)

    def _normal(self, shape, dtype):
        """A part of the noise, again and again: to draw the numbers of a large array on the host takes longer than its row."""
        bits = self._noise[dtype].view(f"u{dtype.itemsize}")  # which CuPy can gather whatever the type
        begin = int(self.rng.integers(NOISE))
        return bits[self.xp.arange(begin, begin + math.prod(shape)) % NOISE].view(dtype).reshape(shape)

    def labels(self, images):
        return self.place.array(self.rng.integers(0, CLASSES, images, np.int32))

    def torch_passes(self, function, images, others=(), dy=None):
        """y = function(*images, *others) in PyTorch, all of the type of storage -> (forward, backward): the first a list of
        functions, one per layout, the second a function from indices of the inputs to such a list, of their gradients.

        images: arrays with the batch last, here first in PyTorch; y and dy are alike.
        """
        if self.torch is None:
            return [], lambda wanted: []
        layouts = ["channels_last"] if self.place.name != "cpu" else ["contiguous_format", "channels_last"]
        peers = [_TorchPass(self, layout, function, images, others, dy) for layout in layouts]
        return [peer.forward for peer in peers], lambda wanted: [peer.backward(wanted) for peer in peers]

    def tensor(self, array, batch_first=False, layout="contiguous_format", dtype=None):
        """An array -> a tensor on the same device, its own copy, of the type of storage unless another is given."""
        tensor = self.torch.as_tensor(array.astype(np.float32), device=self.place.name)
        form = getattr(self.torch, layout if array.ndim == 4 and batch_first else "contiguous_format")
        tensor = tensor.movedim(-1, 0) if batch_first else tensor
        return tensor.to(dtype=dtype or getattr(self.torch, self.dtype.name)).contiguous(memory_format=form)


class _TorchPass:
    """Forward and backward of one function, in one layout."""

    def __init__(self, inputs, layout, function, images, others, dy):
        self.torch, self.function, self.images = inputs.torch, function, len(images)
        tensors = [inputs.tensor(array, True, layout) for array in images] + [inputs.tensor(array) for array in others]
        self.tensors = [tensor.requires_grad_() for tensor in tensors]
        self.dy = None if dy is None else inputs.tensor(dy, True, layout)
        self.y = None

    def forward(self):
        return (batch_last(self.function(*self.tensors)),)

    def backward(self, wanted):
        def gradients():
            if self.y is None:
                self.y = self.function(*self.tensors)
            found = self.torch.autograd.grad(self.y, [self.tensors[i] for i in wanted], self.dy, retain_graph=True)
            return tuple(batch_last(g) if i < self.images else g for i, g in zip(wanted, found))
        return gradients


def batch_last(tensor):
    return tensor.movedim(0, -1)


def text(*sizes):
    return "x".join(map(str, sizes))


class Work:
    """What is timed at one shape. `kind` groups them; `kernels`: names in minidl/ops/*.cu."""

    kind: str
    kernels: tuple

    def cases(self, inputs):
        """The passes, in their order, with arrays from `inputs`."""
        raise NotImplementedError


# ---- matrix products ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Convolution(Work):
    shape: tuple  # (C, H, W, N)
    outputs: int
    kernel: tuple
    stride: int
    padding: int
    groups: int
    bias: bool
    input_gradient: bool

    kind = "convolution"
    kernels = ("im2col", "col2im", "gemm_sizes", "gemm_pack", "conv_panels", "conv_rows", "gemm_rows",
               "winograd_conv", "winograd_input", "winograd_output", "winograd_output_gradient", "winograd_weight",
               "winograd_weight_gradient",
               "group_conv_pack", "group_conv_forward", "group_conv_backward_x", "group_conv_tile_dweight",
               "sum_parts", "conv_tensor_core_pack", "conv_tensor_core_forward_64",
               "conv_tensor_core_forward_128", "conv_tensor_core_dweight_64", "conv_tensor_core_dweight_128",
               "bias_add", "bias_tile_sums")

    def __str__(self):
        more = (f" /{self.stride}" if self.stride > 1 else "") + (f" {self.groups} groups" if self.groups > 1 else "")
        return f"{text(*self.shape[:-1])} > {self.outputs}, {text(*self.kernel)}{more}{' +bias' * self.bias}"

    def cases(self, inputs):
        channels, *_, batch = self.shape
        settings = dict(stride=self.stride, padding=self.padding, groups=self.groups)
        x = inputs.normal(*self.shape)
        weight = inputs.normal(self.outputs, channels // self.groups, *self.kernel)
        bias, dweight, dbias = None, inputs.master(*weight.shape), None
        if self.bias:
            bias, dbias = inputs.master(self.outputs), inputs.master(self.outputs)
        dy = inputs.normal(*conv.forward(x, weight, bias, **settings).shape)
        flops = 2 * weight[0].size * dy.size
        weights = (weight, bias) if self.bias else (weight,)
        torch_forward, torch_backward = inputs.torch_passes(
            lambda x, *weights: inputs.torch.nn.functional.conv2d(x, *weights, **settings), [x], weights, dy)
        gradients = (dweight, dbias) if self.bias else (dweight,)
        of_weights = range(1, 1 + len(weights))

        def backward(input_gradient):
            dx = conv.backward(dy, x, weight, dweight, dbias, input_gradient=input_gradient, **settings)
            return (dx, *gradients) if input_gradient else gradients

        yield Case("conv forward", lambda: (conv.forward(x, weight, bias, **settings),), x.nbytes + weight.nbytes + dy.nbytes,
                   flops, torch=torch_forward, product=True)
        yield Case("conv backward, weight", lambda: backward(False), x.nbytes + dy.nbytes + dweight.nbytes, flops,
                   torch=torch_backward(of_weights), product=True, also_in="conv backward, both" if self.input_gradient else "")
        if self.input_gradient:
            yield Case("conv backward, both", lambda: backward(True),
                       2 * (x.nbytes + dy.nbytes) + weight.nbytes + dweight.nbytes, 2 * flops,
                       torch=torch_backward((0, *of_weights)), product=True)


@dataclass(frozen=True)
class Linear(Work):
    shape: tuple  # (features, N)
    outputs: int
    bias: bool

    kind = "linear"
    kernels = ("gemm_sizes", "gemm_pack", "conv_panels", "conv_rows", "bias_add", "bias_tile_sums", "sum_parts")

    def __str__(self):
        return f"{self.shape[0]} > {self.outputs}"

    def cases(self, inputs):
        x, weight, dy = inputs.normal(*self.shape), inputs.normal(self.outputs, self.shape[0]), inputs.normal(
            self.outputs, self.shape[1])
        dweight = inputs.master(*weight.shape)
        bias, dbias = (inputs.master(self.outputs), inputs.master(self.outputs)) if self.bias else (None, None)
        weights, gradients = ((weight, bias), (dweight, dbias)) if self.bias else ((weight,), (dweight,))
        torch_forward, torch_backward = inputs.torch_passes(
            lambda x, *weights: inputs.torch.nn.functional.linear(x, *weights), [x], weights, dy)
        flops = 2 * weight.size * self.shape[1]
        yield Case("linear forward", lambda: (linear.forward(x, weight, bias),), x.nbytes + weight.nbytes + dy.nbytes, flops,
                   torch=torch_forward, product=True)
        yield Case("linear backward", lambda: (linear.backward(dy, x, weight, dweight, dbias), *gradients),
                   2 * (x.nbytes + dy.nbytes) + weight.nbytes + dweight.nbytes, 2 * flops,
                   torch=torch_backward(range(1 + len(weights))), product=True)


# ---- batch norm --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BatchNorm(Work):
    """add: of a second tensor before the ReLU. training: or evaluation, of forward alone."""

    shape: tuple
    relu: bool
    add: bool
    training: bool = True

    kind = "batch norm"
    kernels = ("bn_forward", "bn_forward_relu", "bn_forward_add_relu",
               "bn_backward", "bn_backward_relu", "bn_backward_add_relu",
               "bn_tile_moments", "bn_normalize", "bn_normalize_relu", "bn_normalize_add_relu",
               "bn_backward_sums", "bn_backward_sums_relu", "bn_backward_sums_add_relu",
               "bn_backward_x", "bn_backward_x_relu", "bn_backward_x_add_relu")

    def __str__(self):
        return text(*self.shape[:-1])

    @property
    def name(self):
        return "batch norm" + "+add" * self.add + "+relu" * (self.relu or self.add)

    def cases(self, inputs):
        xp, eps, channels = inputs.xp, 1e-5, self.shape[0]
        x, dy = inputs.normal(*self.shape), inputs.normal(*self.shape)
        z = inputs.normal(*self.shape) if self.add else None
        gamma, beta = inputs.master(channels), inputs.master(channels)
        running = xp.zeros(channels, inputs.acc), xp.ones(channels, inputs.acc)
        dgamma, dbeta = inputs.master(channels), inputs.master(channels)
        relu_after = self.relu or self.add
        per_channel = gamma[:, None, None, None], beta[:, None, None, None]

        def forward():
            return batchnorm.forward(x, gamma, beta, *running, training=self.training, momentum=0.0, eps=eps,
                                     relu=self.relu, z=z)

        def normalized():
            """xhat and rstd, by NumPy."""
            if not self.training:
                rstd = 1 / xp.sqrt(running[1] + np.float32(eps))[:, None, None, None]
                return (x - running[0][:, None, None, None]) * rstd, rstd
            rstd = 1 / xp.sqrt(x.var(axis=(1, 2, 3), keepdims=True) + np.float32(eps))
            return (x - x.mean(axis=(1, 2, 3), keepdims=True)) * rstd, rstd

        def forward_in_numpy():
            y = per_channel[0] * normalized()[0] + per_channel[1]
            y = y if z is None else y + z
            return (xp.maximum(y, 0) if relu_after else y,)

        function = inputs.torch and inputs.torch.nn.functional

        def in_torch(x, *others):
            *added, gamma, beta = others
            y = function.batch_norm(x, *torch_running, gamma, beta, self.training, 0.0, eps)
            y = y + added[0] if added else y
            return function.relu(y) if relu_after else y

        torch_running = [inputs.tensor(array) for array in running] if inputs.torch else []
        torch_forward, torch_backward = inputs.torch_passes(in_torch, [x, z] if self.add else [x], [gamma, beta], dy)
        name = self.name + ("" if self.training else ", evaluation")
        # Statistics take a pass over x before the one that writes y.
        passes = (3 if self.training else 2) + self.add
        yield Case(f"{name} forward", lambda: forward()[:1], passes * x.nbytes, (6 + relu_after + self.add) * x.size,
                   forward_in_numpy, torch_forward)
        if not self.training:
            return
        y, mean, rstd = forward()

        def backward():
            dx = batchnorm.backward(dy, x, gamma, beta, mean, rstd, dgamma, dbeta, training=True, relu=self.relu,
                                    y=y if self.add else None)
            return (*(dx if self.add else (dx,)), dgamma, dbeta)

        def backward_in_numpy():
            xhat = (x - mean[:, None, None, None]) * rstd[:, None, None, None]
            dz = dy if not relu_after else dy * (y > 0)
            sum_dy = dz.sum(axis=(1, 2, 3), keepdims=True)
            sum_dy_xhat = (dz * xhat).sum(axis=(1, 2, 3), keepdims=True)
            count = np.float32(x.size // channels)
            dx = per_channel[0] * rstd[:, None, None, None] * (dz - (sum_dy + xhat * sum_dy_xhat) / count)
            return (dx, *((dz,) if self.add else ()), sum_dy_xhat.ravel(), sum_dy.ravel())

        # The sums take a pass over x, dy and y where there is an addition, then dx another.
        yield Case(f"{name} backward", backward, (8 if self.add else 5) * x.nbytes,
                   (11 + 4 * self.relu + 2 * self.add) * x.size, backward_in_numpy,
                   torch_backward(range(4 if self.add else 3)))


@dataclass(frozen=True)
class BatchNormAgain(Work):
    """The output made again in backward, for the convolution that did not keep it. PyTorch keeps it."""

    shape: tuple
    relu: bool

    kind = "batch norm"
    kernels = ("bn_apply", "bn_apply_relu")

    def __str__(self):
        return text(*self.shape[:-1])

    def cases(self, inputs):
        x, (gamma, beta, mean, rstd) = inputs.normal(*self.shape), (inputs.master(self.shape[0]) for _ in range(4))

        def in_numpy():
            gamma_, beta_, mean_, rstd_ = (array[:, None, None, None] for array in (gamma, beta, mean, rstd))
            y = gamma_ * ((x - mean_) * rstd_) + beta_
            return (inputs.xp.maximum(y, 0) if self.relu else y,)

        yield Case("batch norm" + "+relu" * self.relu + " again",
                   lambda: (batchnorm.apply(x, gamma, beta, mean, rstd, relu=self.relu),), 2 * x.nbytes,
                   (2 + self.relu) * x.size, in_numpy)


# ---- pooling -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pool(Work):
    """mode: max, or avg. A window as large as the image is a global pool."""

    mode: str
    shape: tuple
    window: tuple
    stride: int
    padding: int

    kind = "pooling"
    kernels = ("maxpool_forward", "maxpool_backward", "avgpool_forward", "avgpool_backward")

    def __str__(self):
        return f"{text(*self.shape[:-1])}, {text(*self.window)}" + (f" /{self.stride}" if self.stride != self.window[0] else "")

    def cases(self, inputs):
        xp, geometry = inputs.xp, (self.window, self.stride, self.padding)
        x = inputs.normal(*self.shape)
        y, *winner = self._forward(x)
        dy = inputs.normal(*y.shape)
        places = [(ky, kx) for ky in range(self.window[0]) for kx in range(self.window[1])]
        rows, columns = (self.stride * (size - 1) + 1 for size in y.shape[1:3])  # from the first window to the last

        def windows(a):
            """The pixels of each window of a (C, H, W, N), as many arrays as a window has pixels."""
            return [a[:, ky:ky + rows:self.stride, kx:kx + columns:self.stride] for ky, kx in places]

        def forward_in_numpy():
            if self.mode == "max":
                return (xp.stack(windows(x)).max(axis=0),)
            return (xp.stack(windows(x)).mean(axis=0),)

        def backward_in_numpy():
            dx = xp.zeros_like(x)
            share = dy / np.float32(len(places))
            first = xp.stack(windows(x)).argmax(axis=0) if self.mode == "max" else None
            for index, pixels in enumerate(windows(dx)):
                pixels[...] = share if first is None else dy * (first == index)
            return (dx,)

        def backward():
            if self.mode == "max":
                return (maxpool.backward(dy, winner[0], x.shape, *geometry),)
            return (avgpool.backward(dy, x.shape, *geometry),)

        apart = not self.padding and (self.stride >= max(self.window) or y.shape[1:3] == (1, 1))
        in_torch = inputs.torch and getattr(inputs.torch.nn.functional, f"{self.mode}_pool2d")
        torch_forward, torch_backward = inputs.torch_passes(lambda x: in_torch(x, *geometry), [x], dy=dy)
        traffic = x.nbytes + y.nbytes + sum(array.nbytes for array in winner)
        yield Case(f"{self.mode}-pool forward", lambda: self._forward(x)[:1], traffic, y.size * len(places),
                   forward_in_numpy if apart else None, torch_forward)
        yield Case(f"{self.mode}-pool backward", backward, traffic, y.size * len(places),
                   backward_in_numpy if apart else None, torch_backward((0,)))

    def _forward(self, x):
        """y, and for a maximum its place."""
        if self.mode == "max":
            return maxpool.forward(x, self.window, self.stride, self.padding)
        return (avgpool.forward(x, self.window, self.stride, self.padding),)


# ---- element by element ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Add(Work):
    """Of two branches, or of two gradients of what both have read."""

    shape: tuple

    kind = "element-wise"
    kernels = ("add",)

    def __str__(self):
        return text(*self.shape[:-1])

    def cases(self, inputs):
        a, b = inputs.normal(*self.shape), inputs.normal(*self.shape)
        yield Case("add", lambda: (add.forward(a, b),), 3 * a.nbytes, a.size, lambda: (a + b,),
                   inputs.torch_passes(lambda a, b: a + b, [a, b])[0])


@dataclass(frozen=True)
class Relu(Work):
    shape: tuple

    kind = "element-wise"
    kernels = ("relu_forward", "relu_backward")

    def __str__(self):
        return text(*self.shape[:-1])

    def cases(self, inputs):
        x, dy = inputs.normal(*self.shape), inputs.normal(*self.shape)
        y = relu.forward(x)
        torch_forward, torch_backward = inputs.torch_passes(lambda x: x.relu(), [x], dy=dy)
        yield Case("relu forward", lambda: (relu.forward(x),), 2 * x.nbytes, x.size, lambda: (inputs.xp.maximum(x, 0),),
                   torch_forward)
        yield Case("relu backward", lambda: (relu.backward(dy, y),), 3 * x.nbytes, x.size, lambda: (dy * (y > 0),),
                   torch_backward((0,)))


@dataclass(frozen=True)
class Dropout(Work):
    """Of elements, or of whole channels. Its backward is the same kernel."""

    shape: tuple
    rate: float
    of_channels: bool

    kind = "element-wise"
    kernels = ("dropout", "dropout_channels")

    def __str__(self):
        return text(*self.shape[:-1])

    def cases(self, inputs):
        x, step = inputs.normal(*self.shape), inputs.xp.zeros(1, np.int64)
        ours = dropout.apply_to_channels if self.of_channels else dropout.apply
        in_torch = inputs.torch and inputs.torch.nn.functional
        torch_forward, _ = inputs.torch_passes(
            lambda x: (in_torch.dropout2d if self.of_channels else in_torch.dropout)(x, self.rate), [x])
        yield Case("channel dropout" if self.of_channels else "dropout", lambda: (ours(x, self.rate, 1, 0, step),),
                   2 * x.nbytes, x.size, torch=torch_forward, random=True)


# ---- once a step -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loss(Work):
    shape: tuple  # (classes, N)

    kind = "loss"
    kernels = ("softmax_cross_entropy",)

    def __str__(self):
        return text(*self.shape)

    def cases(self, inputs):
        xp, (classes, batch) = inputs.xp, self.shape
        logits, labels = inputs.normal(classes, batch), inputs.labels(batch)
        one, totals = xp.ones(1, inputs.acc), xp.zeros(4)

        def in_numpy():
            p = xp.exp(logits - logits.max(axis=0))
            p /= p.sum(axis=0)
            p[labels, xp.arange(batch)] -= 1
            return (p / np.float32(batch),)

        torch_labels = inputs.torch and inputs.tensor(labels, dtype=inputs.torch.long)
        _, torch_backward = inputs.torch_passes(
            lambda x: inputs.torch.nn.functional.cross_entropy(x, torch_labels), [logits])
        yield Case("softmax cross-entropy", lambda: (loss.forward_backward(logits, labels, totals, one),), 2 * logits.nbytes,
                   5 * logits.size, in_numpy, torch_backward((0,)))


@dataclass(frozen=True)
class Augmentation(Work):
    """Shift and flip of a batch, or with `mix` mixup of one."""

    batch: int
    mix: bool = False

    kind = "augmentation"
    kernels = ("augment_draw", "augment_apply", "augment_mix")

    def __str__(self):
        return text(*IMAGE_SHAPE)

    def cases(self, inputs):
        return (self._mix if self.mix else self._shift)(inputs)

    def _shift(self, inputs):
        xp, place, rng, (channels, height, width) = inputs.xp, inputs.place, inputs.rng, IMAGE_SHAPE
        images = place.array(rng.integers(0, 256, (10_000, *IMAGE_SHAPE), dtype=np.uint8))
        labels, indices = inputs.labels(10_000), place.array(rng.permutation(10_000)[:self.batch].astype(np.int32))
        scale, shift, step = inputs.master(channels), inputs.master(channels), xp.zeros(1, np.int64)
        settings = dict(key=1, padding=4, flips=True)
        draws = place.to_host(augment.draw(indices, labels, step, (height, width), **settings)[0])

        def ours():
            drawn, _ = augment.draw(indices, labels, step, (height, width), **settings)
            return (augment.apply(images, indices, drawn, scale, shift, dtype=inputs.dtype),)

        def in_numpy():
            x = images[indices] * scale[:, None, None] + shift[:, None, None]
            x = xp.pad(x, ((0, 0), (0, 0), (4, 4), (4, 4)))
            x = xp.stack([image[:, 4 + dy:4 + dy + height, 4 + dx:4 + dx + width][:, :, ::-1 if flip else 1]
                          for image, dy, dx, flip in zip(x, *draws[:3])])
            return (xp.ascontiguousarray(x.transpose(1, 2, 3, 0)),)

        pixels = self.batch * math.prod(IMAGE_SHAPE)
        yield Case("augmentation", ours, pixels * (1 + inputs.dtype.itemsize), 2 * pixels, in_numpy)

    def _mix(self, inputs):
        x, share = inputs.normal(*IMAGE_SHAPE, self.batch), inputs.place.array([0.75], inputs.acc)
        before = x.copy()

        def ours():
            augment.mix(x, share)
            return (x,)

        yield Case("mixup", ours, 2 * x.nbytes, 3 * x.size,
                   lambda: (share * before + (1 - share) * before[..., ::-1],))


@dataclass(frozen=True)
class Step(Work):
    """An optimizer's, with the norm of the gradient before it, over all parameters."""

    name: str
    size: int

    kind = "optimizer"
    kernels = ("optimizer_tile_squares", "optimizer_norm", "sgd_step", "adam_step", "adadelta_step", "optimizer_advance")

    def __str__(self):
        return f"{self.size:,}"

    def cases(self, inputs):
        xp, lr = inputs.xp, 0.1  # so high that results show what a step has changed
        w, grad = inputs.master(self.size), inputs.master(self.size)
        moments = [xp.zeros_like(w) for _ in range(1 if self.name == "sgd" else 2)]
        data = w if inputs.exact else inputs.normal(self.size)
        state = xp.zeros(optimizer.STATE_SIZE, inputs.acc)
        state[optimizer.LR], state[optimizer.SCALE] = lr, 1
        start = w.copy()
        settings, in_numpy, operations = {
            "sgd": (dict(momentum=0.9, weight_decay=5e-4, nesterov=True), self._sgd, 8),
            "adam": (dict(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0), self._adam, 14),
            "adadelta": (dict(rho=0.9, eps=1e-6, weight_decay=0.0), None, 16)}[self.name]

        def ours():
            optimizer.norm(grad, state)
            getattr(optimizer, self.name)(w, grad, *moments, data, state, **settings)
            optimizer.advance(state, 0)
            return (w,)

        candidates = []
        if inputs.torch:
            weight = inputs.tensor(start, dtype=inputs.torch.float32).requires_grad_()
            weight.grad = inputs.tensor(grad, dtype=inputs.torch.float32)
            of_torch = {"sgd": lambda: inputs.torch.optim.SGD([weight], lr, 0.9, weight_decay=5e-4, nesterov=True),
                        "adam": lambda: inputs.torch.optim.Adam([weight], lr),
                        "adadelta": lambda: inputs.torch.optim.Adadelta([weight], lr, 0.9, 1e-6)}[self.name]()
            candidates = [lambda: (of_torch.step(), (weight,))[1]]
        # w and each moment are read and written, the gradient is read twice, as its norm comes first.
        traffic = (2 + 2 * (1 + len(moments))) * w.nbytes + (0 if data is w else data.nbytes)
        yield Case(f"{self.name} step", ours, traffic, operations * self.size,
                   in_numpy and (lambda: in_numpy(xp, start, grad, np.float32(lr), *map(xp.zeros_like, moments))), candidates)

    @staticmethod
    def _sgd(xp, w, grad, lr, m):
        g = grad + np.float32(5e-4) * w
        velocity = np.float32(0.9) * m + g
        return (w - lr * (g + np.float32(0.9) * velocity),)

    @staticmethod
    def _adam(xp, w, grad, lr, m, v):
        first = np.float32(0.9) * m + np.float32(0.1) * grad
        second = np.float32(0.999) * v + np.float32(0.001) * grad**2
        return (w - lr * (first / np.float32(0.1)) / (xp.sqrt(second / np.float32(0.001)) + np.float32(1e-8)),)


@dataclass(frozen=True)
class Average(Work):
    size: int

    kind = "optimizer"
    kernels = ("optimizer_average",)

    def __str__(self):
        return f"{self.size:,}"

    def cases(self, inputs):
        averages, values, state = inputs.master(self.size), inputs.master(self.size), inputs.xp.zeros(
            optimizer.STATE_SIZE, inputs.acc)

        def ours():
            optimizer.average(averages, values, state, 0.999)
            return (averages,)

        yield Case("average of the weights", ours, 3 * values.nbytes, 3 * self.size)


@dataclass(frozen=True)
class Cast(Work):
    size: int

    kind = "optimizer"
    kernels = ("optimizer_cast",)

    def __str__(self):
        return f"{self.size:,}"

    def cases(self, inputs):
        master, data = inputs.master(self.size), inputs.normal(self.size)

        def ours():
            optimizer.cast(master, data)
            return (data,)

        yield Case("cast of the weights", ours, master.nbytes + data.nbytes, self.size, lambda: (master.astype(inputs.dtype),))


WORKS = tuple(Work.__subclasses__())
PRODUCTS = (Convolution, Linear)


# ---- which there is ----------------------------------------------------------------------------------------------


def of_network(name, batch):
    """The work of a training step of the network, whose batch is there -> Counter of Works."""
    network = models.create(name, CLASSES)
    network.skip_input_gradient()
    tracer = _Tracer(batch)
    network.trace(_Value(IMAGE_SHAPE), tracer)
    size = sum(parameter.size for parameter in network.named_parameters().values())
    return tracer.counts + Counter([Augmentation(batch), Loss((CLASSES, batch)), Step("sgd", size)])


def others(batch):
    """What else there are kernels for: layers that the four networks leave out, evaluation, other optimizers -> Counter."""
    tracer = _Tracer(batch)
    layers.Sequential(layers.Conv2d(128, 128, 3, padding=1, groups=32), layers.ReLU(), layers.Dropout(0.5), layers.AvgPool2d(2)
                      ).trace(_Value((128, 32, 32)), tracer)
    size = 5_521_508  # simplenet-5m
    shape = 128, 32, 32, batch
    return tracer.counts + Counter([BatchNorm(shape, True, False, training=False), BatchNormAgain(shape, False),
                                    Augmentation(batch, mix=True), Step("adam", size), Step("adadelta", size), Average(size),
                                    Cast(size)])


def of(names, batch):
    """The work of all these networks -> {Work: {name: how often}}, products first, then by kind."""
    found = {}
    for name in names:
        for work, count in (others(batch) if name == OTHERS else of_network(name, batch)).items():
            found.setdefault(work, {})[name] = count
    return dict(sorted(found.items(), key=lambda item: WORKS.index(type(item[0]))))


@dataclass
class _Value:
    """An array of the network. again: what makes it again, where it need not be kept; read: whether a layer has read it; and
    whether those who made it, or who read it, add another array to what they give: to it, or to its gradient."""

    shape: tuple
    again: tuple = ()
    read: bool = False
    maker_adds: bool = False
    reader_adds: bool = False


class _Tracer:
    """Counts the work of all layers that it meets."""

    def __init__(self, batch):
        self.batch, self.counts = batch, Counter()

    def layer(self, layer, x, z=None):
        self._read(x, isinstance(layer, (layers.Conv2d, layers.BatchNorm2d)))
        if z is not None:
            self._read(z)
        shape = (*x.shape, self.batch)
        y = _Value(layer.output_shape(x.shape), maker_adds=isinstance(layer, layers.Conv2d))
        if isinstance(layer, layers.Conv2d):
            self.counts.update(x.again)
            self.counts[Convolution(shape, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.groups,
                                    layer.bias is not None, layer.input_gradient)] += 1
        elif isinstance(layer, layers.BatchNorm2d):
            self.counts[BatchNorm(shape, layer.relu, z is not None)] += 1
            y.again = () if z is not None else (BatchNormAgain(shape, layer.relu),)
        elif isinstance(layer, layers.Linear):
            self.counts[Linear((layer.in_features, self.batch), layer.out_features, layer.bias is not None)] += 1
        elif isinstance(layer, layers.Dropout):
            if layer.rate:
                work = Dropout(shape, layer.rate, isinstance(layer, layers.ChannelDropout))
                self.counts[work] += 2  # forward and backward
                y.again = x.again and (*x.again, work)
        elif isinstance(layer, layers.ReLU):
            self.counts[Relu(shape)] += 1
        elif isinstance(layer, (layers.MaxPool2d, layers.AvgPool2d)):
            mode = "max" if isinstance(layer, layers.MaxPool2d) else "avg"
            self.counts[Pool(mode, shape, layer.kernel_size, layer.stride, layer.padding)] += 1
        elif isinstance(layer, (layers.GlobalMaxPool2d, layers.GlobalAvgPool2d)):
            mode = "max" if isinstance(layer, layers.GlobalMaxPool2d) else "avg"
            self.counts[Pool(mode, shape, x.shape[1:], 1, 0)] += 1
        elif not isinstance(layer, (layers.Flatten, layers.ZeroPadChannels)):  # which have no kernel
            raise TypeError(f"{type(layer).__name__}: benchmarks/works.py does not know what it does")
        return y

    def add(self, a, b):
        self._read(a), self._read(b)
        if not (a.maker_adds or b.maker_adds):
            self.counts[Add((*a.shape, self.batch))] += 1
        return _Value(a.shape)

    def split(self, x, sections):
        self._read(x)
        shape = (x.shape[0] // sections, *x.shape[1:])
        return [_Value(shape, tuple(dataclasses.replace(work, shape=(*shape, self.batch)) for work in x.again))
                for _ in range(sections)]

    def concat(self, parts):
        for part in parts:
            self._read(part)
        again = sum((part.again for part in parts), ()) if all(part.again for part in parts) else ()
        return _Value((sum(part.shape[0] for part in parts), *parts[0].shape[1:]), again)

    def _read(self, value, adds=False):
        """Whoever reads it gives back a gradient, and backward adds them up, by itself or by one of those who `adds`."""
        value.reader_adds |= adds
        if value.read and not value.reader_adds:
            self.counts[Add((*value.shape, self.batch))] += 1
        value.read = True
