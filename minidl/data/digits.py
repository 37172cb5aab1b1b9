"""The digits that come with minidl: 1,797 handwritten digits, for a first run and for tests without a download.

The test part of "Optical Recognition of Handwritten Digits", E. Alpaydin and C. Kaynak, UCI Machine Learning
Repository, 1998, https://doi.org/10.24432/C50P49, CC BY 4.0, as redistributed by scikit-learn. A row of digits.csv.gz
holds the 64 pixels of an 8x8 image, 0 (paper) to 16 (ink), and the label.
"""

import gzip
from pathlib import Path

import numpy as np

from minidl.data.checked_file import File
from minidl.data.dataset import Dataset
from minidl.device import Array

FILE = File("digits.csv.gz", 57_523, "9b335364a7bfd63947c7480a5bd51f2d")
PATH = Path(__file__).with_name(FILE.name)
ENLARGE = 4  # 8x8 to the 32x32 of CIFAR, each pixel a square
TEST_EVERY = 5  # images 0, 5, 10, ... are the test set
MEAN = (0.3053, 0.3053, 0.3053)  # of the training pixels, on the 0..1 scale
STD = (0.3762, 0.3762, 0.3762)
CLASSES = tuple("0123456789")


def load() -> tuple[Dataset, Dataset]:
    """The training Dataset of 1,437 and the test Dataset of 360 images, uint8 (M, 3, 32, 32), gray in all channels."""
    with gzip.open(PATH, "rt", encoding="ascii") as file:  # given its name, NumPy looks at the present folder, which may be gone
        table = np.loadtxt(file, np.uint8, delimiter=",")
    levels, labels = table[:, :64].reshape(-1, 1, 8, 8), table[:, 64].astype(np.int32)
    gray = np.rint(levels * (255 / 16)).astype(np.uint8)
    images = gray.repeat(3, axis=1).repeat(ENLARGE, axis=2).repeat(ENLARGE, axis=3)
    test = np.arange(len(labels)) % TEST_EVERY == 0

    def dataset(chosen: Array) -> Dataset:
        return Dataset("digits", images[chosen], labels[chosen], CLASSES, MEAN, STD)

    return dataset(~test), dataset(test)
