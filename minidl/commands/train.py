"""Train one of the architectures on CIFAR-100, CIFAR-10 or the bundled digits.

    minidl train                                    on a CPU a demo, on digits; on a GPU CIFAR-100
    minidl train --arch simplenet-5m --epochs 50    CIFAR-100, downloaded if need be
    minidl train --resume                           go on with the newest run

What is given here wins over --config FILE, that over the recipe. The last line
of a run names its folder, where metrics.csv has a row per epoch and last.npz
all that it takes to go on.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from pathlib import Path

import models
from minidl import checkpoint, device, inspection, parallel, run_folder, signals
from minidl.checkpoint import Checkpoint
from minidl.commands import run_settings, runs
from minidl.commands.arguments import positive
from minidl.commands.seeds import train_with_seeds
from minidl.errors import CheckpointError, DeviceError, UsageError
from minidl.fit import fit
from minidl.memory import ample_memory
from minidl.parallel import ALONE, Team
from minidl.run import Run
from minidl.run_folder import NoFolder, RunFolder
from minidl.settings import Settings
from minidl.wording import aligned, unwarned
from models import listing

TRIAL_STEPS, PROFILED_STEPS = 2, 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    run_settings.add_arguments(parser)
    folder = parser.add_argument_group("the run's folder")
    folder.add_argument("-o", "--output", metavar="FOLDER", help="a new one; default: runs/<arch>-<dataset>-<time>")
    folder.add_argument("--resume", nargs="?", const="", metavar="RUN",
                        help="go on with a run, its folder or a checkpoint; by default the newest one, or that of --arch")
    folder.add_argument("--override", action="store_true", help="with --resume: accept settings that differ from the run's")
    parser.add_argument("-q", "--quiet", action="store_true", help="no bar, and no line per epoch")
    trials = parser.add_argument_group("instead of one run").add_mutually_exclusive_group()
    trials.add_argument("--runs", type=positive, metavar="N", help="train with N seeds, and give mean and standard deviation")
    trials.add_argument("--print-config", action="store_true", help="print all settings in TOML")
    trials.add_argument("--profile", action="store_true", help="time each layer")
    trials.add_argument("--fast-dev-run", action="store_true",
                        help=f"try everything: {TRIAL_STEPS} steps, a batch of each evaluation, a checkpoint; nothing stays")
    trials.add_argument("--overfit-batch", action="store_true",
                        help="train on one batch again and again, not augmented: a sound network reaches 100 %%")


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
        if ":" in chosen.device:
            raise UsageError(f"device {chosen.device} is one GPU, and of {chosen.ranks} ranks each needs its own: say cuda")
        if device.gpu_number(chosen.device) is not None and chosen.ranks > (gpus := device.gpu_count()):
            raise DeviceError(f"ranks {chosen.ranks}: on GPUs each needs its own, and there {'are' if gpus > 1 else 'is'} {gpus}: "
                              "ask for fewer, or use --device cpu")
        return parallel.launch(chosen.ranks, one_of_ranks, args)
    if args.resume is not None:
        resume(path, saved, chosen, args.quiet)
    elif args.profile:
        print_profile(runs.new_run(chosen))
    elif args.fast_dev_run:
        try_everything(runs.new_run(chosen), args.quiet)
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
        with unwarned():  # the process that started the ranks has said it
            resumed = to_resume(args)
        resume(*resumed, args.quiet or team.rank > 0, team)


def train(args: argparse.Namespace, chosen: Settings, team: Team = ALONE) -> None:
    """A new run, from its first line to its last."""
    begin = time.perf_counter()
    run = runs.new_run(chosen, team, overfit=args.overfit_batch)
    runs.announce(run)
    demo = run_settings.is_demo(args, run.place.name == "cpu")
    if demo:
        print("This is a demo on 1,797 small digits, because it runs on the CPU and no network or data were asked for.")
    if args.overfit_batch:
        print("A trial: one batch again and again, which is also the test set.")
    budget = runs.plan(run, begin)
    if team.rank > 0:
        folder: RunFolder = NoFolder()
    else:
        folder = RunFolder.new(args.output) if args.output else RunFolder.dated(f"{chosen.arch}-{chosen.dataset}")
    runs.train_new(run, folder, args.quiet or team.rank > 0, budget, begin)
    if demo:
        print("Next, the real thing: minidl train --arch simplenet-310k --epochs 10 --dataset cifar100")
    print(f"run folder: {folder.path}")


def to_resume(args: argparse.Namespace) -> tuple[Path, Checkpoint, Settings]:
    """The run that --resume names: its path, where it stands, and the settings that it goes on with."""
    for flag in ("output", "time_budget", "runs", "fast_dev_run", "overfit_batch", "profile", "print_config"):
        if getattr(args, flag):
            raise UsageError(f"--{flag.replace('_', '-')} does not go with --resume")
    given = run_settings.given(args)
    given.pop("time_budget", None)  # of a file: it decided when the run began
    if "arch" in given:  # of a file, it may be an alias
        given["arch"] = models.find(given["arch"])[0]
    path = Path(args.resume) if args.resume else run_folder.newest(given.get("arch"))
    remedy = "--override goes on with what is given; the result is then not that of either"
    return path, *runs.saved_run(path, given, "" if args.override else remedy)


def resume(path: Path, saved: Checkpoint, chosen: Settings, quiet: bool, team: Team = ALONE) -> None:
    """Go on with a run."""
    run, folder = runs.reopened(path, saved, chosen, team)
    runs.announce(run)
    runs.go_on(run, folder, quiet)
    print(f"run folder: {folder.path}")


# ---- trials ----------------------------------------------------------------------------------------------------------


def try_everything(run: Run, quiet: bool) -> None:
    """Two steps, a batch of each evaluation, a checkpoint written and read back, in a folder that will not be kept."""
    runs.announce(run)
    run.settings = dataclasses.replace(run.settings.with_epochs(1), limit_train_batches=TRIAL_STEPS, time_budget=None)
    run.evaluation_limit = 1
    try:
        temporary = tempfile.TemporaryDirectory()
    except OSError as error:
        raise CheckpointError(f"a trial writes a checkpoint, too: {error.strerror or error}") from None
    with temporary as path:
        try:
            fit(run, RunFolder(Path(path)), quiet)
        except signals.Stop as stop:
            raise signals.Stop(stop.exit_code) from None  # without what there is to go on with
        run.load(checkpoint.load(Path(path))[0])
    print(f"trial: {TRIAL_STEPS} steps, evaluation, checkpoint and resume work; nothing was kept")


def print_profile(run: Run) -> None:
    """A table: milliseconds of each layer, forward and backward, and of the step."""
    runs.announce(run)
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
