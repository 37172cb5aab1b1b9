"""Negative controls: bugs planted in the backwards, each of which must turn a test of the ops red.

A bug is a replacement in the text of a kernel file or of a Python function. The check is a test from the other files,
or one below in their manner; it passes on the true text and must fail on the changed one. Where the text to replace
is not there as often as it should be, the test fails too: a bug that is planted nowhere proves nothing.
"""

import importlib
import inspect
import textwrap
from dataclasses import dataclass
from functools import partial
from typing import Any, Callable

import numpy as np
import pytest

import test_augment
import test_batchnorm
import test_conv
import test_conv_tensor_core
import test_dropout
import test_elementwise
import test_layers
import test_linear
import test_loss
import test_models
import test_optimizer
import test_pooling
from conftest import MACHINES, Target, active
from minidl import host_build, layer, layers, optim
from minidl.host_build import OPS
from minidl.kernels import KernelFault, Kernels, launch_settings
from minidl.ops import batchnorm, conv, conv_product, conv_tensor_core, linear, winograd
from models import res2net, wideresnet
from reference import assert_close

LAUNCHERS = {"packed_gemm.cu": "conv_product"}  # modules that launch a file of another name


class QuicklyBuilt(Kernels):
    """Kernels that the host's compiler does not optimize: over a hundred libraries are built here, for one launch or two each."""

    def host_library(self, mode, precision):
        with pytest.MonkeyPatch.context() as patch:
            flags = ["-O0" if flag.startswith("-O") else flag for flag in host_build.FLAGS[mode]]
            patch.setitem(host_build.FLAGS, mode, flags)
            return super().host_library(mode, precision)


@dataclass
class Bug:
    what: str
    place: Any        # the name of a file in minidl/ops, or a function
    old: str
    new: str
    check: Callable   # of (target, rng); raises AssertionError
    times: int = 1    # how often `old` occurs
    on_cpu: bool = False   # a GPU never runs this text

    def check_true_text(self, target, folder):
        with pytest.MonkeyPatch.context() as patch:
            if not callable(self.place):
                self._use((OPS / self.place).read_text(), folder / "true", patch)
            self.check(target, np.random.default_rng(20161))

    def check_planted(self, target, folder):
        with pytest.MonkeyPatch.context() as patch:
            if callable(self.place):
                names = {}
                exec(self._changed(textwrap.dedent(inspect.getsource(self.place))), dict(self.place.__globals__), names)
                patch.setattr(self.place, "__code__", names[self.place.__name__].__code__)
            else:
                self._use(self._changed((OPS / self.place).read_text()), folder / "planted", patch)
            self.check(target, np.random.default_rng(20161))

    def _use(self, text, folder, patch):
        folder.mkdir()  # of its own: what a file has been read as is remembered
        copy = folder / self.place  # its headers are found in minidl/ops
        copy.write_text(text)
        module = importlib.import_module("minidl.ops." + LAUNCHERS.get(self.place, copy.stem))
        patch.setattr(module, "KERNELS", QuicklyBuilt(copy, module.KERNELS.fixed_threads))

    def _changed(self, text):
        found = text.count(self.old)
        assert found == self.times, f"the text to replace occurs {found} times, not {self.times}: {self.old}"
        return text.replace(self.old, self.new)


# ---- checks: (target, rng) -> None, or AssertionError ------------------------------------------------------------


def relu(target, rng):
    test_elementwise.test_relu(target, rng, (3, 2, 2, 5), "float64")


def relu_at_its_kink(target, rng):
    test_elementwise.test_relu_at_its_kink_and_beyond_numbers(target)


def bias_of_two_tiles(target, rng):
    test_elementwise.test_bias(target, rng, (2, 70, 9, 8), "float64")


def norm(variant="plain", training=True):
    return lambda target, rng: test_batchnorm.test_gradients(target, rng, (3, 4, 5, 2), variant, training)


def norm_of_many_tiles(target, rng):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batchnorm, "TILE", 16)
        norm()(target, rng)


def running_statistics(target, rng):
    test_batchnorm.test_running_statistics(target, rng, (3, 4, 5, 2), "float64")


def running_statistics_by_tiles(target, rng):
    """Of rows of 229 tiles, a block each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batchnorm, "TILE", 16)
        test_batchnorm.go("a block a tile", patch)
        test_batchnorm.test_running_statistics(target, rng, (2, 9, 11, 37), "float64")


def convolution(number, way="all at once"):
    """The gradients of a case of test_conv.py, computed in one of its ways."""

    def check(target, rng):
        with pytest.MonkeyPatch.context() as patch:
            test_conv.test_gradients(target, rng, partial(test_conv.choose, patch), *test_conv.CASES[number], way)

    return check


def many_pixels():
    def check(target, rng):
        with pytest.MonkeyPatch.context() as patch:
            test_conv.test_sums_over_many_pixels(target, rng, partial(test_conv.choose, patch), patch, 1, 1, 0, 2, parts=6)

    return check


def directly(number):
    return convolution(number, "directly")


def emulated(check):
    """A check whose kernels have no fast host target."""

    def check_emulated(target, rng):
        target = Target("emulate")
        with launch_settings("emulate"):
            try:
                check(target, rng)
            except KernelFault as fault:
                raise AssertionError("found by the emulator") from fault

    return check_emulated


def on_tensor_cores(number):
    """The results of a case of test_conv_tensor_core.py."""

    @emulated
    def check(target, rng):
        case = *test_conv_tensor_core.CASES[number], "bfloat16"
        test_conv_tensor_core.test_forward(target, rng, *case)
        test_conv_tensor_core.test_input_gradient_follows_the_portable_one(target, rng, *case)
        with pytest.MonkeyPatch.context() as patch:
            test_conv_tensor_core.test_weight_gradient_follows_the_portable_one(target, rng, patch, *case, "in parts")

    return check


@emulated
def strided_on_tensor_cores(target, rng):
    test_conv_tensor_core.test_strides(target, rng, *test_conv_tensor_core.STRIDED[0], "bfloat16")


@emulated
def adding_on_tensor_cores(target, rng):
    test_conv_tensor_core.test_bias_and_another_array_are_added(target, rng, test_conv_tensor_core.CASES[0], "bfloat16")


@emulated
def rounding_for_tensor_cores(target, rng):
    test_conv_tensor_core.test_factors_are_rounded_to_tf32(target, rng)


def by_winograd(number, how=""):
    return convolution(number, "by Winograd" + (f", {how} at a time" if how else ""))


def pool(op, number):
    return lambda target, rng: test_pooling.test_forward_and_gradient(target, rng, op, "float64", *test_pooling.CASES[number])


def pool_with_ties(target, rng):
    test_pooling.test_of_equal_values_the_first_gets_the_gradient(target)


def square_linear(target, rng):
    test_linear.test_forward_and_gradients(target, rng, 4, 4, 4, "float64")


def cross_entropy(smoothing):
    return lambda target, rng: test_loss.test_loss_and_gradient(target, rng, 7, 5, "float64", smoothing)


def cross_entropy_of_a_padded_batch(target, rng):
    test_loss.test_padding_columns_do_not_count(target, rng, 3)


def cross_entropy_of_mixup(target, rng):
    test_loss.test_mixup(target, rng, 0.3, 0.1, "float64")


def mixup(target, rng):
    test_augment.test_mixup_equals_the_definition(target, rng, 7, 0.3, "float64")


def dropout_values(target, rng):
    test_dropout.test_kept_values_are_scaled_and_the_mask_repeats(target, test_dropout.dropout.apply, "float64")


def dropout_of_channels(target, rng):
    test_dropout.test_channel_dropout_drops_whole_channels(target)


def dropout_masks(target, rng):
    test_dropout.test_masks_are_the_same_on_every_target(target)


def dropout_layer(target, rng):
    """dx = dy * mask, with the mask of the forward, although the step has moved on."""
    layer = layers.Dropout(0.3).initialize(target.place, "float64")
    mask, dy = target.host(layer.forward(target.array(np.ones((3, 4, 4, 5))))), rng.normal(size=(3, 4, 4, 5))
    layer.step += 1
    assert_close(target.host(layer.backward(target.array(dy))), dy * mask, 1e-12, "dx")


def network(target, rng):
    test_layers.test_network_gradient_in_random_directions(target, rng, test_layers.every_layer, (3, 8, 8, 4))


def architecture(name, **options):
    return lambda target, rng: test_models.test_gradients_in_random_directions(target, name, options)


def optimizer(name):
    return lambda target, rng: test_optimizer.test_steps_equal_the_definition(target, rng, name, "float64")


def restart(name):
    return lambda target, rng: test_optimizer.test_restart_forgets_the_moments_and_nothing_else(target, rng, name)


def clipping(target, rng):
    for clip_norm in (3.0, 1e4):
        test_optimizer.test_the_gradient_is_clipped_by_the_norm_of_all_of_it(target, rng, 9000, clip_norm, "float16")


def infinity(target, rng):
    test_optimizer.test_a_step_with_such_a_gradient_is_skipped_in_float16(target, rng, np.inf, 4321)


def average(target, rng):
    test_optimizer.test_average_of_weights_and_running_statistics(target, rng, "float64", 0.999)


def average_of_good_steps(target, rng):
    test_optimizer.test_a_skipped_step_does_not_move_the_average(target, rng, "float16", [0, 3])


def swap(target, rng):
    test_optimizer.test_the_network_gets_its_own_weights_back(target, rng, "bfloat16")


def failure(target, rng):
    test_optimizer.test_without_loss_scaling_all_stays_as_before_the_first_such_gradient(target, rng, "sgd", "float32")


# ---- bugs --------------------------------------------------------------------------------------------------------

BUGS = [
    Bug("relu: sign of dx", "relu.cu", "y > zero ? dy : zero", "y > zero ? -dy : zero", relu),
    Bug("relu: mask lost", "relu.cu", "y > zero ? dy : zero", "dy", relu),
    Bug("relu: gradient at the kink", "relu.cu", "y > zero", "y >= zero", relu_at_its_kink),

    Bug("batch norm: dx without its mean term", "batchnorm.cu", "(g - g_mean - (x", "(g - (x", norm()),
    Bug("batch norm: dx without its xhat term", "batchnorm.cu", " - (x - channel.mean) * slope", "", norm()),
    Bug("batch norm: 1/m missing", batchnorm.backward, "1 / row if training", "1.0 if training", norm()),
    Bug("batch norm: 1/m in evaluation", batchnorm.backward, "1 / row if training else 0.0", "1 / row",
        norm(training=False)),
    Bug("batch norm: dx without gamma", "batchnorm.cu", "= channel.scale * (g -", "= channel.rstd * (g -", norm()),
    Bug("batch norm: dx without rstd", "batchnorm.cu", "= channel.scale * (g -", "= channel.scale / channel.rstd * (g -", norm()),
    Bug("batch norm: dgamma without rstd", "batchnorm.cu", "= sums.deviation * rstd[c]", "= sums.deviation", norm(),
        times=2),
    Bug("batch norm: only the first tile of dbeta", "batchnorm.cu", "sum.g += tile.g", "if (sum.g == 0) sum.g = tile.g",
        norm_of_many_tiles),
    Bug("batch norm: tiles of moments not shifted to one mean", "batchnorm.cu",
        "fma(delta * sum.count * share, delta, sum.m2 + tile.m2)", "sum.m2 + tile.m2", norm_of_many_tiles),
    Bug("batch norm: tiles beyond those fetched at first are those again", "batchnorm.cu", "first_of_tile[begin + i]",
        "first_of_tile[i]", running_statistics_by_tiles),
    Bug("batch norm: running statistics moved by each tile", "batchnorm.cu", "if (tile_mean) move_running(running_mean[c]",
        "} if (tile_mean) { move_running(running_mean[c]", running_statistics_by_tiles),
    Bug("batch norm: running variance biased", "batchnorm.cu", "batch.m2 / (row - 1)", "batch.m2 / row", running_statistics),
    Bug("batch norm and relu: mask lost", "batchnorm.cu", "return affine(x, channel) > T{} ? dy : T{}", "return dy",
        norm("relu")),
    Bug("batch norm, sum and relu: dz not masked", "batchnorm.cu", "results[1] = g", "results[1] = dy",
        norm("add_relu")),

    Bug("batch norm: what is added to dx lost", "batchnorm.cu", "dx[0] += plus;", "",
        lambda target, rng: test_batchnorm.test_another_array_is_added_to_the_gradient(target, rng, (3, 4, 5, 2), "relu", "float64")),
    Bug("max-pool: every pixel of a window gets dy", "maxpool.cu",
        "winner == place ? value : result", "value", pool("max", 0)),
    Bug("max-pool, overlapping: the place in the first window for all", "maxpool.cu",
        "place - (r * size.kernel_w + k) * size.stride", "place", pool("max", 1)),
    Bug("max-pool: winner off by one", "maxpool.cu", "+ r * size.kernel_w + k)", "+ r * size.kernel_w + k + 1)", pool("max", 0)),
    Bug("max-pool: padding forgotten in the place", "maxpool.cu", "ix + size.padding - windows", "ix - windows", pool("max", 1)),
    Bug("max-pool: the last of equal values wins", "maxpool.cu", "!(value <= best)", "!(value < best)", pool_with_ties),
    Bug("average pool: dx not divided", "avgpool.cu", "size.out_width, batch, weight, share)",
        "size.out_width, batch, acc(1), share)", pool("average", 0)),

    Bug("col2im: windows over the border lost", "conv.cu", "end_of_windows(ix, stride, padding, out_width)",
        "end_of_windows(ix, stride, 0, out_width)", convolution(1)),
    Bug("col2im: kx and ky swapped", "conv.cu", "* kernel_h + ky) * kernel_w + kx", "* kernel_h + kx) * kernel_w + ky",
        convolution(1)),
    Bug("col2im: overwrites the sums of the chunk before", "conv.cu",
        "adds ? load_images<WHOLE>(pixel + n, batch - n) : Images<WHOLE>{}", "Images<WHOLE>{}",
        convolution(1, "by BLAS, one pixel at a time")),
    Bug("conv: window of the adjoint not turned", conv._adjoint_weight, "[..., ::-1, ::-1]", "", convolution(0)),
    Bug("conv: height and width of the adjoint swapped", conv._adjoint_weight, "[..., ::-1, ::-1]",
        "[..., ::-1, ::-1].swapaxes(3, 4)", convolution(0)),
    Bug("conv: groups of the adjoint mixed up", conv._adjoint_weight, "weight.reshape(groups, outputs // groups,",
        "weight.reshape(outputs // groups, groups,", convolution(0)),
    Bug("conv: dweight of the last chunk only", conv_product.Blas.weight_gradient, "columns, begin > 0)", "columns, False)",
        convolution(0, "by BLAS, one pixel at a time")),
    Bug("packed products: the sum of the last segment only", "packed_gemm.cu", "(adds ? *element : acc(0))", "acc(0)",
        many_pixels(), on_cpu=True),
    Bug("packed products: all strips in the first columns", "packed_gemm.cu", "columns + first + n", "columns + n",
        convolution(0, "one pixel at a time"), on_cpu=True),
    Bug("packed products: all parts of the columns sum the first", "packed_gemm.cu", "first = segments * column_part / column_parts",
        "first = 0", many_pixels(), on_cpu=True),
    Bug("unfolding: a strip begins with the first image of a pixel", "packed_gemm.cu", "column_begin + first, count",
        "(column_begin + first) / batch * batch, count", convolution(5, "one pixel at a time"), on_cpu=True),
    Bug("Winograd: window of the adjoint not turned", "winograd.cu", "g[adjoint ? 8 - k : k]", "g[k]", by_winograd(0)),
    Bug("Winograd: padding of the adjoint", winograd.backward_x, "2 - padding", "padding", by_winograd(5)),
    Bug("Winograd: sign in B^T", "winograd.cu", "v[0] = p2 * q2 * d[0] - (p2 + q2) * d[2]", "v[0] = p2 * q2 * d[0] + (p2 + q2) * d[2]",
        by_winograd(0)),
    Bug("Winograd: sign in A^T", "winograd.cu", "q2 * q * odd_q + m[5]", "q2 * q * odd_q - m[5]", by_winograd(0)),
    Bug("Winograd: sign in A", "winograd.cu", "e[5] = dy[3]", "e[5] = -dy[3]", by_winograd(0)),
    Bug("Winograd: sign in G^T", "winograd.cu", "dg[1] = odd_p + odd_q", "dg[1] = odd_p - odd_q", by_winograd(0)),
    Bug("Winograd: two points exchanged in G", "winograd.cu", "u[3] = even_q + odd_q", "u[3] = even_q - odd_q", by_winograd(0)),
    Bug("Winograd, 2x2: sign in A^T", "winograd.cu", "y[1] = m[1] - m[2] - m[3]", "y[1] = m[1] - m[2] + m[3]", by_winograd(0, "2x2")),
    Bug("Winograd, 2x2: sign in A", "winograd.cu", "e[3] = -dy[1]", "e[3] = dy[1]", by_winograd(0, "2x2")),
    Bug("Winograd, 2x2: sign in G^T", "winograd.cu", "dg[1] = (du[1] - du[2]) / 2", "dg[1] = (du[2] - du[1]) / 2",
        by_winograd(0, "2x2")),
    Bug("Winograd: the last column of y left out", "winograd.cu", "of_y.width - ox < OUTPUTS ? of_y.width - ox :",
        "of_y.width - ox < OUTPUTS ? of_y.width - ox - 1 :", by_winograd(5)),
    Bug("Winograd: only the first part of a batch", "winograd.cu", "g.of_x.channel() + n;", "g.of_x.channel();", by_winograd(5),
        on_cpu=True),
    Bug("Winograd: groups of the weights mixed up", "winograd.cu", "u + group * u_group", "u", by_winograd(0), on_cpu=True),
    Bug("Winograd: dweight of the last part only", winograd.backward_weight, "columns, begin > 0)", "columns, False)",
        convolution(0, "by Winograd, in parts")),
    Bug("conv: dbias dropped", conv.backward, "bias_op.gradient(dy, dbias)", "dbias[...] = 0", convolution(2)),

    Bug("conv in groups: groups of the weights mixed up", "group_conv.cu", "/ sources / tiles;", "/ sources / tiles / 2;",
        directly(0)),
    Bug("conv in groups: kx and ky of the adjoint swapped", "group_conv.cu", "+ ky) * size.kernel_w + columns.tap)",
        "+ columns.tap) * size.kernel_w + ky)", directly(0)),
    Bug("conv in groups: window of the gather not turned", "group_conv.cu", "tap + (count - 1) * stride, -stride}",
        "tap, stride}", directly(0)),
    Bug("conv in groups: stride forgotten in the gather", "group_conv.cu", "(result + padding) / stride - count + 1",
        "result + padding - count + 1", directly(11)),
    Bug("conv in groups: the gather begins with another phase", "group_conv.cu", "tap = (result + padding) % stride",
        "tap = result % stride", directly(11)),
    Bug("conv in groups: padding lost in rows of dweight", "group_conv.cu", "iy = oy * size.stride - size.padding +",
        "iy = oy * size.stride +", directly(0)),
    Bug("conv in groups: stride forgotten in dweight", "group_conv.cu", "ix = ox * size.stride + first[k]",
        "ix = ox + first[k]", directly(11)),
    Bug("conv in groups: last tile of dweight dropped", "sum_parts.cu", "p < count", "p < count - 1", directly(0)),
    Bug("conv in groups: dweight of the first group's x", "group_conv.cu", "c = (long long)group * size.sources + tap / window",
        "c = tap / window", directly(0)),
    Bug("conv in groups: only 3 weights of a row", "group_conv.cu", "rest -= 3, first += 3, weights += 3 * weight_step",
        "rest = 0", directly(9)),

    Bug("conv on tensor cores: height and width of a tap swapped", "conv_tensor_core.cu", "adjoint ? TAPS - 1 - tap : tap",
        "adjoint ? TAPS - 1 - tap : tap % 3 * 3 + tap / 3", on_tensor_cores(0)),
    Bug("conv on tensor cores: the first row of pixels taken for padding", "conv_tensor_core.cu", "top + tap / 3 >= 0",
        "top + tap / 3 > 0", on_tensor_cores(0)),
    Bug("conv on tensor cores: a box's pixels as if in one row", "conv_tensor_core.cu", "first_y + column / run / box_width",
        "first_y", on_tensor_cores(0)),
    Bug("conv on tensor cores: y of the first group", "conv_tensor_core.cu", "channel = (long long)group * group_outputs + o",
        "channel = o", on_tensor_cores(2)),
    Bug("conv on tensor cores: window of the adjoint not turned", "conv_tensor_core.cu", "adjoint ? TAPS - 1 - tap : tap", "tap",
        on_tensor_cores(0)),
    Bug("conv on tensor cores: padding of the adjoint", conv_tensor_core.backward_x, "2 - padding", "padding", on_tensor_cores(2)),
    Bug("conv on tensor cores: both halves of a factor alike", "conv_tensor_core.cu", "k / VECTOR + lane / 16));", "k / VECTOR));",
        on_tensor_cores(0)),
    Bug("conv on tensor cores: a tile used before it is there", "conv_tensor_core.cu", "wait_for_copies<STAGES - 2>",
        "wait_for_copies<STAGES - 1>", on_tensor_cores(0)),
    Bug("conv on tensor cores: a tile used before others have copied their part", "conv_tensor_core.cu", "__syncthreads();", "",
        on_tensor_cores(0)),
    Bug("conv on tensor cores: a tile overwritten while it is used", "conv_tensor_core.cu",
        "filled = (STAGES - 1) * stage_size", "filled = 0", on_tensor_cores(0)),
    Bug("conv on tensor cores: rows in the same banks", "conv_tensor_core.cu", "piece ^ (row / 2 % 4)", "piece", on_tensor_cores(0)),
    Bug("conv on tensor cores: dweight of batches as large as a chunk only", "conv_tensor_core.cu", "while (n >= batch)",
        "if (n >= batch)", on_tensor_cores(0)),
    Bug("conv on tensor cores: each part of dweight is the first", "conv_tensor_core.cu", "first_step = part * steps",
        "first_step = 0", on_tensor_cores(0)),
    Bug("conv on tensor cores: dweight without the strides", "conv_tensor_core.cu", "(oy * width + ox) * stride * batch",
        "(oy * width + ox) * batch", strided_on_tensor_cores),
    Bug("conv on tensor cores: of two results one without what is added", "conv_tensor_core.cu", "second + bias + float(plus.second)",
        "second + bias", adding_on_tensor_cores),
    Bug("conv on tensor cores: weights not rounded", "conv_tensor_core.cu", "to_factor(window[place])", "window[place]",
        rounding_for_tensor_cores),
    Bug("conv on tensor cores: cols not rounded", "conv_tensor_core.cu", "right[n][i] = round_factors(right[n][i])", "",
        rounding_for_tensor_cores),

    Bug("bias: the sums of a row's tiles beside each other", "bias.cu", "(long long)blockIdx.x * gridDim.y + blockIdx.y",
        "(long long)blockIdx.y * gridDim.x + blockIdx.x", bias_of_two_tiles),

    Bug("linear: dweight transposed", linear.backward, "_image(dy), _image(x)", "_image(x), _image(dy)", square_linear),
    Bug("linear: dx with the weight not transposed", linear.backward, "_window(weight)", "_window(weight.T.copy())",
        square_linear),
    Bug("linear: dbias dropped", linear.backward, "_window(dweight), dbias,", "_window(dweight), None,", square_linear),

    Bug("cross-entropy: dlogits without the one-hot label", "loss.cu", "(label == k ? lanes{} + on : lanes{}) + ", "",
        cross_entropy(0.0)),
    Bug("cross-entropy: dlogits without 1/N", "loss.cu", "*scale / valid", "*scale", cross_entropy(0.0)),
    Bug("cross-entropy: 1/N counts the padding", "loss.cu", "*scale / valid", "*scale / batch", cross_entropy_of_a_padded_batch),
    Bug("cross-entropy: sign of the smoothing", "loss.cu", "(p - off - of_labels)", "(p + off - of_labels)", cross_entropy(0.1)),
    Bug("cross-entropy: smoothing not taken from the label", "loss.cu", "on = (1 - smoothing) * of_self", "on = of_self", cross_entropy(0.1)),

    Bug("cross-entropy of mixup: the partner's label lost", "loss.cu", " + (other == k ? lanes{} + on_other : lanes{})", "",
        cross_entropy_of_mixup),
    Bug("cross-entropy of mixup: the loss has one label only", "loss.cu", " - part(on_other, of_other - highest)", "", cross_entropy_of_mixup),
    Bug("cross-entropy of mixup: smoothing takes from one label only", "loss.cu", "on_other = (1 - smoothing) * (1 - of_self)",
        "on_other = 1 - of_self", cross_entropy_of_mixup),
    Bug("mixup: share of the partner lost", "augment.cu", "of_self * one + of_partner * other", "of_self * one", mixup),
    Bug("mixup: the second of a pair gets the share of the first", "augment.cu", "of_self * other + of_partner * one",
        "of_partner * other + of_self * one", mixup),
    Bug("mixup: only the first pixel of a row", "augment.cu", "first = x_row + (long long)i * batch", "first = x_row", mixup),

    Bug("dropout: kept values not scaled", "dropout.cu", "(random >= threshold ? x : decltype(x){}) * scale",
        "random >= threshold ? x : decltype(x){}", dropout_values),
    Bug("dropout: all tiles alike", "dropout.cu", "first / CALL", "0", dropout_masks),
    Bug("channel dropout: one decision for all channels", "dropout.cu", "(unsigned long long)c << 32 | ", "", dropout_of_channels),
    Bug("channel dropout: all parts of a large batch alike", "dropout.cu", "(unsigned)(begin / CALL)", "0u", dropout_masks),
    Bug("dropout: dx not scaled", layers.Dropout.backward, "self._index, step)", "self._index, step) * (1 - self.rate)",
        dropout_layer),
    Bug("dropout: dx with another layer's mask", layers.Dropout.backward, "self._index,", "self._index + 1,", dropout_layer),
    Bug("dropout: dx with the next step's mask", layers.Dropout.forward, "self._step.copy()", "self._step", dropout_layer),

    Bug("residual: gradient of the shortcut not added", layers.Residual.backward,
        "backward_of(self.body, dy, plus, dx=plus if self.norm else None, centred=self.norm is not None)", "self.body.backward(dy)",
        network),
    Bug("residual: gradients of both branches added in the place of one that is read", layers.Residual.backward,
        "dx=plus if self.norm else None", "dx=plus",
        lambda target, rng: test_layers.test_network_gradient_in_random_directions(
            target, rng, test_layers.residual_blocks, (2, 4, 5, 3))),
    Bug("residual: gradient of the shortcut not masked", layers.Residual.backward, "dy, dz = self.norm.backward(dy)",
        "dy, _ = self.norm.backward(dy)", network),

    Bug("zero-padded channels: gradient of the wrong ones", layers.ZeroPadChannels.backward, "dy[:channels]", "dy[-channels:]",
        architecture("resnext29-2x4d", shortcut="A")),
    Bug("ladder: gradient of the split above not added", res2net.Ladder.backward, "i < self.scale - 2", "False",
        architecture("res2next29-2c4w4s")),
    Bug("ladder: the first convolution remembers another split", res2net.Ladder.forward, "self._channels(0)", "self._channels(1)",
        architecture("res2next29-2c4w4s")),
    Bug("ladder: conv3 remembers the splits in another order", res2net.Ladder.output_again, "zip(makers,", "zip(makers[::-1],",
        architecture("res2next29-2c4w4s")),
    Bug("splits apart: gradient of the averaged one lost", res2net.Apart.backward, "self.pool.backward(last_gradient, dx=last_slot)",
        "last_slot[...] = 0",
        architecture("res2next29-2c4w3s", form="B")),
    Bug("pre-activation: gradient of the identity lost", wideresnet.PreActivationBlock.backward, "(da, plus=dy)", "(da)",
        architecture("wrn-16-1")),
    Bug("pre-activation: gradient of the projection lost", wideresnet.PreActivationBlock.backward,
        "dx=da, plus=da", "dx=da", architecture("wrn-10-1")),

    Bug("sgd: Nesterov without looking ahead", "optimizer.cu", "g_share = nesterov ? 1 : 0, v_share = nesterov ? momentum : 1",
        "g_share = 0, v_share = 1", optimizer("nesterov")),
    Bug("sgd and adadelta: sign of the weight decay", "optimizer.cu", "+ weight_decay * master[i]",
        "- weight_decay * master[i]", optimizer("sgd"), times=2),
    Bug("adam: weight decay lost", "optimizer.cu", " + in_gradient * master[i]", "", optimizer("adam with decay")),
    Bug("adam: first moment without bias correction", "optimizer.cu", "lr / bias_of(beta1, t)", "lr", optimizer("adam")),
    Bug("adam: second moment without bias correction", "optimizer.cu", "second_correction = 1 / bias_of(beta2, t)",
        "second_correction = 1", optimizer("adam")),
    Bug("adam: step off by one", "optimizer.cu", "t = state[AGE] + 1", "t = state[AGE] + 2", optimizer("adam")),
    Bug("adam: steps before a restart count", "optimizer.cu", "t = state[AGE] + 1", "t = state[STEP] + 1", restart("adam")),
    Bug("restart: moments kept", optim.Optimizer.restart, "moment[...] = 0", "moment", restart("nesterov")),
    Bug("adamw: decay coupled", "optimizer.cu",
        "in_gradient = decoupled ? 0 : weight_decay, in_step = decoupled ? lr * weight_decay : 0",
        "in_gradient = weight_decay, in_step = 0", optimizer("adamw")),
    Bug("adamw: decay without the learning rate", "optimizer.cu", "lr * weight_decay : 0", "weight_decay : 0",
        optimizer("adamw")),
    Bug("adadelta: eps lost", "optimizer.cu", "/ (g2 + eps)) * g;", "/ g2) * g;", optimizer("adadelta with decay")),
    Bug("adadelta: the mean of dx^2 decays before its use", "optimizer.cu", "sqrt((mean_dx2[i] + eps)",
        "sqrt((rho * mean_dx2[i] + eps)", optimizer("adadelta")),
    Bug("adadelta: the learning rate in the mean of dx^2", "optimizer.cu", "(1 - rho) * dx * dx",
        "(1 - rho) * dx * dx * lr * lr", optimizer("adadelta")),
    Bug("clipping: short gradients made longer", "optimizer.cu", "clip_norm > 0 && share < 1", "clip_norm > 0", clipping),
    Bug("clipping: norm of the scaled gradient", "optimizer.cu", "sqrt(squares) / state[SCALE]", "sqrt(squares)", clipping),
    Bug("clipping: norm of the last tile only", "optimizer.cu", "squares += tile_squares[t]", "squares = tile_squares[t]",
        clipping),
    Bug("failure: infinities pass", "optimizer.cu", "differences += g - g;", "differences += g != g;", infinity),
    Bug("failure: later steps go on", "optimizer.cu", "state[FAILED] = state[CALLS];",
        "state[FAILED] = state[CALLS], state[NONFINITE] = 0;", failure),
    Bug("failure: the last such step is named", "optimizer.cu", "else if (state[FAILED] == 0)", "else", failure),

    Bug("average: moved by a skipped step", "optimizer.cu", "if (state[SKIPPED_IN_ROW] != 0) return;", "",
        average_of_good_steps),
    Bug("average: the first steps keep as much as the later ones", "optimizer.cu", "(early < decay ? early : decay)", "decay",
        average),
    Bug("average: not of the running statistics", optim.Average.update,
        "optimizer.average(self.buffers, self.parameters.buffers, self.state, self.decay)", "pass", average),
    Bug("average: running statistics left in their layers", layer.Parameters.gather_buffers, "setattr(layer, name, view)",
        "pass", average),
    Bug("average: not cast to the type of storage", optim.Average._give, "self.parameters.cast()", "pass", swap),

]


@pytest.fixture(params=MACHINES)
def machine(request):
    """Where a planted bug may read beyond an array: its results are to be wrong."""
    with active(request.param, guards=False) as it:
        yield it


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.what)
def test_bug_is_noticed(machine, bug, tmp_path):
    if bug.on_cpu and machine.place.name != "cpu":
        pytest.skip("a GPU never runs this text")
    bug.check_true_text(machine, tmp_path)
    with pytest.raises(AssertionError):
        bug.check_planted(machine, tmp_path)
