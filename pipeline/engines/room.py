"""Offloading before it starts: is there room for it, and can NVMe be reached?"""

import os
import shutil
from pathlib import Path
from typing import Any

from pipeline import distributed
from pipeline.config import TrainSettings
from pipeline.engines.states import add_buffers, add_gradients, shares, states
from pipeline.hostmemory import free_memory
from shards.errors import UserError


def check_room(settings: TrainSettings, groups: list[list[int]], zero: dict[str, Any]) -> None:
    """Raise a UserError where what is offloaded does not fit; collective over all ranks.

    Args:
        settings: Of the stage.
        groups: Values of the model's parameters, as ``group_sizes`` returns them.
        zero: DeepSpeed's ``zero_optimization``.
    """
    here, error = len(distributed.ranks_here()), None
    try:
        _check_here(settings, groups, zero, here)
    except UserError as problem:
        error = problem
    distributed.raise_together(error)


def _check_here(settings: TrainSettings, groups: list[list[int]], zero: dict[str, Any], here: int) -> None:
    """Check the room on this machine, for so many ranks on it."""
    check_alone(settings)
    engine, ranks = settings.engine, distributed.world_size()
    held, tensors = states(settings, groups, ranks, zero), shares(engine, groups, ranks, zero)
    sizes = [size for group in groups for size in group]
    add_gradients(held, engine, sizes, sum(tensors), settings.accumulation(ranks) > 1)
    add_buffers(held, engine, sizes, tensors, ranks, zero)
    memory, disk = here * sum(held.host.values()), dict[str, int]()
    for kind, size in held.disk.items():
        where = engine.offload_parameters if kind == "weights" else engine.offload_optimizer
        assert where is not None  # a folder: else nothing of it is on disk
        disk[where] = disk.get(where, 0) + here * size
    for where in disk:
        check_nvme(where)
    if memory > (free := free_memory()):
        raise UserError(
            f"offloading wants {memory / 1e9:.1f} GB of this machine's memory, and {free / 1e9:.1f} GB are free; "
            "offload to a folder on NVMe (zero_stage 3), take more machines, or a smaller model"
        )
    for where, wanted in disk.items():
        if wanted > (free := shutil.disk_usage(where).free):
            raise UserError(
                f"offloading wants {wanted / 1e9:.1f} GB in {where}, and {free / 1e9:.1f} GB are free; make room, or "
                "give a folder on another disk"
            )


def check_alone(settings: TrainSettings) -> None:
    """Raise a UserError where one rank on a CPU would read its parameters from NVMe.

    DeepSpeed 0.19 gives it the buffer that a parameter was read into, and reads the next one into it.
    """
    where = settings.engine.offload_parameters
    if where not in (None, "cpu") and distributed.world_size() == 1 and distributed.device().type == "cpu":
        raise UserError(
            f"offload_parameters to a folder ({where}) is wrong in DeepSpeed for one rank on a CPU; take two ranks, or "
            'set it to "cpu"'
        )


def check_nvme(folder: str) -> None:
    """Raise a UserError unless a folder can be written, and DeepSpeed's asynchronous I/O be built."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError("it cannot be written")
    except OSError as error:
        raise UserError(f'cannot offload to {folder}: {error}; give a folder on NVMe, or "cpu"') from None
    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise UserError(
            f"offloading to {folder} wants DeepSpeed's async_io, which is built with libaio, and that is not here; "
            'install it (Debian: libaio-dev), or offload to "cpu"'
        )
