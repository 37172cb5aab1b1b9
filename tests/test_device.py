"""Choice of a device, threads, and the memory pool of the host."""

import contextlib
import os
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from minidl import device, nvidia_driver
from minidl.device import Device, HostPool, array_module, cpu_threads, empty, select, workers
from minidl.errors import DeviceError, UsageError
from minidl.kernels import storage_dtype
from minidl.nvidia_driver import Driver, Gpu

# ---- choice --------------------------------------------------------------------------------------------------------

INSTALL = r"`pip install 'minidl\[cuda13\]'`"


def fake_cupy(gpus=1, nvrtc_version=lambda: (13, 0)):
    """As much of CuPy as `select` looks at, on a machine with so many GPUs."""
    used = []
    runtime = SimpleNamespace(getDeviceCount=lambda: gpus, getDeviceProperties=lambda index: {
        "name": b"NVIDIA Test", "totalGlobalMem": 24 * 2**30})
    return SimpleNamespace(used=used, ndarray=type("ndarray", (), {}), cuda=SimpleNamespace(
        is_available=lambda: gpus > 0, runtime=runtime, nvrtc=SimpleNamespace(getVersion=nvrtc_version),
        Device=lambda index: SimpleNamespace(use=lambda: used.append(index))))


def has_driver(monkeypatch, cuda, gpus):
    """NVIDIA's driver is there, for that version of CUDA, and so many GPUs; cuda None: it is not."""
    driver = cuda and Driver(cuda, [Gpu("NVIDIA Test", 24 * 2**30, (9, 0))] * gpus)
    monkeypatch.setattr(nvidia_driver, "find", lambda: driver)


@pytest.fixture
def install(monkeypatch):
    """A function that makes `import cupy` give what it is given; None: not installed. The driver has two GPUs."""
    has_driver(monkeypatch, (13, 0), 2)

    def put(cupy):
        monkeypatch.setitem(sys.modules, "cupy", cupy)
        monkeypatch.setitem(sys.modules, "cupy_backends.cuda.libs", SimpleNamespace(cublas=None))

    return put


def missing_library():
    raise RuntimeError("libnvrtc.so.13: cannot open shared object file")


@pytest.mark.parametrize("cupy", [None, fake_cupy(gpus=0), fake_cupy()], ids=["no CuPy", "no GPU", "a GPU"])
def test_cpu_is_always_there(install, cupy):
    install(cupy)
    place = select("cpu")
    assert (place.name, place.xp) == ("cpu", np)
    assert place.description == ("CPU, 1 thread" if cpu_threads() == 1 else f"CPU, {cpu_threads()} threads")


@pytest.mark.parametrize("cupy, message", [
    (None, f"CuPy is not installed: {INSTALL}"),
    (fake_cupy(gpus=0), r"CuPy finds none of the driver's 2 GPUs: it must be the one of minidl\[cuda13\]; `python -m minidl doctor` shows "
     "which one it is"),
    (fake_cupy(nvrtc_version=missing_library), rf"a CUDA library is missing \(libnvrtc.so.13: .*\): {INSTALL}"),
], ids=["no CuPy", "no GPU for CuPy", "no NVRTC"])
def test_gpu_that_cannot_be_used(install, cupy, message):
    install(cupy)
    assert select("auto").name == "cpu"
    for name in ("cuda", "cuda:1"):
        with pytest.raises(DeviceError, match=f"^--device {name}: {message}$"):
            select(name)


@pytest.mark.parametrize("cuda, gpus", [(None, 0), ((13, 0), 0)], ids=["no driver", "no GPU"])
@pytest.mark.parametrize("cupy", [None, fake_cupy()], ids=["no CuPy", "CuPy"])
def test_no_gpu(install, monkeypatch, cuda, gpus, cupy):
    """CuPy could not help: it is not asked for."""
    install(cupy)
    has_driver(monkeypatch, cuda, gpus)
    assert select("auto").name == "cpu"
    with pytest.raises(DeviceError, match="^--device cuda: no NVIDIA GPU or driver found: see that `nvidia-smi` lists one, or use "
                                          "--device cpu$"):
        select("cuda")


def test_older_driver(install, monkeypatch):
    install(None)
    has_driver(monkeypatch, (12, 4), 1)
    with pytest.raises(DeviceError, match=r"CuPy is not installed: `pip install 'minidl\[cuda12\]'`$"):
        select("cuda")


def test_no_cublas(install, monkeypatch):
    install(fake_cupy())
    monkeypatch.setitem(sys.modules, "cupy_backends.cuda.libs", None)
    with pytest.raises(DeviceError, match=rf"--device cuda: a CUDA library is missing \(.*cupy_backends.*\): {INSTALL}"):
        select("cuda")


@pytest.mark.parametrize("error, message", [
    ("ImportError('libcuda.so.1 is broken')", rf"CuPy cannot be imported \(libcuda.so.1 is broken\): {INSTALL}"),
    ("ModuleNotFoundError('No module named fastrlock', name='fastrlock')",
     rf"CuPy cannot be imported \(No module named fastrlock\): {INSTALL}"),
    ("ImportError('\\n=====\\nFailed to import CuPy.\\n\\nOriginal error:\\n  ImportError: libx.so is broken\\n=====\\n')",
     rf"CuPy cannot be imported \(ImportError: libx.so is broken\): {INSTALL}"),
    ("OSError('/root is read-only')",
     "CuPy cannot be imported: /root is read-only; set CUPY_CACHE_DIR to a folder that can be written"),
])
def test_import_of_cupy_fails(install, monkeypatch, tmp_path, error, message):
    (tmp_path / "cupy.py").write_text(f"raise {error}")
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert select("auto").name == "cpu"
    with pytest.raises(DeviceError, match=f"^--device cuda: {message}$"):
        select("cuda")


def test_an_empty_folder_named_cupy(install, monkeypatch, tmp_path):
    """Python imports it, but it is not CuPy, and nobody may take it for that."""
    (tmp_path / "cupy").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in [name for name in sys.modules if name.partition(".")[0] == "cupy"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(DeviceError, match=f"^--device cuda: CuPy is not installed: {INSTALL}$"):
        select("cuda")
    assert "cupy" not in sys.modules


@pytest.mark.parametrize("name, index", [("auto", 0), ("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)])
def test_a_gpu(install, name, index):
    cupy = fake_cupy(gpus=2)
    install(cupy)
    place = select(name)
    assert (place.name, place.xp, cupy.used) == (f"cuda:{index}", cupy, [index])
    assert place.description == f"NVIDIA Test (cuda:{index}), 24 GiB"


def test_a_gpu_that_is_not_there(install):
    install(fake_cupy(gpus=2))
    with pytest.raises(DeviceError, match=r"--device cuda:2: this machine has 2 GPU\(s\), numbered from 0"):
        select("cuda:2")


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:-1", "cuda:x", "CPU", "cpu:0", "", "cuda "])
def test_unknown_device(name):
    with pytest.raises(UsageError, match=f"device {name!r} is not one of auto, cpu, cuda, cuda:N"):
        select(name)


@pytest.mark.parametrize("setting, threads", [("1", 1), ("03", 3), ("256", 256), ("257", 256), ("4294967296", 256), ("9" * 5000, 256)])
def test_cpu_threads_that_are_asked_for(monkeypatch, setting, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", setting)
    assert cpu_threads() == threads


@pytest.mark.parametrize("setting", ["", "0", "-2", "4,2", "many", "²"])
def test_cpu_threads_are_all_cores(monkeypatch, setting):
    monkeypatch.setenv("OMP_NUM_THREADS", setting)
    assert cpu_threads() == (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())  # macOS


@pytest.mark.parametrize("array", [[1.0], None, 1.0, np.float32(1), "array"], ids=repr)
def test_not_an_array(array):
    kind = f"{type(array).__module__}.{type(array).__name__}"
    with pytest.raises(TypeError, match=f"a numpy or cupy array is needed, got {kind}"):
        array_module(array)


def test_module_of_an_array(install):
    install(None)
    assert array_module(np.zeros(1)) is np
    cupy = fake_cupy()
    install(cupy)
    assert array_module(cupy.ndarray()) is cupy


def test_workers(install):
    cupy = fake_cupy()
    install(cupy)
    assert (workers(np.zeros(1)), workers(cupy.ndarray())) == (cpu_threads(), 1)


# ---- memory --------------------------------------------------------------------------------------------------------

SHAPE = (4, 256, 1024)  # of float32: 4 MiB
FLOAT = np.dtype("float32")


@pytest.fixture
def pool():
    return HostPool()


def address(array):
    return array.__array_interface__["data"][0]


def test_what_is_kept_is_given_up_where_memory_is_short(pool, monkeypatch):
    kept = pool.empty(SHAPE, FLOAT)
    del kept
    fresh, refusals = device._fresh, ["none left"]

    def once_refused(size):
        if refusals:
            raise MemoryError(refusals.pop())
        return fresh(size)

    monkeypatch.setattr(device, "_fresh", once_refused)
    array = pool.empty((4 << 20,), FLOAT)
    assert not refusals and pool.held_bytes() == array.nbytes


def test_blocks_are_counted_by_their_own_size(pool):
    large = pool.empty((6 << 18,), FLOAT)
    del large
    smaller = pool.empty((4 << 18,), FLOAT)
    assert pool.held_bytes() == 6 << 20
    del smaller
    assert pool.held_bytes() == 6 << 20


def test_a_block_of_twice_the_size_is_taken_and_none_larger(pool):
    place = address(pool.empty((2 << 18,), FLOAT))
    assert address(pool.empty((1 << 18,), FLOAT)) == place
    assert address(pool.empty(((1 << 18) - 1,), FLOAT)) != place


@pytest.mark.parametrize("shape, dtype", [
    (SHAPE, "float32"), ((256, 4, 1024), "int32"), ((1 << 21,), "uint16"), ((2, 1 << 21), "uint8")], ids=str)
def test_memory_is_used_again(pool, shape, dtype):
    """For any shape and type of the same size."""
    first = pool.empty(SHAPE, FLOAT)
    place = address(first)
    del first
    second = pool.empty(shape, np.dtype(dtype))
    assert address(second) == place
    assert second.shape == shape
    assert second.dtype == dtype
    assert second.flags.c_contiguous and second.flags.writeable


@pytest.mark.parametrize("view", [
    lambda a: a[1:3], lambda a: a[..., ::-1], lambda a: a.reshape(-1), lambda a: a.T, lambda a: a.view(np.uint8),
    lambda a: a[1:].reshape(3, -1)[:, 5:].T[::2], lambda a: np.asarray(memoryview(a)), lambda a: a.view(np.recarray),
], ids=["slice", "flip", "reshape", "transpose", "type", "view of views", "memoryview", "subclass"])
def test_memory_is_not_used_again_while_a_view_lives(pool, view):
    array = pool.empty(SHAPE, FLOAT)
    array.fill(7)
    place, kept = address(array), view(array)
    expected = kept.copy()
    del array
    other = pool.empty(SHAPE, FLOAT)
    other.fill(0)
    assert address(other) != place
    assert np.array_equal(kept, expected)
    del kept
    assert address(pool.empty(SHAPE, FLOAT)) == place


def test_kept_memory_is_bounded_by_the_most_in_use(pool):
    """Arrays of 40 sizes, at most two alive at a time."""
    sizes = [(2 << 20) + 4096 * i for i in range(40)]
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for size in sizes:
            two = [pool.empty((size,), np.dtype("uint8")) for _ in range(2)]
            del two
        kept = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert sizes[-1] < kept < 2 * sizes[-1] + 100_000


def test_memory_of_recent_sizes_is_kept(pool):
    """A training step of six sizes allocates nothing the second time."""
    step = lambda: [pool.empty(((6 + i) << 18,), FLOAT) for i in range(6)]  # noqa: E731
    first = {address(array) for array in step()}
    assert {address(array) for array in step()} == first


@pytest.mark.parametrize("shape", [(), (0,), (0, 5), (10,), (255, 256)], ids=str)
def test_small_arrays_bypass_the_pool(pool, shape):
    array = pool.empty(shape, FLOAT)
    assert array.base is None and array.shape == shape
    assert pool.empty((256, 256), FLOAT).base is not None  # the smallest that does not


@pytest.mark.parametrize("size", [1 << 16, 65_537, 1 << 20])
def test_pooled_arrays_begin_with_a_cache_line(pool, size):
    assert [address(pool.empty((size,), FLOAT)) % 64 for _ in range(2)] == [0, 0]


def test_threads_share_the_pool(pool):
    """No memory is handed to two at once."""
    def work(me):
        for i in range(100):
            array = pool.empty(((1 + i % 3) << 17,), FLOAT)
            array.fill(me)
            view = array[::1000]
            del array
            assert (view == me).all()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))  # raises what they raised


def test_empty_is_beside_an_array_or_on_a_device(install):
    for like in (np.zeros(1), select("cpu")):
        array = empty((2, 3), "float32", like)
        assert isinstance(array, np.ndarray) and array.shape == (2, 3) and array.dtype == FLOAT
    cupy = fake_cupy()
    cupy.empty = lambda shape, dtype: ("cupy", shape, dtype)
    install(cupy)
    for like in (cupy.ndarray(), select("cuda")):
        assert empty((2, 3), "float32", like) == ("cupy", (2, 3), "float32")


def test_types_that_the_library_does_not_have(monkeypatch):
    need = "bfloat16 needs CuPy 14 and NumPy 2.1.2, and this is "
    for version, numpy, name, message in (("13.6.0", "2.4.6", "cuda:0", need + "cupy 13.6.0: upgrade it"),
                                          ("14.0.1", "2.1.2", "cuda:0", None), ("13.6.0", "2.0.2", "cpu", None),
                                          ("14.0.0rc1", "2.0.2", "cuda:0", need + "numpy 2.0.2: upgrade it"),
                                          ("14.2.0", "2.10.0", "cuda:0", None)):
        monkeypatch.setattr(np, "__version__", numpy)
        place = Device(name, SimpleNamespace(__name__="cupy", __version__=version), "")
        place.check_type(storage_dtype("float16"))
        with pytest.raises(DeviceError, match=message) if message else contextlib.nullcontext():
            place.check_type(storage_dtype("bfloat16"))
        if message:
            for array, dtype in (([1.0], "bfloat16"), (np.zeros(1, storage_dtype("bfloat16")), None)):
                with pytest.raises(DeviceError, match=message):
                    place.array(array, dtype)
