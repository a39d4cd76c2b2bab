"""Memory of a rank, by ZeRO stage, offload, micro-batch and recomputation, before anything of a run is there.

What lives from step to step is exact (``engines/states.py``), what the passes keep is counted (``activations.py``), and
buffers are those that our configuration of DeepSpeed sets.
"""

import math
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Any

import torch

from pipeline.activations import Passes, count_passes
from pipeline.config import TrainSettings
from pipeline.engines.blocks import blocks_of
from pipeline.engines.configuration import deepspeed_config
from pipeline.engines.states import (
    FLOAT,
    add_buffers,
    add_gradients,
    checkpoint_bytes,
    group_sizes,
    persistent,
    shares,
    states,
)
from pipeline.models import create_model

LARGEST_REDUCTION = 500_000_000  # values that DeepSpeed's stage 0 copies together to reduce them
AHEAD = 3  # batches of pixels in host memory: two decoded ahead, and the one that is on its way


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

    Attributes:
        local: Images of a rank's batch.
        recomputed: Share of the forward pass that is computed again.

    Raises:
        UserError: The global batch does not divide over the ranks, or settings do not fit each other.
    """

    def __init__(self, settings: TrainSettings, model: dict[str, Any], ranks: int, cuda: bool):
        self._settings, self._model, self._ranks, self._cuda = settings, model, ranks, cuda
        settings.accumulation(ranks)
        self.local = settings.global_batch // ranks
        with torch.device("meta"):
            template = create_model(**model, seed=None)
        blocks, every = len(blocks_of(template)), settings.engine.recompute_every
        self.recomputed = len(range(0, blocks, every)) / blocks if every and blocks else 0.0
        self._image_size = template.image_size
        self._groups = group_sizes(template, settings.optim)
        self._sizes = [size for group in self._groups for size in group]
        config = deepspeed_config(settings, ranks, self._sizes, cuda)
        self._zero = config["zero_optimization"]
        self._shares = shares(settings.engine, self._groups, ranks, self._zero)
        self._passes: dict[tuple[int, bool], Passes] = {}

    def at(self, micro_batch: int) -> Memory:
        """Return the memory at a micro-batch of so many images."""
        engine = self._settings.engine
        held = states(self._settings, self._groups, self._ranks, self._zero)
        accumulated = self.local > micro_batch
        whole = engine.zero_stage < 2  # gradients of all parameters are there until the step
        add_gradients(held, engine, self._sizes, sum(self._shares), accumulated)
        add_buffers(held, engine, self._sizes, self._shares, self._ranks, self._zero)
        if self._settings.checkpoint.asynchronous:
            held.host["checkpoint"] = checkpoint_bytes(self._settings.optim, sum(self._sizes)) // self._ranks
        held.host["loader"] = AHEAD * self.local * 3 * self._image_size**2
        held.device["batch"] = self.local * 3 * self._image_size**2 * FLOAT * (2 if self._cuda else 1)
        gradients = held.device["gradients"]
        kept = sum(held.device.values()) - gradients
        passes = self._count(micro_batch, whole and not accumulated)
        there = gradients if accumulated or engine.zero_stage == 3 else 0  # when activations are the most
        peak = max(there + passes.peak, self._reducing(gradients, there, passes.saved), gradients + self._step())
        held.device |= {
            "activations": passes.saved, "working": max(0, peak - passes.saved - gradients),
        }  # fmt: skip
        return Memory(held.device, kept + peak, held.host, held.disk)

    def largest(self, room: float) -> int | None:
        """Return the largest micro-batch that divides a rank's batch and whose peak is at most ``room`` bytes."""
        sizes = [n for n in range(1, self.local + 1) if self.local % n == 0]
        low, high = -1, len(sizes)  # the largest place known to fit, the smallest known not to
        guess = high - 1
        while high - low > 1:
            memory = self.at(sizes[guess])
            spare = room - memory.device_peak
            low, high = (guess, high) if spare >= 0 else (low, guess)
            # What grows with the micro-batch does so in proportion.
            growing = memory.device["activations"] + memory.device["working"]
            likely = sizes[guess] * (1 + spare / growing)
            guess = min(max(bisect_right(sizes, likely) - 1, low + 1), high - 1)
        return sizes[low] if low >= 0 else None

    def _count(self, micro_batch: int, gradients: bool) -> Passes:
        key = micro_batch, gradients
        if key not in self._passes:
            gathered = persistent(self._zero) if self._settings.engine.zero_stage == 3 else math.inf
            self._passes[key] = count_passes(self._settings, self._model, *key, gathered, self._cuda)
        return self._passes[key]

    def _reducing(self, gradients: int, there: int, saved: int) -> int:
        """Bytes of gradients, activations and copies while gradients are reduced."""
        stage, parameters = self._settings.engine.zero_stage, FLOAT * sum(self._sizes)
        if stage == 0 and self._settings.engine.kind == "deepspeed" and self._ranks > 1:
            return gradients + min(parameters, FLOAT * LARGEST_REDUCTION)
        if stage != 2:
            return gradients  # of stage 1 they move into the bucket, and are copied there
        # In the backward pass, whenever a bucket is full: what is in it is copied, and activations behind it are gone.
        bucket = FLOAT * self._zero["reduce_bucket_size"]
        if bucket < parameters:
            return gradients + bucket + round(saved * (1 - bucket / parameters))
        return there + bucket

    def _step(self) -> int:
        """Bytes that the optimizer's step needs beside gradients and states."""
        engine = self._settings.engine
        return 0 if engine.zero_stage == 0 or engine.offload_optimizer else FLOAT * max(self._shares)
