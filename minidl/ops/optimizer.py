"""The update of all parameters at once. Formulas, and the meaning of `state`: optimizer.cu.

Arguments: master, grad and the moments (n) of the accumulation type; data (n), the copy that layers compute with,
of the type of storage, or `master` itself where the two types are one; state (STATE_SIZE), the numbers of the current step.
Arrays of other sizes raise ValueError.
"""

from minidl.device import Array, empty
from minidl.kernels import Kernels, blocks_for

KERNELS = Kernels("optimizer.cu")
THREADS = 256
TILE = 4096  # elements of the gradient that one block adds up
# Places in `state`.
STATE_SIZE = 11
(LR, CALLS, STEP, AGE, SCALE, GOOD_STEPS, SKIPPED_IN_ROW, NONFINITE, FAILED, GRAD_NORM, GRAD_FACTOR) = range(STATE_SIZE)


def norm(grad: Array, state: Array, clip_norm: float = 0.0) -> None:
    """Put the norm of the gradient, divided by the loss scale, into state[GRAD_NORM], and what an update must multiply the
    gradient by, so that its norm is at most `clip_norm` (0: any), into state[GRAD_FACTOR].

    Notes in state[NONFINITE] whether an element is Inf or NaN; the update is then skipped.
    """
    tiles = max(1, -(-grad.size // TILE))
    tile_squares = empty((tiles,), grad.dtype, like=grad)
    KERNELS.optimizer_tile_squares[tiles, THREADS](grad, tile_squares, state, grad.size, TILE)
    KERNELS.optimizer_norm[1, THREADS](tile_squares, state, tiles, clip_norm)


def sgd(master: Array, grad: Array, velocity: Array, data: Array, state: Array, *, momentum: float, weight_decay: float,
        nesterov: bool) -> None:
    """One step of SGD with momentum (Nesterov's or the classical), in place."""
    _check_sizes(master, grad, velocity, data)
    KERNELS.sgd_step[blocks_for(master.size), THREADS](
        master, grad, velocity, data, state, master.size, momentum, weight_decay, int(nesterov))


def adam(master: Array, grad: Array, first_moment: Array, second_moment: Array, data: Array, state: Array, *,
         beta1: float, beta2: float, eps: float, weight_decay: float, decoupled: bool = False) -> None:
    """One step of Adam, or with decoupled weight decay of AdamW, in place."""
    _check_sizes(master, grad, first_moment, second_moment, data)
    KERNELS.adam_step[blocks_for(master.size), THREADS](
        master, grad, first_moment, second_moment, data, state, master.size, beta1, beta2, eps, weight_decay, int(decoupled))


def adadelta(master: Array, grad: Array, mean_g2: Array, mean_dx2: Array, data: Array, state: Array, *, rho: float, eps: float,
             weight_decay: float) -> None:
    """One step of AdaDelta, in place."""
    _check_sizes(master, grad, mean_g2, mean_dx2, data)
    KERNELS.adadelta_step[blocks_for(master.size), THREADS](
        master, grad, mean_g2, mean_dx2, data, state, master.size, rho, eps, weight_decay)


def advance(state: Array, growth_interval: int) -> None:
    """Count the step in `state`, and adapt its loss scale (0: there is none)."""
    KERNELS.optimizer_advance[1, 1](state, growth_interval)


def average(averages: Array, values: Array, state: Array, decay: float) -> None:
    """Move `averages` (n) towards `values` (n), unless the last step was skipped."""
    _check_sizes(averages, values)
    KERNELS.optimizer_average[blocks_for(values.size), THREADS](averages, values, state, values.size, decay)


def cast(master: Array, data: Array) -> None:
    """data = master, in the type of storage."""
    _check_sizes(master, data)
    KERNELS.optimizer_cast[blocks_for(master.size), THREADS](master, data, master.size)


def _check_sizes(*arrays: Array) -> None:
    if len({array.size for array in arrays}) > 1:
        raise ValueError(f"optimizer: arrays of {', '.join(str(array.size) for array in arrays)} elements")
