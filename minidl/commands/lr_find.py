"""Find a learning rate: train with one that grows from step to step, and look where the loss is lowest.

    minidl lr-find --arch wrn-28-4 --optimizer adamw

Takes the settings of `minidl train`, of which the learning rate and its schedule do not matter. The suggestion is a tenth
of the rate at which the smoothed loss is lowest. Nothing of the training is kept.

This range test is of L. N. Smith, arXiv 1506.01186. Rates that grow by a factor, the smoothing, the end and the tenth are
those of fastai, whose name for this suggestion is "minimum".
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from minidl import plots
from minidl.commands import run_settings, runs
from minidl.commands.arguments import new_file, positive
from minidl.errors import DivergedError, UsageError
from minidl.memory import ample_memory
from minidl.run import Run
from minidl.wording import aligned

LOWEST, HIGHEST = 1e-6, 10.0
STEPS, FEWEST_STEPS = 100, 10
SMOOTHING = 0.98
MOST = 4.0   # times its lowest value: a smoothed loss beyond ends the search
LISTED = 12  # rows of the table
PICTURE = "lr-find.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    run_settings.add_arguments(parser)
    parser.add_argument("--steps", type=positive, default=STEPS, metavar="N",
                        help=f"in which the rate grows from {LOWEST:g} to {HIGHEST:g}; default: {STEPS}")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help=f"picture, .png, .svg or .pdf; default: {PICTURE}")
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(args: argparse.Namespace) -> None:
    if args.steps < FEWEST_STEPS:
        raise UsageError(f"--steps is {args.steps}: a curve needs at least {FEWEST_STEPS}")
    picture = picture_path(args.output)
    run = runs.new_run(run_settings.chosen(args))
    if not args.json:
        runs.announce(run)
    with ample_memory(run):
        curve = search(run, args.steps)
    if args.json:
        s = run.settings
        print(json.dumps({"arch": s.arch, "dataset": s.dataset, "optimizer": s.optimizer, "batch_size": s.batch_size,
                          **dataclasses.asdict(curve), "suggestion": curve.suggestion, "picture": picture and str(picture)}))
    else:
        print(curve.as_text())
    if picture:
        plots.lr_find(curve.rates, curve.losses, curve.smoothed, curve.suggestion, picture)
        if not args.json:
            print(f"picture: {picture}")


def picture_path(output: Path | None) -> Path | None:
    """Where to draw: `output`, or by default PICTURE, or nowhere if nobody asked and there is nothing to draw with."""
    path = new_file(output or Path(PICTURE))
    try:
        plots.check(path)
    except UsageError as error:
        if output:
            raise
        print(f"no picture: {error}", file=sys.stderr)
        return None
    return path


@dataclass(frozen=True)
class Curve:
    """rates: of the steps, growing; losses: of their batches, each before its step changed the weights; smoothed: their
    exponential averages, without the bias to 0 in the beginning; end: why there are no more, in words."""

    rates: list[float]
    losses: list[float]
    smoothed: list[float]
    end: str

    @property
    def suggestion(self) -> float | None:
        """A tenth of the rate at which the smoothed loss is lowest, None where that does not fall.

        The first tenth of the steps is left out, as by fastai: averages of few losses are low by chance.
        """
        first = len(self.rates) // 10
        lowest = first + int(np.argmin(self.smoothed[first:]))
        return self.rates[lowest] / 10 if lowest > first else None

    def as_text(self) -> str:
        """For people: rows of the curve, the first and the last among them, and the suggestion as an argument of `train`."""
        count = len(self.rates)
        rows = [("lr", "loss", "smoothed")]
        for index in np.unique(np.linspace(0, count - 1, LISTED).round().astype(int)):
            rows.append((f"{self.rates[index]:.2g}", f"{self.losses[index]:.3f}", f"{self.smoothed[index]:.3f}"))
        if self.suggestion is None:
            advice = "no suggestion: the smoothed loss does not fall"
        else:
            lowest = "still falls" if min(self.smoothed) == self.smoothed[-1] else "is lowest"
            advice = f"the smoothed loss {lowest} at {10 * self.suggestion:.2g}; a tenth of that:\n--lr {self.suggestion:.2g}"
        return f"{aligned(rows, left=0)}\n{count} steps, then {self.end}\n{advice}"


def search(run: Run, steps: int) -> Curve:
    """Train a run for at most `steps` steps, with rates from LOWEST to HIGHEST. It stands where it stood before.

    Raises DivergedError where not even the first loss is finite.
    """
    batches = itertools.chain.from_iterable(map(run.batches, itertools.count()))  # of one epoch after the other
    losses: list[float] = []
    smoothed: list[float] = []
    average, end = 0.0, "the highest rate was reached"
    rates = np.geomspace(LOWEST, HIGHEST, steps).tolist()
    with run.rehearsal():
        for rate in tqdm(rates, unit="step", disable=None, leave=False, dynamic_ncols=True):
            try:
                loss = run.trainer.epoch([dataclasses.replace(next(batches), lr=rate)]).loss
            except DivergedError:
                if not losses:
                    raise
                end = "the numbers were not finite any more"
                break
            losses.append(loss)
            average = SMOOTHING * average + (1 - SMOOTHING) * loss
            smoothed.append(average / (1 - SMOOTHING**len(losses)))
            if smoothed[-1] > MOST * min(smoothed):
                end = f"the smoothed loss was more than {MOST:g} times its lowest"
                break
    return Curve(rates[:len(losses)], losses, smoothed, end)
