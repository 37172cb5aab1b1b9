"""What every command shares: errors become one line and an exit code."""

import contextlib
import errno
import os
import sys
from collections.abc import Callable

from minidl import signals
from minidl.errors import CheckpointError, DeviceError, UserError

READER_LEFT = 141  # as shells report a process that SIGPIPE ended


def run(main: Callable[[], int | None], may_speak: Callable[[], bool] = lambda: True) -> int:
    """Call main() -> the exit code of the process, that of main or of the error that it raised.

    No traceback for anything that a user can cause or mend. may_speak() is asked before an error is printed; one without
    a text is not.
    """
    def fail(message: object, code: int) -> int:
        if str(message) and may_speak():
            with contextlib.suppress(OSError):  # the code says it, too
                print(f"error: {message}", file=sys.stderr, flush=True)
        return code

    _open_streams()
    signals.install()
    try:
        code = main()
        sys.stdout.flush()
        return code or signals.asked()  # one that came too late for the work is for what a script does next
    except UserError as error:
        return fail(error, error.exit_code)
    except MemoryError as error:
        return fail(f"not enough memory{f': {error}' if str(error) else ''}", DeviceError.exit_code)
    except signals.Stop as stop:
        return fail(stop, stop.exit_code)
    except BrokenPipeError:
        _give_up_stdout()  # whoever read the output has left
        return READER_LEFT
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):  # EIO: of a terminal that was closed
            raise
        _give_up_stdout()
        return fail(error if error.filename else f"the output cannot be written: {error.strerror}", CheckpointError.exit_code)


def _open_streams() -> None:
    """Under some schedulers a stream is closed, and some locales know no letters beyond ASCII: neither ends a run."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))
        else:
            stream.reconfigure(errors="backslashreplace")


def _give_up_stdout() -> None:
    """What is still in its buffer cannot be written; Python would say so once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
