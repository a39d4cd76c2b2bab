"""Stock DeepSpeed ZeRO directories, as its own ``save_checkpoint`` writes them: their float32 masters, by name.

Stages 1 and 2 put all parameters of a group into one flat vector, and each rank has a stretch of it. Stage 3 cuts each
parameter into equal parts, the last one padded; a rank's parts lie one after the other. Frozen parameters are kept
apart, in the dtype of the model; those with two names are kept under one.
Source: deepspeed/utils/zero_to_fp32.py.
"""

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.convert.tensors import Tensors, load_torch
from pipeline.mapped import Mapped
from shards.errors import UserError


class _Inert:
    """Stands for classes of DeepSpeed, so that none of its code runs."""

    def __init__(self, *arguments: Any, **settings: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


HARMLESS = [
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_Inert, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Inert, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_Inert, "deepspeed.utils.tensor_fragment.fragment_address"),
    (_Inert, "deepspeed.utils.tensor_fragment.tensor_fragment"),
]
"""What is in these files beside tensors, and what is taken in its place."""


def is_zero(folder: Path) -> Path | None:
    """Return the directory of a DeepSpeed checkpoint: this one, or the one that its ``latest`` names; or None."""
    if list(folder.glob("*_model_states.pt")):
        return folder
    try:
        named = folder / (folder / "latest").read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    return named if list(named.glob("*_model_states.pt")) else None


def of_zero(folder: Path) -> Tensors:
    """Read the directory of one checkpoint, one parameter at a time.

    Raises:
        UserError: Files are missing, or it was made with tensor parallelism, or in a way that is not known.
    """
    mapped = Mapped(lambda path: load_torch(path, HARMLESS))
    models = _by_rank(folder, "model_states")
    optimizers = _by_rank(folder, "optim_states")
    first = mapped(models[0])
    shapes = {name: tuple(value.shape) for name, value in (first.get("module") or {}).items()}
    if not optimizers:  # stage 0: nothing is cut
        return _whole(folder, mapped, models[0], shapes, {})
    state = mapped(optimizers[0])["optimizer_state_dict"]
    if "zero_stage" not in state:
        raise UserError(f"{optimizers[0]} is of no ZeRO checkpoint; give what save_checkpoint of stages 1 to 3 wrote")
    count = state["partition_count"]
    count = max(count) if isinstance(count, list) else count
    if len(optimizers) != count:
        raise UserError(
            f"{folder} has {len(optimizers)} files of {count} ranks; find the others, or use another checkpoint"
        )
    # A list of groups of parameters, each a table of names and shapes.
    groups = [{name: tuple(shape) for name, shape in group.items()} for group in first["param_shapes"]]
    if state["zero_stage"] <= 2:
        readers = _stretches(folder, mapped, optimizers, groups, state.get("param_alignment_paddings"))
        others = {name: shape for name, shape in shapes.items() if name not in readers}  # frozen ones and buffers
        found = _whole(folder, mapped, models[0], others, first["shared_params"])
    else:
        if len(models) != count:
            raise UserError(f"{folder} has {len(models)} model files of {count} ranks; find the others")
        readers = _parts(mapped, optimizers, groups)
        frozen = {name: tuple(shape) for name, shape in (first.get("frozen_param_shapes") or {}).items()}
        readers |= _frozen_parts(mapped, models, frozen)
        groups.append(frozen)
        others = {name: shapes[name] for name in first["buffer_names"] or [] if name in shapes}
        found = _whole(folder, mapped, models[0], others, first["shared_params"])
    whole = {name: shape for group in groups for name, shape in group.items()}
    shared = {name: to for name, to in first["shared_params"].items() if to in readers}
    shapes = found.shapes | whole | {name: whole[to] for name, to in shared.items()}

    def read(name: str) -> Tensor:
        name = shared.get(name, name)
        return readers[name]().reshape(whole[name]) if name in readers else found.read(name)

    return Tensors(folder, shapes, read, lambda name, i: read(name)[i], {})


def _by_rank(folder: Path, what: str) -> list[Path]:
    pattern = re.compile(rf"(?:bf16_)?(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_{what}\.pt")
    files = [(match, path) for path in folder.glob(f"*_{what}.pt") if (match := pattern.fullmatch(path.name))]
    if any(int(match[2]) for match, _ in files):
        raise UserError(
            f"{folder} was made with tensor parallelism, which no model here has; merge it with its own tools"
        )
    return [path for _, path in sorted((int(match[1] or 0), path) for match, path in files)]


def _whole(folder: Path, mapped: Mapped, file: Path, shapes: dict[str, tuple], shared: dict[str, str]) -> Tensors:
    """Read what every rank has whole, in the dtype of the model."""
    shapes = {name: shape for name, shape in shapes.items() if name not in shared}

    def read(name: str) -> Tensor:
        return mapped.copied(mapped(file)["module"][name])

    return Tensors(folder, shapes, read, lambda name, i: read(name)[i], {})


Reader = Callable[[], Tensor]


def _stretches(
    folder: Path, mapped: Mapped, files: list[Path], groups: list[dict[str, tuple]], paddings: list | None
) -> dict[str, Reader]:
    """Return a reader of each parameter of stages 1 and 2, flat."""
    key = "single_partition_of_fp32_groups"
    readers: dict[str, Reader] = {}
    for g, group in enumerate(groups):
        sizes = [mapped(file)["optimizer_state_dict"][key][g].numel() for file in files]
        offset = 0
        for p, (name, shape) in enumerate(group.items()):
            readers[name] = _stretch(mapped, files, key, g, sizes, offset, math.prod(shape))
            offset += math.prod(shape) + (paddings[g][p] if paddings is not None else 0)
        align = 2 * len(files)  # the vector is padded up to this
        if -(-offset // align) != -(-sum(sizes) // align):
            raise UserError(
                f"{folder} has {sum(sizes)} values for parameters of {offset}: its files are not of one checkpoint"
            )
    return readers


def _stretch(
    mapped: Mapped, files: list[Path], key: str, group: int, sizes: list[int], offset: int, count: int
) -> Reader:
    def read() -> Tensor:
        pieces, start = [], 0  # of this rank's part of the vector
        for file, size in zip(files, sizes, strict=True):
            low, high = max(offset, start), min(offset + count, start + size)
            if low < high:
                flat = mapped(file)["optimizer_state_dict"][key][group]
                pieces.append(mapped.copied(flat[low - start : high - start]))
            start += size
        return torch.cat(pieces)

    return read


def _parts(mapped: Mapped, files: list[Path], groups: list[dict[str, tuple]]) -> dict[str, Reader]:
    """Return a reader of each parameter of stage 3, flat. Every rank has as much of it, in one or more vectors."""
    key = "fp32_flat_groups"
    sizes = [flat.numel() for flat in mapped(files[0])["optimizer_state_dict"][key]]
    readers: dict[str, Reader] = {}
    offset = 0
    for name, shape in ((name, shape) for group in groups for name, shape in group.items()):
        part = -(-math.prod(shape) // len(files))
        readers[name] = _part(mapped, files, key, sizes, offset, part, math.prod(shape))
        offset += part
    if offset != sum(sizes):
        raise UserError(
            f"{files[0]} has {sum(sizes)} values for parameters of {offset}: it is not of the same checkpoint as others"
        )
    return readers


def _part(mapped: Mapped, files: list[Path], key: str, sizes: list[int], offset: int, part: int, count: int) -> Reader:
    def pieces() -> Iterator[Tensor]:
        for file in files:
            start = 0
            for vector, size in enumerate(sizes):
                low, high = max(offset, start), min(offset + part, start + size)
                if low < high:
                    flat = mapped(file)["optimizer_state_dict"][key][vector]
                    yield mapped.copied(flat[low - start : high - start])
                start += size

    return lambda: torch.cat(list(pieces()))[:count]


def _frozen_parts(mapped: Mapped, files: list[Path], shapes: dict[str, Any]) -> dict[str, Reader]:
    def reader(name: str) -> Reader:
        return lambda: torch.cat([mapped.copied(mapped(file)["frozen_param_fragments"][name]) for file in files])[
            : math.prod(shapes[name])
        ]

    return {name: reader(name) for name in shapes}
