"""What every command shares: errors become one line and an exit code."""

import os
import signal
import sys

from minidl.errors import DeviceError, UserError

INTERRUPTED, TERMINATED = 130, 143


def run(main):
    """Call main() and return the exit code of the process. No traceback for anything that a user can cause or mend."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        main()
        sys.stdout.flush()
        return 0
    except UserError as error:
        return _fail(error, error.exit_code)
    except MemoryError as error:
        return _fail(f"not enough memory: {error}; try a smaller --batch-size", DeviceError.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        # Whoever read the output has left. Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _fail(message, code):
    print(f"error: {message}", file=sys.stderr)
    return code


def _terminate(signum, frame):
    # SystemExit, so that open files are closed and temporary ones removed.
    sys.exit(TERMINATED)
