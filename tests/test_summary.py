"""What a network costs, computed from its layers, against what its layers really keep."""

import json
import subprocess
import sys

import numpy as np
import pytest

import models
from minidl import device, initializers, inspection, summary
from minidl.commands.gradcheck import CASES
from minidl.layer import Parameter
from minidl.layers import BatchNorm2d, Conv2d, Dropout, Flatten, Linear, ReLU, Residual, Sequential
from minidl.ops import chunks, conv, conv_product, winograd
from models import listing

NETWORKS = [
    ("simplenet-310k", {}), ("simplenet-310k", dict(form="caffe", dropout="elements")), ("simplenet-310k", dict(rate=0.1)),
    ("resnext29-2x4d", {}), ("resnext29-2x4d", dict(shortcut="A")), ("resnext29-2x4d", dict(shortcut="C")),
    ("res2next29-2c4w4s", {}), ("res2next29-2c4w3s", dict(form="B")), ("res2next29-2c4w1s", {}),
    ("wrn-10-1", {}), ("wrn-16-1", dict(dropout=0.3)), ("report-resnext1", {}), ("report-resnext3-flatten", {}),
]


def kept_bytes(network):
    """Of all arrays that wait for backward, each once."""
    arrays = {(array.__array_interface__["data"][0], array.nbytes) for _, layer in network.named_layers()
              for array in layer._saved or () if isinstance(array, np.ndarray)}
    return sum(size for _, size in arrays)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name, options", NETWORKS, ids=str)
def test_memory_is_what_the_layers_keep(name, options, dtype):
    network = models.create(name, 10, **options)
    computed = summary.summarize(network, batch_size=3, dtype=dtype)
    network.initialize(dtype=dtype).forward(np.zeros((3, 32, 32, 3), network.dtype))
    assert kept_bytes(network) == computed.activation_bytes


@pytest.mark.parametrize("name", CASES)
def test_memory_is_what_each_layer_keeps(name):
    """Those that no architecture has, too."""
    case = CASES[name][0]
    layer = case.make().initialize()
    layer.forward(np.zeros(case.shape, np.float32))
    assert kept_bytes(layer) == summary.summarize(layer, case.shape[:-1], batch_size=case.shape[-1]).activation_bytes


def test_features_that_flatten_gives_are_the_memory_of_the_image():
    network = Sequential(ReLU(), Flatten(), Linear(12, 3), Flatten()).initialize()
    network.forward(np.zeros((3, 2, 2, 5), np.float32))
    assert kept_bytes(network) == summary.summarize(network, (3, 2, 2), batch_size=5).activation_bytes == 4 * 12 * 5


def test_a_part_that_begins_with_dropout_keeps_no_input(rng):
    """Its forward is over when it is told how its input is made again."""
    conv = Conv2d(3, 2, 1)
    network = Sequential(BatchNorm2d(3), Residual(Sequential(Sequential(Dropout(0.3)), conv), Conv2d(3, 2, 1))).initialize()
    seen = []
    with inspection.watch(network, lambda name, layer, kind, call, x, **more: seen.append(x) or call(x, **more)):
        network.forward(rng.normal(size=(3, 4, 4, 2)).astype(np.float32))
    (again,) = conv._saved
    assert np.array_equal(again(), seen[-1])
    assert kept_bytes(network) == summary.summarize(network, (3, 4, 4), batch_size=2).activation_bytes


@pytest.mark.parametrize("name, options", NETWORKS, ids=str)
def test_totals(name, options):
    network = models.create(name, **options)
    costs = summary.summarize(network, batch_size=7)
    assert costs.parameters == sum(parameter.size for parameter in network.named_parameters().values())
    assert costs.macs == network.macs((3, 32, 32)) == sum(row.macs for row in costs.rows)
    assert costs.workspace_bytes == max(row.workspace_bytes for row in costs.rows)
    assert costs.rows[-1].output_shape[0] == 100
    leaves = [name for name, layer in network.named_layers() if not layer.children()]
    assert sorted(row.name for row in costs.rows) == sorted(leaves)


def test_parameters_of_a_composition_count():
    part = Residual(Conv2d(3, 3, 1))
    part.scale = Parameter((1,), initializers.ones)
    assert summary.summarize(Sequential(part), (3, 4, 4)).parameters == 3 * 3 + 3 + 1


@pytest.mark.parametrize("threads", [1, 2, 16])
def test_workspace_is_the_memory_of_cols(monkeypatch, threads):
    """The most that is unfolded at a time."""
    monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
    monkeypatch.setattr(conv, "WINOGRAD_CHANNELS", {"numpy": 1000})
    network = models.create("wrn-10-1").initialize()
    asked = []

    def empty(shape, dtype, like):
        if len(shape) == 3:  # not a packed weight
            asked.append(int(np.prod(shape)) * np.dtype(dtype).itemsize)
        return device.empty(shape, dtype, like)

    monkeypatch.setattr(conv_product, "empty", empty)
    network.forward(np.zeros((3, 32, 32, 64), np.float32))
    assert max(asked) == summary.summarize(network, batch_size=64).workspace_bytes


def test_workspace_of_winograd_is_the_memory_of_v_and_m(monkeypatch):
    monkeypatch.setattr(chunks, "WORKSPACE_BYTES", {"numpy": 64 << 20})  # more than what is unfolded elsewhere
    network = models.create("simplenet-310k").initialize()
    made = []

    def empty(shape, dtype, like):
        made.append(device.empty(shape, dtype, like))
        return made[-1]

    monkeypatch.setattr(winograd, "empty", empty)
    network.forward(np.zeros((3, 32, 32, 64), np.float32))
    both = [v.nbytes + m.nbytes for v, m in zip(made, made[1:]) if v.ndim == m.ndim == 4]
    assert max(both) == summary.summarize(network, batch_size=64).workspace_bytes


def test_table_lines_up():
    lines = summary.table(summary.summarize(models.create("simplenet-310k"))).splitlines()
    assert lines[0].split() == ["layer", "type", "output", "parameters", "MACs", "kept", "for", "backward", "workspace"]
    assert len({len(line) for line in lines}) == 1 and lines[-1].startswith("total")
    assert "318,212" in lines[-1] and "55,793,920" in lines[-1]


def test_list_has_every_architecture():
    text = listing.table()
    for name in models.REGISTRY:
        assert f"\n{name} " in text
    row = next(line for line in text.splitlines() if line.startswith("wrn-28-10 "))
    assert row.split("  ")[0] == "wrn-28-10" and "36,536,884" in row and "5,243,386,368" in row and "80.75" in row
    assert "arXiv 1605.07146" in row and "resnext = resnext29-2x64d" in text


@pytest.mark.parametrize("name, options", NETWORKS, ids=str)
def test_what_is_forgotten_is_made_again_bit_for_bit(name, options, monkeypatch):
    forget, seen = Conv2d.forget_input, []

    def check(layer, again):
        seen.append(np.array_equal(again(), layer._saved[0]))
        forget(layer, again)

    monkeypatch.setattr(Conv2d, "forget_input", check)
    network = models.create(name, 10, **options).initialize(seed=1)
    network.forward(np.random.default_rng(0).standard_normal((3, 32, 32, 4), np.float32))
    assert len(seen) > 4 and all(seen)


def summary_command(*arguments):
    return subprocess.run([sys.executable, "-m", "minidl", "summary", *arguments], capture_output=True, text=True, timeout=60)


def test_command():
    result = summary_command("resnext", "--batch-size", "64", "--model-kwargs", "shortcut=C")
    assert result.returncode == 0 and result.stderr == ""
    costs = summary.summarize(models.create("resnext29-2x64d", shortcut="C"), batch_size=64)
    assert result.stdout.startswith("resnext29-2x64d, 100 classes, training on batches of 64 in float32\n")
    assert f"{costs.parameters:,}" in result.stdout and f"{costs.macs:,}" in result.stdout


def test_command_for_programs():
    found = json.loads(summary_command("wrn-16-4", "--json", "--classes", "10").stdout)
    assert {key: found[key] for key in ("arch", "batch_size", "parameters", "macs")} == {
        "arch": "wrn-16-4", "batch_size": 128, "parameters": 2_748_890, "macs": 392_612_352}
    assert found["activation_bytes"] == sum(row["activation_bytes"] for row in found["rows"])
    assert found["workspace_bytes"] == max(row["workspace_bytes"] for row in found["rows"])


@pytest.mark.parametrize("arguments, message", [
    (["wrn-16-5x"], "unknown architecture 'wrn-16-5x': did you mean wrn-16-"),
    (["wrn-16-4", "--batch-size", "0"], "--batch-size: '0' is not a whole number of at least 1"),
    (["wrn-16-4", "--model-kwargs", "depth=28"], "unknown model option 'depth'"),
    ([], "ARCH"),
])
def test_command_refuses(arguments, message):
    result = summary_command(*arguments)
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr
