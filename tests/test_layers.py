"""Layers and their compositions: gradients of whole networks, names, shapes, state, and what is refused."""

import copy
import itertools
import re

import numpy as np
import pytest

from minidl import initializers, layers
from minidl.device import select
from minidl.errors import CheckpointError, UsageError
from minidl.layer import Composition
from minidl.layers import (AvgPool2d, BatchNorm2d, ChannelDropout, Conv2d, Dropout, GlobalAvgPool2d, GlobalMaxPool2d, Linear,
                           MaxPool2d, ReLU, Residual, Sequential, ZeroPadChannels)
from minidl.optim import SGD
from reference import assert_close


def every_layer():
    """A network in which every layer and both kinds of residual block occur."""
    return Sequential(
        stem=Conv2d(3, 4, 3, padding=1, bias=False), norm=BatchNorm2d(4, relu=True),
        block=Residual(body=Sequential(Conv2d(4, 4, 3, padding=1, groups=2)), norm=BatchNorm2d(4)),
        pool=MaxPool2d(2), drop=ChannelDropout(0.2),
        wider=Residual(body=Sequential(norm=BatchNorm2d(4), relu=ReLU(), conv=Conv2d(4, 6, 3, stride=2, padding=1)),
                       shortcut=Conv2d(4, 6, 1, stride=2, bias=False)),
        smooth=AvgPool2d(3, stride=1, padding=1), scatter=Dropout(0.3), mean=GlobalAvgPool2d(), classifier=Linear(6, 5))


def relu_after_max():
    return Sequential(Conv2d(2, 3, 2), ReLU(), GlobalMaxPool2d(), Linear(3, 2, bias=False))


def residual_blocks():
    """Branches that begin and end with layers that add the other one by themselves, and with others."""
    return Sequential(
        Residual(Conv2d(2, 2, 3, padding=1)), Residual(Sequential(ReLU(), Conv2d(2, 2, 1), ReLU())), Residual(BatchNorm2d(2)),
        Residual(Sequential(Conv2d(2, 2, 1), Dropout(0.0)), shortcut=Conv2d(2, 2, 1)),
        Residual(Sequential(Sequential(Conv2d(2, 2, 1, stride=2)), ReLU()), shortcut=MaxPool2d(1, stride=2), norm=BatchNorm2d(2)))


@pytest.mark.parametrize("make, shape", [(every_layer, (3, 8, 8, 4)), (relu_after_max, (2, 4, 5, 3)),
                                         (residual_blocks, (2, 4, 5, 3))])
def test_network_gradient_in_random_directions(target, rng, make, shape):
    """<v, backward(u)> = <u, d forward / d v> for parameters and input, by central differences in float64."""
    network = make().initialize(target.place, "float64", seed=3)
    # No bias is 0 any more: behind zeros of a ReLU it would leave the next one at its edge.
    network.parameters.master += target.array(rng.normal(size=network.parameters.master.shape))
    x = rng.normal(size=shape)
    u = rng.normal(size=target.host(network.forward(target.array(x))).shape)
    dx = target.host(network.backward(target.array(u)))
    grad = target.host(network.parameters.grad)
    start = target.host(network.parameters.master)

    def value(at_x, at_parameters):
        network.parameters.master[...] = target.array(at_parameters)
        return (u * target.host(network.forward(target.array(at_x)))).sum()

    v_x, v_parameters = rng.normal(size=shape), rng.normal(size=start.shape)
    for vx, vp, expected in ((v_x, 0, (v_x * dx).sum()), (0, v_parameters, (v_parameters * grad).sum())):
        h = 1e-6
        numerical = (value(x + h * vx, start + h * vp) - value(x - h * vx, start - h * vp)) / (2 * h)
        assert numerical == pytest.approx(expected, rel=1e-6)


def test_two_steps_of_backward_need_two_forwards():
    layer = Conv2d(1, 1, 1).initialize()
    y = layer.forward(np.ones((1, 2, 2, 1), np.float32))
    layer.backward(y)
    with pytest.raises(RuntimeError, match="Conv2d: backward needs a forward in training mode before it"):
        layer.backward(y)


def test_evaluation_saves_nothing_and_drops_nothing():
    network = Sequential(Dropout(0.5), ReLU()).initialize().eval()
    x = np.ones((2, 3, 3, 4), np.float32)
    assert np.array_equal(network.forward(x), x)
    with pytest.raises(RuntimeError, match="ReLU: backward needs a forward in training mode"):
        network.backward(x)


def test_evaluation_uses_running_statistics(rng):
    norm = BatchNorm2d(2).initialize()
    x = rng.normal(3, 2, (2, 4, 4, 8)).astype(np.float32)
    assert_close(norm.eval().forward(x), x / np.sqrt(1 + 1e-5), 1e-5, "before any training step")
    norm.train()
    for _ in range(200):
        norm.forward(x)
    trained = norm.forward(x)
    assert_close(norm.eval().forward(x), trained, 1e-2)


def test_skipping_the_input_gradient_leaves_the_others(rng):
    x = rng.normal(size=(3, 8, 8, 4)).astype(np.float32)
    results = []
    for skip in (False, True):
        network = every_layer().initialize(seed=1)
        if skip:
            network.skip_input_gradient()
        dx = network.backward(network.forward(x))
        assert (dx is None) == skip
        results.append(network.parameters.grad.copy())
    assert np.array_equal(*results)


@pytest.mark.parametrize("network, before_norm", [
    (lambda: Sequential(
        Conv2d(2, 3, 3, padding=1), BatchNorm2d(3, relu=True), Conv2d(3, 3, 1), ReLU(), BatchNorm2d(3),
        Residual(Sequential(Conv2d(3, 3, 1), BatchNorm2d(3), ReLU(), Conv2d(3, 3, 1))),
        Residual(Sequential(Conv2d(3, 3, 1), ReLU(), Conv2d(3, 3, 1)), Conv2d(3, 3, 1), norm=BatchNorm2d(3)),
        Sequential(ReLU(), Conv2d(3, 3, 1)), BatchNorm2d(3), Residual(Conv2d(3, 3, 1), norm=BatchNorm2d(3))),
     {"0.bias", "5.body.0.bias", "6.body.2.bias", "7.1.bias", "9.body.bias"}),
    (lambda: Sequential(Conv2d(2, 3, 1), Sequential(Sequential(BatchNorm2d(3), ReLU()), Conv2d(3, 3, 1)),
                        Sequential(ReLU(), BatchNorm2d(3))), {"0.bias"})], ids=["side by side", "nested"])
def test_the_gradient_of_a_bias_in_front_of_batch_norm_is_zero(machine, rng, monkeypatch, network, before_norm):
    """Of that one alone; and that is what the sum over its dy would be, but for rounding."""
    network = network()
    network.initialize(machine.place, "float64", seed=1)
    x, u = rng.normal(size=(2, 4, 5, 3)), rng.normal(size=(3, 4, 5, 3))
    real, gradients = layers.backward_of, []
    for backward_of in (real, lambda layer, dy, plus=None, dx=None, centred=False: real(layer, dy, plus, dx)):
        monkeypatch.setattr(layers, "backward_of", backward_of)
        network.forward(machine.array(x))
        network.parameters.grad[...] = np.nan
        network.backward(machine.array(u))
        gradients.append({name: machine.host(parameter.grad) for name, parameter in network.named_parameters().items()})
    zeros, sums = gradients
    for name in zeros:
        if name in before_norm:
            assert (zeros[name] == 0).all() and (abs(sums[name]) < 1e-13).all()
        elif name.endswith("bias"):
            assert (abs(zeros[name]) > 1e-3).all() and np.array_equal(zeros[name], sums[name])


def test_names_and_shapes_are_those_of_pytorch():
    state = every_layer().initialize().state_dict()
    assert {name: array.shape for name, array in state.items() if name.startswith(("stem", "norm", "block", "classifier"))} == {
        "stem.weight": (4, 3, 3, 3),
        "norm.weight": (4,), "norm.bias": (4,), "norm.running_mean": (4,), "norm.running_var": (4,),
        "block.body.0.weight": (4, 2, 3, 3), "block.body.0.bias": (4,),
        "block.norm.weight": (4,), "block.norm.bias": (4,), "block.norm.running_mean": (4,), "block.norm.running_var": (4,),
        "classifier.weight": (5, 6), "classifier.bias": (5,)}


def test_what_a_network_looks_like():
    network = Sequential(conv=Conv2d(3, 4, (1, 5), groups=1), block=Residual(Sequential(ReLU()), norm=BatchNorm2d(4)))
    assert repr(network) == ("Sequential(\n  conv: Conv2d(weight 4x3x1x5, bias 4)\n  block: Residual(\n    body: Sequential(\n"
                             "      0: ReLU()\n    )\n    norm: BatchNorm2d(weight 4, bias 4)\n  )\n)")


def test_state_goes_round(rng):
    source, sink = every_layer().initialize(seed=1), every_layer().initialize(seed=2)
    x = rng.normal(size=(3, 8, 8, 4)).astype(np.float32)
    source.forward(x)  # moves the running statistics
    state = source.state_dict() | {"norm.num_batches_tracked": np.array(7)}
    sink.load_state_dict(state)
    assert np.array_equal(source.eval().forward(x), sink.eval().forward(x))


def test_state_dict_is_a_copy():
    layer = Linear(2, 2).initialize()
    state = layer.state_dict()
    state["weight"][...] = 7
    assert not (layer.weight.master == 7).any()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_deep_copy_is_a_network_of_its_own(place, rng, dtype):
    """A copy trains as its original does, and neither sees what becomes of the other."""
    network = every_layer().initialize(place, dtype, seed=3)
    x = place.array(rng.normal(size=(3, 8, 8, 4)).astype(dtype))
    y = network.forward(x)  # moves the running statistics
    network.step += 1
    before = network.state_dict()
    copied = copy.deepcopy(network)
    with pytest.raises(RuntimeError, match="backward needs a forward"):
        copied.backward(y)
    outcomes = []
    for it in (copied, network):
        y = it.forward(x)
        dx = it.backward(y)
        it.parameters.master -= it.parameters.grad
        it.parameters.cast()
        it.step += 1
        arrays = y, dx, it.forward(x), it.parameters.buffers
        outcomes.append([np.array(place.to_host(array)) for array in arrays] + list(it.state_dict().values()))
        if it is copied:
            assert all(np.array_equal(array, before[name]) for name, array in network.state_dict().items())
    assert all(np.array_equal(*pair) for pair in zip(*outcomes))
    assert not all(np.array_equal(array, before[name]) for name, array in network.state_dict().items())


def test_an_optimizer_is_copied_with_its_network(place):
    """The copy trains the copied network; without one it would train arrays that nobody reads."""
    network = every_layer().initialize(place, "float16", seed=3)
    pair = network, SGD(network.parameters)
    copied, optimizer = copy.deepcopy(pair)
    optimizer.state *= 2
    assert float(optimizer.scale[0]) == 2 * float(pair[1].scale[0])
    optimizer.restart_scaling()
    for it, sgd in ((copied, optimizer), pair):
        it.backward(it.forward(place.array(np.ones((3, 8, 8, 4), np.float16))))
        before = it.state_dict()["stem.weight"]
        sgd.step(0.1)
        assert not np.array_equal(it.state_dict()["stem.weight"], before)
    assert all(np.array_equal(array, network.state_dict()[name]) for name, array in copied.state_dict().items())
    for alone in (pair[1], network.parameters, pair[::-1]):
        with pytest.raises(TypeError, match=r"an optimizer after it: copy.deepcopy\(\(network, optimizer\)\)$"):
            copy.deepcopy(alone)


def test_a_network_may_be_copied_before_it_is_initialized():
    network = every_layer()
    copied, network = copy.deepcopy(network).initialize(seed=5), network.initialize(seed=5)
    assert all(np.array_equal(array, network.state_dict()[name]) for name, array in copied.state_dict().items())


def test_a_state_that_does_not_fit_changes_nothing():
    network = every_layer().initialize(seed=1)
    before = network.state_dict()
    state = {name: array + 1 for name, array in before.items()}
    state["stem.weight"] = np.zeros((4, 3, 5, 5))
    state["spare"] = state.pop("classifier.bias")
    with pytest.raises(CheckpointError) as caught:
        network.load_state_dict(state)
    assert caught.value.exit_code == 5
    for line in ("classifier.bias: missing in the file", "spare: not in the model", "stem.weight: file (4, 3, 5, 5), model (4, 3, 3, 3)"):
        assert line in str(caught.value)
    assert all(np.array_equal(array, before[name]) for name, array in network.state_dict().items())
    state = {name: array + 1 for name, array in before.items()}
    last = list(state)[-1]
    state[last] = np.full(state[last].shape, "one")
    with pytest.raises(ValueError, match="could not convert"):
        network.load_state_dict(state)
    assert all(np.array_equal(array, before[name]) for name, array in network.state_dict().items())


def test_only_five_mismatches_are_listed():
    with pytest.raises(CheckpointError, match=r"and \d+ more"):
        every_layer().initialize().load_state_dict({})


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_initial_values_depend_on_seed_and_name_alone(dtype):
    first, again, other = (every_layer().initialize(dtype=d, seed=s) for d, s in (("float32", 1), (dtype, 1), ("float32", 2)))
    for name, parameter in first.named_parameters().items():
        assert_close(again.named_parameters()[name].master, parameter.master, 1e-6)
        if parameter.initializer not in (initializers.zeros, initializers.ones):
            assert not np.array_equal(other.named_parameters()[name].master, parameter.master)
    more = Sequential(before=Linear(2, 2), stem=Conv2d(3, 4, 3, padding=1, bias=False), twin=Conv2d(3, 4, 3, padding=1, bias=False))
    more.initialize(seed=1)
    assert np.array_equal(more.stem.weight.master, first.stem.weight.master)
    assert not np.array_equal(more.twin.weight.master, more.stem.weight.master)


def test_parts_that_are_no_layers_are_refused():
    for part in (ReLU, [ReLU()]):
        with pytest.raises(TypeError, match=r"Sequential: act is .*, not a Layer"):
            Sequential(act=part)


def test_nothing_is_computed_before_it_is_initialized():
    network = Sequential(conv=Conv2d(3, 4, 1), norm=BatchNorm2d(4), drop=Dropout(0.5))
    x = np.zeros((3, 2, 2, 1), np.float32)
    for use, missing in (
            (lambda: network.forward(x), "Parameter has no data"), (network.state_dict, "Parameter has no master"),
            (lambda: network.parameters, "Sequential has no parameters"), (lambda: network.conv.device, "Conv2d has no device"),
            (lambda: network.norm.running_var, "BatchNorm2d has no running_var"), (lambda: network.drop.forward(x), "Dropout has no step")):
        with pytest.raises(RuntimeError, match=f"^this {missing} yet: call initialize\\(\\) of the whole network; its parts must be "
                                               "attributes, those in a list are not found$"):
            use()
    assert not hasattr(network, "parameters")
    with pytest.raises(AttributeError, match="^'Conv2d' object has no attribute 'shape'$"):
        network.conv.shape


def test_a_layer_has_one_place():
    tied = Sequential(a=Linear(3, 3), b=Linear(3, 3))
    tied.b.weight = tied.a.weight
    with pytest.raises(ValueError, match="^b.weight is the same Parameter as a.weight: each place in a network needs one of its own"):
        tied.initialize()
    act = ReLU()
    with pytest.raises(ValueError, match=r"^block.body.0 is the same ReLU as first: each place in a network needs one of its own"):
        Sequential(first=act, block=Residual(Sequential(act, Conv2d(3, 3, 1)))).initialize()


@pytest.mark.parametrize("layer", [Dropout, ChannelDropout])
def test_each_rank_has_masks_of_its_own(layer):
    x = np.ones((64, 1, 1, 8), np.float32)
    alone, first, second = (Sequential(layer(0.5)).initialize(seed=3, **ranks).forward(x) for ranks in ({}, {"rank": 0}, {"rank": 1}))
    assert np.array_equal(alone, first) and 0.3 < (first != second).mean() < 0.7


@pytest.mark.parametrize("layer", [Dropout(0.5), ChannelDropout(0.5)])
def test_a_step_of_an_optimizer_changes_the_masks(place, layer):
    network = Sequential(conv=Conv2d(3, 64, 1), drop=layer).initialize(place)
    sgd, x = SGD(network.parameters), place.array(np.ones((3, 2, 2, 8), np.float32))
    masks = []
    for _ in range(3):
        masks.append(place.to_host(network.forward(x) != 0))
        network.backward(place.xp.zeros((64, 2, 2, 8), np.float32))
        sgd.step(0.0)
    assert int(network.step[0]) == 3
    assert not any(np.array_equal(a, b) for a, b in itertools.combinations(masks, 2))


def test_a_device_may_be_named():
    assert Linear(2, 3).initialize("cpu").device.name == "cpu"
    with pytest.raises(UsageError, match="device 'gpu' is not one of auto, cpu"):
        Linear(2, 3).initialize("gpu")


@pytest.mark.parametrize("make", [
    lambda: Residual(Conv2d(4, 4, 3, padding=1)), lambda: Residual(Sequential(Conv2d(4, 4, 1), ReLU(), Conv2d(4, 4, 1))),
    lambda: Residual(Sequential(Conv2d(4, 4, 3, padding=1), Dropout(0.0))), lambda: Residual(Conv2d(4, 5, 1), ZeroPadChannels(5)),
    lambda: Residual(Residual(Sequential(Conv2d(4, 4, 1), Conv2d(4, 4, 1)))),
    lambda: Residual(Conv2d(4, 4, 1), norm=BatchNorm2d(4)), lambda: Sequential(Dropout(0.0), Residual(Conv2d(4, 4, 1))),
    lambda: Residual(Sequential(Conv2d(4, 4, 1), BatchNorm2d(4))), lambda: Residual(Sequential(ReLU(), Conv2d(4, 4, 1)))])
def test_backward_leaves_dy_to_its_caller(rng, make):
    """Who goes on reading it: another branch, or a user. Nor is it the result."""
    layer = make().initialize().train()
    y = layer.forward(rng.normal(size=(4, 3, 3, 5)).astype(np.float32))
    dy = rng.normal(size=y.shape).astype(np.float32)
    before = dy.copy()
    dx = layer.backward(dy)
    assert np.array_equal(dy, before) and not np.shares_memory(dx, dy)


@pytest.mark.parametrize("layer", [
    Conv2d(4, 4, 1), Conv2d(4, 8, 3, padding=1), Conv2d(4, 4, 3, stride=2), Conv2d(8, 8, 3, padding=1), Conv2d(4, 4, 3, groups=2),
    BatchNorm2d(4), BatchNorm2d(4, relu=True), ReLU(), MaxPool2d(2), AvgPool2d(2), GlobalMaxPool2d(), GlobalAvgPool2d(), Linear(4, 3)],
    ids=lambda layer: type(layer).__name__)
def test_a_gradient_of_another_shape_is_refused(layer):
    """It would be read beyond its end."""
    channels = getattr(layer, "in_channels", 4)
    x = np.ones((channels, 3) if isinstance(layer, Linear) else (channels, 6, 6, 3), np.float32)
    layer.initialize()
    for wrong in (lambda shape: (*shape[:-1], shape[-1] + 1), lambda shape: (shape[0] + 1, *shape[1:]), lambda shape: (1,) * len(shape)):
        dy = np.ones(wrong(layer.forward(x).shape), np.float32)
        with pytest.raises(ValueError, match=r"dy.* \(1|dy.* \(\d, |dy has shape"):
            layer.backward(dy)


@pytest.mark.parametrize("dtype", ["float64", "uint8"])
def test_input_of_another_type_is_refused(rng, dtype):
    for layer, message in ((Conv2d(3, 4, 3), f"conv: the input is {dtype}, the weight float32: convert one with astype"),
                           (BatchNorm2d(3), f"batch norm: the input is {dtype}, gamma float32: convert the input with astype")):
        with pytest.raises(TypeError, match=message):
            layer.initialize().forward(rng.uniform(0, 255, (3, 5, 5, 2)).astype(dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_all_types_run_forward_and_backward(rng, dtype):
    network = every_layer().initialize(select("cpu"), dtype, seed=1)
    x = rng.normal(size=(3, 8, 8, 4)).astype(network.dtype)
    y = network.forward(x)
    dx = network.backward(y)
    assert y.dtype == dx.dtype == network.dtype and network.parameters.grad.dtype == np.float32
    assert np.isfinite(dx.astype(np.float32)).all() and np.isfinite(network.parameters.grad).all()


def test_shapes_and_macs():
    network = every_layer()
    assert network.output_shape((3, 8, 8)) == (5,)
    stem, block, wider, shortcut, classifier = 8 * 8 * 4 * 27, 8 * 8 * 4 * 18, 2 * 2 * 6 * 36, 2 * 2 * 6 * 4, 30
    assert network.macs((3, 8, 8)) == stem + block + wider + shortcut + classifier


class HalfPooled(Composition):
    """One split as it is, beside the other, pooled."""

    def trace(self, x, tracer):
        first, second = tracer.split(x, 2)
        return tracer.concat([first, MaxPool2d(2, stride=1, padding=1).trace(second, tracer)])


@pytest.mark.parametrize("shape, message", [
    ((4, 5, 5), r"splits of different sizes \(C, H, W\) cannot be joined: \(2, 5, 5\), \(2, 6, 6\)"),
    ((5, 5, 5), "5 channels do not divide into 2 splits")])
def test_splits_that_do_not_fit(shape, message):
    with pytest.raises(ValueError, match=message):
        HalfPooled().output_shape(shape)


@pytest.mark.parametrize("make, message", [
    (lambda: Conv2d(6, 8, 3, groups=4), "Conv2d: 6 input channels do not divide into 4 groups"),
    (lambda: Conv2d(8, 6, 3, groups=4), "Conv2d: 6 output channels do not divide into 4 groups"),
    (lambda: Conv2d(8, 8, 3, groups=0), "groups is 0, which must be a whole number of at least 1"),
    (lambda: Conv2d(0, 4, 3), "in_channels is 0"), (lambda: Conv2d(3, 4, (3, 0)), "kernel_width is 0"),
    (lambda: Conv2d(3, 4, 3, stride=(2, 2)), r"stride is \(2, 2\), which must be a whole number"),
    (lambda: Conv2d(3, 4, 3, padding=1.5), "Conv2d: padding is 1.5, which must be a whole number of at least 0"),
    (lambda: MaxPool2d(2, stride=(2, 2)), r"MaxPool2d: stride is \(2, 2\), which must be a whole number of at least 1"),
    (lambda: AvgPool2d(2, padding=-1), "AvgPool2d: padding is -1"), (lambda: MaxPool2d(0), "MaxPool2d: kernel_height is 0"),
    (lambda: Linear(0, 3), "Linear: in_features is 0"), (lambda: BatchNorm2d(2.5), "BatchNorm2d: channels is 2.5"),
    (lambda: ZeroPadChannels(0), "ZeroPadChannels: channels is 0"), (lambda: Dropout(1.0), "Dropout: rate 1.0 is not in 0 <= rate < 1"),
    (lambda: ChannelDropout(-1), "ChannelDropout: rate -1 is not in"),
    (lambda: AvgPool2d(1, padding=1), "AvgPool2d: padding 1 is more than half of the window 1x1"),
    (lambda: MaxPool2d((2, 3)), r"MaxPool2d: window \(2, 3\) is not square and needs a stride"),
    (lambda: ZeroPadChannels(2).forward(np.zeros((3, 2, 2, 1))), "ZeroPadChannels: 3 channels are more than 2"),
    (lambda: BatchNorm2d(2).initialize().forward(np.zeros((2, 2, 2, 1), np.float32), np.zeros((2, 2, 1, 1), np.float32)),
     r"batch norm: z has shape \(2, 2, 1, 1\), not \(2, 2, 2, 1\)"),
    (lambda: Sequential(forward=ReLU()), "a layer cannot be named 'forward'"),
    (Sequential, "Sequential: there are no layers"),
    (lambda: Sequential(step=ReLU()), "a layer cannot be named 'step'"),
    (lambda: MaxPool2d((2,)), r"a window has two sides, \(height, width\): \(2,\) has 1"),
    (lambda: Conv2d(3, 4, (3, 3, 3)), r"\(3, 3, 3\) has 3"),
    (lambda: initializers.he_normal("fan")(np.random.default_rng(0), (2, 2)), "mode 'fan' is not fan_in or fan_out"),
])
def test_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_composition_without_trace_is_named():
    class Block(Composition):
        def __init__(self):
            self.conv = Conv2d(3, 4, 1)

    with pytest.raises(NotImplementedError, match="^Block is a Composition and needs a trace"):
        Sequential(Block()).output_shape((3, 4, 4))


@pytest.mark.parametrize("layer", [
    Conv2d(4, 4, 3, padding=1), Conv2d(4, 4, 3, stride=2, bias=False), Conv2d(4, 4, 1), Conv2d(4, 4, 3, groups=2), BatchNorm2d(4),
    MaxPool2d(2), AvgPool2d(2), GlobalAvgPool2d(), GlobalMaxPool2d(), ChannelDropout(0.5), Linear(256, 3)],
    ids=lambda layer: type(layer).__name__)
def test_a_batch_without_images(machine, layer):
    layer.initialize(machine.place)
    for mode in (layer.train, layer.eval):
        mode()
        if isinstance(layer, ChannelDropout) and not layer.training:
            continue
        with pytest.raises(ValueError, match="^(conv|batch norm|max-pool|average pool|dropout): a batch of 0 images$"):
            layer.forward(machine.array(np.empty((4, 8, 8, 0), np.float32)))


@pytest.mark.parametrize("layer", [
    Conv2d(4, 4, 1), BatchNorm2d(4), MaxPool2d(2), AvgPool2d(2), GlobalAvgPool2d(), GlobalMaxPool2d(), ChannelDropout(0.5)],
    ids=lambda layer: type(layer).__name__)
def test_features_in_place_of_images(machine, layer):
    """As a Linear in front gives them."""
    for give in (lambda: layer.initialize(machine.place).forward(machine.array(np.ones((4, 8), np.float32))),
                 lambda: Sequential(Linear(3, 4), layer).output_shape((3,))):
        with pytest.raises(ValueError, match=r": an input \(C, H, W, N\) is needed, got one of 2 dimensions$"):
            give()


@pytest.mark.parametrize("layer, shape, message", [
    (Conv2d(3, 4, 3), (4, 8, 8), "Conv2d: 3 input channels are needed, got (C, H, W) = (4, 8, 8)"),
    (Conv2d(3, 4, 9), (3, 8, 8), "Conv2d: window 9x9 is larger than the padded image 8x8"),
    (BatchNorm2d(3), (4, 8, 8), "BatchNorm2d: 3 input channels are needed"),
    (BatchNorm2d(3), (3,), "BatchNorm2d: an input (C, H, W, N) is needed, got one of 2 dimensions"),
    (Linear(10, 2), (3, 2, 2), "Linear: 10 input features are needed, got (3, 2, 2)"),
    (Linear(10, 2), (5, 2, 2), "Linear: 10 input features are needed, got (5, 2, 2)"),  # not two images for each
    (MaxPool2d(5), (3, 4, 4), "MaxPool2d: window 5x5 is larger than the padded image 4x4"),
    (Residual(Conv2d(3, 4, 1)), (3, 4, 4), "the branches of a sum have different shapes (C, H, W): (4, 4, 4) and (3, 4, 4)"),
    (Residual(Linear(3, 3)), (3, 1, 1), "the branches of a sum have different shapes (C, H, W): (3,) and (3, 1, 1)"),
    (Sequential(one=Residual(Sequential(ReLU(), Linear(4, 4)))), (3, 1, 1), "one.body.1: Linear: 4 input features are needed"),
])
def test_shapes_that_do_not_fit(layer, shape, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        layer.output_shape(shape)
    if not isinstance(layer, (MaxPool2d, Residual)):
        layer.initialize()
        with pytest.raises(ValueError):
            layer.forward(np.zeros((*shape, 2), np.float32))


# ---- initializers


@pytest.mark.parametrize("initializer, std", [
    (initializers.he_normal(), (2 / 72) ** 0.5), (initializers.he_normal("fan_out"), (2 / (400 * 9)) ** 0.5),
    (initializers.he_uniform(), (2 / 72) ** 0.5), (initializers.xavier_normal(2.0), 2 * (2 / (72 + 3600)) ** 0.5),
    (initializers.xavier_uniform(), (2 / (72 + 3600)) ** 0.5), (initializers.uniform_fan_in(), (1 / 72 / 3) ** 0.5),
    (initializers.uniform_fan_in(12), (1 / 12 / 3) ** 0.5), (initializers.normal(0.01), 0.01),
])
def test_initializers_have_their_published_deviation(rng, initializer, std):
    values = initializer(rng, (400, 8, 3, 3))
    assert values.std() == pytest.approx(std, rel=0.02) and abs(values.mean()) < 4 * std / values.size**0.5
