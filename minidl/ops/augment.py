"""Batches from uint8 images on the device: choice, augmentation, normalization. Formulas: augment.cu."""

import numpy as np
import numpy.typing as npt

from minidl.device import Array, empty
from minidl.kernels import Kernels, blocks_for
from minidl.ops.shapes import check_batch
from minidl.ops.threads import threads_along

KERNELS = Kernels("augment.cu")


def draw(indices: Array, labels: Array, step: Array, image_size: tuple[int, int], *, key: int, padding: int = 0,
         flips: bool = False, cutout: int = 0) -> tuple[Array, Array]:
    """indices int32 (N) into labels int32 (M) -> draws int32 (5, N), batch labels int32 (N).

    draws, one column per image: how much further down and right its pixels are read, in -padding..padding; flip; top and left
    of the cutout square of side `cutout`. A pure function of key (64 bits), the number in step (int64, one element on the
    device) and n. Raises ValueError for a batch without images.
    """
    batch = indices.shape[0]
    check_batch("augmentation", batch)
    draws = empty((5, batch), np.int32, like=indices)
    batch_labels = empty((batch,), np.int32, like=indices)
    KERNELS.augment_draw[blocks_for(batch, 128), 128](
        indices, labels, step, draws, batch_labels, batch, *image_size, key, padding, int(flips), cutout)
    return draws, batch_labels


def apply(images: Array, indices: Array, draws: Array, scale: Array, shift: Array, *, dtype: npt.DTypeLike,
          reflect: bool = False, cutout: int = 0) -> Array:
    """images uint8 (M, C, H, W), indices int32 (N), draws as from `draw` -> x (C, H, W, N) of `dtype`.

    Pixel values v become v * scale[c] + shift[c]. Outside the image: 0, the mean colour; or with `reflect` the image
    mirrored about its border pixels. scale, shift: (C) of the accumulation type.
    """
    _, channels, height, width = images.shape
    batch = indices.shape[0]
    x = empty((channels, height, width, batch), dtype, like=images)
    KERNELS.augment_apply[channels * height, threads_along(batch)](
        images, indices, draws, scale, shift, x, channels, height, width, batch, int(reflect), cutout)
    return x


def mix(x: Array, share: Array) -> None:
    """Mixup, in place: image n of x (C, H, W, N) becomes share * itself + (1 - share) * image N-1-n.

    share: an array of one element of the accumulation type.
    """
    channels, height, width, batch = x.shape
    KERNELS.augment_mix[channels * height, threads_along(batch)](x, share, width, batch)
