"""Engines own backward, step, clipping, precision and sharding. The rest of the pipeline knows four calls of them.

``step(micro_batches, loss_fn, lr) -> Step``, ``pieces()``, ``load(read)`` and ``weights()``; plus ``model``, the
callable that runs the forward pass. Checkpoints, conversion and evaluation know no more of an engine than this.
"""

from collections.abc import Callable

from torch import Tensor, nn

from pipeline.config import TrainSettings


def create_engine(build: Callable[[], nn.Module], value_of: Callable[[str, tuple], Tensor], settings: TrainSettings):
    """Return the engine that the settings name.

    Args:
        build: Makes the model; called by the engine, which may shard parameters while they are made (ZeRO 3).
        value_of: The first value of a parameter, by full name and full shape, float32 on the CPU.
        settings: The training stage's settings.
    """
    # Imported here: fine-tuning and evaluation must not need DeepSpeed.
    if settings.engine.kind == "deepspeed":
        from pipeline.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(build, value_of, settings)
    from pipeline.engines.accelerate import AccelerateEngine

    return AccelerateEngine(build, value_of, settings)
