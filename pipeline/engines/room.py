"""Offloading before it starts: is there room for it, and can NVMe be reached?"""

import os
import shutil
from pathlib import Path

from pipeline import distributed
from pipeline.config import TrainSettings
from shards.errors import UserError


def check_room(settings: TrainSettings, parameters: int) -> None:
    """Raise a UserError where what is offloaded does not fit; collective over all ranks.

    Args:
        settings: Of the stage.
        parameters: Values of the model's parameters.
    """
    share = parameters / distributed.world_size() * len(distributed.ranks_here())
    error = None
    try:
        _check_here(settings, share)
    except UserError as problem:
        error = problem
    distributed.raise_together(error)


def _check_here(settings: TrainSettings, share: float) -> None:
    check_alone(settings)
    engine, memory, disk = settings.engine, 0.0, {}
    for where, values in ((engine.offload_optimizer, optimizer_values(settings)), (engine.offload_parameters, 1)):
        if where == "cpu":
            memory += 4 * values * share
        elif where is not None:
            check_nvme(where)
            disk[where] = disk.get(where, 0.0) + 4 * values * share
    if engine.offload_optimizer and settings.optim.ema is not None:
        memory += 4 * share
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


def optimizer_values(settings: TrainSettings) -> int:
    """Return how many float32 values are kept of a parameter's each: weight, gradient, states, and a copy to move."""
    states = 2 if settings.optim.name == "adamw" else int(settings.optim.momentum > 0)
    return 1 + 1 + states + 1


def free_memory() -> float:
    """Return the bytes of host memory that are free, in a container those left of its limit."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = next(int(line.split()[1]) * 1024.0 for line in lines if line.startswith("MemAvailable"))
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no container, or "max"
        return free
    return min(free, float(limit - used))


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
