"""Accelerate: one process, CPU, or data parallelism, for fine-tuning and evaluation without DeepSpeed."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from pipeline import distributed
from pipeline.config import TrainSettings
from pipeline.ema import Ema
from pipeline.engines.blocks import prepare_blocks
from pipeline.engines.fragments import Piece, Read, Step, begin_states, load_pieces, pieces, replicated
from pipeline.engines.gate import Gate, Guard
from pipeline.engines.scale import LossScale
from pipeline.optim import create_optimizer, parameter_groups, set_rate

PRECISIONS = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}


class AccelerateEngine:
    """The engine of fine-tuning: every rank holds the whole model."""

    def __init__(
        self,
        build: Callable[[], nn.Module],
        value_of: Callable[[str, tuple], Tensor],
        settings: TrainSettings,
        guard: Guard | None = None,
    ):
        self.accelerator = Accelerator(
            cpu=not torch.cuda.is_available(), mixed_precision=PRECISIONS[settings.engine.precision]
        )
        self.configuration = None  # of DeepSpeed
        self.clip = settings.optim.clip
        self.module = build().to(distributed.device())
        with torch.no_grad():
            for name, parameter in self.module.named_parameters():
                parameter.copy_(value_of(name, tuple(parameter.shape)))
        self.optimizer = create_optimizer(
            parameter_groups(self.module.named_parameters(), settings.optim), settings.optim
        )
        self.gate = Gate(self.optimizer, guard)
        self.ema = Ema(self.optimizer, settings.optim.ema)
        self.scale = LossScale() if settings.engine.precision == "float16" else None
        for parameter in self.module.parameters():
            begin_states(parameter, self.optimizer)
            self.ema.begin(parameter)
        prepare_blocks(self.module, settings.engine)
        # Alone it would be wrapped to be reduced all the same, with a copy of all gradients. Autocast it is either way.
        alone = distributed.world_size() == 1
        self.model = self.accelerator.prepare_model(self.module, evaluation_mode=alone)

    def step(self, micro_batches: Sequence, loss_fn: Callable[[Callable, object], Tensor], lr: float) -> Step:
        """Take one optimizer step over this rank's micro-batches; ``loss_fn(model, micro_batch)`` is one's mean."""
        self.model.train()
        set_rate(self.optimizer, lr)
        total = torch.zeros((), device=distributed.device())
        for index, micro_batch in enumerate(micro_batches):
            last = index == len(micro_batches) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                loss = loss_fn(self.model, micro_batch) / len(micro_batches)
                (self.scale.value * loss if self.scale else loss).backward()
            total += loss.detach()
        loss = distributed.mean_over_ranks(total)
        if self.scale:
            self.scale.unscale(self.module.parameters())
        norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.clip or float("inf"))
        self.gate.close(loss, lambda: norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.scale:
            self.scale.update(not norm.isfinite())
        return Step(loss, norm, ~self.gate.held())

    def close(self) -> None:
        """Do nothing: all memory goes with the engine."""

    def pieces(self) -> Iterator[Piece]:
        """Yield this rank's share of weights, optimizer states and averages."""
        rank, world_size = distributed.rank(), distributed.world_size()
        owned = replicated(self.module.named_parameters(), rank, world_size)
        yield from pieces(owned, self.optimizer, rank, self.ema.averages)
        if self.scale:
            yield from self.scale.pieces(rank)

    def load(self, read: Read) -> None:
        """Fill weights, optimizer states and averages from a checkpoint."""
        held = replicated(self.module.named_parameters(), 0, 1)
        load_pieces(held, self.optimizer, read, self.ema.averages)
        if self.scale:
            self.scale.load(read)

    def weights(self, ema: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, whole float32 tensor on the CPU), of the weights or of their moving average."""
        with self.averaged() if ema else nullcontext():
            for name, parameter in self.module.named_parameters():
                yield name, parameter.detach().float().cpu().clone()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Let the model run with the moving average of its weights, for as long as this is open."""
        self._exchange()
        yield
        self._exchange()  # an error ends the run, under any engine

    def _exchange(self) -> None:
        for parameter in self.module.parameters():
            self.ema.exchange(parameter)
