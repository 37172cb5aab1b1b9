"""The training step, epochs of it, and evaluation."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from minidl import signals
from minidl.data.batches import NO_AUGMENTATION, Augmentation, Batches
from minidl.device import Array
from minidl.errors import DivergedError
from minidl.layers import Layer
from minidl.ops import loss, optimizer as optimizer_op
from minidl.optim import Optimizer

READ_EVERY = 50         # steps between two looks at the loss: each waits for the device
MOST_SKIPPED_STEPS = 20  # in a row, by the loss scaling of float16


@dataclass(frozen=True)
class Metrics:
    """Means over the images seen: loss, and the shares (0..1) of top-1 and top-5 hits."""

    loss: float
    top1: float
    top5: float


class Trainer:
    """Trains a network: its step is  batch -> forward -> loss -> backward -> optimizer,  all on the device."""

    def __init__(self, model: Layer, optimizer: Optimizer, batches: Batches, augmentation: Augmentation = NO_AUGMENTATION,
                 label_smoothing: float = 0.0) -> None:
        self.model, self.optimizer, self.batches = model, optimizer, batches
        self.augmentation, self.label_smoothing = augmentation, label_smoothing
        self._totals: Array = model.device.xp.zeros(4)  # of loss.cu
        model.skip_input_gradient()

    def step(self, indices: Array, lr: float) -> None:
        """One step on the images `indices` int32 (N) with learning rate `lr`."""
        x, labels = self.batches.load(indices, self.model.step, self.augmentation)
        logits = self.model.forward(x)
        dlogits = loss.forward_backward(logits, labels, self._totals, self.optimizer.scale,
                                        smoothing=self.label_smoothing)
        self.model.backward(dlogits)
        self.optimizer.step(lr)
        self.model.step += 1

    def epoch(self, indices_of_batches: Sequence[Array], learning_rates: Iterable[float],
              on_step: Callable[[int, Metrics | None], object] = lambda done, metrics: None) -> Metrics | None:
        """Train on each batch of indices with its learning rate -> Metrics over all.

        on_step(steps done, Metrics when last read) is called after each; the metrics are None before they were first
        read. Raises DivergedError when the loss is not finite.
        """
        self.model.train()
        self._totals[...] = 0
        metrics = None
        for done, (indices, lr) in enumerate(zip(indices_of_batches, learning_rates, strict=True), start=1):
            self.step(indices, lr)
            if done % READ_EVERY == 0 or done == len(indices_of_batches):
                metrics = _metrics(self.model.device.to_host(self._totals))
                self._check(metrics, done)
            on_step(done, metrics)
            signals.obey()
        return metrics

    def _check(self, metrics: Metrics, done: int) -> None:
        if not math.isfinite(metrics.loss):
            raise DivergedError(f"the loss became {metrics.loss} by step {done} of this epoch: try a lower --lr")
        if self.optimizer.scales_loss:
            skipped = int(self.optimizer.state[optimizer_op.SKIPPED_IN_ROW])
            if skipped >= MOST_SKIPPED_STEPS:
                raise DivergedError(f"{skipped} steps in a row had gradients beyond float16: try --precision bf16")


def evaluate(model: Layer, batches: Batches) -> Metrics:
    """The network in evaluation mode on all images of `batches`, in their order -> Metrics."""
    model.eval()
    totals = model.device.xp.zeros(4)
    one = model.device.xp.ones(1, model.parameters.master.dtype)
    for indices, valid in batches.all():
        x, labels = batches.load(indices, model.step)
        loss.forward_backward(model.forward(x), labels, totals, one, valid=valid)
        signals.obey()
    return _metrics(model.device.to_host(totals))


def _metrics(totals: Array) -> Metrics:
    loss_sum, first, fifth, images = (float(total) for total in totals)
    return Metrics(loss_sum / images, first / images, fifth / images)
