"""Optimizers over all parameters of a network at once, an average of the weights, and learning-rate schedules."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np

from minidl.device import Array, array_module
from minidl.errors import UsageError
from minidl.layer import Parameters
from minidl.ops import optimizer


class Optimizer:
    """What the optimizers share: the numbers of the current step on the device, clipping, and loss scaling for float16.

    `scale`, by which the loss must be multiplied, is 1 for ever, except for float16: there a step whose gradients are not
    finite is skipped and halves the scale, which grows again after 2,000 good steps. For other types such a step and all
    later ones change nothing, and state[optimizer.FAILED] is its number, counted from 1.

    clip_norm, of every optimizer: the most that the norm of the whole gradient may be, 0 for no limit; what is longer is
    shortened, as by PyTorch's clip_grad_norm_. The norm before that is state[optimizer.GRAD_NORM].
    """

    INITIAL_SCALE = 65536.0
    GROWTH_INTERVAL = 2000

    default_lr: ClassVar[float]
    moment_names: ClassVar[tuple[str, ...]]  # in the order in which `_update` takes them
    _update: ClassVar[Callable[..., None]]   # a function of ops/optimizer.py

    def __init__(self, parameters: Parameters, clip_norm: float, **settings: Any) -> None:
        """settings: of `_update`. Raises UsageError for one outside its range, TypeError for a network in place of its
        `parameters`."""
        if not isinstance(parameters, Parameters):
            raise TypeError(f"{type(self).__name__} takes the `parameters` of a network, not {type(parameters).__name__}")
        for name, value in {**settings, "clip_norm": clip_norm}.items():
            limit = 1 if name in ("momentum", "beta1", "beta2", "rho") else math.inf
            if not 0 <= value < limit:
                raise UsageError(f"{type(self).__name__}: {name} {value} is not in 0 <= {name} < {limit}")
            if name == "eps" and value == 0:
                raise UsageError(f"{type(self).__name__}: eps must be more than 0, as it is divided by")
        self.parameters, self.clip_norm, self.settings = parameters, clip_norm, settings
        self.scales_loss = parameters.data.dtype == np.float16
        xp = array_module(parameters.master)
        self.moments = {name: xp.zeros_like(parameters.master) for name in self.moment_names}
        self.state = xp.zeros(optimizer.STATE_SIZE, parameters.master.dtype)
        self.restart_scaling()

    @property
    def scale(self) -> Array:
        """An array of one element, by which the loss must be multiplied."""
        return self.state[optimizer.SCALE:optimizer.SCALE + 1]

    def step(self, lr: float) -> None:
        """Update all parameters from their gradients, with learning rate `lr`. The next forward draws other dropout masks."""
        self.set_rate(lr)
        self.update()

    def set_rate(self, lr: float) -> None:
        """The learning rate of the next `update`."""
        self.state[optimizer.LR] = lr

    def update(self) -> None:
        """`step`, with the learning rate that was set: whatever changes from one to the next is on the device."""
        at = self.parameters
        optimizer.norm(at.grad, self.state, self.clip_norm)
        self._update(at.master, at.grad, *self.moments.values(), at.data, self.state, **self.settings)
        optimizer.advance(self.state, self.GROWTH_INTERVAL if self.scales_loss else 0)
        at.step += 1

    def restart_scaling(self) -> None:
        """The loss scale is what it is before the first step."""
        self.state[optimizer.SCALE] = self.INITIAL_SCALE if self.scales_loss else 1.0
        self.state[optimizer.GOOD_STEPS] = self.state[optimizer.SKIPPED_IN_ROW] = 0

    def restart(self) -> None:
        """Forget the moments, as the authors of Wide ResNet do at each drop of the rate. Loss scale and counts go on."""
        for moment in self.moments.values():
            moment[...] = 0
        self.state[optimizer.AGE] = 0

    def arrays(self) -> dict[str, Array]:
        """{name: array}, all that a checkpoint must hold so that training goes on bit for bit: write into them to load it."""
        return {"state": self.state, **self.moments}


class SGD(Optimizer):
    """Stochastic gradient descent with momentum, Nesterov's unless told otherwise. Formulas: ops/optimizer.cu.

    weight_decay is coupled L2 on every parameter, as in PyTorch.
    """

    default_lr, BATCH_OF_DEFAULT_LR = 0.1, 128
    moment_names = ("velocity",)
    _update = staticmethod(optimizer.sgd)

    def __init__(self, parameters: Parameters, momentum: float = 0.9, weight_decay: float = 0.0, nesterov: bool = True,
                 clip_norm: float = 0.0) -> None:
        super().__init__(parameters, clip_norm, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov)


class Adam(Optimizer):
    """Adam with bias correction. Formulas: ops/optimizer.cu. weight_decay is coupled L2, as in PyTorch's Adam."""

    default_lr = 1e-3
    moment_names = ("first_moment", "second_moment")
    _update = staticmethod(optimizer.adam)

    def __init__(self, parameters: Parameters, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8,
                 weight_decay: float = 0.0, clip_norm: float = 0.0) -> None:
        super().__init__(parameters, clip_norm, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay)


class AdamW(Optimizer):
    """Adam whose weight decay is decoupled from the gradient, as in PyTorch's AdamW. Formulas: ops/optimizer.cu."""

    default_lr = 1e-3
    moment_names = Adam.moment_names
    _update = staticmethod(partial(optimizer.adam, decoupled=True))

    def __init__(self, parameters: Parameters, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8,
                 weight_decay: float = 0.01, clip_norm: float = 0.0) -> None:
        super().__init__(parameters, clip_norm, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay)


class AdaDelta(Optimizer):
    """AdaDelta with a learning rate. Formulas: ops/optimizer.cu. weight_decay is coupled L2, as in PyTorch's Adadelta."""

    default_lr = 1.0
    moment_names = ("mean_g2", "mean_dx2")
    _update = staticmethod(optimizer.adadelta)

    def __init__(self, parameters: Parameters, rho: float = 0.9, eps: float = 1e-6, weight_decay: float = 0.0,
                 clip_norm: float = 0.0) -> None:
        super().__init__(parameters, clip_norm, rho=rho, eps=eps, weight_decay=weight_decay)


OPTIMIZERS: dict[str, type[Optimizer]] = {"sgd": SGD, "adam": Adam, "adamw": AdamW, "adadelta": AdaDelta}


class Average:
    """An exponential average of the weights and running statistics that an Optimizer's network has after each step.

    It begins as what they are now. Each step keeps the share `decay` of it, the first steps less, so that what it began with
    is soon forgotten. Formula: ops/optimizer.cu. Raises UsageError for a decay outside 0 <= decay < 1.
    """

    def __init__(self, optimizer: Optimizer, decay: float) -> None:
        if not 0 <= decay < 1:
            raise UsageError(f"average of the weights: decay {decay} is not in 0 <= decay < 1")
        self.parameters, self.state, self.decay = optimizer.parameters, optimizer.state, decay
        self.master, self.buffers = self.parameters.master.copy(), self.parameters.buffers.copy()

    def update(self) -> None:
        """Count in the network as it is after a step of the optimizer; one that was skipped changes nothing."""
        optimizer.average(self.master, self.parameters.master, self.state, self.decay)
        optimizer.average(self.buffers, self.parameters.buffers, self.state, self.decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Within the `with` block the network has the averages; after it, bit for bit, what it had before."""
        own = self.parameters.master.copy(), self.parameters.buffers.copy()
        try:
            self._give(self.master, self.buffers)
            yield
        finally:
            self._give(*own)

    def _give(self, master: Array, buffers: Array) -> None:
        self.parameters.master[...], self.parameters.buffers[...] = master, buffers
        self.parameters.cast()

    def arrays(self) -> dict[str, Array]:
        """{name: array}, all that a checkpoint must hold: write into them to load it."""
        return {"master": self.master, "buffers": self.buffers}


# ---- learning rate as a pure function of the step ------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """schedule(step) is the learning rate of the step 0 .. steps-1.

    After `warmup` steps in which it grows linearly from a tenth of `peak`, it
      constant   stays there
      cosine     follows half a cosine down to 0 at `steps`. Loshchilov, Hutter, arXiv 1608.03983
      multistep  is multiplied by `factor` at each of the steps `drops`
      onecycle   falls linearly, to a thousandth of the peak in the last step. Smith, Topin, arXiv 1708.07120
    Raises UsageError for another name.
    """

    name: str
    steps: int
    peak: float
    warmup: int = 0
    drops: tuple[int, ...] = ()
    factor: float = 0.1

    def __post_init__(self) -> None:
        if self.name not in SCHEDULES:
            raise UsageError(f"schedule {self.name!r} is not one of {', '.join(SCHEDULES)}")

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return self.peak * (0.1 + 0.9 * step / self.warmup)
        return self.peak * SCHEDULES[self.name](self, step)


def _cosine(schedule: Schedule, step: int) -> float:
    progress = (step - schedule.warmup) / max(1, schedule.steps - schedule.warmup)
    return 0.5 * (1 + math.cos(math.pi * progress))


def _multistep(schedule: Schedule, step: int) -> float:
    return schedule.factor ** sum(step >= drop for drop in schedule.drops)


def _onecycle(schedule: Schedule, step: int) -> float:
    progress = (step - schedule.warmup) / max(1, schedule.steps - 1 - schedule.warmup)
    return 1 - 0.999 * progress


SCHEDULES: dict[str, Callable[[Schedule, int], float]] = {  # name: share of the peak, after the warm-up
    "cosine": _cosine, "multistep": _multistep, "onecycle": _onecycle, "constant": lambda schedule, step: 1.0}
