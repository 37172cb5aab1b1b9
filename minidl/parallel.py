"""Data parallelism: several processes, ranks, each with a part of every batch; their gradients become one before each update.

The ranks are processes of one machine, on a GPU each or sharing the cores of the CPU, and meet in shared memory. Whatever they
exchange is added up in the order of the ranks, so that all have the same bits. Batch norm takes the statistics of the part
that its rank sees, as usual, and running statistics are averaged.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection
from typing import Any

import numpy as np
from tqdm import tqdm

from minidl import command, device, signals
from minidl.device import Array, Device
from minidl.errors import DeviceError
from minidl.wording import unwarned

CAPACITY = 32_000_000  # bytes that are exchanged at once; containers often have 64 MB of shared memory
GRACE_SECONDS = 5  # for the other ranks to end by themselves after one did


class Team:
    """The processes that train together; as it stands, one alone.

    rank: which of them this one is, 0 .. size-1; that one with 0 writes and speaks for all.
    """

    rank, size = 0, 1

    def part(self, count: int) -> slice:
        """Which of `count` things are this rank's: the first ranks have one more where it does not divide."""
        each, more = divmod(count, self.size)
        begin = self.rank * each + min(self.rank, more)
        return slice(begin, begin + each + (self.rank < more))

    def add(self, array: Array, weight: float, place: Device) -> None:
        """The array becomes the sum over the ranks of weight * array. Waits for all."""

    def of_first(self, number: float) -> float:
        """The number that the rank 0 has. Waits for all."""
        return number


ALONE = Team()


class SharedTeam(Team):
    """One of several processes, which share the bytes `memory` and meet at `barrier`."""

    def __init__(self, rank: int, size: int, memory: Any, barrier: Any) -> None:
        self.rank, self.size, self._barrier = rank, size, barrier
        self._memory = np.frombuffer(memory, np.uint8)

    def add(self, array: Array, weight: float, place: Device) -> None:
        most = CAPACITY // ((self.size + 1) * array.itemsize)
        flat = array.reshape(-1)
        for begin in range(0, array.size, most):
            piece = flat[begin:begin + most]
            piece[...] = place.array(self._sum(place.to_host(piece), weight))
            self._barrier.wait()  # all have read the sum

    def of_first(self, number: float) -> float:
        (first,) = self._sum(np.array([number]), 1.0 if self.rank == 0 else 0.0)
        self._barrier.wait()
        return float(first)

    def _sum(self, piece: Array, weight: float) -> Array:
        """piece (n) -> the sum over the ranks of weight * piece, a view of what is shared."""
        table = self._memory[:(self.size + 1) * piece.nbytes].view(piece.dtype).reshape(self.size + 1, piece.size)
        np.multiply(piece, piece.dtype.type(weight), out=table[self.rank])
        self._barrier.wait()
        own = self.part(piece.size)  # each rank adds up a part of all
        total = table[self.size, own]
        total[...] = table[0, own]
        for rank in range(1, self.size):
            total += table[rank, own]
        self._barrier.wait()
        return table[self.size]


def launch(size: int, work: Callable[[Any, Team], None], arguments: Any) -> int:
    """Run work(arguments, team) in `size` processes and wait for them -> exit code, 0 if all end with 0.

    work: a function of a module, which other processes can import; arguments: whatever can be pickled. Where one rank fails
    the others are ended; its traceback, or its error in one line, is on stderr. Signals go to the rank 0. Raises
    DeviceError where the system has no room for them.
    """
    # Each rank has its share of the cores, which BLAS reads when it is imported.
    os.environ["OMP_NUM_THREADS"] = str(max(1, device.cpu_threads() // size))
    context = multiprocessing.get_context("spawn")
    try:
        if not (_has_room("/dev/shm") or _has_room(tempfile.gettempdir())):  # RawArray takes it there, or dies of SIGBUS
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        memory = context.RawArray(ctypes.c_char, CAPACITY)
        barrier, spoken = context.Barrier(size), context.Value("b", 0)
    except OSError as error:
        raise DeviceError(f"{size} ranks need {CAPACITY / 1e6:.0f} MB that processes can share: {error.strerror or error}") from None
    ranks = [context.Process(target=_rank, args=(rank, size, memory, barrier, spoken, work, arguments), daemon=True)
             for rank in range(size)]
    try:
        # The ranks inherit that signals wait, until they have handlers; so do those for this process, until it passes them on.
        signal.pthread_sigmask(signal.SIG_BLOCK, signals.NUMBERS)
        try:
            signals.obey()
            try:
                for rank in ranks:
                    rank.start()
            except OSError as error:
                raise DeviceError(f"{size} ranks cannot be started: {error.strerror}") from None
            with _signals_passed_on(ranks[0]):
                signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.NUMBERS)
                return _wait(ranks)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.NUMBERS)
    finally:
        for rank in ranks:
            if rank.pid:
                rank.kill()


def _has_room(folder: str) -> bool:
    return os.path.isdir(folder) and shutil.disk_usage(folder).free >= CAPACITY


def _rank(rank: int, size: int, memory: Any, barrier: Any, spoken: Any, work: Callable[[Any, Team], None],
          arguments: Any) -> None:
    """The life of a rank."""
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)  # Ctrl-C goes to the process that the user started, which passes it on
    threading.Thread(target=_end_with_parent, daemon=True).start()
    tqdm.set_lock(threading.RLock())  # its own is one between processes, which a rank that is killed leaves behind
    if rank > 0:
        sys.stdout = open(os.devnull, "w")
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # what came from a terminal before setpgid is for the rank 0
    signals.install()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.NUMBERS)

    def first_to_speak() -> bool:
        """Of an error that all ranks have, one speaks."""
        with spoken.get_lock():
            spoken.value += 1
            return spoken.value == 1

    with unwarned() if rank > 0 else contextlib.nullcontext():
        sys.exit(command.run(lambda: work(arguments, SharedTeam(rank, size, memory, barrier)), first_to_speak))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextlib.contextmanager
def _signals_passed_on(first: Any) -> Iterator[None]:
    def pass_on(number: int, frame: object) -> None:
        if first.is_alive():
            os.kill(first.pid, number)

    before = {number: signal.signal(number, pass_on) for number in signals.NUMBERS if signal.getsignal(number) != signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(ranks: Sequence[Any]) -> int:
    """Wait until all have ended, of which none for long after one that failed -> the exit code of the first that did."""
    code = 0
    running = list(ranks)
    deadline = None
    while running:
        done = connection.wait([rank.sentinel for rank in running], deadline and max(0.0, deadline - time.monotonic()))
        for rank in [rank for rank in running if rank.sentinel in done]:
            rank.join()
            running.remove(rank)
            if rank.exitcode and not code:
                code = rank.exitcode if rank.exitcode > 0 else 128 - rank.exitcode
                deadline = time.monotonic() + GRACE_SECONDS
        if not done:
            break
    return code
