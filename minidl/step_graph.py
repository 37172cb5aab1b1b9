"""A training step recorded as a CUDA graph: the host launches one thing instead of hundreds."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any

from minidl.device import Device, first_line


class StepGraph:
    """Does a step on a GPU again and again: the first time as it is; the second time it is recorded, and replayed from then on.

    The record holds each kernel with the addresses and numbers that it was given. So a step must find what changes from one to
    the next in arrays that stay where they are, and may not wait for the device. What cannot be recorded is done as it is each
    time, which costs the host's time: one warning says so.
    """

    def __init__(self, device: Device) -> None:
        self._device, self._runs = device, 0
        self._graph: Any = None
        # The memory of the arrays that the step makes: whoever else got it would find it overwritten. And the stream, which
        # cuBLAS remembers.
        self._kept: Any = None

    def run(self, step: Callable[[], None]) -> None:
        """Do the step, on CuPy's current stream. step: the same in each call."""
        if self._runs == 1:  # kernels have been compiled and libraries opened, which cannot be recorded
            self._record(step)
        if self._graph is None:
            step()
        else:
            self._graph.launch()
        self._runs += 1

    def _record(self, step: Callable[[], None]) -> None:
        """Call step() once, without any work on the device, to record what it launches."""
        cuda = self._device.xp.cuda
        allocate, current = cuda.get_allocator(), cuda.get_current_stream()

        def allocate_for_good(size: int) -> Any:
            with current:  # CuPy keeps free memory by stream: what the first step freed is this one's
                return allocate(size)

        memory = cuda.MemoryPool(allocate_for_good)
        stream = cuda.Stream(non_blocking=True)  # the default one cannot be recorded
        try:
            with cuda.using_allocator(memory.malloc), stream:
                stream.begin_capture()
                try:
                    step()
                except BaseException:
                    with contextlib.suppress(cuda.runtime.CUDARuntimeError):  # that the record is of no use, which is known
                        stream.end_capture()
                    raise
                self._graph, self._kept = stream.end_capture(), (memory, stream)
        except Exception as error:  # whatever it is, the step itself will meet it, or do without the record
            print(f"warning: training steps are not replayed as a CUDA graph, kernels are launched one by one: "
                  f"{type(error).__name__}: {first_line(error)}", file=sys.stderr)
