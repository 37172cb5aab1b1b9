"""The real CUDA compiler without a GPU: NVRTC of the nvidia-cuda-nvrtc wheel, from a .cu file to machine code.

    python tests/nvrtc.py sm_80 sm_90 --precision bfloat16      registers, spills and shared memory of every kernel
"""

import argparse
import ctypes
import functools
import hashlib
import importlib.util
import os
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from minidl.host_build import OPS, CompileError, cache_folder, read_source, sources_digest
from minidl.kernels import PRECISIONS, gpu_options

# Where the wheels of CUDA 13 and 12 put the library, and the headers of the same version.
_LAYOUTS = (("cu13/lib/libnvrtc.so.13", "cu13/include"), ("cuda_nvrtc/lib/libnvrtc.so.12", "cuda_runtime/include"))
OF_CUPY = ("--device-as-default-execution-space", "-ftz=true")  # which it adds to whatever it compiles


@functools.cache
def library():
    """-> (NVRTC as a ctypes library, the folder of its headers). Raises FileNotFoundError where they are missing."""
    package = importlib.util.find_spec("nvidia")
    for folder in map(Path, package.submodule_search_locations if package else ()):
        for file, headers in _LAYOUTS:
            if (folder / file).exists() and (folder / headers / "cuda_fp16.h").exists():
                for part in (folder / file).parent.glob("libnvrtc-builtins.so.*"):  # which that of 13.0 does not find by itself
                    ctypes.CDLL(str(part), ctypes.RTLD_GLOBAL)
                return ctypes.CDLL(str(folder / file)), folder / headers
    raise FileNotFoundError("no NVRTC with its headers: `pip install nvidia-cuda-nvrtc nvidia-cuda-runtime nvidia-cuda-crt`")


def version():
    """(major, minor) of CUDA."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


class Program(NamedTuple):
    cubin: bytes    # machine code, an ELF file
    log: str        # the compiler's warnings, and ptxas's remarks on every kernel
    ptx: str        # the intermediate language, in which parameters still have types


def compile_to_cubin(path, options, arch):
    """The file `path` (Path) for `arch` ("sm_90") -> Program. Raises CompileError, its text the compiler's log.

    May be called from several threads at once.
    """
    # -v: ptxas writes what each kernel uses into the log.
    options = [*OF_CUPY, *options, f"-arch={arch}", f"-I{library()[1]}", "--ptxas-options=-v"]
    encoded = (ctypes.c_char_p * len(options))(*map(os.fsencode, options))
    program = ctypes.c_void_p()
    _call("nvrtcCreateProgram", ctypes.byref(program), path.read_bytes(), os.fsencode(path.name), 0, None, None)
    try:
        failed = library()[0].nvrtcCompileProgram(program, len(options), encoded)
        log = _output(program, "ProgramLog").rstrip(b"\0").decode()
        if failed:
            raise CompileError(f"{path.name} for {arch}: {log}")
        return Program(_output(program, "CUBIN"), log, _output(program, "PTX").rstrip(b"\0").decode())
    finally:
        _call("nvrtcDestroyProgram", ctypes.byref(program))


def program_of(source, precision, arch):
    """A file of OPS, by its name, as the GPU's loader compiles it -> Program. It is compiled once: what several processes ask
    for lies in the cache of the kernels. May be called from several threads at once."""
    options = gpu_options(precision)
    digest = sources_digest(OPS / source, read_source(OPS / source))
    key = hashlib.sha256(repr((source, digest, OF_CUPY, options, arch, version())).encode()).hexdigest()
    kept = cache_folder() / f"nvrtc-{key}"
    if not kept.exists():
        program = compile_to_cubin(OPS / source, options, arch)
        half = kept.with_suffix(f".{os.getpid()}")  # no other thread of this process asks for the same
        half.write_bytes(pickle.dumps(tuple(program)))
        half.rename(kept)
    return Program(*pickle.loads(kept.read_bytes()))


def programs_of(requests):
    """[(source, precision, arch), ...] -> [Program, ...], several of them compiled at a time."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda request: program_of(*request), requests))


def _output(program, name):
    size = ctypes.c_size_t()
    _call(f"nvrtcGet{name}Size", program, ctypes.byref(size))
    output = ctypes.create_string_buffer(size.value)
    _call(f"nvrtcGet{name}", program, output)
    return output.raw


def _call(function, *arguments):
    error = library()[0][function](*arguments)
    if error:
        raise RuntimeError(f"{function}: NVRTC error {error}")


class Usage(NamedTuple):
    """What a kernel takes: bytes of local memory and registers of one thread, bytes of shared memory of a block."""

    stack: int
    spill_stores: int
    spill_loads: int
    registers: int
    shared: int


_REMARKS = re.compile(r"Compiling entry function '(\w+)'.*?"
                      r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
                      r"Used (\d+) registers(?:[^\n]*?(\d+) bytes smem)?", re.DOTALL)


def kernel_usage(log):
    """The log of a Program -> {kernel name: Usage}."""
    return {name: Usage(*(int(number or 0) for number in numbers)) for name, *numbers in _REMARKS.findall(log)}


def kernel_parameters(ptx):
    """The PTX of a Program -> {kernel name: [PTX type, ...]}: u32, f32, ..., and u64 for pointers."""
    return {name: re.findall(r"\.param \.(\w+)", parameters)
            for name, parameters in re.findall(r"\.entry (\w+)\(([^)]*)\)", ptx)}


def widest_accesses(ptx):
    """The PTX of a Program -> {kernel name: (bytes of global memory that a thread reads at once, and writes, at most)}."""
    def widest(instruction, text):
        return max((int(vector or 1) * int(bits) // 8
                    for vector, bits in re.findall(rf"{instruction}\.global[.\w]*?(?:\.v(\d))?\.[a-z](\d+)", text)), default=0)

    _, *kernels = re.split(r"\.entry (?=\w)", ptx)
    return {re.match(r"\w+", text)[0]: (widest("ld", text), widest("st", text)) for text in kernels}


def usage_table(rows):
    """[(kernel name, precision, architecture, Usage), ...] -> text for people, under the version of the compiler."""
    head = ("kernel", "precision", "architecture", *Usage._fields)
    lines = [f"{name:28}{precision:10}{arch:14}" + "".join(f"{number:>14}" for number in numbers)
             for name, precision, arch, *numbers in (head, *((*row[:3], *row[3]) for row in rows))]
    return "\n".join(["NVRTC {}.{}".format(*version()), *lines, ""])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="What every kernel of minidl uses on a GPU.")
    parser.add_argument("architectures", nargs="*", default=["sm_90"], metavar="ARCHITECTURE")
    parser.add_argument("--precision", default="float32", choices=PRECISIONS)
    wanted = parser.parse_args()
    requests = [(path.name, wanted.precision, arch) for arch in wanted.architectures for path in sorted(OPS.glob("*.cu"))]
    print(usage_table([(name, precision, arch, usage)
                       for (_, precision, arch), program in zip(requests, programs_of(requests))
                       for name, usage in kernel_usage(program.log).items()]), end="")
