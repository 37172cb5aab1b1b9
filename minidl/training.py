"""The training step, epochs of it, and evaluation."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from minidl import blas, inspection, signals
from minidl.data.batches import NO_AUGMENTATION, Augmentation, Batches
from minidl.device import Array
from minidl.errors import DivergedError
from minidl.layer import Layer
from minidl.ops import augment, loss, optimizer as optimizer_op
from minidl.optim import Average, Optimizer
from minidl.parallel import ALONE, Team
from minidl.step_graph import StepGraph, StepMemory

READ_EVERY = 50         # steps between two looks at the loss: each waits for the device
MOST_SKIPPED_STEPS = 20  # in a row, by the loss scaling of float16


@dataclass(frozen=True)
class Metrics:
    """Means over the images seen: loss, and the shares (0..1) of top-1 and top-5 hits."""

    loss: float
    top1: float
    top5: float


@dataclass(frozen=True)
class Batch:
    """What a step needs.

    indices: int32 (N) of its images, N the batch size; lr: the learning rate; share: with mixup the weight of each image
    beside its partner's, an array of one element on the device, else None.
    """

    indices: Array
    lr: float
    share: Array | None = None


class Trainer:
    """Trains a network. A step is  batch -> forward -> loss -> backward -> optimizer,  all on the device.

    average: of the weights, or None. team: the ranks that share each batch. tf32: whether float32 products may round their
    factors to TF32, here and in `evaluate`. inspects: whether the last step of each epoch fills `statistics`, see
    inspection.py. memory: where steps on a GPU, and evaluations between them, allocate.

    On a GPU the second step is recorded and replayed (StepGraph): settings that change after it have no effect. From here on
    network.backward returns None in place of dx.
    """

    inspects = False
    statistics: dict[str, dict[str, float]] | None = None

    def __init__(self, network: Layer, optimizer: Optimizer, batches: Batches, augmentation: Augmentation = NO_AUGMENTATION,
                 label_smoothing: float = 0.0, average: Average | None = None, team: Team = ALONE, tf32: bool = False) -> None:
        self.network, self.optimizer, self.batches, self.average = network, optimizer, batches, average
        self.augmentation, self.label_smoothing, self.team, self.tf32 = augmentation, label_smoothing, team, tf32
        xp, acc = network.device.xp, network.parameters.master.dtype
        self._totals: Array = xp.zeros(4)  # of loss.cu, over the epoch
        self._totals_of_part: Array = xp.zeros(5)  # of this rank in one step; and the exit code it was asked for
        self._stop = 0
        # The present batch, where each step finds it.
        self._indices: Array = xp.zeros(batches.batch_size, np.int32)
        self._share: Array = xp.ones(1, acc)
        self.memory = StepMemory(network.device)
        self._graphs: dict[bool, StepGraph] = defaultdict(partial(StepGraph, self.memory))  # with mixup or without
        self._evaluators: dict[Batches, Evaluator] = {}
        network.skip_input_gradient()

    def step(self, batch: Batch) -> None:
        """One step of training. Raises ValueError for a batch of another size than `batches` have."""
        if batch.indices.shape != self._indices.shape:
            raise ValueError(f"step: indices {batch.indices.shape} of a batch of {len(self._indices)} images")
        mixed = batch.share is not None
        self._indices[...] = batch.indices
        if mixed:
            self._share[...] = batch.share
        self.optimizer.set_rate(batch.lr)
        with blas.tf32(self.tf32):
            if self.team.size == 1 and may_be_replayed(self.network):  # ranks wait for each other in the middle of a step
                self._graphs[mixed].run(partial(self._step_on_device, mixed))
            else:
                with self.memory.lent():
                    self._step_on_device(mixed)

    def _step_on_device(self, mixed: bool) -> None:
        """The step after what it needs has been put into its place: the host gives and takes no more numbers, so that it can be
        replayed. But for ranks, which exchange theirs."""
        share = self._share if mixed else None
        if self.team.size == 1:
            self._gradients(self._indices, share, self._totals)
        else:
            self._gradients_of_all(self._indices, share)
        self.optimizer.update()
        if self.average:
            self.average.update()

    def _gradients(self, indices: Array, share: Array | None, totals: Array) -> None:
        """Forward and backward on this rank's part of the batch, mixed with the share if there is one; adds to totals (4)."""
        x, labels = self.batches.load(indices, self.network.step, self.augmentation, self.team.part(len(indices)))
        others = None
        if share is not None:
            augment.mix(x, share)
            others = self.network.device.array(labels[::-1])
        dlogits = loss.forward_backward(self.network.forward(x), labels, totals, self.optimizer.scale,
                                        smoothing=self.label_smoothing, other_labels=others, share=share)
        self.network.backward(dlogits)

    def _gradients_of_all(self, indices: Array, share: Array | None) -> None:
        """The same, and then the gradient, running statistics and totals are those of the whole batch, on all ranks."""
        team, place, parameters = self.team, self.network.device, self.network.parameters
        self._totals_of_part[...] = 0
        self._gradients(indices, share, self._totals_of_part[:4])
        self._totals_of_part[4] = signals.asked() if team.rank == 0 else 0
        part = team.part(len(indices))
        part_of_all = (part.stop - part.start) / len(indices)
        for array, weight in ((parameters.grad, part_of_all), (parameters.buffers, part_of_all), (self._totals_of_part, 1.0)):
            team.add(array, weight, place)
        self._totals += self._totals_of_part[:4]
        self._stop = int(self._totals_of_part[4])

    def epoch(self, batches: Sequence[Batch], on_step: Callable[[int, Metrics | None], object] = lambda done, metrics: None,
              first: int = 0) -> Metrics:
        """Train on the batches of an epoch -> Metrics over all. first: how many of them were done before, by a run that this
        one goes on from.

        on_step(steps done, Metrics when last read) is called after each; the metrics are None before they were first
        read. A signal ends it between two steps. Raises DivergedError when a number is not finite any more.
        """
        self.network.train()
        if not first:
            self._totals[...] = 0
        metrics = None
        for done in range(first + 1, len(batches) + 1):
            self._step_of_epoch(batches, done)
            if done % READ_EVERY == 0 or done == len(batches):
                metrics = self.read(batches, done)
            on_step(done, metrics)
            # Of several ranks all stop after the same step: _stop came with its gradient.
            if stop := signals.asked() if self.team.size == 1 else self._stop:
                self.read(batches, done)  # what is saved now must not be of a step that failed
                raise signals.Stop(stop)
        return metrics or self.read(batches, len(batches))

    def _step_of_epoch(self, batches: Sequence[Batch], done: int) -> None:
        if self.inspects and done == len(batches):
            scale = float(self.network.device.to_host(self.optimizer.scale)[0])  # before the step, which may change it
            part = self.team.part(self.batches.batch_size)
            self.statistics = inspection.statistics(self.network, lambda: self.step(batches[-1]), scale,
                                                    (part.stop - part.start) / self.batches.batch_size)
        else:
            self.step(batches[done - 1])

    def read(self, batches: Sequence[Batch], done: int) -> Metrics:
        """The Metrics of the epoch so far, after `done` of its batches. Raises DivergedError where a number is not finite."""
        to_host = self.network.device.to_host
        state = to_host(self.optimizer.state)
        if failed := int(state[optimizer_op.FAILED]):
            ago = int(state[optimizer_op.CALLS]) - failed
            raise DivergedError(f"step {failed}: {self._failure(batches[done - ago - 1], ago)}")
        skipped = int(state[optimizer_op.SKIPPED_IN_ROW])
        if skipped >= MOST_SKIPPED_STEPS:
            raise DivergedError(f"{skipped} steps in a row had gradients beyond float16: try --precision bf16")
        metrics = _metrics(to_host(self._totals))
        if not math.isfinite(metrics.loss):
            raise DivergedError(f"the loss became {metrics.loss} by step {done} of this epoch: try a lower --lr")
        return metrics

    def _failure(self, batch: Batch, ago: int) -> str:
        """What went wrong in a step, `ago` steps before the last. Nothing has changed the weights since, so that its forward
        and backward can be looked at again."""
        self.network.step -= ago + 1
        totals = self.network.device.xp.zeros(4)
        with self.memory.lent(), blas.tf32(self.tf32):
            what = inspection.first_nonfinite(self.network, lambda: self._gradients(batch.indices, batch.share, totals))
        if what:
            return f"{what} is not finite: try a lower --lr"
        if self.team.size > 1:
            return "the gradient of another rank is not finite: try a lower --lr"
        return "a gradient was not finite, but all are where the step is repeated: is the hardware sound?"

    def evaluate(self, batches: Batches, limit: int | None = None) -> Metrics:
        """As the function of that name, between steps and as they compute."""
        if batches not in self._evaluators:
            self._evaluators[batches] = Evaluator(self.network, batches, self.team, self.memory)
        with self.memory.lent(), blas.tf32(self.tf32):
            return self._evaluators[batches].run(limit)

    def arrays(self) -> dict[str, Array]:
        """{name: array}, all besides weights and running statistics that training goes on from: write into them to load it."""
        average = {f"average/{name}": array for name, array in self.average.arrays().items()} if self.average else {}
        return {"step": self.network.step, "totals": self._totals, **self.optimizer.arrays(), **average}


def evaluate(network: Layer, batches: Batches, limit: int | None = None, team: Team = ALONE) -> Metrics:
    """The network in evaluation mode, in which it stays, on all images of `batches`, or those of the first `limit` batches ->
    Metrics.

    team: who share the batches.
    """
    return Evaluator(network, batches, team, StepMemory(network.device)).run(limit)


class Evaluator:
    """Evaluates a network on `batches` again and again, on a GPU by replaying what it does with a whole batch (StepGraph)."""

    def __init__(self, network: Layer, batches: Batches, team: Team, memory: StepMemory) -> None:
        """memory: for what is made on a GPU, nothing of which is needed after the next batch."""
        self.network, self.batches, self.team = network, batches, team
        xp = network.device.xp
        self._totals: Array = xp.zeros(4)  # of loss.cu
        self._indices: Array = xp.zeros(batches.batch_size, np.int32)  # of the present batch, where each finds them
        self._one: Array = xp.ones(1, network.parameters.master.dtype)
        self._graph = StepGraph(memory)

    def run(self, limit: int | None = None) -> Metrics:
        """See `evaluate`."""
        self.network.eval()
        self._totals[...] = 0
        size, replays = self.batches.batch_size, may_be_replayed(self.network)
        for indices, valid in self.batches.all()[:limit][self.team.rank::self.team.size]:
            self._indices[...] = indices
            if replays and valid == size:
                self._graph.run(partial(self._batch_on_device, size))
            else:
                self._batch_on_device(valid)
            if self.team.size == 1:  # of several, all end after the same step of training
                signals.obey()
        self.team.add(self._totals, 1.0, self.network.device)
        return _metrics(self.network.device.to_host(self._totals))

    def _batch_on_device(self, valid: int) -> None:
        x, labels = self.batches.load(self._indices, self.network.step)
        loss.forward_backward(self.network.forward(x), labels, self._totals, self._one, valid=valid)


def may_be_replayed(network: Layer) -> bool:
    """Whether what the network does can be recorded: it is on a GPU, and nobody watches its layers, who wants them to be called."""
    return network.device.name != "cpu" and not inspection.watched(network)


def _metrics(totals: Array) -> Metrics:
    loss_sum, first, fifth, images = (float(total) for total in totals)
    return Metrics(loss_sum / images, first / images, fifth / images)
