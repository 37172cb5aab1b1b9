"""Every kernel through the real CUDA compiler, for every kind of GPU that minidl runs on; no GPU is needed.

`python tests/nvrtc.py` prints what each kernel uses.
"""

import os
import re

import numpy as np
import pytest

import nvrtc
from minidl.host_build import OPS, CompileError
from minidl.kernels import PRECISIONS, Kernels, gpu_options, storage_dtype

ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
SOURCES = sorted(path.name for path in OPS.glob("*.cu"))


@pytest.fixture(scope="module", autouse=True)
def compiler(request):
    if request.config.getoption("--sanitize"):
        pytest.skip("the host's sanitizers see nothing of NVRTC, and with them it does not find its own libraries")
    try:
        nvrtc.library()
    except FileNotFoundError as missing:
        if os.environ.get("CI"):  # where a skipped test would go unnoticed
            raise
        pytest.skip(str(missing))


class Compiled:
    """One file of kernels in one precision: the signatures that the loader reads, and {architecture: Program}."""

    def __init__(self, source, precision):
        self.precision = storage_dtype(precision).name  # teaches NumPy bfloat16
        self.signatures = Kernels(source).signatures
        self.programs = dict(zip(ARCHITECTURES, nvrtc.programs_of([(source, precision, arch) for arch in ARCHITECTURES])))


@pytest.fixture(scope="module", params=[(source, precision) for source in SOURCES for precision in PRECISIONS], ids="-".join)
def compiled(compiler, request):
    return Compiled(*request.param)


def test_every_kernel_becomes_machine_code(compiled):
    for arch, (cubin, log, _) in compiled.programs.items():
        assert cubin.startswith(b"\x7fELF")
        assert re.findall(r"entry function '\w+' for '(\w+)'", log) == [arch] * len(compiled.signatures)
        assert all(f".text.{name}\0".encode() in cubin for name in compiled.signatures)
        assert not re.search(r"\(\d+\): warning", log), log


def test_no_kernel_spills(compiled):
    """Nor keeps an array in local memory. ptxas may give a thread 255 registers: enough room for 256 threads a block,
    the most that a launcher asks for, so what it chose holds for every launch."""
    for arch, program in compiled.programs.items():
        usage = nvrtc.kernel_usage(program.log)
        assert usage.keys() == compiled.signatures.keys()
        spilling = {name: used for name, used in usage.items() if used.stack or used.spill_stores or used.spill_loads}
        assert not spilling, arch


def test_rows_are_read_and_written_16_bytes_at_a_time(compiled):
    """What goes through rows.cuh and pixels.cuh: ReLUs, dropout, sums of branches, biases, im2col, col2im, pooling, batch norm."""
    maps = r"add|bias_add|relu_\w+|dropout\w*|im2col|col2im|(?:max|avg)pool_\w+|bn_(?:apply|normalize|forward|backward)\w*"
    sums = r"bias_tile_sums|bn_tile_moments|bn_backward_sums\w*"
    for program in compiled.programs.values():
        accesses = nvrtc.widest_accesses(program.ptx)
        assert accesses.keys() == compiled.signatures.keys()
        for name, (read, written) in accesses.items():
            if re.fullmatch(f"{maps}|{sums}", name):
                assert read == 16 and (written == 16 or re.fullmatch(sums, name)), name


def test_the_loader_reads_the_parameters_that_the_compiler_sees(compiled):
    def ptx_type(parameter):
        if parameter.is_array:
            return "u64"
        dtype = np.dtype(parameter.dtype(compiled.precision))
        return f"{'f' if dtype.kind == 'f' else 'u'}{8 * dtype.itemsize}"

    expected = {name: [ptx_type(parameter) for parameter in parameters] for name, parameters in compiled.signatures.items()}
    for program in compiled.programs.values():
        assert nvrtc.kernel_parameters(program.ptx) == expected


def test_an_error_names_file_line_and_cause(tmp_path):
    source = tmp_path / "broken.cu"
    source.write_text('#include "common.cuh"\nextern "C" __global__ void broken(real* x) { x[0] = missing; }\n')
    with pytest.raises(CompileError, match=r'broken\.cu\(2\): error: identifier "missing" is undefined'):
        nvrtc.compile_to_cubin(source, gpu_options("float32"), "sm_90")


def test_a_spill_is_seen(tmp_path):
    """64 values alive across a barrier do not fit 24 registers."""
    source = tmp_path / "crowded.cu"
    source.write_text("""extern "C" __global__ void crowded(float* x) {
        float value[64];
        for (int i = 0; i < 64; ++i) value[i] = x[i];
        __syncthreads();
        for (int i = 0; i < 64; ++i) x[63 - i] = value[i];
    }""")
    usage = nvrtc.kernel_usage(nvrtc.compile_to_cubin(source, ["-maxrregcount=24"], "sm_90").log)["crowded"]
    assert usage.registers == 24 and usage.stack > 0 and usage.spill_stores > 0 and usage.spill_loads > 0


def test_cuda_13_refuses_volta():
    if nvrtc.version() < (13, 0):
        pytest.skip("CUDA 12 still compiles for it")
    with pytest.raises(CompileError, match="invalid value for --gpu-architecture"):
        nvrtc.compile_to_cubin(OPS / "add.cu", gpu_options("float32"), "sm_70")
