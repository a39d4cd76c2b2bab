"""Optimizers by settings, and which parameters decay."""

from collections.abc import Iterable

import torch

from pipeline.config import OptimSettings


def parameter_groups(named: Iterable[tuple[str, torch.nn.Parameter]], settings: OptimSettings) -> list[dict]:
    """Split parameters into those that decay and those that do not.

    ``decay = "all"`` is what the paper's library did (flax.optim.Adam, vit-paper 2.4); ``"kernels"`` leaves out
    biases, norms, the class token and position embeddings, as big_vision does.
    """
    decayed, plain = [], []
    for name, parameter in named:
        is_kernel = name.endswith("weight") and "norm" not in name.rsplit(".", 2)[-2]
        (decayed if settings.decay == "all" or is_kernel else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def create_optimizer(groups: list[dict], settings: OptimSettings) -> torch.optim.Optimizer:
    """Return AdamW or SGD with momentum; the learning rate is set anew before every step, so it starts at 0."""
    fused = all(p.device.type == "cuda" for group in groups for p in group["params"])
    if settings.name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, betas=settings.betas, fused=fused)
    return torch.optim.SGD(groups, lr=0.0, momentum=settings.momentum, fused=fused)


def state_kinds(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Return the per-parameter tensors that an optimizer keeps, as checkpoints name them."""
    if isinstance(optimizer, torch.optim.AdamW):
        return ("exp_avg", "exp_avg_sq")
    return ("momentum_buffer",) if optimizer.defaults["momentum"] else ()
