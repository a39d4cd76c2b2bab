"""Points in time on the device's own clock where it is a GPU, which works on after the host has gone on."""

import time

import torch

Mark = float | torch.cuda.Event


def mark() -> Mark:
    """Return now: a CUDA event in the current stream, or seconds where there is no GPU. The host does not wait."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(one: Mark, other: Mark) -> float:
    """Return the seconds from one mark to another; the device must have passed both."""
    if isinstance(one, float):
        assert isinstance(other, float)  # both are of one clock
        return other - one
    assert not isinstance(other, float)
    return one.elapsed_time(other) / 1e3
