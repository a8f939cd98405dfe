"""What every command here says when it cannot go on: one line on stderr, and an exit code."""

import contextlib
import os
import signal
import sys


class DataError(Exception):
    """What the user can put right; the message says what is wrong, where, and what to do."""


@contextlib.contextmanager
def exit_codes(prog):
    """For `if __name__ == "__main__"`: no traceback for what is no bug.

    2    DataError, OSError: what the user can put right
    1    FloatingPointError: a loss or a feature that is not finite
    130  Ctrl-C;  143  SIGTERM;  141  whoever read the output (`| head`) has gone
    """
    with contextlib.suppress(ValueError):       # only the main thread may set a handler
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    for stream in (sys.stdout, sys.stderr):     # a character that the locale lacks becomes \xe9
        stream.reconfigure(errors="backslashreplace")
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes stdout once more at exit, which would fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(f"{prog}: stopped: nobody reads the output any more", file=sys.stderr)
        sys.exit(141)
    except (DataError, OSError, FloatingPointError) as error:
        if isinstance(error, OSError) and error.filename:
            error = f"{error.filename}: {error.strerror}"
        print(f"{prog}: error: {error}", file=sys.stderr)
        sys.exit(1 if isinstance(error, FloatingPointError) else 2)
    except (KeyboardInterrupt, SystemExit) as stop:
        code = 130 if isinstance(stop, KeyboardInterrupt) else stop.code
        if code in (130, 143):
            print(f"{prog}: interrupted; what was finished is kept", file=sys.stderr)
        sys.exit(code)
