"""Look at this machine: what works, what is missing, and the line to run where something needs mending.

Each check is ok, missing or wrong. The exit code is 0 if training can run on the best device of the machine, a GPU where
there is one, else 4. Nothing is downloaded.
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import shutil
import sys
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

import minidl
from minidl import blas, data, device, host_build, memory, nvidia_driver, run_folder
from minidl.data import cifar
from minidl.device import first_line
from minidl.errors import DeviceError
from minidl.host_build import CompileError
from minidl.nvidia_driver import Driver
from minidl.ops import relu
from minidl.wording import counted

WIDTH = 80  # columns
# Of lines for a shell.
NEW_FOLDER = "$(mktemp -d)"  # private, and there at once
USE_ZIG = "pip install ziglang && export CXX='python -m ziglang c++'"


class Check(NamedTuple):
    """state: "ok", "missing" or "wrong"; found: for people; run: the line that mends it."""

    name: str
    state: str
    found: str
    run: str | None = None

    def __str__(self) -> str:
        head = f"{self.state:9}{self.name:18}"
        lines = textwrap.wrap(self.found, WIDTH, initial_indent=head, subsequent_indent=" " * len(head),
                              break_long_words=False, break_on_hyphens=False)
        return "\n".join([*lines, *([f"{'':9}run: {self.run}"] if self.run else [])])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data-dir", help="folder with the official files of CIFAR")
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(args: argparse.Namespace) -> None:
    checks, kernels = [], {}
    try:
        driver, failure = nvidia_driver.find(), ""
    except DeviceError as error:
        driver, failure = None, str(error)
    best = "cuda:0" if failure or driver and driver.gpus else "cpu"

    def add(check: Check) -> Check:
        checks.append(check)
        if not args.json:
            print(check, flush=True)
        return check

    for check in (*environment(), *gpus(driver, failure)):
        add(check)
    cupy_works = all([add(check).state == "ok" for check in cupy(driver)])
    builds = add(cache()).state != "missing" and add(compiler()).state == "ok"  # a compiler keeps things in the folder, too
    for name in ("cpu", *(f"cuda:{index}" for index in range(len(driver.gpus) if driver else 0))):
        if builds if name == "cpu" else cupy_works:
            kernels[name] = add(kernel(name)).state == "ok"
    for check in (*data_sets(args.data_dir), *extras(), *room()):
        add(check)

    ready = kernels.get(best, False)
    if args.json:
        print(json.dumps({"device": best, "ready": ready, "checks": [check._asdict() for check in checks]}))
    elif ready:
        print(f"\ntraining can run on {best}")
    if not ready:
        raise DeviceError(f"training cannot run on {best}, the best device here: see what is missing or wrong above"
                          + ("; it can with --device cpu" if kernels.get("cpu") else ""))


# ---- the checks, in the order in which they are printed


def environment() -> Iterator[Check]:
    facts = run_folder.environment(device.select("cpu"))
    commit = f", commit {facts['commit'][:10]}" if facts["commit"] else ""
    yield Check("minidl", "ok", f"{facts['versions']['minidl']}, {Path(minidl.__file__).parent}{commit}")
    yield Check("Python", "ok", f"{facts['versions']['python']}, {sys.executable}")
    yield Check("NumPy", "ok", facts["versions"]["numpy"])
    limit = f", OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}" if "OMP_NUM_THREADS" in os.environ else ""
    yield Check("CPU", "ok", f"{facts['cpu']}, {counted(device.cpu_threads(), 'thread')}{limit}")


def gpus(driver: Driver | None, failure: str) -> Iterator[Check]:
    if failure:
        yield Check("NVIDIA driver", "wrong", failure, "nvidia-smi")
    elif driver is None:
        yield Check("NVIDIA driver", "missing", f"{nvidia_driver.LIBRARY} is not found; without a GPU, the CPU is used")
    else:
        yield Check("NVIDIA driver", "ok", f"{_kernel_module()}for CUDA up to {_version(driver.cuda)}")
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        if not driver.gpus and hidden is not None:
            yield Check("GPU", "missing", f"none is visible: CUDA_VISIBLE_DEVICES is {hidden!r}", "unset CUDA_VISIBLE_DEVICES")
        elif not driver.gpus:
            yield Check("GPU", "missing", "the driver finds none; the CPU is used")
        for index, gpu in enumerate(driver.gpus):
            yield Check(f"cuda:{index}", "ok",
                        f"{gpu.name}, {_gib(gpu.memory)}, compute capability {_version(gpu.capability)}")


def cupy(driver: Driver | None) -> Iterator[Check]:
    """CuPy and the CUDA libraries that it loads."""
    extra = driver.extra if driver and driver.gpus else None
    install = f"pip install 'minidl[{extra}]'" if extra else None
    packages = _cupy_packages()
    remove = f"pip uninstall -y {' '.join(packages)}" + (f" && {install}" if install else "")
    if not packages:
        yield Check("CuPy", "missing", "without it no GPU is used" if extra else "only a GPU needs it", install)
        return
    if len(packages) > 1:
        yield Check("CuPy", "wrong", f"{' and '.join(packages)} are installed into one folder, over each other", remove)
        return
    package, = packages
    if package == "cupy-cuda13x" and driver and extra == "cuda12":
        yield Check("CuPy", "wrong", f"{package} needs a driver for CUDA 13 (580 or newer) and compute capability 7.5", remove)
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import cupy

            version = cupy.__version__  # which an empty folder of that name does not have
    except OSError as error:  # no folder to keep its compiled kernels in
        yield Check("CuPy", "wrong", f"{package} cannot be imported: {error}", f"export CUPY_CACHE_DIR={NEW_FOLDER}")
        return
    except Exception as error:  # whatever a broken package raises
        yield Check("CuPy", "wrong", f"{package} cannot be imported: {first_line(error)}",
                    f"pip install --force-reinstall --no-deps {package}")
        return
    yield Check("CuPy", "ok", f"{version} ({package})")

    # The libraries must be of the CUDA that this CuPy was built for, whatever the driver could run.
    built_for = re.fullmatch(r"cupy-(cuda1[23])x", package)
    install = f"pip install 'minidl[{built_for[1]}]'" if built_for else remove
    for name, load in (("NVRTC", _load_nvrtc), ("cuBLAS", _load_cublas), ("CUDA headers", _find_headers)):
        try:
            yield Check(name, "ok", load())
        except Exception as error:  # each library is missing in its own way
            yield Check(name, "missing", first_line(error), install)


def cache() -> Check:
    """Where compiled kernels are kept."""
    try:
        folder, lasting = host_build.cache_folder(), host_build.lasting_cache_folders()
    except DeviceError as error:
        return Check("kernel cache", "missing", str(error))
    if folder in lasting:
        return Check("kernel cache", "ok", str(folder))
    places = f"cannot write to {' or '.join(map(str, lasting))}" if lasting else "neither MINIDL_CACHE nor HOME is set"
    return Check("kernel cache", "wrong", f"{places}; each process compiles anew", f"export MINIDL_CACHE={NEW_FOLDER}")


def compiler() -> Check:
    try:
        command = host_build.compiler()
    except DeviceError as error:
        return Check("C++ compiler", "missing", str(error), "unset CXX" if os.environ.get("CXX") else "pip install ziglang")
    try:
        result = host_build.run([*command, "--version"])
    except DeviceError as error:
        return Check("C++ compiler", "wrong", str(error), USE_ZIG)
    if result.returncode:
        return Check("C++ compiler", "wrong", f"{' '.join(command)} --version fails", USE_ZIG)
    return Check("C++ compiler", "ok", f"{result.stdout.partition(chr(10))[0]}, {shutil.which(command[0])}")


def kernel(name: str) -> Check:
    """One of our kernels and a matrix product on the device, beside NumPy's results."""
    x = np.arange(-32, 32, dtype=np.float32).reshape(8, 8)  # whole numbers, of which all results are exact
    try:
        place = device.select(name)
        on_device = place.array(x)
        product = device.empty(x.shape, x.dtype, place)
        blas.gemm(on_device, on_device, product)
        results = place.to_host(relu.forward(on_device)), place.to_host(product)
        free = memory.limit_bytes(place)
    except CompileError as error:
        return Check(f"kernel on {name}", "wrong", str(error), USE_ZIG if name == "cpu" else None)
    except DeviceError as error:
        run = f"export MINIDL_CACHE={NEW_FOLDER}" if name == "cpu" else "nvidia-smi"
        return Check(f"kernel on {name}", "wrong", str(error), run)
    except Exception as error:  # whatever CUDA's libraries raise
        return Check(f"kernel on {name}", "wrong", first_line(error), None if name == "cpu" else "nvidia-smi")
    if not all(map(np.array_equal, results, (np.maximum(x, 0), x @ x))):
        return Check(f"kernel on {name}", "wrong", "results are not NumPy's", f"python -m minidl gradcheck --device {name}")
    return Check(f"kernel on {name}", "ok", "compiled, results as NumPy's" + (f"; {_gib(free)} of memory free" if free else ""))


def data_sets(data_dir: str | None) -> Iterator[Check]:
    """Which official files are there, by their names and sizes."""
    folders = data.folders(data_dir)
    for name, it in data.CIFARS.items():
        fetch = f"python -m minidl data --dataset {name}" + (f" --data-dir {shlex.quote(data_dir)}" if data_dir else "")
        try:
            found = cifar.find(it, folders)
            sizes = {path: (path.stat().st_size, file.size) for path, file in (found.files() if found else [])}
        except OSError as error:
            yield Check(it.title, "wrong", str(error), fetch)
            continue
        if not found:
            yield Check(it.title, "missing", f"not in {' nor '.join(map(str, folders)) or 'any folder'}", fetch)
            continue
        different = [f"{path} has {size:,} bytes, not {right:,}" for path, (size, right) in sizes.items() if size != right]
        total = sum(size for size, _ in sizes.values())
        yield Check(it.title, *(("wrong", different[0], fetch) if different else ("ok", f"{found.path}, {total:,} bytes")))


def extras() -> Iterator[Check]:
    """The optional packages of minidl, as the installed metadata lists them."""
    try:
        requirements = importlib.metadata.requires("minidl") or []
    except importlib.metadata.PackageNotFoundError:
        yield Check("package minidl", "missing", "not installed: it is imported from its sources", "pip install -e .")
        return
    packages: dict[str, list[str]] = {}
    for requirement in requirements:
        if match := re.match(r"([\w.-]+).*; extra == .(\w+)", requirement):
            packages.setdefault(match[2], []).append(match[1])
    for extra, names in packages.items():
        if extra in ("cuda12", "cuda13", "test"):  # CuPy has its own checks; the tests' are for developers
            continue
        versions = {name: _installed_version(name) for name in names}
        missing = [name for name, version in versions.items() if version is None]
        found = ", ".join(missing or [f"{name} {version}" for name, version in versions.items()])
        yield Check(f"extra {extra}", *(("missing", found, f"pip install 'minidl[{extra}]'") if missing else ("ok", found)))


def room() -> Iterator[Check]:
    yield Check("disk", "ok", f"{_gib(shutil.disk_usage('.').free)} free in this folder, where runs go")


# ---- what they look at


def _kernel_module() -> str:
    """"580.65.06, ", the version of the driver, where Linux tells."""
    try:
        match = re.search(r"\s(\d+\.\d+(\.\d+)?)\s", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        return ""
    return f"{match[1]}, " if match else ""


def _cupy_packages() -> list[str]:
    """The names of all packages that bring a module `cupy`."""
    names = {re.sub(r"[-_.]+", "-", distribution.name).lower() for distribution in importlib.metadata.distributions()}
    found = sorted(name for name in names if re.fullmatch(r"cupy(-cuda\d+x?|-rocm[\d-]+)?", name))
    module = importlib.util.find_spec("cupy")
    return found or (["cupy"] if module and module.origin else [])


def _load_nvrtc() -> str:
    from cupy.cuda import nvrtc

    return f"{_version(nvrtc.getVersion())}, {_loaded_from('libnvrtc.so')}"


def _load_cublas() -> str:
    from cupy_backends.cuda.libs import cublas  # noqa: F401 - loads it

    return _loaded_from("libcublas.so")


def _find_headers() -> str:
    try:
        pathfinder = importlib.import_module("cuda.pathfinder")
    except ImportError:
        return "those that come with CuPy"  # before 14
    folder = pathfinder.find_nvidia_header_directory("cudart")
    if not folder or not Path(folder, "cuda_fp16.h").is_file():
        raise FileNotFoundError("cuda_fp16.h is not found")
    return str(folder)


def _loaded_from(library: str) -> str:
    """The path of a library of this process."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return "loaded"
    paths = [line.split(maxsplit=5)[-1] for line in lines if f"/{library}" in line]
    return paths[0] if paths else "loaded"


def _installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _version(pair: tuple[int, int]) -> str:
    return f"{pair[0]}.{pair[1]}"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
