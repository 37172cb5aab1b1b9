"""What the benchmarks share: the form of a record, PyTorch as a peer, and the pause that it needs."""

import json
import sys
import time

from minidl import device, run_folder
from minidl.atomic_file import check_folder, write_atomically
from minidl.errors import DeviceError

PAUSE = 0.05  # seconds after which the threads of a peer, which spin for a while after their work, sleep
PRECISIONS = {"fp32": "float32", "tf32": "float32", "bf16": "bfloat16"}  # type of storage


class Differ(Exception):
    """Peers do not compute the same, so that their times say nothing."""


class Record:
    """Rows, and what they depend on: command, commit, hardware, versions, and `more`.

    A file `path`, if there is one, has all rows so far at any time: a benchmark that is ended early has not run in vain. Raises
    UsageError where it is in no folder.
    """

    def __init__(self, path, place, **more):
        if path:
            check_folder(path)
        self.path, self.rows, self.more = path, [], more
        self.environment = run_folder.environment(place)
        self.not_timed = []  # what Differ said

    def add(self, measure, *arguments):
        """The row that measure(*arguments) returns. Returns it; None where that raises Differ."""
        try:
            row = measure(*arguments)
        except Differ as difference:
            self.not_timed.append(str(difference))
            print(f"not timed: {difference}", flush=True)
            return None
        self.rows.append(row)
        if "torch" in sys.modules:
            self.environment["versions"]["torch"] = sys.modules["torch"].__version__
        if self.path:
            text = json.dumps({"environment": self.environment, **self.more, "rows": self.rows}, indent=1) + "\n"
            write_atomically(self.path, lambda file: file.write(text.encode()))
        return row

    def end(self):
        """Ends the program with code 1 where something was not timed."""
        if self.not_timed:
            sys.exit("\n".join(["not timed, as the results differ:", *self.not_timed]))


def select(name, peer):
    """The device of this name, on which the peer, "torch" or None, computes, too. Raises DeviceError where it cannot."""
    if peer:
        import torch  # before CuPy loads libraries of CUDA: PyTorch may need newer ones, which it then does not get
    place = device.select(name)
    if peer and place.name != "cpu" and not torch.cuda.is_available():
        raise DeviceError(f"--peer torch: PyTorch {torch.__version__} finds no GPU, minidl {place.name}: "
                          "install PyTorch for CUDA, or use --device cpu")
    return place


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
