"""Kernels as Python callables: read their signatures from the .cu file, check arguments, launch on GPU or CPU.

    KERNELS = Kernels("relu.cu")
    KERNELS.relu_forward[blocks, threads](x, y, x.size)

The kernel's own signature is the interface. From it come the conversions of scalars (CuPy would pass a Python
float as a double whatever the kernel declares) and the checks of type, contiguity and count (CuPy has none).
Arrays on the GPU run the file compiled by NVRTC, arrays on the CPU the same file compiled by the host compiler.
"""

from __future__ import annotations

import ctypes
import functools
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from minidl import host_build
from minidl.device import array_module, host_threads
from minidl.errors import DeviceError
from minidl.host_build import OPS, CompileError

# C type -> NumPy type. `real` and `acc` depend on the arrays that a launch gets: see PRECISIONS.
C_TYPES: dict[str, type[np.number[Any]]] = {
    "float": np.float32, "double": np.float64, "int": np.int32, "long long": np.int64, "unsigned": np.uint32,
    "unsigned long long": np.uint64, "unsigned char": np.uint8, "unsigned short": np.uint16,
}
# Type of storage -> (C type `real`, C type `acc` of accumulation, NumPy name of acc).
PRECISIONS = {
    "float32": ("float", "float", "float32"),
    "float64": ("double", "double", "float64"),
    "float16": ("__half", "float", "float32"),
    "bfloat16": ("__nv_bfloat16", "float", "float32"),
}
MAX_THREADS = 1024  # of a block
SLOT_BYTES = 8  # of an argument of a launch on the CPU, as cuda_on_host.h has it
_NULL = np.uint64(0)  # CuPy passes it by value, as it does an array's address
# What a BLOCK_LOOP counts to, in int: the thread that takes the last element steps on by the size of the block.
LARGEST_COUNT = 2**31 - 1 - MAX_THREADS


class KernelFault(Exception):
    """A kernel that did what hardware leaves undefined, found by the emulator."""


class _Settings:
    mode = "fast"                           # of kernels on the CPU: fast, emulate, sanitize
    threads_per_block: int | None = None    # replaces the launchers' choice


@contextmanager
def launch_settings(mode: str = "fast", threads_per_block: int | None = None) -> Iterator[None]:
    """Within the `with` block, host kernels run in `mode`, and all blocks have `threads_per_block` threads, where any will do.

    For tests: any number of threads must be right.
    """
    before = _Settings.mode, _Settings.threads_per_block
    _Settings.mode, _Settings.threads_per_block = mode, threads_per_block
    try:
        yield
    finally:
        _Settings.mode, _Settings.threads_per_block = before


def launch_mode() -> str:
    """In which mode kernels on the CPU run now."""
    return _Settings.mode


def acc_dtype(dtype: npt.DTypeLike) -> np.dtype[Any]:
    """The type in which values stored as `dtype` are computed with and accumulated: float32, or float64."""
    return np.dtype(PRECISIONS[type_name(np.dtype(dtype))][2])


@functools.cache
def type_name(dtype: np.dtype[Any]) -> str:
    """dtype.name, which NumPy makes anew at each access: that takes as long as all other checks of a launch."""
    return dtype.name


def storage_dtype(name: str | np.dtype[Any]) -> np.dtype[Any]:
    """"float32", "float64", "float16" or "bfloat16" -> NumPy dtype. Raises DeviceError where bfloat16 needs ml_dtypes,
    ValueError for another type."""
    name = str(name)
    if name not in PRECISIONS:
        raise ValueError(f"type {name!r} is not one of {', '.join(PRECISIONS)}")
    if name == "bfloat16":
        try:
            import ml_dtypes  # noqa: F401 - teaches NumPy the type
        except ImportError:
            raise DeviceError("bfloat16 needs the package ml_dtypes: `pip install 'minidl[bf16]'`") from None
    return np.dtype(name)


def blocks_for(n: int, per_block: int = 4096) -> int:
    """Blocks for a GRID_LOOP over n elements, about `per_block` elements each."""
    return max(1, min(-(-n // per_block), 65535))


def gpu_options(precision: str) -> tuple[str, ...]:
    """What NVRTC is told for tensors stored as `precision` -> tuple of options."""
    real, acc, _ = PRECISIONS[precision]
    return "--std=c++17", f"-I{OPS}", f"-DREAL={real}", f"-DACC={acc}"


class Kernels:
    """The kernels of one .cu file, as attributes. Nothing is read or compiled before the first use."""

    def __init__(self, path: str | Path, fixed_threads: bool = False) -> None:
        """`path`: the name of a file in minidl/ops, or the Path of one of yours. It is read once, when it is first needed: make
        another Kernels after you have changed it. fixed_threads: blocks have the size that the launcher says, always."""
        self.path = OPS / path if isinstance(path, str) else path.absolute()
        self.fixed_threads = fixed_threads

    def __getattr__(self, name: str) -> Kernel:
        if name.startswith("_") or name not in self.signatures:
            raise AttributeError(f"{self.path.name} has no kernel {name!r}")
        kernel = Kernel(self, name, self.signatures[name])
        setattr(self, name, kernel)
        return kernel

    @functools.cached_property
    def signatures(self) -> dict[str, list[Parameter]]:
        """{kernel name: [Parameter, ...]}, in the order of the file."""
        return parse_signatures(self.source)

    @functools.cached_property
    def source(self) -> str:
        """The text of the file, which all targets compile."""
        return host_build.read_source(self.path)

    @functools.cache
    def host_library(self, mode: str, precision: str) -> ctypes.CDLL:
        real, acc, _ = PRECISIONS[precision]
        epilogue = "".join(f"EXPORT({name})\n" for name in self.signatures)
        library = host_build.library(self.path, self.source, mode, (f"REAL={real}", f"ACC={acc}"), epilogue)
        if mode == "fast":
            library.set_team(host_threads().run_on_team)
        return library

    @functools.cache
    def gpu_module(self, precision: str) -> Any:
        import cupy

        # CuPy's cache of compiled kernels does not see included files: the digest makes it.
        options = (*gpu_options(precision), f"-I{self.path.parent}",
                   f"-DSOURCES={host_build.sources_digest(self.path, self.source)}")
        module = cupy.RawModule(code=self.source, options=options)
        try:
            module.compile()
        except cupy.cuda.compiler.CompileException as error:
            lines = [line for line in str(error).splitlines() if "error" in line] or [str(error)]
            raise CompileError(f"{self.path.name}: {lines[0]}") from None
        except OSError as error:  # of its cache, which ours is not
            raise DeviceError(f"CuPy cannot keep the kernels that it compiled: {error}; set CUPY_CACHE_DIR to a folder that can "
                              "be written") from None
        return module


class Parameter:
    """One parameter of a kernel: `const real* x` has name x, c_type real, is an array and is read only.

    For one that is OPTIONAL, None may be given, and the kernel gets a null pointer.
    """

    def __init__(self, text: str) -> None:
        words = text.replace("*", " * ").split()
        self.name = words.pop()
        self.is_array = "*" in words
        self.is_const = "const" in text.split("*")[0]
        self.is_optional = "OPTIONAL" in words
        self.c_type = " ".join(word for word in words if word not in ("const", "*", "__restrict__", "OPTIONAL"))

    def dtype(self, precision: str) -> np.dtype[Any]:
        """The NumPy type that arguments need, or are converted to, where tensors are stored as `precision`."""
        if self.c_type == "real":
            return np.dtype(precision)
        if self.c_type == "acc":
            return acc_dtype(precision)
        if self.c_type not in C_TYPES:
            raise TypeError(f"a kernel's parameter {self.name} is {self.c_type}, which is none of real, acc, {', '.join(C_TYPES)}")
        return np.dtype(C_TYPES[self.c_type])


def parse_signatures(source: str) -> dict[str, list[Parameter]]:
    """The text of a .cu file -> {kernel name: [Parameter, ...]}."""
    source = re.sub(r"//[^\n]*|/\*.*?\*/", "", source, flags=re.DOTALL)
    found = re.findall(r"__global__\s+void\s+(\w+)\s*\(([^)]*)\)", source)
    return {name: [Parameter(text) for text in parameters.split(",")] for name, parameters in found}


class Kernel:
    """One kernel. `kernel[blocks, threads](*arguments)` checks the arguments and launches it."""

    def __init__(self, kernels: Kernels, name: str, parameters: list[Parameter]) -> None:
        self.kernels, self.name, self.parameters = kernels, name, parameters

    def __getitem__(self, shape: tuple[int | tuple[int, int], int]) -> Callable[..., None]:
        """`shape`: (blocks, threads of a block); blocks is a number or a pair (x, y). Within CUDA's limits, on the CPU too."""
        blocks, threads = shape
        x, y = grid = blocks if isinstance(blocks, tuple) else (blocks, 1)
        if not (1 <= x < 2**31 and 1 <= y < 2**16 and 1 <= threads <= MAX_THREADS):
            raise ValueError(f"{self.name}: cannot launch {x} x {y} blocks of {threads} threads: CUDA takes 1 to 2^31 - 1 x "
                             f"1 to 65535 blocks of 1 to {MAX_THREADS}")
        return functools.partial(self._launch, grid, threads)

    def _launch(self, grid: tuple[int, int], threads: int, *arguments: Any) -> None:
        if len(arguments) != len(self.parameters):
            raise TypeError(f"{self.name}: {len(arguments)} arguments, the kernel has {len(self.parameters)}: "
                            + ", ".join(parameter.name for parameter in self.parameters))
        xp, precision = self._target(arguments)
        values = [self._check_array(parameter, argument, xp, dtype) if parameter.is_array
                  else self._convert_known(parameter, argument, dtype) if type(argument) is int
                  else self._convert(parameter, argument, dtype)
                  for parameter, argument, dtype in zip(self.parameters, arguments, self._dtypes(precision))]
        if _Settings.threads_per_block and not self.kernels.fixed_threads:
            threads = _Settings.threads_per_block
        if xp is np:
            self._launch_on_host(precision, grid, threads, values)
        else:
            self._gpu_function(precision)(grid, (threads,), tuple(values))

    def _target(self, arguments: Sequence[Any]) -> tuple[ModuleType, str]:
        """The module of the arrays, and the type of storage: that of the first array declared real (or acc)."""
        xp, of_acc, of_real = None, None, None
        for parameter, argument in zip(self.parameters, arguments):
            if not parameter.is_array:
                continue
            try:
                xp = xp or array_module(argument)
                dtype = type_name(argument.dtype)
            except (TypeError, AttributeError):
                continue  # not an array: _check_array refuses it by name
            if parameter.c_type == "real":
                of_real = dtype
                break
            if parameter.c_type == "acc":
                of_acc = of_acc or dtype
        precision = of_real or of_acc or "float32"
        return xp or np, precision if precision in PRECISIONS else "float32"

    @functools.cache
    def _dtypes(self, precision: str) -> list[np.dtype[Any]]:
        return [parameter.dtype(precision) for parameter in self.parameters]

    def _check_array(self, parameter: Parameter, argument: Any, xp: ModuleType, dtype: np.dtype[Any]) -> Any:
        if argument is None and parameter.is_optional:
            return _NULL
        if not isinstance(argument, xp.ndarray):
            raise TypeError(f"{self.name}: {parameter.name} must be a {xp.__name__} array, got "
                            f"{type(argument).__module__}.{type(argument).__name__}")
        flags = argument.flags
        layout = "non-contiguous " if not flags.c_contiguous else "unaligned " if xp is np and not flags.aligned else ""
        if layout or argument.dtype != dtype:
            remedy = f": {xp.__name__}.ascontiguousarray makes one" if layout == "non-contiguous " else ""
            raise TypeError(f"{self.name}: {parameter.name} must be a contiguous {dtype} array, got "
                            f"{layout}{argument.dtype} of shape {argument.shape}{remedy}")
        if xp is np and not parameter.is_const and not flags.writeable:
            raise TypeError(f"{self.name}: {parameter.name} is written, but the array is read-only")
        return argument

    def _convert(self, parameter: Parameter, argument: Any, dtype: np.dtype[Any]) -> np.generic:
        """A number -> a NumPy scalar of the declared type, which CuPy passes as it is."""
        whole = dtype.kind in "iu"
        if not isinstance(argument, (int, np.integer) if whole else (int, float, np.integer, np.floating)) \
                or isinstance(argument, bool):
            raise TypeError(f"{self.name}: {parameter.name} must be {'an integer' if whole else 'a number'}, "
                            f"got {type(argument).__name__}")
        counts = parameter.c_type == "int"
        try:
            if counts and argument > LARGEST_COUNT:
                raise OverflowError
            return dtype.type(int(argument) if whole else argument)  # NumPy lets its own integers wrap around
        except OverflowError:
            less = f", less the {MAX_THREADS} by which a loop may step past its end" if counts else ""
            raise TypeError(f"{self.name}: {parameter.name} = {argument} does not fit {dtype}{less}") from None

    _convert_known = functools.lru_cache(maxsize=1 << 14)(_convert)  # most are sizes, which come again in each step

    def _launch_on_host(self, precision: str, grid: tuple[int, int], threads: int, values: Sequence[Any]) -> None:
        function = self._host_function(_Settings.mode, precision)
        slots = self._slots(precision).pack(*[_address(value) if isinstance(value, np.ndarray) else value for value in values])
        fault = function(*grid, threads, slots)
        if fault is not None:
            raise KernelFault(f"{self.name}: {fault.decode()}")

    @functools.cache
    def _slots(self, precision: str) -> struct.Struct:
        """The arguments of a launch, as cuda_on_host.h takes them."""
        return struct.Struct("".join("P" if parameter.is_array else f"{dtype.char}{SLOT_BYTES - dtype.itemsize}x"
                                     for parameter, dtype in zip(self.parameters, self._dtypes(precision))))

    @functools.cache
    def _gpu_function(self, precision: str) -> Callable[..., None]:
        return self.kernels.gpu_module(precision).get_function(self.name)

    @functools.cache
    def _host_function(self, mode: str, precision: str) -> Callable[..., bytes | None]:
        function = self.kernels.host_library(mode, precision)["launch_" + self.name]
        function.restype = ctypes.c_char_p
        return function


def _address(array: Any) -> int:
    """Where a NumPy array begins."""
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(array))  # in a third of the time
    except (TypeError, ValueError):  # read-only, empty, or of a type that is not Python's
        return array.__array_interface__["data"][0]


