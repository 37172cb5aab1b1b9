"""Softmax cross-entropy with label smoothing, and top-1 / top-5 counts. Formulas: loss.cu."""

from minidl.device import Array, empty
from minidl.kernels import Kernels
from minidl.ops.threads import threads_along

KERNELS = Kernels("loss.cu")


def forward_backward(logits: Array, labels: Array, totals: Array, scale: Array, *, valid: int | None = None,
                     smoothing: float = 0.0, other_labels: Array | None = None, share: Array | None = None) -> Array:
    """logits (K, N), labels int32 (N) -> dlogits (K, N), the gradient of the mean loss times `scale`.

    Adds to totals, float64 (4): the sum of losses, the top-1 hits, the top-5 hits, and the images of this batch.
    Only the first `valid` columns count; the rest pad the batch. A label outside 0..K-1 gives a NaN loss.
    scale: an array of one element of the accumulation type, 1 except for the loss scaling of float16.
    After augment.mix: its `share`, and as other_labels those of the partners; hits count against `labels`.
    Raises ValueError for shapes that do not fit, or a smoothing outside 0..1, TypeError for another scale.
    """
    if logits.ndim != 2 or labels.shape != (logits.shape[1],):
        raise ValueError(f"loss: logits {logits.shape} and labels {labels.shape} do not fit (K, N) and (N,)")
    if (other_labels is None) != (share is None) or (other_labels is not None and other_labels.shape != labels.shape):
        raise ValueError(f"loss: mixup needs a share, and other labels (N,), not {getattr(other_labels, 'shape', None)}")
    if getattr(scale, "shape", None) != (1,):
        raise TypeError(f"loss: scale must be an array of one element, such as an optimizer's, got {scale}")
    if totals.shape != (4,):
        raise ValueError(f"loss: totals {totals.shape} are not 4 numbers")
    if not 0 <= smoothing <= 1:
        raise ValueError(f"loss: label smoothing {smoothing} is not in 0..1")
    classes, batch = logits.shape
    valid = batch if valid is None else valid
    if not 0 < valid <= batch:
        raise ValueError(f"loss: {valid} valid columns in a batch of {batch}")
    dlogits = empty(logits.shape, logits.dtype, like=logits)
    KERNELS.softmax_cross_entropy[1, threads_along(batch)](
        logits, labels, labels if other_labels is None else other_labels, scale if share is None else share, scale, dlogits,
        totals, classes, batch, valid, smoothing, int(share is not None))
    return dlogits
