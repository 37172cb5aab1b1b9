"""The loader: signatures, launches and their refusals, the vocabulary of common.cuh, and builds for the CPU."""

import ctypes
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from conftest import CUPY
from minidl import device, host_build
from minidl.errors import DeviceError
from minidl.host_build import OPS, CompileError
from minidl.kernels import C_TYPES, LARGEST_COUNT, Kernels, blocks_for, launch_settings, parse_signatures, storage_dtype

FOLDER = Path(__file__).parent / "kernels"
ARGUMENTS, CONVERT, VOCABULARY = (Kernels(FOLDER / f"{name}.cu") for name in ("arguments", "convert", "vocabulary"))


# ---- signatures --------------------------------------------------------------------------------------------------


def test_signatures():
    signatures = parse_signatures("""
        // extern "C" __global__ void ghost(int n) {}
        /* extern "C" __global__ void ghost(
               int n) {} */
        __device__ float not_a_kernel(float x) { return x; }
        extern "C" __global__ void first(const real* __restrict__ x,  // (C, H*W), not an int n
                                         unsigned long long *key, acc* const y,
                                         long long n, const float eps) {}
        extern "C" __global__
        void second(unsigned char* bytes) {}
    """)
    seen = {name: [(p.name, p.c_type, p.is_array) for p in parameters] for name, parameters in signatures.items()}
    assert seen == {
        "first": [("x", "real", True), ("key", "unsigned long long", True), ("y", "acc", True), ("n", "long long", False),
                  ("eps", "float", False)],
        "second": [("bytes", "unsigned char", True)],
    }
    assert [p.is_const for p in signatures["first"] if p.is_array] == [True, False, False]


@pytest.mark.parametrize("path", sorted(OPS.glob("*.cu")), ids=lambda path: path.name)
def test_every_kernel_has_a_signature_of_known_types(path):
    signatures = parse_signatures(path.read_text())
    assert len(signatures) == path.read_text().count("__global__") > 0
    for parameters in signatures.values():
        assert {p.c_type for p in parameters} <= {*C_TYPES, "real", "acc"}


@pytest.mark.parametrize("machine, flag", [("x86_64", "-march=native"), ("aarch64", "-mcpu=native"), ("arm64", "-mcpu=native")])
def test_flag_for_all_instructions(machine, flag):
    """On ARM, "the clang compiler does not support '-march=native'", says clang 14."""
    assert host_build.flag_for_all_instructions(machine) == flag


def test_the_emulator_asks_for_fibers_before_any_header(tmp_path):
    """As <ucontext.h> of macOS demands; after another header, the structure lacks its last member."""
    unit = tmp_path / "it.cpp"
    unit.write_text("#ifndef _XOPEN_SOURCE\n#error ucontext routines require _XOPEN_SOURCE to be defined\n#endif\n")
    for mode in ("emulate", "sanitize"):
        subprocess.run([*host_build.compiler(), *host_build.FLAGS[mode], "-E", unit, "-o", os.devnull], check=True)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="these are levels of x86-64")
@pytest.mark.parametrize("level", ["x86-64", "sandybridge", "haswell", "skylake-avx512"])
@pytest.mark.parametrize("real, acc", [("float", "float"), ("__nv_bfloat16", "float")])
def test_every_kernel_compiles_for_other_cpus(level, real, acc, tmp_path):
    """With vectors of 16 bytes, of 32 for floating-point numbers alone, of 32 for all, and of 64."""
    if "ziglang" in host_build.compiler():  # which has names of its own for them
        level = level.replace("-", "_")
    flags = [flag for flag in host_build.FLAGS["fast"] if flag not in ("-O3", "-march=native", "-shared")]
    command = [*host_build.compiler(), *flags, f"-march={level}", f"-DREAL={real}", f"-DACC={acc}", f"-I{OPS}"]
    for path in sorted(OPS.glob("*.cu")):
        if "tensor_core" not in path.name:
            subprocess.run([*command, "-S", "-x", "c++", path, "-o", tmp_path / "it.s"], check=True, timeout=300)


def test_unknown_kernel():
    with pytest.raises(AttributeError, match="arguments.cu has no kernel 'scales'"):
        ARGUMENTS.scales  # noqa: B018


# ---- arguments -----------------------------------------------------------------------------------------------------


def type_name(value):
    return type(value).__name__


ZEROS = dict.fromkeys([p.name for p in ARGUMENTS.signatures["scalars"][1:]], 0)
LIMITS = {"i": np.int32, "l": np.int64, "u": np.uint32, "m": np.uint64, "c": np.uint8, "s": np.uint16}
FLOATS = "fda"


def arrived(place, name, value):
    """What a kernel gets as its scalar `name` when it is launched with `value`."""
    y = place.array([np.nan])
    ARGUMENTS.scalars[1, 1](y, *{**ZEROS, name: value}.values())
    return place.to_host(y)[0]


@pytest.mark.parametrize("value", [7, np.int8(7), np.int64(7), np.uint64(7)], ids=type_name)
@pytest.mark.parametrize("name", ZEROS)
def test_integers_are_converted(place, name, value):
    assert arrived(place, name, value) == 7


@pytest.mark.parametrize("value", [-2.5, np.float64(-2.5), np.float32(-2.5), np.float16(-2.5)], ids=type_name)
@pytest.mark.parametrize("name", FLOATS)
def test_floats_are_converted(place, name, value):
    assert arrived(place, name, value) == -2.5


@pytest.mark.parametrize("name, dtype", LIMITS.items())
def test_limits_of_integers(place, name, dtype):
    least, most = np.iinfo(dtype).min, LARGEST_COUNT if name == "i" else np.iinfo(dtype).max
    assert arrived(place, name, least) == least
    assert arrived(place, name, most) == float(most)
    too_large = [least - 1, most + 1] + ([np.int64(most + 1)] if most < 2**63 - 1 else [])  # that one would wrap around
    for value in too_large:
        with pytest.raises(TypeError, match=f"scalars: {name} = {value} does not fit {np.dtype(dtype)}"):
            arrived(place, name, value)


def test_an_integer_too_large_for_a_float(place):
    with pytest.raises(TypeError, match="scalars: d = 1000.* does not fit float64"):
        arrived(place, "d", 10**400)


NEITHER = [True, np.True_, "7", None, 1j, [7], np.array(7)]


@pytest.mark.parametrize("value", [*NEITHER, 7.0, np.float64(7), np.float32(7)], ids=type_name)
@pytest.mark.parametrize("name", LIMITS)
def test_not_an_integer(place, name, value):
    with pytest.raises(TypeError, match=f"scalars: {name} must be an integer, got {type_name(value)}"):
        arrived(place, name, value)


@pytest.mark.parametrize("value", NEITHER, ids=type_name)
@pytest.mark.parametrize("name", FLOATS)
def test_not_a_number(place, name, value):
    with pytest.raises(TypeError, match=f"scalars: {name} must be a number, got {type_name(value)}"):
        arrived(place, name, value)


def scale(place, **changes):
    """Launch the kernel `scale` on good arguments, but for `changes`: functions of the good one."""
    x, y = (place.array(np.ones((4, 6), np.float32)) for _ in range(2))
    arguments = {"x": x, "y": y, "n": 24, "factor": 2.0}
    arguments.update({name: change(arguments[name]) for name, change in changes.items()})
    ARGUMENTS.scale[1, 32](*arguments.values())


@pytest.mark.parametrize("name", ["x", "y"])
@pytest.mark.parametrize("change, got", [
    (lambda a: a.T, r"contiguous float32 array, got non-contiguous float32 of shape \(6, 4\): (numpy|cupy).ascontiguousarray makes one"),
    (lambda a: a[::-1], r"contiguous float32 array, got non-contiguous float32 of shape \(4, 6\)"),
    (lambda a: a[:, 1:], r"contiguous float32 array, got non-contiguous float32 of shape \(4, 5\)"),
    (lambda a: a.ravel()[::2], r"contiguous float32 array, got non-contiguous float32 of shape \(12,\)"),
    (lambda a: a.astype("int32"), r"contiguous float32 array, got int32 of shape \(4, 6\)"),
    (lambda a: a.tolist(), "(numpy|cupy) array, got builtins.list"),
    (lambda a: 1.0, "(numpy|cupy) array, got builtins.float"),
    (lambda a: np.float32(1), "(numpy|cupy) array, got numpy.float32"),
    (lambda a: None, "(numpy|cupy) array, got builtins.NoneType"),
])
def test_refused_arrays(place, name, change, got):
    with pytest.raises(TypeError, match=f"scale: {name} must be a {got}"):
        scale(place, **{name: change})


def test_none_for_an_optional_array(target):
    x, y = target.array(np.ones(5), "float32"), target.poison(5, "float32")
    VOCABULARY.plus[1, 32](x, None, y, 5)
    assert (target.host(y) == 1).all()
    VOCABULARY.plus[1, 32](x, x, y, 5)
    assert (target.host(y) == 2).all()
    with pytest.raises(TypeError, match="plus: z must be a (numpy|cupy) array, got builtins.float"):
        VOCABULARY.plus[1, 32](x, 1.0, y, 5)
    with pytest.raises(TypeError, match="plus: y must be a (numpy|cupy) array, got builtins.NoneType"):
        VOCABULARY.plus[1, 32](x, x, None, 5)


@pytest.mark.parametrize("name", ["x", "y"])
@pytest.mark.parametrize("change, got", [
    (lambda a: a.astype(">f4"), ">f4"),
    (lambda a: np.frombuffer(bytearray(4 * a.size + 1), np.float32, offset=1), "unaligned float32"),
])
def test_memory_that_is_not_plain_numbers_is_refused(name, change, got):
    with pytest.raises(TypeError, match=f"scale: {name} must be a contiguous float32 array, got {got} of shape"):
        scale(device.select("cpu"), **{name: change})


def test_read_only_output_is_refused():
    def read_only(a):
        a.flags.writeable = False
        return a

    scale(device.select("cpu"), x=read_only)
    with pytest.raises(TypeError, match="scale: y is written, but the array is read-only"):
        scale(device.select("cpu"), y=read_only)


def test_types_of_arrays_must_agree(place):
    with pytest.raises(TypeError, match="scale: y must be a contiguous float64 array, got float32"):
        scale(place, x=lambda a: a.astype("float64"))
    with pytest.raises(TypeError, match="row_sums: sums must be a contiguous float64 array, got float32"):
        VOCABULARY.row_sums[1, 1](place.array(np.ones((1, 2))), place.array(np.ones((1, 2), np.float32)), 2)


@pytest.mark.skipif(not CUPY, reason="needs a GPU")
def test_arrays_on_different_devices_are_refused():
    with pytest.raises(TypeError, match="scale: y must be a cupy array, got numpy.ndarray"):
        scale(device.select("cuda"), y=lambda a: a.get())


@pytest.mark.parametrize("path", sorted(OPS.glob("*.cu")), ids=lambda path: path.name)
def test_every_kernel_refuses_what_it_is_not_declared_for(path):
    """By name, before anything is compiled. The argument of a wrong rank is one that is not contiguous."""
    kernels = Kernels(path)
    for name, parameters in kernels.signatures.items():
        good = [np.zeros((2, 2), parameter.dtype("float32")) if parameter.is_array else 1 for parameter in parameters]
        launch = getattr(kernels, name)[1, 32]
        with pytest.raises(TypeError, match=f"^{name}: {len(good) - 1} arguments, the kernel has {len(good)}: "):
            launch(*good[:-1])
        for index, parameter in enumerate(parameters):
            whole = not parameter.is_array and parameter.dtype("float32").kind in "iu"
            array = good[index]
            wrong = ([array[:, :1], array[::-1], array.astype(np.int8), 1.0, [1.0], *[None] * (not parameter.is_optional)]
                     if parameter.is_array else ["1", None, [1], np.zeros(1)] + [1.5, np.float64(1)] * whole)
            for argument in wrong:
                with pytest.raises(TypeError, match=f"^{name}: {parameter.name} must be a"):
                    launch(*good[:index], argument, *good[index + 1:])


@pytest.mark.parametrize("count", [0, 3, 5])
def test_count_of_arguments(count):
    with pytest.raises(TypeError, match=f"scale: {count} arguments, the kernel has 4: x, y, n, factor"):
        ARGUMENTS.scale[1, 32](*[0] * count)


# ---- launches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("n", [0, 1, 7, 1000])
def test_precision_follows_the_arrays(target, dtype, n):
    """Also: a GRID_LOOP covers each element once, with fewer and with more threads than elements."""
    x = target.array(np.arange(n) % 50, dtype)
    for blocks in (1, 3, 64):
        y = target.poison(n + 4, dtype)
        ARGUMENTS.scale[blocks, 32](x, y, n, 0.5)
        assert np.array_equal(target.host(y)[:n], np.arange(n) % 50 / 2)
        assert np.isnan(target.host(y)[n:]).all()


def test_precision_of_acc_arrays_alone(target):
    for dtype in (np.float32, np.float64):
        sums = target.poison((1, 2), dtype)
        VOCABULARY.row_sums[1, 32](target.array(np.full((1, 1), 1 / 3, dtype)), sums, 1)
        assert target.host(sums)[0, 0] == float(dtype(1 / 3))


def visited(place, blocks, threads, room):
    visits, shape = place.array(np.zeros(room, np.int32)), place.array(np.zeros(3, np.int32))
    ARGUMENTS.visit[blocks, threads](visits, shape)
    return place.to_host(visits), tuple(map(int, place.to_host(shape)))


@pytest.mark.parametrize("blocks", [1, 7, (1, 1), (5, 3), (1, 300)], ids=str)
def test_every_thread_of_every_block_runs_once(target, blocks):
    grid = blocks if isinstance(blocks, tuple) else (blocks, 1)
    threads = 1 if target.name == "fast" else target.settings["threads_per_block"] or 7
    visits, shape = visited(target.place, blocks, 7, room=grid[0] * grid[1] * threads + 9)
    assert shape == (*grid, threads)
    assert np.array_equal(visits, np.append(np.ones(grid[0] * grid[1] * threads), np.zeros(9)))


@pytest.mark.parametrize("blocks", [(2**16 + 1, 1), (1, 2**16 - 1)], ids=str)
def test_large_grids(place, blocks):
    visits, shape = visited(place, blocks, 1, room=blocks[0] * blocks[1])
    assert shape == (*blocks, 1)
    assert (visits == 1).all()


@pytest.mark.parametrize("team", [1, 2, 5])
def test_every_block_runs_once_in_a_team_of_any_size(team):
    place = device.select("cpu")
    try:
        device.host_threads().set_team_size(team)
        for blocks in (1, 2, 3, 1000) * 20:
            visits, _ = visited(place, blocks, 1, room=1000)
            assert np.array_equal(visits, np.arange(1000) < blocks)
    finally:
        device.host_threads().set_team_size(device.cpu_threads())


TEAM = """
#include <atomic>
#include <thread>
#include <vector>
#include "cuda_on_host.h"
extern "C" void run_on_team(void (*body)(void*, long long, long long), void* context, long long blocks);
extern "C" void set_team_size(int threads);

extern "C" __global__ void visit(char* visits) { ++visits[blockIdx.x]; }
EXPORT(visit)

static std::atomic<int> wrong{0};

static void launch_again_and_again() {
    for (unsigned blocks : {1, 2, 3, 1000, 5})
        for (int repeat = 0; repeat < 40; ++repeat) {
            std::vector<char> visits(blocks);
            char* slot = visits.data();
            launch_visit(blocks, 1, 1, (const char*)&slot);
            for (char count : visits) wrong += count != 1;
        }
}

int main() {
    set_team(run_on_team);
    for (int size : {2, 5, 1, 7, 3}) {  // larger and smaller
        set_team_size(size);
        launch_again_and_again();
    }
    std::thread another(launch_again_and_again);
    for (int size : {1, 4, 2}) {  // meanwhile
        set_team(run_on_team);  // as by each thread that loads a library at the same time
        set_team_size(size);
        launch_again_and_again();
    }
    another.join();
    return wrong != 0;
}
"""


@pytest.mark.parametrize("watched", ["thread", "address"])
def test_threads_of_the_team_do_not_race(tmp_path, watched):
    """Under ThreadSanitizer and AddressSanitizer."""
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    (tmp_path / "team.cpp").write_text(TEAM)
    built = subprocess.run(["g++", "-std=c++17", "-O1", "-g", "-pthread", "-DMINIDL_FAST", f"-I{OPS}", f"-fsanitize={watched}",
                            OPS / "host_threads.cpp", tmp_path / "team.cpp", "-o", tmp_path / "team"],
                           capture_output=True, text=True)
    if "cannot find" in built.stderr:
        pytest.skip(f"g++ has no library of -fsanitize={watched}")
    assert built.returncode == 0, built.stderr
    # setarch: ThreadSanitizer knows no more random places of memory than this version of it was made for.
    command = ["setarch", "-R", tmp_path / "team"] if shutil.which("setarch") else [tmp_path / "team"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120,
                            env={name: value for name, value in os.environ.items() if name != "LD_PRELOAD"})
    assert result.returncode == 0, result.stderr


def test_launches_from_several_threads():
    place = device.select("cpu")
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda blocks: (blocks, *visited(place, blocks, 1, room=blocks)), [1, 8, 100, 999] * 50))
    for blocks, visits, shape in results:
        assert shape == (blocks, 1, 1)
        assert (visits == 1).all()


@pytest.mark.parametrize("blocks, threads", [(0, 32), (-1, 32), (2**31, 32), ((1, 0), 32), ((1, 2**16), 32), (1, 0), (1, 1025)],
                         ids=str)
def test_refused_launch_shapes(blocks, threads):
    with pytest.raises(ValueError, match=r"scale: cannot launch .* blocks of -?\d+ threads: CUDA takes 1 to"):
        ARGUMENTS.scale[blocks, threads]


def test_launch_settings_are_restored():
    place = device.select("cpu")
    threads = lambda: visited(place, 1, 7, room=64)[1][2]  # noqa: E731
    with launch_settings("emulate", threads_per_block=3):
        assert threads() == 3
        with pytest.raises(ZeroDivisionError), launch_settings("emulate"):
            assert threads() == 7
            1 / 0  # noqa: B018
        assert threads() == 3
    assert threads() == 1  # fast


@pytest.mark.parametrize("n, blocks", [(0, 1), (1, 1), (4096, 1), (4097, 2), (2**28, 65535), (2**62, 65535)])
def test_blocks_for(n, blocks):
    assert blocks_for(n) == blocks


def test_storage_dtype():
    assert [storage_dtype(name).itemsize for name in ("float32", "float64", "float16", "bfloat16")] == [4, 8, 2, 2]
    with pytest.raises(ValueError, match="type 'int8' is not one of float32, float64, float16, bfloat16"):
        storage_dtype("int8")


def test_bfloat16_without_ml_dtypes(monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(DeviceError, match=r"bfloat16 needs the package ml_dtypes: `pip install 'minidl\[bf16\]'`"):
        storage_dtype("bfloat16")


# ---- the vocabulary of common.cuh ----------------------------------------------------------------------------------


def assert_same_numbers(actual, expected):
    """Bit for bit, -0 and all, except that any NaN stands for any other."""
    nan = np.isnan(expected.astype(np.float32))
    assert np.array_equal(np.isnan(actual.astype(np.float32)), nan)
    bits = f"u{expected.itemsize}"
    assert np.array_equal(actual.view(bits)[~nan], expected.view(bits)[~nan])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_all_16_bit_numbers_widen(target, dtype):
    x = np.arange(2**16, dtype=np.uint16).view(storage_dtype(dtype))
    y = target.poison(x.shape, "float32")
    CONVERT.widen[blocks_for(x.size), 256](target.array(x), y, x.size)
    assert_same_numbers(target.place.to_host(y), x.astype(np.float32))


def numbers_to_round(rng, dtype):
    """float32 numbers: random bits, all numbers of `dtype`, the ties between each two, and the neighbours of the ties."""
    exact = np.arange(2**15, dtype=np.uint16).view(dtype).astype(np.float64)
    exact = exact[np.isfinite(exact)]
    exact = np.append(exact, 2 * exact[-1] - exact[-2])  # where infinity begins, if it were a number
    ties = ((exact[:-1] + exact[1:]) / 2).astype(np.float32)
    inf = np.float32(np.inf)
    # The least and the largest subnormal and normal number, infinity, and three NaNs.
    limits = [1, 0x007FFFFF, 0x00800000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF]
    positive = np.concatenate([exact[:-1].astype(np.float32), ties, np.nextafter(ties, inf), np.nextafter(ties, -inf),
                               np.array(limits, np.uint32).view(np.float32)])
    return np.concatenate([positive, -positive, rng.integers(2**32, size=100_000, dtype=np.uint32).view(np.float32)])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.filterwarnings("ignore:.* encountered in cast")  # by the reference
def test_floats_round_to_16_bits(target, rng, dtype):
    x = numbers_to_round(rng, storage_dtype(dtype))
    y = target.array(np.zeros(x.shape), dtype)
    CONVERT.narrow[blocks_for(x.size), 256](target.array(x), y, x.size)
    assert_same_numbers(target.place.to_host(y), x.astype(storage_dtype(dtype)))


def test_philox_known_answers(target):
    """The vectors of Random123, tests/kat_vectors, philox4x32 with 10 rounds."""
    ones, pi = 2**32 - 1, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0)
    counters = np.array([[0] * 4, [ones] * 4, pi[:4]], np.uint32)
    keys = np.array([0, 2**64 - 1, pi[4] | pi[5] << 32], np.uint64)
    words = target.poison((3, 4), np.uint32)
    VOCABULARY.random_words[2, 32](target.array(keys), target.array(counters), words, 3)
    assert [" ".join(f"{word:08x}" for word in row) for row in target.place.to_host(words)] == [
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8", "408f276d 41c83b0e a20bc7c6 6d5451fd", "d16cfe09 94fdcceb 5001e420 24126ea1"]


def sums_of_rows(x):
    sums = np.full((len(x), 2), np.nan, np.float32)
    VOCABULARY.row_sums[len(x), 32](x, sums, x.shape[1])
    return sums


@pytest.mark.parametrize("threads", [*range(1, 131), 1023, 1024])
def test_block_sum_at_any_block_size(rng, threads):
    with launch_settings("emulate", threads):
        for n in (1, threads, 2 * threads + 1):
            x = rng.integers(-40, 40, (3, n)).astype(np.float32)  # whole numbers, of which sums are exact
            assert np.array_equal(sums_of_rows(x), np.stack([x.sum(axis=1), (x * x).sum(axis=1)], axis=1))
        x = np.tile(rng.normal(size=301).astype(np.float32), (3, 1))
        once, again = sums_of_rows(x), sums_of_rows(x)
        assert np.array_equal(once, again) and (once == once[0]).all()


def test_shared_memory_is_that_of_one_library(rng, tmp_path):
    """All have block_sum, and the loader might give all the same array in it: then one's past looks like another's races."""
    libraries = []
    for name in ("first", "second"):
        path = tmp_path / f"{name}.cu"
        path.write_text((FOLDER / "vocabulary.cu").read_text() + f"// {name}\n")
        libraries.append(Kernels(path))
    x, sums = np.ones((1, 8), np.float32), np.empty((1, 2), np.float32)
    for turn in range(400):
        with launch_settings("emulate", int(rng.integers(2, 40))):
            libraries[rng.integers(2)].row_sums[1, 32](x, sums, 8)
        assert sums.tolist() == [[8, 8]]


# ---- builds --------------------------------------------------------------------------------------------------------

LAUNCH = """
import numpy as np
from minidl.ops import relu

assert relu.forward(np.arange(-50_000.0, 50_000.0)).sum() == sum(range(50_000))
"""


def process(code, wait=True, **environment):
    """Run Python code in a new process. An environment variable that is None is not set."""
    environment = {name: value for name, value in {**os.environ, **environment}.items() if value is not None}
    child = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True,
                             start_new_session=True, preexec_fn=drop_override)
    return finished(child) if wait else child


def drop_override():
    """Of a child process of root: it may no longer write where files forbid it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(24, 1)  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE


def finished(child):
    try:
        _, child.error = child.communicate(timeout=60)
    finally:
        child.kill()  # if it hangs
    return child


def assert_works(child):
    assert child.returncode == 0, child.error
    assert child.error == ""


@pytest.fixture(scope="module")
def built_cache(tmp_path_factory):
    """A cache folder that four processes filled at once."""
    cache = tmp_path_factory.mktemp("cache")
    children = [process(LAUNCH, wait=False, MINIDL_CACHE=str(cache)) for _ in range(4)]
    for child in children:
        assert_works(finished(child))
    return cache


def test_four_cold_processes_leave_one_library_each(built_cache):
    left = {path.name.split("-")[0] for path in built_cache.glob("kernels/*")}
    assert left - {"zig"} == {"host_threads", "relu"} and len(list(built_cache.glob("kernels/*.so"))) == 2


@pytest.mark.parametrize("damage", [
    lambda content: b"",
    lambda content: content[:len(content) // 2],  # loading this one would kill the process
    lambda content: content[:-1],
    lambda content: b"not a library",
    lambda content: content[:5000] + bytes([content[5000] ^ 1]) + content[5001:],
], ids=["empty", "half", "one byte short", "text", "one bit"])
def test_damaged_library_is_rebuilt(built_cache, tmp_path, damage):
    shutil.copytree(built_cache, tmp_path, dirs_exist_ok=True)
    library, = tmp_path.glob("kernels/relu-*.so")
    library.write_bytes(damage(library.read_bytes()))
    before = library.stat()
    assert_works(process(LAUNCH, MINIDL_CACHE=str(tmp_path)))
    mended = library.stat()
    assert mended.st_ino != before.st_ino
    assert_works(process(LAUNCH, MINIDL_CACHE=str(tmp_path)))
    assert library.stat().st_mtime_ns == mended.st_mtime_ns  # whole: not built again


def test_no_folder_to_cache_in(tmp_path):
    """The libraries go to a private temporary folder, and with it."""
    assert_works(process(LAUNCH, MINIDL_CACHE="/proc/nowhere", XDG_CACHE_HOME=None, HOME=None, TMPDIR=str(tmp_path)))
    assert list(tmp_path.iterdir()) == []


def test_no_folder_at_all(monkeypatch):
    def mkdtemp(prefix):
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(host_build.tempfile, "mkdtemp", mkdtemp)
    monkeypatch.setattr(host_build, "lasting_cache_folders", lambda: [])
    with pytest.raises(DeviceError, match="^there is no folder to build the kernels in: set MINIDL_CACHE to one that can be"):
        host_build.cache_folder.__wrapped__()


def test_read_only_cache_folder(tmp_path):
    (tmp_path / "cache").mkdir(mode=0o555)
    assert_works(process(LAUNCH, MINIDL_CACHE=str(tmp_path / "cache"), XDG_CACHE_HOME=str(tmp_path / "other")))
    assert len(list(tmp_path.glob("other/minidl/kernels/*.so"))) == 2 and list(tmp_path.glob("cache/*")) == []


@pytest.mark.parametrize("removal, places", [
    ("shutil.rmtree(os.environ['MINIDL_CACHE'])", {"MINIDL_CACHE": "cache"}),
    ("os.fork() == 0 and sys.exit(); os.wait()", {"MINIDL_CACHE": None, "TMPDIR": "."}),
], ids=["by who makes room", "a temporary one, by the end of a forked child"])
def test_cache_folder_that_is_removed_while_the_process_runs(tmp_path, removal, places):
    """What is built later goes to a new one."""
    places = {name: place and str(tmp_path / place) for name, place in places.items()}
    code = f"import os, shutil, sys\n{LAUNCH}\n{removal}\nrelu.forward(np.ones(5, np.float16))"
    child = process(code, XDG_CACHE_HOME=None, HOME=None, **places)
    assert child.returncode == 0, child.error  # Python may warn of the fork
    assert [path.name.split("-")[0] for path in tmp_path.glob("cache/kernels/*.so")] == ["relu"] * bool(places["MINIDL_CACHE"])


def test_what_a_killed_compilation_left_is_swept(tmp_path):
    """An hour later: what is younger may be the work of a process that still runs."""
    child, left, end = process(LAUNCH, wait=False, MINIDL_CACHE=str(tmp_path)), [], time.monotonic() + 30
    while not left and time.monotonic() < end:
        left = list(tmp_path.glob("kernels/unfinished-*.so"))
    os.killpg(child.pid, signal.SIGKILL)  # the compiler, too
    child.communicate()
    assert left[0].exists()
    for modified, stays in ((time.time() - 3500, True), (time.time() - 3700, False)):
        os.utime(left[0], (modified, modified))
        for library in tmp_path.glob("kernels/relu-*.so"):
            library.unlink()
        assert_works(process(LAUNCH, MINIDL_CACHE=str(tmp_path)))
        assert left[0].exists() == stays


def test_importing_compiles_nothing_and_imports_no_cupy(tmp_path):
    (tmp_path / "cupy.py").write_text("raise SystemExit('cupy was imported')")
    code = """
import importlib, pkgutil, sys
import minidl, models

for package in (minidl, models):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
"""
    assert_works(process(code, PYTHONPATH=str(tmp_path), MINIDL_CACHE=str(tmp_path / "cache"), CXX="/nowhere/c++"))
    assert not (tmp_path / "cache").exists()


def test_emulators_that_a_loader_makes_one():
    """As that of macOS does with inline functions of all libraries; here, with those that are loaded for all."""
    code = f"""
import ctypes, functools
from pathlib import Path
import numpy as np
from minidl.kernels import Kernels, launch_settings

ctypes.PyDLL = functools.partial(ctypes.PyDLL, mode=ctypes.RTLD_GLOBAL)
vocabulary = Kernels(Path({str(VOCABULARY.path)!r}))
with launch_settings("emulate"):
    for dtype in ("float32", "float64"):
        sums = np.zeros((3, 2), dtype)
        vocabulary.row_sums[3, 32](np.ones((3, 50), dtype), sums, 50)
        assert (sums == 50).all(), sums
"""
    assert_works(process(code))


def test_forked_child_launches(built_cache):
    """The child has none of the threads of its parent's team."""
    code = LAUNCH + """
import multiprocessing, os

def work():
    assert relu.forward(np.arange(-50_000.0, 50_000.0)).sum() == sum(range(50_000))

def child():
    work()
    os._exit(7)

work()
worker = multiprocessing.get_context("fork").Process(target=child, daemon=True)
worker.start()
worker.join(20)
assert worker.exitcode == 7, worker.exitcode
work()
"""
    child = process(code, MINIDL_CACHE=str(built_cache), OMP_NUM_THREADS="3")
    assert child.returncode == 0, child.error  # Python may warn of the fork


def test_forked_child_of_a_process_with_threads_has_memory(built_cache):
    """Also when one of the others, which the child does not have, was in the middle of the pool."""
    code = """
import os, signal, threading, time
import numpy as np
from minidl import device

inside = threading.Event()

def work():
    with device._host_pool._lock:
        inside.set()
        time.sleep(0.5)

thread = threading.Thread(target=work)
thread.start()
inside.wait()
child = os.fork()
if not child:
    signal.alarm(20)
    device.empty((1 << 20,), "float32", device.select("cpu"))
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
thread.join()
device.empty((1 << 20,), "float32", device.select("cpu"))
"""
    child = process(code, MINIDL_CACHE=str(built_cache))
    assert child.returncode == 0, child.error  # Python may warn of the fork


@pytest.mark.skipif(sys.platform != "linux", reason="limits of the address space are Linux's")
def test_without_memory_for_another_thread(built_cache):
    """The thread that asks does the work; an exception of C++ would end the process."""
    code = """
import resource
import numpy as np
from minidl.ops import relu

x, y = np.arange(-50_000.0, 50_000.0), np.zeros(100_000)
relu.KERNELS.host_library("fast", "float64")
resource.setrlimit(resource.RLIMIT_AS, (1 << 20, resource.RLIM_INFINITY))  # less than there is: nothing can be added
relu.KERNELS.relu_forward[25, 1](x, y, x.size)
assert y.sum() == sum(range(50_000))
"""
    child = process(code, MINIDL_CACHE=str(built_cache), OMP_NUM_THREADS="3")
    assert child.returncode == 0, child.error


def test_no_compiler(tmp_path):
    code = f"import sys\nsys.modules['ziglang'] = None\n{LAUNCH}"
    child = process(code, PATH=str(tmp_path), CXX=None)
    assert child.error.endswith("DeviceError: no C++ compiler found to build the kernels for the CPU: "
                                "install g++, or `pip install ziglang`\n")


def build(source):
    return host_build.library(source, host_build.read_source(source), "fast")


@pytest.fixture
def fresh_build(monkeypatch, tmp_path):
    """host_build as a new process would find it, with an empty cache in tmp_path."""
    remembered = host_build.compiler, host_build._machine, host_build.cache_folder
    monkeypatch.setenv("MINIDL_CACHE", str(tmp_path))

    def forget():
        for function in remembered:
            function.cache_clear()

    forget()
    yield forget
    forget()


@pytest.mark.parametrize("setting, found", [("g++-nowhere -m64", "g++-nowhere"), ("/nowhere/c++", "/nowhere/c++")])
def test_compiler_that_is_not_there(fresh_build, monkeypatch, setting, found):
    monkeypatch.setenv("CXX", setting)
    with pytest.raises(DeviceError, match=rf"\$CXX names the compiler '{found.replace('+', '.')}', which is not found"):
        host_build.compiler()


@pytest.mark.parametrize("text, reason", [
    ("#!/nonexistent/sh\n", "No such file or directory"), ("no program", "Exec format error")])
def test_compiler_that_cannot_be_run(fresh_build, monkeypatch, tmp_path, text, reason):
    (tmp_path / "c++").write_text(text)
    (tmp_path / "c++").chmod(0o755)
    monkeypatch.setenv("CXX", str(tmp_path / "c++"))
    with pytest.raises(DeviceError, match=f"the compiler {tmp_path}/c.. cannot be run: {reason}; set .CXX to another"):
        build(OPS / "relu.cu")


def test_compiler_whose_name_is_half_quoted(fresh_build, monkeypatch):
    monkeypatch.setenv("CXX", "g++ 'abc")
    with pytest.raises(DeviceError, match=re.escape("$CXX is \"g++ 'abc\", which is not a command: No closing quotation")):
        host_build.compiler()


@pytest.mark.parametrize("said, error", [
    (rb"Ger\344t.cpp:1:1: error: caf\351", r"Ger\xe4t.cpp:1:1: error: caf\xe9"),
    (rb"/usr/bin/ld: final link failed: No space left on device\ncollect2: error: ld returned 1 exit status",
     "/usr/bin/ld: final link failed: No space left on device"),
    (rb"ld: symbol(s) not found for architecture arm64\nclang: error: linker command failed with exit code 1",
     "ld: symbol(s) not found for architecture arm64")])
def test_what_a_compiler_says_in_any_letters(fresh_build, monkeypatch, tmp_path, said, error):
    (tmp_path / "c++").write_bytes(b"#!/bin/sh\nprintf '" + said + b"\\n' >&2; exit 1\n")
    (tmp_path / "c++").chmod(0o755)
    monkeypatch.setenv("CXX", str(tmp_path / "c++"))
    with pytest.raises(CompileError, match=re.escape(f"relu.cu: {tmp_path}/c++: {error}")):
        build(OPS / "relu.cu")


def test_something_else_in_the_place_of_a_library(fresh_build, fake_compiler, tmp_path):
    build(OPS / "relu.cu")
    (library,) = tmp_path.glob("kernels/*.so")
    library.unlink()
    library.mkdir()
    with pytest.raises(DeviceError, match=f"{library} cannot be written: Is a directory; make room there, or set MINIDL_CACHE"):
        build(OPS / "relu.cu")
    assert [*tmp_path.glob("kernels/*")] == [library]


@pytest.mark.skipif(sys.platform == "darwin", reason="names of files are UTF-8 there")
def test_a_folder_of_strange_letters(tmp_path):
    folder = f"{tmp_path}/m\udce4 'y'"  # a byte that is not UTF-8
    shutil.copytree(OPS.parent, f"{folder}/minidl", ignore=shutil.ignore_patterns("__pycache__"))
    for changes in ({}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}):
        assert_works(process(LAUNCH, PYTHONPATH=folder, MINIDL_CACHE=str(tmp_path / "cache"), **changes))


def test_choice_of_compiler(fresh_build, monkeypatch, tmp_path):
    def install(name):
        (tmp_path / name).write_text("#!/bin/sh")
        (tmp_path / name).chmod(0o755)
        fresh_build()

    monkeypatch.setenv("CXX", " ")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "ziglang", sys)
    assert host_build.compiler() == [sys.executable, "-m", "ziglang", "c++"]
    for name in ("clang++", "g++", "mine"):
        install(name)
        monkeypatch.setenv("CXX", "mine -m64" if name == "mine" else "")
        assert host_build.compiler() == (["mine", "-m64"] if name == "mine" else [name])


@pytest.mark.parametrize("good", ["MINIDL_CACHE", "XDG_CACHE_HOME", "HOME"])
def test_choice_of_cache_folder(fresh_build, monkeypatch, tmp_path, good):
    """The first of three that can be written: a path below a file cannot."""
    (tmp_path / "file").touch()
    for name in ("MINIDL_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / "a földer" if name == good else tmp_path / "file" / "folder"))
    inner = {"MINIDL_CACHE": "kernels", "XDG_CACHE_HOME": "minidl/kernels", "HOME": ".cache/minidl/kernels"}[good]
    assert host_build.cache_folder() == tmp_path / "a földer" / inner


@pytest.fixture
def fake_compiler(fresh_build, monkeypatch, tmp_path):
    """$CXX is a script that "compiles" at once, into an empty library; its version is in a file."""
    subprocess.run([*host_build.compiler(), "-shared", "-x", "c++", "/dev/null", "-o", tmp_path / "empty.so"], check=True)
    script = tmp_path / "fake-c++"
    script.write_text(f"""#!/bin/sh
        if [ "$1" = --version ]; then cat {tmp_path}/version; exit; fi
        for output; do :; done  # the last argument
        cp {tmp_path}/empty.so "$output"
    """)
    script.chmod(0o755)
    (tmp_path / "version").write_text("1.0")
    monkeypatch.setenv("CXX", str(script))
    fresh_build()
    return script


def change_header(monkeypatch, tmp_path):
    (tmp_path / "ops" / "common.cuh").write_text("// changed")


def change_compiler(monkeypatch, tmp_path):
    (tmp_path / "fake-c++").rename(tmp_path / "other-c++")
    monkeypatch.setenv("CXX", str(tmp_path / "other-c++"))


@pytest.mark.parametrize("change, libraries", [
    (lambda monkeypatch, tmp_path: None, 1),
    (lambda monkeypatch, tmp_path: (tmp_path / "ops" / "kernel.cu").write_text("// changed"), 2),
    (change_header, 2),
    (lambda monkeypatch, tmp_path: (tmp_path / "ops" / "cuda_on_host.h").write_text("// changed"), 2),
    (lambda monkeypatch, tmp_path: monkeypatch.setitem(host_build.FLAGS, "fast", [*host_build.FLAGS["fast"], "-O0"]), 2),
    (change_compiler, 2),
    (lambda monkeypatch, tmp_path: (tmp_path / "version").write_text("2.0"), 2),
], ids=["nothing", "source", "header", "header for the host", "flag", "compiler", "compiler version"])
def test_what_a_library_depends_on(fresh_build, fake_compiler, monkeypatch, tmp_path, change, libraries):
    monkeypatch.setattr(host_build, "OPS", tmp_path / "ops")
    (tmp_path / "ops").mkdir()
    for name in ("kernel.cu", "common.cuh", "cuda_on_host.h"):
        (tmp_path / "ops" / name).touch()
    build(tmp_path / "ops" / "kernel.cu")
    change(monkeypatch, tmp_path)
    fresh_build()
    build(tmp_path / "ops" / "kernel.cu")
    assert len(list(tmp_path.glob("kernels/*"))) == libraries


def test_library_that_cannot_be_loaded(fake_compiler, tmp_path):
    (tmp_path / "empty.so").write_text("for another machine")
    with pytest.raises(DeviceError, match="fake-c.. built of relu.cu cannot be loaded: .* set MINIDL_CACHE to a folder"):
        build(OPS / "relu.cu")


# It has the name of a function of the C library, too.
TIMES = 'extern "C" __global__ void times(const real* x, real* y, int n) { GRID_LOOP(i, n) y[i] = FACTOR * x[i]; }\n'


def factor_of(kernels, dtype="float32"):
    y = np.empty(1, dtype)
    kernels.times[1, 32](np.ones(1, dtype), y, 1)
    return float(y[0])


@pytest.mark.parametrize("place_of_factor", ["times.cu", "factor.cuh"])
def test_kernels_that_change_while_the_process_runs(fresh_build, tmp_path, place_of_factor):
    """As in a notebook: in the file itself, or in a header beside it. What is kept for the next process is what was compiled."""
    def write(factor):
        define = f"#define FACTOR {factor}\n"
        beside = place_of_factor != "times.cu"
        (tmp_path / "factor.cuh").write_text(define if beside else "")
        (tmp_path / "times.cu").write_text(f'#include "common.cuh"\n#include "factor.cuh"\n{"" if beside else define}{TIMES}')
        return Kernels(tmp_path / "times.cu")

    before = write(2)
    assert factor_of(before) == 2
    after = write(3)
    assert [factor_of(after), factor_of(after, "float64")] == [3, 3]
    if place_of_factor == "times.cu":
        assert factor_of(before, "float64") == 2, "it was read once"
    again = write(2)
    assert [factor_of(again), factor_of(again, "float64")] == [2, 2], "nothing was kept by the name of something else"


def test_a_path_is_that_of_the_present_folder(fresh_build, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "times.cu").write_text(f'#include "common.cuh"\n#define FACTOR 5\n{TIMES}')
    assert factor_of(Kernels(Path("times.cu"))) == 5


def test_a_parameter_of_a_type_that_kernels_do_not_take(tmp_path):
    (tmp_path / "wrong.cu").write_text('extern "C" __global__ void wrong(real* x, size_t n) {}\n')
    with pytest.raises(TypeError, match="a kernel's parameter n is size_t, which is none of real, acc, float, double, int"):
        Kernels(tmp_path / "wrong.cu").wrong[1, 1](np.zeros(1, np.float32), 1)


def test_cupy_cannot_keep_what_it_compiled(monkeypatch):
    class RawModule:
        def __init__(self, code, options):
            pass

        def compile(self):
            raise PermissionError(13, "Permission denied", "/home/it/.cupy/kernel_cache/tmpx")

    compiler = SimpleNamespace(CompileException=type("CompileException", (Exception,), {}))
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(RawModule=RawModule, cuda=SimpleNamespace(compiler=compiler)))
    with pytest.raises(DeviceError, match="^CuPy cannot keep the kernels that it compiled: .*kernel_cache.*; set CUPY_CACHE_DIR to a"):
        Kernels("relu.cu").gpu_module("float32")


def test_source_with_an_error(fresh_build, tmp_path):
    folder = tmp_path / "error"  # so that lines of the compiler that name no error hold the word, too
    folder.mkdir()
    (folder / "wrong.cu").write_text('#include "common.cuh"\nextern "C" __global__ void wrong(real* x, int n) {\n'
                                     "    int unused = missing;\n    x[0] = absent;\n}\n")
    with pytest.raises(CompileError, match=r"wrong\.cu:3:18: error: .*missing") as caught:
        Kernels(folder / "wrong.cu").wrong[1, 1](np.zeros(1, np.float32), 1)
    assert "\n" not in str(caught.value)
    assert "absent" not in str(caught.value)
    assert list(tmp_path.glob("kernels/*")) == []


def test_source_with_an_error_ends_a_command_with_one_line(tmp_path):
    for package in ("minidl", "models"):
        shutil.copytree(OPS.parent.parent / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    source = tmp_path / "minidl" / "ops" / "relu.cu"
    lines = source.read_text().splitlines()
    line = next(number for number, text in enumerate(lines) if "x < zero" in text)
    lines[line] = "        y[0] = missing + absent;"
    source.write_text("\n".join(lines))
    result = subprocess.run([sys.executable, "-m", "minidl", "gradcheck", "ReLU", "--device", "cpu"], cwd=tmp_path, text=True,
                            capture_output=True, env={**os.environ, "PYTHONPATH": str(tmp_path), "MINIDL_CACHE": str(tmp_path)})
    assert result.returncode == 4
    assert re.fullmatch(rf"error: {source}:{line + 1}:\d+: error: .*missing.*\n", result.stderr)
