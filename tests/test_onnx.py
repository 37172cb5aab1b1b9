"""ONNX: the exported graphs are valid, and another runtime computes minidl's logits with them."""

import json

import numpy as np
import pytest

import models
from minidl import initializers, optim, weights
from minidl.commands import gradcheck
from minidl.data.batches import Batches
from minidl.data.dataset import Dataset
from minidl.errors import CheckpointError, UsageError
from minidl.layer import Composition, Parameter
from minidl.layers import (AvgPool2d, BatchNorm2d, Conv2d, Dropout, Flatten, GlobalMaxPool2d, Linear, MaxPool2d, ReLU, Residual,
                           Sequential, ZeroPadChannels)
from minidl.onnx_export import WRITERS, export
from minidl.training import Batch, Trainer
from reference import assert_close

onnx = pytest.importorskip("onnx", reason="the check of graphs needs it: pip install 'minidl[interchange]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="another runtime is needed: pip install onnxruntime")

NETWORKS = [  # a small member of each family, in all its forms
    ("simplenet-310k", {}), ("simplenet-310k", dict(form="caffe")), ("simplenet-310k", dict(extra_pool=True)),
    ("simplenet-310k", dict(form="caffe", dropout="elements", rate=0.2)), ("simplenet-310k", dict(rate=0.1)),
    *(("resnext29-2x4d", dict(shortcut=shortcut)) for shortcut in "ABC"),
    *(("res2next29-2c4w3s", dict(form=form)) for form in "AB"),
    ("wrn-10-1", {}), ("wrn-10-1", dict(dropout=0.3)),
    ("report-resnext3", {}), ("report-resnext3-fixed", {}), ("report-resnext3-flatten", {}),
]


def trained(network, rng, shape=(3, 32, 32), classes=10, steps=3):
    """The network after a few steps of training, so that no statistic is what it was at first."""
    network.initialize(seed=1)
    images = rng.integers(0, 256, (16, *shape), dtype=np.uint8)
    labels = rng.integers(0, classes, 16).astype(np.int32)
    noise = Dataset("noise", images, labels, tuple(map(str, range(classes))), (0.5,) * 3, (0.29,) * 3)
    batches = Batches(noise, network.device, network.dtype, 8, seed=0)
    trainer = Trainer(network, optim.SGD(network.parameters), batches)
    network.train()
    for _ in range(steps):
        trainer.step(Batch(network.device.array(rng.permutation(16)[:8].astype(np.int32)), 0.01))
    return network.eval()


def run(path, images):
    """images (C, H, W, N) -> logits (classes, N) of the file."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"images": np.ascontiguousarray(images.transpose(3, 0, 1, 2))})
    return logits.T


@pytest.mark.parametrize("name, options", NETWORKS, ids=lambda value: str(value))
def test_logits_are_minidls(tmp_path, rng, name, options):
    network = trained(models.create(name, 10, **options), rng)
    metadata = weights.describe(name, 10, options)
    export(network, tmp_path / "it.onnx", (3, 32, 32), metadata)
    model = onnx.load(tmp_path / "it.onnx")
    onnx.checker.check_model(model, full_check=True)
    for batch in (1, 3):
        images = rng.normal(size=(3, 32, 32, batch)).astype(np.float32)
        assert_close(run(tmp_path / "it.onnx", images), network.forward(images), 1e-5, f"batch {batch}")
    state = network.state_dict()
    arrays = {array.name: onnx.numpy_helper.to_array(array) for array in model.graph.initializer}
    assert all(np.array_equal(arrays[name], array) for name, array in state.items())
    assert all(name.endswith(".pads") for name in arrays.keys() - state.keys())
    assert (model.producer_name, model.opset_import[0].version) == ("minidl", 17)
    assert {entry.key: entry.value for entry in model.metadata_props} == {
        name: value if isinstance(value, str) else json.dumps(value) for name, value in metadata.items()}


def test_networks_of_ones_own(tmp_path, rng):
    """What no architecture has: padded and overlapping pools, oblong windows, bare sums, float64, a pool at the end."""
    network = Sequential(
        Conv2d(3, 8, (3, 1), stride=2, padding=1), BatchNorm2d(8, eps=1e-3), MaxPool2d(3, stride=2, padding=1),
        Residual(Sequential(ReLU(), Conv2d(8, 8, 1, groups=2, bias=False))), AvgPool2d((2, 3), stride=1, padding=1),
        GlobalMaxPool2d()).initialize(dtype="float64", seed=1)
    network.train().forward(rng.normal(2, 3, (3, 21, 18, 5)))
    images = rng.normal(size=(3, 21, 18, 4))
    export(network.eval(), tmp_path / "it.onnx", (3, 21, 18))
    onnx.checker.check_model(str(tmp_path / "it.onnx"), full_check=True)
    assert_close(run(tmp_path / "it.onnx", images.astype(np.float32)), network.forward(images).reshape(8, 4), 1e-5)


@pytest.mark.parametrize("layer, shape", [(Linear(12, 5), (3, 2, 2)), (ReLU(), (3, 2, 2)), (Flatten(), (3, 2, 2))])
def test_a_layer_is_a_network_too(tmp_path, rng, layer, shape):
    images = rng.normal(size=(*shape, 2)).astype(np.float32)
    export(layer.initialize().eval(), tmp_path / "it.onnx", shape)
    assert_close(run(tmp_path / "it.onnx", images), layer.forward(images).reshape(-1, 2), 1e-5)


def test_what_may_follow_features(tmp_path, rng):
    network = Sequential(Linear(12, 4), ZeroPadChannels(6), Residual(Linear(6, 6)), ReLU(), Dropout(0.5), ZeroPadChannels(7))
    images = rng.normal(size=(3, 2, 2, 5)).astype(np.float32)
    export(network.initialize().eval(), tmp_path / "it.onnx", (3, 2, 2))
    onnx.checker.check_model(str(tmp_path / "it.onnx"), full_check=True)
    assert_close(run(tmp_path / "it.onnx", images), network.forward(images), 1e-5)


def test_every_layer_has_a_form():
    made = [case.make() for cases in gradcheck.CASES.values() for case in cases]
    assert WRITERS.keys() == {type(layer) for layer in made if not isinstance(layer, Composition)}


def test_a_layer_that_onnx_does_not_know(tmp_path):
    class Doubling(ReLU):
        def forward(self, x):
            return super().forward(2 * x)

    network = Sequential(body=Sequential(ReLU(), Doubling())).initialize()
    with pytest.raises(UsageError, match="^body.1: Doubling is a layer without a form in ONNX$"):
        export(network, tmp_path / "it.onnx", (3, 4, 4))
    assert not list(tmp_path.iterdir())


def test_a_composition_that_computes_with_a_parameter(tmp_path):
    """Its trace can only tell of its parts."""
    block = Residual(ReLU())
    block.scale = Parameter((1,), initializers.ones)
    with pytest.raises(UsageError, match="^block: Residual has parameters besides those of its parts, and no form in ONNX$"):
        export(Sequential(block=block).initialize(), tmp_path / "it.onnx", (3, 4, 4))
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written(tmp_path):
    with pytest.raises(CheckpointError, match="no.it.onnx cannot be written: No such file or directory$"):
        export(ReLU().initialize(), tmp_path / "no" / "it.onnx", (3, 4, 4))
