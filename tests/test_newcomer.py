"""The first hour of somebody who has installed minidl: the script `minidl` of a wheel, in an empty folder, from the demo to
weights for others. What is imported is the wheel's, not this checkout's."""

import csv
import importlib.util
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from minidl import host_build
from test_bench_command import copy_of_sources
from test_train import SECONDS, Started, assert_refused

CIFAR100 = os.environ.get("MINIDL_TEST_CIFAR100")
SMALL = ("--arch", "wrn-10-1", "--dataset", "digits", "--device", "cpu", "--limit-train-batches", "4")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with the wheel, installed. What it depends on comes from this environment, for want of the network."""
    pytest.importorskip("setuptools", minversion="77", reason="it builds the wheel")
    pytest.importorskip("pip")
    folder = tmp_path_factory.mktemp("installed")
    names = ("minidl", "models", "benchmarks", "pyproject.toml", "setup.py", "README.md", "LICENSE")
    source = copy_of_sources(folder / "source", names)
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation",
                    "--target", folder / "site", source], check=True, timeout=SECONDS)
    return folder / "site"


@pytest.fixture
def start(site, tmp_path, monkeypatch):
    """A function that starts `minidl *arguments` in an empty folder, for somebody who has no data and no network."""
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    environment = {**os.environ, "PYTHONPATH": str(site), "XDG_CACHE_HOME": str(tmp_path / "cache"), "MINIDL_OFFLINE": "1",
                   "MINIDL_CACHE": str(host_build.cache_folder().parent)}
    environment.pop("MINIDL_DATA", None)

    def start(*arguments):
        return Started([site / "bin" / "minidl", *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    return start


def top1_of_last_epoch(run):
    with open(f"{run}/metrics.csv", newline="") as file:
        return f"top-1 {float(list(csv.DictReader(file))[-1]['test_top1']):.2%}"


def test_the_first_hour(start, site):
    def end(*arguments):
        process = start(*arguments)
        stdout, stderr = process.communicate(timeout=SECONDS)
        return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)

    def minidl(*arguments, package=None):
        """What it prints. Where a package is missing: "", after the error has named the extra that it is in."""
        result = end(*arguments)
        if package and importlib.util.find_spec(package) is None:
            assert_refused(result, 2, package.partition(".")[0], "pip install")
            return ""
        assert (result.returncode, result.stderr) == (0, ""), f"{arguments}\n{result.stdout}{result.stderr}"
        return result.stdout

    # What is there?
    assert re.search(r"^ +train +Train one of the architectures", minidl("--help"), re.MULTILINE)
    misspelt = end("trian")
    assert misspelt.returncode == 2 and "invalid choice: 'trian'" in misspelt.stderr
    found = minidl("doctor")
    assert "training can run on " in found and f"{site}/minidl" in re.sub(r"\s", "", found), "it is the wheel that runs"

    # The demo.
    lines = minidl("train", "--device", "cpu", "--epochs", "1", "--limit-train-batches", "2", "-o", "demo").splitlines()
    assert lines[1].startswith("This is a demo on 1,797 small digits") and lines[-1] == "run folder: demo"

    # Data: what is missing is said, with its remedy, and what is there is found.
    assert_refused(end("data"), 3, "cifar-100-binary.tar.gz", "MINIDL_OFFLINE", "--data-dir")
    assert "digits: 1,437 training and 360 test images of 3x32x32, 10 classes" in minidl("data", "--dataset", "digits")
    if CIFAR100:
        assert "cifar100: 50,000 training and 10,000 test images" in minidl("data", "--data-dir", CIFAR100)

    # A run, stopped after its first epoch by Ctrl-C, that goes on.
    with start("train", *SMALL, "--epochs", "6", "-o", "run") as process:
        next(line for line in process.stdout if line.split()[0] == "1/6")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 130
    position, epochs = re.fullmatch(r"error: interrupted, and saved after ((\d) epochs? and \d steps?); go on with --resume run\n",
                                    errors).groups()
    assert 1 <= int(epochs) < 6
    shown = minidl("train", "--resume", "run")
    assert f"going on after {position} of 4\n" in shown
    assert f"after epoch 6: test {top1_of_last_epoch('run')}" in shown
    assert "run is finished" in minidl("train", "--resume", "run")

    # What is it worth?
    evaluated = minidl("eval", "run")
    assert top1_of_last_epoch("run") in evaluated
    if importlib.util.find_spec("PIL"):
        from PIL import Image

        Image.fromarray(np.full((50, 40, 3), 128, np.uint8)).save("photo.png")
        *guesses, nothing = minidl("predict", "run", "photo.png").split("\n")
        assert guesses[0].split()[0] == "photo.png" and len(guesses) == 5 and not nothing
    if minidl("plot", "run", "-o", "curves.png", package="matplotlib"):
        assert Path("curves.png").read_bytes().startswith(b"\x89PNG")

    # Weights for others, and back.
    written = {}
    for suffix, package in (("npz", None), ("safetensors", "safetensors")):
        said = minidl("export", "run", "--to", suffix, package=package)
        assert not said or said.endswith(": 77,850 parameters of wrn-10-1\n")
        written[suffix] = said.partition(":")[0]
    with np.load(written["npz"], allow_pickle=False) as weights:
        assert weights["conv1.weight"].shape == (16, 3, 3, 3) and weights["classifier.bias"].shape == (10,)
    minidl("import", written["safetensors"] or written["npz"], "--arch", "wrn-10-1", "-o", "again.npz")
    assert minidl("eval", "again.npz", "--dataset", "digits") == evaluated


def test_a_folder_with_a_module_named_models(tmp_path, site):
    (tmp_path / "models.py").write_text("MINE = True\n")
    result = subprocess.run([sys.executable, "-m", "minidl", "train", "--arch", "list"], cwd=tmp_path, capture_output=True,
                            text=True, env={**os.environ, "PYTHONPATH": str(site)})
    assert_refused(result, 2, f"{tmp_path / 'models.py'} takes the place of the package models", "use the script `minidl`")
