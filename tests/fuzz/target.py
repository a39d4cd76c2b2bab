"""What a target of the fuzzing is."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from shards.errors import PatchmillError


@dataclass(frozen=True)
class Target:
    """One reader of what others may have written.

    Attributes:
        read: Reads an input, in an empty folder that is the only one it may write to.
        change: Makes a damaged input of a good one.
        count: Inputs that `make test-long` tries.
        errors: Beside ``PatchmillError``, what its callers are told to expect.
        room: Bytes of address space that it may take beyond what the process has after reading all good inputs.
    """

    read: Callable[[bytes, Path], object]
    change: Callable[[bytes, Random], bytes]
    count: int
    errors: tuple[type[Exception], ...] = ()
    room: int = 256 << 20

    @property
    def contract(self) -> tuple[type[Exception], ...]:
        """The only errors that may come."""
        return (PatchmillError, *self.errors)
