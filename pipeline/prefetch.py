"""Batches on their way to the device: on CUDA the next one is copied while the model works on this one."""

import weakref
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

B = TypeVar("B")
T = TypeVar("T")


def pinned_array(shape: tuple[int, ...]) -> np.ndarray:
    """Return an uninitialised uint8 array; on CUDA in pinned memory, which the device copies by itself."""
    return torch.empty(shape, dtype=torch.uint8, pin_memory=torch.cuda.is_available()).numpy()


def pin(memory: np.ndarray) -> None:
    """Pin host memory for as long as the array lives, where CUDA is."""
    if torch.cuda.is_available():
        cudart, address = torch.cuda.cudart(), memory.ctypes.data
        torch.cuda.check_error(cudart.cudaHostRegister(address, memory.nbytes, 0))
        weakref.finalize(memory, cudart.cudaHostUnregister, address).atexit = False


def prefetched(
    batches: Generator[B], prepare: Callable[[B], tuple[Tensor, ...]], device: torch.device
) -> Generator[tuple[Tensor, ...]]:
    """Yield ``prepare(batch)`` of every batch; closing it closes ``batches``.

    On CUDA a thread takes one batch ahead of its use, and copies and prepares it on a stream of its own, so
    ``batches`` is one further than its consumer. On the CPU nothing is ahead.

    Args:
        batches: Of host memory.
        prepare: Brings a batch to the device, from any thread, and returns tensors there.
        device: Of the model.
    """
    with closing(batches):
        if device.type != "cuda":
            yield from map(prepare, batches)
            return
        side = torch.cuda.Stream(device)
        with closing(one_ahead(lambda: _on_stream(side, batches, prepare))) as ahead:
            for tensors in ahead:
                for tensor in tensors:
                    # The memory is the side stream's: a later batch could get it while the model still reads.
                    tensor.record_stream(torch.cuda.current_stream(device))
                yield tensors


def _on_stream(
    stream: torch.cuda.Stream, batches: Generator[B], prepare: Callable[[B], tuple[Tensor, ...]]
) -> tuple[Tensor, ...] | None:
    """Prepare the next batch on a stream, wait until it is there, and only then let go of the batch's host memory."""
    with torch.cuda.stream(stream):  # and on its device, which a thread does not inherit
        batch = next(batches, None)
        if batch is None:
            return None
        tensors = prepare(batch)
    done = torch.cuda.Event(blocking=True)  # sleeps: decode threads need the core
    done.record(stream)
    done.synchronize()
    return tensors


def one_ahead(fetch: Callable[[], T | None]) -> Generator[T]:
    """Yield what ``fetch`` returns until that is None; a thread fetches the next one while the last one is used."""
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as thread:
        coming = thread.submit(fetch)
        while (found := coming.result()) is not None:
            coming = thread.submit(fetch)
            yield found
