"""python -m minidl doctor, in the situations that it is for: each is made, as far as a machine without a GPU allows.

The process sees no installed package but those that minidl needs, so what the machine has besides does not matter. The
driver is a small library in place of NVIDIA's; CuPy is a stand-in that fails as the real one does.
"""

import ctypes
import json
import os
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from conftest import CUPY
from minidl import host_build, memory
from minidl.commands import doctor as command
from minidl.data import CIFARS
from minidl.nvidia_driver import Driver, Gpu

ROOT = Path(__file__).parent.parent
CACHE = str(host_build.cache_folder().parent)  # so that the kernels are compiled once
ZIG = "pip install ziglang && export CXX='python -m ziglang c++'"

DRIVER = r"""
#include <cstdlib>
#include <cstring>
static int number(const char* name) { const char* text = getenv(name); return text ? atoi(text) : 0; }
extern "C" {
int cuInit(unsigned) { return number("STUB_STATUS"); }
int cuDriverGetVersion(int* version) { *version = number("STUB_CUDA"); return 0; }
int cuDeviceGetCount(int* count) { *count = number("STUB_GPUS"); return 0; }
int cuDeviceGet(int* device, int index) { *device = 40 + index; return 0; }
int cuDeviceGetName(char* name, int size, int device) { strncpy(name, "Stub GPU", size); return device < 40; }
int cuDeviceTotalMem_v2(size_t* bytes, int) { *bytes = 16ull << 30; return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int) {
    *value = attribute == 75 ? number("STUB_CAPABILITY") / 10 : number("STUB_CAPABILITY") % 10;
    return 0;
}
int cuGetErrorString(int, const char** text) { *text = "it is only a stub"; return 0; }
}
"""


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """A folder with minidl, what it needs and nothing else."""
    folder = tmp_path_factory.mktemp("packages")
    for name in ("minidl", "models"):
        (folder / name).symlink_to(ROOT / name)
    needed = {"numpy": "numpy.libs", "tqdm": ""} | (
        {"tomli": "*__mypyc*.so"} if sys.version_info < (3, 11) else {})  # {module: what lies beside it}
    for name, beside in needed.items():
        file = Path(__import__(name).__file__)
        path = file.parent if file.name == "__init__.py" else file
        for found in [path, *(path.parent.glob(beside) if beside else ())]:
            (folder / found.name).symlink_to(found)
    return folder


@pytest.fixture(scope="module")
def stub(tmp_path_factory):
    """A folder with a libcuda.so.1 that says what the STUB_ variables of the environment do."""
    folder = tmp_path_factory.mktemp("driver")
    (folder / "driver.cpp").write_text(DRIVER)
    subprocess.run([*host_build.compiler(), "-shared", "-fPIC", "driver.cpp", "-o", "libcuda.so.1"], cwd=folder, check=True)
    return folder


@pytest.fixture
def doctor(packages, stub, tmp_path):
    """A function that runs the command and returns its result; .checks: {name: check}, from --json.

    gpus, cuda, capability, status: of the driver; without gpus there is none. before: called in the process before
    the command. `tmp_path/packages` may hold more packages.
    """
    (tmp_path / "no driver").mkdir()
    (tmp_path / "no driver" / "libcuda.so.1").write_text("not a library")  # found before a real one, and refused

    def run(*arguments, gpus=None, cuda=13000, capability=89, status=0, before=None, **environment):
        environment = {
            **os.environ, "PYTHONPATH": os.pathsep.join(map(str, (tmp_path / "packages", packages))),
            "MINIDL_CACHE": CACHE, "XDG_CACHE_HOME": tmp_path / "cache", "MINIDL_DATA": tmp_path / "data",
            "CXX": None, "CUDA_VISIBLE_DEVICES": None, "LD_LIBRARY_PATH": tmp_path / "no driver" if gpus is None else stub,
            "STUB_GPUS": gpus, "STUB_CUDA": cuda, "STUB_CAPABILITY": capability, "STUB_STATUS": status, **environment}
        result = subprocess.run(
            [sys.executable, "-S", "-m", "minidl", "doctor", *arguments], cwd=tmp_path, timeout=60,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={name: str(value) for name, value in environment.items() if value is not None},
            preexec_fn=before)
        assert "Traceback" not in result.stderr
        if "--json" in arguments:
            result.checks = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
        return result

    return run


def drop_override():
    """Of a child process of root: it may no longer write where files forbid it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(24, 1)  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE


def install(folder, name, version="14.2.0", metadata="", files=()):
    """What pip leaves of a package: its metadata, and its files {path: text}."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{metadata}")
    for path, text in dict(files).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)


def state(check):
    return check["state"], check["found"], check["run"]


# ---- without a GPU


def test_memory_that_no_system_tells_is_not_said(monkeypatch):
    """As on macOS."""
    monkeypatch.setattr(memory, "limit_bytes", lambda place: 0)
    assert command.kernel("cpu") == ("kernel on cpu", "ok", "compiled, results as NumPy's", None)


def test_a_machine_without_a_gpu(doctor):
    result = doctor("--json")
    assert result.returncode == 0 and result.stderr == ""
    report = json.loads(result.stdout)
    assert report["device"] == "cpu" and report["ready"] is True
    for name in ("minidl", "Python", "NumPy", "CPU", "C++ compiler", "kernel cache", "kernel on cpu", "disk"):
        assert result.checks[name]["state"] == "ok" and result.checks[name]["run"] is None
    assert result.checks["NumPy"]["found"] == np.__version__
    assert state(result.checks["NVIDIA driver"]) == (
        "missing", "libcuda.so.1 is not found; without a GPU, the CPU is used", None)
    assert state(result.checks["CuPy"]) == ("missing", "only a GPU needs it", None)
    assert state(result.checks["package minidl"]) == (
        "missing", "not installed: it is imported from its sources", "pip install -e .")


def test_lines_for_people(doctor):
    """States, names and findings each in their column; a line is longer than 80 only where one word, or what to run, is."""
    result = doctor(OMP_NUM_THREADS="1")
    assert result.returncode == 0 and result.stderr == ""
    assert result.stdout.endswith("\n\ntraining can run on cpu\n")
    for line in result.stdout.splitlines()[:-2]:
        if line[:9].strip():
            assert line[:9].rstrip() in ("ok", "missing", "wrong") and line[9] != " " and line[26] == " " and line[27] != " "
        else:
            assert line.startswith(("         run: ", " " * 27)) and line[27] != " "
        assert len(line) <= 80 or " " not in line[27:] or "run: " in line
    assert "\n         run: python -m minidl data --dataset cifar100\n" in result.stdout
    assert "ok       CPU  " in result.stdout
    assert " 1 thread, OMP_NUM_THREADS=1 " in " ".join(result.stdout.split()), "wherever the name of the CPU lets lines end"


def test_no_compiler(doctor, tmp_path):
    result = doctor("--json", PATH=tmp_path)
    assert result.returncode == 4
    assert result.stderr == "error: training cannot run on cpu, the best device here: see what is missing or wrong above\n"
    assert state(result.checks["C++ compiler"]) == (
        "missing", "no C++ compiler found to build the kernels for the CPU: install g++, or `pip install ziglang`",
        "pip install ziglang")
    assert "kernel on cpu" not in result.checks and not json.loads(result.stdout)["ready"]


def test_compiler_of_a_variable_that_is_not_there(doctor):
    result = doctor("--json", CXX="/nowhere/c++")
    assert result.returncode == 4
    assert state(result.checks["C++ compiler"]) == (
        "missing", "$CXX names the compiler '/nowhere/c++', which is not found", "unset CXX")


@pytest.mark.parametrize("script, name, found", [
    ("exit 1", "C++ compiler", "{} --version fails"),
    ('[ "$1" = --version ] && echo 1.0 && exit; echo "ld: cannot find -lstdc++" >&2; exit 1', "kernel on cpu",
     "relu.cu: {}: ld: cannot find -lstdc++"),
    ('[ "$1" = --version ] && echo 1.0 && exit; exit 3', "kernel on cpu", "relu.cu: {}: code 3"),
])
def test_compiler_that_does_not_work(doctor, tmp_path, script, name, found):
    compiler = tmp_path / "c++"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    result = doctor("--json", CXX=compiler, MINIDL_CACHE=tmp_path / "cache")
    assert result.returncode == 4
    assert state(result.checks[name]) == ("wrong", found.format(compiler), ZIG)


def test_compiler_that_cannot_be_run(doctor, tmp_path):
    (tmp_path / "c++").write_text("no program")
    (tmp_path / "c++").chmod(0o755)
    result = doctor("--json", CXX=tmp_path / "c++")
    assert result.returncode == 4
    assert state(result.checks["C++ compiler"]) == (
        "wrong", f"the compiler {tmp_path}/c++ cannot be run: Exec format error; set $CXX to another", ZIG)


def test_compiler_that_needs_a_cache_and_speaks_in_other_letters(doctor, tmp_path):
    """As zig's, which does not even tell its version where it has no folder of its own."""
    (tmp_path / "c++").write_text(r"""#!/bin/sh
        [ -d "${ZIG_GLOBAL_CACHE_DIR%/zig}" ] && printf 'caf\351 1.0\n'""")
    (tmp_path / "c++").chmod(0o755)
    result = doctor("--json", CXX=tmp_path / "c++", HOME=None)
    assert state(result.checks["C++ compiler"]) == ("ok", rf"caf\xe9 1.0, {tmp_path}/c++", None)


def test_no_place_for_anything(doctor):
    """No folder takes a byte, not even one of temporary files."""
    result = doctor("--json", before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)),
                    MINIDL_CACHE=None, XDG_CACHE_HOME=None, HOME=None)
    assert result.returncode == 4
    assert result.stderr == "error: training cannot run on cpu, the best device here: see what is missing or wrong above\n"
    assert state(result.checks["kernel cache"]) == (
        "missing", "there is no folder to build the kernels in: set MINIDL_CACHE to one that can be written", None)
    assert "kernel on cpu" not in result.checks and result.checks["disk"]["state"] == "ok"


def test_no_place_for_kernels(doctor):
    result = doctor("--json", MINIDL_CACHE=None, XDG_CACHE_HOME=None, HOME=None)
    assert result.returncode == 0
    assert state(result.checks["kernel cache"]) == (
        "wrong", "neither MINIDL_CACHE nor HOME is set; each process compiles anew", "export MINIDL_CACHE=$(mktemp -d)")


def test_read_only_place_for_kernels(doctor, tmp_path):
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o555)
    result = doctor("--json", before=drop_override, MINIDL_CACHE=folder, XDG_CACHE_HOME=None, HOME=None)
    assert result.returncode == 0
    assert state(result.checks["kernel cache"]) == (
        "wrong", f"cannot write to {folder / 'kernels'}; each process compiles anew", "export MINIDL_CACHE=$(mktemp -d)")
    assert list(folder.iterdir()) == []


def test_extras(doctor, tmp_path):
    """Those of the installed metadata; each with the line that brings it."""
    install(tmp_path / "packages", "minidl", "0.1.0", "".join(f"Requires-Dist: {line}\n" for line in (
        "numpy>=2", 'matplotlib>=3.8; extra == "plot"', 'pillow>=10; extra == "plot"', 'ml_dtypes>=0.4; extra == "bf16"',
        'cupy-cuda13x>=13.6; extra == "cuda13"', "nvidia-cuda-crt>=13; sys_platform == 'linux' and extra == 'test'")))
    install(tmp_path / "packages", "ml_dtypes", "0.5.1")
    install(tmp_path / "packages", "pillow", "11.0")
    result = doctor("--json")
    assert {name: state(check) for name, check in result.checks.items() if name.startswith(("extra", "package"))} == {
        "extra plot": ("missing", "matplotlib", "pip install 'minidl[plot]'"), "extra bf16": ("ok", "ml_dtypes 0.5.1", None)}


# ---- data


def official_files(folder, it, edition, short=0):
    """Empty files of the official sizes; the first is `short` bytes too short."""
    (folder / edition.folder).mkdir(parents=True)
    for file in edition.files:
        with open(folder / edition.folder / file.name, "wb") as stream:
            stream.truncate(file.size - short * (file is edition.files[0]))


def test_data_that_is_there(doctor, tmp_path):
    for it in CIFARS.values():
        official_files(tmp_path / "data", it, it.editions[0])
    checks = doctor("--json").checks
    for it in CIFARS.values():
        folder, total = tmp_path / "data" / it.editions[0].folder, sum(file.size for file in it.editions[0].files)
        assert state(checks[it.title]) == ("ok", f"{folder}, {total:,} bytes", None)


def test_data_that_is_missing(doctor, tmp_path):
    assert state(doctor("--json").checks["CIFAR-10"]) == (
        "missing", f"not in {tmp_path / 'data'} nor {tmp_path / 'cache' / 'minidl' / 'data'}",
        "python -m minidl data --dataset cifar10")


def test_data_that_is_one_byte_short(doctor, tmp_path):
    folder, it = tmp_path / "a folder", CIFARS["cifar100"]
    official_files(folder, it, it.editions[1], short=1)
    result = doctor("--json", "--data-dir", str(folder))
    assert result.returncode == 0
    assert state(result.checks["CIFAR-100"]) == (
        "wrong", f"{folder}/cifar-100-python/train has 155,249,917 bytes, not 155,249,918",
        f"python -m minidl data --dataset cifar100 --data-dir {shlex.quote(str(folder))}")


# ---- the driver


def test_gpu_without_cupy(doctor):
    result = doctor("--json", gpus=2)
    assert result.returncode == 4 and json.loads(result.stdout)["device"] == "cuda:0"
    assert result.stderr == ("error: training cannot run on cuda:0, the best device here: see what is missing or wrong above; "
                             "it can with --device cpu\n")
    assert result.checks["NVIDIA driver"]["found"].endswith("for CUDA up to 13.0")
    assert [result.checks[f"cuda:{i}"]["found"] for i in (0, 1)] == ["Stub GPU, 16.0 GiB, compute capability 8.9"] * 2
    assert state(result.checks["CuPy"]) == ("missing", "without it no GPU is used", "pip install 'minidl[cuda13]'")


def test_gpu_with_an_older_driver_without_cupy(doctor):
    assert doctor("--json", gpus=1, cuda=12090).checks["CuPy"]["run"] == "pip install 'minidl[cuda12]'"


@pytest.mark.parametrize("cuda, capabilities, extra", [
    ((13, 0), [(7, 5)], "cuda13"), ((13, 1), [(12, 0), (8, 9)], "cuda13"), ((12, 9), [(9, 0)], "cuda12"),
    ((13, 0), [(7, 0)], "cuda12"), ((13, 0), [(9, 0), (6, 1)], "cuda12")], ids=str)
def test_extra_for_driver_and_gpus(cuda, capabilities, extra):
    """CUDA 13 compiles for nothing older than 7.5."""
    assert Driver(cuda, [Gpu("", 0, capability) for capability in capabilities]).extra == extra


@pytest.mark.parametrize("hidden, run", [("", "unset CUDA_VISIBLE_DEVICES"), (None, None)])
def test_driver_without_a_gpu(doctor, hidden, run):
    result = doctor("--json", gpus=0, status=100, CUDA_VISIBLE_DEVICES=hidden)
    assert result.returncode == 0
    assert result.checks["NVIDIA driver"]["state"] == "ok" and result.checks["GPU"]["state"] == "missing"
    assert result.checks["GPU"]["run"] == run


def test_driver_that_fails(doctor):
    result = doctor("--json", gpus=1, status=803)
    assert result.returncode == 4 and "it can with --device cpu" in result.stderr
    assert state(result.checks["NVIDIA driver"]) == (
        "wrong", "the NVIDIA driver fails in cuInit: error 803, it is only a stub", "nvidia-smi")


# ---- CuPy


@pytest.mark.parametrize("names, gpus, cuda, then", [
    (("cupy", "cupy-cuda12x"), None, 0, ""),
    (("cupy", "cupy-cuda13x"), 1, 13000, " && pip install 'minidl[cuda13]'"),
    (("cupy-cuda12x", "cupy-cuda13x"), 1, 12080, " && pip install 'minidl[cuda12]'")])
def test_cupy_is_installed_twice(doctor, tmp_path, names, gpus, cuda, then):
    for name in names:
        install(tmp_path / "packages", name)
    result = doctor("--json", gpus=gpus, cuda=cuda)
    assert result.returncode == (4 if gpus else 0)
    assert state(result.checks["CuPy"]) == ("wrong", f"{' and '.join(names)} are installed into one folder, over each other",
                                            f"pip uninstall -y {' '.join(names)}{then}")


def test_cupy_for_a_newer_driver(doctor, tmp_path):
    install(tmp_path / "packages", "cupy-cuda13x", files={"cupy/__init__.py": "raise SystemExit('imported')"})
    result = doctor("--json", gpus=1, cuda=12080)
    assert result.returncode == 4
    assert state(result.checks["CuPy"]) == (
        "wrong", "cupy-cuda13x needs a driver for CUDA 13 (580 or newer) and compute capability 7.5",
        "pip uninstall -y cupy-cuda13x && pip install 'minidl[cuda12]'")


FRAME = """raise ImportError('''
================================================================
Failed to import CuPy.

If you installed CuPy via wheels (cupy-cudaXXX or cupy-rocm-X-X), make sure that the package matches.

Original error:
  ImportError: libcudart.so.12: cannot open shared object file: No such file or directory
================================================================
''')
"""


@pytest.mark.parametrize("source, found, run", [
    (FRAME, "ImportError: libcudart.so.12: cannot open shared object file: No such file or directory",
     "pip install --force-reinstall --no-deps cupy-cuda12x"),
    ("import nothing_like_this", "No module named 'nothing_like_this'", "pip install --force-reinstall --no-deps cupy-cuda12x"),
    ("import os; os.makedirs('/proc/nowhere/kernel_cache')", "[Errno 2] No such file or directory: '/proc/nowhere'",
     "export CUPY_CACHE_DIR=$(mktemp -d)"),
], ids=["library", "module", "cache"])
def test_cupy_cannot_be_imported(doctor, tmp_path, source, found, run):
    install(tmp_path / "packages", "cupy-cuda12x", files={"cupy/__init__.py": source})
    result = doctor("--json", gpus=1)
    assert result.returncode == 4
    assert state(result.checks["CuPy"]) == ("wrong", f"cupy-cuda12x cannot be imported: {found}", run)


NVRTC, CUBLAS, HEADERS = "cupy/cuda/nvrtc.py", "cupy_backends/cuda/libs/cublas.py", "cuda/pathfinder.py"
WORKING_CUPY = {
    "cupy/__init__.py": "from cupy import cuda\n__version__ = '14.2.0'\nclass ndarray: pass\n",
    "cupy/cuda/__init__.py": "def is_available(): return False\n",
    NVRTC: "def getVersion(): return 13, 0\n",
    CUBLAS: "",
    HEADERS: "def find_nvidia_header_directory(name): return __file__.replace('cuda/pathfinder.py', 'headers')\n",
    "headers/cuda_fp16.h": "",
}


@pytest.mark.parametrize("package, run", [
    ("cupy-cuda12x", "pip install 'minidl[cuda12]'"), ("cupy-cuda13x", "pip install 'minidl[cuda13]'"),
    ("cupy", "pip uninstall -y cupy && pip install 'minidl[cuda13]'")])
def test_libraries_of_cuda_are_missing(doctor, tmp_path, package, run):
    """The remedy is of the CUDA that this CuPy was built for. Each message of CuPy is a page, with the folders it tried."""
    install(tmp_path / "packages", package, files={**WORKING_CUPY, **{
        NVRTC: "class DynamicLibNotFoundError(RuntimeError): pass\n"
               "def getVersion(): raise DynamicLibNotFoundError('Failure finding \"libnvrtc.so.13\"\\n  listdir:\\n    x')\n",
        CUBLAS: "raise ImportError('Failure finding \"libcublas.so.13\"\\n  listdir:\\n    x')\n",
        HEADERS: "def find_nvidia_header_directory(name): return None\n"}})
    result = doctor("--json", gpus=1)
    assert result.returncode == 4 and "kernel on cuda:0" not in result.checks and result.checks["CuPy"]["state"] == "ok"
    for name, found in (("NVRTC", 'Failure finding "libnvrtc.so.13"'), ("cuBLAS", 'Failure finding "libcublas.so.13"'),
                        ("CUDA headers", "cuda_fp16.h is not found")):
        assert state(result.checks[name]) == ("missing", found, run)


@pytest.mark.parametrize("name, file, text", [
    ("NVRTC", NVRTC, "def getVersion(): raise RuntimeError\n"), ("cuBLAS", CUBLAS, "raise ImportError\n"),
    ("CUDA headers", "headers/cuda_fp16.h", None)])
def test_one_library_of_cuda_is_missing(doctor, tmp_path, name, file, text):
    files = {**WORKING_CUPY, file: text}
    install(tmp_path / "packages", "cupy-cuda13x", files={path: text for path, text in files.items() if text is not None})
    result = doctor("--json", gpus=1)
    assert result.returncode == 4
    assert {it: result.checks[it]["state"] for it in ("CuPy", "NVRTC", "cuBLAS", "CUDA headers")} == {
        "CuPy": "ok", "NVRTC": "ok", "cuBLAS": "ok", "CUDA headers": "ok", name: "missing"}


def test_an_empty_folder_named_cupy(doctor, tmp_path):
    """As pip leaves it behind where a cache was in it: Python imports that, too."""
    (tmp_path / "packages" / "cupy").mkdir(parents=True)
    assert doctor("--json", gpus=1).checks["CuPy"]["state"] == "missing"
    install(tmp_path / "packages", "cupy-cuda13x")
    assert state(doctor("--json", gpus=1).checks["CuPy"]) == (
        "wrong", "cupy-cuda13x cannot be imported: module 'cupy' has no attribute '__version__'",
        "pip install --force-reinstall --no-deps cupy-cuda13x")


def test_a_gpu_that_cupy_does_not_find(doctor, tmp_path):
    install(tmp_path / "packages", "cupy-cuda13x", files=WORKING_CUPY)
    result = doctor("--json", gpus=1)
    assert result.returncode == 4 and result.checks["kernel on cuda:0"]["state"] == "wrong"
    assert result.checks["kernel on cuda:0"]["found"].startswith("--device cuda:0: CuPy finds none of the driver's 1 GPUs")


def test_cupy_without_a_gpu(doctor, tmp_path):
    install(tmp_path / "packages", "cupy-cuda13x", files=WORKING_CUPY)
    result = doctor("--json")
    assert result.returncode == 0
    assert state(result.checks["CuPy"]) == ("ok", "14.2.0 (cupy-cuda13x)", None)


@pytest.mark.skipif(not CUPY, reason="needs a GPU")
def test_a_gpu():
    result = subprocess.run([sys.executable, "-m", "minidl", "doctor", "--json"], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout
    checks = {check["name"]: check["state"] for check in json.loads(result.stdout)["checks"]}
    for name in ("NVIDIA driver", "cuda:0", "CuPy", "NVRTC", "cuBLAS", "CUDA headers", "kernel on cuda:0"):
        assert checks[name] == "ok"
