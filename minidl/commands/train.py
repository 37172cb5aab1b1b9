"""Train one of the architectures on CIFAR-100, CIFAR-10 or the bundled digits.

    minidl train                                    a demo: digits on the CPU
    minidl train --arch simplenet-5m --epochs 50    CIFAR-100, downloaded if need be
    minidl train --resume                           go on with the newest run

What is given here wins over --config FILE, that over the recipe. The last line
of a run names its folder, where metrics.csv has a row per epoch and last.npz
all that it takes to go on.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import models
from minidl import checkpoint, data, device, inspection, memory, parallel, run_folder, settings, signals, time_budget
from minidl.atomic_file import write_atomically
from minidl.checkpoint import Checkpoint
from minidl.commands import run_settings
from minidl.commands.arguments import positive
from minidl.device import Device
from minidl.errors import CheckpointError, DeviceError, UsageError
from minidl.parallel import ALONE, Team
from minidl.progress import Progress
from minidl.run import Run, subset
from minidl.run_folder import NoFolder, RunFolder
from minidl.saving import Saver
from minidl.settings import Settings
from minidl.training import Metrics
from minidl.wording import aligned, brief, percent
from models import listing

TRIAL_STEPS, OVERFIT_REPEATS, PROFILED_STEPS = 2, 20, 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    run_settings.add_arguments(parser)
    folder = parser.add_argument_group("the run's folder")
    folder.add_argument("-o", "--output", metavar="FOLDER", help="a new one; default: runs/<arch>-<dataset>-<time>")
    folder.add_argument("--resume", nargs="?", const="", metavar="RUN",
                        help="go on with a run, its folder or a checkpoint; by default the newest one of --arch")
    folder.add_argument("--override", action="store_true", help="with --resume: other settings than those of the run are meant")
    parser.add_argument("-q", "--quiet", action="store_true", help="no bar, and no line per epoch")
    trials = parser.add_argument_group("instead of one run").add_mutually_exclusive_group()
    trials.add_argument("--runs", type=positive, metavar="N", help="train with N seeds, and give mean and standard deviation")
    trials.add_argument("--print-config", action="store_true", help="print all settings in TOML")
    trials.add_argument("--profile", action="store_true", help="time each layer")
    trials.add_argument("--fast-dev-run", action="store_true",
                        help=f"try everything: {TRIAL_STEPS} steps, a batch of each evaluation, a checkpoint; nothing stays")
    trials.add_argument("--overfit-batch", action="store_true",
                        help="train on one batch again and again, not augmented: what can learn at all can learn that")


def main(args: argparse.Namespace) -> int | None:
    if args.arch == "list":
        print(listing.table())
        return None
    if args.resume is None:
        if args.output and not args.runs:
            run_folder.check_empty(Path(args.output))  # before anything that takes time
        if args.override:
            raise UsageError("--override is for a run that goes on: name it with --resume")
        chosen = run_settings.chosen(args)
        if args.print_config:
            sys.stdout.buffer.write(chosen.as_toml().encode())  # TOML is UTF-8, whatever a terminal is
            return None
    else:
        path, saved, chosen = to_resume(args)
    if chosen.ranks > 1:
        for flag in ("runs", "fast_dev_run", "overfit_batch", "profile"):
            if getattr(args, flag):
                raise UsageError(f"--{flag.replace('_', '-')} is for one rank, not {chosen.ranks}")
        if device.gpu_number(chosen.device) is not None and chosen.ranks > (gpus := device.gpu_count()):
            raise DeviceError(f"ranks {chosen.ranks}: on GPUs each needs its own, and there {'are' if gpus > 1 else 'is'} {gpus}: "
                              "ask for fewer, or use --device cpu")
        return parallel.launch(chosen.ranks, one_of_ranks, args)
    if args.resume is not None:
        resume(path, saved, chosen, args.quiet)
    elif args.profile:
        print_profile(new_run(chosen))
    elif args.fast_dev_run:
        with tempfile.TemporaryDirectory() as temporary:
            try_everything(new_run(chosen), RunFolder(Path(temporary)), args.quiet)
    elif args.runs:
        train_with_seeds(args, chosen)
    else:
        train(args, chosen)
    return None


def one_of_ranks(args: argparse.Namespace, team: Team) -> None:
    """What a rank of several does."""
    if args.resume is None:
        train(args, run_settings.chosen(args), team)
    else:
        resume(*to_resume(args), args.quiet or team.rank > 0, team)


def train(args: argparse.Namespace, chosen: Settings, team: Team = ALONE) -> None:
    """A new run, from its first line to its last."""
    begin = time.perf_counter()
    run = new_run(chosen, team, overfit=args.overfit_batch)
    announce(run)
    demo = run_settings.is_demo(args, run.place.name == "cpu")
    if demo:
        print("This is a demo on 1,797 small digits, because no GPU was found and no network or data were asked for.")
    if args.overfit_batch:
        print("A trial: one batch again and again, which is also the test set.")
    budget = plan(run, begin)
    name = f"{chosen.arch}-{chosen.dataset}"
    folder = RunFolder.new(name, args.output) if team.rank == 0 else NoFolder()
    train_in(run, folder, args.quiet or team.rank > 0, budget, begin)
    if demo:
        print("Next, the real thing: minidl train --arch simplenet-310k --epochs 10 --dataset cifar100")
    print(f"run folder: {folder.path}")


def place_of(chosen: Settings, team: Team = ALONE) -> Device:
    """The device of a rank: of several on GPUs, each has its own."""
    number = device.gpu_number(chosen.device)
    return device.select(chosen.device if team.size == 1 or number is None else f"cuda:{team.rank}")


# ---- runs --------------------------------------------------------------------------------------------------------


def new_run(chosen: Settings, team: Team = ALONE, overfit: bool = False) -> Run:
    """A run that stands before its first step. Raises UsageError where it is one of several ranks and has no team."""
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
    run = Run(chosen, network, train_set, test_set, place_of(chosen, team), team)
    if overfit:
        run.repeats = OVERFIT_REPEATS
    return run


def announce(run: Run) -> None:
    """The first line of a run: where, on what, which network."""
    s = run.settings
    held_out = f"{s.val_split:,} validation, " if s.val_split else ""
    print(f"{run.place.description} | {s.dataset}: {run.train_batches.size:,} training, {held_out}"
          f"{run.test_batches.size:,} test images | {s.arch}: {run.network.parameters.count():,} parameters, "
          f"{run.network.macs(run.train_set.images.shape[1:]):,} MACs an image | {s.precision}", flush=True)


def plan(run: Run, begin: float) -> float:
    """Where there is a time budget, which counts from `begin`, the run has as many epochs as fit -> the budget, or 0."""
    if not run.settings.time_budget:
        return 0.0
    budget = settings.duration(run.settings.time_budget)
    with ample_memory(run):
        epochs = time_budget.epochs_within(run, budget, time.perf_counter() - begin)
    # The folder says how to do the same again, on whatever machine.
    run.settings = dataclasses.replace(run.settings.with_epochs(epochs), time_budget=None)
    return budget


def train_in(run: Run, folder: RunFolder, quiet: bool, budget: float, begin: float) -> None:
    """Train a new run to its end, in a new folder. budget: seconds from `begin`, or 0."""
    folder.write_settings(run.settings.as_toml(), run_folder.environment(run.place))
    folder.log("start", settings=run.settings.as_dict())
    finish(run, folder, quiet)
    if budget:
        print(f"time budget {brief(budget)}: it took {brief(time.perf_counter() - begin)}")


def finish(run: Run, folder: RunFolder, quiet: bool) -> None:
    """Train from where the run stands to its end, and say what came of it.

    Raises what ends it early, when all that there is is saved: Stop, DivergedError, DeviceError.
    """
    if run.settings.tensorboard:
        folder.start_tensorboard()
    progress = Progress(run.settings.epochs, run.val_batches is not None, quiet)
    saver = Saver(run, folder)
    run.trainer.inspects = run.settings.inspect
    try:
        with ample_memory(run):
            while run.epoch < run.settings.epochs and not out_of_patience(run):
                train_epoch(run, folder, progress, saver)
        saver.save()
        conclude(run, folder)
    except signals.Stop as stop:
        saver.save()
        run.team.of_first(0.0)  # no rank ends before the first has saved: `launch` ends those that are left
        if run.team.rank > 0:
            raise signals.Stop(stop.exit_code, "") from None
        folder.log("stop", epoch=run.epoch, step=run.step, exit_code=stop.exit_code)
        where = f"after {run.epoch} epochs and {run.step} steps"
        raise signals.Stop(stop.exit_code, f"interrupted, and saved {where}; go on with --resume {folder.path}" if saver.saved
                           else f"interrupted {where}, and not saved: {folder.troubles[checkpoint.LAST]}") from None
    except Exception as error:
        folder.log("error", epoch=run.epoch, step=run.step, message=str(error))
        raise
    finally:
        folder.close()
    if run.trainer.statistics and not quiet:
        print(f"last step of epoch {run.epoch}: mean, std and zeros of the output; root mean squares of its gradient, the "
              f"weight\nand its gradient; change of the weight over the weight. All epochs: {folder.path / 'events.jsonl'}")
        print(statistics_table(run.trainer.statistics))


def train_epoch(run: Run, folder: RunFolder, progress: Progress, saver: Saver) -> None:
    """Train what is left of an epoch, evaluate, and record it."""
    begin = time.perf_counter()
    if run.step == 0:
        run.begin_epoch()
    batches = run.batches(run.epoch)
    first = run.step
    with progress.bar(run.epoch, len(batches), first) as show:

        def on_step(done: int, metrics: Metrics | None) -> None:
            run.step = done
            show(metrics)
            if done < len(batches):
                saver.after_step(batches, done)

        train = run.trainer.epoch(batches, on_step, first)
    train_seconds = time.perf_counter() - begin
    validation, test = run.validate(), run.test()
    row = {"epoch": f"{run.epoch + 1}", "lr": f"{batches[-1].lr:.6g}",
           "train_loss": f"{train.loss:.5f}", "train_top1": f"{train.top1:.5f}",
           "test_loss": f"{test.loss:.5f}", "test_top1": f"{test.top1:.5f}", "test_top5": f"{test.top5:.5f}",
           "images_per_second": f"{(len(batches) - first) * run.settings.batch_size / train_seconds:.1f}",
           "seconds": f"{time.perf_counter() - begin:.2f}"}
    if validation:
        row |= {"val_loss": f"{validation.loss:.5f}", "val_top1": f"{validation.top1:.5f}"}
    run.history.append(row)
    run.epoch, run.step = run.epoch + 1, 0
    if validation and (run.best is None or validation.top1 > run.best[1]):
        run.best = run.epoch, validation.top1
        saver.save_best()
    saver.after_epoch()
    folder.add_metrics(run.history)
    folder.log("epoch", **numbers(row))
    progress.row(row)
    if run.trainer.statistics:
        folder.log("inspect", epoch=run.epoch, layers=run.trainer.statistics)


def numbers(row: dict[str, str]) -> dict[str, float | None]:
    """A row of metrics.csv as what JSON can hold: whole and other numbers, None for what is not finite."""
    values = {column: float(text) for column, text in row.items()}
    return {column: None if not math.isfinite(value) else int(value) if column == "epoch" else value
            for column, value in values.items()}


def out_of_patience(run: Run) -> bool:
    """Whether the validation accuracy has not grown for as many epochs as the settings allow."""
    return bool(run.settings.patience and run.best and run.epoch - run.best[0] >= run.settings.patience)


def conclude(run: Run, folder: RunFolder) -> None:
    """The result: of the last epoch, on the test set. Raises CheckpointError where a checkpoint is missing."""
    last = run.history[-1]
    folder.log("end", **numbers(last), total_seconds=round(run.seconds, 2))
    stopped = f" of {run.settings.epochs}, no better in {run.settings.patience}" if run.epoch < run.settings.epochs else ""
    print(f"after epoch {last['epoch']}{stopped}: test top-1 {percent(last['test_top1'])}, top-5 {percent(last['test_top5'])}, "
          f"loss {float(last['test_loss']):.3f}")
    if run.best:
        best = run.history[run.best[0] - 1]
        print(f"best on validation ({percent(run.best[1])}), epoch {run.best[0]}: test top-1 {percent(best['test_top1'])}, "
              f"top-5 {percent(best['test_top5'])}")
    folder.draw_curves(run.history, len(run.train_set.classes))
    for file in (checkpoint.LAST, checkpoint.BEST):
        if reason := folder.troubles.get(file):
            raise CheckpointError(f"the run is at its end, but {reason}")


@contextlib.contextmanager
def ample_memory(run: Run) -> Iterator[None]:
    """Where there is not enough memory, the error says what would fit."""
    try:
        yield
    except MemoryError as error:  # CuPy's is one too
        raise memory.shortage(run, error) from None


# ---- several seeds, and going on ---------------------------------------------------------------------------------


def train_with_seeds(args: argparse.Namespace, chosen: Settings) -> None:
    """Train with --runs seeds, one after another. What a former call with the same folder has finished is not done again."""
    if args.runs < 2:
        raise UsageError("--runs 1: a standard deviation needs at least 2")
    dataclasses.replace(chosen, seed=chosen.seed + args.runs - 1)  # which must be a seed, too
    if args.output and os.path.exists(os.path.join(args.output, "config.toml")):
        raise UsageError(f"{args.output} is the folder of one run: name another one")
    parent = Path(args.output) if args.output else RunFolder.new(f"{chosen.arch}-{chosen.dataset}-{args.runs}-runs").path
    last = []
    for seed in range(chosen.seed, chosen.seed + args.runs):
        print(f"seed {seed}")
        try:
            run = train_seed(parent / f"seed-{seed}", dataclasses.replace(chosen, seed=seed), args.quiet)
        except signals.Stop as stop:
            raise signals.Stop(stop.exit_code, f"{stop}, or with all seeds: the same command with -o {parent}") from None
        chosen = dataclasses.replace(run.settings, seed=chosen.seed)  # what a time budget came to holds for all
        last.append(run.history[-1])
    results = {name: [float(row[name]) for row in last] for name in ("test_top1", "test_top5", "test_loss")}
    found = {name: {"mean": statistics.mean(values), "std": statistics.stdev(values), "values": values}
             for name, values in results.items()}
    write_atomically(parent / "summary.json", lambda file: file.write(json.dumps(found, indent=2).encode() + b"\n"))
    top1, top5 = (f"{percent(statistics.mean(results[name]))} +- {100 * statistics.stdev(results[name]):.2f}"
                  for name in ("test_top1", "test_top5"))
    print(f"{args.runs} seeds, mean +- standard deviation: test top-1 {top1}, top-5 {top5}")
    print(f"folder: {parent}")


def train_seed(path: Path, chosen: Settings, quiet: bool) -> Run:
    """Train to the end a run of which there may be a part in the folder `path`, or all."""
    begin = time.perf_counter()
    if any((path / name).exists() for name in (checkpoint.LAST, checkpoint.PREVIOUS)):
        decided = ("epochs", "milestones", "time_budget") if chosen.time_budget else ()  # long ago
        given = {name: getattr(chosen, name) for name in settings.fields() if name not in decided}
        run, folder = reopened(path, *saved_run(path, given, "name another folder with -o"))
        announce(run)
        go_on(run, folder, quiet)
    else:
        run = new_run(chosen)
        announce(run)
        budget = plan(run, begin)
        # A run that was killed before its first checkpoint begins anew.
        folder = RunFolder(path) if (path / "config.toml").exists() else RunFolder.new("", path)
        train_in(run, folder, quiet, budget, begin)
    return run


def to_resume(args: argparse.Namespace) -> tuple[Path, Checkpoint, Settings]:
    """The run that --resume names: its path, where it stands, and the settings that it goes on with."""
    for flag in ("output", "time_budget", "runs", "fast_dev_run", "overfit_batch", "profile", "print_config"):
        if getattr(args, flag):
            raise UsageError(f"--{flag.replace('_', '-')} does not go with --resume")
    given = run_settings.given(args)
    given.pop("time_budget", None)  # of a file: it decided when the run began
    if "arch" in given:
        given["arch"] = models.find(given["arch"])[0]
    path = Path(args.resume) if args.resume else run_folder.newest(given.get("arch"))
    remedy = "--override goes on with what is given; the result is then not that of either"
    return path, *saved_run(path, given, "" if args.override else remedy)


def saved_run(path: Path, given: dict[str, Any], remedy: str) -> tuple[Checkpoint, Settings]:
    """The checkpoint of a folder, or in a file, and its settings with those that are given.

    Raises UsageError with the remedy, if there is one, where settings are given that are not its own; and CheckpointError.
    """
    saved, remarks = checkpoint.load(path)
    for remark in remarks:
        print(f"warning: {remark}", file=sys.stderr)
    try:
        before = Settings(**saved.progress["settings"])
    except (TypeError, UsageError) as error:
        raise CheckpointError(f"{path} is not a checkpoint of this version: {error}") from None
    changed = run_settings.differences(before, given)
    of_the_old = settings.HYPERPARAMETERS[1:] if "optimizer" in changed else ()
    now = dataclasses.replace(before, **{**dict.fromkeys(of_the_old), **given})
    if not changed.keys().isdisjoint({"arch", "model_kwargs", "dataset"}):  # that weights do not fit is no matter of choice
        new_run(dataclasses.replace(now, ranks=1)).network.load_state_dict(saved.state)
    if changed and remedy:
        lines = [f"{name}: the run has {getattr(before, name)!r}, given is {value!r}" for name, value in changed.items()]
        raise UsageError("\n".join([*lines, remedy]))
    return saved, now


def resume(path: Path, saved: Checkpoint, chosen: Settings, quiet: bool, team: Team = ALONE) -> None:
    """Go on with a run."""
    run, folder = reopened(path, saved, chosen, team)
    announce(run)
    go_on(run, folder, quiet)
    print(f"run folder: {folder.path}")


def go_on(run: Run, folder: RunFolder, quiet: bool) -> None:
    """Train a reopened run to its end."""
    if finished(run):
        print(f"{folder.path} is finished: {run.epoch} epochs of {run.settings.epochs}, test top-1 "
              f"{percent(run.history[-1]['test_top1'])}")
        return
    print(f"going on after {run.epoch} epochs and {run.step} steps of {run.steps_per_epoch}")
    folder.log("resume", epoch=run.epoch, step=run.step, settings=run.settings.as_dict())
    finish(run, folder, quiet)


def reopened(path: Path, saved: Checkpoint, chosen: Settings, team: Team = ALONE) -> tuple[Run, RunFolder]:
    """A run where its checkpoint was taken, and its folder."""
    run = new_run(chosen, team, overfit=saved.progress.get("repeats", 1) > 1)
    run.load(saved)
    folder = RunFolder(path if path.is_dir() else path.parent) if team.rank == 0 else NoFolder()
    if team.rank == 0 and checkpoint.load(path)[0].progress != saved.progress:
        raise UsageError(f"{path}: another process went on with this run meanwhile; try again")
    folder.write_metrics(run.history)  # of what was done after the checkpoint nothing is left
    if chosen.as_dict() != saved.progress["settings"] and not finished(run):
        with folder.survives("config.toml"):
            folder.write_settings(chosen.as_toml(), run_folder.environment(run.place))
    return run, folder


def finished(run: Run) -> bool:
    return run.epoch >= run.settings.epochs or out_of_patience(run)


# ---- trials ------------------------------------------------------------------------------------------------------


def try_everything(run: Run, folder: RunFolder, quiet: bool) -> None:
    """Two steps, a batch of each evaluation, a checkpoint written and read back, in a folder that will not be kept."""
    announce(run)
    run.settings = dataclasses.replace(run.settings.with_epochs(1), limit_train_batches=TRIAL_STEPS, time_budget=None)
    run.evaluation_limit = 1
    folder.write_settings(run.settings.as_toml(), run_folder.environment(run.place))
    try:
        finish(run, folder, quiet)
    except signals.Stop as stop:
        raise signals.Stop(stop.exit_code) from None  # without what there is to go on with
    run.load(checkpoint.load(folder.path)[0])
    print(f"trial: {TRIAL_STEPS} steps, evaluation, checkpoint and resume work; nothing was kept")


def print_profile(run: Run) -> None:
    """A table: milliseconds of each layer, forward and backward, and of the step."""
    announce(run)
    batch = run.batches(0)[0]
    run.network.train()
    with ample_memory(run):
        times = inspection.profile(run.network, lambda: run.trainer.step(batch), PROFILED_STEPS)
    step = times.pop("step")["step"]
    layers = sum(sum(kinds.values()) for kinds in times.values())
    rows: list[tuple[str, ...]] = [("layer", "type", "forward ms", "backward ms", "of all")]
    types = {name: type(layer).__name__ for name, layer in run.network.named_layers()}
    for name, kinds in times.items():
        rows.append((name, types[name], *(f"{1000 * kinds.get(kind, 0.0):.3f}" for kind in ("forward", "backward")),
                     f"{sum(kinds.values()) / layers:.1%}"))
    print(aligned(rows, left=2))
    print(f"layers {1000 * layers:.1f} ms, each waited for; a step without that {1000 * step:.1f} ms, "
          f"{run.settings.batch_size / step:,.0f} images/s; medians of {PROFILED_STEPS}")


def statistics_table(layers: dict[str, dict[str, float]]) -> str:
    """Of --inspect: a line per layer."""
    head = ("layer", "mean", "std", "zeros", "gradient", "weight", "dweight", "update")
    rows = [(name, *(f"{row[key]:.1e}" if key in row and key != "output_zeros" else percent(row[key]) if key in row else "-"
                     for key in inspection.STATISTICS)) for name, row in layers.items()]
    return aligned([head, *rows], left=1)
