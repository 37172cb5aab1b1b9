"""A training step recorded as a CUDA graph: the host launches one thing instead of hundreds."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from functools import cached_property
from typing import Any

from minidl.device import Device, first_line
from minidl.wording import warn


class StepMemory:
    """Memory of a GPU for what a training step, or an evaluation between two steps, makes for itself.

    Recorded steps hold its addresses, so nothing else may be given it: it would be overwritten. Recorded steps, single steps
    and evaluations never overlap, so all use the same memory.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self.replayable = True  # no step that works in it was found not to be

    def lent(self) -> contextlib.AbstractContextManager[object]:
        """A `with` block in which CuPy takes memory from here. What is in it means nothing any more after the next step."""
        if self.device.name == "cpu":
            return contextlib.nullcontext()
        pool, stream = self._pool, self._stream

        def allocate(size: int) -> Any:
            with stream:  # CuPy keeps free memory by stream, and the one that records gets what the others have freed
                return pool.malloc(size)

        return self.device.xp.cuda.using_allocator(allocate)

    @cached_property
    def _stream(self) -> Any:
        return self.device.xp.cuda.get_current_stream()

    @cached_property
    def _pool(self) -> Any:
        cuda = self.device.xp.cuda
        allocate_elsewhere = cuda.get_allocator()
        blocks = []  # a pool that finds no more memory would give back those that are free now, but recorded

        def allocate_for_good(size: int) -> Any:
            blocks.append(allocate_elsewhere(size))
            return blocks[-1]

        pool = cuda.MemoryPool(allocate_for_good)
        weakref.finalize(self, _give_back, pool, blocks).atexit = False
        return pool


_outlived: list[Any] = []  # pools with arrays that are still in use, which until CuPy 14 do not keep their memory themselves


def _give_back(pool: Any, blocks: list[Any]) -> None:
    """Empty a pool: it does not do so by itself, even if nobody knows it any more."""
    blocks.clear()
    _outlived.append(pool)
    for it in [*_outlived]:
        it.free_all_blocks()
        if not it.used_bytes():
            _outlived.remove(it)


class StepGraph:
    """Does a step on a GPU again and again: the first time as it is; the second time it is recorded, and replayed from then on.

    The record holds each kernel with the addresses and numbers that it was given. So a step must find what changes from one to
    the next in arrays that stay where they are, and may not wait for the device. What cannot be recorded is done as it is each
    time, as are other steps of the same memory, which costs the host's time: one warning says so.
    """

    def __init__(self, memory: StepMemory) -> None:
        """memory: where the step's arrays are, which lives as long as the graph."""
        self._memory, self._runs = memory, 0
        self._graph: Any = None
        self._stream: Any = None  # that was recorded: cuBLAS remembers it

    def run(self, step: Callable[[], None]) -> None:
        """Do the step, on CuPy's current stream. step: the same in each call."""
        with self._memory.lent():
            # Kernels have been compiled and libraries opened the first time, which cannot be recorded.
            if self._runs == 1 and self._memory.replayable:
                self._record(step)
            if self._graph is None:
                step()
            else:
                self._graph.launch()
        self._runs += 1

    def _record(self, step: Callable[[], None]) -> None:
        """Call step() once, without any work on the device, to record what it launches."""
        cuda = self._memory.device.xp.cuda
        stream = cuda.Stream(non_blocking=True)  # the default one cannot be recorded
        try:
            with stream:
                stream.begin_capture()
                try:
                    step()
                except BaseException:
                    with contextlib.suppress(cuda.runtime.CUDARuntimeError):  # that the record is of no use, which is known
                        stream.end_capture()
                    raise
                self._graph, self._stream = stream.end_capture(), stream
        except Exception as error:  # whatever it is, the step itself will meet it, or do without the record
            self._memory.replayable = False
            warn(f"steps are not replayed as a CUDA graph, kernels are launched one by one: {type(error).__name__}: "
                 f"{first_line(error)}")
