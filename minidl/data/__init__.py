"""Data sets in host memory: CIFAR-100 and CIFAR-10 from the official files, and the digits that come with minidl."""

import os

from minidl.data import cifar, digits
from minidl.data.dataset import Dataset
from minidl.errors import UsageError

__all__ = ["NAMES", "Dataset", "load"]

_CIFARS = {dataset.name: dataset for dataset in (cifar.CIFAR100, cifar.CIFAR10)}
NAMES = (*_CIFARS, "digits")


def load(name: str, data_dir: str | os.PathLike[str] | None = None) -> tuple[Dataset, Dataset]:
    """The training and the test Dataset called `name`, one of NAMES.

    The CIFAR files are looked for in data_dir; without one, in the folder that the environment variable MINIDL_DATA
    names, then in $XDG_CACHE_HOME/minidl/data (XDG_CACHE_HOME is ~/.cache unless set). The digits need no folder.

    Raises UsageError where the name is unknown, DataError where the files are missing or damaged.
    """
    if name == "digits":
        return digits.load()
    if name not in _CIFARS:
        raise UsageError(f"data set {name!r} is unknown, need one of {', '.join(NAMES)}")
    return cifar.load(_CIFARS[name], _default_folders() if data_dir is None else [data_dir])


def _default_folders() -> list[str]:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folders = os.environ.get("MINIDL_DATA"), os.path.join(cache, "minidl", "data")
    return [folder for folder in folders if folder]
