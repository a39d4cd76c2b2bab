"""What the passes of a micro-batch keep and need, counted on tensors that are shapes alone, for any model and loss.

Forward, loss and backward run under torch's FakeTensorMode on the CPU, and every storage is counted from the operation
that makes it until nothing refers to it. Attention is counted as its fused kernels keep it, and linear layers as the
device has them.
"""

import weakref
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.config import TrainSettings
from pipeline.corruption import corrupted_patches
from pipeline.engines.blocks import prepare_blocks
from pipeline.masking import visible_count
from pipeline.models import Model, create_model, onednn
from pipeline.models.vit import VisionTransformer
from pipeline.objectives import create_objective


class Passes(NamedTuple):
    """Bytes of a micro-batch's forward and backward pass, the model's parameters and the batch itself not counted.

    Attributes:
        saved: Kept from the forward pass for the backward pass: activations.
        peak: The most that is there at once, ``saved`` among it.
    """

    saved: int
    peak: int


def count_passes(
    settings: TrainSettings, model: dict[str, Any], micro_batch: int, gradients: bool, gathered: float, cuda: bool
) -> Passes:
    """Return what the passes of a micro-batch take.

    Args:
        settings: Of the stage.
        model: What ``create_model`` takes.
        micro_batch: Images n.
        gradients: Whether those of the parameters stay, from when each is made, and count; else each is gone at once.
        gathered: Parameters of more values are gathered for their use alone (ZeRO 3).
        cuda: Whether it is for a GPU, where no layer goes through oneDNN.
    """
    engine = settings.engine
    low = None if engine.precision == "float32" else getattr(torch, engine.precision)
    layers = onednn.unused() if cuda else nullcontext()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu"), layers:
        built = create_model(**model, seed=None).train()
        prepare_blocks(built, engine.model_copy(update={"compile": False}))
        objective = create_objective(settings, built, None, model.get("num_classes", 0))
        draws = torch.empty(micro_batch, len(built.blocks), 2) if built.drop_path else None
        inputs = _inputs(settings, built, model, micro_batch)
        if not gradients:
            for parameter in built.parameters():
                parameter.register_post_accumulate_grad_hook(_forget)
        others = [*built.buffers(), *inputs, *([] if draws is None else [draws])]
        with Storages([*built.parameters(), *others]) as counted:
            cached = torch.is_autocast_cache_enabled()
            torch.set_autocast_cache_enabled(engine.zero_stage < 3)  # as the engine does
            try:
                saved = Saved(list(built.parameters()), others, gathered)
                with torch.autocast("cpu", low, enabled=low is not None), saved:
                    loss = objective.loss(partial(built, draws=draws) if draws is not None else built, *inputs)
                loss.backward()
            finally:
                torch.set_autocast_cache_enabled(cached)
    return Passes(saved.bytes, counted.peak)


def _forget(parameter: nn.Parameter) -> None:
    parameter.grad = None


def _inputs(settings: TrainSettings, built: Model, model: dict[str, Any], n: int) -> tuple[Tensor, ...]:
    """Return what the objective's ``prepare`` makes of a batch, without values."""
    images = torch.empty(n, 3, built.image_size, built.image_size)
    if settings.kind == "masked_patch":
        assert isinstance(built, VisionTransformer)  # which its settings are of
        masked = settings.masked_patch
        patches = built.grid**2
        told = corrupted_patches(patches, masked.share) if masked.counts == "exact" else patches
        return images, torch.empty(n, told, 2, dtype=torch.int64)
    if settings.kind == "mae":
        assert isinstance(built, VisionTransformer)
        return images, torch.empty(n, visible_count(built.grid**2, settings.mae.share), dtype=torch.int64)
    if settings.data.mixup_alpha:
        return images, torch.empty(n, model["num_classes"])
    return images, torch.empty(n, dtype=torch.int64)


class Saved(torch.autograd.graph.saved_tensors_hooks):
    """Counts what the forward pass saves for the backward pass, each storage once.

    Args:
        parameters: They do not count, unless a view of one that is gathered for its use alone keeps it.
        others: Do not count either.
        gathered: Parameters of more values are.
    """

    def __init__(self, parameters: list[Tensor], others: list[Tensor], gathered: float):
        self._seen: dict[int, int] = {}
        self._own = {_key(each) for each in [*parameters, *others]}
        self._gathered = {_key(each): id(each) for each in parameters if each.numel() > gathered}
        super().__init__(self._pack, lambda tensor: tensor)

    @property
    def bytes(self) -> int:
        """What was saved so far."""
        return sum(self._seen.values())

    def _pack(self, tensor: Tensor) -> Tensor:
        key = _key(tensor)
        if key not in self._own or self._gathered.get(key, id(tensor)) != id(tensor):
            self._seen[key] = tensor.untyped_storage().nbytes()
        return tensor


class Storages(TorchDispatchMode):
    """Counts the bytes of all storages that are made while it is open, as long as each lives.

    Args:
        others: Tensors whose storages do not count.

    Attributes:
        peak: The most at once.
    """

    def __init__(self, others: list[Tensor]):
        super().__init__()
        self.peak = self._now = 0
        self._seen = weakref.WeakSet(tensor.untyped_storage() for tensor in others)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run an operation and count what it made."""
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:
            return
        self._seen.add(storage)
        self._now += storage.nbytes()
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._let_go, storage.nbytes())

    def _let_go(self, size: int) -> None:
        self._now -= size


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
