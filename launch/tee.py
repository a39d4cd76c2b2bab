"""A rank on a terminal, on which it draws: what it says there in plain lines, it writes into a log too.

python -m launch.tee LOG train CONFIG ...
"""

import sys
from typing import Any, TextIO


class Tee:
    """A terminal, and a log of what is written on it but for what only terminals understand, as bars.

    Args:
        terminal: All else is as of this.
        log: A file that is open for writing.
    """

    def __init__(self, terminal: TextIO, log: TextIO):
        self._terminal, self._log = terminal, log

    def write(self, text: str) -> int:
        """Write on both."""
        if not {"\x1b", "\r"} & set(text):
            self._log.write(text)
        return self._terminal.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._terminal, name)


def main() -> None:
    """Run a command as ``patchmill`` does."""
    with open(sys.argv.pop(1), "a", encoding="utf-8", buffering=1) as log:
        sys.stderr = Tee(sys.stderr, log)
        from launch.cli import main as run

        run()


if __name__ == "__main__":
    main()
