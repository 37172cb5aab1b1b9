"""What a run that found no memory says: what it needs, what there is, and what would fit."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

from minidl.device import Device
from minidl.errors import DeviceError
from minidl.layers import Layer
from minidl.run import Run
from minidl.settings import STORAGE
from minidl.summary import summarize


def shortage(run: Run, error: BaseException) -> DeviceError:
    """The error that ends a run, or its start, in which `error`, of the allocator, came up."""
    needed, limit = needed_bytes(run, run.settings.batch_size), limit_bytes(run.place)
    layer = _layer_of(error.__traceback__, run.network)
    where = f" in layer {layer}" if layer else ""
    fitting = largest_batch(run, limit) if limit else 0
    advice = f"a batch size of {fitting} would fit" if fitting else "not even a batch of 1 would fit"
    return DeviceError(f"not enough memory{where}: batches of {run.settings.batch_size} need about {needed / 1e9:.2f} GB, "
                       + (f"there are {limit / 1e9:.2f} GB; {advice}" if limit else "try a smaller --batch-size"))


def needed_bytes(run: Run, batch_size: int) -> int:
    """What training takes at its peak, about: parameters with what the optimizer keeps, data, activations, workspaces."""
    network = run.network
    costs = summarize(network, run.train_set.images.shape[1:], batch_size, STORAGE[run.settings.precision], run.place)
    optimizer = sum(array.nbytes for array in run.trainer.arrays().values())
    parameters = sum(array.nbytes for array in (network.parameters.master, network.parameters.grad, network.parameters.data))
    data = run.train_batches.images.nbytes + run.test_batches.images.nbytes
    widest = max(row.activation_bytes for row in costs.rows)  # the gradients on the way back: an input's and an output's
    return parameters + optimizer + data + costs.activation_bytes + costs.workspace_bytes + 2 * widest


def largest_batch(run: Run, limit: int) -> int:
    """The largest power of two, below the present batch size, with which a run stays within 90 % of the limit; 0 for none."""
    size = 1
    while size < run.settings.batch_size and needed_bytes(run, size) <= 0.9 * limit:
        size *= 2
    return size // 2


def limit_bytes(place: Device) -> int:
    """The memory that this process may use on the device; 0 where that cannot be told."""
    if place.name != "cpu":
        pool_limit = place.xp.get_default_memory_pool().get_limit()
        free, _ = place.xp.cuda.runtime.memGetInfo()
        free += place.xp.get_default_memory_pool().total_bytes()
        return min(pool_limit, free) if pool_limit else free
    limits = []
    try:
        import resource

        soft = resource.getrlimit(resource.RLIMIT_AS)[0]
        if soft != resource.RLIM_INFINITY:
            # What the interpreter and its libraries have taken of the address space is not there for arrays.
            limits.append(max(0, soft - _taken_address_space()))
    except ImportError:  # not on Windows
        pass
    try:
        meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        limits.append(int(meminfo["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError, ValueError):
        pass
    return min(limits, default=0)


def _taken_address_space() -> int:
    """Bytes of address space before any array of a run: files that are mapped, stacks of threads."""
    try:
        lines = Path(f"/proc/{os.getpid()}/smaps_rollup").read_text().splitlines()
        resident = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss:"))
        pages = int(Path(f"/proc/{os.getpid()}/statm").read_text().split()[0])
        return pages * os.sysconf("SC_PAGE_SIZE") - resident
    except (OSError, StopIteration, ValueError):
        return 0


def _layer_of(traceback: TracebackType | None, network: Layer) -> str | None:
    """The name of the innermost layer that was running."""
    names = {id(layer): name for name, layer in network.named_layers()}
    found = None
    while traceback:
        found = names.get(id(traceback.tb_frame.f_locals.get("self"))) or found
        traceback = traceback.tb_next
    return found
