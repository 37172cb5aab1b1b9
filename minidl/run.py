"""A run: a network, its data, its optimizer and where it stands, as its settings say."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from minidl import blas, optim, random_keys, weights
from minidl.checkpoint import Checkpoint
from minidl.data.batches import Augmentation, Batches
from minidl.data.dataset import Dataset
from minidl.device import Array, Device
from minidl.errors import CheckpointError, UsageError
from minidl.kernels import acc_dtype, storage_dtype
from minidl.layer import Layer, output_for
from minidl.parallel import ALONE, Team
from minidl.settings import LONGEST_WARMUP, NORMALIZATIONS, ONECYCLE_WARMUP, STORAGE, Settings
from minidl.training import Batch, Metrics, Trainer
from minidl.wording import counted


class Run:
    """network: not initialized yet, else ValueError. Stands before its first step; `load` takes it elsewhere.

    epoch, step: how many epochs are done, and how many steps of the next one; history: {column: text} for each epoch done;
    best: the epoch with the best validation accuracy, and that accuracy, or None; best_lost: why its weights are in no file, ""
    if they are; seconds: of work, of all processes, up to the last checkpoint.
    start: weights to begin with, {name: array}, as far as they fit, or None; fresh: then the names of those that began at random.
    What a trial changes: repeats, how often an epoch goes over the images; evaluation_limit, of batches, None for all.
    """

    repeats = 1
    evaluation_limit: int | None = None

    def __init__(self, settings: Settings, network: Layer, train_set: Dataset, test_set: Dataset, place: Device,
                 team: Team = ALONE, start: Mapping[str, Array] | None = None) -> None:
        self.settings, self.network, self.place, self.team = settings, network, place, team
        self.epoch = self.step = 0
        self.history: list[dict[str, str]] = []
        self.best: tuple[int, float] | None = None
        self.best_lost = ""
        self.seconds = 0.0

        train_set, test_set = (_normalized(dataset, settings.normalize) for dataset in (train_set, test_set))
        train_set, val_set = _split(train_set, settings.val_split, settings.seed)
        for what, dataset in (("training", train_set), ("test", test_set)):
            if settings.batch_size > len(dataset.labels):
                raise UsageError(f"batch_size {settings.batch_size} is more than the {len(dataset.labels)} {what} images of "
                                 f"{dataset.name}")
        outputs, classes = output_for(network, train_set.images.shape[1:]), len(train_set.classes)
        if outputs != (classes,):
            raise UsageError(f"the network gives {outputs} for an image, {train_set.name} has {classes} classes: ({classes},) "
                             "is needed, as a Linear or a Flatten gives it")
        self.train_set = train_set
        dtype = storage_dtype(STORAGE[settings.precision])
        tf32 = settings.precision == "tf32"
        if tf32 and place.name == "cpu":
            blas.start_on_host()
        if "parameters" in vars(network):
            raise ValueError("the network has values already, which Run would replace: give weights as `start`")
        network.initialize(place, dtype, settings.seed, team.rank)
        self.fresh = None if start is None else _begin_with(network, start)

        def batches(dataset: Dataset, size: int) -> Batches:
            return Batches(dataset, place, dtype, size, settings.seed)

        self.train_batches, self.test_batches = batches(train_set, settings.batch_size), batches(test_set, settings.batch_size)
        self.val_batches = batches(val_set, min(settings.batch_size, settings.val_split)) if val_set else None
        optimizer = optim.OPTIMIZERS[settings.optimizer](network.parameters, clip_norm=settings.clip_norm,
                                                         **settings.hyperparameters())
        self.average = optim.Average(optimizer, settings.ema) if settings.ema else None
        augmentation = Augmentation(settings.padding, settings.reflect, settings.flip, settings.cutout)
        self.trainer = Trainer(network, optimizer, self.train_batches, augmentation, settings.label_smoothing, self.average,
                               team, tf32)

    # ---- the plan

    @property
    def steps_per_epoch(self) -> int:
        """Training drops the last, partial batch."""
        all_steps = self.train_batches.size // self.settings.batch_size * self.repeats
        return min(all_steps, self.settings.limit_train_batches or all_steps)

    def schedule(self) -> optim.Schedule:
        """The learning rate as a function of the step, for all epochs."""
        s = self.settings
        steps = s.epochs * self.steps_per_epoch
        if s.sched == "onecycle":
            warmup = int(ONECYCLE_WARMUP * steps)
        else:
            warmup = min(round(s.warmup_epochs * self.steps_per_epoch), int(LONGEST_WARMUP * steps))
        drops = tuple(milestone * self.steps_per_epoch for milestone in s.milestones)
        return optim.Schedule(s.sched, steps, s.lr, warmup, drops, s.factor)

    def batches(self, epoch: int) -> list[Batch]:
        """The training batches of an epoch (0, 1, ...): a function of it and the settings alone."""
        s = self.settings
        rate, first = self.schedule(), epoch * self.steps_per_epoch
        indices = (self.train_batches.epoch(epoch) * self.repeats)[:self.steps_per_epoch]
        rates = [rate(first + i) for i in range(len(indices))]
        if not s.mixup:
            return [Batch(i, lr) for i, lr in zip(indices, rates)]
        shares = random_keys.generator(s.seed, random_keys.MIXUP, epoch).beta(s.mixup, s.mixup, len(indices))
        # A pair is blended in both ways, so that the larger share may always be the first one's.
        on_device = self.place.array(np.maximum(shares, 1 - shares), acc_dtype(self.network.dtype))
        return [Batch(i, lr, on_device[n:n + 1]) for n, (i, lr) in enumerate(zip(indices, rates))]

    def begin_epoch(self) -> None:
        """What happens before the first step of the epoch `self.epoch`."""
        if self.settings.restart_at_milestones and self.epoch in self.settings.milestones:
            self.trainer.optimizer.restart()

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or the validation accuracy has not grown for as many as the settings allow."""
        patience = self.settings.patience
        return self.epoch >= self.settings.epochs or bool(patience and self.best and self.epoch - self.best[0] >= patience)

    # ---- evaluation

    @contextlib.contextmanager
    def evaluated(self) -> Iterator[Layer]:
        """The network with the weights that are evaluated: their average, if there is one."""
        with self.average.swapped() if self.average else contextlib.nullcontext():
            yield self.network

    def test(self) -> Metrics:
        """Metrics on the test set."""
        return self._evaluate(self.test_batches)

    def validate(self) -> Metrics | None:
        """Metrics on the images held out from training, None without them."""
        return None if self.val_batches is None else self._evaluate(self.val_batches)

    def _evaluate(self, batches: Batches) -> Metrics:
        with self.evaluated():
            return self.trainer.evaluate(batches, self.evaluation_limit)

    # ---- where it stands

    def position(self) -> str:
        """For people."""
        return f"{counted(self.epoch, 'epoch')} and {counted(self.step, 'step')}"

    def about(self) -> weights.Metadata:
        """What a file says about the weights."""
        return weights.describe(self.settings.arch, len(self.train_set.classes), self.settings.model_kwargs, self.train_set)

    def checkpoint(self) -> Checkpoint:
        """All that `load` needs, copied."""
        with self.evaluated() as network:
            state = network.state_dict()
        arrays = {name: np.array(self.place.to_host(array)) for name, array in self.trainer.arrays().items()}
        if self.average:
            arrays |= {f"weights/{name}": array for name, array in self.network.state_dict().items()}
        progress: dict[str, Any] = {
            "settings": self.settings.as_dict(), "epoch": self.epoch, "step": self.step, "history": self.history,
            "best": self.best, "best_lost": self.best_lost, "seconds": self.seconds, "repeats": self.repeats}
        return Checkpoint(state, arrays, self.about(), progress)

    def load(self, checkpoint: Checkpoint) -> None:
        """Stand where the checkpoint was taken. Raises CheckpointError where it is of another network or optimizer."""
        prefix = "weights/"
        raw = {name.removeprefix(prefix): array for name, array in checkpoint.arrays.items() if name.startswith(prefix)}
        saved = {name: array for name, array in checkpoint.arrays.items() if not name.startswith(prefix)}
        own = self.trainer.arrays()
        for name in sorted(own.keys() | saved.keys()):
            if name not in saved or name not in own or own[name].shape != saved[name].shape:
                raise CheckpointError(f"the checkpoint does not fit these settings, which only a new run can have: {name}: file "
                                      f"{saved[name].shape if name in saved else 'nothing'}, run "
                                      f"{own[name].shape if name in own else 'nothing'}")
        self.network.load_state_dict(raw or checkpoint.state)
        for name, array in own.items():
            array[...] = self.place.array(saved[name], array.dtype)
        progress = checkpoint.progress
        if (progress["settings"]["precision"] == "fp16") != (self.settings.precision == "fp16"):
            self.trainer.optimizer.restart_scaling()
        self.epoch, self.step = progress["epoch"], min(progress["step"], self.steps_per_epoch)  # larger batches are fewer
        self.history = list(progress["history"])
        self.best = tuple(progress["best"]) if progress.get("best") else None  # JSON has no tuples
        self.best_lost = progress.get("best_lost", "")
        self.seconds = progress.get("seconds", 0.0)

    @contextlib.contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Whatever is trained inside leaves no trace."""
        before = self.checkpoint()
        try:
            yield
        finally:
            self.load(before)


def _begin_with(network: Layer, start: Mapping[str, Array]) -> list[str]:
    """Load those of the weights whose names and shapes the network has -> its names that are left as they are."""
    own = network.state_dict()
    fitting = {name: array for name, array in start.items() if name in own and array.shape == own[name].shape}
    if not fitting:
        raise CheckpointError("none of the weights to begin with fits the network")
    network.load_state_dict({**own, **fitting})
    return [name for name in own if name not in fitting]


def _normalized(dataset: Dataset, name: str) -> Dataset:
    constants = NORMALIZATIONS[name]
    return dataset if constants is None else dataclasses.replace(dataset, mean=constants[0], std=constants[1])


def _split(dataset: Dataset, count: int, seed: int) -> tuple[Dataset, Dataset | None]:
    """-> the training images without `count` that are chosen at random, and those."""
    if not count:
        return dataset, None
    if count >= len(dataset.labels):
        raise UsageError(f"val_split {count} leaves none of the {len(dataset.labels)} training images of {dataset.name}")
    order = random_keys.generator(seed, random_keys.VALIDATION).permutation(len(dataset.labels))
    return subset(dataset, np.sort(order[count:])), subset(dataset, np.sort(order[:count]))


def subset(dataset: Dataset, chosen: Array) -> Dataset:
    """The images whose numbers are in `chosen` (n)."""
    return dataclasses.replace(dataset, images=np.ascontiguousarray(dataset.images[chosen]), labels=dataset.labels[chosen])
