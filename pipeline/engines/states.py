"""What a rank holds of a model between two steps, byte by byte, under each engine and ZeRO stage."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from pipeline.config import EngineSettings, OptimSettings, TrainSettings
from pipeline.optim import parameter_groups

FLOAT = 4  # bytes of float32, which all of it is
STEP = 4  # bytes of AdamW's count of steps, one for each tensor that it steps
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
