"""Data sets in host memory: CIFAR-100 and CIFAR-10 from the official files, and the digits that come with minidl."""

import os
from pathlib import Path

from minidl.data import cifar, digits
from minidl.data.dataset import Dataset
from minidl.errors import UsageError

__all__ = ["CIFARS", "CLASSES", "NAMES", "OWN", "Dataset", "folders", "load"]

CIFARS = {dataset.name: dataset for dataset in (cifar.CIFAR100, cifar.CIFAR10)}
CLASSES = {**{name: it.classes for name, it in CIFARS.items()}, "digits": len(digits.CLASSES)}  # how many each has
NAMES = tuple(CLASSES)
OWN = "own"  # what settings call data that a program brings


def load(name: str, data_dir: str | os.PathLike[str] | None = None) -> tuple[Dataset, Dataset]:
    """The training and the test Dataset called `name`, one of NAMES.

    The CIFAR files are looked for in `folders(data_dir)`; what is found nowhere is downloaded into the first of them, unless
    the environment variable MINIDL_OFFLINE is set. The digits need no folder.

    Raises UsageError where the name is unknown, DataError where the files are missing or damaged.
    """
    if name == "digits":
        return digits.load()
    if name == OWN:
        raise UsageError("the data is that of a program, which must give it: see \"Your own\" in docs/guide.md")
    if name not in CIFARS:
        raise UsageError(f"data set {name!r} is unknown, need one of {', '.join(NAMES)}")
    return cifar.load(CIFARS[name], folders(data_dir))


def folders(data_dir: str | os.PathLike[str] | None = None) -> list[Path]:
    """Where data is looked for: in data_dir; without one, in the folder that the environment variable MINIDL_DATA names, then
    in $XDG_CACHE_HOME/minidl/data (XDG_CACHE_HOME is ~/.cache unless set)."""
    if data_dir is not None:
        return [Path(os.path.expanduser(data_dir))]
    places = []
    if named := os.environ.get("MINIDL_DATA"):
        places.append(Path(os.path.expanduser(named)))
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not cache.startswith("~"):  # as expanduser leaves it without a home: that would be a folder called ~
        places.append(Path(cache, "minidl", "data"))
    return places
