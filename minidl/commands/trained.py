"""Trained networks, from the files that a command is given."""

from __future__ import annotations

import math
from typing import Any

import models
from minidl import weights
from minidl.device import Device
from minidl.errors import CheckpointError
from minidl.layer import Layer, check_shapes

FREE_SIZE = 1_000_000  # parameters: a small file may name a large network, for which memory is taken only if it fits


def load(path: str) -> tuple[weights.State, weights.Metadata]:
    """As weights.load, for a file that says enough to run its network. Raises CheckpointError otherwise."""
    state, metadata = weights.load(path)
    if metadata is None:
        raise CheckpointError(f"{path} does not say which network its weights belong to: `minidl import FILE --arch NAME` writes "
                              "a file that does")
    mean, std, names = (metadata[key] for key in ("mean", "std", "class_names"))
    if not (_may_be_numbers(mean) and _may_be_numbers(std) and (std is None or min(std) > 0) and
            (names is None or len(names) == metadata["classes"] and all(isinstance(name, str) for name in names))):
        raise CheckpointError(f"{path}: its mean, std or class_names cannot be those of a data set")
    return state, metadata


def _may_be_numbers(values: Any) -> bool:
    """Whether the list `values` is one of three numbers, one for each colour, or None."""
    return values is None or len(values) == 3 and all(isinstance(value, (int, float)) and abs(value) < 1e6 for value in values)


def network_with(state: weights.State, metadata: weights.Metadata, place: Device | str = "cpu") -> Layer:
    """The network of the metadata with its weights, on a device. Raises CheckpointError with the first mismatches if they do
    not fit."""
    network = models.create(metadata["arch"], metadata["classes"], **metadata["options"])
    shapes = {name: parameter.shape for name, parameter in network.named_parameters().items()}
    if sum(map(math.prod, shapes.values())) > FREE_SIZE + 2 * sum(array.size for array in state.values()):
        check_shapes({name: array for name, array in state.items() if name in shapes}, shapes)
    network.initialize(place).load_state_dict(state)
    return network
