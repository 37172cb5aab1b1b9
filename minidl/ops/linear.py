"""The fully connected layer: one matrix product per pass, and a bias (bias.cu).

    y = weight @ x + bias      dweight = dy @ x^T      dx = weight^T @ dy      dbias = sum of dy over the batch
"""

from minidl.blas import gemm
from minidl.device import Array, empty
from minidl.ops import bias as bias_op


def forward(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """x (C, N), weight (O, C), bias (O) -> y (O, N). Raises ValueError for shapes that do not fit."""
    if x.ndim != 2 or x.shape[0] != weight.shape[1]:
        raise ValueError(f"linear: input {x.shape} does not fit weight {weight.shape}: (C, N) with C = {weight.shape[1]} is needed")
    y = empty((weight.shape[0], x.shape[1]), x.dtype, like=x)
    gemm(weight, x, y)  # (O, N) = (O, C) @ (C, N)
    if bias is not None:
        bias_op.add(y, bias)
    return y


def backward(dy: Array, x: Array, weight: Array, dweight: Array, dbias: Array | None = None, *,
             input_gradient: bool = True) -> Array | None:
    """dy (O, N), x and weight as in `forward` -> dx (C, N), or None without `input_gradient`.

    Overwrites dweight (O, C) and dbias (O).
    """
    gemm(dy, x.T, dweight)  # (O, C) = (O, N) @ (N, C)
    if dbias is not None:
        bias_op.gradient(dy, dbias)
    if not input_gradient:
        return None
    dx = empty(x.shape, x.dtype, like=x)
    gemm(weight.T, dy, dx)  # (C, N) = (C, O) @ (O, N)
    return dx
