"""Which reader a path is for, told by what is there."""

import json
import zipfile
from collections.abc import Collection
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.convert import checkpoint, npz, timm, torchvision, transformers
from pipeline.convert.deepspeed_zero import is_zero, of_zero
from pipeline.convert.places import at, read
from pipeline.convert.source import ODD, Source
from pipeline.convert.tensors import Tensors, of_npz, of_safetensors, of_torch
from pipeline.models import Model
from shards.errors import UserError

NAMINGS = (transformers, torchvision, npz, timm)
WRAPPERS = ("module.", "_orig_mod.", "model.")
"""What training programs put before the names of a model."""
KNOWN = (
    "a checkpoint or training stage of Patchmill, a DeepSpeed ZeRO directory, safetensors, timm's, transformers' or "
    "torchvision's weights, or an official .npz"
)


def open_source(
    path: str | Path, which: str = "latest", ema: bool = False, given: dict[str, Any] | None = None
) -> Source:
    """Return the model at a path, whatever its format.

    Args:
        path: File or folder.
        which: For a training stage's folder, the pointer to follow: ``"latest"`` or ``"best"``.
        ema: Take the moving average of the weights.
        given: Settings of the model that nothing there tells, or tells wrongly.

    Raises:
        UserError: It is of no known format, or of an architecture that no model here has, or does not tell enough.
    """
    path, given = Path(path), given or {}
    if not path.exists():
        raise UserError(f"there is no {path}; give {KNOWN}")
    try:
        return replace(_open(path, which, ema, given), path=path)
    except (*ODD, zipfile.BadZipFile, NotImplementedError) as error:
        raise UserError(
            f"{path} is laid out otherwise than its names make believe ({error!r}): it is of an architecture or a "
            "version that is not known here"
        ) from error


def _open(path: Path, which: str, ema: bool, given: dict[str, Any]) -> Source:
    if path.is_dir() and checkpoint.is_ours(path):
        found = checkpoint.source(checkpoint.find_checkpoint(path, which), ema)
        return replace(found, model=found.model | given)
    tensors, config = _tensors(path, ema)
    names = set(tensors.shapes)
    if "model" in tensors.note and timm.knows(names):
        note = dict(tensors.note)
        made = Source("safetensors", note.pop("model") | given, tensors.read, note.pop("classes"), note)
        return read(tensors, made, {name: at(name) for name in made.parameters()})
    for naming in NAMINGS:
        if naming.knows(names):
            found = naming.source(tensors, config, given)
            return replace(found, note={k: v for k, v in tensors.note.items() if k not in ("model", "classes")})
    raise UserError(
        f"{path} has tensors such as {', '.join(sorted(names)[:3]) or 'none'}, which no known format has; give {KNOWN}"
    )


def load_model(source: str | Path, ema: bool = False) -> tuple[Model, list[str]]:
    """Return (model on the CPU in evaluation mode, class names) of weights in any format.

    With ``ema``, of a checkpoint or folder, the model of the moving average of the weights.
    """
    found = open_source(source, ema=ema)
    return found.build(), found.classes


def _tensors(path: Path, ema: bool) -> tuple[Tensors, dict[str, Any]]:
    """Return the tensors at a path, and the config.json that tells of them, if there is one."""
    folder = path if path.is_dir() else path.parent
    config = {}
    if (folder / "config.json").is_file():
        with suppress(ValueError):
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict) or not config.keys() & {"model_type", "architecture"}:
            config = {}  # of something else
    files = _files(path)
    if files and _is_torchs(files[0]):
        return _unwrapped(of_torch(files, path, ema)), config
    if ema:
        raise UserError(f"{path} holds one set of weights; give the checkpoint, or make it with `convert --ema`")
    if files and zipfile.is_zipfile(files[0]):
        return of_npz(files[0]), config
    if files:
        return _unwrapped(of_safetensors(files, path)), config
    if zero := is_zero(path):
        return _unwrapped(of_zero(zero)), config
    raise UserError(f"there is no whole latest checkpoint in {path}, nor other weights; give {KNOWN}")


def _files(path: Path) -> list[Path]:
    """Return the files of weights at a path: one, or as many as an index in a folder tells of."""
    if path.is_file():
        return [path]
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return [path / name]
        if (path / f"{name}.index.json").is_file():
            index = json.loads((path / f"{name}.index.json").read_text(encoding="utf-8"))
            names, there = sorted(set(index["weight_map"].values())), {each.name for each in path.iterdir()}
            if missing := [each for each in names if each not in there]:
                raise UserError(f"{path} has no {missing[0]}, which {name}.index.json names; get all of it")
            return [path / each for each in names]
    return []


def _is_torchs(file: Path) -> bool:
    """Tell whether torch.save wrote a file: an archive that is not NumPy's, or a bare pickle."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            return not any(name.endswith(".npy") for name in archive.namelist())
    with open(file, "rb") as opened:
        start = opened.read(9)
    return start[:1] == b"\x80" and start[8:] != b"{"


def _unwrapped(tensors: Tensors) -> Tensors:
    """Take off what training programs put before every name of a model."""
    before = ""
    while prefix := next((each for each in WRAPPERS if _all_begin(tensors.shapes.keys(), before + each)), None):
        before += prefix
    shapes = {name.removeprefix(before): shape for name, shape in tensors.shapes.items()}
    return replace(
        tensors,
        shapes=shapes,
        read=lambda name: tensors.read(before + name),
        row=lambda name, i: tensors.row(before + name, i),
    )


def _all_begin(names: Collection[str], prefix: str) -> bool:
    return bool(names) and all(name.startswith(prefix) for name in names)  # of no names, without end
