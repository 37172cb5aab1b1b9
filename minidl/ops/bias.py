"""The bias of convolutions and linear layers. Formulas: bias.cu."""

from minidl.device import Array
from minidl.kernels import Kernels
from minidl.ops.sum_parts import parts_of, sum_parts

KERNELS = Kernels("bias.cu")
THREADS = 256
TILE = 4096  # values of a row that one block takes


def add(y: Array, bias: Array, columns: slice = slice(None)) -> None:
    """y (O, ...) seen as a matrix (O, P): add bias (O) to the range `columns` (a slice) of each row, in place. Raises
    ValueError for a bias of another shape."""
    _check(bias, y)
    row = y.size // y.shape[0]
    begin, end, _ = columns.indices(row)
    KERNELS.bias_add[(-(-(end - begin) // TILE), y.shape[0]), THREADS](y, bias, row, begin, end - begin, TILE)


def gradient(dy: Array, dbias: Array) -> None:
    """dy (O, ...): overwrite dbias (O) with the sum of each row. Raises ValueError for a dbias of another shape."""
    _check(dbias, dy)
    rows = dy.shape[0]
    row = dy.size // rows
    tile_sums = parts_of(dbias, -(-row // TILE))
    KERNELS.bias_tile_sums[(len(tile_sums), rows), THREADS](dy, tile_sums, row, TILE)
    sum_parts(tile_sums, dbias)


def _check(bias: Array, y: Array) -> None:
    if bias.shape != y.shape[:1]:
        raise ValueError(f"bias: {bias.shape} is not one number for each of the {len(y)} rows")
