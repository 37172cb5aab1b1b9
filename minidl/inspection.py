"""What happens inside a network during a step: where numbers stop being finite, statistics and times of each layer."""

from __future__ import annotations

import contextlib
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeAlias

import numpy as np

from minidl import signals
from minidl.device import Array, Device
from minidl.layer import Layer

# around(name of the layer, the layer, "forward" or "backward", the call, its arguments) -> what the call returns
Around: TypeAlias = Callable[..., Any]

_watched: weakref.WeakSet[Layer] = weakref.WeakSet()


def watched(network: Layer) -> bool:
    """Whether somebody watches the layers of this network now."""
    return network in _watched


@contextlib.contextmanager
def watch(network: Layer, around: Around) -> Iterator[None]:
    """Call `around` in place of forward and backward of each layer that has no parts.

    On a GPU the next step of training writes over the arrays of one: copy what is to be kept.
    """
    leaves = [(name, layer) for name, layer in network.named_layers() if not layer.children()]
    kinds = "forward", "backward"
    before: list[dict[str, Any]] = [{kind: vars(layer)[kind] for kind in kinds if kind in vars(layer)} for _, layer in leaves]
    first = network not in _watched
    try:
        _watched.add(network)
        for name, layer in leaves:
            for kind in kinds:
                setattr(layer, kind, partial(around, name, layer, kind, getattr(layer, kind)))  # hides the method
        yield
    finally:
        if first:
            _watched.discard(network)
        for (_, layer), hidden in zip(leaves, before):
            for kind in kinds:
                vars(layer).pop(kind, None)
            vars(layer).update(hidden)


def first_nonfinite(network: Layer, step: Callable[[], object]) -> str | None:
    """Run step() -> the first tensor in it that holds a NaN or Inf, in words; None where all are finite."""
    found: list[str] = []

    def around(name: str, layer: Layer, kind: str, call: Callable[..., Any], *args: Any, **out: Any) -> Any:
        result = call(*args, **out)
        if not found:
            tensors = {"its output": result} if kind == "forward" else {
                **{f"the gradient of its {key}": parameter.grad for key, parameter in layer.own_parameters().items()},
                "the gradient of its input": result}
            found.extend(f"layer {name}, {what}" for what, tensor in tensors.items() if not _finite(network.device, tensor))
        return result

    with watch(network, around):
        step()
    return found[0] if found else None


def _finite(device: Device, tensor: Array | tuple[Array, ...] | None) -> bool:
    tensors = tensor if isinstance(tensor, tuple) else (tensor,)
    return all(array is None or np.isfinite(_float64(device, array)).all() for array in tensors)


def _float64(device: Device, array: Array) -> Array:
    return np.asarray(device.to_host(array)).astype(np.float64)


# ---- statistics --------------------------------------------------------------------------------------------------

STATISTICS = ("output_mean", "output_std", "output_zeros", "gradient_rms", "weight_rms", "weight_gradient_rms", "update_ratio")


def statistics(network: Layer, step: Callable[[], object], loss_scale: float = 1.0,
               share: float = 1.0) -> dict[str, dict[str, float]]:
    """Run step(), a training step, -> {layer: {one of STATISTICS: value}}, layers in the order of their forward.

    loss_scale: what the step multiplies the loss by. share: of the batch, that this network sees; others see the rest, and
    outputs are those of its images. Gradients are those of the mean loss of the whole batch.

    output_zeros: share of zeros; gradient_rms: root mean square of the gradient of the output; of layers with a weight also
    its root mean square, that of its gradient, and update_ratio, the length of its change over its own unless that is 0;
    compositions with a weight of their own come last, with these alone.
    """
    rows: dict[str, dict[str, float]] = {}
    weights = {name: layer.own_parameters()["weight"] for name, layer in network.named_layers()
               if "weight" in layer.own_parameters()}
    before = {name: _float64(network.device, weight.master) for name, weight in weights.items()}

    def around(name: str, layer: Layer, kind: str, call: Callable[..., Any], *args: Any, **out: Any) -> Any:
        if kind == "backward":
            rows[name]["gradient_rms"] = _rms(_float64(network.device, args[0])) * share / loss_scale
        result = call(*args, **out)
        if kind == "forward":
            y = _float64(network.device, result)
            rows[name] = {"output_mean": float(y.mean()), "output_std": float(y.std()), "output_zeros": float((y == 0).mean())}
        return result

    with watch(network, around), np.errstate(invalid="ignore"):  # of numbers that are not finite
        step()
    for name, weight in weights.items():
        size = _rms(before[name])
        change = _rms(_float64(network.device, weight.master) - before[name])
        row = rows.setdefault(name, {})  # there is none of a composition that has a weight: only its parts are watched
        row |= {"weight_rms": size, "weight_gradient_rms": _rms(_float64(network.device, weight.grad)) / loss_scale}
        if size:
            row["update_ratio"] = change / size
    return rows


def _rms(values: Array) -> float:
    return float(np.sqrt(np.mean(values**2)))


# ---- times -------------------------------------------------------------------------------------------------------


def profile(network: Layer, step: Callable[[], object], repeats: int) -> dict[str, dict[str, float]]:
    """Run step() `repeats` times -> {layer: {"forward", "backward": median seconds}}, and of the whole step as "step".

    The device is synchronized around each layer, which on a GPU costs time that "step" does not have. "step" also has what is no
    layer: the batch, the loss, the optimizer, sums of branches. On a GPU each layer is an NVTX range.
    """
    times: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    device = network.device

    def around(name: str, layer: Layer, kind: str, call: Callable[..., Any], *args: Any, **out: Any) -> Any:
        with _range(device, f"{name}.{kind}"):
            device.synchronize()
            begin = time.perf_counter()
            result = call(*args, **out)
            device.synchronize()
        times[name][kind].append(time.perf_counter() - begin)
        return result

    step()
    for _ in range(repeats):
        signals.obey()
        device.synchronize()
        begin = time.perf_counter()
        step()
        device.synchronize()
        times["step"]["step"].append(time.perf_counter() - begin)
    with watch(network, around):
        for _ in range(repeats):
            signals.obey()
            step()
    return {name: {kind: float(np.median(values)) for kind, values in kinds.items()} for name, kinds in times.items()}


@contextlib.contextmanager
def _range(device: Device, name: str) -> Iterator[None]:
    if device.name == "cpu":
        yield
        return
    from cupy.cuda import nvtx

    nvtx.RangePush(name)
    try:
        yield
    finally:
        nvtx.RangePop()
