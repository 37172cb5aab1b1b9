"""Randomness as a pure function of (seed, purpose, ...): nothing to save, and a run resumes exactly."""

import numpy as np

# Purposes: one number each, never reused.
INITIALIZE, SHUFFLE, AUGMENT, DROPOUT, VALIDATION, MIXUP = range(1, 7)


def generator(seed: int, purpose: int, *more: int) -> np.random.Generator:
    """A NumPy generator for host-side choices, such as the order of an epoch."""
    return np.random.default_rng([seed, purpose, *more])


def philox_key(seed: int, purpose: int, *more: int) -> int:
    """The 64-bit key of the kernels' generator. Zeros at the end of `more` change nothing."""
    return int(np.random.SeedSequence([seed, purpose, *more]).generate_state(1, np.uint64)[0])
