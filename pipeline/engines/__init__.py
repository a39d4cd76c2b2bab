"""Engines own backward, step, clipping, precision and sharding. The rest of the pipeline knows five calls of them.

``step(micro_batches, loss_fn, lr) -> Step``, ``pieces()``, ``load(read)``, ``weights()`` and ``close()``; plus
``model``, the callable that runs the forward pass, and ``averaged()``, as long as which it does so with the weights'
moving average. Checkpoints, conversion and evaluation know no more of an engine than this.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pipeline import distributed
from pipeline.config import TrainSettings
from pipeline.engines.blocks import prepare_blocks
from pipeline.engines.gate import Guard
from pipeline.engines.room import check_room
from pipeline.engines.states import group_sizes
from shards.errors import UserError


def create_engine(
    build: Callable[[], nn.Module],
    value_of: Callable[[str, tuple], Tensor],
    settings: TrainSettings,
    guard: Guard | None = None,
) -> Any:
    """Return the engine that the settings name.

    Args:
        build: Makes the model; called by the engine, which may shard parameters while they are made (ZeRO 3).
        value_of: The first value of a parameter, by full name and full shape, float32 on the CPU.
        settings: The training stage's settings.
        guard: Says of each step, by its loss and gradient norm, whether to hold it back: then nothing changes.
    """
    with torch.device("meta"):
        template = build()
    sizes = [parameter.numel() for parameter in template.parameters()]
    engine = settings.engine
    if engine.precision == "float16" and distributed.device().type == "cpu":
        raise UserError('engine.precision "float16" is of GPUs, and there is none; set it to "bfloat16" or "float32"')
    prepare_blocks(template, engine)  # or says that it has none
    # Imported here: fine-tuning and evaluation must not need DeepSpeed.
    if engine.kind == "deepspeed":
        from pipeline.engines.configuration import deepspeed_config
        from pipeline.engines.deepspeed import DeepSpeedEngine

        config = deepspeed_config(settings, distributed.world_size(), sizes, torch.cuda.is_available())
        check_room(settings, group_sizes(template, settings.optim), config["zero_optimization"])
        return DeepSpeedEngine(build, value_of, settings, config, guard)
    from pipeline.engines.accelerate import AccelerateEngine

    return AccelerateEngine(build, value_of, settings, guard)
