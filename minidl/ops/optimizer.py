"""The update of all parameters at once. Formulas, and the meaning of `state`: optimizer.cu.

Arguments: master, grad and the moments (n) of the accumulation type; data (n), the copy that layers compute with,
of the type of storage, or `master` itself where the two types are one; state (6), the numbers of the current step.
"""

from minidl.device import Array
from minidl.kernels import Kernels, blocks_for

KERNELS = Kernels("optimizer.cu")
THREADS = 256
# Places in `state`.
LR, STEP, SCALE, GOOD_STEPS, SKIPPED_IN_ROW, NONFINITE = range(6)
STATE_SIZE = 6


def check(grad: Array, state: Array) -> None:
    """Note in state[NONFINITE] whether any gradient is Inf or NaN; the step is then skipped."""
    KERNELS.optimizer_check[blocks_for(grad.size), THREADS](grad, state, grad.size)


def sgd(master: Array, grad: Array, velocity: Array, data: Array, state: Array, *, momentum: float, weight_decay: float,
        nesterov: bool) -> None:
    """One step of SGD with momentum (Nesterov's or the classical), in place."""
    KERNELS.sgd_step[blocks_for(master.size), THREADS](
        master, grad, velocity, data, state, master.size, momentum, weight_decay, int(nesterov))


def adam(master: Array, grad: Array, first_moment: Array, second_moment: Array, data: Array, state: Array, *,
         beta1: float, beta2: float, eps: float, weight_decay: float) -> None:
    """One step of Adam, in place."""
    KERNELS.adam_step[blocks_for(master.size), THREADS](
        master, grad, first_moment, second_moment, data, state, master.size, beta1, beta2, eps, weight_decay)


def advance(state: Array, growth_interval: int) -> None:
    """Count the step in `state`, and adapt its loss scale (0: never grows)."""
    KERNELS.optimizer_advance[1, 1](state, growth_interval)


def cast(master: Array, data: Array) -> None:
    """data = master, in the type of storage."""
    KERNELS.optimizer_cast[blocks_for(master.size), THREADS](master, data, master.size)
