"""python -m minidl bench: the benchmarks, in a checkout and where only the built package is."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def bench(*arguments, path=None, folder=None):
    """Run the command in `folder`, with the package of the folder `path` instead of this checkout's."""
    environment = {**os.environ, **({"PYTHONPATH": str(path)} if path else {})}
    return subprocess.run([sys.executable, "-m", "minidl", "bench", *arguments], cwd=folder, env=environment,
                          capture_output=True, text=True, timeout=120)


def copy_of_sources(folder, names):
    folder.mkdir()
    for name in names:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of what a wheel holds. It is built from a copy of the sources, because setuptools writes beside them."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("built")
    source = copy_of_sources(folder / "source", ("minidl", "models", "benchmarks", "pyproject.toml", "README.md", "LICENSE"))
    subprocess.run([sys.executable, "-c", "import setuptools; setuptools.setup()", "--quiet", "build", "--build-lib",
                    folder / "lib"], cwd=source, check=True, timeout=60)
    return folder / "lib"


@pytest.mark.parametrize("name", ["kernels", "training"])
def test_arguments_are_those_of_the_benchmark(name):
    result = bench(name, "--help")
    assert result.returncode == 0 and result.stderr == ""
    assert f"usage: {name}.py" in result.stdout and "--peer {torch}" in result.stdout


def test_overhead(tmp_path):
    result = bench("overhead", "--device", "cpu", "--dataset", "digits", "--arch", "report-resnext3", "--repeats", "2",
                   "--limit-train-batches", "3", "--val-split", "20", "--json", "row.json", folder=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    (row,) = json.loads((tmp_path / "row.json").read_text())["rows"]
    assert row["steps"] == 3 and row["bare_seconds"] > 0 and row["checkpoints_percent"] >= 0
    assert row["loop_percent"] == 100 * (row["epoch_seconds"] / row["bare_seconds"] - 1)
    assert result.stdout.splitlines()[-1].startswith("3 steps, medians of 2: bare ") and len(result.stdout.splitlines()) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["row.json"]


def test_a_wheel_holds_the_benchmarks_without_their_results(built):
    assert {path.name for path in built.iterdir()} == {"minidl", "models"}
    assert {path.name for path in (built / "minidl" / "benchmarks").iterdir()} == {
        path.name for path in (ROOT / "benchmarks").glob("*.py")}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no system but Linux tells the memory of a process")
def test_a_benchmark_of_the_built_package_in_another_folder(built, tmp_path):
    result = bench("training", "--device", "cpu", "--memory", "--networks", "wrn-10-1", "-b", "8", "--json", "rows.json",
                   path=built, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "rows.json").read_text())
    assert [row["network"] for row in record["rows"]] == ["wrn-10-1"] and record["rows"][0]["peak_bytes"] > 1e6
    assert record["environment"]["commit"] is None  # it was not this checkout's


def test_the_built_package_has_no_pytorch_networks(built, tmp_path):
    pytest.importorskip("torch")
    result = bench("training", "--peer", "torch", path=built, folder=tmp_path)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == ("error: --peer torch needs the networks in PyTorch, which are among the tests: run it in a "
                             "checkout of minidl\n")


def test_pytorch_is_missing(tmp_path):
    """A process with neither this environment's packages, -S, nor PyTorch; what minidl needs is linked."""
    for name in ("numpy", "tqdm"):
        file = Path(__import__(name).__file__)
        path = file.parent if file.name == "__init__.py" else file
        for found in [path, *path.parent.glob(f"{name}.libs")]:
            (tmp_path / found.name).symlink_to(found)
    result = subprocess.run([sys.executable, "-S", "-m", "minidl", "bench", "kernels", "--peer=torch"], cwd=ROOT,
                            env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and result.stderr == "error: --peer torch needs PyTorch: `pip install 'minidl[torch]'`\n"


def test_without_benchmarks(tmp_path):
    result = bench("kernels", path=copy_of_sources(tmp_path / "bare", ("minidl", "models")), folder=tmp_path)
    assert result.returncode == 2 and result.stderr.endswith("install minidl again\n")
    assert "kernels.py is neither in " in result.stderr


@pytest.mark.parametrize("arguments, message", [
    ([], "the following arguments are required: benchmark"),
    (["speed"], "invalid choice: 'speed'"),
    (["kernels", "--repeat", "many"], "argument --repeats: 'many' is not a whole number of at least 1"),
])
def test_refused(arguments, message):
    result = bench(*arguments)
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr
