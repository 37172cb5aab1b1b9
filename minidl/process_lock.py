"""Locks between processes: of a file or a folder, which the kernel unlocks when its holder ends, in whatever way it ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

from minidl import signals

POLL_SECONDS = 0.1


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def take_folder(path: Path, owner: object) -> Callable[[], object]:
    """Lock a folder for as long as `owner` lives -> what unlocks it before. There is no lock where the system has none for
    folders. Raises BlockingIOError where somebody else has it."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return lambda: None
    release = weakref.finalize(owner, os.close, descriptor)
    try:
        free = _try_lock(descriptor)
    except OSError:
        return release
    if not free:
        release()
        raise BlockingIOError(errno.EWOULDBLOCK, "another process has it")
    return release


@contextlib.contextmanager
def hold(path: Path, waiting: Callable[[], object]) -> Iterator[None]:
    """Run the body while holding the lock. Calls `waiting` once if another process holds it, then waits.

    The file at `path` is made for the lock and removed at the end. Raises OSError where it cannot be made or locked.
    """
    with contextlib.ExitStack() as stack:
        _lock(path, waiting, stack)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # one that stays is in nobody's way
                os.unlink(path)


def _lock(path: Path, waiting: Callable[[], object], stack: contextlib.ExitStack) -> None:
    said = False
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        stack.callback(os.close, descriptor)
        while not _try_lock(descriptor):
            if not said:
                waiting()
                said = True
            signals.obey()
            time.sleep(POLL_SECONDS)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return
        # What was locked is the file of the one before, who has removed it: another process may have made a new one.
