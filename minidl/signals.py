"""Ctrl-C, SIGTERM and SIGHUP, obeyed between two steps, where nothing is half done; asked again, at once.

An exception raised at any moment, as Python does by default, can be lost: those of finalizers are only printed.
"""

import contextlib
import os
import signal
import time
from types import FrameType

_EXIT_CODES = {signal.SIGHUP: 129, signal.SIGINT: 130, signal.SIGTERM: 143}
NUMBERS = tuple(_EXIT_CODES)
SETTLE_SECONDS = 0.5
_asked: list[int] = []  # signals that came
_first = 0.0  # when the first of them came


class Stop(BaseException):
    """Somebody asked the process to end. A BaseException, as nothing that goes on after errors should go on after it."""

    def __init__(self, exit_code: int, message: str = "interrupted") -> None:
        super().__init__(message)
        self.exit_code = exit_code


def install() -> None:
    """From now on the first of these signals waits for `obey`, and a later one ends the process where it is. What the process
    was started to ignore, as by nohup, it goes on ignoring.

    One that follows within SETTLE_SECONDS is the same request: a terminal that closes sends its own and its shell's, and who
    stops a job of several ranks may signal each, as well as the process that passes signals on.
    """
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
    global _first
    now = time.monotonic()
    if not _asked:
        _asked.append(number)
        _first = now
        with contextlib.suppress(OSError):
            if number == signal.SIGINT and os.isatty(2):  # by os.write, as print might be in the middle of another
                os.write(2, b"\nstopping as soon as nothing is half done; Ctrl-C again: at once, without saving\n")
    elif now - _first >= SETTLE_SECONDS:
        os._exit(_EXIT_CODES[signal.Signals(number)])
