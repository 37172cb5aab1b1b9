"""Softmax cross-entropy with label smoothing, and top-1 / top-5 counts. Formulas: loss.cu."""

import numpy as np

from minidl.device import Array, empty
from minidl.kernels import Kernels, acc_dtype, blocks_for

KERNELS = Kernels("loss.cu")
THREADS = 128


def forward_backward(logits: Array, labels: Array, totals: Array, scale: Array, *, valid: int | None = None,
                     smoothing: float = 0.0) -> Array:
    """logits (K, N), labels int32 (N) -> dlogits (K, N), the gradient of the mean loss times `scale`.

    Adds to totals, float64 (4): the sum of losses, the top-1 hits, the top-5 hits, and the images of this batch.
    Only the first `valid` columns count; the rest pad the batch. A label outside 0..K-1 gives a NaN loss.
    scale: an array of one element of the accumulation type, 1 except for the loss scaling of float16.
    Raises ValueError for shapes that do not fit, or a smoothing outside 0..1.
    """
    if logits.ndim != 2 or labels.shape != (logits.shape[1],):
        raise ValueError(f"loss: logits {logits.shape} and labels {labels.shape} do not fit (K, N) and (N,)")
    if not 0 <= smoothing <= 1:
        raise ValueError(f"loss: label smoothing {smoothing} is not in 0..1")
    classes, batch = logits.shape
    valid = batch if valid is None else valid
    if not 0 < valid <= batch:
        raise ValueError(f"loss: {valid} valid columns in a batch of {batch}")
    dlogits = empty(logits.shape, logits.dtype, like=logits)
    losses = empty((batch,), acc_dtype(logits.dtype), like=logits)
    ranks = empty((batch,), np.int32, like=logits)
    KERNELS.softmax_cross_entropy[blocks_for(batch, THREADS), THREADS](
        logits, labels, scale, dlogits, losses, ranks, classes, batch, valid, smoothing)
    KERNELS.loss_totals[1, THREADS](losses, ranks, totals, batch, valid)
    return dlogits
