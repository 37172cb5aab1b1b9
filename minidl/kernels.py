"""Kernels as Python callables: read their signatures from the .cu file, check arguments, launch on GPU or CPU.

    KERNELS = Kernels("relu.cu")
    KERNELS.relu_forward[blocks, threads](x, y, x.size)

The kernel's own signature is the interface. From it come the conversions of scalars (CuPy would pass a Python
float as a double whatever the kernel declares) and the checks of type, contiguity and count (CuPy has none).
Arrays on the GPU run the file compiled by NVRTC, arrays on the CPU the same file compiled by the host compiler.
"""

import ctypes
import functools
import re
from contextlib import contextmanager

import numpy as np

from minidl import host_build
from minidl.device import array_module, host_threads
from minidl.errors import DeviceError
from minidl.host_build import OPS, CompileError

# C type -> NumPy type. `real` and `acc` depend on the arrays that a launch gets: see PRECISIONS.
C_TYPES = {
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


class KernelFault(Exception):
    """A kernel that did what hardware leaves undefined, found by the emulator."""


class _Settings:
    mode = "fast"                  # of kernels on the CPU: fast, emulate, sanitize
    threads_per_block = None       # replaces the launchers' choice


@contextmanager
def launch_settings(mode="fast", threads_per_block=None):
    """Within the `with` block, host kernels run in `mode`, and all blocks have `threads_per_block` threads.

    For tests: any launch shape must be right.
    """
    before = _Settings.mode, _Settings.threads_per_block
    _Settings.mode, _Settings.threads_per_block = mode, threads_per_block
    try:
        yield
    finally:
        _Settings.mode, _Settings.threads_per_block = before


def acc_dtype(dtype):
    """The type in which values stored as `dtype` are computed with and accumulated: float32, or float64."""
    return np.dtype(PRECISIONS[np.dtype(dtype).name][2])


def storage_dtype(name):
    """"float32", "float64", "float16" or "bfloat16" -> NumPy dtype. Raises DeviceError where bfloat16 needs ml_dtypes."""
    name = str(name)
    if name not in PRECISIONS:
        raise ValueError(f"type {name!r} is not one of {', '.join(PRECISIONS)}")
    if name == "bfloat16":
        try:
            import ml_dtypes  # noqa: F401 - teaches NumPy the type
        except ImportError:
            raise DeviceError("bfloat16 needs the package ml_dtypes: `pip install 'minidl[bf16]'`") from None
    return np.dtype(name)


def blocks_for(n, per_block=4096):
    """Blocks for a GRID_LOOP over n elements, about `per_block` elements each."""
    return max(1, min(-(-n // per_block), 65535))


class Kernels:
    """The kernels of one .cu file, as attributes. Nothing is read or compiled before the first use."""

    def __init__(self, path):
        """`path`: a file name in minidl/ops, or a Path."""
        self.path = OPS / path

    def __getattr__(self, name):
        if name.startswith("_") or name not in self.signatures:
            raise AttributeError(f"{self.path.name} has no kernel {name!r}")
        kernel = Kernel(self, name, self.signatures[name])
        setattr(self, name, kernel)
        return kernel

    @functools.cached_property
    def signatures(self):
        """{kernel name: [Parameter, ...]}, in the order of the file."""
        return parse_signatures(self.path.read_text())

    @functools.cache
    def host_library(self, mode, precision):
        real, acc, _ = PRECISIONS[precision]
        epilogue = "".join(f"EXPORT({name})\n" for name in self.signatures)
        library = host_build.library(self.path, mode, (f"REAL={real}", f"ACC={acc}"), epilogue)
        if mode == "fast":
            library.set_team(host_threads().run_on_team)
        return library

    @functools.cache
    def gpu_module(self, precision):
        import cupy

        real, acc, _ = PRECISIONS[precision]
        # CuPy's cache of compiled kernels does not see included files: the digest makes it.
        options = ("--std=c++17", f"-I{OPS}", f"-DREAL={real}", f"-DACC={acc}",
                   f"-DSOURCES={host_build.sources_digest(self.path)}")
        module = cupy.RawModule(code=self.path.read_text(), options=options)
        try:
            module.compile()
        except cupy.cuda.compiler.CompileException as error:
            lines = [line for line in str(error).splitlines() if "error" in line] or [str(error)]
            raise CompileError(f"{self.path.name}: {lines[0]}") from None
        return module


class Parameter:
    """One parameter of a kernel: `const real* x` has name x, c_type real, is an array and is read only."""

    def __init__(self, text):
        words = text.replace("*", " * ").split()
        self.name = words.pop()
        self.is_array = "*" in words
        self.is_const = "const" in words
        self.c_type = " ".join(word for word in words if word not in ("const", "*", "__restrict__"))

    def dtype(self, precision):
        if self.c_type == "real":
            return precision
        if self.c_type == "acc":
            return PRECISIONS[precision][2]
        return np.dtype(C_TYPES[self.c_type]).name


def parse_signatures(source):
    """The text of a .cu file -> {kernel name: [Parameter, ...]}."""
    source = re.sub(r"//[^\n]*", "", source)
    found = re.findall(r"__global__\s+void\s+(\w+)\s*\(([^)]*)\)", source)
    return {name: [Parameter(text) for text in parameters.split(",")] for name, parameters in found}


class Kernel:
    """One kernel. `kernel[blocks, threads](*arguments)` checks the arguments and launches it."""

    def __init__(self, kernels, name, parameters):
        self.kernels, self.name, self.parameters = kernels, name, parameters

    def __getitem__(self, shape):
        """`shape`: (blocks, threads of a block); blocks is a number or a pair (x, y)."""
        blocks, threads = shape
        return functools.partial(self._launch, blocks if isinstance(blocks, tuple) else (blocks, 1), threads)

    def _launch(self, grid, threads, *arguments):
        if len(arguments) != len(self.parameters):
            raise TypeError(f"{self.name}: {len(arguments)} arguments, the kernel has {len(self.parameters)}: "
                            + ", ".join(parameter.name for parameter in self.parameters))
        xp, precision = self._target(arguments)
        values = [self._convert(parameter, argument, xp, precision)
                  for parameter, argument in zip(self.parameters, arguments)]
        threads = _Settings.threads_per_block or threads
        if xp is np:
            self._launch_on_host(precision, grid, threads, values)
        else:
            function = self.kernels.gpu_module(precision).get_function(self.name)
            function(grid, (threads,), values)

    def _target(self, arguments):
        """The module of the arrays, and the type of storage: that of the first array declared real (or acc)."""
        arrays = {"real": [], "acc": []}
        xp = None
        for parameter, argument in zip(self.parameters, arguments):
            if not parameter.is_array or not hasattr(argument, "dtype"):
                continue
            if xp is None:
                xp = array_module(argument)
            arrays.setdefault(parameter.c_type, []).append(argument.dtype.name)
        precision = (arrays["real"] + arrays["acc"] + ["float32"])[0]
        return xp or np, precision if precision in PRECISIONS else "float32"

    def _convert(self, parameter, argument, xp, precision):
        """One argument -> what the launch passes: an array, or a NumPy scalar of the declared type."""
        dtype = parameter.dtype(precision)
        if not parameter.is_array:
            return self._convert_scalar(parameter, argument, np.dtype(dtype))
        if not isinstance(argument, xp.ndarray):
            raise TypeError(f"{self.name}: {parameter.name} must be a {xp.__name__} array, got "
                            f"{type(argument).__module__}.{type(argument).__name__}")
        if argument.dtype.name != dtype or not argument.flags.c_contiguous:
            layout = "" if argument.flags.c_contiguous else "non-contiguous "
            raise TypeError(f"{self.name}: {parameter.name} must be a contiguous {dtype} array, got "
                            f"{layout}{argument.dtype.name} of shape {argument.shape}")
        if xp is np and not parameter.is_const and not argument.flags.writeable:
            raise TypeError(f"{self.name}: {parameter.name} is written, but the array is read-only")
        return argument

    def _convert_scalar(self, parameter, argument, dtype):
        expected = (int, np.integer) if dtype.kind in "iu" else (int, float, np.integer, np.floating)
        if not isinstance(argument, expected) or isinstance(argument, bool):
            raise TypeError(f"{self.name}: {parameter.name} must be {'an integer' if dtype.kind in 'iu' else 'a number'}, "
                            f"got {type(argument).__name__}")
        try:
            return dtype.type(int(argument) if dtype.kind in "iu" else float(argument))
        except OverflowError:
            raise TypeError(f"{self.name}: {parameter.name} = {argument} does not fit {dtype}") from None

    def _launch_on_host(self, precision, grid, threads, values):
        library = self.kernels.host_library(_Settings.mode, precision)
        pointers = (ctypes.c_void_p * len(values))()
        cells = []
        for i, value in enumerate(values):
            if isinstance(value, np.ndarray):
                cells.append(ctypes.c_void_p(value.ctypes.data))
                pointers[i] = ctypes.addressof(cells[-1])
            else:
                cells.append(np.asarray(value))
                pointers[i] = cells[-1].ctypes.data
        message = ctypes.create_string_buffer(300)
        launch = _Launch(*grid, threads, ctypes.addressof(message), len(message))
        if library["launch_" + self.name](ctypes.byref(launch), pointers):
            raise KernelFault(f"{self.name}: {message.value.decode()}")


class _Launch(ctypes.Structure):  # cuda_on_host.h: struct Launch
    _fields_ = [("grid_x", ctypes.c_uint), ("grid_y", ctypes.c_uint), ("threads", ctypes.c_uint),
                ("message", ctypes.c_void_p), ("message_size", ctypes.c_int)]
