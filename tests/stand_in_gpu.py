"""A stand-in for CuPy on a machine without a GPU, as far as training needs it: kernels and products run on the CPU.

As on a GPU, what is recorded is not done before the graph is launched; a graph has addresses and numbers, and keeps no array
alive; memory that became free is given away again; and the host gets no number out of an array while something is recorded.
What it cannot show is what really happens on a GPU: tests run on a real one too, wherever there is one.
"""

import contextlib
import sys
import weakref
from collections import defaultdict
from functools import partial
from types import ModuleType, SimpleNamespace

import numpy as np

from minidl import blas, device
from minidl.kernels import Kernel


class CUDARuntimeError(RuntimeError):
    pass


class State:
    """What CuPy keeps per thread."""

    def __init__(self):
        self.pools, self.given_back = [], []  # all MemoryPools, and what the driver got back
        self.pool = self.allocator = None     # set once there is a state that they can refer to
        self.stream = Stream()
        self.recorded = None  # while a stream is captured: the calls
        self.spoiled = False


state = None


class Pointer:
    """The memory of an array, without keeping it alive."""

    def __init__(self, array):
        self.__array_interface__ = dict(array.__array_interface__)


def unwrapped(value):
    """The argument of a call as NumPy takes it: arrays as arrays without an owner, as CUDA's pointers are."""
    if isinstance(value, GpuArray):
        return np.asarray(Pointer(value)).view(value.dtype)
    if isinstance(value, np.ndarray):
        raise TypeError("an array of the host, where CuPy takes none")
    return value


def do(call, *arguments):
    """Call it, or record the call."""
    call = partial(call, *map(unwrapped, arguments))
    if state.recorded is None:
        call()
    else:
        state.recorded.append(call)


class GpuArray(np.ndarray):
    """In place of cupy.ndarray."""

    def __array_ufunc__(self, ufunc, method, *inputs, out=(None,), **more):
        assert method == "__call__" and not more
        result = out[0]
        if result is None:
            like = ufunc(*(np.zeros(value.shape, value.dtype) if isinstance(value, GpuArray) else value for value in inputs))
            result = empty(like.shape, like.dtype)
        do(lambda target, *values: ufunc(*values, out=target), result, *inputs)
        return result

    def __array_function__(self, function, types, args, kwargs):
        raise TypeError(f"numpy.{function.__name__} of an array on a GPU")

    def __getitem__(self, key):
        keys = key if isinstance(key, tuple) else (key,)
        all_of = keys if Ellipsis in keys else (*keys, ...)
        return self.view(np.ndarray)[all_of].view(GpuArray)  # of one element too an array, as CuPy's

    def __setitem__(self, key, value):
        def assign(target, value):
            target[key] = value

        do(assign, self, value)

    def reshape(self, *shape):
        host = self.view(np.ndarray)
        view = host.reshape(*shape)
        if np.may_share_memory(view, host) or not self.size:
            return view.view(GpuArray)
        return copy(self, lambda x: x.reshape(*shape))

    def copy(self):
        return copy(self)

    def get(self):
        if state.recorded is not None:
            state.spoiled = True
            raise RuntimeError("the current stream is capturing, so D2H transfers are disallowed")
        return np.array(self.view(np.ndarray))

    def item(self):
        return self.get().item()

    def __float__(self):
        return float(self.get())

    def __int__(self):
        return int(self.get())

    def __bool__(self):
        return bool(self.get())


def copy(array, seen_as=lambda x: x):
    host = seen_as(array.view(np.ndarray))
    result = empty(host.shape, array.dtype)
    do(lambda target, source: np.copyto(target, seen_as(source)), result, array)
    return result


def take_fitting(size, free):
    """The least of the free blocks that has that size, and is used by half, or None."""
    fitting = [block for block in free if size <= len(block) <= 2 * size]
    if not fitting:
        return None
    block = min(fitting, key=len)
    free[:] = [other for other in free if other is not block]
    return block


def from_driver(size):
    """Memory that somebody gave back, or more."""
    block = take_fitting(size, state.given_back)
    return np.empty(size, np.uint8) if block is None else block


class MemoryPool:
    """A block that became free goes to whoever next needs most of it on the same stream. The free ones stay until they are
    asked back, even if nobody knows the pool any more."""

    def __init__(self, allocator):
        self.allocate, self.free, self.total = allocator, defaultdict(list), 0
        state.pools.append(self)

    def malloc(self, size):
        block = take_fitting(size, self.free[id(state.stream)])
        if block is None:
            try:
                block = self.allocate(size)
            except MemoryError:  # as CuPy does, whoever may still hold the addresses
                self.free_all_blocks()
                block = self.allocate(size)
            self.total += len(block)
        owner = np.frombuffer(block.data, np.uint8)
        owner[...] = 0xff  # NaN, or -1: what nobody has written shows
        weakref.finalize(owner, self.free[id(state.stream)].append, block).atexit = False
        return owner

    def free_all_blocks(self):
        for free in self.free.values():
            self.total -= sum(map(len, free))
            if self.allocate is from_driver:
                state.given_back += free
            free.clear()

    def total_bytes(self):
        return self.total

    def used_bytes(self):
        return self.total - sum(len(block) for free in self.free.values() for block in free)


class Stream:
    def __init__(self, non_blocking=False):
        self.outer = []

    def __enter__(self):
        self.outer.append(state.stream)
        state.stream = self

    def __exit__(self, *error):
        state.stream = self.outer.pop()

    def begin_capture(self):
        state.recorded, state.spoiled = [], False

    def end_capture(self):
        calls, state.recorded = state.recorded, None
        if state.spoiled:
            raise CUDARuntimeError("cudaErrorStreamCaptureInvalidated: operation failed due to a previous error during capture")
        return Graph(calls)

    def synchronize(self):
        assert state.recorded is None


class Graph:
    def __init__(self, calls):
        self.calls = calls

    def launch(self):
        for call in self.calls:
            call()


@contextlib.contextmanager
def using_allocator(allocator):
    before, state.allocator = state.allocator, allocator
    try:
        yield
    finally:
        state.allocator = before


def empty(shape, dtype=np.float64):
    dtype = np.dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    return state.allocator(max(size, 1))[:size].view(dtype).reshape(shape).view(GpuArray)


def full(value, shape, dtype=np.float64):
    result = empty(shape, dtype)
    result[...] = value
    return result


def asarray(values, dtype=None):
    if isinstance(values, GpuArray):
        assert dtype in (None, values.dtype)
        return values
    assert state.recorded is None, "a copy from the host cannot be recorded"
    values = np.asarray(values, dtype)
    result = empty(values.shape, values.dtype)
    result.view(np.ndarray)[...] = values
    return result


def cupy():
    """The module."""
    module = ModuleType("cupy")
    module.__version__ = "14.0.0"
    module.ndarray, module.empty, module.asarray = GpuArray, empty, asarray
    module.zeros, module.ones = partial(full, 0), partial(full, 1)
    module.zeros_like = lambda array: full(0, array.shape, array.dtype)
    module.get_default_memory_pool = lambda: state.pool
    module.ascontiguousarray = lambda array: array if array.flags.c_contiguous else copy(array)
    module.cuda = SimpleNamespace(
        Stream=Stream, MemoryPool=MemoryPool, using_allocator=using_allocator, get_allocator=lambda: state.allocator,
        get_current_stream=lambda: state.stream, Device=lambda index: SimpleNamespace(compute_capability="75"),
        runtime=SimpleNamespace(CUDARuntimeError=CUDARuntimeError, getDevice=lambda: 99, cudaDevAttrMultiProcessorCount=16,
                                deviceGetAttribute=lambda attribute, device: {16: 2}[attribute]),
        nvtx=SimpleNamespace(RangePush=lambda name: None, RangePop=lambda: None))
    return module


def install(monkeypatch):
    """Put it into CuPy's place for a test -> the Device."""
    global state
    state = State()
    state.pool = MemoryPool(from_driver)
    state.allocator = state.pool.malloc
    module, array_module = cupy(), device.array_module

    def array_module_of_all(array):
        return module if isinstance(array, GpuArray) else array_module(array)

    def gpu_function(kernel, precision):
        def launch(grid, block, values):
            do(lambda *values: kernel._launch_on_host(precision, grid, *block, values), *values)

        return launch

    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.setitem(sys.modules, "cupy.cuda", module.cuda)
    for name, user in list(sys.modules.items()):  # of others, a module of CuPy may be imported when it is looked at
        if name.startswith("minidl.") and vars(user).get("array_module") is array_module:
            monkeypatch.setattr(user, "array_module", array_module_of_all)
    monkeypatch.setattr(Kernel, "_gpu_function", gpu_function)
    monkeypatch.setattr(blas, "_gemm_on_gpu", partial(do, blas._gemm_on_host))
    return device.Device("cuda:99", module, "a stand-in")
