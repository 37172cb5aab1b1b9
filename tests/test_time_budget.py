"""A time budget becomes a number of epochs: exactly, with a clock that stands still by itself, and about, with a real one."""

import argparse
import json
import math
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from minidl import time_budget
from minidl.commands import runs, train
from minidl.errors import UsageError
from minidl.settings import read_toml, resolve
from models.recipes import recipe

ARCH = "report-resnext3-fixed"
RUN = dict(arch=ARCH, dataset="digits", device="cpu", batch_size=16, limit_train_batches=7)


def new_run(name="fast", **given):
    given = {name: value for name, value in {**RUN, **given}.items() if value is not None}
    return runs.new_run(resolve(given, recipe(name, given["arch"], "digits")))


def call(*arguments):
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    train.main(parser.parse_args(["--device", "cpu", "--dataset", "digits", "--arch", ARCH, *arguments]))


# ---- a clock of our own


class Clock:
    """Moves by what a step and a batch of an evaluation take, and not otherwise."""

    def __init__(self, monkeypatch, run, step, batch, first=0.0):
        self.now, self.steps, self.batches = 1000.0, 0, []

        def take_a_step(batch):
            self.now += step + (first if self.steps == 0 else 0)
            self.steps += 1

        def evaluate(held_out, limit):
            self.now += batch * min(limit, len(held_out.all()))
            self.batches.append(limit)

        monkeypatch.setattr(run.trainer, "step", take_a_step)
        monkeypatch.setattr(run.trainer, "evaluate", evaluate)
        monkeypatch.setattr(time_budget, "time", SimpleNamespace(perf_counter=lambda: self.now))


def test_arithmetic(monkeypatch, capsys):
    """Epochs are what fits into the budget less what has passed, an epoch being its steps and an evaluation."""
    run = new_run()
    clock = Clock(monkeypatch, run, step=0.05, batch=0.02, first=3.0)  # kernels are compiled in the first step
    epochs = time_budget.epochs_within(run, budget=100, spent=10)
    measuring = clock.now - 1000
    epoch = 7 * 0.05 + 23 * 0.02  # 360 test images are 23 batches
    assert epochs == math.floor((100 - 10 - measuring) / epoch) == 102
    assert clock.steps == 2 + 72, "4 % of 90 s, after a warm-up that the compilation has used up"
    assert clock.batches == [1, 23]
    said = capsys.readouterr().out
    assert said == ("time budget 1m40s: 102 epochs of 0.8s, 7 steps of 50.0 ms and evaluation of 0.5s; "
                    f"estimated end after {time_budget.brief(10 + measuring + 102 * epoch)}\n")


def test_most_steps_that_are_measured(monkeypatch):
    run = new_run()
    clock = Clock(monkeypatch, run, step=0.001, batch=0.001)
    assert time_budget.measure(run, 3600) == pytest.approx((0.001, 0.023))
    assert clock.steps == 20 + 100


@pytest.mark.parametrize("budget, steps", [(2, 4 + 12), (10, 16 + 62), (40, 20 + 100), (100, 20 + 100)])
def test_a_small_budget_is_measured_for_a_second_or_a_tenth_of_it(monkeypatch, budget, steps):
    run = new_run()
    clock = Clock(monkeypatch, run, step=0.016, batch=0.001)
    time_budget.measure(run, budget)
    assert clock.steps == steps


def test_images_held_out_are_evaluated_too(monkeypatch):
    run = new_run(val_split=100)
    clock = Clock(monkeypatch, run, step=0.05, batch=0.02)
    assert time_budget.measure(run, 1000) == pytest.approx((0.05, (23 + 7) * 0.02))
    assert clock.batches == [1, 23, 1, 7]


def test_few_steps_of_a_long_epoch_are_enough(monkeypatch):
    run = new_run(limit_train_batches=None)
    clock = Clock(monkeypatch, run, step=4.0, batch=1.5)
    assert time_budget.measure(run, 600) == pytest.approx((4.0, 23 * 1.5))
    assert clock.steps == 2 + 6 and clock.batches == [1, 6], "extrapolated"
    clock.steps = 0
    assert time_budget.measure(run, 60) == pytest.approx((4.0, 23 * 1.5))
    assert clock.steps == 2 + 2 and clock.batches[2:] == [1, 1]


@pytest.mark.parametrize("left, epochs", [(7.01, 1), (13.9, 1), (14.1, 2), (699, 99), (701, 100)])
def test_whole_epochs(monkeypatch, capsys, left, epochs):
    """left: seconds after the measurement, of two steps for the warm-up and two that count."""
    run = new_run()
    Clock(monkeypatch, run, step=1.0, batch=0.0)
    monkeypatch.setattr(time_budget, "STEPS", 2)
    monkeypatch.setattr(time_budget, "WARMUP_STEPS", 2)
    assert time_budget.epochs_within(run, left + 4, spent=0) == epochs
    assert f": {epochs} epoch{'s' if epochs > 1 else ''} of 7.0s, " in capsys.readouterr().out


def test_too_small_a_budget(monkeypatch):
    run = new_run()
    Clock(monkeypatch, run, step=2.0, batch=1.0)
    with pytest.raises(UsageError, match=r"^time_budget 30s: one epoch takes 37s, and 10s have passed$") as caught:
        time_budget.epochs_within(run, 30, spent=0)
    assert caught.value.exit_code == 2


# ---- what it leaves


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_rehearsal_leaves_no_trace(precision):
    """Weights, running statistics, optimizer, average, loss scale and step are what they were, bit for bit, and so is what
    comes after."""
    settings = dict(batch_size=32, limit_train_batches=4, precision=precision, ema=0.9, flip=True, padding=2, mixup=0.2,
                    val_split=50)
    run, other = new_run(**settings), new_run(**settings)
    for it in (run, other):
        it.trainer.epoch(it.batches(0)[:2])  # from somewhere in the middle of an epoch
    before = run.checkpoint()
    scale = float(run.trainer.optimizer.scale[0])
    step, evaluation = time_budget.measure(run, 1.0)
    assert step > 0 and evaluation > 0
    after = run.checkpoint()
    for ours, theirs in ((before.state, after.state), (before.arrays, after.arrays)):
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(array, theirs[name]) for name, array in ours.items())
    assert before.progress == after.progress and float(run.trainer.optimizer.scale[0]) == scale
    for it in (run, other):
        it.trainer.epoch(it.batches(0), first=2)
    assert np.array_equal(run.network.parameters.master, other.network.parameters.master)
    assert run.trainer.read([], 0) == other.trainer.read([], 0), "metrics of the epoch so far"


def fixed_costs(monkeypatch, step, evaluation):
    monkeypatch.setattr(time_budget, "measure", lambda run, budget: (step, evaluation))


def test_the_schedule_is_that_of_the_epochs_found(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    fixed_costs(monkeypatch, 100, 100)  # seconds
    call("--time-budget", "1000s", "--limit-train-batches", "2", "--recipe", "paper", "-o", "it")
    settings = read_toml("it/config.toml")
    assert settings["epochs"] == 3 and settings["milestones"] == [1, 2], "of 147 and 222 in 300"
    assert "time_budget" not in settings, "so that the file gives the same run on any machine"
    output = capsys.readouterr().out.splitlines()
    assert output[1].startswith("time budget 16m40s: 3 epochs of 5m00s, 2 steps of 100000.0 ms and evaluation of 1m40s; ")
    assert any(line.startswith("time budget 16m40s: it took ") for line in output)


def test_seeds_share_the_number_of_epochs(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    fixed_costs(monkeypatch, 100, 100)
    arguments = ["--time-budget", "700s", "--limit-train-batches", "2", "--runs", "2", "-o", "it", "-q"]
    call(*arguments)
    fixed_costs(monkeypatch, 1, 1)  # a machine that is faster now
    arguments[5] = "3"
    call(*arguments)
    assert [read_toml(f"it/seed-{seed}/config.toml")["epochs"] for seed in range(3)] == [2, 2, 2]
    assert capsys.readouterr().out.count("time budget 11m40s: 2 epochs of ") == 1


# ---- a real clock


def test_a_real_run_ends_about_when_it_should(monkeypatch, tmp_path):
    """By the clock of this thread's work, which all but stands still while others have the cores; the bounds are for them.
    Not by that of the process: its other threads spend time while they watch for a task.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # drawing is not training
    monkeypatch.setattr(time, "perf_counter", time.thread_time)
    begin = time.thread_time()
    call("--time-budget", "6s", "--limit-train-batches", "20", "-o", "it")
    took = time.thread_time() - begin
    assert 0.3 * 6 < took < 2 * 6
    rows = (tmp_path / "it" / "metrics.csv").read_text().splitlines()[1:]
    epochs = read_toml("it/config.toml")["epochs"]
    assert len(rows) == epochs
    assert float(rows[-1].split(",")[1]) < 0.05 * 0.0125, "annealed to its end"
    events = [json.loads(line) for line in (tmp_path / "it" / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events if event["event"] != "save"] == ["start", *["epoch"] * epochs, "end"]
