"""Accelerate: one process, CPU, or data parallelism, for fine-tuning and evaluation without DeepSpeed."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from pipeline import distributed
from pipeline.config import TrainSettings
from pipeline.engines.fragments import Piece, Read, Step, load_pieces, pieces, replicated
from pipeline.optim import create_optimizer, parameter_groups, set_rate


class AccelerateEngine:
    """The engine of fine-tuning: every rank holds the whole model."""

    def __init__(
        self, build: Callable[[], nn.Module], value_of: Callable[[str, tuple], Tensor], settings: TrainSettings
    ):
        self.accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),
            mixed_precision="bf16" if settings.engine.precision == "bfloat16" else "no",
        )
        self.clip = settings.optim.clip
        self.module = build().to(distributed.device())
        with torch.no_grad():
            for name, parameter in self.module.named_parameters():
                parameter.copy_(value_of(name, tuple(parameter.shape)))
        self.optimizer = create_optimizer(
            parameter_groups(self.module.named_parameters(), settings.optim), settings.optim
        )
        self.model = self.accelerator.prepare_model(self.module)

    def step(self, micro_batches: Sequence, loss_fn: Callable[[Callable, object], Tensor], lr: float) -> Step:
        """Take one optimizer step over this rank's micro-batches; ``loss_fn(model, micro_batch)`` is one's mean."""
        self.model.train()
        set_rate(self.optimizer, lr)
        total = torch.zeros((), device=distributed.device())
        for index, micro_batch in enumerate(micro_batches):
            last = index == len(micro_batches) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                loss = loss_fn(self.model, micro_batch) / len(micro_batches)
                self.accelerator.backward(loss)
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.clip or float("inf"))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return Step(total, norm, True)

    def pieces(self) -> Iterator[Piece]:
        """Yield this rank's share of weights and optimizer states."""
        rank, world_size = distributed.rank(), distributed.world_size()
        return pieces(list(replicated(self.module.named_parameters(), rank, world_size)), self.optimizer, rank)

    def load(self, read: Read) -> None:
        """Fill weights and optimizer states from a checkpoint."""
        load_pieces(list(replicated(self.module.named_parameters(), 0, 1)), self.optimizer, read)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, whole float32 tensor on the CPU)."""
        for name, parameter in self.module.named_parameters():
            yield name, parameter.detach().float().cpu().clone()
