"""python -m minidl data: what it says of the files, the counts, and the picture."""

import argparse
import json
import os
from pathlib import Path

import numpy as np
import pytest

from minidl import data
from minidl.commands import data as command
from minidl.data import cifar
from minidl.errors import DataError, UsageError
from test_data import BINARY, PYTHON, TEST, TRAIN, Copy, md5, offline  # noqa: F401, a fixture of all tests here too

GENUINE = os.environ.get("MINIDL_TEST_CIFAR100")


def run(*arguments):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    command.main(parser.parse_args([str(argument) for argument in arguments]))


@pytest.fixture
def copy(monkeypatch):
    """A small data set that commands take for CIFAR-100, as far as its files have been packed."""
    it = Copy(cifar.CIFAR100)
    monkeypatch.setitem(data.CIFARS, "cifar100", it.cifar)
    return it


def test_digits(capsys):
    run("--dataset", "digits")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(Path(data.__file__).parent)
    assert lines[1].split() == ["digits.csv.gz", "57,523", "bytes", "md5", "9b335364a7bfd63947c7480a5bd51f2d", "ok"]
    assert lines[3] == "digits: 1,437 training and 360 test images of 3x32x32, 10 classes"
    assert [line.split() for line in lines[4:7]] == [["class", "training", "test"], ["0", "136", "42"], ["1", "154", "28"]]
    assert len(lines) == 15


def test_unpacked_files(copy, tmp_path, capsys):
    place = copy.unpack(tmp_path, BINARY)
    run("--data-dir", tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(place)
    for line, (name, raw) in zip(lines[1:5], copy.files[BINARY.folder].items(), strict=True):
        assert line.split() == [name, f"{len(raw):,}", "bytes", "md5", md5(raw), "ok"]
    assert lines[6] == "cifar100: 100 training and 10 test images of 3x32x32, 100 classes in 20 superclasses"
    assert lines[-20].split() == "group 0 class 0, class 1, class 2, class 3, class 4".split()


def test_archive_and_json(copy, tmp_path, monkeypatch, capsys):
    path = copy.pack(tmp_path, PYTHON)
    monkeypatch.setitem(data.CIFARS, "cifar100", copy.cifar)
    run("--data-dir", tmp_path, "--json")
    out, err = capsys.readouterr()
    said = json.loads(out)
    assert err == "" and said["dataset"] == "cifar100" and said["shape"] == [3, 32, 32]
    assert said["files"] == [{"path": str(path), "bytes": path.stat().st_size, "md5": md5(path.read_bytes())}]
    for label, row in enumerate(said["classes"]):
        assert row["name"] == f"class_{label}" and row["superclass"] == f"group_{label // 5}"
        assert row["train"] == 1 and row["test"] == np.count_nonzero(copy.labels[TRAIN:] == label)
    assert sum(row["test"] for row in said["classes"]) == TEST


def test_file_that_is_not_the_official_one(copy, tmp_path, capsys):
    """Which file, which md5s; what can be said before is said."""
    path = copy.unpack(tmp_path, BINARY) / "train.bin"
    raw = bytearray(path.read_bytes())
    raw[5000] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DataError) as caught:
        run("--data-dir", tmp_path)
    assert str(caught.value) == f"{path}: md5 {md5(raw)}, expected {md5(copy.files[BINARY.folder]['train.bin'])}"
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[1:]] == ["differs", "ok", "ok", "ok"]


def test_missing_data(copy, tmp_path):
    with pytest.raises(DataError, match="CIFAR-100 was not found"):
        run("--data-dir", tmp_path)


def test_picture(copy, tmp_path, capsys):
    """One image of each class of CIFAR-100, its superclass beside it; ten of each digit, a column for each."""
    pytest.importorskip("matplotlib")
    copy.unpack(tmp_path, BINARY)
    run("--data-dir", tmp_path, "--picture", tmp_path / "100.png")
    assert capsys.readouterr().out.splitlines()[-1] == f"picture: {tmp_path / '100.png'}"
    assert (tmp_path / "100.png").read_bytes().startswith(b"\x89PNG")

    train, _ = cifar.load(data.CIFARS["cifar100"], [tmp_path])
    drawn(command.draw(train, tmp_path / "again.png"), train, [f"class {label}" for label in range(100)])
    digits, _ = data.load("digits")
    drawn(command.draw(digits, tmp_path / "digits.png"), digits, list("0123456789") * 10)


def drawn(figure, dataset, titles):
    """The figure shows images of the data set, no one twice, each over the name of its class."""
    [axes] = figure.axes
    names = dict(enumerate(dataset.classes))
    by_pixels = {image.tobytes(): names[label].replace("_", " ") for image, label in zip(dataset.images, dataset.labels)}
    images = [np.ascontiguousarray(np.moveaxis(image.get_array(), 2, 0)).tobytes() for image in axes.images]
    assert [text.get_text() for text in axes.texts] == titles == [by_pixels[pixels] for pixels in images]
    assert len(set(images)) == len(images)


@pytest.mark.parametrize("name, message", [("there.png", "there.png exists: name another with --picture"),
                                           ("a.bmp", "a.bmp: a picture is one of")])
def test_picture_that_cannot_be_written(name, message, tmp_path):
    """It is said before anything is downloaded."""
    pytest.importorskip("matplotlib")
    (tmp_path / "there.png").touch()
    with pytest.raises(UsageError, match=message):
        run("--data-dir", tmp_path, "--picture", tmp_path / name)


@pytest.mark.skipif(not GENUINE, reason="MINIDL_TEST_CIFAR100 names no folder with the genuine files")
@pytest.mark.parametrize("edition", cifar.CIFAR100.editions, ids=lambda edition: edition.folder)
def test_genuine_files(edition, capsys):
    run("--data-dir", Path(GENUINE, edition.folder))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[1:1 + len(edition.files)]] == ["ok"] * len(edition.files)
    assert "of each class 500 training and 100 test images" in lines
    assert "people                          baby, boy, girl, man, woman" in lines
    assert lines[-1] == "vehicles 2                      lawn mower, rocket, streetcar, tank, tractor"
