"""python -m minidl eval: against brute force, against what training printed, and what it refuses."""

import argparse
import csv
import dataclasses
import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import models
from minidl import data, signals, weights
from minidl.commands import evaluate, trained
from minidl.data.dataset import Dataset
from minidl.device import select
from minidl.errors import CheckpointError, UsageError
from minidl.evaluation import Evaluation, outputs, probabilities_of
from minidl.layer import Layer
from minidl.ops import loss
from minidl.settings import resolve
from models import recipes

ROOT = Path(__file__).parent.parent
ARCH = "report-resnext3-fixed"
TEST_SET = data.load("digits")[1]
FEW = dataclasses.replace(TEST_SET, images=TEST_SET.images[:50], labels=TEST_SET.labels[:50])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a short run, as its user gets it."""
    folder = tmp_path_factory.mktemp("run")
    arguments = "--arch wrn-10-1 --device cpu --dataset digits --limit-train-batches 60 --epochs 1 -o it".split()
    result = subprocess.run([sys.executable, ROOT / "train.py", *arguments], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder / "it"


@pytest.fixture(scope="module")
def state():
    """Of a report-resnext3-fixed that tells images apart, though not as one should: normalized for digits, logits spread."""
    network = models.create(ARCH, 10).initialize(seed=1)
    x = np.ascontiguousarray((FEW.images / 255 - 0.3).transpose(1, 2, 3, 0) / 0.4, np.float32)
    for _ in range(20):
        network.forward(x)
    state = network.state_dict()
    logits = network.eval().forward(x)
    spread = 1 / logits.std(axis=1)
    return {**state, "classifier.weight": state["classifier.weight"] * spread[:, None],
            "classifier.bias": (state["classifier.bias"] - logits.mean(axis=1)) * spread}


@pytest.fixture
def write(tmp_path, state):
    """write(**changes) writes tmp_path/it.npz, with changed metadata, and returns its path."""
    def write(state=state, **changes):
        weights.save(tmp_path / "it.npz", state, {**weights.describe(ARCH, 10, {}, TEST_SET), **changes})
        return tmp_path / "it.npz"

    return write


def call(*arguments):
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    evaluate.main(parser.parse_args([*map(str, arguments), "--device", "cpu"]))


def called(capsys, *arguments):
    """What it prints with --json."""
    call(*arguments, "--json")
    return json.loads(capsys.readouterr().out)


# ---- the numbers -------------------------------------------------------------------------------------------------


def test_it_is_what_training_printed(run):
    result = subprocess.run([sys.executable, "-m", "minidl", "eval", run, "--json", "--device", "cpu", "--batch-size", "16"],
                            capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    found = json.loads(result.stdout)
    with (run / "metrics.csv").open(newline="") as file:
        last = list(csv.DictReader(file))[-1]
    assert [f"{found[name]:.5f}" for name in ("top1", "top5")] == [last["test_top1"], last["test_top5"]]
    assert found["loss"] == pytest.approx(float(last["test_loss"]), abs=1e-5)
    assert 0.15 < found["top1"] < 1, "it has learned something, and not all"
    assert (found["arch"], found["dataset"], found["images"]) == ("wrn-10-1", "digits", 360)
    confusion = np.array(found["confusion"])
    assert list(confusion.sum(axis=1)) == list(np.bincount(TEST_SET.labels)) and found["groups"] == list("0123456789")
    assert np.trace(confusion) == round(360 * found["top1"])
    assert list(found["per_class"].values()) == pytest.approx(list(np.diag(confusion) / confusion.sum(axis=1)))


def brute_force(logits, labels):
    """For each image: its loss, and the place of its label among the classes in the order of falling logits."""
    losses, ranks = [], []
    for column, label in zip(logits.T.tolist(), labels):
        losses.append(math.log(sum(math.exp(logit - column[label]) for logit in column)))
        ranks.append(sorted(range(len(column)), key=lambda k: (-column[k], k)).index(label))
    return losses, ranks


def made_up(count, ties):
    """Logits of 7 classes in 3 superclasses, and the data that they are of; the last class has no image."""
    rng = np.random.default_rng(0)
    logits = (rng.integers(-2, 3, (7, count)) if ties else rng.normal(0, 3, (7, count))).astype(np.float32)
    names = tuple("abcdefg")
    dataset = Dataset("made up", np.zeros((count, 3, 1, 1), np.uint8), rng.integers(0, 6, count).astype(np.int32), names,
                      (0.5,) * 3, (0.5,) * 3, ("x", "y", "z"), (0, 0, 1, 1, 2, 2, 2))
    return logits, dataset


@pytest.mark.parametrize("ties", [False, True])
def test_numbers_against_brute_force(ties):
    logits, dataset = made_up(200, ties)
    found = Evaluation.of(logits, dataset)
    losses, ranks = brute_force(logits, dataset.labels)
    assert found.loss == pytest.approx(np.mean(losses), rel=1e-12)
    assert found.top1 == np.mean([rank == 0 for rank in ranks]) and found.top5 == np.mean([rank < 5 for rank in ranks])
    for k, accuracy in enumerate(found.accuracies):
        hits = [rank == 0 for rank, label in zip(ranks, dataset.labels) if label == k]
        assert accuracy == np.mean(hits) if hits else math.isnan(accuracy)
    confusion = np.zeros((3, 3))
    for column, label in zip(logits.T.tolist(), dataset.labels):
        confusion[dataset.superclass_of[label], dataset.superclass_of[column.index(max(column))]] += 1
    np.testing.assert_array_equal(found.confusion, confusion)
    assert found.groups == ("x", "y", "z") and math.isnan(found.accuracies[6])


@pytest.mark.parametrize("ties", [False, True])
def test_numbers_against_the_kernel_of_training(ties):
    logits, dataset = made_up(200, ties)
    totals, one = np.zeros(4), np.ones(1, np.float32)
    loss.forward_backward(logits, dataset.labels, totals, one)
    found = Evaluation.of(logits, dataset)
    assert list(totals[1:3] / 200) == [found.top1, found.top5] and totals[0] / 200 == pytest.approx(found.loss, rel=1e-5)


def test_huge_logits():
    logits, dataset = made_up(200, False)
    assert Evaluation.of(logits * 1e4, dataset).loss == pytest.approx(
        np.mean((logits.max(axis=0) - logits[dataset.labels, np.arange(200)]).astype(float)) * 1e4, rel=1e-5)


def test_images_are_normalized_as_in_training(write):
    """By what the file says, whatever the data set says today."""
    place = select("cpu")
    path = write(mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
    network = trained.network_with(*trained.load(str(path)), place)
    changed = dataclasses.replace(FEW, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    logits = outputs(network, changed, 16, "it")
    x = (FEW.images / 255 - np.reshape((0.1, 0.2, 0.3), (3, 1, 1))) / np.reshape((0.4, 0.5, 0.6), (3, 1, 1))
    expected = network.forward(np.ascontiguousarray(x.transpose(1, 2, 3, 0), np.float32))
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-5)


def test_the_command_takes_the_normalization_of_the_file(write, capsys):
    first = called(capsys, write())["loss"]
    assert called(capsys, write(mean=[0.9] * 3, std=[0.1] * 3))["loss"] != pytest.approx(first, rel=1e-3)
    assert called(capsys, write(mean=None, std=None))["loss"] == first, "that of the data set, where the file has none"


def test_data_is_looked_for_where_the_run_found_it(tmp_path, state, monkeypatch):
    weights.save(tmp_path / "last.npz", state, weights.describe(ARCH, 10, {}, TEST_SET))
    asked = []
    monkeypatch.setattr(data, "load", lambda name, data_dir: (asked.append(data_dir), (None, FEW))[1])

    def config(dataset, **given):
        settings = resolve({"arch": ARCH, "dataset": dataset, **given}, recipes.recipe("fast", ARCH, dataset))
        (tmp_path / "config.toml").write_text(settings.as_toml())

    call(tmp_path)
    config("digits")
    call(tmp_path)
    config("digits", data_dir=str(tmp_path))
    call(tmp_path)
    call(tmp_path, "--data-dir", "elsewhere")
    config("digits", data_dir=str(tmp_path / "gone"))
    call(tmp_path)
    config("cifar10", data_dir=str(tmp_path))
    call(tmp_path)
    assert asked == [None, None, str(tmp_path), "elsewhere", None, None]


@pytest.mark.parametrize("batch_size", [7, 360, 100_000])
def test_the_batch_size_changes_nothing(write, capsys, batch_size):
    found = called(capsys, write(), "--batch-size", batch_size)
    expected = called(capsys, write())
    assert found["confusion"] == expected["confusion"] and found["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_text(write, capsys):
    found = called(capsys, write())
    call(write())
    text = capsys.readouterr().out
    assert text.startswith(f"{ARCH} on the 360 test images of digits\n\ntop-1 {found['top1']:.2%}, top-5 {found['top5']:.2%}, "
                           f"loss {found['loss']:.3f}\n")
    _, _, extremes, groups = text.split("\n\n")
    assert len(extremes.splitlines()) == 6 and len(groups.splitlines()) == 11
    best, worst = (max, min)
    for choose, line in (best, extremes.splitlines()[1].split()[:2]), (worst, extremes.splitlines()[1].split()[2:]):
        assert line[1] == f"{choose(found['per_class'].values()):.1%}" == f"{found['per_class'][line[0]]:.1%}"
    confusion = np.array(found["confusion"])
    for k, line in enumerate(groups.splitlines()[1:]):
        name, recognized, other, share = line.split()
        row = confusion[k] / confusion[k].sum()
        assert (name, recognized) == (str(k), f"{row[k]:.1%}")
        assert share == f"{np.delete(row, k).max():.1%}" == f"{row[int(other)]:.1%}" and int(other) != k


def test_superclasses_are_shown():
    text = Evaluation.of(*made_up(200, False)).as_text()
    assert "superclass  recognized  most often taken for\n" in text and "\ng " not in text


def test_picture(write, tmp_path):
    pytest.importorskip("matplotlib", reason="pictures need it: pip install 'minidl[plot]'")
    call(write(), "--picture", tmp_path / "it.png")
    assert (tmp_path / "it.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UsageError, match="it.png exists: name another with --picture"):
        call(write(), "--picture", tmp_path / "it.png")


# ---- what is refused ---------------------------------------------------------------------------------------------


REFUSED = {
    "class_names": (dict(class_names=list("abcdefghij")), [], UsageError,
                    "10 classes that .*it.npz knows are not the 10 of digits"),
    "classes": (dict(classes=11, class_names=None), [], UsageError, "the 11 classes that .*it.npz knows are not the 10"),
    "no data": (dict(dataset=None), [], UsageError, "does not say what data it was trained on: name a data set with --dataset"),
    "unknown data": (dict(dataset="mnist"), [], UsageError, "was trained on mnist, the data of a program, which must give it"),
    "unknown network": (dict(arch="resnxt"), [], UsageError, "unknown architecture 'resnxt'"),
    "other network": (dict(arch="wrn-10-1"), [], CheckpointError, "the weights do not fit this network"),
    "options": (dict(options={"x": 1}), [], UsageError, "unknown model option 'x'"),
    "device": ({}, ["--device", "tpu"], UsageError, "device 'tpu' is not one of"),
    "suffix": ({}, ["--picture", "it.bmp"], UsageError, "it.bmp: a picture is one of"),
    **{f"{key} {value}": ({key: value}, [], CheckpointError, "its mean, std or class_names cannot be those of a data set")
       for key, value in [("mean", [1, 2]), ("mean", ["a", 1, 2]), ("std", [1, 0, 1]), ("std", [math.nan] * 3),
                          ("std", [1e9] * 3), ("mean", [10**400] * 3), ("class_names", ["a"]), ("class_names", [1] * 10)]},
}


@pytest.mark.parametrize("changes, arguments, error, message", REFUSED.values(), ids=REFUSED)
def test_refused(write, changes, arguments, error, message):
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    with pytest.raises(error, match=message):
        evaluate.main(parser.parse_args([str(write(**changes)), "--device", "cpu", *arguments]))


def test_a_file_that_does_not_name_its_network(tmp_path, state):
    weights.save(tmp_path / "it.npz", state)
    with pytest.raises(CheckpointError, match="it.npz does not say which network its weights belong to: `minidl import FILE --arch NAME`"):
        call(tmp_path / "it.npz")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(write, state, value):
    broken = {**state, "classifier.bias": np.full(10, value, np.float32)}
    with pytest.raises(CheckpointError, match="it.npz: this network computes numbers that are not finite"):
        call(write(broken))


def test_as_a_process(tmp_path):
    result = subprocess.run([sys.executable, "-m", "minidl", "eval", tmp_path / "nothing"], capture_output=True, text=True)
    assert result.returncode == CheckpointError.exit_code and result.stdout == ""
    assert result.stderr == f"error: {tmp_path / 'nothing'} cannot be read: No such file or directory\n"


def test_a_small_file_that_names_a_large_network_takes_no_memory(write, monkeypatch):
    monkeypatch.setattr(Layer, "initialize", lambda *_: pytest.fail("memory was taken"))
    path = write(arch="wrn-28-20", classes=100)
    with pytest.raises(CheckpointError, match="the weights do not fit this network:\nconv1.weight: missing in the file\n"):
        trained.network_with(*weights.load(path))


def test_ctrl_c(write, monkeypatch):
    """Between two batches."""
    network = trained.network_with(*trained.load(str(write())))
    monkeypatch.setattr(signals, "_asked", [signal.SIGINT])
    with pytest.raises(signals.Stop):
        outputs(network, FEW, 8, "it")


def test_probabilities_of_large_logits():
    """Whose exponentials are beyond float64."""
    shares = probabilities_of(np.array([[1000, -1000], [999, -999]], np.float32))
    assert np.allclose(shares, [[0.7310585786, 0.2689414214], [0.2689414214, 0.7310585786]], rtol=1e-9)


def test_predictions_of_each_image(write, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "load", lambda *_: (None, FEW))
    call(write(), "--predictions", tmp_path / "it.csv")
    with (tmp_path / "it.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    logits = outputs(trained.network_with(*trained.load(str(tmp_path / "it.npz"))), FEW, 64, "it").astype(float)
    shares = np.exp(logits) / np.exp(logits).sum(axis=0)
    assert [row["image"] for row in found] == [str(number) for number in range(len(FEW.labels))]
    assert [row["class"] for row in found] == [FEW.classes[label] for label in FEW.labels]
    assert [row["predicted"] for row in found] == [FEW.classes[index] for index in logits.argmax(axis=0)]
    np.testing.assert_allclose([float(row["probability"]) for row in found], shares.max(axis=0), atol=1e-5)
    with pytest.raises(UsageError, match="it.csv exists: name another with --predictions"):
        call(tmp_path / "it.npz", "--predictions", tmp_path / "it.csv")
