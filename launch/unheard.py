"""What a command says while it works may have nobody to hear it any more, and it works on."""

from contextlib import suppress
from typing import Any, TextIO


class Unheard:
    """stderr, of which a terminal that was closed, or a ``tee`` that ended before the command did, makes no error.

    Args:
        stream: All else is as of this.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, if anybody reads it."""
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Let it be read."""
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
