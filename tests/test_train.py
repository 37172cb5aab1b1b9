"""train.py as its users run it: a process of its own, in a folder of their own, and whatever they may do to it."""

import argparse
import csv
import fcntl
import importlib.util
import json
import os
import platform
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import models
from conftest import CUPY
from minidl import data, device, host_build, run_folder
from minidl.commands import train as command
from minidl.data.batches import Batches
from minidl.errors import UsageError
from minidl.settings import tomllib
from minidl.training import evaluate

TRAIN = Path(__file__).parent.parent / "train.py"
DIGITS = ("--device", "cpu", "--dataset", "digits", "--limit-train-batches", "2")
COLUMNS = ["epoch", "lr", "train_loss", "train_top1", "test_loss", "test_top1", "test_top5", "images_per_second", "seconds"]
SECONDS = 120  # that no run here needs, on the busiest machine


def environment(**changes):
    """This process's, with the kernels that it has built already, without data; a value of None removes a variable."""
    variables = {**os.environ, "MINIDL_CACHE": str(host_build.cache_folder().parent), "MINIDL_DATA": None, **changes}
    return {name: str(value) for name, value in variables.items() if value is not None}


@contextmanager
def ctrl_c():
    """Who ignores Ctrl-C or SIGHUP, as what runs in the background does, has children that ignore it."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Started(subprocess.Popen):
    """A process that Ctrl-C ends, and for which no test waits that has failed."""

    def __init__(self, command, **settings):
        with ctrl_c():
            super().__init__(command, encoding="utf-8", **settings)

    def __exit__(self, error, *traceback):
        if error:
            self.kill()
        super().__exit__(error, *traceback)


def python(folder, *arguments, stdout=subprocess.PIPE, **changes):
    """Run `python *arguments` in `folder` and wait for it."""
    with ctrl_c():
        return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment(**changes), stdout=stdout,
                              stderr=subprocess.PIPE, timeout=SECONDS, encoding="utf-8")


def train(folder, *arguments, **settings):
    """Run `python train.py *arguments` in `folder` and wait for it."""
    return python(folder, TRAIN, *arguments, **settings)


def start(folder, *arguments, **settings):
    """Start `python train.py *arguments` in `folder`."""
    return Started([sys.executable, TRAIN, *arguments], cwd=folder, env=environment(), stdout=subprocess.PIPE, **settings)


def assert_refused(result, code, *texts):
    """One error, in words, and its exit code."""
    assert result.returncode == code, result.stderr
    assert result.stderr.count("error: ") == 1 and "Traceback" not in result.stderr, result.stderr
    for text in texts:
        assert text in result.stderr


def rows(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def arrays(folder, file="last.npz"):
    """All that a checkpoint holds."""
    with np.load(folder / file, allow_pickle=False) as content:
        return {name: array for name, array in content.items() if name != "metadata"}


def weights(folder, file="last.npz"):
    return {name: array for name, array in arrays(folder, file).items() if not name.startswith("training/")}


def events(folder):
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def call(*arguments):
    """The same in this process, for what does not depend on it."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    command.main(parser.parse_args([str(argument) for argument in arguments]))


# ---- a run that ends well ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(result, folder) of two epochs with seed 3, saved at the end of each, however long a save takes."""
    folder = tmp_path_factory.mktemp("run")
    return train(folder, *DIGITS, "--epochs", "2", "--seed", "3", "--save-every", "9", "-o", "it"), folder / "it"


def test_one_line_first_then_one_per_epoch_and_no_bar(run):
    result, folder = run
    first, titles, headings, *epochs, outcome, last = result.stdout.splitlines()
    assert (result.returncode, result.stderr) == (0, "")
    assert first == (f"{device.select('cpu').description} | digits: 1,437 training, 360 test images | "
                     "simplenet-310k: 312,362 parameters, 55,788,160 MACs an image | fp32")
    assert titles.split() == ["train", "test"]
    assert headings.split() == ["epoch", "lr", "loss", "top-1", "loss", "top-1", "top-5", "img/s", "time"]
    assert [line.split()[0] for line in epochs] == ["1/2", "2/2"]
    for line, row in zip(epochs, rows(folder), strict=True):
        names = ("train_loss", "train_top1", "test_loss", "test_top1", "test_top5")
        scales = (1, 100, 1, 100, 100)
        assert [float(cell) for cell in line.split()[2:7]] == pytest.approx(
            [scale * float(row[name]) for scale, name in zip(scales, names)], abs=0.0051)
        assert len(line) <= 80
    final = {name: float(value) for name, value in rows(folder)[-1].items()}
    assert outcome == (f"after epoch 2: test top-1 {final['test_top1']:.2%}, top-5 {final['test_top5']:.2%}, "
                       f"loss {final['test_loss']:.3f}")
    assert last == "run folder: it"


def test_run_folder_holds_settings_environment_metrics_events_and_checkpoints(run):
    _, folder = run
    picture = ["curves.png"] if importlib.util.find_spec("matplotlib") else []
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.toml", *picture, "env.json", "events.jsonl", "last.npz", "last.previous.npz", "metrics.csv"]
    recorded = json.loads((folder / "env.json").read_text())
    assert recorded["command"][0] == "train.py" and "--seed" in recorded["command"] and recorded["device"] == "cpu"
    assert {"minidl", "python", "numpy"} <= recorded["versions"].keys()
    assert tomllib.loads((folder / "config.toml").read_text()).items() >= {
        "arch": "simplenet-310k", "epochs": 2, "batch_size": 16, "lr": 0.0125, "optimizer": "sgd", "sched": "cosine", "seed": 3,
        "dataset": "digits", "precision": "fp32", "limit_train_batches": 2, "recipe": "fast"}.items()


def test_metrics_have_a_row_per_epoch(run):
    _, folder = run
    assert (folder / "metrics.csv").read_text().splitlines()[0].split(",") == COLUMNS
    assert [row["epoch"] for row in rows(folder)] == ["1", "2"]
    for row in rows(folder):
        values = {name: float(value) for name, value in row.items()}
        assert all(0 <= values[name] <= 1 for name in ("train_top1", "test_top1", "test_top5"))
        assert values["test_top1"] <= values["test_top5"]
        assert min(values[name] for name in ("lr", "train_loss", "test_loss", "images_per_second", "seconds")) > 0
        assert 2 * 16 / values["images_per_second"] < values["seconds"] + 0.01, "of which the evaluation takes the rest"
    assert sum(float(row["seconds"]) for row in rows(folder)) < events(folder)[-1]["total_seconds"] + 0.02


def test_events_are_lines_of_json(run):
    _, folder = run
    told = events(folder)
    assert [event["event"] for event in told] == ["start", "save", "epoch", "save", "epoch", "end"]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4}", event["time"]) for event in told)
    assert told[0]["settings"]["seed"] == 3
    for row, event in zip(rows(folder), [event for event in told if event["event"] == "epoch"], strict=True):
        assert {name: float(value) for name, value in row.items()} == {name: event[name] for name in COLUMNS}


def test_the_weights_reproduce_the_test_metrics(run):
    _, folder = run
    network = models.create("simplenet-310k", 10).initialize(seed=99)
    network.load_state_dict(weights(folder))
    metrics = evaluate(network, Batches(data.load("digits")[1], network.device, network.dtype, 32, seed=0))
    recorded = [rows(folder)[-1][name] for name in ("test_loss", "test_top1", "test_top5")]
    assert recorded == [f"{value:.5f}" for value in (metrics.loss, metrics.top1, metrics.top5)]


def test_one_seed_one_result(run, tmp_path):
    _, folder = run
    for seed in ("3", "4"):
        assert train(tmp_path, *DIGITS, "--epochs", "2", "--seed", seed, "-o", seed).returncode == 0
    first, again, other = weights(folder), weights(tmp_path / "3"), weights(tmp_path / "4")
    assert first.keys() == again.keys() == other.keys()
    assert all(np.array_equal(array, again[name]) for name, array in first.items())
    assert all(not np.array_equal(array, other[name]) for name, array in first.items() if name.endswith("weight"))
    for row, same_row in zip(rows(folder), rows(tmp_path / "3"), strict=True):
        assert all(row[name] == same_row[name] for name in COLUMNS if name not in ("images_per_second", "seconds"))


@pytest.mark.parametrize("precision, optimizer, schedule", [
    ("tf32", "adam", "multistep --milestones 1"), ("bf16", "adadelta", "constant"), ("fp16", "adamw", "onecycle")])
def test_precisions_optimizers_and_schedules(tmp_path, precision, optimizer, schedule):  # besides those of the run above
    if precision == "bf16":
        pytest.importorskip("ml_dtypes")
    result = train(tmp_path, *DIGITS, "--epochs", "1", "--precision", precision, "--optimizer", optimizer, "--sched",
                   *schedule.split())
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines()[0].endswith("| " + precision)
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("simplenet-310k-digits-20")
    assert all(array.dtype == np.float32 and np.isfinite(array).all() for array in weights(folder).values())


def test_plain_terminals_and_any_folder_name(tmp_path):
    """The demo, where the output can be ASCII only, into a folder that cannot be written in ASCII."""
    name = "Läufe von heute, ✓ 𝔸"
    result = train(tmp_path, "--device", "cpu", "--epochs", "1", "--limit-train-batches", "2", "-o", name, "--seed", "5",
                   LC_ALL="C", PYTHONIOENCODING="ascii", PYTHONUTF8=None, TERM="dumb", COLUMNS="20")
    assert (result.returncode, result.stderr) == (0, "")
    demo = "This is a demo on 1,797 small digits, because it runs on the CPU and no network or data were asked for.\n"
    assert demo in result.stdout and result.stdout.splitlines()[-1].startswith("run folder: ")
    assert weights(tmp_path / name)
    assert tomllib.loads((tmp_path / name / "config.toml").read_text(encoding="utf-8"))["seed"] == 5
    assert name in json.loads((tmp_path / name / "env.json").read_text())["command"]


@pytest.mark.parametrize("columns", [80, 120])
def test_a_terminal_gets_a_bar(tmp_path, columns):
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))  # rows and columns
    with start(tmp_path, *DIGITS[:-1], "8", "--epochs", "1", "--val-split", "100", stderr=its) as process:
        os.close(its)
        shown = b""
        try:
            while part := os.read(ours, 4096):
                shown += part
        except OSError:  # how Linux reports that the other side is closed
            pass
        output = process.communicate(timeout=SECONDS)[0]
    os.close(ours)
    assert process.returncode == 0
    assert b"epoch 1/1" in shown and b"8/8" in shown and b"loss=" in shown
    assert re.search(rb" [1-7]/8 ", shown), "it moves before the epoch ends"
    assert b"\n" not in shown and max(map(len, shown.decode().split("\r"))) <= columns, "it takes one line"
    assert "\n  1/1 " in output and "\r" not in output, "it is not in what a file would get"
    table = [line for line in output.splitlines()[1:] if not line.startswith(("after ", "best ", "run "))]
    assert len(table) == 3 and max(map(len, table)) <= 80


# ---- folders -----------------------------------------------------------------------------------------------------


def test_two_runs_in_one_second_get_two_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_folder.time, "strftime", lambda form: "20300101-000000")
    paths = {run_folder.RunFolder.dated("it").path for _ in range(3)}
    assert len(paths) == 3 and all(path.is_dir() for path in paths)


def test_nothing_is_overwritten(tmp_path):
    kept = tmp_path / "full" / "metrics.csv"
    kept.parent.mkdir()
    kept.write_text("precious")
    assert_refused(train(tmp_path, *DIGITS, "-o", "full"), 2, "the output folder full is not empty")
    assert kept.read_text() == "precious" and list(kept.parent.iterdir()) == [kept]


def test_one_process_at_a_time_writes_to_a_folder(tmp_path):
    with start(tmp_path, *DIGITS, "--epochs", "1000", "-o", "it", stderr=subprocess.DEVNULL) as process:
        while not process.stdout.readline().lstrip().startswith("1/1000 "):
            assert process.poll() is None
        before = rows(tmp_path / "it")
        for arguments in ((*DIGITS, "-o", "it"), ("--resume", "it")):
            assert_refused(train(tmp_path, *arguments), 2, "the output folder it is not empty" if "-o" in arguments else
                           "another process writes to it: wait")
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=SECONDS)
    assert process.returncode == 130 and rows(tmp_path / "it")[:len(before)] == before
    shutil.rmtree(tmp_path / "it")
    racing = [start(tmp_path, *DIGITS, "-o", "it", stderr=subprocess.PIPE) for _ in range(3)]
    errors = [process.communicate(timeout=SECONDS)[1] for process in racing]
    assert sorted(process.returncode for process in racing) == [0, 2, 2], errors


def test_a_folder_that_another_has_just_taken(tmp_path):
    taken = run_folder.RunFolder.new(tmp_path)
    with pytest.raises(UsageError, match=f"another process writes to {tmp_path}: wait for its end, or name another folder"):
        run_folder.RunFolder.new(tmp_path)
    taken.close()
    run_folder.RunFolder.new(tmp_path)


def test_an_empty_folder_is_taken_and_a_file_is_not(tmp_path):
    assert run_folder.RunFolder.new(tmp_path).path == tmp_path
    (tmp_path / "file").write_text("")
    for bad in ("file", "file/below"):
        with pytest.raises(UsageError, match=f"the output folder .*{bad} cannot be made: "):
            run_folder.RunFolder.new(tmp_path / bad)


def test_list_of_architectures(tmp_path):
    result = train(tmp_path, "--arch", "list")
    assert result.returncode == 0 and result.stderr == "" and not list(tmp_path.iterdir())
    assert "\nresnext29-8x64d " in result.stdout and " 34,518,948 " in result.stdout


def test_options_of_the_architecture_and_its_alias(tmp_path):
    result = train(tmp_path, *DIGITS, "--arch", "wrn-10-1", "--model-kwargs", "dropout=0.3", "gamma=uniform", "-o", "it")
    assert result.returncode == 0 and "| wrn-10-1: " in result.stdout
    settings = (tmp_path / "it" / "config.toml").read_text()
    assert 'arch = "wrn-10-1"' in settings
    assert settings.endswith('\n[model_kwargs]\ndropout = 0.3\ngamma = "uniform"\n')


# ---- what is refused ---------------------------------------------------------------------------------------------


USAGE = {  # what is asked for: what the answer says
    "--arch simplenet-5n": "unknown architecture 'simplenet-5n': did you mean simplenet-5m",
    "--arch resnxt": "unknown architecture 'resnxt': did you mean resnext",
    "--arch wrn-16-1 --dataset digits --model-kwargs drop=0.3": "unknown model option 'drop': this architecture has dropout, ",
    "--arch wrn-16-1 --dataset digits --model-kwargs classes=3": "unknown model option 'classes'",
    "--arch wrn-16-1 --dataset digits --model-kwargs dropout": "model option 'dropout' is not of the form NAME=VALUE",
    "--arch wrn-16-1 --dataset digits --model-kwargs dropout=much": "model options dropout=much: ",
    "--device gpu": "device 'gpu' is not one of auto, cpu, cuda, cuda:N",
    "--batch-size 0": "batch_size is 0: it must be at least 1",
    "--epochs -1": "epochs is -1: it must be at least 1",
    "--limit-train-batches 1.5": "--limit-train-batches: invalid int value: '1.5'",
    "--batch-size 1000 --dataset digits": "batch_size 1000 is more than the 360 test images of digits",
    "--batch-size 100000 --dataset digits": "batch_size 100000 is more than the 1437 training images of digits",
    "--val-split 1437 --dataset digits": "val_split 1437 leaves none of the 1437 training images of digits",
    "--val-split 1430 --dataset digits": "batch_size 16 is more than the 7 training images of digits",
    "--lr nan": "lr is nan: it must be a number",
    "--seed -1": "seed is -1: it must be at least 0",
    "--optimizer sdg": "--optimizer: invalid choice: 'sdg'",
    "--optimizer adam --momentum 0.9": "momentum is not a setting of the optimizer adam, which has beta1, beta2, eps, ",
    "--sched multistep": "sched multistep needs milestones: after how many epochs the rate drops",
    "--ema 1": "ema is 1.0: it must be from 0 to 1, but not 1",
    "--momentum 1": "momentum is 1.0: it must be from 0 to 1, but not 1",
    "--optimizer adam --eps 0": "eps is 0.0: it must be at least 1.2e-38",
    "--epochs 3 --time-budget 1h": "epochs and time_budget exclude each other",
    "--patience 3": "patience needs val_split",
    "--config nowhere.toml": "nowhere.toml cannot be read: No such file or directory",
    "--runs 3 --profile": "--profile: not allowed with argument --runs",
    "--runs 1": "--runs 1: a standard deviation needs at least 2",
}


@pytest.mark.parametrize("arguments", USAGE)
def test_usage(tmp_path, arguments):
    result = train(tmp_path, "--device", "cpu", *arguments.split())
    assert_refused(result, 2, USAGE[arguments])
    assert result.stdout == "" and not list(tmp_path.iterdir())


def test_no_data(tmp_path):
    begin = time.monotonic()
    result = train(tmp_path, "--device", "cpu", "--arch", "simplenet-310k", XDG_CACHE_HOME=tmp_path / "nothing here")
    assert time.monotonic() - begin < 10
    assert_refused(result, 3, "cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85", "cifar-100-binary.tar.gz",
                   "03b5dce01913d631647c71ecec9e9cb8", "nothing here", "--data-dir", "--dataset digits")
    assert result.stdout == ""


@pytest.mark.skipif(CUPY, reason="there is a GPU")
def test_no_gpu(tmp_path):
    result = train(tmp_path, "--device", "cuda")
    assert_refused(result, 4, "--device cuda: no NVIDIA GPU or driver found: see that `nvidia-smi` ")


@pytest.mark.skipif(importlib.util.find_spec("ziglang") is not None, reason="there is a compiler in the package ziglang")
def test_no_compiler(tmp_path):
    result = train(tmp_path, *DIGITS, PATH=tmp_path, CXX=None, MINIDL_CACHE=tmp_path / "cache")
    assert_refused(result, 4, "install g++, or `pip install ziglang`")


# ---- runs that end early -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_that_diverges(tmp_path, precision):
    if precision == "bf16":
        pytest.importorskip("ml_dtypes")
    result = train(tmp_path, *DIGITS, "--lr", "1e30", "--precision", precision, "-o", "it")
    assert_refused(result, 6, "error: step ", " is not finite: try a lower --lr")
    assert len(result.stderr.splitlines()) == 1, "what NumPy has to say of it is noise"
    assert not (tmp_path / "it" / "last.npz").exists()
    assert events(tmp_path / "it")[-1]["event"] == "error"


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals(tmp_path, number, code):
    with start(tmp_path, *DIGITS, "--epochs", "1000", "-o", "it", stderr=subprocess.PIPE) as process:
        assert process.stdout.readline().startswith("CPU, ")
        while not process.stdout.readline().startswith("   1/1000 "):
            pass
        process.send_signal(number)
        _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == code, errors
    assert "Traceback" not in errors and "Exception ignored" not in errors
    assert rows(tmp_path / "it")[0]["epoch"] == "1"


SIGNAL_IN_A_FINALIZER = """
import os, sys, time
sys.path.insert(0, os.path.dirname(sys.argv[0]))
import train
from minidl import command
from minidl.training import Trainer

number = int(sys.argv.pop())
step = Trainer.step

class Late:
    def __del__(self):
        os.kill(os.getpid(), number)
        time.sleep(0.05)

def step_once_with_a_signal(self, *arguments):
    Trainer.step = step
    Late()
    return step(self, *arguments)

Trainer.step = step_once_with_a_signal
sys.exit(command.run(train.main))
"""


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_that_comes_in_a_finalizer_is_not_lost(tmp_path, number, code):
    """Python prints and forgets what is raised there, and tqdm and the memory pool have finalizers."""
    script = SIGNAL_IN_A_FINALIZER.replace("sys.argv[0]", repr(str(TRAIN)))
    result = python(tmp_path, "-c", script, *DIGITS, "--epochs", "2", str(int(number)))
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr and "Exception ignored" not in result.stderr


TWO_SIGNALS = """
import os, sys, time
from minidl import command, signals

def main():
    for _ in range(3):  # such as those of a terminal that closes, and of its shell
        os.kill(os.getpid(), int(sys.argv[1]))
    print("the step is done", flush=True)
    time.sleep(signals.SETTLE_SECONDS)
    os.kill(os.getpid(), int(sys.argv[1]))
    time.sleep(60)
    print("the second signal waited too")

sys.exit(command.run(main))
"""


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_the_first_signal_waits_for_the_step_and_the_second_does_not(tmp_path, number, code):
    result = python(tmp_path, "-c", TWO_SIGNALS, str(int(number)))
    assert (result.returncode, result.stdout) == (code, "the step is done\n")
    assert "Traceback" not in result.stderr


def test_what_a_process_was_started_to_ignore_it_ignores(tmp_path):
    """As by nohup; or SIGINT, in the background of a script."""
    script = ("import os, signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); from minidl import command, signals\n"
              "print(command.run(lambda: [os.kill(os.getpid(), signal.SIGHUP), signals.obey()][1]))")
    assert python(tmp_path, "-c", script).stdout == "0\n"


def test_a_closed_terminal(tmp_path):
    with start(tmp_path, *DIGITS, "--epochs", "1000", "-o", "it", stderr=subprocess.PIPE) as process:
        while not process.stdout.readline().startswith("   1/1000 "):
            pass
        process.send_signal(signal.SIGHUP)
        _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 129 and "error: interrupted, and saved after " in errors


def test_readers_that_leave_early(tmp_path):
    """As in `python train.py | head -1`: the run ends quietly, but as one that was cut short."""
    with start(tmp_path, *DIGITS, "--epochs", "2", stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141  # as the shell reports SIGPIPE


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams(tmp_path, closed):
    """As under some schedulers. Nothing can be said then, but the run goes on."""
    line = ["sh", "-c", f'exec "$0" "$@" {closed}', sys.executable, TRAIN, *DIGITS, "--epochs", "1", "-o", "it"]
    result = subprocess.run(line, cwd=tmp_path, env=environment(), capture_output=True, timeout=SECONDS, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert len(rows(tmp_path / "it")) == 1 and weights(tmp_path / "it")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_output_to_a_full_disk(tmp_path):
    with open("/dev/full", "w") as full:
        result = train(tmp_path, *DIGITS, "--epochs", "1", stdout=full)
    assert result.returncode != 0
    assert "Traceback" not in result.stderr and "No space left on device" in result.stderr


CPUINFO_OF_ARM = "processor\t: 0\nFeatures\t: fp asimd\nCPU implementer\t: 0x41\nCPU part\t: 0xd0c\n\nprocessor\t: 1\n"


@pytest.mark.parametrize("cpuinfo, sysctl, name", [
    ("model name\t: AMD EPYC\ncpu family\t: 26\nmodel\t: 2\n\nmodel name\t: another\n", "exit 1", "AMD EPYC family 26 model 2"),
    (CPUINFO_OF_ARM, "exit 1", "aarch64 implementer 0x41 part 0xd0c"), (None, "echo Apple M1", "Apple M1")],
    ids=["x86-64", "ARM", "macOS"])
def test_the_name_of_the_cpu(tmp_path, monkeypatch, cpuinfo, sysctl, name):
    def read_text(path):
        if cpuinfo is None:
            raise FileNotFoundError(path)
        return cpuinfo

    (tmp_path / "sysctl").write_text(f"#!/bin/sh\n{sysctl}\n")
    (tmp_path / "sysctl").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(platform, "processor", lambda: "arm" if cpuinfo is None else "")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert run_folder._cpu_model() == name


def test_the_commit_and_whether_files_differ_from_it(tmp_path, monkeypatch):
    source = tmp_path / "minidl" / "run_folder.py"
    source.parent.mkdir()
    source.write_text("1")
    for words in ("init -q", "add .", "-c user.name=a -c user.email=a@b commit -qm it"):
        subprocess.run(["git", "-C", tmp_path, *words.split()], check=True)
    monkeypatch.setattr(run_folder, "__file__", str(source))
    commit = run_folder._commit()
    assert len(commit) == 40
    (tmp_path / "new").touch()
    assert run_folder._commit() == commit
    source.write_text("2")
    assert run_folder._commit() == commit + "+"
