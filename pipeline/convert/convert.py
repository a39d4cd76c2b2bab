"""A model from any format into another: read, changed, proven, written, with a card."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pipeline.convert import change, npz, proof, safetensors, transformers
from pipeline.convert.card import card, is_card
from pipeline.convert.recognise import open_source
from pipeline.convert.source import Source, said
from pipeline.convert.tensors import NOTE
from shards.atomic import commit_folder, partial_folder, whole_file, write_text
from shards.errors import UserError


@dataclass(frozen=True)
class Target:
    """A format to write.

    Attributes:
        refusal: Of a model, what the format cannot say of it; None where it can say all.
        write: Writes (path, source, cast, note), tensor by tensor.
        change_note: Puts another note into what was written.
        folder: Whether it is a folder.
        plain: Whether it knows position embeddings only as a learned vector for each token.
    """

    refusal: Callable[[nn.Module], str | None]
    write: Callable[[Path, Source, Callable[[Tensor], Tensor], dict[str, Any]], None]
    change_note: Callable[[Path, dict[str, Any]], None]
    folder: bool = False
    plain: bool = True


def _write_ours(path: Path, source: Source, cast: Callable[[Tensor], Tensor], note: dict[str, Any]) -> None:
    like = {name: cast(parameter) for name, parameter in source.parameters().items()}
    noted = {NOTE: json.dumps(note)}
    safetensors.write(path, like, lambda name: cast(source.tensor(name)), noted, safetensors.ROOM)


def _change_ours(path: Path, note: dict[str, Any]) -> None:
    safetensors.change_metadata(path, {NOTE: json.dumps(note)})


TARGETS = {
    "safetensors": Target(lambda made: None, _write_ours, _change_ours, plain=False),
    "transformers": Target(transformers.refusal, transformers.write, transformers.change_note, folder=True),
    "npz": Target(npz.refusal, npz.write, npz.change_note),
}


def convert(
    source: str | Path,
    destination: str | Path,
    to: str = "safetensors",
    which: str = "latest",
    ema: bool = False,
    image_size: int | None = None,
    resize: str = "official",
    classes: str | None = None,
    dtype: str = "float32",
    given: list[str] | None = None,
) -> dict[str, Any]:
    """Convert a model, and prove that it is the same afterwards.

    Args:
        source: Anything that ``open_source`` reads.
        destination: File to write, or of transformers the folder.
        to: One of ``TARGETS``.
        which: Of a training stage's folder: ``"latest"`` or ``"best"``.
        ema: Take the moving average of the weights.
        image_size: Side of the images that it is to take, in pixels.
        resize: How position embeddings get there: ``"official"`` or ``"bicubic"``.
        classes: As in ``change.with_classes``.
        dtype: Of the values that are written.
        given: KEY=VALUE of settings of the model that its files do not tell, or tell wrongly.

    Returns:
        ``weights`` (path), ``card`` (path), ``parameters`` (their number), ``proof``; and ``samples`` where known.

    Raises:
        UserError: The source does not tell enough, or the target cannot say all of the model.
        PatchmillError: What was written is not the same model.
    """
    if to not in TARGETS:
        raise UserError(f"there is no format {to!r}; the formats are: {', '.join(TARGETS)}")
    target, destination = TARGETS[to], Path(destination)
    cast = change.caster(dtype)
    _check_destination(destination, target.folder)

    # ---- read
    found = change.without_decoder(open_source(source, which, ema, said(given or [])))
    before_size, before_classes = found.template().image_size, found.template().num_classes

    # ---- change
    if image_size is not None:
        found = change.resized(found, image_size, resize)
    if classes is not None:
        found = change.with_classes(found, classes)
    if target.plain:
        found = change.learned(found)
    made = found.template()
    if lacks := target.refusal(made):
        raise UserError(f"{to} cannot hold {source}: it has no place for {lacks}")
    note = {"model": found.model, "classes": found.classes, **found.note, "from": found.format, "changed": {}}
    if made.image_size != before_size:
        note["changed"]["image size"] = f"{before_size} to {made.image_size} pixels, {resize}"
    if made.num_classes != before_classes:
        note["changed"]["head"] = f"{before_classes:,} classes to {made.num_classes:,}"

    # ---- write, read again, compare
    before = proof.answers(found)
    with _appearing(destination, target.folder) as partial:
        target.write(partial, found, cast, note)
        after = proof.answers(open_source(partial))
        note["proof"] = proof.compare(before, after, dtype, made.image_size)
        target.change_note(partial, note)
        # Before the weights appear: a crash between the two leaves no weights that nobody knows.
        about = destination / "README.md" if target.folder else _card_of(destination)
        write_text(partial / "README.md" if target.folder else about, card(note, made, to, destination))
    known = {"samples": note["samples"]} if "samples" in note else {}
    parameters = sum(parameter.numel() for parameter in made.parameters())
    return {"weights": str(destination), "card": str(about), **known, "parameters": parameters, "proof": note["proof"]}


def _check_destination(destination: Path, folder: bool) -> None:
    """Raise a UserError where something else would be overwritten."""
    if not folder:
        if destination.is_dir():
            raise UserError(f"{destination} is a folder; give the file to write")
        about = _card_of(destination)
        if about.exists() and not is_card(about):
            raise UserError(f"{about}, where the card goes, is there, and no conversion wrote it; give another name")
    elif destination.exists():
        there = {each.name for each in destination.iterdir()} if destination.is_dir() else {destination.name}
        others = sorted(there - set(transformers.FILES) if transformers.is_ours(destination) else there)
        if others:
            raise UserError(
                f"{destination} has {others[0]}, which no conversion wrote; give a folder that is not there"
            )


def _card_of(destination: Path) -> Path:
    return destination.with_name(f"{destination.stem}.README.md")


@contextmanager
def _appearing(destination: Path, folder: bool) -> Iterator[Path]:
    """Yield a temporary file or folder that gets its name when all went well, and is gone otherwise."""
    if not folder:
        with whole_file(destination) as partial:
            yield partial
            partial.chmod(0o644)
        return
    partial = partial_folder(destination)
    try:
        yield partial
        for path in partial.iterdir():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        commit_folder(partial, destination)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
