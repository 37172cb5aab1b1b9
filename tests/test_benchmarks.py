"""The benchmarks: no kernel is left out, the work of a step is found as it is, peers compute the same, records have their form,
and benchmarks/README.md is made of them."""

import json
import re
import shutil
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import models
import stand_in_gpu
from minidl import device
from minidl.errors import DeviceError, UsageError
from minidl.host_build import OPS
from minidl.kernels import Kernel, parse_signatures
from minidl.ops import batchnorm, bias, conv_product, loss

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import kernels  # noqa: E402
import pictures  # noqa: E402
import records  # noqa: E402
import report  # noqa: E402
import training  # noqa: E402
import works  # noqa: E402

KERNELS_OF = {path.name: set(parse_signatures(path.read_text())) for path in OPS.glob("*.cu")}
ONLY_ON_A_GPU = {*KERNELS_OF["conv_tensor_core.cu"], "im2col", "winograd_output", "bias_add"}
SMALL = ["simplenet-5m", "wrn-10-1", "resnext29-2x8d", "res2next29-2c8w4s", works.OTHERS]
KEYS = ["network", "device", "precision", "batch", "threads", "images_per_second", "peer", "peer_images_per_second", "ratio",
        "peak_bytes", "peer_peak_bytes"]


@pytest.fixture
def launched(monkeypatch):
    """Counter of the names of kernels that are launched."""
    counts, real = Counter(), Kernel.__getitem__

    def counting(kernel, shape):
        counts[kernel.name] += 1
        return real(kernel, shape)

    monkeypatch.setattr(Kernel, "__getitem__", counting)
    return counts


def run(monkeypatch, capsys, script, *arguments):
    """main() of a benchmark in this process -> what it printed."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
    script.main()
    return capsys.readouterr().out


# ---- works -------------------------------------------------------------------------------------------------------


def test_every_kernel_is_in_a_case():
    """A new kernel belongs into the `kernels` of the Work that launches it, in benchmarks/works.py."""
    named = {name for work in works.WORKS for name in work.kernels}
    assert named == set().union(*KERNELS_OF.values())


def test_cases_launch_what_they_name_and_peers_agree(launched, monkeypatch):
    torch = pytest.importorskip("torch")
    torch.manual_seed(1)
    bench = kernels.Bench(device.select("cpu"), "fp32", with_torch=True)
    seen, compared = set(), 0

    def check(work):
        nonlocal compared
        for case in work.cases(bench.inputs):
            conv_product._packed.cache_clear()  # gemm_sizes runs once in a process
            launched.clear()
            bench.check(case)
            assert launched and launched.keys() <= set(work.kernels), f"{case.name} {work}"
            seen.update(launched)
            compared += bool(case.torch or case.numpy)

    found = works.of(SMALL, batch=2)
    for work in found:
        check(work)
    monkeypatch.setattr(batchnorm, "LONGEST_ROW", {"numpy": 0})  # so that rows are dealt out in tiles
    monkeypatch.setattr(bias, "TILE", 1)
    for work in found:
        if isinstance(work, (works.BatchNorm, works.Linear)):
            check(work)
    assert seen == set().union(*KERNELS_OF.values()) - ONLY_ON_A_GPU
    assert compared > 90


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_peers_agree_in_other_precisions(precision):
    pytest.importorskip("torch")
    bench = kernels.Bench(device.select("cpu"), precision, with_torch=True)
    for work in works.of(["wrn-10-1"], batch=2):
        for case in work.cases(bench.inputs):
            bench.check(case)


def test_a_wrong_result_is_seen():
    bench = kernels.Bench(device.select("cpu"), "fp32", with_torch=False)
    (case,) = works.Add((3, 4, 4, 2)).cases(bench.inputs)
    right = case.numpy()[0]
    for wrong in (right * 1.01, np.where(right == right.max(), np.nan, right)):
        case.numpy = lambda: (wrong,)  # noqa: B023
        with pytest.raises(records.Differ, match="add fp32: minidl and numpy differ by"):
            bench.check(case)


@pytest.mark.parametrize("name", ["simplenet-5m", "wrn-10-1", "resnext29-2x8d", "res2next29-2c8w4s"])
def test_work_of_a_step_is_that_of_a_real_one(name, launched):
    """Additions and what batch norm makes again too, which no layer tells by itself."""
    place, batch = device.select("cpu"), 2
    network = models.create(name).initialize(place)
    network.skip_input_gradient()
    x, labels = np.ones((*works.IMAGE_SHAPE, batch), np.float32), np.zeros(batch, np.int32)
    launched.clear()
    dlogits = loss.forward_backward(network.forward(x), labels, np.zeros(4), np.ones(1, np.float32))
    network.backward(dlogits)

    counts = works.of_network(name, batch)

    def number(kind, **fields):
        return sum(count for work, count in counts.items()
                   if type(work) is kind and all(getattr(work, key) == value for key, value in fields.items()))

    assert launched["add"] == number(works.Add)
    def applied(variant=""):
        return sum(launched[kernel + variant] for kernel in ("bn_forward", "bn_normalize", "bn_apply"))

    assert applied() == number(works.BatchNorm, relu=False, add=False) + number(works.BatchNormAgain, relu=False)
    assert applied("_relu") == number(works.BatchNorm, relu=True, add=False) + number(works.BatchNormAgain, relu=True)
    assert applied("_add_relu") == number(works.BatchNorm, add=True)
    assert launched["maxpool_forward"] == number(works.Pool, mode="max") == launched["maxpool_backward"]
    assert launched["avgpool_forward"] == number(works.Pool, mode="avg") == launched["avgpool_backward"]
    assert launched["dropout_channels"] == number(works.Dropout)
    convolutions = [layer for _, layer in network.named_layers() if hasattr(layer, "groups")]
    assert number(works.Convolution) == len(convolutions)
    macs = sum(next(work.cases(works.Inputs(place, np.dtype("float32")))).flops * count for work, count in counts.items()
               if isinstance(work, (works.Convolution, works.Linear)))
    assert macs == 2 * batch * network.macs(works.IMAGE_SHAPE)


def test_equal_work_is_one():
    found = works.of(["wrn-16-4", "wrn-28-4"], batch=8)
    shapes = [str(work) for work in found if isinstance(work, works.Convolution)]
    assert len(shapes) == len(set(shapes))
    assert found[works.Convolution((64, 32, 32, 8), 64, (3, 3), 1, 1, 1, False, True)] == {"wrn-16-4": 3, "wrn-28-4": 7}


# ---- what they print and record ------------------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder of results as of this checkout, but without records; the report is made of it."""
    shutil.copytree(report.RESULTS, tmp_path, ignore=shutil.ignore_patterns("*.json", "*.png"), dirs_exist_ok=True)
    for path in report.RESULTS.glob("*/env.json"):
        shutil.copy(path, tmp_path / path.parent.name)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    return tmp_path


def section(name):
    """What a new report says of the record `name`."""
    report.main()
    text = report.README.read_text(encoding="utf-8")
    found = re.search(rf"^## [^\n]*: \[{name}\].*?(?=^## )", text, re.MULTILINE | re.DOTALL)[0]
    assert not re.search(r"\b(None|nan|inf)\b", found)
    return found


def test_kernels(results, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    printed = run(monkeypatch, capsys, kernels, "--device", "cpu", "-b", 2, "--networks", "wrn-10-1", "--filter", "32x32",
                  "--repeats", 5, "--json", results / "kernels-test.json", "--plot", results / "roofline.png")
    pictured = (results / "roofline.png").read_bytes()
    record = json.loads((results / "kernels-test.json").read_text())
    assert record["batch"] == 2 and record["ceilings"]["fp32"]["copy_gigabytes_per_second"] > 0.1
    assert record["environment"]["command"][0] == "kernels.py" and record["environment"]["versions"]["numpy"] == np.__version__
    assert len(printed.splitlines()) == 2 + len(record["rows"])
    for row in record["rows"]:
        assert "32x32" in row["shape"] and row["median_us"] > 0 and row["p10_us"] <= row["median_us"] <= row["p90_us"]
        seconds = row["median_us"] / 1e6
        assert row["gigabytes_per_second"] == pytest.approx(row["bytes"] / seconds / 1e9)
        assert row["teraflops_per_second"] == pytest.approx(row["flops"] / seconds / 1e12)
        if row["bound"] == "memory":
            share = row["gigabytes_per_second"] / row["copy_gigabytes_per_second"]
            assert row["share_of_ceiling"] == pytest.approx(share) and row["share_of_copy_alike"] > 0
        else:
            assert row["copy_gigabytes_per_second"] is None and row["share_of_copy_alike"] is None
        assert (row["numpy_us"] is None) == (row["kind"] == "convolution") and row["torch_us"] is None
    said = section("kernels-test")
    assert {row["kernel"] for row in record["rows"]} == set(re.findall(r"^\| ([\w, +]+) \| \d+ \|", said, re.MULTILINE))
    assert len(pictured) > 10_000 and (results / "kernels-test.png").read_bytes() == pictured
    assert "| x NumPy | x PyTorch |" in said
    (results / "kernels-test.json").write_text(json.dumps(record | {"threads": None}))  # a GPU's, where CuPy has NumPy's place
    assert "| x CuPy | x PyTorch |" in section("kernels-test")


def test_a_row_of_known_times(monkeypatch):
    bench = object.__new__(kernels.Bench)
    bench.precision, bench.target, bench.copy, bench.gemm = "fp32", np.empty(1000, np.float32), 1e9, 1e12
    seconds = {"minidl": [4e-6, 2e-6, 3e-6], "copy": [7e-6, 8e-6, 9e-6], "alike": [5e-6, 6e-6, 1.0], "torch": [12e-6] * 3}
    monkeypatch.setattr(bench, "measure", lambda *_: seconds)
    case = works.Case("it", None, bytes=1500, flops=6000)
    row = bench.row(works.Relu((1, 2, 3, 4)), case, None, {}, 3)
    expected = {"median_us": 3, "p10_us": 2, "p90_us": 4, "gigabytes_per_second": 0.5, "teraflops_per_second": 2e-3,
                "copy_gigabytes_per_second": 1, "share_of_ceiling": 0.5, "share_of_copy_alike": 2, "torch_us": 12,
                "speed_over_torch": 4}
    assert {name: row[name] for name in expected} == pytest.approx(expected)
    assert row["bound"] == "memory" and row["numpy_us"] is row["speed_over_numpy"] is None


def test_training_beside_pytorch(results, monkeypatch, capsys):
    pytest.importorskip("torch")
    printed = run(monkeypatch, capsys, training, "--device", "cpu", "--networks", "wrn-10-1:6", "--repeats", 2,
                  "--peer", "torch", "--json", results / "training-test.json")
    (row,) = json.loads((results / "training-test.json").read_text())["rows"]
    assert list(row)[:len(KEYS)] == KEYS and row["network"] == "wrn-10-1" and row["batch"] == 6 and row["peer"] == "torch"
    assert row["ratio"] == row["images_per_second"] / row["peer_images_per_second"]
    assert row["host_seconds"] is None
    if training.RESET.exists():
        assert row["peak_bytes"] > 1e6 and row["peer_peak_bytes"] > 1e6
    assert len(printed.splitlines()) == 3
    assert f"| wrn-10-1 | fp32 | 6 | {row['images_per_second']:,.1f} | " in section("training-test")


def test_where_the_system_does_not_tell_memory(monkeypatch, capsys, tmp_path):
    """As on macOS."""
    monkeypatch.setattr(training, "RESET", tmp_path / "nowhere")
    arguments = ("--device", "cpu", "--networks", "wrn-10-1:2", "--repeats", 1, "--json", tmp_path / "it.json")
    run(monkeypatch, capsys, training, *arguments)
    (row,) = json.loads((tmp_path / "it.json").read_text())["rows"]
    assert row["images_per_second"] > 0 and row["peak_bytes"] is None
    with pytest.raises(UsageError, match="--memory: the memory of a process on the CPU is told by Linux alone"):
        run(monkeypatch, capsys, training, *arguments, "--memory")


def test_scaling(results, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(training, "BATCHES", (2, 3, 4))
    monkeypatch.setattr(training, "WIDTHS", ("wrn-10-1", "wrn-10-2"))
    run(monkeypatch, capsys, training, "--device", "cpu", "--networks", "wrn-10-1", "-b", 4, "--repeats", 1, "--scaling",
        "--json", results / "scaling-test.json", "--plot", results / "scaling.png")
    rows = json.loads((results / "scaling-test.json").read_text())["rows"]
    assert [(row["series"], row["network"], row["batch"]) for row in rows] == [
        ("batch", "wrn-10-1", 2), ("batch", "wrn-10-1", 3), ("batch", "wrn-10-1", 4), ("width", "wrn-10-1", 4),
        ("width", "wrn-10-2", 4)]
    assert all(list(row)[:len(KEYS)] == KEYS and row["images_per_second"] > 0 for row in rows)
    assert section("scaling-test").count("\n| wrn-10-") == 5
    assert (results / "scaling.png").stat().st_size > 10_000
    assert (results / "scaling-test.png").read_bytes() == (results / "scaling.png").read_bytes()

    labels = {axes.get_title(): (axes.get_legend_handles_labels()[1], [tick.get_text() for tick in axes.get_xticklabels()])
              for axes in pictures.scaling([*rows, *(row | {"precision": "bf16"} for row in rows)], results / "two.png").axes}
    assert labels["width"] == (["minidl fp32", "minidl bf16"], ["wrn-10-1", "wrn-10-2"])
    assert labels["batch: level is linear time"][0] == ["wrn-10-1 bf16", "wrn-10-1 fp32"]


def test_what_was_measured_is_recorded_before_the_end(tmp_path, monkeypatch, capsys):
    """Rows whose peers differ are left out and said; one that ends the benchmark takes none with it."""
    pytest.importorskip("torch")
    losses, file = iter([1.0, 1.002, 1.0, 1.0]), tmp_path / "it.json"
    monkeypatch.setattr(training.Minidl, "loss", lambda it: next(losses))
    monkeypatch.setattr(training.Torch, "loss", lambda it: next(losses))
    arguments = ("--device", "cpu", "--networks", "wrn-10-1:2", "wrn-10-1:3", "--repeats", 1, "--peer", "torch", "--json", file)
    monkeypatch.setattr(training, "memory_in_a_process", lambda *cell: 1)
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, capsys, training, *arguments)
    assert str(caught.value) == ("not timed, as the results differ:\n"
                                 "wrn-10-1 fp32, batch 2: the first loss of minidl is 1.002, PyTorch's 1.0")
    assert [row["batch"] for row in json.loads(file.read_text())["rows"]] == [3]

    monkeypatch.undo()
    monkeypatch.setattr(training, "memory_in_a_process", lambda peer, name, batch, *rest: 1 // (3 - batch))
    with pytest.raises(ZeroDivisionError):
        run(monkeypatch, capsys, training, *arguments[:-4], "--json", file)
    assert [row["batch"] for row in json.loads(file.read_text())["rows"]] == [2]


def test_startup(results, monkeypatch, capsys):
    monkeypatch.setattr(training, "STARTS", {"warm": 1})  # a cold cache takes seconds of compilation
    run(monkeypatch, capsys, training, "--device", "cpu", "--networks", "wrn-10-1:2", "--startup",
        "--json", results / "startup-test.json")
    (row,) = json.loads((results / "startup-test.json").read_text())["rows"]
    assert "| wrn-10-1 | fp32 | 2 | warm | 1 | " in section("startup-test")
    assert row["cache"] == "warm" and 0 < row["import_seconds"] < 10 and 0 < row["first_step_seconds"] < 10


@pytest.mark.parametrize("script, arguments, message", [
    (training, ["--networks", "wrn-16-4:many"], "--networks wrn-16-4:many: 'many' is not a whole number of at least 1"),
    (training, ["--networks", "wrn-16-4:0"], "--networks wrn-16-4:0: '0' is not a whole number"),
    (training, ["--networks", "resnxt:4"], "unknown architecture 'resnxt': did you mean resnext"),
    (training, ["--plot", "a.png"], "--plot draws what --scaling finds"),
    (training, ["--scaling", "--plot", "a.jpg"], "a.jpg: a picture is one of"),
    (training, ["--compile"], "--compile is for --peer torch"),
    (training, ["--json", "nowhere/a.json"], "nowhere/a.json: there is no folder nowhere"),
    (kernels, ["--json", "nowhere/a.json"], "nowhere/a.json: there is no folder nowhere"),
    (kernels, ["--networks", "resnxt"], "unknown architecture 'resnxt'"),
    (kernels, ["--networks", "wrn-10-1", "--filter", "lstm"], "--filter lstm: nothing that these networks do"),
])
def test_refused(monkeypatch, capsys, script, arguments, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        run(monkeypatch, capsys, script, "--device", "cpu", *arguments)


@pytest.mark.parametrize("script", [kernels, training])
def test_pytorch_without_cuda_beside_a_gpu(monkeypatch, capsys, script):
    torch, gpu = pytest.importorskip("torch"), stand_in_gpu.install(monkeypatch)
    monkeypatch.setattr(device, "select", lambda name: gpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match=f"PyTorch {re.escape(torch.__version__)} finds no GPU, minidl cuda:99: install"):
        run(monkeypatch, capsys, script, "--peer", "torch")


def test_the_process_that_measures_pytorch_s_memory_is_told_the_peer(monkeypatch):
    """So that it loads PyTorch before CuPy."""
    commands, args = [], SimpleNamespace(device="cuda", peer="torch")
    monkeypatch.setattr(training.subprocess, "run",
                        lambda command, **how: commands.append(command) or SimpleNamespace(stdout="1"))
    for peer in ("minidl", "torch channels_last"):
        training.memory_in_a_process(peer, "wrn-10-1", 2, args, "fp32")
    assert [command[-2:] == ["--peer", "torch"] for command in commands] == [False, True]


# ---- the report --------------------------------------------------------------------------------------------------


def test_readme_is_made_of_the_records():
    assert report.README.read_text(encoding="utf-8") == report.text(), "run: python benchmarks/report.py"


def test_all_runs_and_pictures_are_there():
    text = report.README.read_text(encoding="utf-8")
    folders = {path.name for path in report.RESULTS.iterdir() if path.is_dir()}
    assert folders == set(re.findall(r"results/([^/)]+)/metrics", text))
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert (report.FOLDER / target).exists(), target


def test_report_where_there_are_no_records(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    with pytest.raises(UsageError, match="results is not there: the records are in a checkout of minidl"):
        report.main()
