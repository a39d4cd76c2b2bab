"""Stock DeepSpeed ZeRO directories, as its own ``save_checkpoint`` writes them: their float32 masters, by name.

Stages 1 and 2 put all parameters of a group into one flat vector, and each rank has a stretch of it. Stage 3 cuts each
parameter into equal parts, the last one padded; a rank's parts lie one after the other. Frozen parameters are kept
apart, in the dtype of the model; those with two names are kept under one.
Source: deepspeed/utils/zero_to_fp32.py.
"""

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.convert.source import ODD
from pipeline.convert.tensors import Tensors, is_plain, load_torch
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
        return named if list(named.glob("*_model_states.pt")) else None
    except (OSError, ValueError):  # it is not there, or damaged
        return None


@dataclass(frozen=True)
class _Model:
    """What a file of ``model_states`` holds, as far as it is asked for."""

    module: dict[str, Tensor]
    groups: list[dict[str, tuple[int, ...]]]  # of parameters: a table of names and shapes each
    shared: dict[str, str]  # the name that a parameter with two is kept under
    buffers: list[str]
    frozen: dict[str, tuple[int, ...]]
    fragments: dict[str, Any]  # this rank's parts of the frozen ones, which only stage 3 goes by


@dataclass(frozen=True)
class _Optimizer:
    """What a file of ``optim_states`` holds, as far as it is asked for."""

    stage: int
    ranks: int
    flat: list[Tensor]  # [values] each
    paddings: list[list[int]] | None  # behind each parameter of each group


@contextmanager
def _of(path: Path) -> Iterator[None]:
    """Tell of which file it is that it is laid out in another way."""
    try:
        yield
    except ODD as error:
        raise UserError(
            f"{path} is not laid out as DeepSpeed does ({error!r}); find the file that save_checkpoint wrote, or use "
            "another checkpoint"
        ) from error


def _model(path: Path) -> _Model:
    with _of(path):
        told = _be(dict, load_torch(path, HARMLESS))
        module = _be(dict, told.get("module"))
        return _Model(
            {name: _plain(name, value) for name, value in module.items() if _is_weight(value)},
            [_shapes(group) for group in _be(list, told.get("param_shapes"))],
            {_be(str, name): _be(str, to) for name, to in _be(dict, told.get("shared_params")).items()},
            [_be(str, name) for name in _be(list, told.get("buffer_names"))],
            _shapes(told.get("frozen_param_shapes")),
            _be(dict, told.get("frozen_param_fragments")),
        )


def _optimizer(path: Path) -> _Optimizer:
    with _of(path):
        state = _be(dict, _be(dict, load_torch(path, HARMLESS)).get("optimizer_state_dict"))
        if "zero_stage" not in state:
            raise UserError(f"{path} is of no ZeRO checkpoint; give what save_checkpoint of stages 1 to 3 wrote")
        stage, count = _count(state["zero_stage"]), state["partition_count"]
        key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
        flat = [_plain(key, each) for each in _be(list, state[key])]
        if wrong := [list(each.shape) for each in flat if each.dim() != 1]:
            raise ValueError(f"a vector in {key} has the shape {wrong[0]}")
        paddings = state.get("param_alignment_paddings")  # of newer versions
        return _Optimizer(
            stage,
            max(map(_count, count)) if isinstance(count, list) else _count(count),
            flat,
            None
            if paddings is None
            else [[_count(each) for each in _be(list, group)] for group in _be(list, paddings)],
        )


def _is_weight(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()  # no counter or index, which are buffers, too


def _plain(name: str, value: Any) -> Tensor:
    if not is_plain(value) or not value.is_floating_point():
        raise ValueError(f"{name} is no plain tensor of numbers")
    return value


def _shapes(told: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(_count(each) for each in _be(tuple, shape)) for name, shape in _be(dict, told).items()}


def _be(kind: type, value: Any) -> Any:
    """Return a value that is of a kind, and an empty one in place of None."""
    if value is not None and not isinstance(value, kind):
        raise TypeError(f"a {type(value).__name__} stands where a {kind.__name__} should")
    return kind() if value is None else value


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{str(value)[:50]!r} is no count")
    return value


def of_zero(folder: Path) -> Tensors:
    """Read the directory of one checkpoint, one parameter at a time.

    Raises:
        UserError: Files are missing, damaged or of several checkpoints, or it was made with tensor parallelism, or in
            a way that is not known.
    """
    model_of, optimizer_of = Mapped(_model), Mapped(_optimizer)
    models = _by_rank(folder, "model_states")
    optimizers = _by_rank(folder, "optim_states")
    if not models:
        raise UserError(f"{folder} has no mp_rank_00_model_states.pt; give what save_checkpoint wrote, all of it")
    first = model_of(models[0])
    shapes = {name: tuple(value.shape) for name, value in first.module.items()}
    if not optimizers:  # stage 0: nothing is cut
        return _whole(folder, model_of, models[0], shapes, {})
    state = optimizer_of(optimizers[0])
    if len(optimizers) != state.ranks:
        raise UserError(
            f"{folder} has {len(optimizers)} files of {state.ranks} ranks; find the others, or use another checkpoint"
        )
    _check_ranks(optimizers)
    for file in optimizers[1:]:
        _check_same(file, optimizer_of(file), optimizers[0], state)
    if state.stage <= 2:
        readers = _stretches(folder, optimizer_of, optimizers, first.groups, state.paddings)
        groups = first.groups
        others = {name: shape for name, shape in shapes.items() if name not in readers}  # frozen ones and buffers
    else:
        if len(models) != state.ranks:
            raise UserError(f"{folder} has {len(models)} model files of {state.ranks} ranks; find the others")
        _check_ranks(models)
        readers = _parts(optimizer_of, optimizers, first.groups)
        readers |= _frozen_parts(model_of, models, first.frozen)
        groups = [*first.groups, first.frozen]
        others = {name: shapes[name] for name in first.buffers if name in shapes}
    found = _whole(folder, model_of, models[0], others, first.shared)
    whole = {name: shape for group in groups for name, shape in group.items()}
    shared = {name: to for name, to in first.shared.items() if to in readers}
    shapes = found.shapes | whole | {name: whole[to] for name, to in shared.items()}

    def read(name: str) -> Tensor:
        name = shared.get(name, name)
        return readers[name]().reshape(whole[name]) if name in readers else found.read(name)

    return Tensors(folder, shapes, read, lambda name, i: read(name)[i], {})


def _check_same(file: Path, has: _Optimizer, other: Path, wanted: _Optimizer) -> None:
    """Raise a UserError unless two ranks' files may be of one checkpoint."""
    for what, one, two in (
        ("ZeRO stage", has.stage, wanted.stage),
        ("number of ranks", has.ranks, wanted.ranks),
        ("number of vectors", len(has.flat), len(wanted.flat)),
        # In stage 3 all ranks have as much of each parameter; else the last one may have less.
        *([("lengths", *([each.numel() for each in of.flat] for of in (has, wanted)))] if wanted.stage == 3 else []),
    ):
        if one != two:
            raise UserError(f"{file} is not of the checkpoint of {other}: {what} {one}, and there {two}")


def _by_rank(folder: Path, what: str) -> list[Path]:
    pattern = re.compile(rf"(?:bf16_)?(?:zero_pp_rank_(\d{{1,9}})_)?mp_rank_(\d{{1,9}})_{what}\.pt")
    files = [(match, path) for path in folder.glob(f"*_{what}.pt") if (match := pattern.fullmatch(path.name))]
    if any(int(match[2]) for match, _ in files):
        raise UserError(
            f"{folder} was made with tensor parallelism, which no model here has; merge it with its own tools"
        )
    return [path for _, path in sorted((int(match[1] or 0), path) for match, path in files)]


def _check_ranks(files: list[Path]) -> None:
    """Raise a UserError unless there is one file of each rank."""
    for rank, path in enumerate(files):
        found = re.search(r"zero_pp_rank_(\d+)_", path.name)
        if (number := int(found[1]) if found else 0) != rank:
            wrong = f"no file of rank {rank}" if number > rank else f"two files of rank {number}"
            raise UserError(
                f"{path.parent} has {wrong} beside {path.name}; give the files of one checkpoint, all of them"
            )


def _whole(folder: Path, mapped: Mapped, file: Path, shapes: dict[str, tuple], shared: dict[str, str]) -> Tensors:
    """Read what every rank has whole, in the dtype of the model."""
    shapes = {name: shape for name, shape in shapes.items() if name not in shared}

    def read(name: str) -> Tensor:
        return mapped.copied(mapped(file).module[name])

    return Tensors(folder, shapes, read, lambda name, i: read(name)[i], {})


Reader = Callable[[], Tensor]


def _stretches(
    folder: Path, mapped: Mapped, files: list[Path], groups: list[dict[str, tuple]], paddings: list[list[int]] | None
) -> dict[str, Reader]:
    """Return a reader of each parameter of stages 1 and 2, flat."""
    readers: dict[str, Reader] = {}
    for g, group in enumerate(groups):
        sizes = [mapped(file).flat[g].numel() for file in files]
        offset = end = 0
        for p, (name, shape) in enumerate(group.items()):
            readers[name] = _stretch(mapped, files, g, sizes, offset, math.prod(shape))
            end = offset + math.prod(shape)
            offset = end + (paddings[g][p] if paddings is not None else 0)
        align = 2 * len(files)  # the vector is padded up to this
        if end > sum(sizes) or -(-offset // align) != -(-sum(sizes) // align):
            raise UserError(
                f"{folder} has {sum(sizes)} values for parameters of {offset}: its files are not of one checkpoint"
            )
    return readers


def _stretch(mapped: Mapped, files: list[Path], group: int, sizes: list[int], offset: int, count: int) -> Reader:
    def read() -> Tensor:
        pieces, start = [], 0  # of this rank's part of the vector
        for file, size in zip(files, sizes, strict=True):
            low, high = max(offset, start), min(offset + count, start + size)
            if low < high:
                flat = mapped(file).flat[group]
                pieces.append(mapped.copied(flat[low - start : high - start]))
            start += size
        return torch.cat(pieces)

    return read


def _parts(mapped: Mapped, files: list[Path], groups: list[dict[str, tuple]]) -> dict[str, Reader]:
    """Return a reader of each parameter of stage 3, flat. Every rank has as much of it, in one or more vectors."""
    sizes = [flat.numel() for flat in mapped(files[0]).flat]
    readers: dict[str, Reader] = {}
    offset = 0
    for name, shape in ((name, shape) for group in groups for name, shape in group.items()):
        part = -(-math.prod(shape) // len(files))
        readers[name] = _part(mapped, files, sizes, offset, part, math.prod(shape))
        offset += part
    if offset != sum(sizes):
        raise UserError(
            f"{files[0]} has {sum(sizes)} values for parameters of {offset}: it is not of the same checkpoint as others"
        )
    return readers


def _part(mapped: Mapped, files: list[Path], sizes: list[int], offset: int, part: int, count: int) -> Reader:
    def pieces() -> Iterator[Tensor]:
        for file in files:
            start = 0
            for vector, size in enumerate(sizes):
                low, high = max(offset, start), min(offset + part, start + size)
                if low < high:
                    flat = mapped(file).flat[vector]
                    yield mapped.copied(flat[low - start : high - start])
                start += size

    return lambda: torch.cat(list(pieces()))[:count]


def _frozen_parts(mapped: Mapped, files: list[Path], shapes: dict[str, tuple]) -> dict[str, Reader]:
    """Return a reader of each frozen parameter of stage 3, flat."""

    def reader(name: str, count: int) -> Reader:
        return lambda: torch.cat([mapped.copied(mapped(file).fragments[name]).flatten() for file in files])[:count]

    for name, shape in shapes.items():
        for file in files:
            part = mapped(file).fragments.get(name)
            with _of(file):
                part = None if part is None else _plain(name, part)
            if part is None or part.numel() != -(-math.prod(shape) // len(files)):
                has = "none" if part is None else f"{part.numel()} values"
                raise UserError(
                    f"{file} has {has} of its part of {name} {list(shape)}: it is not of the same checkpoint as others"
                )
    return {name: reader(name, math.prod(shape)) for name, shape in shapes.items()}
