"""Python's garbage collector runs when it likes, on each rank at another time, and all ranks wait: here it does not."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collected_between_steps() -> Iterator[None]:
    """Keep the collector off; whoever opens this collects where it hurts nobody. What is there now is left alone."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
