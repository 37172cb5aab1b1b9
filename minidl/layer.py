"""What every layer is: parameters and running statistics in flat arrays, parts, state, and what a Tracer may follow.

Every layer has `forward(x)` and `backward(dy)`; arrays are (C, H, W, N), channels first and batch last. There is no
autograd: a composition calls the backwards of its parts in reverse. In training, forward saves what backward needs
and backward takes it, so memory is freed on the way back; in evaluation nothing is saved. What can be made again at
the price of one pass, the output of a batch norm, is not kept: see `Layer.forget_input`.
"""

from __future__ import annotations

import copy
import inspect
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Protocol, TypeAlias, TypeVar, final

import numpy as np

from minidl import random_keys
from minidl.device import Array, Device, array_module, select
from minidl.errors import CheckpointError, UsageError
from minidl.initializers import Initializer
from minidl.kernels import acc_dtype, storage_dtype
from minidl.ops import optimizer

if TYPE_CHECKING:
    from typing_extensions import Self

Value = TypeVar("Value")  # of a Tracer
Shape: TypeAlias = tuple[int, ...]  # (C, H, W) of one image, or (F,) of its features, as a Linear gives them
# Makes an array that was not kept again. That of a BatchNorm2d takes `out`, an array to write to.
Again: TypeAlias = Callable[..., Array]


class NotInitialized(RuntimeError, AttributeError):
    """A network, or a part of it, has no values yet."""


@final
class Parameter:
    """A tensor that is learned.

    After `Layer.initialize`: `data`, what layers compute with, in the type of storage; `master`, what the optimizer
    updates, float32 or float64 (the same array where the types are one); `grad`, like master. All are views of flat
    buffers. Before, there are none: NotInitialized.
    """

    data: Array
    master: Array
    grad: Array

    def __init__(self, shape: tuple[int, ...], initializer: Initializer) -> None:
        self.shape, self.initializer = tuple(shape), initializer
        self.size = math.prod(self.shape)

    def __getattr__(self, name: str) -> Any:
        _missing(self, name)


def _missing(thing: Layer | Parameter, name: str) -> NoReturn:
    """Say why it has no attribute `name`: what a class declares without a value, `initialize` gives to it."""
    kind = type(thing).__name__
    if any(name in inspect.get_annotations(it) for it in type(thing).__mro__ if it.__module__.startswith("minidl.")):
        raise NotInitialized(f"this {kind} has no {name.lstrip('_')} yet: call initialize() of the whole network; its parts must "
                             "be attributes, those in a list are not found")
    raise AttributeError(f"{kind!r} object has no attribute {name!r}")


class Parameters:
    """All parameters of a network in flat arrays, so that an optimizer is one launch; and all running statistics in one more.

    data, master, grad: flat arrays as in Parameter; by_name: {name: Parameter}; buffers: as master, of what is kept but not
    learned; step: the step of the network, which its optimizer counts. Each tensor starts at a multiple of 64 elements, which
    suits vector loads and tensor cores; the gaps hold zeros, and stay zero.
    """

    ALIGNMENT = 64

    data: Array
    master: Array
    grad: Array
    buffers: Array

    def __init__(self, by_name: dict[str, Parameter], device: Device, dtype: np.dtype[Any], step: Array) -> None:
        self.by_name, self.step = by_name, step
        acc = acc_dtype(dtype)
        places, size = self._places([parameter.size for parameter in by_name.values()])
        self.master, self.grad = (device.xp.zeros(size, acc) for _ in range(2))
        self.data = self.master if dtype == acc else device.xp.zeros(size, dtype)
        self.buffers = device.xp.zeros(0, acc)
        for parameter, place in zip(by_name.values(), places):
            for kind in ("data", "master", "grad"):
                setattr(parameter, kind, getattr(self, kind)[place].reshape(parameter.shape))

    def gather_buffers(self, network: Layer) -> None:
        """Copy the arrays that its layers keep but do not learn into `buffers`, and put views of it into their places."""
        attributes = [(layer, name) for _, layer in network.named_layers() for name in layer.buffer_names]
        arrays = [getattr(layer, name) for layer, name in attributes]
        places, size = self._places([array.size for array in arrays])
        self.buffers = array_module(self.master).zeros(size, self.master.dtype)
        for (layer, name), array, place in zip(attributes, arrays, places):
            view = self.buffers[place].reshape(array.shape)
            view[...] = array
            setattr(layer, name, view)

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise TypeError("parameters are copied with their network, an optimizer after it: copy.deepcopy((network, optimizer))")

    def _places(self, sizes: Sequence[int]) -> tuple[list[slice], int]:
        """Where tensors of these sizes lie in a flat array -> slices, size of the array."""
        places, begin = [], 0
        for size in sizes:
            places.append(slice(begin, begin + size))
            begin += -(-size // self.ALIGNMENT) * self.ALIGNMENT
        return places, begin

    def count(self) -> int:
        """Number of learned values, the gaps not counted."""
        return sum(parameter.size for parameter in self.by_name.values())

    def cast(self) -> None:
        """Bring `data` up to date after `master` was changed by other means than an optimizer."""
        optimizer.cast(self.master, self.data)


class Layer:
    """What all layers share. Parts of a layer, and its parameters, are simply its attributes."""

    device: Device
    dtype: np.dtype[Any]
    step: Array
    parameters: Parameters
    training = True
    # Attributes that `prepare` makes: arrays that are kept but not learned, running statistics.
    buffer_names: ClassVar[tuple[str, ...]] = ()
    # What `forward` keeps for backward, for summary.py: "x" its input, "y" its output, "statistics" two numbers a channel,
    # "winner" a uint16 for each output, "step" one int64. A Conv2d keeps no x if `forget_input` was called.
    keeps: ClassVar[tuple[str, ...]] = ()
    _saved: tuple[Any, ...] | None = None

    def __getattr__(self, name: str) -> Any:
        _missing(self, name)

    def forward(self, x: Array) -> Array:
        """x (C, H, W, N), which stays as it is -> y."""
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def backward(self, dy: Array) -> Any:  # an Array; None after skip_input_gradient; a pair from a BatchNorm2d given z
        """dy, shaped like the last forward's y, which stays as it is -> dx, shaped like its x. Overwrites the parameters'
        gradients."""
        raise NotImplementedError(f"{type(self).__name__} has no backward")

    def output_shape(self, shape: Shape) -> Shape:
        """Shape of the input, without the batch -> shape of the output. Raises ValueError where they do not fit."""
        return shape

    def macs(self, shape: Shape) -> int:
        """Multiply-accumulates of convolutions and linear layers for one image of `shape` (C, H, W), forward."""
        return 0

    def trace(self, x: Value, tracer: Tracer[Value]) -> Value:
        """What `forward` does, told to a Tracer: x and the result are its values."""
        return tracer.layer(self, x)

    def __repr__(self) -> str:
        """The parts, one below another, with the shapes of parameters."""
        shapes = ", ".join(f"{name} {'x'.join(map(str, it.shape))}" for name, it in self.own_parameters().items())
        parts = "".join(f"\n{name}: {part!r}".replace("\n", "\n  ") for name, part in self.children().items())
        return f"{type(self).__name__}({shapes}{parts}" + ("\n)" if parts else ")")

    # ---- what is kept from forward to backward

    def remakes_output(self, remakes_input: bool) -> bool:
        """Whether `output_again` gives something after a forward in training, of an input that can be made again or not."""
        return False

    def output_again(self) -> Again | None:
        """How to make the last output again from what is kept anyway; None where that is impossible or not cheap."""
        return None

    def forget_input(self, again: Again) -> None:
        """After a forward: its x need not be kept, `again()` makes it."""

    def skip_input_gradient(self) -> None:
        """Nobody will read the dx of this layer: do not compute it where that costs something."""

    # ---- parts

    def children(self) -> dict[str, Layer]:
        """{name: Layer}: the parts, in the order of their definition."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Layer)}

    def named_layers(self, prefix: str = "") -> Iterator[tuple[str, Layer]]:
        """Yield (dotted name, layer) for this layer, named "", and all below it."""
        yield prefix, self
        for name, child in self.children().items():
            yield from child.named_layers(f"{prefix}.{name}" if prefix else name)

    def own_parameters(self) -> dict[str, Parameter]:
        """{name: Parameter} of this layer itself."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Parameter)}

    def named_parameters(self) -> dict[str, Parameter]:
        """{dotted name: Parameter} of this layer and all below it."""
        return {f"{path}.{name}".lstrip("."): parameter for path, layer in self.named_layers()
                for name, parameter in layer.own_parameters().items()}

    def named_buffers(self) -> dict[str, Array]:
        """{dotted name: array} of what is kept but not learned: running statistics."""
        return {f"{path}.{name}".lstrip("."): getattr(layer, name)
                for path, layer in self.named_layers() for name in layer.buffer_names}

    def _named_arrays(self) -> dict[str, Array]:
        return {name: parameter.master for name, parameter in self.named_parameters().items()} | self.named_buffers()

    # ---- state

    def initialize(self, device: Device | str = "cpu", dtype: str | np.dtype[Any] = "float32", seed: int = 0,
                   rank: int = 0) -> Self:
        """Put the network on a device and give its parameters their initial values. Returns the network.

        device: a Device, or its name. dtype: type of storage, float32, float64, bfloat16 or float16. The values depend on
        (seed, name of the parameter) alone, not on device or type. rank: of several processes that train the same network;
        each has dropout masks of its own. Raises DeviceError for a device that is not there or does not have the type,
        UsageError for a name that is no device's, and ValueError for another type, and for a layer or parameter that is in
        two places of the network.
        """
        device = select(device) if isinstance(device, str) else device
        dtype = storage_dtype(dtype)
        device.check_type(dtype)
        self._check_places()
        self.device, self.dtype = device, dtype
        self.step = device.xp.zeros(1, np.int64)  # of training; dropout masks and augmentation depend on it
        by_name = self.named_parameters()
        self.parameters = Parameters(by_name, device, dtype, self.step)
        for name, parameter in by_name.items():
            rng = random_keys.generator(seed, random_keys.INITIALIZE, zlib.crc32(name.encode()))
            values = parameter.initializer(rng, parameter.shape).astype(parameter.master.dtype)
            parameter.master[...] = device.array(values)
        self.parameters.cast()
        for index, (_, layer) in enumerate(self.named_layers()):
            layer.prepare(device, dtype, random_keys.philox_key(seed, random_keys.DROPOUT, rank), index, self.step)
        self.parameters.gather_buffers(self)
        return self

    def _check_places(self) -> None:
        places: dict[int, str] = {}
        for name, part in [*self.named_layers(), *self.named_parameters().items()]:
            if id(part) in places:
                raise ValueError(f"{name} is the same {type(part).__name__} as {places[id(part)]}: each place in a network needs "
                                 "one of its own, as backward takes what forward saved and overwrites gradients")
            places[id(part)] = name

    def prepare(self, device: Device, dtype: np.dtype[Any], key: int, index: int, step: Array) -> None:
        """Allocate what this layer keeps besides parameters. key, index, step: its source of randomness."""

    def state_dict(self) -> dict[str, Array]:
        """{name: NumPy array}: parameters and running statistics, with PyTorch's names and layouts."""
        return {name: np.array(self.device.to_host(array)) for name, array in self._named_arrays().items()}

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """Take over {name: array}. Nothing changes unless every name and shape fits, and all are numbers.

        Names ending in num_batches_tracked, which PyTorch keeps and nobody needs, are passed over. Raises
        CheckpointError with the first five mismatches.
        """
        arrays = self._named_arrays()
        state = {name: array for name, array in state.items() if not name.endswith("num_batches_tracked")}
        check_shapes(state, {name: array.shape for name, array in arrays.items()})
        values = {name: np.asarray(state[name], dtype=array.dtype) for name, array in arrays.items()}
        for name, array in arrays.items():
            array[...] = self.device.array(values[name])
        self.parameters.cast()

    def train(self, training: bool = True) -> Self:
        """Switch to training: batch statistics, dropout, and saving for backward."""
        for _, layer in self.named_layers():
            layer.training, layer._saved = training, None
        return self

    def eval(self) -> Self:
        """Switch to evaluation: running statistics, no dropout, nothing saved."""
        return self.train(False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A network with values of its own on the same device. What forward saved is not copied."""
        copied = memo[id(self)] = type(self).__new__(type(self))
        for name, value in vars(self).items():
            if name not in ("parameters", "_saved"):
                setattr(copied, name, value if name == "device" else copy.deepcopy(value, memo))
        if "parameters" in vars(self):
            # Copies of views are no views.
            copied.parameters = Parameters(copied.named_parameters(), self.device, self.dtype, copied.step)
            memo[id(self.parameters)] = copied.parameters  # of an optimizer that is copied with the network
            copied.parameters.gather_buffers(copied)
            for name in ("data", "master", "grad"):
                getattr(copied.parameters, name)[...] = getattr(self.parameters, name)
        return copied

    def _save(self, *values: Any) -> None:
        if self.training:
            self._saved = values

    def _take(self) -> tuple[Any, ...]:
        if self._saved is None:
            raise RuntimeError(f"{type(self).__name__}: backward needs a forward in training mode before it; "
                               "each forward serves one backward")
        values, self._saved = self._saved, None
        return values

    def _fits(self, shape: Shape, channels: int | None = None) -> None:
        """Raise ValueError unless the shape is of an image, with as many channels, or any."""
        if len(shape) != 3:
            raise ValueError(f"{type(self).__name__}: an input (C, H, W, N) is needed, got one of {len(shape) + 1} dimensions")
        if channels is not None and shape[0] != channels:
            raise ValueError(f"{type(self).__name__}: {channels} input channels are needed, got (C, H, W) = {tuple(shape)}")


def check_shapes(state: Mapping[str, Array], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError, with the first five mismatches, unless the state has an array of each shape and no other."""
    faults = [f"{name}: missing in the file" for name in shapes if name not in state]
    faults += [f"{name}: not in the model" for name in state if name not in shapes]
    faults += [f"{name}: file {tuple(state[name].shape)}, model {shapes[name]}"
               for name in shapes if name in state and tuple(state[name].shape) != shapes[name]]
    if faults:
        more = f"\n... and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise CheckpointError("the weights do not fit this network:\n" + "\n".join(faults[:5]) + more)


def output_for(network: Layer, shape: Shape) -> Shape:
    """The output shape for images of `shape` (C, H, W). Raises UsageError where they do not fit the network."""
    try:
        return network.output_shape(shape)
    except ValueError as error:
        raise UsageError(f"the network does not take images (C, H, W) = {tuple(shape)}: {error}") from error


class Tracer(Protocol[Value]):
    """Follows `Layer.trace` through a network, with whatever values it likes: shapes, names of a graph, ..."""

    def layer(self, layer: Layer, x: Value, z: Value | None = None) -> Value:
        """One of the layers that have no parts; z: what a BatchNorm2d adds before its ReLU."""

    def add(self, a: Value, b: Value) -> Value:
        """The sum of two branches."""

    def split(self, x: Value, sections: int) -> Sequence[Value]:
        """Its channels in equal parts, in their order."""

    def concat(self, parts: Sequence[Value]) -> Value:
        """The channels of all parts, one after another."""


class Composition(Layer):
    """A layer made of layers. `trace` says how they are connected; shapes and costs follow from it."""

    def trace(self, x: Value, tracer: Tracer[Value]) -> Value:
        raise NotImplementedError(f"{type(self).__name__} is a Composition and needs a trace, which says how its parts are "
                                  "connected; a Layer with parts does with an output_shape")

    def output_shape(self, shape: Shape) -> Shape:
        return self.trace(tuple(shape), _Shapes(self))

    def macs(self, shape: Shape) -> int:
        shapes = _Shapes(self)
        self.trace(tuple(shape), shapes)
        return shapes.macs


class _Shapes:
    """A Tracer of a network whose values are shapes; `macs` adds up."""

    def __init__(self, network: Layer) -> None:
        self.network, self.macs = network, 0

    def layer(self, layer: Layer, x: Shape, z: Shape | None = None) -> Shape:
        try:
            self.macs += layer.macs(x)
            y = layer.output_shape(x)
        except ValueError as error:
            place = next((f"{name}: " for name, it in self.network.named_layers() if it is layer), "")
            raise ValueError(f"{place}{error}") from error
        return y if z is None else self.add(y, z)

    def add(self, a: Shape, b: Shape) -> Shape:
        if a != b:
            raise ValueError(f"the branches of a sum have different shapes (C, H, W): {a} and {b}")
        return a

    def split(self, x: Shape, sections: int) -> list[Shape]:
        if x[0] % sections:
            raise ValueError(f"{x[0]} channels do not divide into {sections} splits")
        return [(x[0] // sections, *x[1:])] * sections

    def concat(self, parts: Sequence[Shape]) -> Shape:
        if len({part[1:] for part in parts}) > 1:
            raise ValueError(f"splits of different sizes (C, H, W) cannot be joined: {', '.join(map(str, parts))}")
        return sum(part[0] for part in parts), *parts[0][1:]
