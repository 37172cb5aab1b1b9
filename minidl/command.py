"""What every command shares: errors become one line and an exit code."""

import errno
import os
import sys
from collections.abc import Callable

from minidl import signals
from minidl.errors import CheckpointError, DeviceError, UserError

READER_LEFT = 141  # as shells report a process that SIGPIPE ended


def run(main: Callable[[], object]) -> int:
    """Call main() and return the exit code of the process. No traceback for anything that a user can cause or mend."""
    _open_streams()
    signals.install()
    try:
        main()
        sys.stdout.flush()
        return 0
    except UserError as error:
        return _fail(error, error.exit_code)
    except MemoryError as error:
        return _fail(f"not enough memory: {error}; try a smaller --batch-size", DeviceError.exit_code)
    except signals.Stop as stop:
        return _fail(stop, stop.exit_code)
    except BrokenPipeError:
        _give_up_stdout()  # whoever read the output has left
        return READER_LEFT
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        _give_up_stdout()
        return _fail(error, CheckpointError.exit_code)


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


def _fail(message: object, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code
