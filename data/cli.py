"""What every command line of this project does with errors and interrupts."""

import contextlib
import os
import sys

from data.store import DataError


@contextlib.contextmanager
def exit_codes(prog):
    """What a user can mend becomes one line and exit code 2, a loss that is not finite 1, an interrupt 130."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")     # else cuBLAS is not deterministic
    try:
        yield
    except BrokenPipeError:         # `... | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (DataError, OSError, FloatingPointError) as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        sys.exit(1 if isinstance(error, FloatingPointError) else 2)
    except KeyboardInterrupt:
        print(f"{prog}: interrupted; what was finished is kept (a method script goes on with --resume)", file=sys.stderr)
        sys.exit(130)
