"""Draw loss, accuracy and learning rate of runs, also of runs that are not finished.

The accuracy in the table is that of the last epoch; of several seeds mean and standard deviation, after the last that all of
them have. The best test epoch is not shown: the test set must not choose it.
"""

import argparse
import contextlib
import csv
import glob
import io
import json
import os
import re
from pathlib import Path

from minidl import data, plots
from minidl.commands.arguments import new_file
from minidl.errors import CheckpointError, UsageError
from minidl.run_folder import SEED
from minidl.wording import aligned, percents

PICTURE, LAYERS = "curves.png", "layers.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, or of several seeds")
    parser.add_argument("--inspect", action="store_true",
                        help=f"of one run with --inspect: a map of its layers over the epochs, {LAYERS}")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE",
                        help=f".png, .svg or .pdf; default: {PICTURE}, in the folder of the run if there is one RUN, else here")


def main(args: argparse.Namespace) -> None:
    if args.inspect and len(args.runs) > 1:
        raise UsageError("--inspect is for one run")
    if args.output or len(args.runs) > 1:
        output = new_file(args.output or Path(PICTURE))
    else:
        output = args.runs[0] / (LAYERS if args.inspect else PICTURE)  # made of what the folder says, it may be made again
    plots.check(output)
    if args.inspect:
        plots.layers_over_epochs(*inspected(args.runs[0]), output)
        print(f"picture: {output}")
        return
    runs = [read(folder) for folder in args.runs]
    plots.curves(runs, output)
    print(aligned([("run", "epochs", "test top-1"), *(
        (run.name, str(len(run.means("epoch"))), percents(run.column("test_top1")[:, -1].tolist())) for run in runs)], left=1))
    print(f"picture: {output}")


def read(folder: Path) -> plots.History:
    """What a run, or all seeds of one, recorded so far. Raises CheckpointError with the reason where that cannot be read, or is
    nothing."""
    seeds = [] if os.path.exists(folder / "metrics.csv") else sorted(glob.glob(f"{SEED}*/metrics.csv", root_dir=folder))
    first, *others = [(folder / seed).parent for seed in seeds] or [folder]
    return plots.History(folder.resolve().name, _history(first), _classes(first), [_history(seed) for seed in others])


def _history(folder: Path) -> list[dict[str, str]]:
    """The rows of its metrics.csv. Raises CheckpointError as `read`."""
    path = folder / "metrics.csv"
    try:
        text = path.read_text(encoding="utf-8-sig")
        complete = text[:text.rfind("\n") + 1]  # the last line may be in the making
        history = [_checked(row) for row in csv.DictReader(io.StringIO(complete))]
        if not history:
            raise ValueError("no epoch is complete yet")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, csv.Error) as error:
        raise CheckpointError(f"{path} cannot be read: {str(error)[:200]}") from None
    return history


def inspected(folder: Path) -> tuple[list[int], list[dict[str, dict[str, float]]]]:
    """The epochs that a run was inspected in, and {layer: {statistic: value}} of each. Raises CheckpointError where that cannot be
    read, or is nothing."""
    path, found = folder / "events.jsonl", {}
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # it may be in the making, or cut off by a kill or a full disk
                if '"inspect"' in line and (event := json.loads(line))["event"] == "inspect":
                    found[event["epoch"]] = event["layers"]  # of an epoch that was done twice, the last
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not found:
        raise CheckpointError(f"{path} tells of no layers: train with --inspect")
    return sorted(found), [found[epoch] for epoch in sorted(found)]


def _checked(row: dict[str, str]) -> dict[str, str]:
    """The row of an epoch. Raises ValueError where it is not one."""
    for column in ("epoch", "test_top1"):
        if not row.get(column):
            raise ValueError(f"{column} is missing in {','.join(map(str, row.values()))}")
    for column, value in row.items():
        try:
            float(value or "nan")
        except (ValueError, TypeError):
            raise ValueError(f"{column} is {value!r}, not a number") from None
    if not row["epoch"].isdecimal():
        raise ValueError(f"epoch is {row['epoch']!r}, not a whole number")
    return row


def _classes(folder: Path) -> int | None:
    """How many classes the data of a run has, None where its config.toml does not say so."""
    try:  # one line of it, as older versions may have had other settings
        found = re.search(r'^dataset = "(\w+)"$', (folder / "config.toml").read_text(encoding="utf-8"), re.MULTILINE)
    except (OSError, ValueError):
        return None
    return data.CLASSES.get(found[1]) if found else None
