"""Gradients of a layer against finite differences of its own forward, in float64. For any Layer, yours too:

    results = gradient_check.check(MyLayer(3), (3, 5, 4, 2))
    assert all(result.verdict == "ok" for result in results), "\\n".join(map(str, results))

With u random and of y's shape, backward(u) must return the derivatives of <u, forward(x)> to x, and leave those to the
parameters in their gradients. Differences are central, of fourth order, with two step sizes. Where forward has a kink
within reach, as a ReLU at 0, there is no derivative to compare with: the two step sizes, or the two sides of the point,
disagree, and the verdict says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from minidl import signals
from minidl.device import Array, Device, select
from minidl.errors import UserError
from minidl.layer import Layer

LIMIT = 1e-6  # of relative errors; those of the differences themselves are near 1e-9
STEP = 2.5e-4  # the smaller one, for values of about 1; the larger is twice that, and each reaches twice its length
# Values of x are so far apart, and half of it from 0: maxima and ReLUs of x itself have no kinks within reach.
GAP = 0.01
# Along a direction through a network, some of whose many ReLUs are near 0: the first with no kink within reach.
DIRECTION_STEPS = (1e-7, 1e-8, 1e-9)
DIRECTIONS = 3


class Unfit(UserError, ValueError):
    """A layer does what a network cannot do with."""


@dataclass(frozen=True)
class Result:
    """How the gradient of one argument compares.

    argument: "x", "parameters" (all of them), or the name of one. size: of how many derivatives; wrong, kinks: how many of
    them are beyond the limit, or do not exist.
    verdict: "ok"; "wrong"; "kink" where some do not exist and the others are right; "unrepeatable" where a second pass over
    the same input gave another gradient.
    error: the largest relative error, kinks left out. index: where it is, or the first kink where nothing is wrong; None
    along a direction. got: what backward gives there; expected: the difference quotient with `step`; coarse: with twice that.
    """

    argument: str
    size: int
    wrong: int
    kinks: int
    verdict: str
    error: float
    index: tuple[int, ...] | None
    got: float
    expected: float
    coarse: float
    step: float

    def __str__(self) -> str:
        place = "" if self.index is None else f"[{', '.join(map(str, self.index))}]"
        kinks = f", {self.kinks:,} at kinks" if self.kinks else ""
        return (f"{self.verdict}: {self.argument}{place}: got {self.got:.9g}, expected {self.expected:.9g} (step "
                f"{self.step:g}), {self.coarse:.9g} ({2 * self.step:g}); {self.wrong:,} of {self.size:,} wrong{kinks}")


def check(layer: Layer, shape: tuple[int, ...], *, device: Device | None = None, seed: int = 0) -> list[Result]:
    """The derivatives to each element of x, an array of `shape` (C, H, W, N), and of each parameter -> [Result, ...], x first.

    Seven forwards for each element: choose small sizes, and odd ones. The layer is initialized in float64 on `device` (by
    default the CPU); then its parameters are moved off their initial values, at which a forgotten factor of 1 does not
    show. Values of x are distinct, up to 400 of them within -2..2.

    A backward that returns None, as after `skip_input_gradient`, has no gradient to x. Raises Unfit for what a network
    cannot do with: y is not finite, or of another shape than `output_shape` says; y or dx is not contiguous, or of another type
    than x; a gradient has another shape than its argument; forward changes x, or backward dy.
    """
    return _Trial(layer, shape, device, seed).elements()


def check_directions(network: Layer, shape: tuple[int, ...], *, device: Device | None = None, seed: int = 0) -> list[Result]:
    """As `check`, along random directions: of x, and of all parameters at once. If those are wrong, also of each parameter.

    For whole networks, whose elements are too many to take one by one: at most 126 forwards, more if some are wrong.
    """
    return _Trial(network, shape, device, seed).directions()


class _Trial:
    """A layer at one x, and the gradients that its backward gives there."""

    def __init__(self, layer: Layer, shape: tuple[int, ...], device: Device | None, seed: int) -> None:
        self.layer, self.device, self.rng = layer, device or select("cpu"), np.random.default_rng(seed)
        self._check_arrays(shape)
        layer.initialize(self.device, "float64", seed).train()
        self.parameters = layer.named_parameters()
        for parameter in self.parameters.values():
            spread = 0.3 * (float((parameter.master**2).mean()) ** 0.5 or 1.0)
            parameter.master += self.device.array(spread * self.rng.normal(size=parameter.shape))
        self.values = {"x": self.device.array(_distinct(self.rng, shape)),
                       **{name: parameter.master for name, parameter in self.parameters.items()}}
        self.start = {name: values.copy() for name, values in self.values.items()}

        y = layer.forward(self.values["x"])
        self._stays("forward", "x", self.values["x"], self.start["x"])
        self.u = self.device.array(self.rng.normal(size=y.shape))
        size = float(abs(self.u * y).sum())
        if not np.isfinite(size):
            raise Unfit(f"{type(layer).__name__}: forward gives values that are not finite")
        self.noise = 16 * np.finfo(np.float64).eps * size  # what two equal losses may differ by
        self.gradients = self._backward()
        layer.forward(self.values["x"])
        self.unrepeatable = {name for name, gradient in self._backward().items()
                             if not np.array_equal(gradient, self.gradients[name], equal_nan=True)}

    def _check_arrays(self, shape: tuple[int, ...]) -> None:
        """What forward and backward give can be read by other layers. In float32: else a layer that makes float64 of everything
        would not be seen."""
        x = self.device.array(_distinct(np.random.default_rng(0), shape).astype(np.float32))
        y = self.layer.initialize(self.device, "float32").train().forward(x)
        said = (*self.layer.output_shape(shape[:-1]), shape[-1])
        if y.shape != said:
            raise Unfit(f"{type(self.layer).__name__}: forward gives {tuple(y.shape)}, and output_shape says {said}")
        self._can_be_read("forward", y)
        dx = self.layer.backward(y.copy())
        if dx is not None:
            self._can_be_read("backward", dx)

    def _can_be_read(self, method: str, array: Array) -> None:
        if array.dtype != np.float32:
            raise Unfit(f"{type(self.layer).__name__}: {method} gives {array.dtype} where x is float32, whose type it must "
                        "have")
        if not array.flags.c_contiguous:
            raise Unfit(f"{type(self.layer).__name__}: {method} gives an array that is not contiguous")

    def _backward(self) -> dict[str, Array]:
        dy = self.u.copy()
        dx = self.layer.backward(dy)
        self._stays("backward", "dy", dy, self.u)
        gradients = {} if dx is None else {"x": dx}
        gradients |= {name: parameter.grad for name, parameter in self.parameters.items()}
        for name, gradient in gradients.items():
            if gradient.shape != self.values[name].shape:
                raise Unfit(f"{type(self.layer).__name__}: the gradient to {name} has shape {tuple(gradient.shape)}, "
                            f"{name} {tuple(self.values[name].shape)}")
        return {name: np.array(self.device.to_host(gradient)) for name, gradient in gradients.items()}

    def _stays(self, method: str, argument: str, array: Array, before: Array) -> None:
        if not bool((array == before).all()):  # other layers read it, too
            raise Unfit(f"{type(self.layer).__name__}: {method} changes {argument}, which must stay as it is")

    def elements(self) -> list[Result]:
        """A Result for each argument, of all its elements."""
        results = []
        for name, gradient in self.gradients.items():
            slopes = np.array([self._slopes({name: unit}, STEP) for unit in _units(gradient.shape)]).reshape(-1, 3)
            expected = slopes[:, 0]
            allowed = self._allowed(expected, np.sqrt(np.mean(expected[np.isfinite(expected)] ** 2)), STEP)
            steps = np.full(gradient.size, STEP)
            results.append(self._result(name, [name], gradient.ravel(), slopes, allowed, steps, gradient.shape))
        return results

    def directions(self) -> list[Result]:
        """A Result for x and one for all parameters, of DIRECTIONS; if those are wrong, one more for each parameter."""
        parameters = [name for name in self.gradients if name != "x"]
        groups = {argument: names for argument, names in (("x", ["x"]), ("parameters", parameters))
                  if names and names[0] in self.gradients}
        results = [self._along_directions(argument, names) for argument, names in groups.items()]
        if parameters and results[-1].verdict == "wrong":
            results += [self._along_directions(name, [name]) for name in parameters]
        return results

    def _along_directions(self, argument: str, names: list[str]) -> Result:
        got, slopes, allowed, steps = (np.empty((DIRECTIONS, *rest)) for rest in ((), (3,), (), ()))
        for i in range(DIRECTIONS):
            direction = {name: self._direction(name) for name in names}
            products = [direction[name] * self.gradients[name] for name in names]
            got[i] = sum(product.sum() for product in products)
            typical = sum((product**2).sum() for product in products) ** 0.5
            for step in DIRECTION_STEPS:
                slopes[i], steps[i] = self._slopes(direction, step), step
                allowed[i] = self._allowed(slopes[i, 0], typical, step)
                if not _at_kink(slopes[i], allowed[i]):
                    break
        return self._result(argument, names, got, slopes, allowed, steps, None)

    def _direction(self, name: str) -> Array:
        """Random, and as long as the argument itself, so that small parameters count as much as large ones."""
        direction = self.rng.normal(size=self.values[name].shape)
        length = float((self.start[name] ** 2).sum()) ** 0.5
        return direction * (length / np.linalg.norm(direction))

    def _slopes(self, direction: dict[str, Array], step: float) -> tuple[float, float, float]:
        """{argument: NumPy array} -> the slope of the loss along it by differences with `step`, and with twice that; by how
        much its slopes on the left and on the right differ more than rounding and a smooth function explain.
        """
        moves = {name: self.device.array(move) for name, move in direction.items()}

        def loss(steps: int) -> float:
            signals.obey()
            for name, move in moves.items():
                self.values[name][...] = self.start[name] + steps * step * move
            return float((self.u * self.layer.forward(self.values["x"])).sum())

        f = {steps: loss(steps) for steps in (-4, -2, -1, 1, 2, 4, 0)}  # 0 last: it puts the arrays back
        fine = (8 * (f[1] - f[-1]) - (f[2] - f[-2])) / (12 * step)
        coarse = (8 * (f[2] - f[-2]) - (f[4] - f[-4])) / (24 * step)
        # Second differences grow with the square of the step, or at a kink with the step itself.
        bend = abs(4 * (f[1] - 2 * f[0] + f[-1]) - (f[2] - 2 * f[0] + f[-2]))
        return fine, coarse, max(0.0, bend - 12 * self.noise) / step  # rounding weighs 12 times as much in it as in `fine`

    def _allowed(self, expected: Array, typical: float, step: float) -> Array:
        """The error at the limit: relative to the derivative, or where its terms cancel, to a typical one."""
        return LIMIT * np.maximum(np.abs(expected), typical) + self.noise / step

    def _result(self, argument: str, names: list[str], got: Array, slopes: Array, allowed: Array, steps: Array,
                shape: tuple[int, ...] | None) -> Result:
        """names: the arguments that `argument` stands for."""
        at_kink = _at_kink(slopes, allowed)
        error = LIMIT * np.abs(got - slopes[:, 0]) / allowed
        error = np.where(at_kink, 0, np.where(np.isnan(error), np.inf, error))
        wrong = error > LIMIT
        shown = int(np.argmax(at_kink if at_kink.any() and not wrong.any() else error))
        verdict = ("unrepeatable" if self.unrepeatable.intersection(names) else "wrong" if wrong.any() else
                   "kink" if at_kink.any() else "ok")
        index = None if shape is None else tuple(map(int, np.unravel_index(shown, shape)))
        return Result(argument, got.size, int(wrong.sum()), int(at_kink.sum()), verdict, float(error.max()), index,
                      float(got[shown]), float(slopes[shown, 0]), float(slopes[shown, 1]), float(steps[shown]))


def _at_kink(slopes: Array, allowed: Array) -> Array:
    """slopes (..., 3) as from `_slopes`, allowed (...) -> bool (...)."""
    fine, coarse, bend = np.moveaxis(slopes, -1, 0)
    return ~(np.maximum(np.abs(fine - coarse), bend) <= allowed)


def _units(shape: tuple[int, ...]) -> Iterator[Array]:
    """The arrays of `shape` that are 1 at one place and 0 elsewhere, in the order of the places."""
    for index in np.ndindex(shape):
        unit = np.zeros(shape)
        unit[index] = 1
        yield unit


def _distinct(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Shuffled distinct values about 0, at least GAP apart and GAP / 2 from 0."""
    count = math.prod(shape)
    gap = max(GAP, 4 / max(count, 1))
    return rng.permutation((np.arange(count) - count // 2 + 0.5) * gap).reshape(shape)
