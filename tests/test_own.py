"""What users bring themselves: architectures, layers, data, weights to begin with."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import models
from minidl import checkpoint, data, device, run_folder, settings, weights
from minidl.commands import runs
from minidl.data.dataset import Dataset
from minidl.errors import CheckpointError, DataError, UsageError
from minidl.fit import fit
from minidl.layers import Conv2d, Flatten, GlobalAvgPool2d, Linear, Sequential
from minidl.run import Run
from models import recipes
from test_train import assert_refused, environment

TRAIN = ["train", "--device", "cpu", "--dataset", "digits", "--epochs", "1", "--limit-train-batches", "3", "--quiet"]
NETS = """
from __future__ import annotations

from dataclasses import dataclass

from minidl import BatchNorm2d, Conv2d, GlobalAvgPool2d, Layer, Linear, ReLU, Sequential
from parts import KERNEL

@dataclass
class Stem:
    kernel: int = KERNEL

def tiny(classes, width=4):
    return Sequential(conv=Conv2d(3, width, Stem().kernel, stride=4, bias=False), norm=BatchNorm2d(width, relu=True),
                      mean=GlobalAvgPool2d(), classifier=Linear(width, classes))

def headed(classes):
    return Sequential(mean=GlobalAvgPool2d(), head=Linear(3, classes))

def flat(classes):
    return Sequential(classifier=Linear(12, classes))

def nothing(classes):
    return classes

class Twice(Layer):
    def forward(self, x):
        return 2 * x

    def backward(self, dy):
        return 2 * dy

class Thrice(Twice):
    def forward(self, x):
        return 3 * x

class Greedy(Twice):
    def backward(self, dy):
        dy *= 2
        return dy

class Times(Twice):
    def __init__(self, factor):
        self.factor = factor

def two(classes, width):
    return tiny(classes, width)

def none():
    return tiny(10)

def any_options(classes, **options):
    return tiny(classes, **options)

wrn_10_1 = tiny
number = 7
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "nets.py").write_text(NETS)
    (tmp_path / "parts.py").write_text("KERNEL = 3\n")
    return tmp_path


def minidl(folder, *arguments):
    return subprocess.run([sys.executable, "-m", "minidl", *map(str, arguments)], cwd=folder, env=environment(), text=True,
                          capture_output=True, timeout=120)


def test_an_architecture_of_a_file_is_one_of_all_commands(folder):
    arch = "--arch", "nets.py:tiny"
    trained = minidl(folder, *TRAIN, *arch, "--model-kwargs", "width=6", "-o", "it")
    assert (trained.returncode, trained.stderr) == (0, "") and "| tiny: 244 parameters, " in trained.stdout
    assert 'arch = "tiny"' in (folder / "it" / "config.toml").read_text()
    for command in (("eval", "it"), ("train", "--resume", "it"), ("export", "it", "--to", "onnx")):
        assert_refused(minidl(folder, *command), 2, "unknown architecture 'tiny': ", "one of yours is named with its file, --arch ")
    evaluated = minidl(folder, "eval", "it", *arch, "--device", "cpu")
    assert (evaluated.returncode, evaluated.stderr) == (0, "") and evaluated.stdout.startswith("tiny on the 360 test images")
    for command in ("eval", "it"), ("predict", "it", "x.png"):
        assert_refused(minidl(folder, *command, "--arch", "wrn-10-1"), 2, "--arch wrn-10-1: only a network of yours is named here")
    resumed = minidl(folder, "train", "--resume", "it", *arch, "--epochs", "2", "--override")
    assert (resumed.returncode, resumed.stderr) == (0, "") and "going on after 1 epoch and 0 steps of 3" in resumed.stdout
    shared = minidl(folder, *TRAIN, *arch, "--ranks", "2", "-o", "shared")
    assert (shared.returncode, shared.stderr) == (0, "")
    listed = minidl(folder, "summary", "nets.py:tiny", "--json")
    assert listed.returncode == 0 and json.loads(listed.stdout)["arch"] == "tiny"
    for name, code in (("tiny", 0), ("Twice", 0), ("Thrice", 1)):
        checked = minidl(folder, "gradcheck", f"nets.py:{name}", "--device", "cpu")
        assert checked.returncode == code and name in checked.stdout, checked.stderr
    assert_refused(minidl(folder, "gradcheck", "nets.py:Greedy"), 1, "Greedy: backward changes dy, which must stay as it is")


def test_weights_of_a_network_whose_last_layer_has_another_name(folder):
    """Nothing but minidl's own networks calls it `classifier`."""
    arch = "--arch", "nets.py:headed"
    state = Sequential(mean=GlobalAvgPool2d(), head=Linear(3, 10)).initialize().state_dict()
    weights.save(folder / "plain.npz", state)
    assert minidl(folder, "import", "plain.npz", *arch, "--dataset", "digits", "-o", "known.npz").returncode == 0
    for form in ("npz", "onnx"):
        exported = minidl(folder, "export", "known.npz", *arch, "--to", form, "-o", f"exported.{form}")
        assert (exported.returncode, exported.stdout) == (0, f"exported.{form}: 40 parameters of headed\n"), exported.stderr
    assert_refused(minidl(folder, "export", "plain.npz", *arch, "--to", "onnx"), 2,
                   "the file does not say how many classes its network has: `minidl import FILE --arch NAME --dataset NAME` ")


@pytest.mark.parametrize("text, message", [
    ("nets.py:big", "^nets.py:big: there is no big in nets.py$"),
    ("no.py:tiny", "^no.py:tiny: there is no file no.py that can be read$"),
    ("nets.py:number", "^nets.py:number is not a function "), ("nets.py:Twice", "^nets.py:Twice is not a function "),
    (".py:tiny", "there is no file .py that can"), (f"{'x' * 300}.py:tiny", "there is no file x+.py that can be read$")])
def test_what_is_no_architecture(folder, monkeypatch, text, message):
    monkeypatch.chdir(folder)
    with pytest.raises(UsageError, match=message):
        models.named(text)


def test_what_cannot_be_called(folder):
    for name, message in (("two", "two cannot be called with classes and options: missing a required argument: 'width'"),
                          ("none", "none cannot be called with classes and options: too many positional arguments")):
        assert_refused(minidl(folder, "summary", f"nets.py:{name}"), 2, message)
    assert minidl(folder, "summary", "nets.py:any_options", "--model-kwargs", "width=3").returncode == 0
    assert_refused(minidl(folder, "gradcheck", "nets.py:Times"), 2, "nets.py:Times needs arguments: name a class ")


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(models, "REGISTRY", {**models.REGISTRY})


def tiny(classes):
    return Sequential(conv=Conv2d(3, 4, 3, stride=4), mean=GlobalAvgPool2d(), classifier=Linear(4, classes))


@pytest.mark.parametrize("name", ["simplenet", "simplenet-310k", "wrn-99-9", "resnext29-3x3d"])
def test_names_of_minidl_are_not_taken(registry, name):
    with pytest.raises(UsageError, match=f"^{name} is the name of an architecture of minidl: choose another$"):
        models.register(name, tiny)


def test_registered(registry):
    models.register("mine", tiny)
    models.register("mine", tiny)  # as a notebook does, again and again
    assert models.named("mine") == "mine" and models.create("mine", 7).output_shape((3, 32, 32)) == (7,)
    with pytest.raises(UsageError, match="there is no paper on mine: choose the recipe fast, or report"):
        recipes.recipe("paper", "mine", "digits")
    assert recipes.recipe("report", "mine", "digits")["optimizer"] == "adam"
    models.register("wrong", lambda classes: classes)
    with pytest.raises(UsageError, match="returns a int, not a Layer"):
        models.create("wrong", 10)


@pytest.mark.parametrize("layers, message", [
    (dict(head=Linear(9, 10)), r"the network does not take images \(C, H, W\) = \(3, 32, 32\): head: Linear: 9 input features"),
    (dict(conv=Conv2d(3, 10, 1)), r"the network gives \(10, 32, 32\) for an image, digits has 10 classes: \(10,\) is needed"),
    (dict(conv=Conv2d(3, 10, 1), mean=GlobalAvgPool2d()), r"the network gives \(10, 1, 1\) for an image, "),
    (dict(head=Linear(3072, 9)), r"the network gives \(9,\) for an image, ")])
def test_networks_that_do_not_fit_the_data(registry, layers, message):
    """Before anything is trained."""
    models.register("mine", lambda classes: Sequential(**layers))
    chosen = settings.resolve({"arch": "mine", "dataset": "digits"}, recipes.recipe("fast", "mine", "digits"))
    with pytest.raises(UsageError, match=f"^{message}"):
        runs.new_run(chosen)


def test_a_network_without_a_linear_layer_trains(registry):
    models.register("mine", lambda classes: Sequential(Conv2d(3, classes, 3, stride=2), GlobalAvgPool2d(), Flatten()))
    chosen = settings.resolve({"arch": "mine", "dataset": "digits"}, recipes.recipe("fast", "mine", "digits"))
    run = runs.new_run(chosen)
    before = run.test().loss
    metrics = run.trainer.epoch(run.batches(0))
    assert metrics.loss < before and run.test().loss < before


# ---- data --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 3, 5, 4), (6, 5, 4, 3), (6, 5, 4)])
def test_arrays_of_a_user(rng, shape):
    pixels = rng.integers(0, 256, shape, np.uint8)
    it = Dataset.of("mine", pixels, list(range(6)), "abcdef")
    assert it.images.shape[:2] == (6, 3) and it.images.flags.c_contiguous and it.labels.dtype == np.int32
    assert it.classes == tuple("abcdef")
    channel = pixels[:, 1] if shape[1] == 3 else pixels[..., 1] if len(shape) == 4 else pixels
    np.testing.assert_array_equal(it.images[:, 1], channel)
    np.testing.assert_allclose([it.mean[1], it.std[1]], [(channel / 255).mean(), (channel / 255).std()], rtol=1e-12)
    test = Dataset.of("mine", pixels[:2] // 2, np.array([0, 5], np.uint8), "abcdef", like=it)
    assert (test.mean, test.std) == (it.mean, it.std)


@pytest.mark.parametrize("images, labels, message", [
    (np.zeros((2, 3, 4, 4)), [0, 1], r"mine: images are float64 \(2, 3, 4, 4\), need uint8"),
    (np.zeros((2, 5, 4, 4), np.uint8), [0, 1], r"mine: images are uint8 \(2, 5, 4, 4\), need uint8 \(M, 3, H, W\)"),
    (np.zeros((2, 4), np.uint8), [0, 1], r"mine: images are uint8 \(2, 4\)"),
    (np.zeros((2, 4, 4), np.uint8), [0.0, 1.0], r"mine: labels are float64 \(2,\), need int32"),
    (np.zeros((2, 4, 4), np.uint8), [0, 2**40], r"mine: labels are int64 \(2,\), need int32"),
    (np.eye(4, dtype=np.uint8)[None].repeat(2, 0), [0, 7], r"mine: record 1: label 7 is not in 0\.\.1"),
    (np.zeros((2, 4, 4), np.uint8), [0, 1], r"mine: std is \(0.0, 0.0, 0.0\), need 3 numbers above 0"),
])
def test_arrays_that_are_no_data(images, labels, message):
    with pytest.raises(DataError, match=message):
        Dataset.of("mine", images, labels, "ab")


def test_a_run_of_own_network_and_data(registry, rng, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    models.register("mine", tiny)
    train_set = Dataset.of("squares", rng.integers(0, 256, (40, 20, 28), np.uint8), rng.integers(0, 3, 40), ["a", "b", "c"])
    test_set = Dataset.of("squares", rng.integers(0, 256, (20, 20, 28), np.uint8), rng.integers(0, 3, 20), ["a", "b", "c"],
                          like=train_set)
    given = {"arch": "mine", "dataset": data.OWN, "epochs": 2, "batch_size": 8}
    chosen = settings.resolve(given, recipes.recipe("fast", "mine", data.OWN))

    def new_run():
        return Run(chosen, models.create("mine", 3), train_set, test_set, device.select("cpu"))

    run = new_run()
    with pytest.raises(ValueError, match="the network has values already, which Run would replace: give weights as `start`"):
        Run(chosen, run.network, train_set, test_set, device.select("cpu"))
    fit(run, run_folder.RunFolder.new("it"), quiet=True)
    assert {"config.toml", "env.json", "metrics.csv", "last.npz"} < {path.name for path in (tmp_path / "it").iterdir()}
    assert "after epoch 2: test top-1 " in capsys.readouterr().out and len(run.history) == 2
    about = weights.load("it")[1]
    assert (about["arch"], about["dataset"], about["class_names"]) == ("mine", "squares", ["a", "b", "c"])
    again = new_run()
    again.load(checkpoint.load(Path("it"))[0])
    assert again.finished and again.history == run.history
    killed = new_run()
    killed.load(checkpoint.load(Path("it/last.previous.npz"))[0])
    fit(killed, run_folder.RunFolder(Path("it")), quiet=True)
    epochs = [line.partition(",")[0] for line in Path("it/metrics.csv").read_text().splitlines()]
    assert epochs == ["epoch", "1", "2"], "the second, which was done again, is there once"
    with pytest.raises(UsageError, match='^the data is that of a program, which must give it: see "Your own" in docs/guide.md$'):
        data.load(data.OWN)


def test_commands_on_data_that_they_do_not_know(folder):
    pytest.importorskip("PIL.Image", reason="pictures: pip install 'minidl[plot]'").new("RGB", (40, 40)).save(folder / "it.png")
    pytest.importorskip("onnx", reason="pip install 'minidl[interchange]'")
    state = Sequential(classifier=Linear(12, 2)).initialize().state_dict()
    mine = Dataset.of("squares", np.arange(24, dtype=np.uint8).reshape(2, 3, 2, 2), [0, 1], "ab")
    weights.save(folder / "it.npz", state, weights.describe("flat", 2, {}, mine))
    arch = "--arch", "nets.py:flat"
    message = "the network does not take images (C, H, W) = (3, 32, 32): classifier: Linear: 12 input features are needed, got "
    for arguments in (("predict", "it.npz", "it.png"), ("export", "it.npz", "--to", "onnx")):
        assert_refused(minidl(folder, *arguments, *arch), 2, message)
    assert_refused(minidl(folder, "eval", "it.npz", *arch), 2, "it.npz was trained on squares, the data of a program, ")


# ---- weights to begin with ---------------------------------------------------------------------------------------


def test_weights_to_begin_with(folder):
    arch = "--arch", "nets.py:tiny"
    assert minidl(folder, *TRAIN, *arch, "-o", "it").returncode == 0
    still = [*TRAIN, *arch, "--lr", "0", "--init", "it", "--ema", "0.9"]
    same = minidl(folder, *still, "-o", "same")
    assert same.returncode == 0 and f"\nbegins with the weights of {folder}/it\n" in same.stdout, same.stderr
    before, after = (weights.load(folder / name)[0] for name in ("it", "same"))
    learned = [name for name in before if "running" not in name]
    assert all(np.array_equal(before[name], after[name]) for name in learned)
    assert f'init = "{folder}/it"' in (folder / "same" / "config.toml").read_text()
    # A head of its own, for other classes; and the run goes on without what it began with.
    state = {name: array for name, array in before.items() if "classifier" not in name}
    weights.save(folder / "body.npz", {**state, "classifier.weight": np.zeros((3, 4), np.float32)})
    part = minidl(folder, *TRAIN, *arch, "--lr", "0", "--init", "body.npz", "-o", "part")
    assert f"begins with the weights of {folder}/body.npz, but for classifier.weight, classifier.bias\n" in part.stdout
    (folder / "body.npz").unlink()
    after = weights.load(folder / "part")[0]
    assert np.array_equal(before["conv.weight"], after["conv.weight"])
    assert not np.array_equal(before["classifier.weight"], after["classifier.weight"])
    resumed = minidl(folder, "train", "--resume", "part", *arch, "--epochs", "2", "--override")
    assert resumed.returncode == 0 and "begins with" not in resumed.stdout, resumed.stderr


def test_weights_of_which_none_fits(folder):
    weights.save(folder / "other.npz", {"a": np.zeros(3, np.float32)})
    result = minidl(folder, *TRAIN, "--arch", "wrn-10-1", "--init", "other.npz", "-o", "it")
    assert_refused(result, CheckpointError.exit_code, "none of the weights to begin with fits the network")
    assert not (folder / "it").exists()
