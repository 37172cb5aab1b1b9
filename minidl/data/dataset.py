"""A labelled set of images in host memory."""

from dataclasses import dataclass

import numpy as np

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


def check_labels(labels: Array, count: int, words: str = "record {}: label {}") -> None:
    """Raises ValueError that names the first of labels (M,) outside 0..count-1, if any is, and its index, by `words`."""
    wrong = np.flatnonzero((labels < 0) | (labels >= count))
    if wrong.size:
        raise ValueError(f"{words.format(wrong[0], labels[wrong[0]])} is not in 0..{count - 1}")
