"""Convolution: im2col and matrix products, in chunks of output rows. Formulas: conv.cu."""

from minidl.blas import gemm
from minidl.device import array_module, empty
from minidl.kernels import Kernels
from minidl.ops import bias as bias_op
from minidl.ops.window import output_size, threads_along

KERNELS = Kernels("conv.cu")

# Bytes of `cols` at a time, per array module. A whole layer's would need gigabytes; a chunk that stays in the
# cache (L3 of a CPU, L2 of a GPU) is also the fastest.
WORKSPACE_BYTES = {"numpy": 16 << 20, "cupy": 128 << 20}


def forward(x, weight, bias=None, *, stride=1, padding=0, groups=1):
    """x (C, H, W, N), weight (O, C/groups, kh, kw), bias (O) -> y (O, H', W', N).

    H' = floor((H + 2 * padding - kh) / stride) + 1, W' alike. Raises ValueError for shapes that do not fit, groups
    that do not divide the channels, and a window larger than the padded image.
    """
    geometry = _Geometry(x.shape, weight.shape, x.dtype.itemsize, array_module(x), stride, padding, groups)
    y = empty(geometry.out_shape, x.dtype, like=x)
    w_matrix, y_matrix = geometry.weight_matrix(weight), geometry.out_matrix(y)
    for chunk in geometry.chunks():
        # (G, O/G, P) = (G, O/G, K) @ (G, K, P)
        gemm(w_matrix, _unfold(x, geometry, chunk), y_matrix[:, :, chunk.columns])
        if bias is not None:
            bias_op.add(y, bias, chunk.columns)
    return y


def backward(dy, x, weight, dweight, dbias=None, *, stride=1, padding=0, groups=1, input_gradient=True):
    """dy (O, H', W', N), x and weight as in `forward` -> dx (C, H, W, N), or None without `input_gradient`.

    Overwrites dweight (O, C/groups, kh, kw) and dbias (O), which may be float32 where the others are 16 bits wide.
    """
    geometry = _Geometry(x.shape, weight.shape, x.dtype.itemsize, array_module(x), stride, padding, groups)
    dy_matrix, dw_matrix = geometry.out_matrix(dy), geometry.weight_matrix(dweight)
    for chunk in geometry.chunks():
        # (G, O/G, K) += (G, O/G, P) @ (G, P, K)
        cols = _unfold(x, geometry, chunk)
        gemm(dy_matrix[:, :, chunk.columns], cols.transpose(0, 2, 1), dw_matrix, beta=float(chunk.row_begin > 0))
    if dbias is not None:
        bias_op.gradient(dy, dbias)
    if not input_gradient:
        return None
    if geometry.stride == 1 and not geometry.pointwise and geometry.full_padding is not None:
        # Without strides, the adjoint of a convolution is one: half the time of col2im (benchmarks/results).
        return forward(dy, _adjoint_weight(weight, groups), padding=geometry.full_padding, groups=groups)
    return _input_gradient(dy_matrix, x, weight, geometry)


def _unfold(x, geometry, chunk):
    """The chunk's columns: cols (G, K, P)."""
    g = geometry
    if g.pointwise:
        return x.reshape(g.groups, -1, g.positions)
    cols = empty((g.groups, g.depth, chunk.row_count * g.out_width * g.batch), x.dtype, like=x)
    KERNELS.im2col[(g.groups * g.depth, chunk.row_count), threads_along(g.batch)](
        x, cols, g.height, g.width, g.out_width, g.batch, *g.kernel, g.stride, g.padding, chunk.row_begin, chunk.row_count)
    return cols


def _adjoint_weight(weight, groups):
    """weight (O, C/groups, kh, kw) -> (C, O/groups, kh, kw), its windows turned by half a turn."""
    outputs, group_channels, kernel_h, kernel_w = weight.shape
    grouped = weight.reshape(groups, outputs // groups, group_channels, kernel_h, kernel_w)[..., ::-1, ::-1]
    adjoint = grouped.swapaxes(1, 2).reshape(groups * group_channels, outputs // groups, kernel_h, kernel_w)
    return array_module(weight).ascontiguousarray(adjoint)


def _input_gradient(dy_matrix, x, weight, geometry):
    g = geometry
    dx = empty(x.shape, x.dtype, like=x)
    w_transposed = g.weight_matrix(weight).transpose(0, 2, 1)
    covered = 0  # input rows that hold sums already
    for chunk in g.chunks():
        # (G, K, P) = (G, K, O/G) @ (G, O/G, P)
        if g.pointwise:
            gemm(w_transposed, dy_matrix, dx.reshape(g.groups, -1, g.positions))
            break
        dcols = empty((g.groups, g.depth, chunk.row_count * g.out_width * g.batch), x.dtype, like=x)
        gemm(w_transposed, dy_matrix[:, :, chunk.columns], dcols)
        row_end = chunk.row_begin + chunk.row_count
        iy_begin = max(0, min(chunk.row_begin * g.stride - g.padding, covered))
        iy_end = g.height if row_end == g.out_height else min((row_end - 1) * g.stride - g.padding + g.kernel[0], g.height)
        if iy_end > iy_begin:
            KERNELS.col2im[g.channels * (iy_end - iy_begin), threads_along(g.batch)](
                dcols, dx, g.channels, g.height, g.width, g.out_width, g.batch, *g.kernel, g.stride, g.padding,
                chunk.row_begin, chunk.row_count, iy_begin, covered)
            covered = max(covered, iy_end)
    return dx


class _Chunk:
    """A range of output rows, and its columns in the matrix of outputs."""

    def __init__(self, row_begin, row_count, columns_per_row):
        self.row_begin, self.row_count = row_begin, row_count
        self.columns = slice(row_begin * columns_per_row, (row_begin + row_count) * columns_per_row)


class _Geometry:
    """Sizes of one convolution, checked."""

    def __init__(self, x_shape, weight_shape, itemsize, module, stride, padding, groups):
        self.channels, self.height, self.width, self.batch = x_shape
        outputs, group_channels, *kernel = weight_shape
        if groups < 1 or self.channels % groups or outputs % groups:
            raise ValueError(f"conv: {self.channels} input and {outputs} output channels do not divide into {groups} groups")
        if group_channels * groups != self.channels:
            raise ValueError(f"conv: input has {self.channels} channels, weight {tuple(weight_shape)} "
                             f"with {groups} groups needs {group_channels * groups}")
        self.kernel, self.stride, self.padding, self.groups = tuple(kernel), stride, padding, groups
        self.out_height, self.out_width = output_size("conv", (self.height, self.width), self.kernel, stride, padding)
        self.out_shape = outputs, self.out_height, self.out_width, self.batch
        self.depth = group_channels * kernel[0] * kernel[1]                # K of each group
        self.positions = self.out_height * self.out_width * self.batch     # P'
        self.pointwise = self.kernel == (1, 1) and stride == 1 and padding == 0
        # The padding with which a convolution of dy covers x again, where that is one number and not negative.
        square = kernel[0] == kernel[1] and padding < kernel[0]
        self.full_padding = kernel[0] - 1 - padding if square else None
        self._limit, self._itemsize = WORKSPACE_BYTES[module.__name__], itemsize

    def weight_matrix(self, weight):
        return weight.reshape(self.groups, -1, self.depth)

    def out_matrix(self, y):
        return y.reshape(self.groups, -1, self.positions)

    def chunks(self):
        """Ranges of output rows whose cols fit the workspace: as few as possible, of nearly equal size."""
        columns_per_row = self.out_width * self.batch
        row_bytes = self.groups * self.depth * columns_per_row * self._itemsize
        fitting = max(1, self._limit // row_bytes)
        count = 1 if self.pointwise else -(-self.out_height // fitting)
        bounds = [self.out_height * i // count for i in range(count + 1)]
        return [_Chunk(begin, end - begin, columns_per_row) for begin, end in zip(bounds, bounds[1:])]
