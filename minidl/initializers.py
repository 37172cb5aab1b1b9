"""Initial values of parameters, by their published names. Each is a function (rng, shape) -> float64 array.

shape: (O, C/groups, kh, kw) or (O, C). fan_in = C/groups*kh*kw inputs of one output, fan_out = O*kh*kw, with the
full O also for grouped convolutions, as PyTorch and the ResNeXt authors count.
"""

import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from minidl.device import Array

Initializer: TypeAlias = Callable[[np.random.Generator, tuple[int, ...]], Array]


def fans(shape: tuple[int, ...]) -> tuple[int, int]:
    """shape of a weight -> (fan_in, fan_out)."""
    window = math.prod(shape[2:])
    return shape[1] * window, shape[0] * window


def zeros(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return np.zeros(shape)


def ones(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return np.ones(shape)


def normal(std: float) -> Initializer:
    """Normal with mean 0 and standard deviation `std`."""
    return lambda rng, shape: rng.normal(0.0, std, shape)


def uniform(low: float, high: float) -> Initializer:
    """Uniform between `low` and `high`."""
    return lambda rng, shape: rng.uniform(low, high, shape)


def he_normal(mode: str = "fan_in") -> Initializer:
    """Normal, std = sqrt(2 / fan). He et al., arXiv 1502.01852; "fan_out" is the ResNet and ResNeXt authors' choice."""
    return lambda rng, shape: rng.normal(0.0, math.sqrt(2 / fans(shape)[_which(mode)]), shape)


def he_uniform(mode: str = "fan_in") -> Initializer:
    """Uniform with the same variance as `he_normal`: within sqrt(6 / fan)."""
    return lambda rng, shape: _within(rng, shape, math.sqrt(6 / fans(shape)[_which(mode)]))


def xavier_uniform(gain: float = 1.0) -> Initializer:
    """Uniform within gain * sqrt(6 / (fan_in + fan_out)). Glorot, Bengio, AISTATS 2010."""
    return lambda rng, shape: _within(rng, shape, gain * math.sqrt(6 / sum(fans(shape))))


def xavier_normal(gain: float = 1.0) -> Initializer:
    """Normal, std = gain * sqrt(2 / (fan_in + fan_out))."""
    return lambda rng, shape: rng.normal(0.0, gain * math.sqrt(2 / sum(fans(shape))), shape)


def uniform_fan_in(fan_in: int | None = None) -> Initializer:
    """Uniform within 1 / sqrt(fan_in): Torch's and PyTorch's default. A bias names the fan_in of its layer."""
    return lambda rng, shape: _within(rng, shape, 1 / math.sqrt(fan_in or fans(shape)[0]))


def _within(rng: np.random.Generator, shape: tuple[int, ...], bound: float) -> Array:
    return rng.uniform(-bound, bound, shape)


def _which(mode: str) -> int:
    if mode not in ("fan_in", "fan_out"):
        raise ValueError(f"initializer: mode {mode!r} is not fan_in or fan_out")
    return ("fan_in", "fan_out").index(mode)
