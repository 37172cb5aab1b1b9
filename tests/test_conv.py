"""Convolution: im2col, col2im, chunks, groups, bias; by BLAS, by packed products, by Winograd, narrow groups directly.

Formulas: minidl/ops/conv.cu, packed_gemm.cu, winograd.cu, group_conv.cu."""

from functools import partial

import numpy as np
import pytest

import reference
from minidl import blas, kernels
from minidl.device import workers
from minidl.ops import chunks, conv, conv_product, group_conv, winograd
from reference import assert_close, numerical_vjp, tolerance

# (C, H, W, N), (O, kh, kw), stride, padding, groups
CASES = [
    ((4, 5, 4, 2), (6, 3, 3), 1, 1, 2),
    ((2, 6, 5, 3), (8, 3, 3), 2, 1, 1),     # more results than a tile of sums has, no whole vectors
    ((4, 3, 4, 2), (4, 1, 1), 1, 0, 2),     # a plain matrix product
    ((4, 5, 4, 2), (2, 1, 1), 2, 0, 1),     # the shortcut of a residual block
    ((2, 5, 6, 1), (3, 2, 3), 1, 0, 1),     # a window that is not square, batch 1
    ((2, 4, 4, 33), (2, 3, 3), 1, 2, 2),    # more padding than usual; a batch that is no multiple of a warp
    ((1, 7, 7, 2), (2, 2, 2), 3, 0, 1),     # pixels that no window sees
    ((2, 3, 3, 2), (2, 1, 1), 1, 1, 1),     # 1x1 with padding: its adjoint is no convolution
    ((3, 4, 4, 2), (3, 3, 3), 1, 1, 3),     # depthwise
    ((4, 4, 6, 16), (10, 2, 5), 1, 1, 2),   # from 2 channels to 5, in a wide window; a batch of whole vectors
    ((10, 7, 5, 2), (4, 1, 4), 3, 2, 2),    # from 5 channels to 2, windows that do not touch, some of them all padding
    ((4, 5, 7, 17), (4, 3, 2), 2, 1, 2),    # strides and a window that is not square
    ((5, 3, 3, 16), (10, 3, 3), 1, 1, 1),   # more results than a tile of sums has, whole vectors
    ((2, 2, 3, 1), (3, 2, 3), 1, 0, 1),     # a window over all of the image, batch 1: one column
]
WITH_PLUS = [CASES[i][0] for i in (0, 1, 2, 5)]  # all methods, with strides, whole vectors and their rests
CHUNKS = {"one pixel at a time": 1, "all at once": 1 << 30, "by BLAS, one pixel at a time": 1, "by BLAS, two rows": None}


def ways(outputs, stride, padding, groups):
    yield from CHUNKS
    yield "by BLAS"
    if outputs[1:] == (3, 3) and stride == 1:
        yield from ("by Winograd, in parts", "by Winograd", "by Winograd, 2x2 at a time", "by Winograd with BLAS, in parts")
    if groups > 1:
        yield "directly"


EVERY_WAY = [(shape, *case, way) for shape, *case in CASES for way in ways(*case)]
PRECISIONS = ["float64", "float32", "bfloat16", "float16"]
EACH_WAY = [case for case in EVERY_WAY if case[-1] in ("all at once", "by BLAS", "by Winograd", "by Winograd, 2x2 at a time", "directly")]


def in_precisions(cases, precisions):
    """Each case in each precision that it may be asked for: Winograd's needs 32 bits."""
    return [(*case, dtype) for case in cases for dtype in precisions if "Winograd" not in case[-1] or dtype in PRECISIONS[:2]]


def choose(monkeypatch, way, shape=None, outputs=None, stride=1, padding=0, itemsize=8):
    """way "directly": every grouped convolution is computed by group_conv.py, in small tiles. "by Winograd": all that can
    are by winograd.py, 4x4 results at a time. Any other: none is; as much is unfolded at a time as fits so many bytes as
    CHUNKS says, or two rows, for products by BLAS, or packed where arrays of this kind have that."""
    everywhere = dict.fromkeys(("numpy", "cupy"))
    monkeypatch.setattr(conv, "DIRECT_GROUP_CHANNELS", dict.fromkeys(everywhere, 1 << 30 if way == "directly" else 0))
    for limit in ("WINOGRAD_CHANNELS", "WINOGRAD_GROUP_CHANNELS"):
        monkeypatch.setattr(conv, limit, dict.fromkeys(everywhere, 0 if "Winograd" in way else 1 << 30))
    for number_of_columns in (conv_product, winograd):
        monkeypatch.setattr(number_of_columns, "DW_COLUMNS", 1)
    monkeypatch.setattr(group_conv, "TILE_PIXELS", 6)
    for module in (conv, winograd):
        monkeypatch.setattr(module, "product_for",
                            (lambda like: conv_product.Blas()) if "BLAS" in way else conv_product.product_for)
    for tiles in ("OUTPUTS_OF_Y", "OUTPUTS_OF_GRADIENTS"):
        monkeypatch.setattr(winograd, tiles, (2,) if "2x2" in way else (4,))
    limit = CHUNKS.get(way, 1 if "parts" in way else 1 << 30)
    for strips in (conv_product, winograd):
        monkeypatch.setattr(strips, "STRIP_BYTES", limit or 1)
    monkeypatch.setattr(conv_product, "SHARES", 3 if limit == 1 else 6)
    monkeypatch.setattr(conv_product, "DW_SEGMENTS", 1)
    if limit is None:
        _, kernel_h, kernel_w = outputs
        out_width = (shape[2] + 2 * padding - kernel_w) // stride + 1
        limit = 2 * shape[0] * kernel_h * kernel_w * out_width * shape[3] * itemsize
    monkeypatch.setattr(chunks, "WORKSPACE_BYTES", dict.fromkeys(everywhere, limit))
    monkeypatch.setattr(chunks, "workers", lambda like: 1)


@pytest.fixture
def compute(monkeypatch):
    return partial(choose, monkeypatch)


def inputs(rng, target, shape, outputs, groups, dtype):
    """x, weight, bias in float64, with values that the type of storage can hold."""
    x, weight = rng.normal(size=shape), rng.normal(size=(outputs[0], shape[0] // groups, *outputs[1:]))
    return *(target.host(target.array(a, dtype)) for a in (x, weight)), rng.normal(size=outputs[0]).astype(np.float32).astype(float)


@pytest.mark.parametrize("shape, outputs, stride, padding, groups, way, dtype", in_precisions(EVERY_WAY, PRECISIONS), ids=str)
def test_forward(target, rng, compute, shape, outputs, stride, padding, groups, way, dtype):
    x, weight, bias = inputs(rng, target, shape, outputs, groups, dtype)
    device_x = target.array(x, dtype)
    compute(way, shape, outputs, stride, padding, device_x.itemsize)
    y = conv.forward(device_x, target.array(weight, dtype), target.acc(bias, dtype), stride=stride, padding=padding, groups=groups)
    expected = reference.conv2d(x, weight, bias, stride, padding, groups)
    # By BLAS, 16-bit results are rounded twice: after the product and after the bias.
    roundings = 1 + ("by BLAS" in way and dtype in ("bfloat16", "float16"))
    assert_close(target.host(y), expected, roundings * tolerance(dtype, weight[0].size), "y")


@pytest.mark.parametrize("in_place", [False, True], ids=["beside", "in place"])
@pytest.mark.parametrize("shape, outputs, stride, padding, groups, way, dtype",
                         in_precisions([case for case in EVERY_WAY if case[0] in WITH_PLUS], ["float64"])
                         + in_precisions([case for case in EACH_WAY if case[0] in WITH_PLUS], ["bfloat16"]), ids=str)
def test_another_array_is_added(target, rng, compute, shape, outputs, stride, padding, groups, way, dtype, in_place):
    """To the result, with the bias, and to the gradient. Small integers, which all types hold, tell it from all else."""
    x, weight, bias = (rng.integers(-1, 2, size=size).astype(float)
                       for size in (shape, (outputs[0], shape[0] // groups, *outputs[1:]), outputs[:1]))
    device_x, device_weight = target.array(x, dtype), target.array(weight, dtype)
    compute(way, shape, outputs, stride, padding, device_x.itemsize)
    settings = dict(stride=stride, padding=padding, groups=groups)
    expected = reference.conv2d(x, weight, bias, stride, padding, groups)
    plus, dy = (rng.integers(-8, 9, size=expected.shape).astype(float) for _ in range(2))
    added = target.array(plus, dtype)
    y = conv.forward(device_x, device_weight, target.acc(bias, dtype), **settings, plus=added, out=added if in_place else None)
    assert (y is added) is in_place
    assert_close(target.host(y), expected + plus, 1e-12 if dtype == "float64" else tolerance(dtype), "y")
    device_dy, dweight = target.array(dy, dtype), target.acc(np.full(weight.shape, np.nan), dtype)
    dx = conv.backward(device_dy, device_x, device_weight, dweight, **settings)
    plus = rng.integers(-8, 9, size=shape).astype(float)
    added = target.array(plus, dtype)
    more = conv.backward(device_dy, device_x, device_weight, dweight, **settings, plus=added, dx=added if in_place else None)
    assert (more is added) is in_place
    assert_close(target.host(more), target.host(dx) + plus, 1e-12 if dtype == "float64" else tolerance(dtype), "dx")
    if not in_place:
        assert np.array_equal(target.host(added), plus)


def backward(target, x, weight, dy, dtype, settings):
    acc = "float64" if dtype == "float64" else "float32"
    dweight, dbias = target.poison(weight.shape, acc), target.poison(weight.shape[:1], acc)
    dx = conv.backward(target.array(dy, dtype), target.array(x, dtype), target.array(weight, dtype), dweight, dbias, **settings)
    return tuple(target.host(a) for a in (dx, dweight, dbias))


@pytest.mark.parametrize("shape, outputs, stride, padding, groups, way", EVERY_WAY, ids=str)
def test_gradients(target, rng, compute, shape, outputs, stride, padding, groups, way):
    x, weight, bias = inputs(rng, target, shape, outputs, groups, "float64")
    compute(way, shape, outputs, stride, padding)
    arguments = [x, weight, bias, stride, padding, groups]
    dy = rng.normal(size=reference.conv2d(*arguments).shape)
    got = backward(target, x, weight, dy, "float64", dict(stride=stride, padding=padding, groups=groups))
    again = backward(target, x, weight, dy, "float64", dict(stride=stride, padding=padding, groups=groups))
    for index, (result, repeated) in enumerate(zip(got, again)):
        # Linear in each argument: two points and any step are exact, and rounding falls with the step.
        expected = numerical_vjp(reference.conv2d, arguments, index, dy, h=1.0)
        assert_close(result, expected, 1e-6, ("dx", "dweight", "dbias")[index])
        assert np.array_equal(result, repeated)


@pytest.mark.parametrize("shape, outputs, stride, padding, groups, way, dtype", in_precisions(EACH_WAY, PRECISIONS[1:]), ids=str)
def test_gradients_of_other_types_follow_float64(target, rng, compute, shape, outputs, stride, padding, groups, way, dtype):
    compute(way)
    x, weight, bias = inputs(rng, target, shape, outputs, groups, dtype)
    dy = target.host(target.array(rng.normal(size=reference.conv2d(x, weight, bias, stride, padding, groups).shape), dtype))
    settings = dict(stride=stride, padding=padding, groups=groups)
    exact = backward(target, x, weight, dy, "float64", settings)
    for got, expected, what in zip(backward(target, x, weight, dy, dtype, settings), exact, ("dx", "dweight", "dbias")):
        assert_close(got, expected, (1 if dtype == "float32" else 2) * tolerance(dtype, terms=dy[0].size), what)


@pytest.mark.parametrize("begin", [0, 1])
@pytest.mark.parametrize("shape, outputs, stride, padding, groups", CASES[:2] + CASES[4:8], ids=str)
def test_col2im_is_the_adjoint_of_im2col(target, rng, shape, outputs, stride, padding, groups, begin):
    """<im2col(x), c> = <x, col2im(c)> for all x and c, wherever the arrays begin."""
    def array(values):
        return target.array(np.concatenate([np.zeros(begin), values.ravel()]))[begin:].reshape(values.shape)

    channels, height, width, batch = shape
    _, kernel_h, kernel_w = outputs
    out_h, out_w = ((size + 2 * padding - kernel) // stride + 1 for size, kernel in zip((height, width), outputs[1:]))
    x, c = rng.normal(size=shape), rng.normal(size=(channels * kernel_h * kernel_w, out_h * out_w * batch))
    cols, dx = array(np.full(c.shape, np.nan)), array(np.full(shape, np.nan))
    sizes = height, width, out_w, batch, kernel_h, kernel_w, stride, padding
    conv.KERNELS.im2col[(len(c), 3), 32](array(x), cols, *sizes, 0, out_h * out_w, -(-out_h * out_w // 3), c.shape[1])
    conv.KERNELS.col2im[channels * height, 32](array(c), dx, channels, *sizes, 0, out_h, 0, 0)
    assert np.vdot(target.host(cols), c) == pytest.approx(np.vdot(x, target.host(dx)), rel=1e-12)


@pytest.mark.parametrize("parts", [2, 6])
@pytest.mark.parametrize("kernel, stride, padding, groups", [(1, 1, 0, 1), (1, 1, 0, 2), (3, 2, 1, 2)])
def test_sums_over_many_pixels(target, rng, compute, monkeypatch, kernel, stride, padding, groups, parts):
    """More than a segment of a packed product has, and more than one for each of several parts."""
    monkeypatch.setattr(conv_product, "PART_COST", 1)
    x, weight = rng.normal(size=(2, 4 * stride, 12 * stride, 33)), rng.normal(size=(8, 2 // groups, kernel, kernel))
    settings = dict(stride=stride, padding=padding, groups=groups)
    dy = rng.normal(size=(8, 4, 12, 33))
    compute("by BLAS")
    expected = backward(target, x, weight, dy, "float64", settings)
    compute("all at once")
    monkeypatch.setattr(conv_product, "SHARES", parts)
    for got, by_blas, what in zip(backward(target, x, weight, dy, "float64", settings), expected, ("dx", "dweight", "dbias")):
        assert_close(got, by_blas, 1e-12, what)


@pytest.mark.parametrize("way", ["all at once", "by Winograd", "directly"])
def test_groups_are_separate_convolutions(target, rng, compute, way):
    compute(way)
    x, weight = rng.normal(size=(6, 4, 4, 3)), rng.normal(size=(4, 3, 3, 3))
    together = conv.forward(target.array(x), target.array(weight), padding=1, groups=2)
    apart = [conv.forward(target.array(x[3 * g:3 * g + 3]), target.array(weight[2 * g:2 * g + 2]), padding=1) for g in range(2)]
    assert_close(target.host(together), np.concatenate([target.host(y) for y in apart]), 1e-12)


@pytest.mark.parametrize("way", ["all at once", "by Winograd", "directly"])
@pytest.mark.parametrize("stride", [1, 2])
def test_results_in_slices_of_buffers(machine, rng, compute, way, stride):
    """Rows 2..5 of buffers of 8 channels get what a new array would; the other rows stay."""
    compute(way)
    x, weight = (machine.array(rng.normal(size=shape)) for shape in ((4, 5, 5, 3), (4, 2, 3, 3)))
    settings = dict(stride=stride, padding=1, groups=2)
    y = conv.forward(x, weight, **settings)
    dy, dweight = machine.array(rng.normal(size=y.shape)), machine.poison(weight.shape, "float64")
    dx = conv.backward(dy, x, weight, dweight, **settings)
    out, out_dx = machine.poison((8, *y.shape[1:]), "float64"), machine.poison((8, *x.shape[1:]), "float64")
    assert conv.forward(x, weight, **settings, out=out[2:6]).base is out
    assert conv.backward(dy, x, weight, dweight, **settings, dx=out_dx[2:6]).base is out_dx
    for buffer, expected in ((out, y), (out_dx, dx)):
        assert np.array_equal(machine.host(buffer[2:6]), machine.host(expected))
        assert np.isnan(machine.host(buffer[:2])).all() and np.isnan(machine.host(buffer[6:])).all()
    with pytest.raises(ValueError, match=r"conv: out has shape \(3, .*the result \(4, "):
        conv.forward(x, weight, **settings, out=out[2:5])
    with pytest.raises(ValueError, match=r"conv: dx has shape \(5, .*the result \(4, "):
        conv.backward(dy, x, weight, dweight, **settings, dx=out_dx[2:7])
    with pytest.raises(ValueError, match=r"conv: plus has shape \(5, .*the result \(4, "):
        conv.forward(x, weight, **settings, plus=out[2:7])
    with pytest.raises(ValueError, match=r"conv: plus has shape \(3, .*the result \(4, "):
        conv.backward(dy, x, weight, dweight, **settings, plus=out_dx[2:5])
    with pytest.raises(ValueError, match=r"conv: bias \(3,\) is not one number for each of the 4 output channels"):
        conv.forward(x, weight, machine.array(np.zeros(3)), **settings)


@pytest.mark.parametrize("outputs, settings", [
    ((5, 3, 3, 3), dict(padding=1)), ((5, 3, 1, 1), {}), ((3, 1, 3, 3), dict(padding=1, groups=3)), ((5, 3, 3, 3), dict(stride=2))])
def test_results_in_arrays_that_are_not_contiguous_are_refused(machine, outputs, settings):
    """A reshape of such an array is a copy, which would get the result and be lost."""
    x, weight = machine.array(np.ones((3, 6, 6, 4))), machine.array(np.ones(outputs))
    y = conv.forward(x, weight, **settings)

    def scattered(array):
        return machine.array(np.zeros(array.shape[::-1])).transpose()

    dweight = machine.array(np.zeros(outputs))
    for name, call in {"out": lambda: conv.forward(x, weight, **settings, out=scattered(y)),
                       "dx": lambda: conv.backward(y, x, weight, dweight, **settings, dx=scattered(x)),
                       "dweight": lambda: conv.backward(y, x, weight, scattered(weight), **settings)}.items():
        with pytest.raises(TypeError, match=f"^conv: {name} must be contiguous$"):
            call()


@pytest.mark.parametrize("inputs, outputs, direct", [(3, 3, True), (2, 3, True), (4, 3, False), (3, 4, False)])
def test_narrow_groups_are_computed_directly(monkeypatch, inputs, outputs, direct):
    """Where neither the channels in nor those out are more than the limit; and never without groups."""
    monkeypatch.setattr(conv, "DIRECT_GROUP_CHANNELS", {"numpy": 3, "cupy": 3})
    for groups in (1, 2):
        x, weight = np.ones((groups * inputs, 4, 4, 2)), np.ones((groups * outputs, inputs, 3, 3))
        asked = []
        monkeypatch.setattr(group_conv, "forward", lambda *_, **settings: asked.append(settings["groups"]))
        conv.forward(x, weight, groups=groups)
        assert asked == ([2] if direct and groups == 2 else [])


def test_without_input_gradient(target, rng):
    x, weight = target.array(rng.normal(size=(2, 4, 4, 2))), target.array(rng.normal(size=(3, 2, 3, 3)))
    dweight = target.poison(weight.shape, "float64")
    assert conv.backward(target.array(rng.normal(size=(3, 2, 2, 2))), x, weight, dweight, input_gradient=False) is None
    assert np.isfinite(target.host(dweight)).all()


@pytest.mark.parametrize("shape, weight, settings, message", [
    ((6, 5, 5, 2), (8, 2, 3, 3), dict(groups=4), "conv: 6 input and 8 output channels do not divide into 4 groups"),
    ((6, 5, 5, 2), (8, 6, 3, 3), dict(groups=0), "do not divide into 0 groups"),
    ((6, 5, 5, 2), (8, 3, 3, 3), dict(), r"conv: input has 6 channels, weight \(8, 3, 3, 3\) with 1 groups needs 3"),
    ((6, 3, 3, 2), (8, 6, 5, 5), dict(), "conv: window 5x5 is larger than the padded image 3x3"),
    ((6, 3, 3, 2), (8, 6, 3, 3), dict(stride=0), "conv: stride is 0"),
    ((6, 3, 3, 2), (8, 6, 3, 3), dict(padding=-1), "conv: padding is -1"),
])
def test_refused(target, shape, weight, settings, message):
    with pytest.raises(ValueError, match=message):
        conv.forward(target.array(np.zeros(shape)), target.array(np.zeros(weight)), **settings)


def test_chunks_of_a_layer_beyond_31_bits_of_elements():
    """By sizes alone: cols of ResNeXt-29 8x64d at batch 456 have more than 2^31 elements; their chunks do not."""
    x, weight = (np.broadcast_to(np.float32(0), shape) for shape in ((512, 32, 32, 456), (512, 64, 3, 3)))
    geometry = conv._Geometry(x, weight, stride=1, padding=1, groups=8)
    pixels = [end - begin for begin, end in chunks.split(geometry.pixels, geometry.pixel_bytes, x)]
    assert geometry.groups * geometry.depth * geometry.positions > 2**31 and sum(pixels) == geometry.pixels
    assert max(pixels) * geometry.pixel_bytes <= max(workers(x) * chunks.WORKSPACE_BYTES["numpy"], geometry.pixel_bytes)


@pytest.mark.parametrize("dtype, tf32, outputs, stride, padding, groups, chosen", [
    ("float32", False, (20, 16, 3, 3), 1, 1, 1, True), ("float64", True, (16, 20, 3, 3), 1, 2, 1, True),
    ("float32", True, (16, 16, 3, 3), 1, 1, 1, False),   # 10 bits of mantissa are too few for sums of what is multiplied
    ("bfloat16", False, (16, 16, 3, 3), 1, 1, 1, False), ("float16", False, (16, 16, 3, 3), 1, 1, 1, False),
    ("float32", False, (15, 16, 3, 3), 1, 1, 1, False), ("float32", False, (16, 15, 3, 3), 1, 1, 1, False),
    ("float32", False, (16, 16, 3, 3), 2, 1, 1, False), ("float32", False, (16, 16, 3, 3), 1, 3, 1, False),
    ("float32", False, (16, 16, 3, 2), 1, 1, 1, False), ("float32", False, (16, 16, 1, 1), 1, 0, 1, False),
    ("float32", False, (64, 32, 3, 3), 1, 1, 2, True), ("float32", False, (62, 32, 3, 3), 1, 1, 2, False),
])
def test_which_convolutions_are_computed_by_winograd(monkeypatch, dtype, tf32, outputs, stride, padding, groups, chosen):
    monkeypatch.setattr(blas, "allow_tf32", tf32)
    monkeypatch.setattr(conv, "WINOGRAD_CHANNELS", {"numpy": 16})
    monkeypatch.setattr(conv, "WINOGRAD_GROUP_CHANNELS", {"numpy": 32})
    x, weight = (np.zeros(shape, kernels.storage_dtype(dtype)) for shape in ((groups * outputs[1], 6, 6, 2), outputs))
    method, _ = conv._chosen(x, weight, conv._Geometry(x, weight, stride, padding, groups))
    assert (method is winograd) == chosen


def test_a_gradient_of_another_type_is_refused():
    x, weight = np.zeros((2, 4, 4, 1), np.float32), np.zeros((3, 2, 1, 1), np.float32)
    with pytest.raises(TypeError, match="conv: dy is float64, the input float32: convert one with astype"):
        conv.backward(np.zeros((3, 4, 4, 1)), x, weight, np.empty_like(weight))


@pytest.mark.parametrize("strip_bytes", range(1 << 14, 1 << 17, 1 << 14))
def test_strips_that_do_not_divide_a_row_of_tiles(target, rng, compute, monkeypatch, strip_bytes):
    compute("by Winograd")
    monkeypatch.setattr(winograd, "STRIP_BYTES", strip_bytes)
    x, weight = rng.normal(size=(5, 8, 20, 3)), rng.normal(size=(3, 5, 3, 3))
    y = conv.forward(target.array(x), target.array(weight), padding=1)
    assert_close(target.host(y), reference.conv2d(x, weight, np.zeros(3), 1, 1, 1), 1e-12, "y")


def test_weights_transformed_in_unequal_parts(target, rng, compute, monkeypatch):
    compute("by Winograd")
    monkeypatch.setattr(winograd, "WEIGHT_PAIRS", 4)
    x, weight = rng.normal(size=(5, 4, 4, 3)), rng.normal(size=(20, 5, 3, 3))
    y = conv.forward(target.array(x), target.array(weight), padding=1)
    assert_close(target.host(y), reference.conv2d(x, weight, np.zeros(20), 1, 1, 1), 1e-12, "y")
