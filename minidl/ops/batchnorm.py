"""Batch normalization, alone or fused with what follows it. Formulas: batchnorm.cu."""

from minidl.device import Array, empty
from minidl.kernels import Kernels, acc_dtype, blocks_for

KERNELS = Kernels("batchnorm.cu")
THREADS = 256
TILE = 4096  # values of a row that one block takes: 16 kB of float32, read twice, the second time from cache


def forward(x: Array, gamma: Array, beta: Array, running_mean: Array, running_var: Array, *, training: bool,
            momentum: float, eps: float, relu: bool = False, z: Array | None = None,
            out: Array | None = None) -> tuple[Array, Array, Array]:
    """x (C, H, W, N), gamma, beta, running statistics (C) -> y (C, H, W, N), written to `out` if given, mean (C), rstd (C).

    y = gamma * (x - mean) * rstd + beta; with `relu`, max(y, 0); with `z` (C, H, W, N) too, max(y + z, 0).
    In training, mean and rstd = 1 / sqrt(biased variance + eps) are those of the batch, and the running
    statistics move towards it by `momentum` (PyTorch's: 0.1 keeps 90 %), in place, the variance unbiased.
    Otherwise they are the running statistics, which stay. mean and rstd are what `backward` needs.
    Raises ValueError in training for fewer than 2 values per channel, and for z or out of another shape than x.
    """
    channels, row, tiles = _tiles(x)
    acc = acc_dtype(x.dtype)
    rstd = empty((channels,), acc, like=x)
    if training:
        if row < 2:
            raise ValueError(f"batch norm: {row} value per channel in training; a variance needs 2 or more")
        mean = empty((channels,), acc, like=x)
        tile_mean, tile_m2 = (empty((channels, tiles), acc, like=x) for _ in range(2))
        KERNELS.bn_tile_moments[(tiles, channels), THREADS](x, tile_mean, tile_m2, row, TILE)
        KERNELS.bn_combine_moments[blocks_for(channels, 32), 32](
            tile_mean, tile_m2, mean, rstd, running_mean, running_var, channels, tiles, row, TILE, eps, momentum)
    else:
        mean = running_mean
        KERNELS.bn_rstd[blocks_for(channels, 32), 32](running_var, rstd, channels, eps)
    return apply(x, gamma, beta, mean, rstd, relu=relu, z=z, out=out), mean, rstd


def apply(x: Array, gamma: Array, beta: Array, mean: Array, rstd: Array, *, relu: bool = False, z: Array | None = None,
          out: Array | None = None) -> Array:
    """The last step of `forward`, with its mean and rstd: the same y again, bit for bit."""
    for name, array in (("z", z), ("out", out)):
        if array is not None and array.shape != x.shape:
            raise ValueError(f"batch norm: {name} {array.shape} has another shape than x {x.shape}")
    channels, row, tiles = _tiles(x)
    y = empty(x.shape, x.dtype, like=x) if out is None else out
    affine = mean, rstd, gamma, beta
    if z is not None:
        KERNELS.bn_apply_add_relu[(tiles, channels), THREADS](x, z, *affine, y, row, TILE)
    elif relu:
        KERNELS.bn_apply_relu[(tiles, channels), THREADS](x, *affine, y, row, TILE)
    else:
        KERNELS.bn_apply[(tiles, channels), THREADS](x, *affine, y, row, TILE)
    return y


def backward(dy: Array, x: Array, gamma: Array, beta: Array, mean: Array, rstd: Array, dgamma: Array, dbeta: Array, *,
             training: bool, relu: bool = False, y: Array | None = None) -> Array | tuple[Array, Array]:
    """dy, x (C, H, W, N); gamma, beta, mean, rstd (C) as in `forward` -> dx (C, H, W, N), or (dx, dz).

    Overwrites dgamma, dbeta (C). For a forward with `z`, give its output `y`; the result is then (dx, dz).
    """
    channels, row, tiles = _tiles(x)
    tile_dgamma, tile_dbeta = (empty((channels, tiles), mean.dtype, like=x) for _ in range(2))
    affine = mean, rstd, gamma, beta
    if y is not None:
        KERNELS.bn_backward_sums_add_relu[(tiles, channels), THREADS](x, dy, y, *affine, tile_dgamma, tile_dbeta, row, TILE)
    elif relu:
        KERNELS.bn_backward_sums_relu[(tiles, channels), THREADS](x, dy, *affine, tile_dgamma, tile_dbeta, row, TILE)
    else:
        KERNELS.bn_backward_sums[(tiles, channels), THREADS](x, dy, *affine, tile_dgamma, tile_dbeta, row, TILE)
    KERNELS.bn_combine_sums[blocks_for(channels, 32), 32](tile_dgamma, tile_dbeta, dgamma, dbeta, channels, tiles)

    inverse_m = 1 / row if training else 0.0
    dx = empty(x.shape, x.dtype, like=x)
    if y is not None:
        dz = empty(x.shape, x.dtype, like=x)
        KERNELS.bn_backward_x_add_relu[(tiles, channels), THREADS](x, dy, y, *affine, dgamma, dbeta, dx, dz, row, TILE, inverse_m)
        return dx, dz
    if relu:
        KERNELS.bn_backward_x_relu[(tiles, channels), THREADS](x, dy, *affine, dgamma, dbeta, dx, row, TILE, inverse_m)
    else:
        KERNELS.bn_backward_x[(tiles, channels), THREADS](x, dy, *affine, dgamma, dbeta, dx, row, TILE, inverse_m)
    return dx


def _tiles(x: Array) -> tuple[int, int, int]:
    """x (C, H, W, N) -> channels, values per channel, tiles per channel."""
    channels = x.shape[0]
    row = x.size // channels
    return channels, row, -(-row // TILE)
