"""Networks as ONNX graphs, for the runtimes of others: a Tracer that writes a node for each layer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from minidl import __version__
from minidl.atomic_file import FilePath, write_atomically
from minidl.errors import UsageError
from minidl.extras import library
from minidl.layer import Layer, Shape, output_for
from minidl.layers import (AvgPool2d, BatchNorm2d, ChannelDropout, Conv2d, Dropout, Flatten, GlobalAvgPool2d, GlobalMaxPool2d,
                           Linear, MaxPool2d, ReLU, ZeroPadChannels)
from minidl.weights import Metadata

OPSET, IR_VERSION = 17, 8  # of ONNX 1.12, 2022; a later IR is refused by runtimes that know the operators


def export(network: Layer, path: FilePath, image_shape: Shape, metadata: Metadata | None = None) -> None:
    """Write the network, as it evaluates, to an ONNX file: images (batch, C, H, W) -> logits (batch, classes), float32.

    image_shape: (C, H, W) of images, normalized. Batch may be any number. Initializers have the names of the state dict;
    metadata, as from `weights.describe`, become the model's properties, in JSON but for texts. Raises UsageError for a layer
    that has no form in ONNX, for images that the network does not take and where onnx is not installed, CheckpointError where
    the file cannot be written.
    """
    onnx = library("onnx", "interchange")
    for name, layer in network.named_layers():
        if layer.children() and layer.own_parameters():  # no trace can say what it does with them
            raise UsageError(f"{name or 'the network'}: {type(layer).__name__} has parameters besides those of its parts, and no "
                             "form in ONNX")
    output_for(network, image_shape)
    state = network.state_dict()
    graph = _Graph(network, onnx.helper.make_node)
    features = network.trace(_Value("images", tuple(image_shape)), graph)
    # The last layer may be a pool; of logits (batch, classes) this is the identity.
    graph.add_node("Flatten", "logits", features)
    float32 = onnx.TensorProto.FLOAT
    arrays = {**{name: array.astype(np.float32, order="C") for name, array in state.items()}, **graph.constants}
    model = onnx.helper.make_model(
        onnx.helper.make_graph(
            graph.nodes, "minidl",
            [onnx.helper.make_tensor_value_info("images", float32, ["batch", *image_shape])],
            [onnx.helper.make_tensor_value_info("logits", float32, ["batch", int(np.prod(features.shape))])],
            [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()]),
        opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=IR_VERSION,
        producer_name="minidl", producer_version=__version__)
    onnx.helper.set_model_props(model, {name: value if isinstance(value, str) else json.dumps(value)
                                        for name, value in (metadata or {}).items()})
    write_atomically(path, lambda file: file.write(model.SerializeToString()))


class _Value(NamedTuple):
    """A tensor of the graph: its name, and its shape without the batch."""

    name: str
    shape: Shape


class _Graph:
    """A Tracer whose values are tensors of an ONNX graph. nodes: of the graph; constants: {name: array} that they need."""

    def __init__(self, network: Layer, make_node: Callable[..., Any]) -> None:
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}
        self._make_node = make_node
        self._prefixes = {id(layer): f"{path}." if path else "" for path, layer in network.named_layers()}
        self._joints = 0  # sums, splits and concatenations, which belong to no layer

    def add_node(self, operator: str, outputs: str | list[str], *inputs: _Value | str, **attributes: Any) -> str:
        """Append a node, and return the name of its output, the first if it has several."""
        outputs = [outputs] if isinstance(outputs, str) else outputs
        names = [value if isinstance(value, str) else value.name for value in inputs]
        self.nodes.append(self._make_node(operator, names, outputs, name=outputs[0], **attributes))
        return outputs[0]

    def layer(self, layer: Layer, x: _Value, z: _Value | None = None) -> _Value:
        prefix = self._prefixes[id(layer)]
        write = WRITERS.get(type(layer))  # not that of a base class: a subclass may compute something else
        if write is None:
            raise UsageError(f"{prefix.rstrip('.') or 'the network'}: {type(layer).__name__} is a layer without a form in ONNX")
        return _Value(write(self, layer, prefix, x, *([z] if z else [])), layer.output_shape(x.shape))

    def add(self, a: _Value, b: _Value) -> _Value:
        return _Value(self.add_node("Add", self._joint("sum"), a, b), a.shape)

    def split(self, x: _Value, sections: int) -> list[_Value]:
        name = self._joint("split")
        parts = [_Value(f"{name}.{i}", (x.shape[0] // sections, *x.shape[1:])) for i in range(sections)]
        self.add_node("Split", [part.name for part in parts], x, axis=1)
        return parts

    def concat(self, parts: Sequence[_Value]) -> _Value:
        channels = sum(part.shape[0] for part in parts)
        return _Value(self.add_node("Concat", self._joint("concat"), *parts, axis=1), (channels, *parts[0].shape[1:]))

    def _joint(self, kind: str) -> str:
        self._joints += 1
        return f"{kind}{self._joints}"


# ---- a writer for each type of layer: graph, layer, prefix of its names, x -> name of y ----------------------------


def _write_conv(graph: _Graph, layer: Conv2d, prefix: str, x: _Value) -> str:
    return graph.add_node("Conv", prefix + "y", x, *_parameters(layer, prefix), group=layer.groups, **_window(layer))


def _write_linear(graph: _Graph, layer: Linear, prefix: str, x: _Value) -> str:
    graph.add_node("Flatten", prefix + "x", x)
    return graph.add_node("Gemm", prefix + "y", prefix + "x", *_parameters(layer, prefix), transB=1)


def _write_batch_norm(graph: _Graph, layer: BatchNorm2d, prefix: str, x: _Value, z: _Value | None = None) -> str:
    statistics = [prefix + name for name in layer.buffer_names]
    y = graph.add_node("BatchNormalization", prefix + "normalized", x, *_parameters(layer, prefix), *statistics,
                       epsilon=layer.eps)
    if z:
        y = graph.add_node("Add", prefix + "sum", y, z)
    return graph.add_node("Relu", prefix + "y", y) if z or layer.relu else y


def _write_pad(graph: _Graph, layer: ZeroPadChannels, prefix: str, x: _Value) -> str:
    more = layer.channels - x.shape[0]
    others = [0] * (len(x.shape) - 1)  # H, W, where there are
    graph.constants[prefix + "pads"] = np.array([0, 0, *others, 0, more, *others])  # before N, C, H, W, and behind them
    return graph.add_node("Pad", prefix + "y", x, prefix + "pads")


def _write_nothing(graph: _Graph, layer: Layer, prefix: str, x: _Value) -> str:
    return x.name


def _writer(operator: str, attributes: Callable[[Any], Mapping[str, Any]] = lambda layer: {}) -> Callable[..., str]:
    """Of an operator without parameters."""
    return lambda graph, layer, prefix, x: graph.add_node(operator, prefix + "y", x, **attributes(layer))


def _parameters(layer: Layer, prefix: str) -> list[str]:
    return [prefix + name for name in layer.named_parameters()]


def _window(layer: Any) -> dict[str, Any]:
    return dict(kernel_shape=layer.kernel_size, strides=[layer.stride] * 2, pads=[layer.padding] * 4)


WRITERS: dict[type[Layer], Callable[..., str]] = {
    Conv2d: _write_conv, BatchNorm2d: _write_batch_norm, Linear: _write_linear, ZeroPadChannels: _write_pad,
    Dropout: _write_nothing, ChannelDropout: _write_nothing, ReLU: _writer("Relu"), MaxPool2d: _writer("MaxPool", _window),
    AvgPool2d: _writer("AveragePool", lambda layer: dict(count_include_pad=1, **_window(layer))),
    GlobalMaxPool2d: _writer("GlobalMaxPool"), GlobalAvgPool2d: _writer("GlobalAveragePool"), Flatten: _writer("Flatten"),
}
