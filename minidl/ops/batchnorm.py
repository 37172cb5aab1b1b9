"""Batch normalization, alone or fused with what follows it. Formulas: batchnorm.cu."""

from minidl.device import Array, array_module, empty, workers
from minidl.kernels import LARGEST_COUNT, PRECISIONS, Kernel, Kernels, acc_dtype, type_name
from minidl.ops.shapes import check_batch, result

KERNELS = Kernels("batchnorm.cu")
THREADS = 256
# Values of a row that are summed at a time: 16 kB of float32, read twice, the second time from cache. More, where a row would
# have more than MOST_TILES: on a GPU, each of its blocks goes over the sums of all. A guess, not measured.
TILE = 4096
MOST_TILES = {"numpy": LARGEST_COUNT, "cupy": 64}
# A block takes whole channels where a row has at most LONGEST_ROW values and, on the CPU, no thread is left without; of short
# rows, as many as have VALUES_TOGETHER: streams through memory are long then, and x, dy and y fit a second cache. Per array
# module; cupy's are guesses. Measured on a core of Zen 4 against a block a tile, float32, 8 to 64 MB of each tensor:
#   rows of           8 to 128 kB      512 kB to 4 MB     16 MB
#   forward           1.2 to 1.3       1.5                1.1 times as fast
#   backward          1.1 to 1.4       1.7                1.4
LONGEST_ROW = {"numpy": LARGEST_COUNT, "cupy": TILE}
VALUES_TOGETHER = {"numpy": 32768, "cupy": 1}


def forward(x: Array, gamma: Array, beta: Array, running_mean: Array, running_var: Array, *, training: bool,
            momentum: float, eps: float, relu: bool = False, z: Array | None = None,
            out: Array | None = None) -> tuple[Array, Array, Array]:
    """x (C, H, W, N), gamma, beta, running statistics (C) -> y (C, H, W, N), written to `out` if given, mean (C), rstd (C).

    y = gamma * (x - mean) * rstd + beta; with `relu`, max(y, 0); with `z` (C, H, W, N) too, max(y + z, 0).
    In training, mean and rstd = 1 / sqrt(biased variance + eps) are those of the batch, and the running
    statistics move towards it by `momentum` (PyTorch's: 0.1 keeps 90 %), in place, the variance unbiased.
    Otherwise they are the running statistics, which stay. mean and rstd are what `backward` needs.
    Raises ValueError in training for fewer than 2 values per channel, and for shapes that do not fit; TypeError for a
    gamma that is not of the type of accumulation of x.
    """
    check_batch("batch norm", x.shape[-1])
    if type_name(x.dtype) not in PRECISIONS or gamma.dtype != acc_dtype(x.dtype):
        raise TypeError(f"batch norm: the input is {x.dtype}, gamma {gamma.dtype}: convert the input with astype")
    channels, row, tile, tiles = _tiles(x)
    _check_shapes((channels,), gamma=gamma, beta=beta, running_mean=running_mean, running_var=running_var)
    if training and row < 2:
        raise ValueError(f"batch norm: {row} value per channel in training; a variance needs 2 or more")
    _check_shapes(x.shape, z=z)
    read, y = (x,) if z is None else (x, z), result("batch norm", "out", out, x.shape, x)
    mean, rstd = empty((2, channels), gamma.dtype, like=x)
    written = y, mean, rstd, running_mean, running_var
    if group := _channels_together(x):
        _variant("bn_forward", relu, z)[-(-channels // group), THREADS](
            *read, gamma, beta, *written, channels, group, row, tile, int(training), eps, momentum)
    else:
        moments = empty((2, channels, tiles), gamma.dtype, like=x) if training else (None, None)
        if training:
            KERNELS.bn_tile_moments[(tiles, channels), THREADS](x, *moments, row, tile)
        _variant("bn_normalize", relu, z)[(tiles, channels), THREADS](
            *read, *moments, gamma, beta, *written, row, tile, eps, momentum)
    return y, mean, rstd


def apply(x: Array, gamma: Array, beta: Array, mean: Array, rstd: Array, *, relu: bool = False,
          out: Array | None = None) -> Array:
    """The y of a `forward` without z again, bit for bit, from its mean and rstd."""
    channels, row, tile, tiles = _tiles(x)
    y = result("batch norm", "out", out, x.shape, x)
    _variant("bn_apply", relu)[(tiles, channels), THREADS](x, mean, rstd, gamma, beta, y, row, tile)
    return y


def backward(dy: Array, x: Array, gamma: Array, beta: Array, mean: Array, rstd: Array, dgamma: Array, dbeta: Array, *,
             training: bool, relu: bool = False, y: Array | None = None,
             plus: Array | None = None) -> Array | tuple[Array, Array]:
    """dy, x (C, H, W, N); gamma, beta, mean, rstd (C) as in `forward` -> dx (C, H, W, N), or (dx, dz).

    Overwrites dgamma, dbeta (C). For a forward with `z`, give its output `y`; the result is then (dx, dz). Without, plus (C, H,
    W, N) is another array that is added to dx, or None. Raises ValueError for shapes that do not fit, and for both y and plus.
    """
    channels, row, tile, tiles = _tiles(x)
    _check_shapes(x.shape, dy=dy, y=y, plus=plus)
    if y is not None and plus is not None:
        raise ValueError("batch norm: nothing is added to the gradient of a forward with z")
    _check_shapes((channels,), gamma=gamma, beta=beta, mean=mean, rstd=rstd, dgamma=dgamma, dbeta=dbeta)
    inverse_m = 1 / row if training else 0.0
    dx = empty(x.shape, x.dtype, like=x)
    dz = None if y is None else empty(x.shape, x.dtype, like=x)
    read = (x, dy) if y is None else (x, dy, y)
    added = (plus,) if y is None else ()
    written = (dx,) if dz is None else (dx, dz)
    affine = mean, rstd, gamma, beta
    if group := _channels_together(x):
        _variant("bn_backward", relu, y)[-(-channels // group), THREADS](
            *read, *added, *affine, dgamma, dbeta, *written, channels, group, row, tile, inverse_m)
    else:
        sums = empty((2, channels, tiles), mean.dtype, like=x)
        _variant("bn_backward_sums", relu, y)[(tiles, channels), THREADS](*read, *affine, *sums, row, tile)
        _variant("bn_backward_x", relu, y)[(tiles, channels), THREADS](
            *read, *added, *affine, *sums, dgamma, dbeta, *written, row, tile, inverse_m)
    return dx if dz is None else (dx, dz)


def _channels_together(x: Array) -> int:
    """How many whole channels a block takes, or 0: then a block takes a tile."""
    channels, row, *_ = _tiles(x)
    module = array_module(x).__name__
    group = VALUES_TOGETHER[module] // row
    return 0 if row > LONGEST_ROW[module] or not group and channels < workers(x) else max(1, group)


def _variant(kernel: str, relu: bool, added: Array | None = None) -> Kernel:
    """The one of a kernel's variants that has the ReLU, or the addition before it."""
    return getattr(KERNELS, kernel + ("_add_relu" if added is not None else "_relu" if relu else ""))


def _check_shapes(shape: tuple[int, ...], **arrays: Array | None) -> None:
    for name, array in arrays.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"batch norm: {name} has shape {array.shape}, not {shape}")


def _tiles(x: Array) -> tuple[int, int, int, int]:
    """x (C, H, W, N) -> channels, values per channel, values per tile, tiles per channel."""
    channels = x.shape[0]
    row = x.size // channels
    tile = TILE * max(1, -(-row // (TILE * MOST_TILES[array_module(x).__name__])))
    return channels, row, tile, -(-row // tile)
