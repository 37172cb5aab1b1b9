"""Optimizers over all parameters of a network at once, and learning-rate schedules."""

import math
from typing import Any

import numpy as np

from minidl.device import Array, array_module
from minidl.layers import Parameters
from minidl.ops import optimizer


class Optimizer:
    """What the optimizers share: the numbers of the current step on the device, and loss scaling for float16.

    `scale` is the array by which the loss must be multiplied. It is 1 for ever, except for float16: there a step whose
    gradients are not finite is skipped and halves the scale, which grows again after 2,000 good steps.
    """

    INITIAL_SCALE = 65536.0
    GROWTH_INTERVAL = 2000

    def __init__(self, parameters: Parameters) -> None:
        self.parameters = parameters
        self.scales_loss = parameters.data.dtype == np.float16
        self.state = _zeros_like(parameters.master, optimizer.STATE_SIZE)
        self.state[optimizer.SCALE] = self.INITIAL_SCALE if self.scales_loss else 1.0
        self.scale = self.state[optimizer.SCALE:optimizer.SCALE + 1]

    def step(self, lr: float) -> None:
        """Update all parameters from their gradients, with learning rate `lr`."""
        self.state[optimizer.LR] = lr
        if self.scales_loss:
            optimizer.check(self.parameters.grad, self.state)
        self._update(self.parameters.master, self.parameters.grad, self.parameters.data)
        optimizer.advance(self.state, self.GROWTH_INTERVAL if self.scales_loss else 0)

    def _update(self, master: Array, grad: Array, data: Array) -> None:
        raise NotImplementedError


class SGD(Optimizer):
    """Stochastic gradient descent with momentum, Nesterov's unless told otherwise. Formulas: ops/optimizer.cu.

    weight_decay is coupled L2 on every parameter, as in PyTorch.
    """

    def __init__(self, parameters: Parameters, momentum: float = 0.9, weight_decay: float = 0.0,
                 nesterov: bool = True) -> None:
        super().__init__(parameters)
        self.settings: dict[str, Any] = dict(momentum=momentum, weight_decay=weight_decay, nesterov=nesterov)
        self.velocity = _zeros_like(parameters.master, parameters.master.size)

    def _update(self, master: Array, grad: Array, data: Array) -> None:
        optimizer.sgd(master, grad, self.velocity, data, self.state, **self.settings)


class Adam(Optimizer):
    """Adam with bias correction. Formulas: ops/optimizer.cu. weight_decay is coupled L2, as in PyTorch's Adam."""

    def __init__(self, parameters: Parameters, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8,
                 weight_decay: float = 0.0) -> None:
        super().__init__(parameters)
        self.settings = dict(beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay)
        self.first_moment = _zeros_like(parameters.master, parameters.master.size)
        self.second_moment = _zeros_like(parameters.master, parameters.master.size)

    def _update(self, master: Array, grad: Array, data: Array) -> None:
        optimizer.adam(master, grad, self.first_moment, self.second_moment, data, self.state, **self.settings)


def _zeros_like(array: Array, size: int) -> Array:
    return array_module(array).zeros(size, array.dtype)


# ---- learning rate as a pure function of the step, 0 .. steps-1 ---------------------------------------------------


def constant(step: int, steps: int, peak: float, warmup: int = 0) -> float:
    """The peak, after `warmup` steps in which the rate grows linearly from a tenth of it."""
    if step < warmup:
        return peak * (0.1 + 0.9 * step / warmup)
    return peak


def cosine(step: int, steps: int, peak: float, warmup: int = 0) -> float:
    """Linear warm-up as in `constant`, then half a cosine down to 0 at the end. Loshchilov, Hutter, arXiv 1608.03983."""
    if step < warmup:
        return constant(step, steps, peak, warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def multistep(step: int, steps: int, peak: float, warmup: int = 0) -> float:
    """Linear warm-up, then peak, with a factor 0.2 after 30, 60 and 80 % of the steps: Wide ResNet's 60/120/160 of 200."""
    if step < warmup:
        return constant(step, steps, peak, warmup)
    return peak * 0.2 ** sum(step >= share * steps for share in (0.3, 0.6, 0.8))


SCHEDULES = {"cosine": cosine, "multistep": multistep, "constant": constant}
