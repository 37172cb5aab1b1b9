"""A run, trained in its folder from where it stands to its end."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

from minidl import checkpoint, inspection, run_folder, signals
from minidl.errors import CheckpointError
from minidl.memory import ample_memory
from minidl.progress import Progress
from minidl.run import Run
from minidl.run_folder import RunFolder
from minidl.saving import Saver
from minidl.training import Metrics
from minidl.wording import aligned, percent


def fit(run: Run, folder: RunFolder, quiet: bool = False) -> None:
    """Train from where the run stands to its end, write what a run writes, and print what came of it.

    quiet: no bar, and no line per epoch. Raises what ends it early: Stop, when where it stands is saved; DivergedError and
    DeviceError, the last checkpoint being from before; and CheckpointError before the first step where the folder takes
    nothing, or at the end where a checkpoint could not be written.
    """
    environment = run_folder.environment(run.place)
    if run.epoch == run.step == 0:
        folder.write_settings(run.settings.as_toml(), environment)
        folder.log("start", settings=run.settings.as_dict())
    else:
        folder.write_metrics(run.history)  # of what was done after the checkpoint nothing is left
        folder.compare(environment)
        folder.log("resume", epoch=run.epoch, step=run.step, settings=run.settings.as_dict(), environment=environment)
    if run.settings.tensorboard:
        folder.start_tensorboard()
    progress = Progress(run.settings.epochs, run.val_batches is not None, quiet)
    saver = Saver(run, folder)
    run.trainer.inspects = run.settings.inspect
    try:
        with ample_memory(run):
            while not run.finished:
                train_epoch(run, folder, progress, saver)
        saver.save()
        _conclude(run, folder)
    except signals.Stop as stop:
        saver.save()
        run.team.of_first(0.0)  # no rank ends before the first has saved: `launch` ends those that are left
        if run.team.rank > 0:
            raise signals.Stop(stop.exit_code, "") from None
        folder.log("stop", epoch=run.epoch, step=run.step, exit_code=stop.exit_code)
        where = f"after {run.position()}"
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
        print(_statistics_table(run.trainer.statistics))


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
                saver.after_step(batches)

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
    folder.log("epoch", **_numbers(row))
    progress.row(row)
    if run.trainer.statistics:
        layers = {name: _numbers(values) for name, values in run.trainer.statistics.items()}
        folder.log("inspect", epoch=run.epoch, layers=layers)


def _numbers(row: Mapping[str, str | float]) -> dict[str, float | None]:
    """A row of metrics.csv, or statistics, as what JSON can hold: whole and other numbers, None for what is not finite."""
    values = {column: float(value) for column, value in row.items()}
    return {column: None if not math.isfinite(value) else int(value) if column == "epoch" else value
            for column, value in values.items()}


def _conclude(run: Run, folder: RunFolder) -> None:
    """The result: of the last epoch, on the test set. Raises CheckpointError where a checkpoint is missing."""
    last = run.history[-1]
    folder.log("end", **_numbers(last), total_seconds=round(run.seconds, 2))
    stopped = f" of {run.settings.epochs}, no better in {run.settings.patience}" if run.epoch < run.settings.epochs else ""
    print(f"after epoch {last['epoch']}{stopped}: test top-1 {percent(last['test_top1'])}, top-5 {percent(last['test_top5'])}, "
          f"loss {float(last['test_loss']):.3f}")
    if run.best:
        best = run.history[run.best[0] - 1]
        print(f"best on validation ({percent(run.best[1])}), epoch {run.best[0]}: test top-1 {percent(best['test_top1'])}, "
              f"top-5 {percent(best['test_top5'])}")
    folder.draw_curves(run.history, len(run.train_set.classes))
    for reason in (folder.troubles.get(checkpoint.LAST), run.best_lost):
        if reason:
            raise CheckpointError(f"the run is at its end, but {reason}")


def _statistics_table(layers: dict[str, dict[str, float]]) -> str:
    """Of --inspect: a line per layer."""
    head = ("layer", "mean", "std", "zeros", "gradient", "weight", "dweight", "update")
    rows = [(name, *(f"{row[key]:.1e}" if key in row and key != "output_zeros" else percent(row[key]) if key in row else "-"
                     for key in inspection.STATISTICS)) for name, row in layers.items()]
    return aligned([head, *rows], left=1)
