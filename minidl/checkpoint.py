"""Checkpoints: all that a run needs to go on as if it had not stopped, bit for bit.

A checkpoint is a file of weights (minidl/weights.py), those that are evaluated, so that every reader of weights reads it,
with more arrays, whose names begin with "training/", and more metadata, the entry "training". The one before it is kept.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minidl import weights
from minidl.errors import CheckpointError

LAST, PREVIOUS, BEST = weights.LAST, weights.PREVIOUS, "best.npz"
FORMAT = 1  # of what training goes on from, which grows when its arrays or numbers get another meaning


@dataclass
class Checkpoint:
    """state: the weights, {name: array}; arrays: the rest, {name: array}; about: see weights.describe; progress: what is
    not an array, in JSON's types: settings, position, history."""

    state: weights.State
    arrays: weights.State
    about: weights.Metadata
    progress: dict[str, Any]


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Write last.npz, whole or not at all, and keep the one before. Raises CheckpointError where it cannot be written."""
    arrays = {weights.TRAINING + name: array for name, array in checkpoint.arrays.items()}
    training = {"format": FORMAT, **checkpoint.progress}
    weights.save(folder / LAST, {**checkpoint.state, **arrays}, {**checkpoint.about, "training": training}, folder / PREVIOUS)


def load(path: Path) -> tuple[Checkpoint, list[str]]:
    """The checkpoint of a run's folder, or in a file -> Checkpoint, what there is to be said about it.

    Of a folder it is the last that can be read. Raises CheckpointError where none can.
    """
    if not os.path.isdir(path):
        return _load(path), []
    if os.access(path, os.X_OK) and not any((path / name).exists() for name in (LAST, PREVIOUS)):
        raise CheckpointError(f"{path} holds no checkpoint, {LAST} or {PREVIOUS}")
    try:
        return _load(path / LAST), []
    except CheckpointError as error:
        if not os.path.exists(path / PREVIOUS):
            raise
        reason = error
    try:
        return _load(path / PREVIOUS), [f"{reason}; going on from {PREVIOUS}"]
    except CheckpointError as error:
        raise CheckpointError(f"{reason}; {error}") from None


def _load(path: Path) -> Checkpoint:
    state, metadata = weights.load_all(path)
    if metadata is None or "training" not in metadata:
        raise CheckpointError(f"{path} holds weights only: a run cannot go on from it")
    match metadata["training"]:
        case {"settings": dict(), "epoch": epoch, "step": int(), "history": list(history)} as progress if (
                len(history) == epoch and progress.get("format", 1) == FORMAT):
            progress.pop("format", None)
            arrays = {name.removeprefix(weights.TRAINING): state.pop(name)
                      for name in list(state) if name.startswith(weights.TRAINING)}
            return Checkpoint(state, arrays, {key: metadata[key] for key in weights.METADATA}, progress)
    raise CheckpointError(f"{path} is not a checkpoint of this version")
