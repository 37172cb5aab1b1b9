"""The fully connected layer: a convolution of images of one pixel.

    y = weight @ x + bias      dweight = dy @ x^T      dx = weight^T @ dy      dbias = sum of dy over the batch
"""

from minidl.device import Array
from minidl.ops import conv


def forward(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """x (C, N), weight (O, C), bias (O) -> y (O, N). Raises ValueError for shapes that do not fit."""
    if x.ndim != 2 or x.shape[0] != weight.shape[1]:
        raise ValueError(f"linear: input {x.shape} does not fit weight {weight.shape}: (C, N) with C = {weight.shape[1]} is needed")
    return conv.forward(_image(x), _window(weight), bias).reshape(len(weight), -1)


def backward(dy: Array, x: Array, weight: Array, dweight: Array, dbias: Array | None = None, *,
             input_gradient: bool = True) -> Array | None:
    """dy (O, N), x and weight as in `forward` -> dx (C, N), or None without `input_gradient`.

    Overwrites dweight (O, C) and dbias (O). Raises ValueError for shapes that do not fit.
    """
    if dy.shape != (len(weight), x.shape[1]):
        raise ValueError(f"linear: dy {dy.shape} of an output of shape {(len(weight), x.shape[1])}")
    dx = conv.backward(_image(dy), _image(x), _window(weight), _window(dweight), dbias, input_gradient=input_gradient)
    return None if dx is None else dx.reshape(x.shape)


def _image(matrix: Array) -> Array:
    """(C, N) -> (C, 1, 1, N)."""
    return matrix[:, None, None]


def _window(weight: Array) -> Array:
    """(O, C) -> (O, C, 1, 1)."""
    return weight[:, :, None, None]
