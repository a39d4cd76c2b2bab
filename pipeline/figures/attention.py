"""The weights of a model's attention, block by block, as it sees images."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from pipeline.models.vit import Attention, VisionTransformer

See = Callable[[int, Tensor], None]
"""see(block, weights [n, h, T, T]): of each query, the second last axis, how much it takes of each key."""


@contextmanager
def watched(model: VisionTransformer, see: See) -> Iterator[None]:
    """Let ``see`` have the attention of every block at each forward pass; one block's weights are there at a time.

    The pass itself is as ever: its fused kernels keep no weights, which are computed beside it, in float32.
    """

    def look(block: int, module: Attention, inputs: tuple) -> None:
        see(block, attention_weights(module, *inputs))

    hooks = [
        block.get_submodule("attn").register_forward_pre_hook(partial(look, i)) for i, block in enumerate(model.blocks)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def attention_weights(module: Attention, x: Tensor, bias: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Return the weights [n, h, T, T] of tokens [n, T, D], float32; ``bias`` as in ``Attention.forward``."""
    qkv = module.qkv(x).unflatten(2, (3, module.num_heads, -1))  # [n, T, 3, h, d]
    q, k, _ = (each.transpose(1, 2).float() for each in qkv.unbind(2))  # each [n, h, T, d]
    logits = q @ k.transpose(2, 3) / q.shape[3] ** 0.5
    return (logits if bias is None else logits + bias(q)).softmax(dim=3)


def attends_to_all(model: nn.Module) -> bool:
    """Tell whether every token of a model sees every other: that of a ViT or hybrid, not of a ResNet or Axial-ViT."""
    return type(model) is VisionTransformer
