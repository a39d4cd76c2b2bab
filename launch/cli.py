"""The command line: stdout is for results, stderr for progress.

Exit codes: 0 done, 2 a user's mistake, 75 stopped on request with everything saved, 1 anything else.
"""

import os
import signal
import sys
from importlib.metadata import version
from types import FrameType
from typing import Annotated, Any

import typer

from launch.cli_checkpoint import checkpoint_app
from launch.cli_model import model_app
from launch.cli_plan import plan_app
from launch.cli_shards import shards_app
from launch.unheard import Unheard
from shards.ending import end_process
from shards.errors import PatchmillError, StoppedOnRequestError
from shards.signals import SIGNALS, leave_closed_terminal

# Torch takes seconds to import, so each command imports what it needs.

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="Mill images into patches, and patches into pre-trained Vision Transformers.")  # fmt: skip


def _print_version(asked: bool) -> None:
    if asked:
        print(f"patchmill {version('patchmill')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Tell the version, and end.")
    ] = False,
) -> None: ...


app.add_typer(plan_app)
app.add_typer(model_app)
app.add_typer(shards_app, name="shards")
app.add_typer(checkpoint_app, name="checkpoint")


def main() -> None:
    """Run the command line; a known error is one line on stderr and its exit code."""
    end_process(run_command())


class _Asked(BaseException):
    """A command was asked to stop; nothing on the way that handles errors takes it for one."""

    exit_code = StoppedOnRequestError.exit_code


def _stop(number: int, frame: FrameType | None) -> None:
    leave_closed_terminal()
    _listen(signal.SIG_IGN)  # once is enough: what is being finished is not to be stopped, too
    raise _Asked("stopped on request")


def _listen(handler: Any) -> None:
    # To one of several ranks a SIGTERM may say no more than that another has failed: it is left to end it.
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    for number in SIGNALS:
        if number != signal.SIGINT and (alone or number != signal.SIGTERM):
            signal.signal(number, handler)


def run_command() -> int:
    """Run the command line; return its exit code, after a known error is told.

    SIGUSR1, SIGUSR2, SIGHUP (a closed terminal) and, where there are no other ranks, SIGTERM end a command wherever it
    is, as Ctrl-C does: files appear whole, and what is finished stays. Training, and what starts ranks, listen for
    themselves. Nobody needs to read what it says on stderr.
    """
    sys.stderr = Unheard(sys.stderr or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))  # closed before the start
    _listen(_stop)
    try:
        app()
    except PatchmillError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except _Asked as asked:
        print("error: stopped on request; what is finished stays, run again to go on", file=sys.stderr)
        return asked.exit_code
    except KeyboardInterrupt:
        return 130
    except SystemExit as exited:
        if isinstance(exited.code, str):
            raise  # a library's, which Python tells
        return exited.code or 0
    finally:
        _listen(signal.SIG_IGN)  # it is over: nobody is to take that for a crash
    return 0


if __name__ == "__main__":
    main()
