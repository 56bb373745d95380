"""How a command of fl_jax ends: its exit status, and one line where something was wrong."""

import contextlib
import os
import sys
from collections.abc import Callable

from fl_jax.errors import FlJaxError

USER_ERROR, INTERRUPTED, BROKEN_PIPE = 2, 130, 141


def status_of(program: str, action: Callable[[], None], interrupted: str = "interrupted.") -> int:
    """Runs a command and returns its exit status: 0, 2 after one line on stderr for a FlJaxError, 130 after Ctrl-C, and 141 without a
    word where nobody reads the output any more.

    program: what begins such a line. interrupted: what it says after Ctrl-C, where the KeyboardInterrupt itself says nothing.
    """
    try:
        action()
        sys.stdout.flush()
    except FlJaxError as error:
        return _last_words(f"{program}: {error}", USER_ERROR)
    except KeyboardInterrupt as interrupt:
        return _last_words(f"{program}: {str(interrupt) or interrupted}", INTERRUPTED)
    except BrokenPipeError:
        with contextlib.suppress(OSError):  # or the interpreter complains when it flushes
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    return 0


def _last_words(sentence: str, status: int) -> int:
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    print(sentence, file=sys.stderr)
    return status
