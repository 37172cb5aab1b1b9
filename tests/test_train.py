"""train.py as its users run it: a process of its own, in a folder of their own, and whatever they may do to it."""

import csv
import fcntl
import importlib.util
import json
import os
import pty
import re
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
from conftest import gpu_present
from minidl import data, device, host_build, run_folder
from minidl.data.batches import Batches
from minidl.errors import UsageError
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
    """Who ignores Ctrl-C, as what runs in the background does, has children that ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


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
    with ctrl_c():
        return subprocess.Popen([sys.executable, TRAIN, *arguments], cwd=folder, env=environment(), stdout=subprocess.PIPE,
                                encoding="utf-8", **settings)


def assert_refused(result, code, *texts):
    """One error, in words, and its exit code."""
    assert result.returncode == code, result.stderr
    assert result.stderr.count("error: ") == 1 and "Traceback" not in result.stderr, result.stderr
    for text in texts:
        assert text in result.stderr


def rows(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def weights(folder):
    with np.load(folder / "weights.npz", allow_pickle=False) as file:
        return {name: array for name, array in file.items() if name != "metadata"}


# ---- a run that ends well ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(result, folder) of two epochs with seed 3."""
    folder = tmp_path_factory.mktemp("run")
    return train(folder, *DIGITS, "--epochs", "2", "--seed", "3", "-o", "it"), folder / "it"


def test_one_line_first_then_one_per_epoch_and_no_bar(run):
    result, _ = run
    first, *epochs, last = result.stdout.splitlines()
    assert (result.returncode, result.stderr) == (0, "")
    assert first == (f"CPU, {device.cpu_threads()} threads | digits: 1,437 training and 360 test images | "
                     "simplenet-310k: 312,362 parameters, 55,788,160 MACs an image | fp32")
    assert [line.split("  ")[0] for line in epochs] == ["epoch 1/2", "epoch 2/2"]
    assert all("train: loss " in line and "test: loss " in line and " images/s" in line for line in epochs)
    assert last == "run folder: it"


def test_run_folder_holds_settings_environment_metrics_and_weights(run):
    _, folder = run
    assert sorted(path.name for path in folder.iterdir()) == ["config.toml", "env.json", "metrics.csv", "weights.npz"]
    recorded = json.loads((folder / "env.json").read_text())
    assert recorded["command"][0] == "train.py" and "--seed" in recorded["command"] and recorded["device"] == "cpu"
    assert {"minidl", "python", "numpy"} <= recorded["versions"].keys()
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    assert tomllib.loads((folder / "config.toml").read_text()).items() >= {
        "arch": "simplenet-310k", "epochs": 2, "batch_size": 16, "lr": 0.0125, "optimizer": "sgd", "sched": "cosine", "seed": 3,
        "dataset": "digits", "precision": "fp32", "limit_train_batches": 2, "output": "it"}.items()


def test_metrics_have_a_row_per_epoch(run):
    _, folder = run
    assert (folder / "metrics.csv").read_text().splitlines()[0].split(",") == COLUMNS
    assert [row["epoch"] for row in rows(folder)] == ["1", "2"]
    for row in rows(folder):
        values = {name: float(value) for name, value in row.items()}
        assert all(0 <= values[name] <= 1 for name in ("train_top1", "test_top1", "test_top5"))
        assert values["test_top1"] <= values["test_top5"]
        assert min(values[name] for name in ("lr", "train_loss", "test_loss", "images_per_second", "seconds")) > 0


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
    ("tf32", "adam", "multistep"), ("bf16", "sgd", "constant"), ("fp16", "adam", "cosine")])  # fp32 is the run above
def test_precisions_optimizers_and_schedules(tmp_path, precision, optimizer, schedule):
    if precision == "bf16":
        pytest.importorskip("ml_dtypes")
    result = train(tmp_path, *DIGITS, "--epochs", "1", "--precision", precision, "--optimizer", optimizer, "--sched", schedule)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines()[0].endswith("| " + precision)
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("simplenet-310k-digits-20")
    assert all(array.dtype == np.float32 and np.isfinite(array).all() for array in weights(folder).values())


def test_plain_terminals_and_any_folder_name(tmp_path):
    """The demo, where the output can be ASCII only, into a folder that cannot be written in ASCII."""
    name = "Läufe von heute, ✓ 𝔸"
    result = train(tmp_path, "--device", "cpu", "--epochs", "1", "--limit-train-batches", "2", "-o", name,
                   LC_ALL="C", PYTHONIOENCODING="ascii", PYTHONUTF8=None, TERM="dumb", COLUMNS="20")
    assert (result.returncode, result.stderr) == (0, "")
    assert "This is a demo" in result.stdout and result.stdout.splitlines()[-1].startswith("run folder: ")
    assert weights(tmp_path / name)
    tomllib = pytest.importorskip("tomllib")
    assert tomllib.loads((tmp_path / name / "config.toml").read_text(encoding="utf-8"))["output"] == name


def test_a_terminal_gets_a_bar(tmp_path):
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))  # rows and columns
    with start(tmp_path, *DIGITS[:-1], "8", "--epochs", "1", stderr=its) as process:
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
    assert "epoch 1/1" in output and "\r" not in output, "it is not in what a file would get"


# ---- folders -----------------------------------------------------------------------------------------------------


def test_two_runs_in_one_second_get_two_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_folder.time, "strftime", lambda form: "20300101-000000")
    paths = {run_folder.RunFolder("it").path for _ in range(3)}
    assert len(paths) == 3 and all(path.is_dir() for path in paths)


def test_nothing_is_overwritten(tmp_path):
    kept = tmp_path / "full" / "metrics.csv"
    kept.parent.mkdir()
    kept.write_text("precious")
    assert_refused(train(tmp_path, *DIGITS, "-o", "full"), 2, "the output folder full is not empty")
    assert kept.read_text() == "precious" and list(kept.parent.iterdir()) == [kept]


def test_an_empty_folder_is_taken_and_a_file_is_not(tmp_path):
    assert run_folder.RunFolder("it", tmp_path).path == tmp_path
    (tmp_path / "file").write_text("")
    for bad in ("file", "file/below"):
        with pytest.raises(UsageError, match=f"the output folder .*{bad} cannot be made: "):
            run_folder.RunFolder("it", tmp_path / bad)


def test_list_of_architectures(tmp_path):
    result = train(tmp_path, "--arch", "list")
    assert result.returncode == 0 and result.stderr == "" and not list(tmp_path.iterdir())
    assert "\nresnext29-8x64d " in result.stdout and " 34,518,948 " in result.stdout


def test_options_of_the_architecture_and_its_alias(tmp_path):
    result = train(tmp_path, *DIGITS, "--arch", "wrn-10-1", "--model-kwargs", "dropout=0.3", "gamma=uniform", "-o", "it")
    assert result.returncode == 0 and "| wrn-10-1: " in result.stdout
    settings = (tmp_path / "it" / "config.toml").read_text()
    assert 'arch = "wrn-10-1"' in settings and 'model_kwargs = ["dropout=0.3", "gamma=uniform"]' in settings


# ---- what is refused ---------------------------------------------------------------------------------------------


USAGE = {  # what is asked for: what the answer says
    "--arch simplenet-5n": "unknown architecture 'simplenet-5n': did you mean simplenet-5m",
    "--arch resnxt": "unknown architecture 'resnxt': did you mean resnext",
    "--arch wrn-16-1 --dataset digits --model-kwargs drop=0.3": "unknown model option 'drop': this architecture has dropout, ",
    "--arch wrn-16-1 --dataset digits --model-kwargs classes=3": "unknown model option 'classes'",
    "--arch wrn-16-1 --dataset digits --model-kwargs dropout": "model option 'dropout' is not of the form NAME=VALUE",
    "--arch wrn-16-1 --dataset digits --model-kwargs dropout=much": "model options dropout=much: ",
    "--device gpu": "device 'gpu' is not one of auto, cpu, cuda, cuda:N",
    "--batch-size 0": "--batch-size: '0' is not a whole number of at least 1",
    "--epochs -1": "--epochs: '-1' is not a whole number of at least 1",
    "--limit-train-batches 1.5": "--limit-train-batches: '1.5' is not a whole number",
    "--batch-size 100000 --dataset digits": "--batch-size 100000 is more than the 360 test images of digits",
    "--lr nan": "--lr: 'nan' is not a number",
    "--seed -1": "--seed -1: it must be at least 0",
    "--optimizer sdg": "--optimizer: invalid choice: 'sdg'",
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


@pytest.mark.skipif(gpu_present(), reason="there is a GPU")
def test_no_gpu(tmp_path):
    assert_refused(train(tmp_path, "--device", "cuda"), 4, "--device cuda: no NVIDIA GPU or driver found: see that `nvidia-smi` ")


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
    assert_refused(result, 6, "the loss became ", "try a lower --lr")
    assert len(result.stderr.splitlines()) == 1, "what NumPy has to say of it is noise"
    assert not (tmp_path / "it" / "weights.npz").exists()


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals(tmp_path, number, code):
    with start(tmp_path, *DIGITS, "--epochs", "1000", "-o", "it", stderr=subprocess.PIPE) as process:
        assert process.stdout.readline().startswith("CPU, ")
        assert process.stdout.readline().startswith("epoch 1/1000 ")
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
from minidl import command

def main():
    os.kill(os.getpid(), int(sys.argv[1]))
    print("the step is done", flush=True)
    os.kill(os.getpid(), int(sys.argv[1]))
    time.sleep(60)
    print("the second signal waited too")

sys.exit(command.run(main))
"""


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_waits_for_the_step_and_the_second_does_not(tmp_path, number, code):
    result = python(tmp_path, "-c", TWO_SIGNALS, str(int(number)))
    assert (result.returncode, result.stdout) == (code, "the step is done\n")
    assert "Traceback" not in result.stderr


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
    result = subprocess.run(["sh", "-c", f'exec "$0" "$@" {closed}', sys.executable, TRAIN, *DIGITS, "--epochs", "1", "-o", "it"],
                            cwd=tmp_path, env=environment(), capture_output=True, timeout=SECONDS, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert len(rows(tmp_path / "it")) == 1 and weights(tmp_path / "it")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_output_to_a_full_disk(tmp_path):
    with open("/dev/full", "w") as full:
        result = train(tmp_path, *DIGITS, "--epochs", "1", stdout=full)
    assert result.returncode != 0
    assert "Traceback" not in result.stderr and "No space left on device" in result.stderr
