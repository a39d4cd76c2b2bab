"""What a rank holds of a model, the passes aside, under each engine and ZeRO stage: in what bytes, and where.

``states`` is exact. Gradients and buffers are as DeepSpeed 0.19 makes them with the sizes that our configuration sets.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from pipeline.config import EngineSettings, OptimSettings, TrainSettings
from pipeline.optim import parameter_groups

FLOAT = 4  # bytes of float32, which all of it is
STEP = 4  # bytes of AdamW's count of steps, one for each tensor that it steps
PERSISTENT = 100_000  # values: DeepSpeed's stage3_param_persistence_threshold; smaller parameters stay gathered
SWAPPED = 4  # DeepSpeed's buffer_count: of each tensor that is stepped, when states are on NVMe
BLOCK = 2**25  # values that ZeRO 3 gathers beyond its limit at most, since a block's weights come together
ALIGNED = 2  # values that DeepSpeed aligns each rank's share of a flat buffer to


@dataclass
class Held:
    """Bytes of a rank by what they are for, and where they are.

    Attributes:
        device: On its GPU; without one in host memory, as ``host`` is.
        host: In host memory, offloaded.
        disk: On NVMe.
    """

    device: dict[str, int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)
    disk: dict[str, int] = field(default_factory=dict)

    def at(self, where: str | None) -> dict[str, int]:
        """Return the place that a setting of offload means: None, "cpu" or a folder."""
        return self.device if where is None else self.host if where == "cpu" else self.disk


def kinds(optim: OptimSettings) -> int:
    """Return how many values an optimizer keeps of each of a parameter's."""
    return 2 if optim.name == "adamw" else int(optim.momentum > 0)


def checkpoint_bytes(optim: OptimSettings, parameters: int) -> int:
    """Return the size of a checkpoint's files, over all ranks: weights, optimizer states and moving average."""
    return FLOAT * parameters * (1 + kinds(optim) + (optim.ema is not None))


def group_sizes(model: nn.Module, optim: OptimSettings) -> list[list[int]]:
    """Return the number of values of each parameter, by the optimizer's groups; the model may be on any device."""
    return [[each.numel() for each in group["params"]] for group in parameter_groups(model.named_parameters(), optim)]


def states(settings: TrainSettings, groups: list[list[int]], ranks: int, zero: dict[str, Any]) -> Held:
    """Return what a rank holds of weights, masters, optimizer states and moving average, as long as it lives.

    ZeRO 3 has masters beside its weights although both are float32: DeepSpeed 0.19 means to keep one copy, and compares
    a device with its name.

    Args:
        settings: Of the stage.
        groups: As ``group_sizes`` returns them.
        ranks: Their number R.
        zero: DeepSpeed's ``zero_optimization``.
    """
    engine, optim, held = settings.engine, settings.optim, Held()
    tensors = shares(engine, groups, ranks, zero)
    share, whole = FLOAT * sum(tensors), ranks if engine.zero_stage in (1, 2) else 1
    held.at(engine.offload_parameters)["weights"] = whole * share
    place = held.at(engine.offload_optimizer)
    if engine.zero_stage > 0:
        place["masters"] = share
    place["optimizer"] = kinds(optim) * share + (STEP * len(tensors) if optim.name == "adamw" else 0)
    if optim.ema is not None:
        held.at(engine.offload_optimizer and "cpu")["ema"] = share  # of what is on NVMe too
    return held


def shares(engine: EngineSettings, groups: list[list[int]], ranks: int, zero: dict[str, Any]) -> list[int]:
    """Return the values of each tensor that a rank's optimizer steps, padding and all."""
    if engine.zero_stage == 0:
        return [size for group in groups for size in group]
    if engine.zero_stage < 3:
        return [-(-sum(group) // (ALIGNED * ranks)) * ALIGNED for group in groups]
    return list(_sub_groups(groups, ranks, zero["sub_group_size"]))


def _sub_groups(groups: list[list[int]], ranks: int, most: int) -> Iterator[int]:
    """Yield a rank's values of each part of the parameters that ZeRO 3 steps at once."""
    for group in groups:
        values = 0
        for size in group:
            values += -(-size // ranks)
            if values >= most:
                yield values
                values = 0
        if values:
            yield values


def add_gradients(held: Held, engine: EngineSettings, sizes: list[int], share: int, accumulated: bool) -> None:
    """Add the gradients that are there from the first backward pass to the step.

    Args:
        held: Of the rank.
        engine: Its settings.
        sizes: Values of each parameter.
        share: Values that this rank's optimizer steps.
        accumulated: Over several micro-batches.
    """
    held.device["gradients"] = FLOAT * (sum(sizes) if engine.zero_stage < 2 else share)
    if engine.offload_optimizer:
        held.device["gradients"] *= engine.zero_stage == 1
        held.host["gradients"] = FLOAT * share  # what adds up, and what is stepped
        if engine.zero_stage == 3 or (engine.zero_stage == 2 and accumulated):
            place = held.at(engine.offload_optimizer)
            place["gradients"] = place.get("gradients", 0) + FLOAT * share


def add_buffers(
    held: Held, engine: EngineSettings, sizes: list[int], tensors: list[int], ranks: int, zero: dict[str, Any]
) -> None:
    """Add what gradients are reduced in, parameters gathered in, and what is offloaded moves through.

    Args:
        held: Of the rank.
        engine: Its settings.
        sizes: Values of each parameter.
        tensors: As ``shares`` returns them.
        ranks: Their number.
        zero: DeepSpeed's ``zero_optimization``.
    """
    device = host = 0
    if engine.kind == "accelerate":
        device = sum(sizes) if ranks > 1 else 0
    elif engine.zero_stage in (1, 2):
        device = zero["reduce_bucket_size"]
        if engine.offload_optimizer:
            device, host = device + max(sizes), sum(tensors) + max(sizes)
    elif engine.zero_stage == 3:
        device = zero["reduce_bucket_size"]
        if ranks > 1 or engine.offload_parameters:  # of one rank alone, gathered parameters are the weights themselves
            staying = sum(size for size in sizes if size <= persistent(zero))
            device += staying + min(sum(sizes) - staying, zero["stage3_max_live_parameters"] + BLOCK)
        if ranks > 1:  # what comes together is gathered in one piece and then copied into parameters
            device += min(sum(sizes), zero["stage3_prefetch_bucket_size"])
        if engine.offload_optimizer not in (None, "cpu"):
            host += SWAPPED * max(tensors)
        if engine.offload_parameters not in (None, "cpu"):
            host += zero["offload_param"]["buffer_count"] * zero["offload_param"]["buffer_size"]
    held.device["buffers"] = FLOAT * device
    if host:
        held.host["buffers"] = FLOAT * host


def persistent(zero: dict[str, Any]) -> int:
    """Return the most values of a parameter that ZeRO 3 keeps whole on every rank."""
    return zero.get("stage3_param_persistence_threshold", PERSISTENT)
