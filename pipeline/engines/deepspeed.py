"""DeepSpeed: ZeRO 0-3, bf16 by autocast over exact fp32 masters, on CUDA (NCCL) and CPU (gloo)."""

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from pipeline import distributed
from pipeline.config import TrainSettings
from pipeline.engines.fragments import Fragment, Piece, Read, Step, load_pieces, pieces, replicated
from pipeline.optim import create_optimizer, parameter_groups, set_rate

if distributed.device().type == "cpu":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it warns, on stdout, that it found no GPU

import deepspeed

deepspeed.utils.logger.setLevel(logging.WARNING)
for handler in deepspeed.utils.logger.handlers:
    handler.setStream(sys.stderr)  # stdout is for results
# DeepSpeed's to mend.
warnings.filterwarnings("ignore", message=".*(all_gather_into_tensor|reduce_scatter_tensor)", category=FutureWarning)


class DeepSpeedEngine:
    """The engine of pre-training at scale.

    Masters are exact: the model is built in float32, gets its first values before DeepSpeed sees it, and bf16 runs by
    ``torch_autocast``. (DeepSpeed's ``bf16`` setting would start the masters from bf16-rounded weights.)
    """

    def __init__(
        self, build: Callable[[], nn.Module], value_of: Callable[[str, tuple], Tensor], settings: TrainSettings
    ):
        if distributed.device().type == "cpu":
            # Shared-memory reduction serves only inference; building it would cost every first run half a minute.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)
        self.stage = settings.engine.zero_stage
        self.clip = settings.optim.clip
        config = deepspeed_config(settings, distributed.world_size())
        with deepspeed.zero.Init(config_dict_or_path=config, enabled=self.stage == 3):
            module = build()
        if self.stage < 3:
            module.to(distributed.device())
        write_first_values(module, value_of)
        optimizer = create_optimizer(parameter_groups(module.named_parameters(), settings.optim), settings.optim)
        self.model, self.zero, _, _ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
        self.optimizer = self.zero if self.stage == 0 else self.zero.optimizer
        self.names = {parameter: name for name, parameter in module.named_parameters()}

    def step(self, micro_batches: Sequence, loss_fn: Callable[[Callable, object], Tensor], lr: float) -> Step:
        """Take one optimizer step over this rank's micro-batches; ``loss_fn(model, micro_batch)`` is one's mean."""
        self.model.train()
        set_rate(self.optimizer, lr)
        total = torch.zeros((), device=self.model.device)
        for index, micro_batch in enumerate(micro_batches):
            self.model.set_gradient_accumulation_boundary(index == len(micro_batches) - 1)
            loss = loss_fn(self.model, micro_batch) / len(micro_batches)
            self.model.backward(loss, scale_wrt_gas=False)
            total += loss.detach()
        if self.stage == 0:
            # Plain data parallelism: DeepSpeed reduces the gradients but keeps no norm of them.
            norm = torch.nn.utils.clip_grad_norm_(self.names, self.clip or float("inf"))
            self.model.step()
        else:
            self.model.step()
            norm = self.model.get_global_grad_norm()
        return Step(total, norm, self.model.was_step_applied())

    def pieces(self) -> Iterator[Piece]:
        """Yield this rank's share of weights and optimizer states."""
        return pieces(list(self._owned()), self.optimizer, distributed.rank())

    def load(self, read: Read) -> None:
        """Fill masters and optimizer states from a checkpoint, then the parameters that follow the masters."""
        held = list(replicated(self._named(), 0, 1) if self.stage == 0 else self._owned())
        load_pieces(held, self.optimizer, read)
        if self.stage in (1, 2):
            self.zero.update_lp_params()
        elif self.stage == 3:
            for group in range(len(self.zero.fp16_groups)):
                self.zero._reassign_or_swap_out_partitioned_parameters(group)
            if self.zero.persistent_parameters:  # small parameters that stay gathered between steps
                self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, whole float32 tensor on the CPU), one gathered parameter at a time; collective under ZeRO 3."""
        for name, parameter in self._named():
            with deepspeed.zero.GatheredParameters([parameter], enabled=self.stage == 3):
                yield name, parameter.detach().float().cpu().clone()

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, parameter) for parameter, name in self.names.items())

    def _owned(self) -> Iterator[Fragment]:
        rank = distributed.rank()
        if self.stage == 0:
            yield from replicated(self._named(), rank, distributed.world_size())
        elif self.stage in (1, 2):
            for name, parameter in self._named():
                here = parameter._hp_mapping
                if here is not None:
                    flat = self.zero.single_partition_of_fp32_groups[here.param_group_index]
                    at = here.hp_fragment_address
                    yield Fragment(name, here.lp_fragment_address.start, at.numel, flat, at.start)
        else:
            for name, parameter in self._named():
                group, offset, padded = self.zero.grad_position[self.zero.get_param_id(parameter)]
                start = rank * padded
                count = min(padded, parameter.ds_numel - start)  # the last ranks' partitions are padded
                if count > 0:
                    yield Fragment(name, start, count, self.zero.fp32_partitioned_groups_flat[group], offset)


def deepspeed_config(settings: TrainSettings, world_size: int) -> dict:
    """Return DeepSpeed's configuration for our settings."""
    accumulation = settings.accumulation(world_size)
    config = {
        "train_micro_batch_size_per_gpu": settings.global_batch // world_size // accumulation,
        "gradient_accumulation_steps": accumulation,
        "steps_per_print": 10**12,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": settings.engine.zero_stage},
        # Left out, it would be 1. At stage 0 we clip.
        "gradient_clipping": (settings.optim.clip if settings.engine.zero_stage > 0 else None) or 0.0,
    }
    if settings.engine.precision == "bfloat16":
        # No lower-precision-safe modules: they would also be reduced in bf16, and gradients must add up in fp32.
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return config


@torch.no_grad()
def write_first_values(module: nn.Module, value_of: Callable[[str, tuple], Tensor]) -> None:
    """Write every parameter's first value; under ZeRO 3 each rank writes its own partition, so nothing is gathered."""
    for name, parameter in module.named_parameters():
        if not hasattr(parameter, "ds_tensor"):
            parameter.copy_(value_of(name, tuple(parameter.shape)))
            continue
        value = value_of(name, tuple(parameter.ds_shape)).reshape(-1)
        partition = parameter.ds_tensor
        start = distributed.rank() * partition.numel()
        mine = value[start : start + partition.numel()]
        partition.data[: mine.numel()].copy_(mine)
