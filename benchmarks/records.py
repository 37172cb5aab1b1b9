"""What the benchmarks share: the form of a record, PyTorch as a peer, and the pause that it needs."""

import json
import sys
import time

from minidl import device, run_folder

PAUSE = 0.05  # seconds after which the threads of a peer, which spin for a while after their work, sleep
PRECISIONS = {"fp32": "float32", "tf32": "float32", "bf16": "bfloat16"}  # type of storage


def write(path, place, rows, **more):
    """The rows and what they depend on: command, commit, hardware, versions, and `more`."""
    environment = run_folder.environment(place)
    if "torch" in sys.modules:
        environment["versions"]["torch"] = sys.modules["torch"].__version__
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"environment": environment, **more, "rows": rows}, file, indent=1)
        file.write("\n")


def torch_with(precision):
    """The module, told to use as many threads as minidl and no other precision than asked for."""
    import torch

    torch.set_num_threads(device.cpu_threads())
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.benchmark = True
    return torch


def pause(place):
    """After a turn of PyTorch on the CPU."""
    if place.name == "cpu":
        time.sleep(PAUSE)


def quantile(values, share):
    """The value below which that share (0..1) of the values lies, to the nearest of them."""
    return sorted(values)[round(share * (len(values) - 1))]


def cells(*columns):
    """(value or None, format, width), each -> a line of a table, a dash where there is nothing."""
    return "".join(f"{'-' if value is None else format(value, form):>{width}}" for value, form, width in columns)
