"""When checkpoints are written: often enough that little is lost, seldom enough that it costs little."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from minidl import checkpoint
from minidl.errors import DivergedError
from minidl.run import Run
from minidl.run_folder import RunFolder
from minidl.settings import save_interval
from minidl.training import Batch

LARGEST_SHARE = 0.01  # of the time, for checkpoints at the ends of epochs


class Saver:
    """Writes the checkpoints of a run into its folder: where `save_every` says so, and at the end of each epoch unless the
    last one is so recent that this would take more than LARGEST_SHARE of the time."""

    def __init__(self, run: Run, folder: RunFolder) -> None:
        self.run, self.folder = run, folder
        self.seconds, self.steps = save_interval(run.settings.save_every)
        self._before = run.seconds
        self._begin = self._last = time.perf_counter()
        self._cost = 0.0
        self._saved = (0, 0)  # where the run stood

    def after_step(self, batches: Sequence[Batch]) -> None:
        """The run stands behind one of the batches of its epoch."""
        if self.steps and self.run.step % self.steps == 0 or time.perf_counter() - self._last >= self.seconds:
            self.run.trainer.read(batches, self.run.step)  # a step that failed is found now, not in what was saved
            self.save()

    def after_epoch(self) -> None:
        """The run stands at the end of an epoch."""
        if self.steps or self._cost <= LARGEST_SHARE * (time.perf_counter() - self._last):
            self.save()

    def save(self) -> None:
        """Write last.npz now, unless there is one of this very step. Raises DivergedError, and writes nothing, where a number
        in it is not finite."""
        if self.run.team.rank > 0:
            self._last = time.perf_counter()
            return
        position = self.run.epoch, self.run.step
        if position == self._saved and self.saved:
            return
        begin = time.perf_counter()
        self.run.seconds = self._before + begin - self._begin
        self.folder.save(self._checkpoint())
        self._last = time.perf_counter()
        self._cost, self._saved = self._last - begin, position
        if self.saved:
            self.folder.log("save", epoch=self.run.epoch, step=self.run.step, seconds=round(self._cost, 4))

    def save_best(self) -> None:
        """Write best.npz now. Raises DivergedError as `save` does."""
        if self.run.team.rank == 0:
            self.folder.save_best(self._checkpoint())
            self.run.best_lost = self.folder.troubles.get(checkpoint.BEST, "")

    @property
    def saved(self) -> bool:
        """Whether the last attempt to write last.npz succeeded."""
        return checkpoint.LAST not in self.folder.troubles

    def _checkpoint(self) -> checkpoint.Checkpoint:
        state = self.run.checkpoint()
        for name, array in [*state.state.items(), *state.arrays.items()]:
            # "state" has the norm of a gradient, perhaps of a step that was skipped.
            if name != "state" and not np.isfinite(array).all():
                raise DivergedError(f"after {self.run.position()} {name} is not finite: "
                                    "try a lower --lr")
        return state
