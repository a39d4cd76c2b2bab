"""Optimizers by settings: which parameters decay, and how far each layer's learning rate is from the head's."""

import re
from collections.abc import Iterable

import torch

from pipeline.config import OptimSettings

BLOCK = re.compile(r"(?:stages\.(\d+)\.)?blocks\.(\d+)\.")
AFTER_THE_BLOCKS = ("norm.", "fc_norm.", "attn_pool.", "pre_logits.", "head.", "patch_head.", "decoder.")


def parameter_groups(named: Iterable[tuple[str, torch.nn.Parameter]], settings: OptimSettings) -> list[dict]:
    """Split parameters by what the optimizer does to them: weight decay, and ``lr_scale``, a factor of the rate.

    ``decay = "all"`` is what the paper's library did (flax.optim.Adam, vit-paper 2.4); ``"kernels"`` leaves out
    biases, norms, the class token and position embeddings, as big_vision does.
    """
    named = list(named)
    scales = layer_scales([name for name, _ in named], settings.layer_decay)
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in named:
        decays = settings.decay == "all" or _is_kernel(name, parameter)
        groups.setdefault((settings.weight_decay if decays else 0.0, scales[name]), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr_scale": scale}
        for (decay, scale), parameters in groups.items()
    ]


def layer_scales(names: list[str], decay: float) -> dict[str, float]:
    """Return each parameter's share of the learning rate, as BEiT and MAE count layers.

    What comes after the blocks has all of it, the last block ``decay`` of it, the one before ``decay ** 2``, and so on
    to what comes before the first. The units of a ResNet are blocks; those under a ViT come before its first.
    """
    block_of = {name: found.groups("0") for name in names if (found := BLOCK.match(name))}
    order = sorted(set(block_of.values()), key=lambda block: [int(number) for number in block])
    after = {block: len(order) - i for i, block in enumerate(order)}  # how many layers above, the head's among them

    def layers_above(name: str) -> int:
        if name in block_of:
            return after[block_of[name]]
        return 0 if name.startswith(AFTER_THE_BLOCKS) else len(order) + 1

    return {name: decay ** layers_above(name) for name in names}


def _is_kernel(name: str, parameter: torch.nn.Parameter) -> bool:
    shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO 3 leaves no more than a flat part of it here
    return name.endswith(".weight") and len(shape) > 1


def create_optimizer(groups: list[dict], settings: OptimSettings) -> torch.optim.Optimizer:
    """Return AdamW or SGD with momentum, fused; ``set_rate`` comes before every step, so the learning rate starts at 0.

    Fused AdamW takes a seventh of the plain one's time on a CPU, SGD a third. On the same shape of run its bits are the
    same; at the end of a flat buffer a value's last bit may differ from what it is elsewhere in one.
    """
    if settings.name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, betas=settings.betas, fused=True)
    return torch.optim.SGD(groups, lr=0.0, momentum=settings.momentum, fused=True)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


def state_kinds(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Return the per-parameter tensors that an optimizer keeps, as checkpoints name them."""
    if isinstance(optimizer, torch.optim.AdamW):
        return ("exp_avg", "exp_avg_sq")
    return ("momentum_buffer",) if optimizer.defaults["momentum"] else ()
