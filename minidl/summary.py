"""What a network costs, layer by layer, before it runs: shapes, parameters, multiply-accumulates, memory."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minidl.data.dataset import IMAGE_SHAPE
from minidl.device import Device, select
from minidl.kernels import acc_dtype, storage_dtype
from minidl.layer import Layer, Shape
from minidl.layers import Conv2d, Flatten
from minidl.ops import conv
from minidl.wording import aligned, megabytes


@dataclass(frozen=True)
class Row:
    """One layer. Memory is for a batch in training."""

    name: str
    type: str
    output_shape: Shape    # without the batch
    parameters: int
    macs: int              # of one image, forward
    activation_bytes: int  # kept for backward, and not by a layer before
    workspace_bytes: int   # of what a convolution unfolds or transforms, while it runs


@dataclass(frozen=True)
class Summary:
    """All layers, and the network: sums, but of the workspaces the largest, as each is free again after its layer. Compositions
    have no row, but their own parameters count."""

    rows: list[Row]
    parameters: int
    macs: int
    activation_bytes: int
    workspace_bytes: int

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return dataclasses.asdict(self)


def summarize(network: Layer, shape: Shape = IMAGE_SHAPE, batch_size: int = 128, dtype: str = "float32",
              device: Device | None = None) -> Summary:
    """A network, which need not be initialized, for images of `shape` (C, H, W) -> Summary.

    dtype: type of storage. device: whose workspaces, by default the CPU's. Raises ValueError where the shape does not fit.
    """
    costs = _Costs(network, batch_size, storage_dtype(dtype), device or select("cpu"))
    network.trace(_Tensor(tuple(shape)), costs)
    rows = costs.rows
    return Summary(rows, sum(parameter.size for parameter in network.named_parameters().values()), sum(row.macs for row in rows),
                   sum(row.activation_bytes for row in rows), max((row.workspace_bytes for row in rows), default=0))


class _Tensor:
    """An array of the network. again: it can be made again, so a convolution does not keep it; kept: somebody does."""

    def __init__(self, shape: Shape, again: bool = False) -> None:
        self.shape, self.again, self.kept = shape, again, False


class _Costs:
    """A Tracer that writes a Row for each layer it meets."""

    def __init__(self, network: Layer, batch_size: int, dtype: np.dtype, device: Device) -> None:
        self.names = {id(layer): name for name, layer in network.named_layers()}
        self.batch_size, self.dtype, self.device = batch_size, dtype, device
        self.rows: list[Row] = []

    def layer(self, layer: Layer, x: _Tensor, z: _Tensor | None = None) -> _Tensor:
        y = _Tensor(layer.output_shape(x.shape), layer.remakes_output(x.again) and z is None)
        y.kept = isinstance(layer, Flatten) and x.kept  # the same memory
        parameters = sum(parameter.size for parameter in layer.named_parameters().values())
        self.rows.append(Row(self.names[id(layer)], type(layer).__name__, y.shape, parameters, layer.macs(x.shape),
                             self._kept_bytes(layer, x, y, z), self._workspace_bytes(layer, x)))
        return y

    def add(self, a: _Tensor, b: _Tensor) -> _Tensor:
        return _Tensor(a.shape)

    def split(self, x: _Tensor, sections: int) -> list[_Tensor]:
        return [_Tensor((x.shape[0] // sections, *x.shape[1:]), x.again) for _ in range(sections)]

    def concat(self, parts: Sequence[_Tensor]) -> _Tensor:
        return _Tensor((sum(part.shape[0] for part in parts), *parts[0].shape[1:]), all(part.again for part in parts))

    def _kept_bytes(self, layer: Layer, x: _Tensor, y: _Tensor, z: _Tensor | None) -> int:
        elements = math.prod(y.shape) * self.batch_size
        total = 0
        for kept in (*layer.keeps, *(("y",) if z else ())):
            if kept in ("x", "y"):
                tensor = x if kept == "x" else y
                if not tensor.kept and not (tensor.again and isinstance(layer, Conv2d)):
                    tensor.kept = True
                    total += math.prod(tensor.shape) * self.batch_size * self.dtype.itemsize
            else:
                total += {"statistics": 2 * y.shape[0] * acc_dtype(self.dtype).itemsize, "winner": 2 * elements, "step": 8}[kept]
        return total

    def _workspace_bytes(self, layer: Layer, x: _Tensor) -> int:
        if not isinstance(layer, Conv2d):
            return 0
        nothing = self.device.xp.zeros((), self.dtype)
        return conv.workspace_bytes(*(self.device.xp.broadcast_to(nothing, shape) for shape in
                                      ((*x.shape, self.batch_size), layer.weight.shape)),
                                    stride=layer.stride, padding=layer.padding, groups=layer.groups)


def table(summary: Summary) -> str:
    """The rows and the totals, for people."""
    head = ("layer", "type", "output", "parameters", "MACs", "kept for backward", "workspace")
    rows = [(row.name, row.type, " x ".join(map(str, row.output_shape)), f"{row.parameters:,}", f"{row.macs:,}",
             megabytes(row.activation_bytes), megabytes(row.workspace_bytes)) for row in summary.rows]
    total = ("total", "", "", f"{summary.parameters:,}", f"{summary.macs:,}", megabytes(summary.activation_bytes),
             megabytes(summary.workspace_bytes))
    return aligned([head, *rows, total], left=3)
