"""Resuming: a run that was stopped, however, and goes on ends as if it had not been: the same bits, the same metrics."""

import csv
import errno
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from minidl import checkpoint, data, optim, plots, run_folder, signals, weights
from minidl.ops import optimizer
from minidl.run import Run
from minidl.settings import Settings
from small_runs import ARGUMENTS, STEPS, at_step, digests, few_digits, rows, send, small, train  # noqa: F401
from test_train import SECONDS, assert_refused, start
from test_train import train as train_process


# Every optimizer, schedule and precision; average, mixup, smoothing, cutout, dropout of both kinds, clipping, validation.
RUNS = {
    "sgd cosine fp32": "--cutout 6 --flip --padding 2 --warmup-epochs 0.4",
    "adam onecycle tf32": "--optimizer adam --sched onecycle --precision tf32 --ema 0.9 --clip-norm 0.5 --reflect --padding 3",
    "adamw multistep bf16": "--optimizer adamw --sched multistep --milestones 1 2 --restart-at-milestones --precision bf16 "
                            "--mixup 0.4 --label-smoothing 0.1",
    "adadelta constant fp16": "--optimizer adadelta --sched constant --precision fp16 --ema 0.8 --mixup 1 --val-split 8",
    "sgd multistep patience": "--sched multistep --milestones 2 --restart-at-milestones --val-split 8 --patience 2 --epochs 9 "
                              "--lr 1e-9 --no-nesterov --clip-norm 1e-3",
    "simplenet": "-b 2 --arch simplenet-310k --model-kwargs rate=0.2 --optimizer adam --mixup 0.2 --ema 0.5",
    "elements": "-b 2 --arch simplenet-310k --model-kwargs dropout=elements rate=0.1 --cutout 8 --optimizer adamw",
}
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}  # the exit codes
# (where a run is stopped: after which step of the run, counted from 1; which checkpoint, (epoch, step), is then the last)
PLACES = {
    (signal.SIGINT, "middle"): (STEPS + 3, (1, 3)), (signal.SIGINT, "end"): (2 * STEPS, (1, STEPS)),
    (signal.SIGKILL, "middle"): (STEPS + 3, (1, 2)), (signal.SIGKILL, "end"): (2 * STEPS + 1, (2, 0))}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A function that trains one of RUNS, once, and gives its folder."""
    folders = {}

    def folder_of(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("uninterrupted")
            result = train(folders[name], *ARGUMENTS, *RUNS[name].split(), "-o", "it")
            assert (result.returncode, result.stderr) == (0, ""), result
        return folders[name] / "it"

    return folder_of


def assert_same_run(folder, expected):
    assert digests(folder / "last.npz") == digests(expected / "last.npz")
    assert rows(folder) == rows(expected)
    assert (folder / "best.npz").exists() == (expected / "best.npz").exists()
    if (folder / "best.npz").exists():
        assert digests(folder / "best.npz") == digests(expected / "best.npz")


@pytest.mark.parametrize("name, number, place", [
    (name, number, place) for i, name in enumerate(RUNS) for j, number in enumerate(SIGNALS)
    for k, place in enumerate(("middle", "end")) if (i + j + k) % 2])
def test_a_stopped_run_goes_on_exactly(few_digits, uninterrupted, tmp_path, name, number, place):
    if "bf16" in name:
        pytest.importorskip("ml_dtypes")
    step, saved_at = PLACES[signal.SIGKILL if number == signal.SIGKILL else signal.SIGINT, place]
    stopped = train(tmp_path, *ARGUMENTS, *RUNS[name].split(), "-o", "it", "--save-every", 2,
                    before=at_step(step, send(number)))
    assert stopped.returncode == SIGNALS[number], stopped
    progress = checkpoint.load(tmp_path / "it")[0].progress
    assert (progress["epoch"], progress["step"]) == saved_at
    epochs, steps = saved_at
    said = (f"interrupted, and saved after {epochs} epoch{'s' * (epochs != 1)} and {steps} step{'s' * (steps != 1)}; go on with "
            "--resume it")
    assert stopped.stderr == ("" if number == signal.SIGKILL else f"error: {said}\n")
    resumed = train(tmp_path, "--resume", "it")
    assert (resumed.returncode, resumed.stderr) == (0, ""), resumed
    assert_same_run(tmp_path / "it", uninterrupted(name))


def test_the_early_end_for_want_of_patience_is_one(few_digits, uninterrupted):
    assert len(rows(uninterrupted("sgd multistep patience"))) == 3


def test_a_signal_in_an_evaluation(few_digits, uninterrupted, tmp_path):
    """The weights that are evaluated, an average, are not those that training goes on with."""
    def patch():
        test = Run.test

        def interrupted(self):
            Run.test = test
            send(signal.SIGINT)()
            return test(self)

        Run.test = interrupted

    name = "adam onecycle tf32"
    stopped = train(tmp_path, *ARGUMENTS, *RUNS[name].split(), "-o", "it", before=patch)
    assert_refused(stopped, 130, f"interrupted, and saved after 0 epochs and {STEPS} steps")
    assert train(tmp_path, "--resume", "it").returncode == 0
    assert_same_run(tmp_path / "it", uninterrupted(name))


@pytest.mark.parametrize("times, saved", [(1, (0, 4)), (2, (0, 2))])
def test_a_signal_in_a_save(few_digits, uninterrupted, tmp_path, times, saved):
    """The save is finished; a second signal ends the process where it is, and the file before stays."""
    def patch():
        sync, calls = os.fsync, []

        def interrupted(descriptor):
            calls.append(descriptor)
            if len(calls) == 7:  # each file makes two, of itself and of its folder: config.toml, env.json, the first checkpoint
                for _ in range(times):
                    send(signal.SIGINT)()
                    time.sleep(signals.SETTLE_SECONDS)
            sync(descriptor)

        os.fsync = interrupted

    name = "sgd cosine fp32"
    stopped = train(tmp_path, *ARGUMENTS, *RUNS[name].split(), "-o", "it", "--save-every", 2, before=patch)
    assert stopped.returncode == 130
    progress = checkpoint.load(tmp_path / "it")[0].progress
    assert (progress["epoch"], progress["step"]) == saved
    assert train(tmp_path, "--resume", "it").returncode == 0
    assert_same_run(tmp_path / "it", uninterrupted(name))
    assert not list((tmp_path / "it").glob(".*")), "the process that went on has swept what the other left"


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_a_checkpoint_holds_all_that_training_depends_on(place, tmp_path, precision):
    """On each device of this machine, without a process of its own."""
    if precision == "bf16":
        pytest.importorskip("ml_dtypes")
    settings = Settings(arch="small", dataset="digits", batch_size=32, epochs=2, limit_train_batches=6, precision=precision,
                        sched="cosine", lr=0.1, optimizer="adam", beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=1e-4, ema=0.9,
                        mixup=0.3, cutout=5, padding=2, clip_norm=0.1)

    def new_run():
        return Run(settings, small(), *data.load("digits"), place)

    def train_epochs(run, end):
        """Until `end`, (epoch, step)."""
        while (run.epoch, run.step) < end:
            batches = run.batches(run.epoch)[:end[1] if run.epoch == end[0] else None]
            run.trainer.epoch(batches, first=run.step)
            if run.epoch == end[0]:
                run.step = len(batches)
            else:
                run.epoch, run.step, run.history = run.epoch + 1, 0, [*run.history, {}]
        return run

    whole, part = train_epochs(new_run(), (2, 0)).checkpoint(), train_epochs(new_run(), (1, 4))
    checkpoint.save(tmp_path, part.checkpoint())
    resumed = new_run()
    resumed.load(checkpoint.load(tmp_path)[0])
    assert (resumed.epoch, resumed.step) == (1, 4)
    resumed = train_epochs(resumed, (2, 0)).checkpoint()
    for ours, theirs in ((whole.state, resumed.state), (whole.arrays, resumed.arrays)):
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if ours[name].tobytes() != theirs[name].tobytes()] == []


# ---- processes ---------------------------------------------------------------------------------------------------


def events(folder):
    """The names of all that a run has logged, the last line perhaps not whole yet."""
    path = folder / "events.jsonl"
    *lines, _ = path.read_text().split("\n") if path.exists() else [""]
    return [json.loads(line)["event"] for line in lines]


def test_processes_that_are_stopped_at_any_moment_go_on_exactly(tmp_path, monkeypatch):
    """train.py itself, with a team of threads, and signals from outside."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    arguments = ("--device", "cpu", "--dataset", "digits", "--arch", "report-resnext3", "--limit-train-batches", "16",
                 "--epochs", "1", "-b", "16", "--flip", "--cutout", "4")
    assert train_process(tmp_path, *arguments, "-o", "whole").returncode == 0
    for number, code in SIGNALS.items():
        folder = tmp_path / number.name
        with start(tmp_path, *arguments, "-o", folder, "--save-every", "4", stderr=subprocess.DEVNULL) as process:
            while "save" not in events(folder):
                assert process.poll() is None
                time.sleep(0.002)
            process.send_signal(number)
            process.communicate(timeout=SECONDS)
        assert process.returncode == code
        assert checkpoint.load(folder)[0].progress["epoch"] == 0
        resumed = train_process(tmp_path, "--resume", folder)
        assert (resumed.returncode, resumed.stderr) == (0, "")
        assert_same_run(folder, tmp_path / "whole")
        assert events(folder)[-1] == "end"


# ---- other settings ----------------------------------------------------------------------------------------------


@pytest.fixture
def stopped(few_digits, tmp_path):
    """tmp_path/it, of a run that was killed in the last step of its second epoch of three, and saved in the fourth."""
    result = train(tmp_path, *ARGUMENTS, "-o", "it", "--save-every", 2, before=at_step(2 * STEPS, send(signal.SIGKILL)))
    assert result.returncode == -signal.SIGKILL
    return tmp_path / "it"


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("arguments, lines", {
    "--arch small-wide": ["conv.weight: file (4, 3, 3, 3), model (6, 3, 3, 3)", "conv.bias: file (4,), model (6,)",
                          "bn.weight: file (4,), model (6,)", "bn.bias: file (4,), model (6,)",
                          "classifier.weight: file (10, 4), model (10, 6)", "... and 2 more"],
    "--model-kwargs width=5": ["conv.weight: file (4, 3, 3, 3), model (5, 3, 3, 3)", "... and 2 more"],
    "--dataset cifar100": ["classifier.weight: file (10, 4), model (100, 4)", "classifier.bias: file (10,), model (100,)"],
    "--arch report-resnext3": ["stem.conv.weight: missing in the file", "... and "],
}.items())
@pytest.mark.parametrize("override", [(), ("--override",)])
def test_another_network(stopped, arguments, lines, override):
    before = content(stopped)
    result = train(stopped.parent, "--resume", "it", *arguments.split(), *override)
    assert_refused(result, 5, "the weights do not fit this network:\n", *(f"\n{line}" for line in lines))
    assert result.stderr.count("\n") <= 7
    assert content(stopped) == before


def test_another_optimizer(stopped):
    before = content(stopped)
    result = train(stopped.parent, "--resume", "it", "--optimizer", "adam", "--override")
    assert_refused(result, 5, "the checkpoint does not fit these settings, which only a new run can have: first_moment: file "
                              "nothing, run (")
    assert content(stopped) == before


@pytest.mark.parametrize("arguments, said", {
    "--lr 0.5": "lr: the run has 0.00625, given is 0.5", "-b 16": "batch_size: the run has 8, given is 16",
    "--epochs 4": "epochs: the run has 3, given is 4", "--optimizer adam": "optimizer: the run has 'sgd', given is 'adam'",
    "--arch small-twin": "arch: the run has 'small', given is 'small-twin'",  # whose shapes are the same
    "--dataset cifar10": "dataset: the run has 'digits', given is 'cifar10'",
    "--cutout 3 --seed 1": "seed: the run has 0, given is 1\ncutout: the run has 0, given is 3"}.items())
def test_other_settings_need_a_word(stopped, arguments, said):
    before = content(stopped)
    result = train(stopped.parent, "--resume", "it", *arguments.split())
    assert_refused(result, 2, said, "--override goes on with what is given")
    assert content(stopped) == before and result.stdout == ""


@pytest.mark.parametrize("arguments, recorded", {
    "--lr 0.5": "lr = 0.5", "-b 16": "batch_size = 16", "--epochs 5": "epochs = 5", "--dataset cifar10": 'dataset = "cifar10"',
    "--arch small-twin": 'arch = "small-twin"', "--val-split 8": "val_split = 8"}.items())
def test_other_settings_with_that_word(stopped, arguments, recorded):
    """Batches of 16 make three steps an epoch, of which there are four already."""
    result = train(stopped.parent, "--resume", "it", *arguments.split(), "--override", "--quiet")
    leak = "warning: of the images that are held out now, some were trained on: what is measured on them is too good\n"
    assert (result.returncode, result.stderr) == (0, leak if "val" in arguments else "")
    assert len(rows(stopped)) == (5 if "epochs" in arguments else 3)
    assert (float(rows(stopped)[1]["lr"]) > 0.00625) == ("lr" in arguments), "which is what all others have"
    assert recorded in (stopped / "config.toml").read_text().splitlines()
    with (stopped / "metrics.csv").open(newline="") as file:
        assert all(float(row["images_per_second"]) >= 0 for row in csv.DictReader(file))
    again = train(stopped.parent, "--resume", "it")
    assert again.returncode == 0 and "it is finished" in again.stdout, "what was given once holds from then on"


def test_epochs_with_and_without_a_validation(stopped):
    """The table of all has the columns of both, whichever way a run is gone on with."""
    assert train(stopped.parent, "--resume", "it", "--val-split", "8", "--override", "--epochs", "4").returncode == 0
    assert train(stopped.parent, "--resume", "it", "--val-split", "0", "--override", "--epochs", "5").returncode == 0
    with (stopped / "metrics.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [bool(row["val_top1"]) for row in table] == [False, True, True, True, False]
    assert all(row["test_top1"] and None not in row for row in table)


def test_float16_begins_with_its_loss_scale(stopped):
    """A run in float32 has none."""
    result = train(stopped.parent, "--resume", "it", "--precision", "fp16", "--override", "--epochs", "4")
    assert result.returncode == 0, result.stderr
    state = checkpoint.load(stopped)[0].arrays["state"]
    assert state[optimizer.SCALE] == optim.Optimizer.INITIAL_SCALE
    steps_since = 1 + 2 * STEPS  # the last of the second epoch, and two more
    assert state[optimizer.GOOD_STEPS] == steps_since


@pytest.mark.parametrize("arguments, file", [((), "metrics.csv"), (("--save-every", "3"), "config.toml")])
def test_a_folder_that_takes_nothing_is_told_before_the_training(stopped, arguments, file):
    before = content(stopped)

    def full_disk():
        def fsync(descriptor):
            raise OSError(errno.ENOSPC, "No space left on device")

        os.fsync = fsync

    result = train(stopped.parent, "--resume", "it", *arguments, before=full_disk)
    assert_refused(result, 5, f"{file} cannot be written: No space left on device")
    assert content(stopped) == before


def test_a_time_budget_in_a_file_has_decided_long_ago(stopped):
    file = stopped.parent / "settings.toml"
    file.write_text('arch = "small"\ntime_budget = "20s"\n')
    assert train(stopped.parent, "--resume", "it", "--config", file).returncode == 0
    lines = (stopped / "config.toml").read_text().splitlines()
    assert "epochs = 3" in lines and not any(line.startswith("time_budget") for line in lines)


def test_hyperparameters_of_another_optimizer(stopped):
    before = content(stopped)
    assert_refused(train(stopped.parent, "--resume", "it", "--beta1", "0.5", "--override"), 2,
                   "beta1 is not a setting of the optimizer sgd")
    assert content(stopped) == before


def test_the_same_settings_and_those_of_no_consequence_need_no_word(stopped):
    result = train(stopped.parent, "--resume", "it", *"--epochs 3 --optimizer sgd --save-every 1 --arch small".split())
    assert (result.returncode, result.stderr) == (0, "")


def test_another_machine_is_told_and_recorded(stopped):
    environment = json.loads((stopped / "env.json").read_text())
    changed = {**environment, "hardware": "CPU, 64 threads", "command": ["another"]}
    (stopped / "env.json").write_text(json.dumps(changed))
    result = train(stopped.parent, "--resume", "it")
    assert (result.returncode, result.stderr) == (0, "warning: the run will not be, bit for bit, what it would have been without the "
                                                     f"stop: it had hardware 'CPU, 64 threads', now {environment['hardware']!r}\n")
    events = [json.loads(line) for line in (stopped / "events.jsonl").read_text().splitlines()]
    (resumed,) = [event for event in events if event["event"] == "resume"]
    assert resumed["environment"]["hardware"] == environment["hardware"]
    assert json.loads((stopped / "env.json").read_text()) == changed, "that is where the run began"


@pytest.mark.parametrize("text", ["", "[]", "{}", "no JSON"])
def test_a_record_of_the_machine_that_is_none(stopped, text):
    (stopped / "env.json").write_text(text)
    result = train(stopped.parent, "--resume", "it")
    assert (result.returncode, result.stderr) == (0, "")


def test_a_finished_run_says_so(stopped):
    assert train(stopped.parent, "--resume", "it").returncode == 0
    before = content(stopped)
    result = train(stopped.parent, "--resume", "it")
    assert (result.returncode, result.stderr) == (0, "")
    assert "it is finished: 3 epochs of 3, test top-1 " in result.stdout
    other = train(stopped.parent, "--resume", "it", "--lr", "0.5", "--override")
    assert other.returncode == 0 and content(stopped) == before, "it says how it was trained"
    more = train(stopped.parent, "--resume", "it", "--epochs", 4, "--override")
    assert more.returncode == 0 and len(rows(stopped)) == 4


def test_curves_that_a_run_was_killed_before(stopped):
    def draw(call):
        return lambda: setattr(plots, "curves", lambda runs, path: call(path))

    assert train(stopped.parent, "--resume", "it", before=draw(send(signal.SIGKILL))).returncode == -signal.SIGKILL
    assert not (stopped / "curves.png").exists()
    result = train(stopped.parent, "--resume", "it", before=draw(Path.touch))
    assert "it is finished: 3 epochs of 3" in result.stdout and (stopped / "curves.png").exists()


@pytest.mark.parametrize("name", ["last.npz", "last.previous.npz"])
def test_a_file_in_place_of_the_folder(stopped, name):
    result = train(stopped.parent, "--resume", stopped / name)
    assert (result.returncode, result.stderr) == (0, "")
    whole = train(stopped.parent, *ARGUMENTS, "-o", "whole")
    assert whole.returncode == 0
    assert_same_run(stopped, stopped.parent / "whole")


def test_a_copy_beside_another_run_is_not_gone_on_with(stopped):
    (stopped / "last.npz").rename(stopped / "epoch-1.npz")
    assert train(stopped.parent, "--resume", "it/epoch-1.npz").returncode == 0, "nothing is lost where there is no other"
    before = content(stopped)
    assert_refused(train(stopped.parent, "--resume", "it/epoch-1.npz"), 2,
                   "the run of it/epoch-1.npz would go on in its folder, whose last.npz would be lost")
    assert content(stopped) == before


def test_weights_alone_are_not_enough(few_digits, tmp_path):
    assert train(tmp_path, *ARGUMENTS, "--val-split", 8, "-o", "it").returncode == 0
    before = content(tmp_path / "it")
    assert_refused(train(tmp_path, "--resume", "it/best.npz"), 5, "it/best.npz holds weights only: a run cannot go on from it")
    assert content(tmp_path / "it") == before
    state, about = weights.load(tmp_path / "it" / "best.npz")
    assert about["arch"] == "small" and "conv.weight" in state


def test_what_cannot_be_resumed(few_digits, tmp_path):
    (tmp_path / "empty").mkdir()
    assert_refused(train(tmp_path, "--resume", "empty"), 5, "empty holds no checkpoint, last.npz or last.previous.npz")
    assert_refused(train(tmp_path, "--resume", "nowhere"), 5, "nowhere cannot be read: No such file or directory")
    assert_refused(train(tmp_path, "--resume", "x" * 300), 5, "x cannot be read: File name too long")
    assert_refused(train(tmp_path, "--resume"), 2, "there is no run in the folder runs: name one, --resume FOLDER")
    for arguments in ("-o new", "--runs 2", "--fast-dev-run", "--profile", "--print-config", "--time-budget 1h"):
        assert_refused(train(tmp_path, "--resume", "empty", *arguments.split()), 2, " does not go with --resume")


def test_the_newest_run(few_digits, tmp_path):
    """Of any network or of one, whose name may be how another's begins."""
    for arch in ("small", "small-twin"):
        result = train(tmp_path, *ARGUMENTS, "--arch", arch, before=at_step(STEPS, send(signal.SIGINT)))
        assert result.returncode == 130
    ours, twin = sorted((tmp_path / "runs").iterdir())
    assert train(tmp_path, "--resume").stdout.endswith(f"run folder: runs/{twin.name}\n")
    assert train(tmp_path, "--resume", "--arch", "small").stdout.endswith(f"run folder: runs/{ours.name}\n")
    assert_refused(train(tmp_path, "--resume", "--arch", "small-wide"), 2, "there is no run of small-wide in the folder runs")
    assert_same_run(ours, twin)


def test_seconds_of_work_add_up(few_digits, tmp_path):
    """What a run did before it was stopped counts."""
    def slow_and_stopped():
        at_step(1, lambda *_: time.sleep(1))()
        at_step(STEPS + 2, send(signal.SIGINT))()

    train(tmp_path, *ARGUMENTS, "-o", "it", before=slow_and_stopped)
    before = checkpoint.load(tmp_path / "it")[0].progress["seconds"]
    assert train(tmp_path, "--resume", "it").returncode == 0
    after = checkpoint.load(tmp_path / "it")[0].progress["seconds"]
    end = json.loads((tmp_path / "it" / "events.jsonl").read_text().splitlines()[-1])
    assert 1 < before < after == pytest.approx(end["total_seconds"], abs=0.01)


def test_images_per_second_are_of_the_steps_that_were_done(stopped):
    assert train(stopped.parent, "--resume", "it", before=at_step(2 * STEPS, lambda *_: time.sleep(0.5))).returncode == 0
    with (stopped / "metrics.csv").open(newline="") as file:
        row = [*csv.DictReader(file)][1]
    assert float(row["images_per_second"]) <= 8 / 0.5, "one step of 8 images in half a second"


def test_what_was_exported_of_an_older_run_does_not_make_it_the_newest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        path = tmp_path / "runs" / f"small-digits-{number}" / "last.npz"
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (number, number))
        os.utime(path.parent, (3 - number, 3 - number))
    assert run_folder.newest() == Path("runs", "small-digits-2")


@pytest.mark.parametrize("first, then, said", [
    ("0.9", "0", "average/buffers: file (128,), run nothing"),
    ("0", "0.9", "average/buffers: file nothing, run (128,)")])
def test_an_average_that_there_was_not(few_digits, tmp_path, first, then, said):
    assert train(tmp_path, *ARGUMENTS, "--ema", first, "-o", "it", before=at_step(2, send(signal.SIGINT))).returncode == 130
    assert_refused(train(tmp_path, "--resume", "it", "--ema", then, "--override"), 5,
                   f"does not fit these settings, which only a new run can have: {said}")
