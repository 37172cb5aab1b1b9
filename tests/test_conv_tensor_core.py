"""Convolution on tensor cores, in the emulator and, where there is one, on a GPU. Formulas: minidl/ops/conv_tensor_core.cu.

These kernels have one block size, and no fast host target: they have a list of targets of their own.
"""

from pathlib import Path

import numpy as np
import pytest

import reference
from conftest import CUPY, Target, active
from minidl import blas
from minidl.host_build import CompileError
from minidl.kernels import KernelFault, Kernels, launch_settings, storage_dtype
from minidl.ops import conv, conv_tensor_core
from reference import assert_close, numerical_vjp, tolerance

FOLDER = Path(__file__).parent
VOCABULARY = Kernels(FOLDER / "kernels" / "tensor_core.cu")
BROKEN = Kernels(FOLDER / "broken" / "warp_operations.cu")
FACTORS = ("float32", "bfloat16", "float16")  # float32: as TF32

# (C, H, W, N), O, padding, groups
CASES = [
    ((16, 5, 3, 8), 16, 1, 1),     # boxes of 4x4 pixels, cut at both edges
    ((40, 3, 3, 8), 72, 1, 1),     # a tile of 128 rows, of which 72 are there; many steps
    ((24, 3, 3, 16), 40, 0, 2),    # boxes of 4x2 pixels; groups of 12 channels and 20
    ((3, 5, 4, 32), 5, 1, 1),      # boxes of 2x2 pixels; one step that is not full
    ((5, 2, 2, 8), 130, 2, 1),     # more padding than usual; three tiles of 64 rows
    ((4, 1, 1, 24), 6, 1, 2),      # one pixel, and windows that are mostly padding; three runs of 8 images
    ((2, 1, 2, 64), 200, 1, 1),    # two tiles of 128 rows, two runs of 32 images
]
SMALL = [((3, 3, 2, 8), 4, 1, 1), ((4, 3, 4, 8), 6, 0, 2)]
STRIDED = [(CASES[0], 2), (CASES[2], 2), (CASES[3], 3), (CASES[4], 2)]
PARTS = {"at once": (1, 1), "in parts": (1 << 20, 2)}


TENSOR_CORES = CUPY and conv_tensor_core._has_tensor_cores(0)


def pytest_generate_tests(metafunc):
    emulator = "sanitize" if metafunc.config.getoption("--sanitize") else "emulate"
    if "warps" in metafunc.fixturenames:
        names = ["ptx"] if metafunc.config.getoption("--ptx") else [emulator, *(["cuda"] if TENSOR_CORES else [])]
        metafunc.parametrize("warps", names, indirect=True)
    if "emulator" in metafunc.fixturenames:
        metafunc.parametrize("emulator", [emulator], indirect=True)
    if "dtype" in metafunc.fixturenames and "expected" not in metafunc.fixturenames:
        # Sanitized, two: float16 takes the steps of bfloat16, and each is a library to build.
        metafunc.parametrize("dtype", FACTORS[:2] if emulator == "sanitize" else FACTORS)


def launching(request):
    with active(request.param) as it:
        yield it


warps = pytest.fixture(launching, name="warps")        # a Target whose blocks have whole warps
emulator = pytest.fixture(launching, name="emulator")  # one that finds faults


OF_THIS_GPU = conv_tensor_core._multiprocessors


@pytest.fixture(autouse=True)
def multiprocessors(monkeypatch):
    """-> Of how many a GPU has, as here for all tests that do not say otherwise: one, for which no tile is too large."""
    def have(number):
        monkeypatch.setattr(conv_tensor_core, "_multiprocessors", lambda like: number)

    have(1)
    return have


def factors(rng, shape, dtype):
    """Random numbers, in float64, that tensor cores read as they are."""
    values = rng.normal(size=shape).astype(storage_dtype(dtype))
    return (blas._round_to_tf32(values) if dtype == "float32" else values).astype(np.float64)


def inputs(rng, dtype, shape, outputs, padding, groups, stride=1):
    """x, weight, dy."""
    x, weight = factors(rng, shape, dtype), factors(rng, (outputs, shape[0] // groups, 3, 3), dtype)
    return x, weight, factors(rng, (outputs, *((side + 2 * padding - 3) // stride + 1 for side in shape[1:3]), shape[3]), dtype)


def forward(target, x, weight, dy, padding, groups, dtype, stride=1, bias=None, plus=None):
    y = target.poison(dy.shape, dtype)
    conv_tensor_core.forward(target.array(x, dtype), target.array(weight, dtype), y, bias, plus, stride=stride, padding=padding,
                             groups=groups)
    return target.host(y)


def input_gradient(target, weight, dy, shape, padding, groups, dtype):
    dx = target.poison(shape, dtype)
    conv_tensor_core.backward_x(target.array(dy, dtype), target.array(weight, dtype), dx, None, stride=1, padding=padding,
                                groups=groups)
    return target.host(dx)


def weight_gradient(target, x, dy, shape, padding, groups, dtype, stride=1):
    dweight = target.poison(shape, "float32")
    conv_tensor_core.backward_weight(target.array(dy, dtype), target.array(x, dtype), dweight, stride=stride, padding=padding,
                                     groups=groups)
    return target.host(dweight)


def gradients(target, x, weight, dy, padding, groups, dtype):
    """dx, dweight."""
    return (input_gradient(target, weight, dy, x.shape, padding, groups, dtype),
            weight_gradient(target, x, dy, weight.shape, padding, groups, dtype))


@pytest.mark.parametrize("shape, outputs, padding, groups", CASES, ids=str)
def test_forward(warps, rng, shape, outputs, padding, groups, dtype):
    x, weight, dy = inputs(rng, dtype, shape, outputs, padding, groups)
    y = forward(warps, x, weight, dy, padding, groups, dtype)
    expected = reference.conv2d(x, weight, np.zeros(outputs), 1, padding, groups)
    assert_close(y, expected, tolerance(dtype, weight[0].size), "y")


@pytest.mark.parametrize("shape, outputs, padding, groups", [CASES[1], CASES[6]], ids=str)
def test_on_many_multiprocessors_tiles_are_small(warps, rng, multiprocessors, shape, outputs, padding, groups):
    """And results the same, bit for bit: each is one sum, as before."""
    arguments = *inputs(rng, "bfloat16", shape, outputs, padding, groups), padding, groups, "bfloat16"
    results = []
    for number in (1, 1000):
        multiprocessors(number)
        results.append((forward(warps, *arguments), *gradients(warps, *arguments)))
    for large, small in zip(*results):
        assert np.array_equal(large, small)


@pytest.mark.parametrize("case", [CASES[0], CASES[2]], ids=str)
def test_bias_and_another_array_are_added(warps, rng, case, dtype):
    x, weight, dy = inputs(rng, dtype, *case)
    shape, outputs, padding, groups = case
    bias = rng.normal(size=outputs)
    y = forward(warps, x, weight, dy, padding, groups, dtype, 1, warps.acc(bias, dtype), warps.array(dy, dtype))
    expected = reference.conv2d(x, weight, bias, 1, padding, groups) + dy
    assert_close(y, expected, tolerance(dtype, weight[0].size), "y")
    device_dx = warps.array(x, dtype)
    conv_tensor_core.backward_x(warps.array(dy, dtype), warps.array(weight, dtype), device_dx, device_dx, stride=1, padding=padding,
                                groups=groups)
    expected, _ = portable_gradients(x, weight, dy, padding, groups)
    assert_close(warps.host(device_dx), expected + x, tolerance(dtype, terms=9 * outputs // groups), "dx")


@pytest.mark.parametrize("case, stride", STRIDED, ids=str)
def test_strides(warps, rng, case, stride, dtype):
    x, weight, dy = inputs(rng, dtype, *case, stride=stride)
    shape, outputs, padding, groups = case
    y = forward(warps, x, weight, dy, padding, groups, dtype, stride)
    expected = reference.conv2d(x, weight, np.zeros(outputs), stride, padding, groups)
    assert_close(y, expected, tolerance(dtype, weight[0].size), "y")
    dweight = weight_gradient(warps, x, dy, weight.shape, padding, groups, dtype, stride)
    _, expected = portable_gradients(x, weight, dy, padding, groups, stride)
    assert_close(dweight, expected, tolerance("float32", terms=dy[0].size), "dweight")


@pytest.mark.parametrize("shape, outputs, padding, groups", SMALL, ids=str)
def test_gradients(warps, rng, shape, outputs, padding, groups):
    x, weight, dy = inputs(rng, "float32", shape, outputs, padding, groups)
    arguments = [x, weight, np.zeros(outputs), 1, padding, groups]
    got = gradients(warps, x, weight, dy, padding, groups, "float32")
    for index, (result, what) in enumerate(zip(got, ("dx", "dweight"))):
        # Linear in each argument: any step is exact.
        assert_close(result, numerical_vjp(reference.conv2d, arguments, index, dy, h=1.0), tolerance("float32", dy.size), what)


def portable_gradients(x, weight, dy, padding, groups, stride=1):
    """dx, dweight by the kernels of conv.py, in float64."""
    dweight = np.empty(weight.shape)
    with launch_settings("fast"):
        return conv.backward(dy, x, weight, dweight, stride=stride, padding=padding, groups=groups), dweight


@pytest.mark.parametrize("shape, outputs, padding, groups", CASES, ids=str)
def test_input_gradient_follows_the_portable_one(warps, rng, shape, outputs, padding, groups, dtype):
    x, weight, dy = inputs(rng, dtype, shape, outputs, padding, groups)
    dx = input_gradient(warps, weight, dy, x.shape, padding, groups, dtype)
    expected, _ = portable_gradients(x, weight, dy, padding, groups)
    assert_close(dx, expected, tolerance(dtype, terms=9 * outputs // groups), "dx")


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("shape, outputs, padding, groups", CASES, ids=str)
def test_weight_gradient_follows_the_portable_one(warps, rng, monkeypatch, shape, outputs, padding, groups, dtype, parts):
    for name, value in zip(("BLOCKS", "LEAST_STEPS"), PARTS[parts]):
        monkeypatch.setattr(conv_tensor_core, name, value)
    x, weight, dy = inputs(rng, dtype, shape, outputs, padding, groups)
    dweight = weight_gradient(warps, x, dy, weight.shape, padding, groups, dtype)
    _, expected = portable_gradients(x, weight, dy, padding, groups)
    assert_close(dweight, expected, tolerance("float32", terms=dy[0].size), "dweight")


@pytest.mark.parametrize("shape", [(3, 3, 3, 4), (3, 2, 4, 12)], ids=str)
def test_in_float32_a_batch_of_fours_is_enough(warps, rng, shape):
    """Its runs of 8 images then end within 8 columns of a product."""
    x, weight, dy = inputs(rng, "float32", shape, 4, 1, 1)
    assert_close(forward(warps, x, weight, dy, 1, 1, "float32"), reference.conv2d(x, weight, np.zeros(4), 1, 1, 1), 1e-4, "y")
    dx, dweight = gradients(warps, x, weight, dy, 1, 1, "float32")
    # <y, dy> is linear in x and in weight.
    assert (x * dx).sum() == pytest.approx((weight * dweight).sum(), rel=1e-4)


def test_factors_are_rounded_to_tf32(warps, rng):
    """To the nearest: tensor cores themselves would cut the digits off."""
    arguments = [rng.normal(size=a.shape).astype(np.float32) for a in inputs(rng, "float32", *CASES[0])]
    rounded = [blas._round_to_tf32(a) for a in arguments]
    assert all((a != b).any() for a, b in zip(arguments, rounded))
    assert np.array_equal(forward(warps, *arguments, 1, 1, "float32"), forward(warps, *rounded, 1, 1, "float32"))
    for got, expected in zip(gradients(warps, *arguments, 1, 1, "float32"), gradients(warps, *rounded, 1, 1, "float32")):
        assert np.array_equal(got, expected)


def test_what_a_tile_reaches_beyond_its_group_counts_nothing(warps, rng, dtype):
    """Not even NaN: it is not multiplied by 0."""
    x, weight, dy = inputs(rng, dtype, *CASES[5])
    whole = forward(warps, x, weight, dy, 1, 2, dtype), *gradients(warps, x, weight, dy, 1, 2, dtype)
    for array in (x, weight, dy):
        array[len(array) // 2:] = np.nan
    halves = forward(warps, x, weight, dy, 1, 2, dtype), *gradients(warps, x, weight, dy, 1, 2, dtype)
    for expected, got in zip(whole, halves):
        half = len(got) // 2
        assert np.array_equal(got[:half], expected[:half]) and np.isnan(got[half:]).all()


def test_results_repeat_bit_for_bit(warps, rng, monkeypatch):
    monkeypatch.setattr(conv_tensor_core, "LEAST_STEPS", 1)
    arguments = *inputs(rng, "bfloat16", *CASES[3]), 1, 1, "bfloat16"
    for first, second in zip(gradients(warps, *arguments), gradients(warps, *arguments)):
        assert np.array_equal(first, second)


def test_results_in_slices_of_buffers(warps, rng):
    """As Res2Net has them. The channels beside them stay."""
    x, weight, dy = inputs(rng, "float32", *CASES[0])
    device_x, device_weight, device_dy = (warps.array(a, "float32") for a in (x, weight, dy))
    out, out_dx = (warps.poison((20, *a.shape[1:]), "float32") for a in (dy, x))
    conv_tensor_core.forward(device_x, device_weight, out[2:18], None, None, stride=1, padding=1, groups=1)
    conv_tensor_core.backward_x(device_dy, device_weight, out_dx[2:18], None, stride=1, padding=1, groups=1)
    for buffer in map(warps.host, (out, out_dx)):
        assert np.isfinite(buffer[2:18]).all() and np.isnan(buffer[:2]).all() and np.isnan(buffer[18:]).all()


def test_arrays_that_do_not_begin_with_a_piece_are_refused(warps, rng):
    x, weight, dy = (warps.array(a, "float32") for a in inputs(rng, "float32", *CASES[0]))

    def shifted(like):
        return warps.poison((like.size + 1,), "float32")[1:].reshape(like.shape)

    settings = dict(stride=1, padding=1, groups=1)
    for message, function, arguments in (
            ("input", conv_tensor_core.forward, (shifted(x), weight, dy, None, None)),
            ("result", conv_tensor_core.forward, (x, weight, shifted(dy), None, None)),
            ("plus", conv_tensor_core.backward_x, (dy, weight, x, shifted(x))),
            ("dy", conv_tensor_core.backward_weight, (shifted(dy), x, weight)),
            ("x", conv_tensor_core.backward_weight, (dy, shifted(x), weight))):
        with pytest.raises(ValueError, match=rf"^conv: {message} \(.* does not begin at a multiple of 16 bytes, as tensor cores need"):
            function(*arguments, **settings)


# ---- where it may be taken -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape, weight, padding, groups, dtype, expected", [
    ((64, 32, 32, 128), (64, 64, 3, 3), 1, 1, "bfloat16", True),
    ((64, 32, 32, 128), (64, 64, 3, 3), 1, 1, "float16", True),
    ((64, 32, 32, 128), (64, 64, 3, 3), 1, 1, "float64", False),
    ((64, 32, 32, 128), (64, 64, 3, 3), 3, 1, "bfloat16", False),    # its adjoint would need a padding of -1
    ((64, 32, 32, 128), (64, 64, 1, 1), 0, 1, "bfloat16", False),
    ((64, 32, 32, 100), (64, 64, 3, 3), 1, 1, "bfloat16", False),    # 200 bytes
    ((128, 32, 32, 128), (128, 64, 3, 3), 1, 2, "bfloat16", True),
    ((128, 32, 32, 128), (128, 4, 3, 3), 1, 32, "bfloat16", False),  # narrow groups have kernels of their own
    ((3, 32, 32, 128), (64, 3, 3, 3), 1, 1, "bfloat16", False),
])
def test_where_it_fits(shape, weight, padding, groups, dtype, expected):
    x, weight = (np.broadcast_to(np.zeros((), storage_dtype(dtype)), shape) for shape in (shape, weight))
    assert conv_tensor_core.fits(x, weight, padding, groups) is expected
    assert conv_tensor_core.applies(x, weight, padding, groups) is False  # arrays on the CPU


def test_float32_needs_leave(monkeypatch):
    """TF32 is asked for, never implicit."""
    x, weight = (np.broadcast_to(np.float32(0), shape) for shape in ((64, 32, 32, 100), (64, 64, 3, 3)))
    for allowed in (False, True):
        monkeypatch.setattr(blas, "allow_tf32", allowed)
        assert conv_tensor_core.fits(x, weight, 1, 1) is allowed


@pytest.mark.parametrize("results, rows", [(5, 64), (64, 64), (65, 128), (128, 128), (129, 64), (256, 128), (320, 64)])
def test_rows_of_a_tile(results, rows):
    assert conv_tensor_core._tile_rows(results, 1000, 132) == rows


@pytest.mark.parametrize("results, beside, rows", [(128, 66, 64), (128, 67, 128), (512, 16, 64), (512, 17, 128), (72, 1, 64)])
def test_rows_of_a_tile_where_larger_ones_leave_multiprocessors_without(results, beside, rows):
    assert conv_tensor_core._tile_rows(results, beside, 132) == rows


@pytest.mark.parametrize("batch, box", [(8, (8, 4, 4)), (16, (16, 4, 2)), (32, (32, 2, 2)), (40, (8, 4, 4)), (48, (16, 4, 2)),
                                        (100, (8, 4, 4)), (128, (32, 2, 2))])
def test_box_of_a_tile(batch, box):
    assert conv_tensor_core._box(batch) == box
    assert np.prod(box) == conv_tensor_core.COLUMNS


@pytest.mark.skipif(not TENSOR_CORES, reason="there is no NVIDIA GPU of compute capability 8.0 or more")
@pytest.mark.parametrize("channels, size, groups", [(64, 32, 1), (128, 16, 1), (256, 8, 1), (128, 32, 2), (96, 32, 2)])
def test_layers_of_networks_on_a_gpu(rng, monkeypatch, channels, size, groups, dtype):
    """At batch 128, in as many parts as this GPU gets, against the portable kernels in float64, which never come here."""
    monkeypatch.setattr(blas, "allow_tf32", True)
    monkeypatch.setattr(conv_tensor_core, "_multiprocessors", OF_THIS_GPU)
    target = Target("cuda")
    x, weight, dy = inputs(rng, dtype, (channels, size, size, 128), channels, 1, groups)
    exact_x, exact_weight, exact_dy = map(target.array, (x, weight, dy))
    assert conv_tensor_core.applies(target.array(x, dtype), target.array(weight, dtype), 1, groups)
    y, dweight = conv.forward(exact_x, exact_weight, padding=1, groups=groups), target.poison(weight.shape, "float64")
    dx = conv.backward(exact_dy, exact_x, exact_weight, dweight, padding=1, groups=groups)
    got = forward(target, x, weight, dy, 1, groups, dtype), *gradients(target, x, weight, dy, 1, groups, dtype)
    assert_close(got[0], target.host(y), tolerance(dtype, 9 * channels // groups), "y")
    assert_close(got[1], target.host(dx), tolerance(dtype, 9 * channels // groups), "dx")
    assert_close(got[2], target.host(dweight), tolerance("float32", dy[0].size), "dweight")


# ---- the vocabulary of tensor_core.cuh -----------------------------------------------------------------------------------


def test_product_of_fragments(warps, rng, dtype):
    """On a GPU this says that the emulator's layouts of fragments are the hardware's."""
    depth = 8 if dtype == "float32" else 16
    left, right = factors(rng, (16, depth), dtype), factors(rng, (depth, 16), dtype)
    products = warps.poison((1 if dtype == "float32" else 2, 16, 16), "float32")
    VOCABULARY.multiply[1, 32](*(warps.array(a, dtype) for a in (left, right, right.T)), products)
    for product in warps.host(products):
        assert_close(product, left @ right, 1e-6)


def test_tf32_of_special_numbers(warps):
    """Infinity stays infinity and NaN is NaN, of all bit patterns; ties are rounded away from zero."""
    left, right = np.zeros((16, 8), np.float32), np.eye(8, 16, dtype=np.float32)
    left[:, 0] = [1, np.inf, -np.inf, np.nan, 1e-40, 3e38, -2, 0, 1 + 2.0**-10, *[1] * 7]
    left.view(np.uint32)[9, 0] = 0x7fffffff
    products = warps.poison((1, 16, 16), "float32")
    VOCABULARY.multiply[1, 32](*(warps.array(a) for a in (left, right, right.T)), products)
    got = warps.host(products)[0]
    assert np.isnan(got[[1, 2, 3, 9]]).all(axis=1).any()  # infinity * 0 beside it
    assert np.isnan(got[3]).all() and np.isnan(got[9]).all()
    assert got[1, 0] == np.inf and got[2, 0] == -np.inf and got[8, 0] == 1 + 2.0**-10


FAULTS = {
    "broken_branch": r"divergent operation of a warp in block \(0, 0\): thread 0 at tensor_core.cuh:\d+, thread 16 at its end",
    "broken_barrier": r"race: thread 0 reads tiles\[32\], thread 8 wrote it, no barrier in between",
    "broken_wait": r"thread 0 reads tiles\[0\] before anyone wrote it",
    "broken_commit": r"thread 0 reads tiles\[0\] before anyone wrote it",
    "broken_overwriting": r"race: thread 1 reads tiles\[1\], thread 0 wrote it, no barrier in between",
    "broken_alignment": r"thread 0 copies 16 bytes that are not aligned, to element 1",
    "broken_banks": "a warp reads elements 0 and 32 at once, from the same banks",
    "broken_banks_of_words": "a warp reads elements 0 and 32 at once, from the same banks",
}


def through_shared_memory(target, kernel, threads=32):
    x, y = np.arange(128, dtype=np.float32), target.poison(128, "float32")
    getattr(BROKEN, kernel)[1, threads](target.array(x), y, 128)
    assert np.array_equal(target.host(y), x)


def test_fixed_kernel_is_right(warps):
    through_shared_memory(warps, "fixed")


@pytest.mark.parametrize("kernel", FAULTS)
def test_faults_of_warps_are_caught(emulator, kernel):
    with pytest.raises(KernelFault, match=f"^{kernel}: {FAULTS[kernel]}"):
        through_shared_memory(emulator, kernel)
    through_shared_memory(emulator, "fixed")  # nothing of the fault is left behind


def test_half_a_warp_is_none(emulator):
    with pytest.raises(KernelFault, match=r"^fixed: an operation of a warp in block \(0, 0\) by 16 threads"):
        through_shared_memory(emulator, "fixed", 16)


@pytest.mark.parametrize("threads", [32, 256, 512])
def test_another_block_size_is_refused(emulator, rng, monkeypatch, threads):
    x, weight, dy = inputs(rng, "float32", *SMALL[0])
    with launch_settings(emulator.settings["mode"], threads):  # which no launch of these kernels heeds
        forward(emulator, x, weight, dy, 1, 1, "float32")
        monkeypatch.setattr(conv_tensor_core, "THREADS", threads)
        with pytest.raises(KernelFault, match=f"_forward_64: needs blocks of 128 threads, has one of {threads}"):
            forward(emulator, x, weight, dy, 1, 1, "float32")
        with pytest.raises(KernelFault, match=f"_dweight_64: needs blocks of 128 threads, has one of {threads}"):
            weight_gradient(emulator, x, dy, weight.shape, 1, 1, "float32")


def test_the_fast_host_target_has_no_warps(rng):
    with pytest.raises(CompileError, match="tensor cores need whole warps, and a block of the fast host target is one thread"):
        forward(Target("fast"), *inputs(rng, "float32", *SMALL[0]), 1, 1, "float32")
