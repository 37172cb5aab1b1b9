"""Where arrays live: NumPy on the CPU, CuPy on an NVIDIA GPU. Choice of a device, allocation, threads."""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import os
import re
import sys
import threading
import weakref
from collections import deque
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from minidl import host_build, nvidia_driver
from minidl.errors import DeviceError, UsageError
from minidl.wording import counted

# A numpy or a cupy array: CuPy's have NumPy's interface, and no type stubs of their own.
Array: TypeAlias = npt.NDArray[Any]


def array_module(array: object) -> ModuleType:
    """The module, numpy or cupy, that `array` belongs to."""
    if isinstance(array, np.ndarray):
        return np
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(array, cupy.ndarray):
        return cupy
    raise TypeError(f"a numpy or cupy array is needed, got {type(array).__module__}.{type(array).__name__}")


def address(array: Array) -> int:
    """Where a numpy or cupy array begins in the memory of its device."""
    if isinstance(array, np.ndarray):
        return array.ctypes.data
    pointer: Any = array.data  # CuPy's MemoryPointer
    return int(pointer.ptr)


class Device:
    """A place for arrays and kernels.

    name: "cpu" or "cuda:N"; xp: numpy or cupy; description: one phrase for people.
    """

    def __init__(self, name: str, xp: ModuleType, description: str) -> None:
        self.name, self.xp, self.description = name, xp, description

    def check_type(self, dtype: np.dtype[Any]) -> None:
        """Raise DeviceError where the device's library has no arrays of this type."""
        if dtype.name != "bfloat16" or self.name == "cpu":
            return
        for module, version in ((self.xp, "14"), (np, "2.1.2")):  # CuPy 14 has the type where NumPy is new enough
            if _numbers(module.__version__) < _numbers(version):
                raise DeviceError(f"bfloat16 needs CuPy 14 and NumPy 2.1.2, and this is {module.__name__} {module.__version__}: "
                                  "upgrade it, or use another precision")

    def synchronize(self) -> None:
        """Wait until everything launched so far is done, so that a clock can be read."""
        if self.name != "cpu":
            self.xp.cuda.get_current_stream().synchronize()

    def array(self, values: npt.ArrayLike, dtype: npt.DTypeLike | None = None) -> Array:
        """`values` (a NumPy array or a sequence) as a contiguous array on this device: itself, not a copy, where it is one. Raises
        as `check_type`."""
        wanted = getattr(values, "dtype", None) if dtype is None else np.dtype(dtype)
        if isinstance(wanted, np.dtype):
            self.check_type(wanted)
        return self.xp.ascontiguousarray(self.xp.asarray(values, dtype=dtype))

    def to_host(self, array: Any) -> Array:  # Any: NumPy's arrays have no `get`
        """An array of this device as a NumPy array: on the CPU itself, not a copy. Waits for the device."""
        return array if self.name == "cpu" else array.get()


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


def select(name: str = "auto") -> Device:
    """"auto", "cpu", "cuda" or "cuda:N" -> Device. "auto" is the first GPU, or the CPU where none can be used.

    Raises DeviceError for a GPU that is not there, saying what is missing, and UsageError for another name.
    """
    index = gpu_number(name)
    return _cpu() if index is None else _gpu(index)


def gpu_number(name: str) -> int | None:
    """The number of the GPU that `select` would take, or None for the CPU. No memory of it is taken. Raises as `select`,
    but does not see whether there are so many."""
    if name == "cpu":
        return None
    match = re.fullmatch(r"auto|cuda(?::(\d+))?", name)
    if not match:
        raise UsageError(f"device {name!r} is not one of auto, cpu, cuda, cuda:N")
    missing = _missing_for_gpu()
    if missing and name == "auto":
        return None
    if missing:
        raise DeviceError(f"--device {name}: {missing}")
    return int(match[1] or 0)


def gpu_count() -> int:
    """The GPUs that this process may use, as their driver says; 0 without one."""
    driver = nvidia_driver.find()
    return len(driver.gpus) if driver else 0


def _cpu() -> Device:
    return Device("cpu", np, f"CPU, {counted(cpu_threads(), 'thread')}")


def _gpu(index: int) -> Device:
    import cupy

    count = cupy.cuda.runtime.getDeviceCount()
    if index >= count:
        raise DeviceError(f"--device cuda:{index}: this machine has {count} GPU(s), numbered from 0")
    cupy.cuda.Device(index).use()
    properties = cupy.cuda.runtime.getDeviceProperties(index)
    memory = properties["totalGlobalMem"] / 2**30
    return Device(f"cuda:{index}", cupy, f"{properties['name'].decode()} (cuda:{index}), {memory:.0f} GiB")


def _missing_for_gpu() -> str | None:
    """What keeps this process from using a GPU, as a phrase with its remedy, or None."""
    try:
        driver = nvidia_driver.find()
    except DeviceError as error:
        return f"{error}: see that `nvidia-smi` works, or use --device cpu"
    if driver is None or not driver.gpus:
        return "no NVIDIA GPU or driver found: see that `nvidia-smi` lists one, or use --device cpu"
    install = f"`pip install 'minidl[{driver.extra}]'`"
    try:
        from cupy import cuda
    except ImportError as error:
        if error.name == "cupy":
            if sys.modules.get("cupy"):  # an empty folder of that name, left behind by pip, which Python imports as well
                del sys.modules["cupy"]
            return f"CuPy is not installed: {install}"
        return f"CuPy cannot be imported ({first_line(error)}): {install}"
    except OSError as error:  # no home folder to keep its compiled kernels in
        return f"CuPy cannot be imported: {error}; set CUPY_CACHE_DIR to a folder that can be written"
    if not cuda.is_available():
        return (f"CuPy finds none of the driver's {len(driver.gpus)} GPUs: it must be the one of minidl[{driver.extra}]; "
                "`python -m minidl doctor` shows which one it is")
    try:
        cuda.nvrtc.getVersion()
        from cupy_backends.cuda.libs import cublas  # noqa: F401
    except (ImportError, RuntimeError) as error:
        return f"a CUDA library is missing ({first_line(error)}): {install}"
    return None


def first_line(error: Exception) -> str:
    """What an error of CuPy says, in one line. Its text may be a page that ends with the original error."""
    text = str(error)
    lines = (text.partition("Original error:")[2] or text).splitlines()
    return next((line.strip() for line in lines if line.strip(" =")), type(error).__name__)


MOST_THREADS = 256  # of a process: with more than cores, they wait for each other


def cpu_threads() -> int:
    """Threads that kernels use on the CPU: $OMP_NUM_THREADS, but at most MOST_THREADS, or all cores this process may use."""
    setting = os.environ.get("OMP_NUM_THREADS", "")
    if re.fullmatch(r"0*[1-9][0-9]*", setting):
        return int(setting) if len(setting.lstrip("0")) < 4 and int(setting) < MOST_THREADS else MOST_THREADS
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def host_threads() -> ctypes.CDLL:
    """The thread team of this process, a ctypes library with `run_on_team` and `set_team_size`."""
    source = host_build.OPS / "host_threads.cpp"
    team = host_build.library(source, host_build.read_source(source), "fast")
    team.set_team_size(cpu_threads())
    return team


def workers(like: Array) -> int:
    """How many threads share the blocks of a launch beside `like` (an array) on the CPU; 1 on a GPU."""
    return cpu_threads() if array_module(like) is np else 1


def empty(shape: tuple[int, ...], dtype: npt.DTypeLike, like: Array | Device) -> Array:
    """An uninitialized array beside `like` (an array or a Device), from that device's memory pool."""
    xp = like.xp if isinstance(like, Device) else array_module(like)
    return _host_pool.empty(shape, np.dtype(dtype)) if xp is np else xp.empty(shape, dtype)


def pooled_bytes() -> int:
    """What the CPU's memory pool holds, in use or kept for later."""
    return _host_pool.held_bytes()


CACHE_LINE = 64  # bytes


class HostPool:
    """Memory of large NumPy arrays, kept for the next arrays, as CuPy does on a GPU.

    Fresh pages from the operating system cost more time than the arithmetic on them. An array gets the smallest block
    that is free and at most twice its size. What is kept unused never exceeds the most that was in use at one time.
    """

    SMALLEST = 1 << 18  # bytes; malloc keeps smaller blocks by itself

    def __init__(self) -> None:
        self._free: dict[int, list[tuple[int, Array]]] = {}  # by size: when each block came back, and the block, in that order
        self._count = itertools.count()
        self._free_bytes = self._used_bytes = self._peak_bytes = 0
        self._lock = threading.Lock()
        self._lent: dict[int, tuple[weakref.ref[Array], Array]] = {}  # by the reference's id: whose array lives, and its block
        self._returned: deque[Array] = deque()  # blocks whose arrays are gone, before they are counted

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """An uninitialized array (shape), C-contiguous, whose memory returns here when its last view is gone."""
        size = math.prod(shape) * dtype.itemsize
        if size < self.SMALLEST:
            return np.empty(shape, dtype)
        with self._lock:
            self._take_back()
            block = self._take(size)
            self._used_bytes += block.nbytes
            self._peak_bytes = max(self._peak_bytes, self._used_bytes)
        # All views of an array keep alive the first one that stands on a foreign buffer: `owner`, not `block`.
        owner = np.frombuffer(block.data, dtype, count=size // dtype.itemsize)
        reference = weakref.ref(owner, self._return)
        self._lent[id(reference)] = reference, block
        return owner.reshape(shape)

    def held_bytes(self) -> int:
        """Bytes of all blocks, in use or kept for later."""
        with self._lock:
            self._take_back()
            return self._used_bytes + self._free_bytes

    def _return(self, reference: weakref.ref[Array]) -> None:
        # It may run in the middle of anything, this class included: it never waits for the lock. Whoever has it, or takes
        # it next, counts the block.
        self._returned.append(self._lent.pop(id(reference))[1])
        if self._lock.acquire(blocking=False):
            try:
                self._take_back()
            finally:
                self._lock.release()

    def _take_back(self) -> None:
        while self._returned:
            block = self._returned.popleft()
            self._used_bytes -= block.nbytes
            self._free_bytes += block.nbytes
            self._free.setdefault(block.nbytes, []).append((next(self._count), block))
        while self._free_bytes > self._peak_bytes:
            self._pop(min(self._free, key=lambda size: self._free[size][0][0]), 0)

    def _take(self, size: int) -> Array:
        fitting = size if size in self._free else min((free for free in self._free if size < free <= 2 * size), default=None)
        if fitting is None:
            try:
                return _fresh(size)
            except MemoryError:  # what is kept for later is needed now
                self._free.clear()
                self._free_bytes = 0
                return _fresh(size)
        return self._pop(fitting, -1)  # the one that came back last: it is the likeliest to be in the cache still

    def _pop(self, size: int, index: int) -> Array:
        _, block = self._free[size].pop(index)
        if not self._free[size]:
            del self._free[size]
        self._free_bytes -= size
        return block


def _fresh(size: int) -> Array:
    """Bytes from the operating system that begin with a cache line: a vector that begins elsewhere may lie in two."""
    block = np.empty(size + CACHE_LINE - 1, np.uint8)
    begin = -block.ctypes.data % CACHE_LINE
    return block[begin:begin + size]


_host_pool = HostPool()
# A forked child has none of the threads that could give the lock back.
os.register_at_fork(before=_host_pool._lock.acquire, after_in_parent=_host_pool._lock.release,
                    after_in_child=_host_pool._lock.release)
