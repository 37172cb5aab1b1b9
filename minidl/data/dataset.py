"""A labelled set of images in host memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from minidl.device import Array
from minidl.errors import DataError

IMAGE_SHAPE = (3, 32, 32)  # of all data sets and architectures: channels red, green, blue; rows from the top


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images, their labels, and what turns their bytes into numbers of zero mean and unit variance.

    images: uint8 (M, 3, H, W), C-contiguous; channels red, green, blue.
    labels: int32 (M,), each an index into `classes`.
    classes: the class names.
    mean, std: one float per channel, of pixels scaled to 0..1 (a byte divided by 255).
    superclasses: names of groups of classes, and superclass_of: for each class the index of its group; else both empty.

    Raises DataError where an argument is not as described.
    """

    name: str
    images: Array
    labels: Array
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    superclasses: tuple[str, ...] = ()
    superclass_of: tuple[int, ...] = ()

    @classmethod
    def of(cls, name: str, images: npt.ArrayLike, labels: npt.ArrayLike, classes: Sequence[str],
           like: Dataset | None = None) -> Dataset:
        """A Dataset of your own arrays.

        images: uint8 (M, 3, H, W), (M, H, W, 3), or gray, (M, H, W); labels: whole numbers (M,). mean and std are those of the
        images, or of the Dataset `like`: a test set takes those of its training set.
        """
        pixels, numbers = np.asarray(images), np.asarray(labels)
        if pixels.ndim == 3:
            pixels = np.stack([pixels] * 3, axis=1)
        elif pixels.ndim == 4 and pixels.shape[1] != 3 and pixels.shape[3] == 3:
            pixels = pixels.transpose(0, 3, 1, 2)
        if numbers.dtype.kind in "iu" and numbers.size and -2**31 <= numbers.min() <= numbers.max() < 2**31:
            numbers = numbers.astype(np.int32)
        mean, std = (like.mean, like.std) if like else _moments(pixels)
        return cls(name, np.ascontiguousarray(pixels), numbers, tuple(classes), mean, std)

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise DataError(f"{self.name}: images are {images.dtype} {images.shape}, need uint8 (M, 3, H, W)")
        if not images.flags.c_contiguous:
            raise DataError(f"{self.name}: images have strides {images.strides}, need a C-contiguous array")
        if labels.dtype != np.int32 or labels.shape != images.shape[:1]:
            raise DataError(f"{self.name}: labels are {labels.dtype} {labels.shape}, need int32 ({len(images)},)")
        needed = len(self.classes) if self.superclasses else 0
        if len(self.superclass_of) != needed:
            raise DataError(f"{self.name}: superclass_of has {len(self.superclass_of)} numbers, need {needed}")
        try:
            check_labels(labels, len(self.classes))
            check_labels(np.array(self.superclass_of, np.int32), len(self.superclasses), "class {}: superclass {}")
        except ValueError as error:
            raise DataError(f"{self.name}: {error}") from error
        if len(self.mean) != 3:
            raise DataError(f"{self.name}: mean is {self.mean}, need 3 numbers")
        if len(self.std) != 3 or min(self.std) <= 0:
            raise DataError(f"{self.name}: std is {self.std}, need 3 numbers above 0")


def _moments(pixels: Array) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of bytes (M, C, H, W), on the 0..1 scale."""
    if pixels.dtype != np.uint8 or pixels.ndim != 4:
        return (), ()  # which Dataset refuses, with better reasons
    counts = [np.bincount(channel.ravel(), minlength=256) for channel in np.moveaxis(pixels, 1, 0)]
    levels = np.arange(256) / 255
    means = [float(count @ levels / count.sum()) for count in counts]
    return tuple(means), tuple(float(np.sqrt(count @ (levels - mean) ** 2 / count.sum())) for count, mean in zip(counts, means))


def check_labels(labels: Array, count: int, words: str = "record {}: label {}") -> None:
    """Raises ValueError that names the first of labels (M,) outside 0..count-1, if any is, and its index, by `words`."""
    wrong = np.flatnonzero((labels < 0) | (labels >= count))
    if wrong.size:
        raise ValueError(f"{words.format(wrong[0], labels[wrong[0]])} is not in 0..{count - 1}")
