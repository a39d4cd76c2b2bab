"""How a process of ours ends."""

import atexit
import os
import sys
from typing import NoReturn


def end_process(code: int) -> NoReturn:
    """End this process with an exit code, without taking the interpreter apart.

    Threads that are not Python's keep Python's objects: one of gloo the tensors of its last work, a little longer than
    the result is awaited, one of Arrow the bytes that it has read of a table. If it lets go of them while the
    interpreter is taken apart, the process aborts (1 of 40 training runs on busy cores, 1 of 100 commands), and what
    has ended well counts as failed.

    If what is left of its output cannot be written, it ends with 1, as an error is told; nobody reads it any more:
    silently.
    """
    if pools := sys.modules.get("concurrent.futures.process"):
        pools._python_exit()  # workers that nobody told to end: multiprocessing's function would wait for them
    atexit._run_exitfuncs()
    try:
        if sys.stdout:
            sys.stdout.flush()
    except BrokenPipeError:
        code = code or 1
    except OSError as error:
        print(f"error: what was to be written to stdout is lost: {error.strerror}", file=sys.stderr)
        code = code or 1
    if sys.stderr:
        sys.stderr.flush()
    os._exit(code)
