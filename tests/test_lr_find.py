"""lr-find: its curve against definitions, the run that it leaves as it was, and the command as users run it."""

import dataclasses
import json
import signal
import sys
from argparse import ArgumentParser

import numpy as np
import pytest

import models
from minidl.commands import lr_find, run_settings, runs
from minidl.commands.lr_find import Curve, search
from minidl.errors import DivergedError
from minidl.layers import BatchNorm2d, Conv2d, GlobalAvgPool2d, Linear, Sequential
from models import recipes
from models.architecture import Architecture
from small_runs import at_step, few_digits, forked, send  # noqa: F401
from test_train import assert_refused


def parsed(*arguments):
    parser = ArgumentParser()
    lr_find.add_arguments(parser)
    return parser.parse_args(["--device", "cpu", "--dataset", "digits", "--arch", "small", "-b", "8", *map(str, arguments)])


def new_run(*arguments):
    return runs.new_run(run_settings.chosen(parsed(*arguments)))


def command(folder, *arguments, before=lambda: None):
    """Run `minidl lr-find *arguments` in `folder`, in a process that calls before() first -> its end."""
    def work():
        before()
        return lr_find.main(parsed(*arguments))

    return forked(folder, work)


def everything(run):
    """Copies of all that training goes on from."""
    checkpoint = run.checkpoint()
    return {**checkpoint.state, **checkpoint.arrays, "data": np.array(run.place.to_host(run.network.parameters.data))}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, array in one.items():
        assert array.dtype == other[name].dtype and array.tobytes() == other[name].tobytes(), name


def after_each_step(run, call):
    """Have call(number of the step, parameters) called after each step of the run."""
    step = run.trainer.step

    def observed(batch):
        step(batch)
        call(int(run.network.step[0]), run.network.parameters)

    run.trainer.step = observed


def quick(classes=10):
    """A network that learns the digits in few and fast steps."""
    return Sequential(conv=Conv2d(3, 16, 3, stride=4, padding=1), bn=BatchNorm2d(16, relu=True), whole=Conv2d(16, 32, 8),
                      bn2=BatchNorm2d(32, relu=True), mean=GlobalAvgPool2d(), classifier=Linear(32, classes))


@pytest.fixture
def quick_run(monkeypatch):
    """A function of more arguments that gives a run of `quick` on all digits."""
    monkeypatch.setitem(models.REGISTRY, "quick", Architecture(quick, {}, "-", "-"))
    monkeypatch.setitem(recipes.FAMILIES, quick, "report-resnext")
    return lambda *arguments: new_run("--arch", "quick", "-b", 32, *arguments)


# ---- the curve ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("few_digits")
def test_losses_are_those_of_training_with_growing_rates():
    """Steps by hand, on the batches of one epoch after another; each loss is that of a batch before its step."""
    curve = search(new_run("--optimizer", "adam"), steps=20)
    run, total, losses = new_run("--optimizer", "adam"), 0.0, []
    per_epoch = run.steps_per_epoch
    assert per_epoch < len(curve.losses), "it goes on into the next epoch"
    run.network.train()
    for number, rate in enumerate(np.logspace(-6, 1, 20)[:len(curve.losses)]):
        batch = run.batches(number // per_epoch)[number % per_epoch]
        run.trainer.step(dataclasses.replace(batch, lr=float(rate)))
        losses.append(float(run.trainer._totals[0]) / 8 - total)
        total += losses[-1]
    np.testing.assert_allclose(curve.losses, losses, rtol=1e-9)
    np.testing.assert_allclose(curve.rates, np.logspace(-6, 1, 20)[:len(losses)], rtol=1e-12)


@pytest.mark.usefixtures("few_digits")
def test_smoothing_weighs_a_loss_by_its_age():
    curve = search(new_run(), steps=30)
    for count, smoothed in enumerate(curve.smoothed, 1):
        weights = 0.98 ** np.arange(count)[::-1]
        assert smoothed == pytest.approx(np.average(curve.losses[:count], weights=weights), rel=1e-9)


def test_the_search_ends_where_the_smoothed_loss_is_four_times_its_lowest(quick_run):
    # With other seeds it comes just before the last step, or not: at such rates the last bit of a sum decides.
    curve = search(quick_run("--optimizer", "adam", "--seed", 2), steps=200)
    assert len(curve.rates) == len(curve.losses) == len(curve.smoothed) < 200
    assert curve.smoothed[-1] > 4 * min(curve.smoothed) and max(curve.smoothed[:-1]) <= 4 * min(curve.smoothed)
    assert "4 times" in curve.end


@pytest.mark.usefixtures("few_digits")
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_step_that_fails_ends_the_search(value):
    run = new_run()
    before = everything(run)

    def plant(step, parameters):
        if step == 12:
            parameters.master[0] = value

    after_each_step(run, plant)
    curve = search(run, steps=50)
    assert len(curve.rates) == len(curve.losses) == 12
    assert np.isfinite(curve.losses).all() and "not finite" in curve.end
    assert_same(before, everything(run))  # the failure is forgotten too


@pytest.mark.usefixtures("few_digits")
def test_a_network_that_fails_from_the_start_is_an_error():
    run = new_run()
    run.network.parameters.master[0] = np.nan
    with pytest.raises(DivergedError, match="step 1: layer conv, its output is not finite"):
        search(run, steps=50)


@pytest.mark.parametrize("smoothed, suggestion", [
    ([3, 2, 1, 9], 0.1), ([3, 2, 2, 9], 0.01), ([3, 2, 1, 0], 1), ([1, 2, 3, 4], None)])
def test_suggestion_is_a_tenth_of_the_rate_at_the_minimum(smoothed, suggestion):
    curve = Curve([0.01, 0.1, 1, 10], smoothed, smoothed, "the end")
    assert curve.suggestion == (suggestion and pytest.approx(suggestion))
    *_, reason, last = curve.as_text().splitlines()
    assert last == (f"--lr {suggestion:g}" if suggestion else "no suggestion: the smoothed loss does not fall")
    assert ("still falls" in reason) == (suggestion == 1)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_suggestion_trains_better_than_a_hundredth_and_a_hundredfold(quick_run, optimizer):
    suggestion = search(quick_run("--optimizer", optimizer), steps=100).suggestion

    def loss(rate):
        run = quick_run("--optimizer", optimizer, "--lr", rate, "--epochs", 1)
        return run.trainer.epoch(run.batches(0)).loss

    assert loss(suggestion) < min(loss(suggestion / 100), loss(suggestion * 100))


# ---- the run -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("few_digits")
@pytest.mark.parametrize("options", [
    ["--optimizer", "sgd", "--ema", "0.9"], ["--optimizer", "adam", "--precision", "bf16", "--clip-norm", "1"],
    ["--optimizer", "adamw", "--precision", "fp16", "--mixup", "0.2"],
    ["--optimizer", "adadelta", "--precision", "tf32"]], ids=str)
def test_the_run_is_left_as_it_was_bit_for_bit(options):
    if "bf16" in options:
        pytest.importorskip("ml_dtypes")
    run = new_run(*options)
    run.trainer.epoch(run.batches(0))  # so that there are moments, statistics and an average to lose
    before, weights = everything(run), run.network.parameters.master.copy()
    changed = []
    after_each_step(run, lambda step, parameters: changed.append(not np.array_equal(parameters.master, weights)))
    search(run, steps=40)
    assert len(changed) > 10 and changed[-1]
    assert_same(before, everything(run))


# ---- the command -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("few_digits")
def test_command_without_matplotlib(tmp_path):
    result = command(tmp_path)
    assert (result.returncode, result.stderr) == (
        0, 'no picture: the package matplotlib is needed: `pip install "minidl[plot]"`\n')
    first, head, *rows, end, lowest, advice = result.stdout.splitlines()
    curve = search(new_run(), steps=100)
    assert first.startswith("CPU, ") and head.split() == ["lr", "loss", "smoothed"] and len(rows) == 12
    assert rows[0].split() == ["1e-06", f"{curve.losses[0]:.3f}", f"{curve.smoothed[0]:.3f}"]
    assert rows[-1].split() == [f"{curve.rates[-1]:.2g}", f"{curve.losses[-1]:.3f}", f"{curve.smoothed[-1]:.3f}"]
    assert end == f"{len(curve.rates)} steps, then {curve.end}"
    assert lowest.startswith("the smoothed loss ") and lowest.endswith(f" {10 * curve.suggestion:.2g}; a tenth of that:")
    assert advice == f"--lr {curve.suggestion:.2g}"


@pytest.mark.usefixtures("few_digits")
def test_command_for_programs(tmp_path):
    curve = search(new_run(), steps=30)
    assert json.loads(command(tmp_path, "--json", "--steps", "30").stdout) == {
        "arch": "small", "dataset": "digits", "optimizer": "sgd", "batch_size": 8, "rates": curve.rates, "losses": curve.losses,
        "smoothed": curve.smoothed, "end": curve.end, "suggestion": curve.suggestion, "picture": None}


@pytest.fixture
def matplotlib():
    return pytest.importorskip("matplotlib")


def test_command_draws_and_overwrites_nothing(matplotlib, few_digits, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "matplotlib", matplotlib)  # in its place few_digits says that there is none
    result = command(tmp_path, "--steps", "20")
    assert result.returncode == 0 and result.stderr == ""
    assert result.stdout.endswith("\npicture: lr-find.png\n")
    picture = (tmp_path / "lr-find.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert_refused(command(tmp_path, "--steps", "20"), 2, "lr-find.png exists: name another with -o")
    assert (tmp_path / "lr-find.png").read_bytes() == picture


@pytest.mark.usefixtures("few_digits")
def test_ctrl_c(tmp_path):
    result = command(tmp_path, before=at_step(5, send(signal.SIGINT)))
    assert_refused(result, 130, "interrupted")
    assert not any(path.suffix == ".png" for path in tmp_path.iterdir())


@pytest.mark.usefixtures("few_digits")
@pytest.mark.parametrize("arguments, message", [
    (["--steps", "9"], "--steps is 9: a curve needs at least 10"),
    (["-o", "curve.txt"], "curve.txt: a picture is one of .png"),
    (["-o", "curve.png"], 'the package matplotlib is needed: `pip install "minidl[plot]"`'),
    (["-o", "."], ". exists: name another with -o"),
    (["--ranks", "2"], "ranks 2: only training itself is shared"),
    (["--optimizer", "adam", "--momentum", "0.5"], "momentum is not a setting of the optimizer adam"),
    (["-b", "64"], "batch_size 64 is more than the 48 training images"),
])
def test_refused(tmp_path, arguments, message):
    result = command(tmp_path, *arguments)
    assert_refused(result, 2, message)
    assert result.stdout == ""
