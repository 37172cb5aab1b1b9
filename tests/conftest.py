"""Fixtures: the targets that every op is tested on, and the command-line options --sanitize and --ptx."""

import os
from contextlib import contextmanager

import numpy as np
import pytest

import guarded
import ptx_machine
from minidl import device
from minidl.errors import DeviceError
from minidl.kernels import Kernel, acc_dtype, launch_settings, storage_dtype

THREADS_PER_BLOCK = (1, 2, 32, 128)
TEAM = 2  # threads, at least, that share the blocks of a launch in fast mode, also where CI gives a process one
os.environ["MINIDL_OFFLINE"] = "1"  # no test downloads anything, but from a server of its own


def find_cupy():
    """CuPy, where there is a GPU for it, or None."""
    try:
        import cupy
    except (ImportError, OSError):
        return None
    return cupy if cupy.cuda.is_available() else None


CUPY = find_cupy()  # before a test puts something else in its place


def pytest_addoption(parser):
    parser.addoption("--sanitize", action="store_true",
                     help="run the emulated targets under AddressSanitizer and UndefinedBehaviorSanitizer instead of all "
                          "targets; the process must be started with LD_PRELOAD=$(g++ -print-file-name=libasan.so)")
    parser.addoption("--ptx", metavar="ARCHITECTURE",
                     help="instead of all targets, interpret what NVRTC makes of the kernels for a GPU, as sm_90; with -k ptx "
                          "nothing but that")


def pytest_configure(config):
    ptx_machine.architecture = config.getoption("--ptx")
    if config.getoption("--sanitize") and "asan" not in os.environ.get("LD_PRELOAD", ""):
        pytest.exit("--sanitize needs LD_PRELOAD=$(g++ -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0", returncode=2)


class Target:
    """Where a test runs: a device, and how kernels are launched on it while the fixture is active.

    guards: whether arrays are such that what a kernel does beyond them ends the process (guarded.py).
    """

    def __init__(self, name, guards=False):
        mode, _, threads = name.partition("-")
        self.name, self.guards = name, guards
        self.place = device.select("cuda" if mode == "cuda" else "cpu")
        self.settings = {"mode": "fast" if mode == "cuda" else mode, "threads_per_block": int(threads) if threads else None}

    def flushes(self, dtype):
        """Whether kernels make zeros of results below the normal numbers."""
        return self.name.startswith(("cuda", "ptx")) and dtype == "float32"

    def array(self, values, dtype=None):
        """A NumPy array -> a contiguous copy on the device."""
        values = np.array(values, dtype=None if dtype is None else storage_dtype(dtype))
        return guarded.copy(values) if self.guards else self.place.array(values)

    def acc(self, values, dtype):
        """A NumPy array -> an array of the accumulation type of `dtype` on the device."""
        return self.array(values, acc_dtype(storage_dtype(dtype)))

    def poison(self, shape, dtype):
        """An array on the device that holds NaN, or the largest integer: what is not overwritten shows."""
        dtype = storage_dtype(dtype) if isinstance(dtype, str) else np.dtype(dtype)
        return self.array(np.full(shape, np.nan if dtype.kind not in "iu" else np.iinfo(dtype).max, dtype))

    def host(self, array):
        """An array on the device -> a float64 NumPy array."""
        return np.asarray(self.place.to_host(array)).astype(np.float64)


@contextmanager
def active(name, guards=True):
    """The Target of that name, on which kernels are launched meanwhile. guards: in fast mode, which nothing else watches."""
    it = Target(name, guards and name == "fast")
    with launch_settings(**it.settings), pytest.MonkeyPatch.context() as patch:
        if it.guards:
            patch.setattr(device.HostPool, "empty", lambda self, shape, dtype: guarded.empty(shape, dtype))
        if name == "fast":
            patch.setenv("OMP_NUM_THREADS", str(max(TEAM, device.cpu_threads())))
            device.host_threads().set_team_size(device.cpu_threads())
        if name == "ptx":
            patch.setattr(Kernel, "_launch_on_host", ptx_machine.launch_in_mode)
        yield it
    if name == "fast":
        device.host_threads().set_team_size(device.cpu_threads())


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call():
    """Where CuPy has no bfloat16, its tests are skipped with that reason."""
    try:
        return (yield)
    except DeviceError as error:
        if str(error).startswith("bfloat16 needs CuPy 14"):
            pytest.skip(str(error))
        raise


def pytest_runtest_teardown(item):
    """After an illegal access a process has no GPU any more. Its other tests are not to blame: they need another process."""
    if CUPY:
        try:
            CUPY.cuda.runtime.deviceSynchronize()
        except CUPY.cuda.runtime.CUDARuntimeError as error:
            if "PYTEST_XDIST_WORKER" in os.environ:
                os._exit(1)  # xdist says which test it was, and goes on in a new worker
            pytest.exit(f"{item.nodeid} has lost the GPU: {error}; `pytest -n 1` goes on with the others", returncode=1)


def pytest_generate_tests(metafunc):
    if "target" in metafunc.fixturenames:
        if metafunc.config.getoption("--sanitize"):
            names = [f"sanitize-{threads}" for threads in THREADS_PER_BLOCK]
        elif metafunc.config.getoption("--ptx"):
            names = ["ptx"]
        else:
            names = ["fast", *(f"emulate-{threads}" for threads in THREADS_PER_BLOCK)]
            names += ["cuda", "cuda-1", "cuda-32"] if CUPY else []
        metafunc.parametrize("target", names, indirect=True)


@pytest.fixture
def target(request):
    with active(request.param) as it:
        yield it


MACHINES = ["fast", *(["cuda"] if CUPY else [])]


@pytest.fixture(params=MACHINES)
def machine(request):
    """A Target as a user's run launches kernels, for what has been tested at other block sizes."""
    with active(request.param) as it:
        yield it


@pytest.fixture(params=["cpu", *(["cuda"] if CUPY else [])])
def place(request):
    """The devices of this machine, for what is not launched in several ways."""
    return device.select(request.param)


@pytest.fixture
def rng():
    return np.random.default_rng(20161)
