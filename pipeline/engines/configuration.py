"""DeepSpeed's configuration for our settings: what every key of it is, and why."""

import copy
from typing import Any

from pydantic import ValidationError

from pipeline.config import EngineSettings, TrainSettings
from pipeline.settings import flat, merge, nearest
from shards.errors import UserError

BUCKET = 2**25
"""Most values that are reduced or gathered at once: 134 MB of float32, enough to fill a network's bandwidth.

DeepSpeed's own 5e8 are buffers of 2 GB, whatever the model."""

NVME_BUFFERS = 8
"""Parameters of a rank that may be on their way from NVMe at once: those of a block."""


def deepspeed_config(settings: TrainSettings, world_size: int, sizes: list[int], cuda: bool) -> dict[str, Any]:
    """Return DeepSpeed's configuration.

    Args:
        settings: Of the stage; their ``engine.deepspeed`` is laid over the rest, key by key.
        world_size: Number of ranks.
        sizes: Number of values of each of the model's parameters.
        cuda: Whether the model is on a GPU, where memory of the host that it copies from should be pinned.

    Raises:
        UserError: DeepSpeed does not take what ``engine.deepspeed`` says.
    """
    engine, accumulation = settings.engine, settings.accumulation(world_size)
    config = {
        "train_micro_batch_size_per_gpu": settings.global_batch // world_size // accumulation,
        "gradient_accumulation_steps": accumulation,
        "steps_per_print": 10**12,
        "zero_allow_untested_optimizer": True,
        # Offloaded states are stepped by torch's fused optimizer too: it holds a step back, and its bits are the same.
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero_config(engine, world_size, sizes, cuda),
        # Left out, it would be 1. At stage 0 we clip.
        "gradient_clipping": (settings.optim.clip if engine.zero_stage > 0 else None) or 0.0,
        # Gradients of all micro-batches, and of all ranks, add up in it.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
    }
    if engine.precision != "float32":
        # No lower-precision-safe modules: they would also be reduced in low precision.
        config["torch_autocast"] = {"enabled": True, "dtype": engine.precision, "lower_precision_safe_modules": []}
    if not engine.deepspeed:
        return config
    config = merge(config, engine.deepspeed)
    check_laid_over(config, engine.deepspeed)
    return config


class Asked(dict):
    """A configuration that notes which of its keys are asked for, in ``asked``; DeepSpeed ignores all others."""

    def __init__(self, config: dict[str, Any]):
        super().__init__(config)
        self.asked = set[str]()

    def __contains__(self, key: object) -> bool:
        """Return whether a key is there."""
        self.asked.add(str(key))
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """Return a key's value, if it is there."""
        self.asked.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        """Return what DeepSpeed looks for keys in."""
        return self


def check_laid_over(config: dict[str, Any], over: dict[str, Any]) -> None:
    """Raise a UserError unless DeepSpeed takes a configuration, and knows every key that was laid over ours."""
    # Imported here, as our engine sets it up: what is ours alone needs no check, and an estimate no DeepSpeed.
    from pipeline.engines.deepspeed import deepspeed

    zero = deepspeed.runtime.zero.config.DeepSpeedZeroConfig
    given = flat(over, "engine.deepspeed.")
    if key := next((key for key, value in given.items() if value == "auto"), None):
        raise UserError(f'{key} = "auto" is for a trainer to fill in, and there is none; give a value, or leave it out')
    asked = Asked(copy.deepcopy(config))
    try:
        deepspeed.DeepSpeedConfig(asked)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        key = next((key for key in given if key.endswith(f".{place}")), f"engine.deepspeed: {place}")
        hint = ""
        if first["type"] == "extra_forbidden" and error.title == zero.__name__:
            hint = nearest(place, list(zero.model_fields))
        raise UserError(
            f"{key} = {first['input']!r} is not DeepSpeed's: {first['msg']}{hint}; mend it, or leave it out"
        ) from None
    except (deepspeed.DeepSpeedConfigError, AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"DeepSpeed does not take engine.deepspeed: {reason}; mend it, or leave it out") from None
    for key in over:
        if key not in asked.asked:
            raise UserError(
                f"engine.deepspeed.{key} = {over[key]!r} is not DeepSpeed's{nearest(key, sorted(asked.asked))}; mend "
                "it, or leave it out"
            )


def zero_config(engine: EngineSettings, world_size: int, sizes: list[int], cuda: bool) -> dict[str, Any]:
    """Return the part that is about sharding; buckets are numbers of values, no larger than the model wants."""
    bucket = min(sum(sizes) + sum(sizes) % 2, BUCKET)
    config: dict[str, Any] = {
        "stage": engine.zero_stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if engine.zero_stage == 3:
        # Weights of a few blocks are there at once. DeepSpeed's own 1e9 would gather all of ViT-H/14 and keep it.
        config |= {
            "stage3_prefetch_bucket_size": bucket,
            "stage3_max_live_parameters": 2 * bucket,
            "stage3_max_reuse_distance": bucket,
            "sub_group_size": 2 * bucket,  # what is stepped, and of which gradients are copied, at once
            # It rounds a layer's output before it adds the bias, and again after; and it stays in the whole process.
            "memory_efficient_linear": False,
        }
    if engine.offload_optimizer:
        config["offload_optimizer"] = offload(engine.offload_optimizer, cuda)
    if engine.offload_parameters:
        config["offload_param"] = offload(engine.offload_parameters, cuda)
        if engine.offload_parameters != "cpu":
            # DeepSpeed 0.19 reads a parameter ahead for the forward and the backward pass at once, and dies of it.
            config["stage3_prefetch_bucket_size"] = 0
            # Each parameter that is read takes a buffer of its own; DeepSpeed would keep the first 1e9 in memory.
            config["offload_param"] |= {
                "max_in_cpu": 0, "buffer_count": NVME_BUFFERS, "buffer_size": -(-max(sizes) // world_size),
            }  # fmt: skip
    return config


def offload(where: str, cuda: bool) -> dict[str, Any]:
    """Return where something is offloaded to: "cpu", or else a folder on NVMe."""
    place = {"device": "cpu"} if where == "cpu" else {"device": "nvme", "nvme_path": where}
    return place | {"pin_memory": cuda}
