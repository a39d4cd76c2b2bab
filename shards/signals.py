"""The signals by which people, terminals, Slurm and Kubernetes ask a command to stop."""

import errno
import os
import signal
import termios

_UNLESS_NOHUP = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, *_UNLESS_NOHUP)
"""SIGHUP says that the terminal is closed; who started the command by ``nohup`` wants it to run on."""


def leave_closed_terminal() -> None:
    """Say from now on to nobody what went to a terminal that is closed, as at SIGHUP: writing there is an error."""
    for number in range(3):
        try:
            termios.tcgetattr(number)
        except termios.error as error:
            if error.args[0] == errno.EIO:
                null = os.open(os.devnull, os.O_RDWR)
                os.dup2(null, number)
                os.close(null)
