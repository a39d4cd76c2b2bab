"""Memory of batches that two processes share: one makes them in it, the other has them there without a copy.

What the lender lends reaches the borrower as a few numbers, and is an array of the very same memory there. It is free
for another batch when nobody there has the array or a view of it any more. So there is as much memory as there were
batches at one time: a consumer that keeps many takes more of it, as it would anywhere, and waits for nothing.

The memory has no name and lies in no folder: it is gone with the processes, however they end, and /dev/shm does not
limit it.
"""

import math
import mmap
import os
import weakref
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import NamedTuple

import numpy as np


class Lent(NamedTuple):
    """An array on its way: the number of the memory that it begins, its shape, and memory that is no more."""

    number: int
    shape: tuple[int, ...]
    gone: list[int]


class Lender:
    """Makes uint8 arrays and lends them; from one thread, while any thread may let arrays go.

    Args:
        connection: Through which memory goes to the borrower, once each.
    """

    def __init__(self, connection: Connection):
        self._connection = connection
        self._memory: dict[int, mmap.mmap] = {}
        self._files: dict[int, int] = {}  # descriptors of memory that was not lent yet
        self._free: deque[int] = deque()
        self._made: dict[int, tuple[int, weakref.finalize]] = {}  # by address
        self._gone: list[int] = []
        self._numbers = 0

    def array(self, shape: tuple[int, ...]) -> np.ndarray:
        """Return an uninitialised uint8 array, to be lent or let go."""
        size = math.prod(shape)
        while self._free and len(self._memory[self._free[0]]) < size:  # batches grew
            self._drop(self._free.popleft())
        number = self._free.popleft() if self._free else self._new(size)
        array = _array(self._memory[number], size)
        self._made[array.ctypes.data] = number, weakref.finalize(array, self._free.append, number)
        return array.reshape(shape)

    def lend(self, array: np.ndarray) -> Lent:
        """Lend an array that ``array`` made; nobody here may write to it from now on."""
        number, letting_go = self._made.pop(array.ctypes.data)
        letting_go.detach()
        if (file := self._files.pop(number, None)) is not None:
            send_handle(self._connection, file, None)
            os.close(file)
        gone, self._gone = self._gone, []
        return Lent(number, array.shape, gone)

    def take_back(self, numbers: list[int]) -> None:
        """Use memory again that the borrower let go."""
        self._free.extend(numbers)

    def _new(self, size: int) -> int:
        number, self._numbers = self._numbers, self._numbers + 1
        self._files[number] = os.memfd_create("batch")
        os.truncate(self._files[number], size)
        self._memory[number] = mmap.mmap(self._files[number], size)
        return number

    def _drop(self, number: int) -> None:
        del self._memory[number]
        if number in self._files:
            os.close(self._files.pop(number))
        else:
            self._gone.append(number)


class Borrower:
    """Has the arrays that a lender lends; from one thread, while any thread may let arrays go.

    Args:
        connection: The other end of the lender's.
        register: Called with each new memory, uint8 [bytes], which lives as long as its last array; for page-locking.
    """

    def __init__(self, connection: Connection, register: Callable[[np.ndarray], None] | None = None):
        self._connection, self._register = connection, register
        self._memory: dict[int, np.ndarray] = {}
        self._let_go: deque[int] = deque()

    def array(self, lent: Lent) -> np.ndarray:
        """Return an array that was lent."""
        for number in lent.gone:
            del self._memory[number]
        if lent.number not in self._memory:
            self._memory[lent.number] = self._receive()
        array = _array(memoryview(self._memory[lent.number].data), math.prod(lent.shape))
        weakref.finalize(array, self._let_go.append, lent.number).atexit = False
        return array.reshape(lent.shape)

    def let_go(self) -> list[int]:
        """Return the numbers of memory that was let go since the last call, for ``Lender.take_back``."""
        return [self._let_go.popleft() for _ in range(len(self._let_go))]

    def _receive(self) -> np.ndarray:
        file = recv_handle(self._connection)
        try:
            memory = _array(mmap.mmap(file, os.fstat(file).st_size))
        finally:
            os.close(file)
        if self._register:
            self._register(memory)
        return memory


def _array(memory: mmap.mmap | memoryview, size: int = -1) -> np.ndarray:
    """Return an array that lives as long as any view of it, and no longer: of other arrays, views may outlive it."""
    return np.frombuffer(memory, dtype=np.uint8, count=size)
