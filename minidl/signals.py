"""Ctrl-C and SIGTERM, obeyed between two steps, where nothing is half done; asked twice, at once.

An exception raised at any moment, as Python does by default, can be lost: those of finalizers are only printed.
"""

import os
import signal
import sys
from types import FrameType

INTERRUPTED, TERMINATED = 130, 143  # exit codes
_asked: list[int] = []  # signals that came


def install() -> None:
    """From now on the first SIGINT or SIGTERM waits for `obey`, and the second ends the process where it is."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _remember)


def obey() -> None:
    """End the process, as far as `command.run` lets it, if a signal has asked for it."""
    if _asked == [signal.SIGINT]:
        raise KeyboardInterrupt
    if _asked:
        sys.exit(TERMINATED)


def _remember(number: int, frame: FrameType | None) -> None:
    if _asked:
        os._exit(INTERRUPTED if number == signal.SIGINT else TERMINATED)
    _asked.append(number)
