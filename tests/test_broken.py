"""The detectors at work: kernels that are wrong (tests/broken/) must be caught, their corrected twins must pass.

Each file holds kernels named broken... and one named fixed, of one signature: x (N) -> y (N), by one block.
"""

import ctypes
import faulthandler
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import guarded
from conftest import THREADS_PER_BLOCK
from minidl import host_build
from minidl.kernels import KernelFault, Kernels, launch_settings

FOLDER = Path(__file__).parent / "broken"
N = 100  # more than some blocks and fewer than others have threads, a multiple of none

DEFINITIONS = {
    "missing_barrier": lambda x: x + np.append(0, x[:-1]),
    "divergent_barrier": lambda x: x - x[0],
    "out_of_bounds": lambda x: np.append(np.diff(x), 0),
    "race_between_phases": lambda x: x * x.sum() + (x * x).sum(),
    "block_size_assumption": lambda x: x + x.sum(),
    "uninitialized_shared": lambda x: x + x.sum(),
    "undefined_behaviour": lambda x: x * 2**26,
}
FILES = {name: Kernels(FOLDER / f"{name}.cu") for name in DEFINITIONS}

# File, kernel, what the emulator says in blocks of 1, 2, 32 and 128 threads; None where the fault does not show.
UNWRITTEN, OUTSIDE = r"thread 0 reads \w+\[\d+\] before anyone wrote it", r"\w+\[{0}\] is outside 0..{1}".format
RACE = r"race: thread 1 reads \w+\[0\], thread 0 wrote it, no barrier in between"
AT = r"divergent barrier in block \(0, 0\): thread 0 at divergent_barrier.cu:\d+, thread {} at {}".format
FAULTS = [
    ("missing_barrier", "broken", None, UNWRITTEN, UNWRITTEN, RACE),
    ("divergent_barrier", "broken_branch", None, *[AT(1, r"divergent_barrier.cu:\d+")] * 3),
    ("divergent_barrier", "broken_return", None, None, None, AT(100, "its end")),
    ("divergent_barrier", "broken_loop", None, None, AT(4, "its end"), AT(100, "its end")),
    ("out_of_bounds", "broken_shared", *[OUTSIDE(100, 99)] * 4),
    ("race_between_phases", "broken", None, RACE, RACE, RACE),
    ("block_size_assumption", "broken_tree", UNWRITTEN, UNWRITTEN, None, OUTSIDE(32, 31)),
    ("uninitialized_shared", "broken", *[UNWRITTEN] * 4),
]


def run(file, kernel, x, threads=32):
    y = np.full(N, np.nan, np.float32)
    getattr(FILES[file], kernel)[1, threads](x, y, N)
    return y


@pytest.fixture
def x(rng):
    return rng.permutation(N).astype(np.float32)  # whole numbers, of which all results are exact


@pytest.fixture
def emulator(request):
    return "sanitize" if request.config.getoption("--sanitize") else "emulate"


@pytest.mark.parametrize("file", FILES)
def test_corrected_twin_is_right(target, x, file):
    y = target.poison(N, "float32")
    FILES[file].fixed[1, 32](target.array(x), y, N)
    assert np.array_equal(target.host(y), DEFINITIONS[file](x))


@pytest.mark.parametrize("threads", THREADS_PER_BLOCK)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault[0]}-{fault[1]}")
def test_fault_is_caught(emulator, x, fault, threads):
    file, kernel, *messages = fault
    message = messages[THREADS_PER_BLOCK.index(threads)]
    with launch_settings(emulator, threads):
        if message is None:
            assert np.array_equal(run(file, kernel, x), DEFINITIONS[file](x))
        else:
            with pytest.raises(KernelFault, match=f"^{kernel}: .*{message}"):
                run(file, kernel, x)
        # Nothing of the fault is left behind.
        assert np.array_equal(run(file, "fixed", x), DEFINITIONS[file](x))


@pytest.mark.parametrize("threads", THREADS_PER_BLOCK)
def test_block_size_assumption_shows_in_the_result(emulator, x, threads):
    with launch_settings(emulator, threads):
        right = np.array_equal(run("block_size_assumption", "broken_stride", x), DEFINITIONS["block_size_assumption"](x))
    assert right == (threads == 32)


def test_block_size_assumption_shows_in_fast_mode(x):
    y = run("block_size_assumption", "broken_stride", x)
    assert not np.array_equal(y, DEFINITIONS["block_size_assumption"](x))


# ---- the fast target, on arrays at the end of memory -----------------------------------------------------------------


def end_of_copy(work):
    """Call work() in a copy of this process -> its exit code, or the signal that ended it, negative."""
    process = os.fork()
    if process == 0:
        faulthandler.disable()  # whose report of the crash would be this process's own
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def copies(x):
    """Four at the end and one at the beginning, in some order."""
    return [guarded.copy(x) for _ in range(5)]


def test_who_reads_beyond_an_array_is_killed(x):
    ends = {kernel: [end_of_copy(lambda: getattr(FILES["out_of_bounds"], kernel)[1, 1](array, y, N)) for array in copies(x)]
            for kernel in ("broken_global", "fixed") for y in [np.empty(N, np.float32)]}
    assert sorted(ends["broken_global"]) == [*[-signal.SIGSEGV] * 4, 0] and ends["fixed"] == [0] * 5


def test_who_reads_in_front_of_an_array_is_killed(x):
    ends = [end_of_copy(lambda: ctypes.string_at(array.ctypes.data - 1, 1)) for array in copies(x)]
    assert sorted(ends) == [-signal.SIGSEGV, *[0] * 4]


# ---- under AddressSanitizer and UndefinedBehaviorSanitizer, which must be loaded before Python ---------------------


def run_sanitized(*command):
    def ask(option):
        return subprocess.run([*host_build.compiler(), option], capture_output=True, text=True).stdout.strip()

    asan = ask("-print-file-name=libasan.so")
    if "Free Software Foundation" not in ask("--version") or not os.path.isabs(asan):
        pytest.skip("needs g++ and its libasan.so")
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "LD_PRELOAD": asan, "ASAN_OPTIONS": "detect_leaks=0"})


LAUNCH = """
import sys
from pathlib import Path
import numpy as np
from minidl.kernels import Kernels, launch_settings

with launch_settings("sanitize"):
    kernel = getattr(Kernels(Path(sys.argv[1])), sys.argv[2])
    kernel[1, 32](np.arange(100, dtype=np.float32), np.empty(100, np.float32), 100)
"""


@pytest.mark.parametrize("file, kernel, message", [
    ("out_of_bounds", "broken_global", "heap-buffer-overflow"),
    ("undefined_behaviour", "broken_overflow", "signed integer overflow"),
    ("undefined_behaviour", "broken_shift", "left shift of"),
])
def test_sanitizer_ends_the_process(file, kernel, message):
    result = run_sanitized("-c", LAUNCH, FOLDER / f"{file}.cu", kernel)
    assert result.returncode != 0
    assert message in result.stderr
    assert f"{file}.cu:" in result.stderr


@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="this run is under the sanitizers itself")
def test_emulator_works_under_the_sanitizers():
    tests = [f"{__file__}::{test.__name__}" for test in (test_corrected_twin_is_right, test_fault_is_caught)]
    result = run_sanitized("-m", "pytest", "-q", "-p", "no:cacheprovider", "--sanitize", *tests)
    assert result.returncode == 0, result.stdout + result.stderr
