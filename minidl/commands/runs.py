"""Runs as their settings say, new or from a checkpoint, and how they are trained."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np

import models
from minidl import checkpoint, data, device, run_folder, settings, time_budget, weights
from minidl.checkpoint import Checkpoint
from minidl.commands import run_settings
from minidl.device import Device
from minidl.errors import CheckpointError, UsageError
from minidl.fit import fit
from minidl.memory import ample_memory
from minidl.parallel import ALONE, Team
from minidl.run import Run, subset
from minidl.run_folder import NoFolder, RunFolder
from minidl.settings import Settings
from minidl.wording import brief, counted, listed, percent, warn

OVERFIT_REPEATS = 20


def new_run(chosen: Settings, team: Team = ALONE, overfit: bool = False, goes_on: bool = False) -> Run:
    """A run that stands before its first step. goes_on: it will be taken elsewhere, so that it is no matter what it begins with.
    Raises UsageError where it is one of several ranks and has no team."""
    if chosen.tensorboard:
        run_folder.tensorboard_writer()  # that there is none is said now, before anything is done
    if chosen.ranks != team.size:
        raise UsageError(f"ranks {chosen.ranks}: only training itself is shared by several processes")
    architecture = models.find(chosen.arch)[1]
    train_set, test_set = data.load(chosen.dataset, chosen.data_dir)
    network = architecture.create(len(train_set.classes), chosen.model_kwargs)
    if overfit:
        chosen = dataclasses.replace(chosen, padding=0, reflect=False, flip=False, cutout=0, mixup=0.0, label_smoothing=0.0,
                                     val_split=0, patience=0)
        train_set = test_set = subset(train_set, np.arange(min(chosen.batch_size, len(train_set.labels))))
    start = weights.load(chosen.init)[0] if chosen.init and not goes_on else None
    run = Run(chosen, network, train_set, test_set, _place_of(chosen, team), team, start)
    if overfit:
        run.repeats = OVERFIT_REPEATS
    return run


def _place_of(chosen: Settings, team: Team = ALONE) -> Device:
    """The device of a rank: of several on GPUs, each has its own."""
    number = device.gpu_number(chosen.device)
    return device.select(chosen.device if team.size == 1 or number is None else f"cuda:{team.rank}")


def announce(run: Run) -> None:
    """The first line of a run: where, on what, which network."""
    s = run.settings
    held_out = f"{s.val_split:,} validation, " if s.val_split else ""
    print(f"{run.place.description} | {s.dataset}: {run.train_batches.size:,} training, {held_out}"
          f"{run.test_batches.size:,} test images | {s.arch}: {run.network.parameters.count():,} parameters, "
          f"{run.network.macs(run.train_set.images.shape[1:]):,} MACs an image | {s.precision}", flush=True)
    if run.fresh is not None:
        but = f", but for {listed(run.fresh)}" if run.fresh else ""
        print(f"begins with the weights of {s.init}{but}", flush=True)


def plan(run: Run, since: float) -> float:
    """Where there is a time budget, which counts from `since`, the run has as many epochs as fit -> the budget, or 0."""
    if not run.settings.time_budget:
        return 0.0
    budget = settings.duration(run.settings.time_budget)
    with ample_memory(run):
        epochs = time_budget.epochs_within(run, budget, time.perf_counter() - since)
    # The folder says how to do the same again, on whatever machine.
    run.settings = dataclasses.replace(run.settings.with_epochs(epochs), time_budget=None)
    return budget


def train_new(run: Run, folder: RunFolder, quiet: bool, budget: float, since: float) -> None:
    """Train a new run to its end, in a new folder. budget: seconds from `since` on, or 0."""
    fit(run, folder, quiet)
    if budget:
        print(f"time budget {brief(budget)}: it took {brief(time.perf_counter() - since)}")


# ---- going on --------------------------------------------------------------------------------------------------------


def saved_run(path: Path, given: dict[str, Any], remedy: str) -> tuple[Checkpoint, Settings]:
    """The checkpoint of a folder, or in a file, and its settings with those that are given.

    Raises UsageError with the remedy, if there is one, where settings are given that are not its own; and CheckpointError.
    """
    saved, remarks = checkpoint.load(path)
    for remark in remarks:
        warn(remark)
    try:
        before = Settings(**saved.progress["settings"])
    except (TypeError, UsageError) as error:
        raise CheckpointError(f"{path} is not a checkpoint of this version: {error}") from None
    changed = run_settings.differences(before, given)
    of_the_old = settings.HYPERPARAMETERS[1:] if "optimizer" in changed else ()
    now = dataclasses.replace(before, **{**dict.fromkeys(of_the_old), **given})
    if not changed.keys().isdisjoint({"arch", "model_kwargs", "dataset"}):  # that weights do not fit is no matter of choice
        new_run(dataclasses.replace(now, ranks=1), goes_on=True).network.load_state_dict(saved.state)
    if changed and remedy:
        lines = [f"{name}: the run has {getattr(before, name)!r}, given is {value!r}" for name, value in changed.items()]
        raise UsageError("\n".join([*lines, remedy]))
    if now.val_split and not changed.keys().isdisjoint({"val_split", "seed"}):
        warn("of the images that are held out now, some were trained on: what is measured on them is too good")
    return saved, now


def reopened(path: Path, saved: Checkpoint, chosen: Settings, team: Team = ALONE) -> tuple[Run, RunFolder]:
    """A run where its checkpoint was taken, and its folder."""
    folder_path = run_folder.folder_of(path)
    run = new_run(chosen, team, overfit=saved.progress.get("repeats", 1) > 1, goes_on=True)
    run.load(saved)
    folder = RunFolder(folder_path) if team.rank == 0 else NoFolder()
    if team.rank == 0 and checkpoint.load(path)[0].progress != saved.progress:
        raise UsageError(f"{path}: another process went on with this run meanwhile; try again")
    if chosen.as_dict() != saved.progress["settings"] and not run.finished:
        folder.write_settings(chosen.as_toml(), run_folder.environment(run.place))
    return run, folder


def go_on(run: Run, folder: RunFolder, quiet: bool) -> None:
    """Train a reopened run to its end."""
    if run.finished:
        # Its process may have been killed before it came to these.
        with folder.survives("metrics.csv"):
            folder.write_metrics(run.history)
        if not (folder.path / "curves.png").exists():
            folder.draw_curves(run.history, len(run.train_set.classes))
        print(f"{folder.path} is finished: {counted(run.epoch, 'epoch')} of {run.settings.epochs}, test top-1 "
              f"{percent(run.history[-1]['test_top1'])}")
        return
    print(f"going on after {run.position()} of {run.steps_per_epoch}")
    fit(run, folder, quiet)
