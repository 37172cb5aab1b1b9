"""The same run with several seeds: mean and standard deviation."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import statistics
import time
from pathlib import Path
from typing import Any

from minidl import checkpoint, settings, signals
from minidl.atomic_file import write_atomically
from minidl.commands import runs
from minidl.errors import UsageError
from minidl.run import Run
from minidl.run_folder import SEED, RunFolder
from minidl.settings import Settings
from minidl.wording import percents


def train_with_seeds(args: argparse.Namespace, chosen: Settings) -> None:
    """Train with --runs seeds, one after another. What a former call with the same folder has finished is not done again."""
    if args.runs < 2:
        raise UsageError("--runs 1: a standard deviation needs at least 2")
    dataclasses.replace(chosen, seed=chosen.seed + args.runs - 1)  # which must be a seed, too
    if args.output and os.path.exists(os.path.join(args.output, "config.toml")):
        raise UsageError(f"{args.output} is the folder of one run: name another one")
    parent = Path(args.output) if args.output else RunFolder.dated(f"{chosen.arch}-{chosen.dataset}-{args.runs}-runs").path
    last = []
    for seed in range(chosen.seed, chosen.seed + args.runs):
        print(f"seed {seed}")
        try:
            run = train_seed(parent / f"{SEED}{seed}", dataclasses.replace(chosen, seed=seed), args.quiet)
        except signals.Stop as stop:
            raise signals.Stop(stop.exit_code, f"{stop}, or with all seeds: the same command with -o {parent}") from None
        chosen = dataclasses.replace(run.settings, seed=chosen.seed)  # what a time budget came to holds for all
        last.append(run.history[-1])
    results = {name: [float(row[name]) for row in last] for name in ("test_top1", "test_top5", "test_loss")}
    found = {name: _summary(values) for name, values in results.items()}
    write_atomically(parent / "summary.json", lambda file: file.write(json.dumps(found, indent=2).encode() + b"\n"))
    print(f"{args.runs} seeds, mean +- standard deviation: test top-1 {percents(results['test_top1'])}, "
          f"top-5 {percents(results['test_top5'])}")
    print(f"folder: {parent}")


def _summary(values: list[float]) -> dict[str, Any]:
    """Of one number of all seeds, as what JSON can hold: None for what is not finite, such as the loss of a network that has
    diverged since its last step of training was looked at."""
    finite = all(map(math.isfinite, values))
    return {"mean": statistics.mean(values) if finite else None, "std": statistics.stdev(values) if finite else None,
            "values": [value if math.isfinite(value) else None for value in values]}


def train_seed(path: Path, chosen: Settings, quiet: bool) -> Run:
    """Train to the end a run of which there may be a part in the folder `path`, or all."""
    begin = time.perf_counter()
    if any(os.path.exists(path / name) for name in (checkpoint.LAST, checkpoint.PREVIOUS)):
        decided = ("epochs", "milestones", "time_budget") if chosen.time_budget else ()  # long ago
        given = {name: getattr(chosen, name) for name in settings.FIELDS if name not in decided}
        run, folder = runs.reopened(path, *runs.saved_run(path, given, "name another folder with -o"))
        runs.announce(run)
        runs.go_on(run, folder, quiet)
    else:
        run = runs.new_run(chosen)
        runs.announce(run)
        budget = runs.plan(run, begin)
        # A run that was killed before its first checkpoint begins anew.
        folder = RunFolder(path) if os.path.exists(path / "config.toml") else RunFolder.new(path)
        runs.train_new(run, folder, quiet, budget, begin)
    return run
