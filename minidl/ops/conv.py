"""Convolution: matrix products with unfolded windows (conv_product.py), and col2im. Formulas: conv.cu.

Where they are faster, 3x3 windows go to conv_tensor_core.py or winograd.py, narrow groups to group_conv.py.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np

from minidl import blas
from minidl.device import Array, array_module, empty
from minidl.kernels import Kernels
from minidl.ops import bias as bias_op
from minidl.ops import chunks, conv_tensor_core, group_conv, winograd
from minidl.ops.conv_product import product_for
from minidl.ops.shapes import check_batch, output_size, result
from minidl.ops.threads import threads_of_row

KERNELS = Kernels("conv.cu")

# Who computes, per array module; cupy's limits are guesses. Measured on two cores of Zen 5 with AVX-512, 3x3, 32x32 pixels,
# batch 32, GFLOP/s of the definition (forward, dweight, dx):
#   channels                 winograd.py      conv_product.py  group_conv.py
#   4 -> 4                   51, 71, 82       70, 73, 68
#   8 -> 8                   203, 195, 224    172, 149, 168
#   16 -> 16                 385, 416, 371    276, 243, 259
#   8 of 4 groups            208, 195, 171    215, 163, 191    234, 241, 197
#   12 of 2 groups           268, 324, 197    215, 238, 183    242, 249, 206
#   24 of 2 groups           386, 464, 318    311, 289, 306    289, 265, 196
#   12 of 8 groups, strides                   141, 180, 76     149, 219, 74
#   16 of 8 groups, strides                   174, 168, 103    165, 146, 81
#   48 of 8 groups, strides                   300, 276, 204    155, 177, 132
WINOGRAD_CHANNELS = {"numpy": 8, "cupy": 16}         # at least so many, in and out, without groups
WINOGRAD_GROUP_CHANNELS = {"numpy": 12, "cupy": 32}  # and of each group
DIRECT_GROUP_CHANNELS = {"numpy": 12, "cupy": 16}    # of a group at most so many, in and out, for group_conv.py
STRETCH = 32  # pixels of a row of cols that one block of im2col copies


def forward(x: Array, weight: Array, bias: Array | None = None, *, stride: int = 1, padding: int = 0,
            groups: int = 1, out: Array | None = None, plus: Array | None = None) -> Array:
    """x (C, H, W, N), weight (O, C/groups, kh, kw), bias (O) -> y (O, H', W', N), written to `out` if given.

    H' = floor((H + 2 * padding - kh) / stride) + 1, W' alike. plus (O, H', W', N): another array that is added, or None; it may
    be `out`. Raises ValueError for shapes that do not fit, groups that do not divide the channels, and a window larger than the
    padded image; TypeError for x and weight of different types, and an `out` that is not contiguous.
    """
    g = _Geometry(x, weight, stride, padding, groups)
    y = result("conv", "out", out, g.out_shape, x)
    _check_addends(y, bias, plus)
    method, settings = _chosen(x, weight, g)
    if method:
        method.forward(x, weight, y, bias, plus, **settings)
    else:
        _multiply(x, product_for(x).pack(g.weight_matrix(weight)), y, bias, plus, g)
    return y


def backward(dy: Array, x: Array, weight: Array, dweight: Array, dbias: Array | None = None, *, stride: int = 1,
             padding: int = 0, groups: int = 1, input_gradient: bool = True, dx: Array | None = None,
             plus: Array | None = None) -> Array | None:
    """dy (O, H', W', N), x and weight as in `forward` -> dx (C, H, W, N), or None without `input_gradient`.

    The result is written to `dx` if given, which may not be dy: that is read until the end. plus (C, H, W, N): another array
    that is added to it, or None; it may be `dx`. Overwrites dweight (O, C/groups, kh, kw) and dbias (O), of the type of
    accumulation: float32 where the others are 16 bits wide. Raises ValueError as `forward`, and where the shape of dy, dweight
    or dbias does not fit; TypeError for a dy of another type than x, and for a dweight or dx that is not contiguous.
    """
    g = _Geometry(x, weight, stride, padding, groups)
    if dy.dtype != x.dtype:
        raise TypeError(f"conv: dy is {dy.dtype}, the input {x.dtype}: convert one with astype")
    if dy.shape != g.out_shape:
        raise ValueError(f"conv: dy has shape {dy.shape}, the output {g.out_shape}")
    dweight = result("conv", "dweight", dweight, weight.shape, weight)
    dx = result("conv", "dx", dx, x.shape, x) if input_gradient else None
    if dx is not None:
        _check_addends(dx, None, plus)
    method, settings = _chosen(x, weight, g)
    if method:
        method.backward_weight(dy, x, dweight, **settings)
    else:
        # (G, O/G, K) = (G, O/G, P) @ (G, P, K)
        product_for(x).weight_gradient(g.out_matrix(dy), x, g, g.weight_matrix(dweight))
    if dx is not None:
        if method and not (method is conv_tensor_core and stride > 1):
            method.backward_x(dy, weight, dx, plus, **settings)
        else:
            _input_gradient(dy, weight, dx, plus, g)
    if dbias is not None:
        bias_op.gradient(dy, dbias)
    return dx


def workspace_bytes(x: Array, weight: Array, *, stride: int, padding: int, groups: int) -> int:
    """Bytes of `cols`, or of what stands for it, that `forward` holds at a time. Of x and weight, only device, shape and
    type matter."""
    g = _Geometry(x, weight, stride, padding, groups)
    method, _ = _chosen(x, weight, g)
    if method is winograd:
        y = array_module(x).broadcast_to(x[:1, :1, :1, :1], g.out_shape)
        return winograd.workspace_bytes(x, y, padding=padding, groups=groups)
    return 0 if method else product_for(x).cols_bytes(x, g, len(weight) // groups)


def _chosen(x: Array, weight: Array, g: _Geometry) -> tuple[ModuleType | None, dict[str, int]]:
    """The module that computes a convolution, with the settings that its functions take; or None, for the products here."""
    module, (narrowest, widest) = array_module(x).__name__, sorted((weight.shape[1], len(weight) // g.groups))
    settings = dict(padding=g.padding, groups=g.groups)
    if conv_tensor_core.applies(x, weight, g.padding, g.groups):
        return conv_tensor_core, {"stride": g.stride, **settings}
    # 16 bits, and TF32's 10 bits of mantissa, are too few for sums of transformed values.
    exact = x.dtype == np.float64 or x.dtype == np.float32 and not blas.allow_tf32
    fewest = (WINOGRAD_GROUP_CHANNELS if g.groups > 1 else WINOGRAD_CHANNELS)[module]
    if g.kernel == (3, 3) and g.stride == 1 and g.padding <= 2 and exact and narrowest >= fewest:
        return winograd, settings
    if g.groups > 1 and widest <= DIRECT_GROUP_CHANNELS[module]:
        return group_conv, {"stride": g.stride, **settings}
    return None, {}


def _check_addends(result: Array, bias: Array | None, plus: Array | None) -> None:
    if bias is not None and bias.shape != result.shape[:1]:
        raise ValueError(f"conv: bias {bias.shape} is not one number for each of the {len(result)} output channels")
    if plus is not None and plus.shape != result.shape:
        raise ValueError(f"conv: plus has shape {plus.shape}, the result {result.shape}")


def _addend(plus: Array | None, result: Array, matrix: Array) -> Array | None:
    """plus as `matrix`, which is the result's: the very same one where plus is the result."""
    return matrix if plus is result else plus if plus is None else plus.reshape(matrix.shape)


def _multiply(x: Array, w: Array, y: Array, bias: Array | None, plus: Array | None, g: _Geometry) -> None:
    """y = weight @ cols of x + bias + plus. w: the weight's matrix, packed."""
    y_matrix = g.out_matrix(y)
    # (G, O/G, P) = (G, O/G, K) @ (G, K, P)
    product_for(x).convolve(w, x, g, y_matrix, bias, _addend(plus, y, y_matrix))


def _input_gradient(dy: Array, weight: Array, dx: Array, plus: Array | None, g: _Geometry) -> None:
    product = product_for(dy)
    if g.pointwise:
        # (G, K, P) = (G, K, O/G) @ (G, O/G, P)
        _multiply(dy, product.pack(g.weight_matrix(weight), transposed=True), dx, None, plus, _of_pixels(dy, g.groups))
    elif g.adjoint_padding is not None:
        # Without strides the adjoint of a convolution is one: what col2im would add up is summed by the product.
        adjoint = _adjoint_weight(weight, g.groups)
        of_dy = _Geometry(dy, adjoint, 1, g.adjoint_padding, g.groups)
        _multiply(dy, product.pack(of_dy.weight_matrix(adjoint)), dx, None, plus, of_dy)
    else:
        _input_gradient_by_col2im(dy, weight, dx, plus, g)


def _adjoint_weight(weight: Array, groups: int) -> Array:
    """weight (O, C/groups, kh, kw) -> (C, O/groups, kh, kw), its windows turned by half a turn."""
    outputs, group_channels, kernel_h, kernel_w = weight.shape
    grouped = weight.reshape(groups, outputs // groups, group_channels, kernel_h, kernel_w)[..., ::-1, ::-1]
    adjoint = grouped.swapaxes(1, 2).reshape(groups * group_channels, outputs // groups, kernel_h, kernel_w)
    return array_module(weight).ascontiguousarray(adjoint)


def _input_gradient_by_col2im(dy: Array, weight: Array, dx: Array, plus: Array | None, g: _Geometry) -> None:
    product, of_dy = product_for(dy), _of_pixels(dy, g.groups)
    outputs = len(dy) // g.groups
    adjoint = product.pack(g.weight_matrix(weight), transposed=True)
    if plus is not None and plus is not dx:
        dx[...] = plus
    covered = 0 if plus is None else g.height  # input rows that hold what is to be added to
    row_bytes = (g.depth + outputs) * g.groups * g.out_width * g.batch * dx.itemsize
    for row_begin, row_end in chunks.split(g.out_height, row_bytes, dx):
        begin, end = row_begin * g.out_width, row_end * g.out_width
        # (G, K, P) = (G, K, O/G) @ (G, O/G, P)
        dcols = empty((g.groups, g.depth, (end - begin) * g.batch), dx.dtype, like=dx)
        product.convolve(adjoint, dy, of_dy, dcols, pixels=(begin, end))
        iy_begin = max(0, min(row_begin * g.stride - g.padding, covered))
        iy_end = g.height if row_end == g.out_height else min((row_end - 1) * g.stride - g.padding + g.kernel[0], g.height)
        if iy_end > iy_begin:
            KERNELS.col2im[g.channels * (iy_end - iy_begin), threads_of_row(g.width, g.batch, dx.itemsize)](
                dcols, dx, g.channels, g.height, g.width, g.out_width, g.batch, *g.kernel, g.stride, g.padding,
                row_begin, row_end - row_begin, iy_begin, covered)
            covered = max(covered, iy_end)


def _of_pixels(dy: Array, groups: int) -> _Geometry:
    """The geometry whose unfolded columns are the pixels of dy: that of a 1x1 convolution."""
    return _Geometry(dy, dy[:, 0, 0, 0].reshape(groups, -1, 1, 1), 1, 0, groups)


class _Geometry:
    """Sizes of one convolution, checked."""

    def __init__(self, x: Array, weight: Array, stride: int, padding: int, groups: int) -> None:
        self.channels, self.height, self.width, self.batch = x.shape
        outputs, group_channels, *kernel = weight.shape
        check_batch("conv", self.batch)
        if x.dtype != weight.dtype:
            raise TypeError(f"conv: the input is {x.dtype}, the weight {weight.dtype}: convert one with astype")
        if groups < 1 or self.channels % groups or outputs % groups:
            raise ValueError(f"conv: {self.channels} input and {outputs} output channels do not divide into {groups} groups")
        if group_channels * groups != self.channels:
            raise ValueError(f"conv: input has {self.channels} channels, weight {weight.shape} "
                             f"with {groups} groups needs {group_channels * groups}")
        self.kernel, self.stride, self.padding, self.groups = tuple(kernel), stride, padding, groups
        self.out_height, self.out_width = output_size("conv", (self.height, self.width), self.kernel, stride, padding)
        self.out_shape = outputs, self.out_height, self.out_width, self.batch
        self.pixels = self.out_height * self.out_width
        self.depth = group_channels * kernel[0] * kernel[1]                # K of each group
        self.positions = self.pixels * self.batch                          # P'
        self.pixel_bytes = self.groups * self.depth * self.batch * x.itemsize  # of cols
        self.pointwise = self.kernel == (1, 1) and stride == 1 and padding == 0
        # The rows of a pointwise one follow each other without a gap: they are copied as one.
        rows = (1, self.pixels, self.pixels) if self.pointwise else (self.height, self.width, self.out_width)
        self.sizes = *rows, self.batch, *self.kernel, stride, padding
        # The padding with which a convolution of dy covers x again; None where there is no such convolution.
        adjoint_is_convolution = stride == 1 and kernel[0] == kernel[1] and padding < kernel[0]
        self.adjoint_padding = kernel[0] - 1 - padding if adjoint_is_convolution else None

    def unfold(self, x: Array, begin: int, end: int) -> Array:
        """The columns of the output pixels begin .. end-1: cols (G, K, P)."""
        columns = (end - begin) * self.batch
        if self.pointwise:
            return x.reshape(self.groups, self.depth, self.positions)[..., begin * self.batch:end * self.batch]
        cols = empty((self.groups, self.depth, columns), x.dtype, like=x)
        threads = threads_of_row(min(STRETCH, end - begin), self.batch, x.itemsize)
        KERNELS.im2col[(self.groups * self.depth, -(-(end - begin) // STRETCH)), threads](
            x, cols, *self.sizes, begin, end - begin, STRETCH, columns)
        return cols

    def weight_matrix(self, weight: Array) -> Array:
        return weight.reshape(self.groups, -1, self.depth)

    def out_matrix(self, y: Array) -> Array:
        return y.reshape(self.groups, -1, self.positions)
