"""DeepSpeed: ZeRO 0-3, low precision by autocast over exact fp32 masters, on CUDA (NCCL) and CPU (gloo)."""

import ctypes
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

from pipeline import distributed
from pipeline.config import TrainSettings
from pipeline.ema import Ema
from pipeline.engines.blocks import blocks_of, prepare_blocks
from pipeline.engines.fragments import Fragment, Piece, Read, Step, begin_states, load_pieces, pieces, replicated
from pipeline.engines.gate import Gate, Guard
from pipeline.engines.scale import LossScale
from pipeline.optim import create_optimizer, parameter_groups, set_rate

if distributed.device().type == "cpu":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it warns, on stdout, that it found no GPU

import deepspeed as deepspeed  # for configuration.py too, which wants it set up as here
from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus
from deepspeed.utils import set_z3_leaf_module

deepspeed.utils.logger.setLevel(logging.WARNING)
for handler in deepspeed.utils.logger.handlers:
    if type(handler) is logging.StreamHandler:  # its own, and none that another added to listen
        handler.setStream(sys.stderr)  # stdout is for results
# DeepSpeed's to mend.
warnings.filterwarnings("ignore", message=".*(all_gather_into_tensor|reduce_scatter_tensor)", category=FutureWarning)


class DeepSpeedEngine:
    """The engine of pre-training at scale.

    Masters are exact: the model is built in float32, gets its first values before DeepSpeed sees it, and bf16 and fp16
    run by ``torch_autocast``. (DeepSpeed's ``bf16`` setting would start the masters from bf16-rounded weights.)
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        value_of: Callable[[str, tuple], Tensor],
        settings: TrainSettings,
        config: dict[str, Any],
        guard: Guard | None = None,
    ):
        if distributed.device().type == "cpu":
            # Shared-memory reduction serves only inference; building it would cost every first run half a minute.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
            if settings.engine.zero_stage == 3:
                give_back_what_is_freed()
        deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)
        self.configuration = config
        self.stage = settings.engine.zero_stage
        self.clip = settings.optim.clip
        with deepspeed.zero.Init(config_dict_or_path=config, enabled=self.stage == 3):
            module = build()
        if self.stage < 3:
            module.to(distributed.device())
        write_first_values(module, value_of)
        prepare_blocks(module, settings.engine)
        if self.stage == 3:
            for block in blocks_of(module):
                set_z3_leaf_module(block, True)  # its weights are gathered together, outside of what is compiled
            # Autocast would keep a copy of every weight in low precision to the end of the forward pass.
            torch.set_autocast_cache_enabled(False)
        optimizer = create_optimizer(parameter_groups(module.named_parameters(), settings.optim), settings.optim)
        self.model, self.zero, _, _ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
        self.optimizer = self.zero if self.stage == 0 else self.zero.optimizer
        self.names = {parameter: name for name, parameter in module.named_parameters()}
        self.swapped = self.stage == 3 and self.zero.swap_optimizer  # masters and states are on NVMe between steps
        self.scale = None
        if settings.engine.precision == "float16":
            self.scale = LossScale()
            self.model.torch_autocast_z0_gradscaler = self.zero.torch_autocast_gradscaler = None
        self.gate = Gate(self.optimizer, guard)
        self.ema = Ema(self.optimizer, settings.optim.ema)
        for master in self._masters():
            with self._at_hand(master):
                begin_states(master, self.optimizer)
                self.ema.begin(master)

    def step(self, micro_batches: Sequence, loss_fn: Callable[[Callable, object], Tensor], lr: float) -> Step:
        """Take one optimizer step over this rank's micro-batches; ``loss_fn(model, micro_batch)`` is one's mean."""
        self.model.train()
        set_rate(self.optimizer, lr)
        if self.scale and self.stage > 0:
            self.zero.override_loss_scale(self.scale.value)
        total = torch.zeros((), device=self.model.device)
        for index, micro_batch in enumerate(micro_batches):
            self.model.set_gradient_accumulation_boundary(index == len(micro_batches) - 1)
            loss = loss_fn(self.model, micro_batch) / len(micro_batches)
            scaled = loss * self.scale.value if self.scale and self.stage == 0 else loss
            self.model.backward(scaled, scale_wrt_gas=False)
            total += loss.detach()
        loss = distributed.mean_over_ranks(total)
        if self.stage == 0:
            # Plain data parallelism: DeepSpeed reduces the gradients but keeps no norm of them.
            if self.scale:
                self.scale.unscale(self.names)
            norm = torch.nn.utils.clip_grad_norm_(self.names, self.clip or float("inf"))
            self.gate.close(loss, lambda: norm)
            self.model.step()
        else:
            self.gate.close(loss, lambda: self.zero._global_grad_norm)
            self.model.step()  # a norm that is not finite ends it before the optimizer's
            norm = self.model.get_global_grad_norm()
        if self.scale:
            self.scale.update(not torch.as_tensor(norm).isfinite())
        return Step(loss, norm, ~self.gate.held())

    def pieces(self) -> Iterator[Piece]:
        """Yield this rank's share of weights, optimizer states and averages."""
        rank = distributed.rank()
        for kind, name, start, tensor in pieces(self._owned(), self.optimizer, rank, self.ema.averages, self._at_hand):
            yield kind, name, start, tensor.clone() if self.swapped else tensor  # what was read from NVMe is let go
        if self.scale:
            yield from self.scale.pieces(rank)

    def load(self, read: Read) -> None:
        """Fill masters, optimizer states and averages from a checkpoint, then the parameters, which follow masters."""
        held = replicated(self._named(), 0, 1) if self.stage == 0 else self._owned()
        self._let_go()
        load_pieces(held, self.optimizer, read, self.ema.averages, self._changing)
        self._spread()
        if self.scale:
            self.scale.load(read)

    def weights(self, ema: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, whole float32 tensor on the CPU), of the weights or of their moving average.

        One parameter is gathered at a time; collective under ZeRO 3, and of the average under any.
        """
        with self.averaged() if ema else nullcontext():
            for name, parameter in self._named():
                with deepspeed.zero.GatheredParameters([parameter], enabled=self.stage == 3):
                    yield name, parameter.detach().float().cpu().clone()

    def close(self) -> None:
        """Let go of all memory, which references of DeepSpeed's own would keep; nothing works afterwards."""
        self.model.destroy()
        for parameter in self.names:
            parameter.grad = None
            for tensor in (parameter, getattr(parameter, "ds_tensor", None)):
                if tensor is not None:
                    tensor.data = tensor.new_empty(0)
        self.optimizer.state.clear()
        self.ema.averages.clear()
        if self.stage > 0:
            vars(self.zero).clear()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Let the model run with the moving average of its weights, for as long as this is open; collective."""
        self._exchange()
        yield
        self._exchange()  # not after an error: it may be of this rank alone, and the others would not come

    def _exchange(self) -> None:
        self._let_go()
        for master in self._masters():
            with self._changing(master):
                self.ema.exchange(master)
        self._spread()

    @contextmanager
    def _at_hand(self, master: Tensor) -> Iterator[None]:
        """Bring a master and its states from NVMe, if they are there, and back."""
        group = self._group_of(master) if self.swapped else None
        if group is None or not self.zero._swappable_optimizer_subgroup(group):  # small ones stay in memory
            yield
            return
        self.zero._optimizer_states_and_gradient_swap_in(group)
        yield
        self.zero._optimizer_states_and_gradient_swap_out(group)

    @contextmanager
    def _changing(self, master: Tensor) -> Iterator[None]:
        """Let a master change, and then this rank's parameters that follow it under ZeRO 3."""
        with self._at_hand(master):
            yield
            if self.stage == 3:
                self.zero._reassign_or_swap_out_partitioned_parameters(self._group_of(master))

    def _let_go(self) -> None:
        """Let go of what is still gathered, or read from NVMe, from the last use, before masters change.

        It would be old; and what is in memory is changed there alone, while NVMe keeps what was.
        """
        if self.stage == 3:
            self.zero._partition_all_parameters()

    def _spread(self) -> None:
        """Bring all that changed to all ranks."""
        if self.stage in (1, 2):
            self.zero.update_lp_params()
        elif self.stage == 3 and self.zero.persistent_parameters:  # small ones that stay gathered between steps
            self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)

    def _masters(self) -> Iterable[Tensor]:
        """Return the fp32 tensors that this rank's optimizer steps."""
        if self.stage == 0:
            return self.names
        return self.zero.single_partition_of_fp32_groups if self.stage < 3 else self.zero.fp32_partitioned_groups_flat

    def _group_of(self, master: Tensor) -> int:
        return next(i for i, each in enumerate(self.zero.fp32_partitioned_groups_flat) if each is master)

    def _named(self) -> Iterator[tuple[str, Any]]:
        """Yield each parameter, which has attributes of DeepSpeed's, after its name."""
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


def give_back_what_is_freed() -> None:
    """Have glibc return every freed block of a megabyte to the system at once, for the rest of the process.

    ZeRO 3 gathers weights and lets go of them all the time; kept for reuse, their holes made ViT-L/16 a third larger.
    """
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(-3, 2**20)  # M_MMAP_THRESHOLD


@torch.no_grad()
def write_first_values(module: nn.Module, value_of: Callable[[str, tuple], Tensor]) -> None:
    """Write every parameter's first value; under ZeRO 3 each rank writes its own partition, so nothing is gathered."""
    parameter: Any  # with attributes of DeepSpeed's
    for name, parameter in module.named_parameters():
        if not hasattr(parameter, "ds_tensor"):
            parameter.copy_(value_of(name, tuple(parameter.shape)))
            continue
        value = value_of(name, tuple(parameter.ds_shape)).reshape(-1)
        partition = parameter.ds_tensor
        on_nvme = partition.status == PartitionedParamStatus.NOT_AVAILABLE
        if on_nvme:
            parameter.nvme_swapper.swap_in([parameter], async_op=False)
        start = distributed.rank() * partition.ds_numel
        mine = value[start : start + partition.ds_numel]
        partition.data[: mine.numel()].copy_(mine)
        if on_nvme:
            parameter.nvme_swapper.swap_out_and_release([parameter])
