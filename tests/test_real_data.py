"""The genuine CIFAR-100, where MINIDL_TEST_CIFAR100 names a folder with its unpacked files in both editions."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from minidl.data import cifar

FOLDER = os.environ.get("MINIDL_TEST_CIFAR100")
pytestmark = pytest.mark.skipif(not FOLDER, reason="MINIDL_TEST_CIFAR100 names no folder with the genuine files")


@pytest.fixture(scope="module", params=cifar.CIFAR100.editions, ids=lambda edition: edition.folder)
def train_and_test(request):
    return cifar.load(cifar.CIFAR100, [Path(FOLDER, request.param.folder)])


def md5(array):
    return hashlib.md5(array).hexdigest()


def test_images_and_labels(train_and_test):
    """The digests are those of what `pickle` reads from the python edition, whose files have the published md5s."""
    train, test = train_and_test
    assert md5(train.images) == "e07b6859dfcb4ef6850fbc815e123615"
    assert md5(test.images) == "155ad486d683899b65629b069dab09ba"
    assert md5(train.labels) == "6361656b619fac5f6d45593353ac4126"
    assert md5(test.labels) == "416d7068e97d9e7847c2a86db4e33807"


def test_classes(train_and_test):
    train, test = train_and_test
    assert train.classes == test.classes
    assert train.classes[0] == "apple" and train.classes[99] == "worm" and len(set(train.classes)) == 100
    assert (np.bincount(train.labels, minlength=100) == 500).all()
    assert (np.bincount(test.labels, minlength=100) == 100).all()


def test_mean_and_std(train_and_test):
    train, _ = train_and_test
    chunks = np.split(train.images, 100)  # 1.2 GB as float64 if it were one
    mean = np.mean([(chunk / 255).mean((0, 2, 3)) for chunk in chunks], axis=0)
    square = np.mean([((chunk / 255) ** 2).mean((0, 2, 3)) for chunk in chunks], axis=0)
    assert tuple(mean.round(4)) == train.mean
    assert tuple(np.sqrt(square - mean**2).round(4)) == train.std
