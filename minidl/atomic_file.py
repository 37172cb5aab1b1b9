"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import glob
import os
import platform
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, TypeAlias

from minidl.errors import CheckpointError, UsageError

FilePath: TypeAlias = str | os.PathLike[str]

# How temporary names end: on a shared disk, the number of a process says nothing about those of other machines.
_HOST = f"-{re.sub(r'[^A-Za-z0-9]', '', platform.node())}.tmp"


def check_folder(path: FilePath) -> None:
    """Raise UsageError where `path` is in no folder, before the work whose result is to be written there."""
    if not os.path.isdir(Path(path).parent):
        raise UsageError(f"{path}: there is no folder {Path(path).parent}")


def write_atomically(path: FilePath, write: Callable[[BinaryIO], object], previous: FilePath | None = None) -> None:
    """The file `path` becomes what write(file) writes, or stays what it is. Raises CheckpointError in that case.

    previous: the name under which what was there before is kept. Whatever moment the process or the machine stops at, there
    is a whole file under `path` or `previous`, if there was one before.
    """
    path = Path(path)
    names = [path] if previous is None else [path, Path(previous)]
    hidden = {name: name.with_name(f".{name.name}.{os.getpid()}{_HOST}") for name in names}  # of two processes, one wins
    try:
        for name in names:
            _sweep(name)
        with hidden[path].open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            _give_second_name(path, hidden[Path(previous)])
        # The new file first: should the old one be damaged, the one before it is needed until then.
        hidden[path].replace(path)
        if previous is not None and hidden[Path(previous)].exists():
            hidden[Path(previous)].replace(previous)
        _sync_folder(path.parent)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        for temporary in hidden.values():
            with contextlib.suppress(OSError):
                temporary.unlink()


def _sweep(path: Path) -> None:
    """Remove what processes of this machine left that were killed while they wrote `path`."""
    for stale in path.parent.glob(f".{glob.escape(path.name)}.*{_HOST}"):
        number = stale.name.removesuffix(_HOST).split(".")[-1]
        if number.isdigit() and not _runs(int(number)):
            with contextlib.suppress(OSError):
                stale.unlink()


def _runs(process: int) -> bool:
    """Whether another process of this number runs."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it is somebody else's
        pass
    return process != os.getpid()


def _give_second_name(path: Path, name: Path) -> None:
    try:
        os.link(path, name)
    except OSError:  # a file system without second names
        shutil.copyfile(path, name)


def _sync_folder(folder: Path) -> None:
    """A new name is on the disk only when its folder is. Not every system lets a folder be opened."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
