"""The proof that a conversion kept the model: what it says of fixed images, before and after."""

from typing import Any

import torch
from torch import Tensor, nn

from pipeline.convert.source import Source
from shards.errors import PatchmillError, UserError

IMAGES = 2
BOUND = 1e-5
"""The largest difference that float32 may make, where logits are of the size of 1; larger ones are in proportion."""


@torch.no_grad()
def answers(source: Source) -> tuple[Tensor, Tensor]:
    """Return what a model says of fixed images, in float32 on the CPU: logits [2, K], and what its head sees [2, D].

    Heads may be all zeros, as in weights that were published to fine-tune; features are not.

    Raises:
        UserError: They are no numbers.
    """
    model = source.build()
    seen: list[Tensor] = []
    if isinstance(model.head, nn.Module):
        model.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(1)))
    size = model.image_size
    images = torch.rand(IMAGES, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    logits = model(images)
    if not logits.isfinite().all():
        raise UserError(
            f"the {source.format} gives logits that are no numbers: its weights are damaged or diverged; take another"
        )
    return logits, seen[0] if seen else logits


def compare(before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor], dtype: str, size: int) -> dict[str, Any]:
    """Return how far logits and features lie apart, as it is noted and printed.

    Args:
        before: What ``answers`` gave of the model.
        after: What it gave of the files that were written, read again.
        dtype: What these are in.
        size: Side of the images, in pixels.

    Raises:
        PatchmillError: In float32 they are not the same, or in another dtype they are no numbers any more.
    """
    found: dict[str, Any] = {"images": IMAGES, "image_size": size, "dtype": dtype}
    for name, one, other in zip(("logits", "features"), before, after, strict=True):
        found[f"largest_{name}"] = one.abs().max().item()
        found[f"largest_difference_of_{name}"] = (one - other).abs().max().item()
        apart = found[f"largest_difference_of_{name}"]
        bound = BOUND * max(1.0, found[f"largest_{name}"])
        if not apart <= (bound if dtype == "float32" else float("inf")):  # of no number neither is true
            raise PatchmillError(
                f"the converted model is another one: of its {name}, up to {found[f'largest_{name}']:.3g} large, some "
                f"differ by {apart:.3g}; nothing was written, please report this with the command"
            )
    return found
