"""Ctrl-C, SIGTERM and SIGHUP, obeyed between two steps, where nothing is half done; asked twice, at once.

An exception raised at any moment, as Python does by default, can be lost: those of finalizers are only printed.
"""

import os
import signal
from types import FrameType

_EXIT_CODES = {signal.SIGHUP: 129, signal.SIGINT: 130, signal.SIGTERM: 143}
NUMBERS = tuple(_EXIT_CODES)
_asked: list[int] = []  # signals that came


class Stop(BaseException):
    """Somebody asked the process to end. A BaseException, as nothing that goes on after errors should go on after it."""

    def __init__(self, exit_code: int, message: str = "interrupted") -> None:
        super().__init__(message)
        self.exit_code = exit_code


def install() -> None:
    """From now on the first of these signals waits for `obey`, and the second ends the process where it is. What the process
    was started to ignore, as by nohup, it goes on ignoring."""
    for number in NUMBERS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _remember)


def asked() -> int:
    """The exit code that a signal has asked for, 0 if none has."""
    return _EXIT_CODES[signal.Signals(_asked[0])] if _asked else 0


def obey() -> None:
    """Raise Stop if a signal has asked for it."""
    if code := asked():
        raise Stop(code)


def _remember(number: int, frame: FrameType | None) -> None:
    if _asked:
        os._exit(_EXIT_CODES[signal.Signals(number)])
    _asked.append(number)
