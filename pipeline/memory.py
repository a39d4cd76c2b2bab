"""Memory of a rank, by ZeRO stage, offload, micro-batch and recomputation, before anything of a run is there.

What lives from step to step is exact (``engines/states.py``), what the passes keep is counted (``activations.py``), and
buffers are those that our configuration of DeepSpeed sets.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from pipeline.activations import Passes, count_passes
from pipeline.config import TrainSettings
from pipeline.engines.configuration import deepspeed_config
from pipeline.engines.states import FLOAT, Held, group_sizes, shares, states
from pipeline.models import create_model

LARGEST_REDUCTION = 500_000_000  # values that DeepSpeed's stage 0 copies together to reduce them
PERSISTENT = 100_000  # values: DeepSpeed's stage3_param_persistence_threshold; smaller parameters stay gathered
SWAPPED = 4  # DeepSpeed's buffer_count: of each tensor that is stepped, when states are on NVMe
BLOCK = 2**25  # values: what ZeRO 3 may gather beyond its limit, since a block's weights come together


@dataclass
class Memory:
    """Bytes of one rank.

    Attributes:
        device: By what they are for, on its GPU, or in host memory where there is none: ``weights``, ``masters``,
            ``optimizer``, ``ema``, ``gradients``, ``buffers``, ``batch``, ``activations`` (kept for the backward pass),
            ``working`` (what the passes, or the step if that is more, need beside). Not all are there at the same time:
        device_peak: the most that is.
        host: Likewise, offloaded to host memory; all of it at once.
        disk: Likewise, on NVMe.
    """

    device: dict[str, int]
    device_peak: int
    host: dict[str, int] = field(default_factory=dict)
    disk: dict[str, int] = field(default_factory=dict)


class MemoryEstimate:
    """The memory of a rank of a training stage, as a function of the micro-batch.

    Args:
        settings: Of the stage.
        model: What ``create_model`` takes.
        ranks: Their number.
        cuda: Whether they are on GPUs.

    Raises:
        UserError: The global batch does not divide over the ranks, or settings do not fit each other.
    """

    def __init__(self, settings: TrainSettings, model: dict[str, Any], ranks: int, cuda: bool):
        self._settings, self._model, self._ranks, self._cuda = settings, model, ranks, cuda
        settings.accumulation(ranks)
        self.local = settings.global_batch // ranks
        with torch.device("meta"):
            template = create_model(**model, seed=None)
        self._image_size = template.image_size
        self._groups = group_sizes(template, settings.optim)
        self._sizes = [size for group in self._groups for size in group]
        config = deepspeed_config(settings, ranks, self._sizes, cuda)
        self._zero = config["zero_optimization"]
        self._shares = shares(settings.engine, self._groups, ranks, self._zero)
        self._persistent = self._zero.get("stage3_param_persistence_threshold", PERSISTENT)
        self._passes: dict[tuple[int, bool], Passes] = {}

    def at(self, micro_batch: int) -> Memory:
        """Return the memory at a micro-batch of so many images."""
        engine = self._settings.engine
        held = states(self._settings, self._groups, self._ranks, self._zero)
        self._add_buffers(held)
        held.device["batch"] = self.local * 3 * self._image_size**2 * FLOAT * (2 if self._cuda else 1)
        kept = sum(held.device.values())
        share = FLOAT * sum(self._shares)
        accumulated = self.local > micro_batch
        whole = engine.zero_stage < 2  # gradients of all parameters are there until the step
        gradients = FLOAT * sum(self._sizes) if whole else share
        if engine.offload_optimizer:
            held.host["gradients"] = share * (2 if engine.zero_stage == 3 or accumulated else 1)
            gradients *= engine.zero_stage == 1
        passes = self._count(micro_batch, whole and not accumulated)
        while_passing = passes.peak + gradients * (accumulated or not whole)
        peak = max(while_passing, gradients + self._step())
        held.device |= {
            "gradients": gradients, "activations": passes.saved,
            "working": max(0, peak - passes.saved - gradients),
        }  # fmt: skip
        return Memory(held.device, kept + peak, held.host, held.disk)

    def largest(self, room: float) -> int | None:
        """Return the largest micro-batch that divides a rank's batch and whose peak is at most ``room`` bytes."""
        fitting = [n for n in range(1, self.local + 1) if self.local % n == 0]
        while fitting:  # halving, since each costs a pass over shapes
            middle = len(fitting) // 2
            if self.at(fitting[middle]).device_peak <= room:
                if len(fitting) == 1:
                    return fitting[0]
                fitting = fitting[middle:]
            else:
                fitting = fitting[:middle]
        return None

    def _count(self, micro_batch: int, gradients: bool) -> Passes:
        key = micro_batch, gradients
        if key not in self._passes:
            gathered = self._persistent if self._settings.engine.zero_stage == 3 else math.inf
            self._passes[key] = count_passes(self._settings, self._model, *key, gathered)
        return self._passes[key]

    def _add_buffers(self, held: Held) -> None:
        """Add what gradients are reduced in, parameters gathered in, and what is offloaded moves through."""
        engine, zero, parameters = self._settings.engine, self._zero, sum(self._sizes)
        largest, share = max(self._sizes), sum(self._shares)
        device = host = 0
        if engine.kind == "accelerate":
            device = parameters if self._ranks > 1 else 0
        elif engine.zero_stage == 0:
            device = min(parameters, LARGEST_REDUCTION) if self._ranks > 1 else 0
        elif engine.zero_stage < 3:
            device = zero["reduce_bucket_size"] if engine.zero_stage == 2 else 0
            if engine.offload_optimizer:
                device, host = device + largest, share + largest
        else:
            staying = sum(size for size in self._sizes if size <= self._persistent)
            live = min(parameters - staying, zero["stage3_max_live_parameters"] + BLOCK)
            device = zero["reduce_bucket_size"] + staying + live
            if engine.offload_optimizer not in (None, "cpu"):
                host += SWAPPED * max(self._shares)
            if engine.offload_parameters not in (None, "cpu"):
                host += zero["offload_param"]["buffer_count"] * zero["offload_param"]["buffer_size"]
        held.device["buffers"] = FLOAT * device
        if host:
            held.host["buffers"] = FLOAT * host

    def _step(self) -> int:
        """Bytes that the optimizer's step needs beside gradients and states."""
        engine = self._settings.engine
        return 0 if engine.zero_stage == 0 or engine.offload_optimizer else FLOAT * max(self._shares)
