#!/usr/bin/env python3
"""What an epoch of train.py costs beyond its steps: bar, metrics, events, checkpoints.

    python benchmarks/overhead.py --dataset digits
    python benchmarks/overhead.py --arch simplenet-5m --dataset cifar100 --json out.json

Takes the settings of train.py. An epoch as there, with its bar on a terminal and its files in a temporary folder, and the
bare loop of Trainer.step over the same batches are timed in turn (A B B A ...), each with one batch of evaluation at its
end. "loop" is what the median epoch without its checkpoints takes beyond the median bare loop, "checkpoints" what they took
in all epochs together, both in per cent of the bare loop.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import records
from minidl import command, fit
from minidl.commands import run_settings, runs
from minidl.commands.arguments import positive
from minidl.progress import Progress
from minidl.run_folder import RunFolder
from minidl.saving import Saver


@contextlib.contextmanager
def terminal():
    """Within it stderr is a terminal, which somebody reads, and what is printed goes nowhere."""
    ours, its = os.openpty()

    def read():
        with contextlib.suppress(OSError):  # how Linux reports that the other side is closed
            while os.read(ours, 65536):
                pass

    threading.Thread(target=read, daemon=True).start()
    with os.fdopen(its, "w", encoding="utf-8") as stderr, open(os.devnull, "w", encoding="utf-8") as stdout:
        with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(stdout):
            yield


def measure(run, repeats):
    """-> (seconds of each bare loop, of each epoch without its checkpoints, of all checkpoints)."""
    run.evaluation_limit = 1
    bare, epochs, checkpoints = [], [], []
    with tempfile.TemporaryDirectory() as temporary, terminal():
        folder = RunFolder(Path(temporary))
        progress, saver = Progress(run.settings.epochs, run.val_batches is not None), Saver(run, folder)

        def seconds(work, *arguments):
            run.place.synchronize()
            begin = time.perf_counter()
            work(*arguments)
            run.place.synchronize()
            return time.perf_counter() - begin

        def bare_loop(batches):
            run.network.train()
            for batch in batches:
                run.trainer.step(batch)
            run.validate(), run.test()

        def take_bare(batches):
            bare.append(seconds(bare_loop, batches))
            saver._last += bare[-1]  # checkpoints are in proportion to the time since the last one, which this was not

        def take_epoch(_):
            took = seconds(fit.train_epoch, run, folder, progress, saver)
            events = [json.loads(line) for line in (folder.path / "events.jsonl").read_text().splitlines()]
            checkpoints.append(sum(event["seconds"] for event in events if event["event"] == "save") - sum(checkpoints))
            epochs.append(took - checkpoints[-1])

        for turn in range(repeats + 1):
            batches = run.batches(run.epoch)
            for take in (take_bare, take_epoch) if turn % 2 else (take_epoch, take_bare):
                take(batches)
    return bare[1:], epochs[1:], sum(checkpoints[1:])  # kernels are compiled in the first turn


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    run_settings.add_arguments(parser)
    parser.add_argument("--repeats", type=positive, default=10, metavar="N", help="epochs of each kind; default: 10")
    parser.add_argument("--json", metavar="FILE", help="write the result and the environment there")
    args = parser.parse_args()
    args.epochs = args.repeats + 1  # which the schedule must reach
    run = runs.new_run(run_settings.chosen(args))
    runs.announce(run)
    bare, epochs, checkpoints = measure(run, args.repeats)
    row = {"arch": run.settings.arch, "dataset": run.settings.dataset, "precision": run.settings.precision,
           "batch": run.settings.batch_size, "steps": run.steps_per_epoch, "repeats": args.repeats,
           "bare_seconds": statistics.median(bare), "epoch_seconds": statistics.median(epochs),
           "loop_percent": 100 * (statistics.median(epochs) / statistics.median(bare) - 1),
           "checkpoints_percent": 100 * checkpoints / sum(bare)}
    print(f"{row['steps']} steps, medians of {args.repeats}: bare {row['bare_seconds']:.3f} s, in train.py "
          f"{row['epoch_seconds']:.3f} s | loop {row['loop_percent']:+.2f} %, checkpoints {row['checkpoints_percent']:.2f} %")
    records.Record(args.json, run.place).add(lambda: row)


if __name__ == "__main__":
    sys.exit(command.run(main))
