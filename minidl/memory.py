"""What a run that found no memory says: what it needs, what there is, and what would fit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from minidl import blas
from minidl.device import Device, pooled_bytes
from minidl.errors import DeviceError
from minidl.layer import Layer
from minidl.run import Run
from minidl.settings import STORAGE
from minidl.summary import summarize


@contextlib.contextmanager
def ample_memory(run: Run) -> Iterator[None]:
    """A `with` block that trains: where there is not enough memory, it raises DeviceError, which says what would fit."""
    try:
        yield
    except MemoryError as error:  # CuPy's is one too
        raise shortage(run, error) from None


def shortage(run: Run, error: BaseException) -> DeviceError:
    """The error that ends a run in which `error`, of the allocator, came up."""
    size = run.settings.batch_size
    layer, limit = _layer_of(error.__traceback__, run.network), limit_bytes(run.place)
    what = (f"not enough memory{f' in layer {layer}' if layer else ''}: batches of {size} need about "
            f"{needed_bytes(run, size) / 1e6:,.0f} MB")
    if not limit:
        return DeviceError(f"{what}; try a smaller --batch-size")
    if run.place.name == "cpu":
        limit += _kept_bytes(run)  # which is not from the pool
    fitting = largest_batch(run, limit)
    advice = f"a batch size of {fitting} would fit" if fitting else "not even a batch of 1 would fit"
    return DeviceError(f"{what}, and there are {limit / 1e6:,.0f} MB; {advice}")


def needed_bytes(run: Run, batch_size: int) -> int:
    """What training takes at its peak, within a third: parameters with what the optimizer keeps, data, activations,
    workspaces."""
    precision = run.settings.precision
    with blas.tf32(run.trainer.tf32):
        costs = summarize(run.network, run.train_set.images.shape[1:], batch_size, STORAGE[precision], run.place)
    widest = max(row.activation_bytes for row in costs.rows)  # the gradients on the way back: an input's and an output's
    # On the CPU, factors are rounded to TF32 before BLAS gets them.
    workspaces = 3 if precision == "tf32" and run.place.name == "cpu" else 1
    of_blas = 0 if run.place.name == "cpu" else blas.WORKSPACE_BYTES
    return _kept_bytes(run) + of_blas + costs.activation_bytes + workspaces * costs.workspace_bytes + 2 * widest


def largest_batch(run: Run, limit: int) -> int:
    """The largest power of two, below the present batch size, with which a run stays within 80 % of the limit; 0 for none."""
    size = 1
    while size < run.settings.batch_size and needed_bytes(run, size) <= 0.8 * limit:
        size *= 2
    return size // 2


def limit_bytes(place: Device) -> int:
    """What is free on a device, with what its memory pool holds; 0 where that cannot be told."""
    if place.name != "cpu":
        pool = place.xp.get_default_memory_pool()
        free, _ = place.xp.cuda.runtime.memGetInfo()
        free += pool.total_bytes()
        return min(pool.get_limit(), free) if pool.get_limit() else free
    free_bytes = []
    with contextlib.suppress(ImportError, OSError):  # not on every system
        import resource

        most = resource.getrlimit(resource.RLIMIT_AS)[0]
        if most != resource.RLIM_INFINITY:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            free_bytes.append(max(0, most - pages * resource.getpagesize()))
    with contextlib.suppress(OSError, KeyError, ValueError):
        table = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free_bytes.append(int(table["MemAvailable"].split()[0]) * 1024)
    return min(free_bytes) + pooled_bytes() if free_bytes else 0


def _kept_bytes(run: Run) -> int:
    """What is there from the first step to the last: parameters, what the optimizer keeps, data."""
    parameters, sets = run.network.parameters, (run.train_batches, run.test_batches, run.val_batches)
    arrays = [parameters.master, parameters.grad, *run.trainer.arrays().values(), *(it.images for it in sets if it)]
    if parameters.data is not parameters.master:
        arrays.append(parameters.data)
    return sum(array.nbytes for array in arrays)


def _layer_of(traceback: TracebackType | None, network: Layer) -> str | None:
    """The name of the innermost layer that was running."""
    names = {id(layer): name for name, layer in network.named_layers()}
    found = None
    while traceback:
        frame = traceback.tb_frame
        # Of methods alone: until Python 3.13, asking keeps all that a frame had, and those of callers live on.
        if frame.f_code.co_varnames[:1] == ("self",):
            found = names.get(id(frame.f_locals.get("self"))) or found
        traceback = traceback.tb_next
    return found
