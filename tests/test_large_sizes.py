"""Index arithmetic beyond 2^31 elements, by sizes alone: huge arrays of which kernels touch only what lies far apart.

Addresses that are only reserved take no memory. Each kernel runs on a near layout and on a far one, and must compute the
same bits. What has to touch all elements, and GPUs, need the memory: they are not here.
"""

import mmap
import re

import numpy as np
import pytest

from minidl.kernels import LARGEST_COUNT, MAX_THREADS, Kernels, launch_settings
from minidl.ops import (augment, avgpool, batchnorm, bias, conv, conv_product, conv_tensor_core, group_conv, maxpool,
                        winograd)
from test_kernels import FOLDER

LIMIT = 2**31
NO_RESERVE = 0x4000  # MAP_NORESERVE, for which Python before 3.13 has no name


def reserved(shape, dtype=np.float32):
    """An array of zeros that takes memory only where it is touched; so are those where wrong indices would lead."""
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    in_front = 8 * LIMIT * np.dtype(dtype).itemsize
    try:
        memory = mmap.mmap(-1, in_front + size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
    except OSError as error:
        pytest.skip(f"this system does not reserve {size >> 30} GiB of addresses: {error}")
    return np.frombuffer(memory, dtype, offset=in_front).reshape(shape)


@pytest.fixture
def on_host(target):
    if target.place.name != "cpu":
        pytest.skip("a GPU has no memory that is only reserved")


def spread(content, shape):
    """The content at the beginning of each axis of an array of `shape`."""
    array = reserved(shape, content.dtype)
    array[tuple(map(slice, content.shape))] = content
    return array


def assert_same_when_spread(launch, contents, results, far):
    """launch(sizes) of arrays; contents: {name: array}; results: {name: shape of what is written}; far: {name: shape}."""
    written = []
    for layout in ({}, far):
        arrays = {name: spread(content, layout.get(name, content.shape)) for name, content in contents.items()}
        arrays |= {name: spread(np.full(shape, np.nan, np.float32), layout.get(name, shape)) for name, shape in results.items()}
        launch(**arrays)
        written.append({name: arrays[name][tuple(map(slice, shape))] for name, shape in results.items()})
    assert max(np.prod(shape, dtype=np.int64) for shape in far.values()) > LIMIT
    for name in results:
        assert np.isfinite(written[0][name]).all() and written[0][name].any()
        assert np.array_equal(written[0][name], written[1][name]), name


def values(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


# ---- rows of a matrix

CHANNELS, TILE, FAR_ROW = 5, 40, 2**30  # the last row begins at 2^32
WHOLE_ROWS = re.compile("bn_(forward|backward)(_relu|_add_relu)?")  # they find them as the others do, and read all of them
BY_ROWS = [(kernels, name) for kernels in (batchnorm.KERNELS, bias.KERNELS) for name, parameters in kernels.signatures.items()
           if {"row", "tile"} <= {it.name for it in parameters} and name != "bias_add" and not WHOLE_ROWS.fullmatch(name)]


@pytest.mark.parametrize("kernels, name", BY_ROWS, ids=[name for _, name in BY_ROWS])
def test_tiles_of_rows(on_host, rng, kernels, name):
    """Grids of tiles x rows: with one tile, the beginning of each row."""
    signature = kernels.signatures[name]
    moments = dict.fromkeys(it.name for it in signature if it.is_optional and it.c_type == "acc")  # None: they are of all tiles
    taken = [it for it in signature if it.is_array and it.name not in moments]
    shapes = {it.name: (CHANNELS, TILE) if it.c_type == "real" else (CHANNELS,) for it in taken}
    read = {it.name: abs(values(rng, *shapes[it.name])) for it in taken if it.is_const or it.name.startswith("running")}

    def launch(**arrays):
        row = next(array.shape[1] for array in arrays.values() if array.ndim == 2)
        numbers = {"row": row, "tile": TILE, "inverse_m": 0.01, "eps": 1e-5, "momentum": 0.1}
        getattr(kernels, name)[(1, CHANNELS), 128](*({**arrays, **moments, **numbers}[it.name] for it in signature))

    assert_same_when_spread(launch, read, {it: shapes[it] for it in shapes if it not in read},
                            {it: (CHANNELS, FAR_ROW) for it in shapes if len(shapes[it]) == 2})


@pytest.mark.parametrize("mode, threads", [("fast", 1), ("emulate", 32), ("emulate", MAX_THREADS)])
@pytest.mark.parametrize("row", [FAR_ROW, LARGEST_COUNT], ids=["2^30", "the longest"])
def test_the_end_of_rows(mode, threads, row):
    """In a loop over the longest row, even the largest block's step past its end still is an int."""
    y, begin = reserved((CHANNELS, row)), row - 100
    with launch_settings(mode, threads):
        bias.KERNELS.bias_add[(1, CHANNELS), threads](y, np.arange(1, 6, dtype=np.float32), row, begin, 100, 4096)
    for o in range(CHANNELS):
        assert (y[o, begin:] == o + 1).all() and (y[o, begin - 2000:begin] == 0).all() and (y[o, :2000] == 0).all()


# ---- windows: the images that they look at are far wider than the result asks for

FAR = 2**27  # of a width
BATCH, SIZE, KERNEL, STRIDE, PADDING = 3, (4, 5), (3, 3), 2, 1
OUT_SIZE = (2, 2)  # without the windows that reach beyond the right edge, which is elsewhere
WINDOW = (*KERNEL, STRIDE, PADDING)


@pytest.mark.parametrize("pool", [maxpool.KERNELS.maxpool_forward, avgpool.KERNELS.avgpool_forward], ids=lambda it: it.name)
def test_pooling(on_host, rng, pool):
    x, out = values(rng, 6, *SIZE, BATCH), (6, *OUT_SIZE, BATCH)
    winner = [np.zeros(out, np.uint16)] * (pool.name == "maxpool_forward")
    assert_same_when_spread(
        lambda x, y: pool[6 * OUT_SIZE[0], 32](x, y, *winner, *x.shape[1:3], *OUT_SIZE, BATCH, *WINDOW),
        {"x": x}, {"y": out}, {"x": (6, SIZE[0], FAR, BATCH)})


@pytest.mark.parametrize("pool", [maxpool.KERNELS.maxpool_backward, avgpool.KERNELS.avgpool_backward], ids=lambda it: it.name)
def test_gradients_of_pooling(on_host, rng, pool):
    read = {"dy": values(rng, 6, 3, 3, BATCH)}
    read |= {"winner": rng.integers(9, size=(6, 3, 3, BATCH), dtype=np.uint16)} if pool.name == "maxpool_backward" else {}

    def launch(dx, dy, **winner):
        pool[6 * 5, 32](dy, *winner.values(), dx, 5, 5, *dy.shape[1:3], BATCH, *WINDOW)

    assert_same_when_spread(launch, read, {"dx": (6, 5, 5, BATCH)}, {name: (6, 3, FAR, BATCH) for name in read})


def test_im2col(on_host, rng):
    """x and cols are far both; of each row of cols, the first stretch."""
    depth, stretch = 6 * 9, 4

    def launch(x, cols):
        columns = cols.shape[1] * BATCH
        conv.KERNELS.im2col[(depth, 1), 32](
            x, cols, *x.shape[1:3], cols.shape[1], BATCH, *WINDOW, 0, cols.shape[1], stretch, columns)

    assert_same_when_spread(launch, {"x": values(rng, 6, 4, 9, BATCH)}, {"cols": (depth, stretch, BATCH)},
                            {"x": (6, 4, FAR, BATCH), "cols": (depth, FAR, BATCH)})


@pytest.mark.parametrize("far", [{"dcols": (54, 3, 2**24, BATCH)}, {"dx": (6, 2**25, 5, BATCH)}], ids=str)
def test_col2im(on_host, rng, far):
    """Columns of wide results; and the first input rows of high images."""
    def launch(dx, dcols):
        _, height, width, _ = dx.shape
        conv.KERNELS.col2im[6 * 5, 32](dcols, dx, 6, height, width, dcols.shape[2], BATCH, *WINDOW, 0, 3, 0, 0)

    assert_same_when_spread(launch, {"dcols": values(rng, 54, 3, 3, BATCH)}, {"dx": (6, 5, 5, BATCH)}, far)


def test_convolution_in_groups(on_host, rng):
    packed, tiles = group_conv._pack(values(rng, 4, 3, *KERNEL), 2, adjoint=False)
    assert_same_when_spread(
        lambda x, y: group_conv.KERNELS.group_conv_forward[2 * OUT_SIZE[0] * tiles, 32](
            x, packed, y, None, None, 3, *x.shape[1:3], 2, *OUT_SIZE, BATCH, *WINDOW),
        {"x": values(rng, 6, *SIZE, BATCH)}, {"y": (4, *OUT_SIZE, BATCH)}, {"x": (6, SIZE[0], FAR, BATCH)})


def test_input_gradient_of_convolution_in_groups(on_host, rng):
    packed, tiles = group_conv._pack(values(rng, 6, 2, *KERNEL), 2, adjoint=True)
    assert_same_when_spread(
        lambda dy, dx: group_conv.KERNELS.group_conv_backward_x[2 * 5 * tiles, 32](
            dy, packed, dx, None, 2, 5, 5, 3, *dy.shape[1:3], BATCH, *WINDOW),
        {"dy": values(rng, 6, 3, 3, BATCH)}, {"dx": (4, 5, 5, BATCH)}, {"dy": (6, 3, FAR, BATCH)})


def test_weight_gradient_of_convolution_in_groups(on_host, rng):
    dy = values(rng, 4, *OUT_SIZE, BATCH)
    assert_same_when_spread(
        lambda x, dweight: group_conv.KERNELS.group_conv_tile_dweight[2 * 5, 32](
            x, dy, dweight, 2, 3, *x.shape[1:3], 2, *OUT_SIZE, BATCH, *WINDOW, 2, 5),
        {"x": values(rng, 6, *SIZE, BATCH)}, {"dweight": (4, 3, *KERNEL)}, {"x": (6, SIZE[0], FAR, BATCH)})


# ---- Winograd's tiles: two of the first row, of images and in matrices that are far wider; products of such rows

TILES = 2


@pytest.fixture(params=[2, 4])
def outputs(request):
    """Of a tile, along a side."""
    return request.param


def test_winograd_input(on_host, rng, outputs):
    elements, width = (outputs + 2)**2, outputs * TILES + 5

    def launch(x, v):
        winograd.KERNELS.winograd_input[(TILES, 6), 32](x, v, outputs, *x.shape[1:3], 16, 16, 1, TILES, 0, 6, v.shape[2],
                                                    v[0].size)

    for far in ({"x": (6, 4, FAR, 16)}, {"v": (elements, 6, 2**29 // elements)}):
        assert_same_when_spread(launch, {"x": values(rng, 6, 4, width, 16)}, {"v": (elements, 6, TILES * 16)}, far)


def test_winograd_output(on_host, rng, outputs):
    m = values(rng, (outputs + 2)**2, 4, TILES * 16)
    assert_same_when_spread(
        lambda y: winograd.KERNELS.winograd_output[(TILES, 4), 32](m, y, None, None, outputs, *y.shape[1:], 16, TILES, 0),
        {}, {"y": (4, 2, outputs * TILES, 16)}, {"y": (4, 2, FAR, 16)})


def test_winograd_output_gradient(on_host, rng, outputs):
    elements = (outputs + 2)**2

    def launch(dy, e):
        winograd.KERNELS.winograd_output_gradient[(TILES, 4), 32](dy, e, outputs, *dy.shape[1:], 16, TILES, 0, 4, e.shape[2],
                                                              e[0].size)

    for far in ({"dy": (4, 2, FAR, 16)}, {"e": (elements, 4, 2**30 // elements)}):
        assert_same_when_spread(launch, {"dy": values(rng, 4, 2, outputs * TILES, 16)}, {"e": (elements, 4, TILES * 16)}, far)


def test_winograd_in_one_pass(on_host, rng, outputs):
    """Where it writes y is what winograd_output asks, too."""
    product = conv_product.product_for(np.zeros(1, np.float32))
    rows = product.tile_rows(2)
    elements, element = (outputs + 2)**2, 2 * -(-2 // rows) * 3 * rows
    u = values(rng, elements * element)
    rooms = [product.apart(channels * 16) for channels in (3, rows)]
    v, m = (np.empty(2 * elements * room, np.float32) for room in rooms)

    def launch(x, y):
        winograd.KERNELS.winograd_conv[1, 32](x, u, element, v, m, y, None, None, outputs, 2, 3, 2, *x.shape[1:3], *y.shape[1:], 1,
                                              2, 16, *rooms)

    assert_same_when_spread(launch, {"x": values(rng, 6, 4, 2 * outputs + 5, 16)}, {"y": (4, 2, 2 * outputs, 16)},
                            {"x": (6, 4, FAR, 16)})


def test_packed_products(on_host, rng):
    product = conv_product.product_for(np.zeros(1, np.float32))
    weight = values(rng, 10, 3, 3, 3)

    def launch(x, y):
        windows = conv._Geometry(x, weight, stride=1, padding=1, groups=2)
        product.convolve(product.pack(windows.weight_matrix(weight)), x, windows, y, pixels=(0, 5))

    assert_same_when_spread(launch, {"x": values(rng, 6, 4, 9, 16)}, {"y": (2, 5, 5 * 16)}, {"x": (6, 4, FAR, 16)})


def test_packed_products_of_the_last_pixels(on_host, rng):
    """Of an image with more than 2^31 of them."""
    side, product = 46342, conv_product.product_for(np.zeros(1, np.float32))
    x, corner, weight = reserved((1, side, side, 1)), values(rng, 1, 2, 8, 1), values(rng, 5, 1, 3, 3)
    x[:, -2:, -8:] = corner
    windows = conv._Geometry(x, weight, stride=1, padding=1, groups=1)
    assert windows.pixels > LIMIT
    y = np.full((1, 5, 6), np.nan, np.float32)
    product.convolve(product.pack(windows.weight_matrix(weight)), x, windows, y, pixels=(windows.pixels - 6, windows.pixels))
    assert np.array_equal(y[0], conv.forward(corner, weight, padding=1)[:, -1, -6:, 0])


def test_packed_products_with_strides_over_many_images(on_host, rng):
    """From the last images of a pixel to the first of the next, which two strides of images lie behind."""
    batch, count = 2**30 + 64, 5
    sizes = np.empty(8, np.int32)
    conv_product.KERNELS.gemm_sizes[1, 1](np.empty(1, np.float32), sizes)
    panel, x, weight = int(sizes[1]), reserved((1, 1, 3, batch)), values(rng, 2, 1, 1, 1)
    x[0, 0, 0, -count:], x[0, 0, 2, :count] = ends = values(rng, 2, count)
    y = np.full((2, 2 * count), np.nan, np.float32)
    packed = conv_product.product_for(x).pack(weight.reshape(1, 2, 1))
    conv_product.KERNELS.conv_panels[1, 32](
        packed, x, np.empty((1, panel), np.float32), y, None, None, 1, 2, 1, 1, 3, 2, batch, 1, 1, 2, 0, batch - count, 2 * count,
        panel, panel, 1)
    assert np.array_equal(y, weight.reshape(2, 1) * ends.reshape(1, -1))


def test_packed_products_of_rows(on_host, rng):
    product = conv_product.product_for(np.zeros(1, np.float32))
    assert_same_when_spread(
        lambda dy, cols, dw: product.multiply_rows(dy, cols, dw, dy.shape[2], 33, False),
        {"dy": values(rng, 2, 10, 33), "cols": values(rng, 2, 7, 33)}, {"dw": (2, 10, 7)},
        {"dy": (2, 10, FAR), "cols": (2, 7, FAR)})


# ---- flat arrays


def test_images_of_a_large_data_set(on_host, rng):
    shape, count = (3, 4, 5), 2**26
    images, indices = reserved((count, *shape), np.uint8), np.array([7, count - 1, count // 2], np.int32)
    images[indices] = chosen = rng.integers(256, size=(3, *shape), dtype=np.uint8)
    x = augment.apply(images, indices, np.zeros((5, 3), np.int32), np.ones(3, np.float32), np.zeros(3, np.float32),
                      dtype=np.float32)
    assert images.size > LIMIT and np.array_equal(x, chosen.transpose(1, 2, 3, 0))


@pytest.mark.parametrize("mode, threads", [("fast", 1), ("emulate", 2)])
def test_a_loop_of_the_grid(mode, threads):
    """It comes to the last elements, and to each once."""
    n, last = LIMIT + 7, np.zeros(10, np.int32)
    with launch_settings(mode, threads):
        Kernels(FOLDER / "vocabulary.cu").count_last[4, threads](last, n, len(last))
    assert (last == 1).all()


# ---- what an int cannot count


@pytest.mark.parametrize("row", [LARGEST_COUNT + 1, LIMIT])
def test_a_row_that_is_too_long(row):
    """Refused at the first kernel that would count it."""
    x, per_channel = reserved((1, 1, row, 1)), np.ones(1, np.float32)
    with pytest.raises(TypeError, match=f"bn_tile_moments: row = {row} does not fit int32, less the 1024 by which a loop may"):
        batchnorm.forward(x, *[per_channel] * 4, training=True, momentum=0.1, eps=1e-5)
    with pytest.raises(TypeError, match=f"bias_add: row = {row} does not fit int32"):
        bias.add(x, per_channel)


def test_convolution_on_tensor_cores(rng):
    packed = values(rng, 2, 1, 1, 9, 64, 16)

    def launch(x, y):
        conv_tensor_core.KERNELS.conv_tensor_core_forward_64[2, 128](
            x, packed, y, None, None, 2, *x.shape[1:3], 3, 4, 4, 8, 1, 1, 8, 4)

    with launch_settings("emulate"):
        assert_same_when_spread(launch, {"x": values(rng, 4, 4, 9, 8)}, {"y": (6, 4, 4, 8)}, {"x": (4, 4, FAR, 8)})


def test_weight_gradient_on_tensor_cores(rng):
    def launch(dy, x, dweight):
        conv_tensor_core.KERNELS.conv_tensor_core_dweight_64[2, 128](
            dy, x, dweight, 2, 2, *x.shape[1:3], 3, *dy.shape[1:], 1, 1, 2)

    with launch_settings("emulate"):
        assert_same_when_spread(launch, {"dy": values(rng, 6, 1, 5, 8), "x": values(rng, 4, 1, 5, 8)},
                                {"dweight": (6, 2, 3, 3)}, {"dy": (6, 1, FAR, 8), "x": (4, 1, FAR, 8)})
