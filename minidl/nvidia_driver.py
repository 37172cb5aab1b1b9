"""NVIDIA's driver, asked directly: which GPUs there are, whether or not CuPy is installed."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

from minidl.errors import DeviceError

LIBRARY = "libcuda.so.1"
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE, and two attributes, of cuda.h
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76


class Gpu(NamedTuple):
    """memory: in bytes. capability: (9, 0) for sm_90."""

    name: str
    memory: int
    capability: tuple[int, int]


class Driver(NamedTuple):
    """cuda: the newest version of CUDA that it runs, as (13, 0). gpus: those that this process may use, maybe none."""

    cuda: tuple[int, int]
    gpus: list[Gpu]

    @property
    def extra(self) -> str:
        """The extra of minidl with the CUDA libraries for it: CUDA 13 needs driver 580, and GPUs since Turing."""
        return "cuda13" if self.cuda >= (13, 0) and all(gpu.capability >= (7, 5) for gpu in self.gpus) else "cuda12"


def find() -> Driver | None:
    """The driver of this machine, or None. Raises DeviceError where there is one that fails."""
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError:
        return None

    def call(function: str, *arguments: object) -> int:
        status: int = library[function](*arguments)
        if status not in (0, _NO_DEVICE):
            text = ctypes.c_char_p()
            library.cuGetErrorString(status, ctypes.byref(text))
            raise DeviceError(f"the NVIDIA driver fails in {function}: error {status}, {(text.value or b'unknown').decode()}")
        return status

    number = ctypes.c_int()
    nothing_there = call("cuInit", 0)
    call("cuDriverGetVersion", ctypes.byref(number))
    cuda = number.value // 1000, number.value % 1000 // 10
    if nothing_there:
        return Driver(cuda, [])
    call("cuDeviceGetCount", ctypes.byref(number))
    gpus = []
    for index in range(number.value):
        device, name, memory = ctypes.c_int(), ctypes.create_string_buffer(100), ctypes.c_size_t()
        call("cuDeviceGet", ctypes.byref(device), index)
        call("cuDeviceGetName", name, len(name), device)
        call("cuDeviceTotalMem_v2", ctypes.byref(memory), device)
        capability = []
        for attribute in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR):
            call("cuDeviceGetAttribute", ctypes.byref(number), attribute, device)
            capability.append(number.value)
        gpus.append(Gpu(name.value.decode(), memory.value, (capability[0], capability[1])))
    return Driver(cuda, gpus)
