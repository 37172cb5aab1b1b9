"""What only an NVIDIA GPU can show. The ops themselves run on it in all other files, wherever there is one."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from conftest import CUPY
from minidl import device
from minidl.ops import relu
from test_failures import run_of

pytestmark = pytest.mark.skipif(not CUPY, reason="there is no NVIDIA GPU")
TESTS = Path(__file__).parent

THREE_TESTS = """
import cupy

def test_before():
    assert int(cupy.arange(3).sum()) == 3

def test_illegal_cuda():
    wild = cupy.RawKernel('extern "C" __global__ void wild(int* p) { *(p + (1ll << 40)) = 1; }', "wild")
    wild((1,), (1,), (cupy.zeros(1, cupy.int32),))
    cupy.cuda.runtime.deviceSynchronize()

def test_after():
    assert int(cupy.arange(3).sum()) == 3
"""


def test_an_illegal_access_ends_the_process_of_its_own_test_only(tmp_path):
    pytest.importorskip("xdist", reason="tests go on in another process: pytest-xdist")
    (tmp_path / "test_three.py").write_text(THREE_TESTS)
    result = subprocess.run([sys.executable, "-m", "pytest", "-n", "1", "-p", "conftest", "-p", "no:cacheprovider", tmp_path],
                            env={**os.environ, "PYTHONPATH": str(TESTS)}, capture_output=True, text=True, timeout=300)
    assert "2 passed" in result.stdout and "test_illegal_cuda" in result.stdout, result.stdout


def test_an_array_of_more_than_two_to_the_31_elements():
    place = device.select("cuda")
    free, _ = place.xp.cuda.runtime.memGetInfo()
    size = 2**31 + 4099
    if free < 5 * size:
        pytest.skip(f"needs {5 * size / 1e9:.0f} GB of memory")
    x = place.xp.full(size, -1, np.float16)
    x[-3:] = place.xp.asarray([2, -2, 3], np.float16)
    y = relu.forward(x)
    assert place.to_host(y[-3:]).tolist() == [2, 0, 3] and not y[:-3].any()


USE_A_KERNEL = """
import numpy as np
from minidl import device
from minidl.ops import relu
place = device.select("cuda")
print(place.to_host(relu.forward(place.array(np.array([-1, 2], np.float32)))).tolist())
"""


def test_damaged_kernels_in_the_cache_are_compiled_again(tmp_path):
    def run():
        result = subprocess.run([sys.executable, "-c", USE_A_KERNEL], env={**os.environ, "CUPY_CACHE_DIR": str(tmp_path)},
                                capture_output=True, text=True, timeout=300)
        assert result.stdout == "[0.0, 2.0]\n", result.stderr

    run()
    cached = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert cached
    for path in cached:
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 0xff
        path.write_bytes(raw)
    run()


BUSY = 'extern "C" __global__ void busy(long long cycles) { const long long end = clock64() + cycles; while (clock64() < end); }'


def test_a_step_does_not_wait_for_the_device():
    """The host is done with a step while the GPU has not begun it, being busy with something else."""
    place = device.select("cuda")
    run = run_of("wrn-10-1", 32, place, ema=0.9, clip_norm=1.0, mixup=0.2)
    batch = run.batches(0)[0]
    run.network.train()
    for _ in range(3):  # compiles kernels, and fills the memory pool
        run.trainer.step(batch)
    place.synchronize()
    place.xp.RawKernel(BUSY, "busy")((1,), (1,), (np.int64(2_000_000_000),))  # a second or more
    begin = time.perf_counter()
    run.trainer.step(batch)
    launched = time.perf_counter() - begin
    place.synchronize()
    assert launched < 0.5 * (time.perf_counter() - begin)


def test_the_host_needs_less_than_a_tenth_of_a_millisecond_for_a_step():
    place = device.select("cuda")
    run = run_of("wrn-16-4", 128, place, ema=0.9, clip_norm=1.0, mixup=0.2)
    batches, seconds = run.batches(0), []
    run.network.train()
    for _ in range(20):
        begin = time.perf_counter()
        for batch in batches:
            run.trainer.step(batch)
        seconds.append((time.perf_counter() - begin) / len(batches))
        place.synchronize()  # between the measurements: a queue of launches that is full would be waited for
    assert np.median(seconds) < 1e-4
