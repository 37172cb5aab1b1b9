"""A data set on the device, as uint8, and the batches that a network sees."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from minidl import random_keys
from minidl.data.dataset import Dataset
from minidl.device import Array, Device
from minidl.kernels import acc_dtype
from minidl.ops import augment


@dataclass(frozen=True)
class Augmentation:
    """How training images vary: shifted by up to `padding` pixels, flipped half of the time, a square cut out.

    Outside the image: the mean colour, or with `reflect` the image mirrored. cutout: side of the square, 0 for none.
    """

    padding: int = 0
    reflect: bool = False
    flips: bool = False
    cutout: int = 0


NO_AUGMENTATION = Augmentation()


class Batches:
    """A Dataset on a device. Batches have a fixed size: training drops the last partial one, evaluation pads it."""

    def __init__(self, dataset: Dataset, device: Device, dtype: npt.DTypeLike, batch_size: int, seed: int) -> None:
        """dtype: of the images that `load` gives. Raises ValueError for fewer images than one batch."""
        if len(dataset.labels) < batch_size:
            raise ValueError(f"batch size {batch_size} is more than the {len(dataset.labels)} images of {dataset.name}")
        self.device, self.dtype, self.batch_size, self.seed = device, dtype, batch_size, seed
        self.images, self.labels = device.array(dataset.images), device.array(dataset.labels)
        self.size = len(dataset.labels)
        acc = acc_dtype(dtype)
        # (v / 255 - mean) / std = v * scale + shift
        mean, std = np.asarray(dataset.mean), np.asarray(dataset.std)
        self._scale, self._shift = device.array(1 / (255 * std), acc), device.array(-mean / std, acc)
        self._key = random_keys.philox_key(seed, random_keys.AUGMENT)

    def epoch(self, epoch: int) -> list[Array]:
        """The training batches of an epoch (0, 1, ...), in an order that depends on (seed, epoch) -> index arrays (N)."""
        order = random_keys.generator(self.seed, random_keys.SHUFFLE, epoch).permutation(self.size).astype(np.int32)
        order = self.device.array(order)
        return [order[begin:begin + self.batch_size]
                for begin in range(0, self.size - self.batch_size + 1, self.batch_size)]

    def all(self) -> list[tuple[Array, int]]:
        """All images once, in their order -> [(index array (N), how many of them count)]."""
        count = -(-self.size // self.batch_size)
        order = np.zeros(count * self.batch_size, np.int32)  # the last batch is padded with image 0
        order[:self.size] = np.arange(self.size, dtype=np.int32)
        order = self.device.array(order)
        return [(order[begin:begin + self.batch_size], min(self.batch_size, self.size - begin))
                for begin in range(0, count * self.batch_size, self.batch_size)]

    def load(self, indices: Array, step: Array, augmentation: Augmentation = NO_AUGMENTATION,
             part: slice = slice(None)) -> tuple[Array, Array]:
        """indices int32 (N) -> x (C, H, W, N), labels int32 (N). step: int64 (1), on which the variation depends.

        part: only these images of the batch, varied as they are in the whole. Raises ValueError where mirrored padding
        reaches beyond the image.
        """
        height, width = self.images.shape[2:]
        a = augmentation
        if a.reflect and a.padding >= min(height, width):
            raise ValueError(f"augmentation: mirrored padding {a.padding} reaches beyond images of {height}x{width}")
        draws, labels = augment.draw(indices, self.labels, step, (height, width), key=self._key, padding=a.padding,
                                     flips=a.flips, cutout=a.cutout)
        if (part.start, part.stop) not in ((None, None), (0, len(indices))):
            indices, draws, labels = (self.device.array(array[..., part]) for array in (indices, draws, labels))
        x = augment.apply(self.images, indices, draws, self._scale, self._shift, dtype=self.dtype, reflect=a.reflect,
                          cutout=a.cutout)
        return x, labels
