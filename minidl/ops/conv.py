"""Convolution: im2col and matrix products, in chunks of output pixels; narrow groups directly. Formulas: conv.cu."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from minidl.blas import gemm
from minidl.device import Array, array_module, empty, run_tasks, workers
from minidl.kernels import Kernels
from minidl.ops import bias as bias_op
from minidl.ops import group_conv
from minidl.ops.window import output_size, threads_along

KERNELS = Kernels("conv.cu")

# Bytes of `cols` at a time (on the CPU, of each core), per array module. A whole layer's would need gigabytes; a chunk
# that stays in the cache is also the fastest.
WORKSPACE_BYTES = {"numpy": 4 << 20, "cupy": 128 << 20}
# Groups of at most so many channels, in and out, are computed by group_conv.py, per array module. On two cores of Zen 4
# with AVX-512, 3x3, batch 128, that is 4 times as fast at 4 channels, 1.3 to 1.9 times at 48, 1.1 to 1.5 times at 64; with
# AVX2 alone the two meet near 48. cupy's is a guess.
DIRECT_GROUP_CHANNELS = {"numpy": 50, "cupy": 16}
STRETCH = 32  # pixels of a row of cols that one block of im2col copies


def forward(x: Array, weight: Array, bias: Array | None = None, *, stride: int = 1, padding: int = 0,
            groups: int = 1, out: Array | None = None) -> Array:
    """x (C, H, W, N), weight (O, C/groups, kh, kw), bias (O) -> y (O, H', W', N), written to `out` if given.

    H' = floor((H + 2 * padding - kh) / stride) + 1, W' alike. Raises ValueError for shapes that do not fit, groups
    that do not divide the channels, and a window larger than the padded image.
    """
    g = _Geometry(x, weight, stride, padding, groups)
    y = _result("out", out, g.out_shape, x)
    if g.direct:
        group_conv.forward(x, weight, y, stride=stride, padding=padding, groups=groups)
        if bias is not None:
            bias_op.add(y, bias)
        return y
    w_matrix, y_matrix = g.weight_matrix(weight), g.out_matrix(y)

    def compute(chunks: Sequence[_Chunk]) -> None:
        for chunk in chunks:
            # (G, O/G, P) = (G, O/G, K) @ (G, K, P)
            gemm(w_matrix, _unfold(x, g, chunk), y_matrix[:, :, chunk.columns])
            if bias is not None:
                bias_op.add(y, bias, chunk.columns)

    run_tasks([partial(compute, chunks) for chunks in g.chunks_of_workers()])
    return y


def backward(dy: Array, x: Array, weight: Array, dweight: Array, dbias: Array | None = None, *, stride: int = 1,
             padding: int = 0, groups: int = 1, input_gradient: bool = True, dx: Array | None = None) -> Array | None:
    """dy (O, H', W', N), x and weight as in `forward` -> dx (C, H, W, N), or None without `input_gradient`.

    The result is written to `dx` if given, which may not be dy.

    Overwrites dweight (O, C/groups, kh, kw) and dbias (O), of the type of accumulation: float32 where the others are 16
    bits wide.
    """
    g = _Geometry(x, weight, stride, padding, groups)
    if g.direct:
        group_conv.backward_weight(dy, x, dweight, stride=stride, padding=padding, groups=groups)
    else:
        _weight_gradient(dy, x, dweight, g)
    if dbias is not None:
        bias_op.gradient(dy, dbias)
    if not input_gradient:
        return None
    dx = _result("dx", dx, x.shape, x)
    if g.direct:
        group_conv.backward_x(dy, weight, dx, stride=stride, padding=padding, groups=groups)
        return dx
    if g.adjoint_padding is not None:
        # Without strides, the adjoint of a convolution is one: what col2im would add up is summed by the product.
        return forward(dy, _adjoint_weight(weight, groups), padding=g.adjoint_padding, groups=groups, out=dx)
    return _input_gradient_by_col2im(dy, weight, dx, g)


def workspace_bytes(x: Array, weight: Array, *, stride: int, padding: int, groups: int) -> int:
    """Bytes of `cols` that `forward` holds at a time. Of x and weight, only device, shape and type matter."""
    g = _Geometry(x, weight, stride, padding, groups)
    if g.pointwise or g.direct:
        return 0
    tasks = g.chunks_of_workers()
    largest = max(chunk.pixel_count for chunks in tasks for chunk in chunks)
    return len(tasks) * largest * g.pixel_bytes


def _result(name: str, given: Array | None, shape: tuple[int, ...], like: Array) -> Array:
    """Where a result goes: the array that the caller gave, or a new one."""
    if given is not None and given.shape != shape:
        raise ValueError(f"conv: {name} has shape {given.shape}, the result {shape}")
    return empty(shape, like.dtype, like=like) if given is None else given


def _unfold(x: Array, g: _Geometry, chunk: _Chunk) -> Array:
    """The chunk's columns: cols (G, K, P)."""
    if g.pointwise:
        return x.reshape(g.groups, g.depth, g.positions)[:, :, chunk.columns]
    cols = empty((g.groups, g.depth, chunk.pixel_count * g.batch), x.dtype, like=x)
    KERNELS.im2col[(g.groups * g.depth, -(-chunk.pixel_count // STRETCH)), threads_along(g.batch)](
        x, cols, g.height, g.width, g.out_width, g.batch, *g.kernel, g.stride, g.padding, chunk.pixel_begin,
        chunk.pixel_count, STRETCH)
    return cols


def _weight_gradient(dy: Array, x: Array, dweight: Array, g: _Geometry) -> None:
    dy_matrix, dw_matrix = g.out_matrix(dy), g.weight_matrix(dweight)
    chunks_of_workers = g.chunks_of_workers()
    # Each worker sums over its chunks; then the sums are added in the order of the workers.
    sums = [dw_matrix, *(empty(dw_matrix.shape, dw_matrix.dtype, like=dw_matrix) for _ in chunks_of_workers[1:])]

    def accumulate(chunks: Sequence[_Chunk], total: Array) -> None:
        for i, chunk in enumerate(chunks):
            # (G, O/G, K) += (G, O/G, P) @ (G, P, K)
            gemm(dy_matrix[:, :, chunk.columns], _unfold(x, g, chunk).transpose(0, 2, 1), total, beta=float(i > 0))

    run_tasks([partial(accumulate, chunks, total) for chunks, total in zip(chunks_of_workers, sums)])
    for other in sums[1:]:
        dw_matrix += other


def _adjoint_weight(weight: Array, groups: int) -> Array:
    """weight (O, C/groups, kh, kw) -> (C, O/groups, kh, kw), its windows turned by half a turn."""
    outputs, group_channels, kernel_h, kernel_w = weight.shape
    grouped = weight.reshape(groups, outputs // groups, group_channels, kernel_h, kernel_w)[..., ::-1, ::-1]
    adjoint = grouped.swapaxes(1, 2).reshape(groups * group_channels, outputs // groups, kernel_h, kernel_w)
    return array_module(weight).ascontiguousarray(adjoint)


def _input_gradient_by_col2im(dy: Array, weight: Array, dx: Array, g: _Geometry) -> Array:
    dy_matrix, w_transposed = g.out_matrix(dy), g.weight_matrix(weight).transpose(0, 2, 1)
    covered = 0  # input rows that hold sums already
    for chunk in g.chunks(whole_rows=True):
        # (G, K, P) = (G, K, O/G) @ (G, O/G, P)
        dcols = empty((g.groups, g.depth, chunk.pixel_count * g.batch), dx.dtype, like=dx)
        gemm(w_transposed, dy_matrix[:, :, chunk.columns], dcols)
        row_begin, row_end = chunk.pixel_begin // g.out_width, (chunk.pixel_begin + chunk.pixel_count) // g.out_width
        iy_begin = max(0, min(row_begin * g.stride - g.padding, covered))
        iy_end = g.height if row_end == g.out_height else min((row_end - 1) * g.stride - g.padding + g.kernel[0], g.height)
        if iy_end > iy_begin:
            KERNELS.col2im[g.channels * (iy_end - iy_begin), threads_along(g.batch)](
                dcols, dx, g.channels, g.height, g.width, g.out_width, g.batch, *g.kernel, g.stride, g.padding,
                row_begin, row_end - row_begin, iy_begin, covered)
            covered = max(covered, iy_end)
    return dx


class _Chunk:
    """A range of output pixels, and its columns in the matrix of outputs."""

    def __init__(self, pixel_begin: int, pixel_end: int, batch: int) -> None:
        self.pixel_begin, self.pixel_count = pixel_begin, pixel_end - pixel_begin
        self.columns = slice(pixel_begin * batch, pixel_end * batch)


class _Geometry:
    """Sizes of one convolution, checked."""

    def __init__(self, x: Array, weight: Array, stride: int, padding: int, groups: int) -> None:
        self.channels, self.height, self.width, self.batch = x.shape
        outputs, group_channels, *kernel = weight.shape
        if groups < 1 or self.channels % groups or outputs % groups:
            raise ValueError(f"conv: {self.channels} input and {outputs} output channels do not divide into {groups} groups")
        if group_channels * groups != self.channels:
            raise ValueError(f"conv: input has {self.channels} channels, weight {weight.shape} "
                             f"with {groups} groups needs {group_channels * groups}")
        self.kernel, self.stride, self.padding, self.groups = tuple(kernel), stride, padding, groups
        self.out_height, self.out_width = output_size("conv", (self.height, self.width), self.kernel, stride, padding)
        self.out_shape = outputs, self.out_height, self.out_width, self.batch
        self.depth = group_channels * kernel[0] * kernel[1]                # K of each group
        self.positions = self.out_height * self.out_width * self.batch     # P'
        self.pointwise = self.kernel == (1, 1) and stride == 1 and padding == 0
        # The padding with which a convolution of dy covers x again; None where there is no such convolution.
        adjoint_is_convolution = stride == 1 and kernel[0] == kernel[1] and padding < kernel[0]
        self.adjoint_padding = kernel[0] - 1 - padding if adjoint_is_convolution else None
        narrow = max(group_channels, outputs // groups) <= DIRECT_GROUP_CHANNELS[array_module(x).__name__]
        self.direct = groups > 1 and narrow
        self._workers = workers(x)
        self.pixel_bytes = self.groups * self.depth * self.batch * x.itemsize  # of cols
        self._limit = WORKSPACE_BYTES[array_module(x).__name__]

    def weight_matrix(self, weight: Array) -> Array:
        return weight.reshape(self.groups, -1, self.depth)

    def out_matrix(self, y: Array) -> Array:
        return y.reshape(self.groups, -1, self.positions)

    def chunks(self, whole_rows: bool = False) -> list[_Chunk]:
        """Ranges of output pixels whose cols fit the workspace, of nearly equal size; a whole number for each worker."""
        unit = self.out_width if whole_rows else 1
        units = self.out_height * self.out_width // unit
        fitting = max(1, self._limit // (unit * self.pixel_bytes))
        count = -(-units // fitting)
        count = min(units, -(-count // self._workers) * self._workers)
        bounds = [units * i // count * unit for i in range(count + 1)]
        return [_Chunk(begin, end, self.batch) for begin, end in zip(bounds, bounds[1:])]

    def chunks_of_workers(self) -> list[list[_Chunk]]:
        """The chunks, dealt out to at most `workers` tasks: [[chunk, ...], ...]."""
        chunks = self.chunks()
        count = min(self._workers, len(chunks))
        bounds = [len(chunks) * i // count for i in range(count + 1)]
        return [chunks[begin:end] for begin, end in zip(bounds, bounds[1:])]
