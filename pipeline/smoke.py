"""The smoke form of a training stage: the same kind of run, over in seconds on a laptop.

Only depth, width, resolution, batch and steps shrink, and with the steps all lengths that are given in them. Model kind
and options, objective, optimizer, shape of the schedule, augmentation, engine, ZeRO stage and precision stay.
"""

import shutil
import tempfile
import time
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from pipeline import distributed
from pipeline.config import TrainSettings
from pipeline.convert.recognise import open_source
from pipeline.datasettings import DataSettings
from pipeline.models import MODELS, create_model
from pipeline.models.hybrid import downsampling
from pipeline.recipe import PLACES, About
from pipeline.settings import check, merge
from pipeline.train import train
from pipeline.weights import check_model, write_weights
from shards.build import build
from shards.errors import UserError

STEPS = 6
WARMUP = 2  # of them, where there is a warm-up
BATCH = 8  # of a rank
PATCHES = 2  # along a side of the image
PATCHES_OF = {
    "finetune": 3,  # so that it stretches position embeddings
    "masked_patch": 4,  # so that of 8 corrupted patches one becomes another and one stays
    "mae": 4,  # so that of 16 patches 4 are seen
}
HEAD_WIDTH = 8
CHANNELS = 32  # of a ResNet's first stage: as many as its norms have groups

IMAGES = Path(__file__).parents[1] / "examples" / "clipart" / "images"
CLASSES = ("flags", "food", "tools")
IMAGES_A_CLASS = 16


def smoke_run(table: dict[str, Any], about: About | None, where: str, out: Path | None = None) -> dict[str, Any]:
    """Run the smoke form of a training stage; collective over all ranks.

    Args:
        table: Settings of the stage; data and weights that it does not name are made on the spot.
        about: Of its recipe, if it has one.
        where: The settings stand, for errors.
        out: Folder to keep what it makes; by default nothing is kept.

    Returns:
        What ``train`` returns of what is kept, and ``seconds`` that everything took but the imports.
    """
    stage = check(TrainSettings, merge(PLACES, table), where)  # before anything is made
    import_module(f"pipeline.engines.{stage.engine.kind}")  # DeepSpeed takes seconds, which are no part of the run
    began = time.monotonic()
    rank, ranks = distributed.rank(), distributed.world_size()
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)  # of anything this small threads wait for each other longer than they work
        folder = out
        if folder is None:
            mine = stack.enter_context(tempfile.TemporaryDirectory(prefix="patchmill-smoke-")) if rank == 0 else ""
            folder = Path(distributed.everyone(mine)[0]) / Path(where).stem
        folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(distributed.alone_in(folder))
        problem = None
        try:
            table, weights = _fill_in(table, about, folder, make=rank == 0)
        except UserError as error:
            problem = error
        distributed.raise_together(problem)  # rank 0 has made everything when the others go on
        settings = check(TrainSettings, table, where)
        check_model(settings, where)
        if weights is None and settings.init is not None:
            weights = open_source(settings.init).model
        result = train(shrink(settings, ranks, weights), folder)
    if out is None:
        del result["checkpoint"]
    return {**result, "seconds": round(time.monotonic() - began, 1)}


def shrink(settings: TrainSettings, ranks: int = 1, weights: dict[str, Any] | None = None) -> TrainSettings:
    """Return the smoke form of a stage.

    Args:
        settings: Of the stage.
        ranks: That will run it.
        weights: Model of the weights that it starts from. Where they are not shrunk, the model cannot be.
    """
    model = weights
    if settings.model.name is not None:
        model = {"name": settings.model.name} | settings.model.overrides()
        model = model if weights and _sizes(weights) == _sizes(model) else small_model(model)
    assert model is not None  # a stage without a model of its own starts from weights
    patches = PATCHES_OF.get(settings.kind, PATCHES)
    resolution = min(settings.data.resolution, patches * _pixels_a_patch(model))
    local = min(settings.global_batch // ranks, BATCH)
    accumulates = settings.accumulation(ranks) > 1 and local % 2 == 0
    whole = f"{STEPS} steps"
    schedule: dict[str, Any] = {}
    if not settings.schedule.warmup.is_nothing():
        schedule["warmup"] = f"{WARMUP} steps"
    if down := len(settings.schedule.milestones):
        places = (WARMUP + (STEPS - WARMUP) * (n + 1) / (down + 1) for n in range(down))
        schedule["milestones"] = [f"{round(place * local * ranks)} samples" for place in places]
    small = {
        "duration": whole, "global_batch": local * ranks, "micro_batch": local // 2 if accumulates else None,
        "log_every": "1 step", "evaluate": {"every": whole}, "schedule": schedule,
        "checkpoint": {"every": whole, "mirror": None}, "resume": None,  # of the real run, and its place
        "data": {"resolution": resolution, "resize": _scaled(settings.data, resolution)},
        "model": {} if settings.model.name is None else model,
    }  # fmt: skip
    if settings.probe is not None:
        small["probe"] = {"every": whole}
    if settings.kind == "mae":
        heads = settings.mae.decoder_heads
        small["mae"] = {"decoder_depth": min(settings.mae.decoder_depth, 2), "decoder_dim": HEAD_WIDTH * heads}
    return TrainSettings.model_validate(merge(settings.model_dump(exclude_unset=True), small))


def small_model(model: dict[str, Any]) -> dict[str, Any]:
    """Return what ``create_model`` takes for a model with its depth and width shrunk."""
    full = _sizes(model)
    small: dict[str, Any] = {}
    if "depth" in full:
        small = {"depth": min(full["depth"], 2), "embed_dim": HEAD_WIDTH * full["num_heads"]}
        if full.get("mlp_dim") is not None:
            small["mlp_dim"] = max(1, full["mlp_dim"] * small["embed_dim"] // full["embed_dim"])
    for units, width in (("units", "width"), ("backbone", "backbone_width")):
        if full.get(units) is not None:
            small |= {units: [1] * len(full[units]), width: CHANNELS}
    return model | small


def _sizes(model: dict[str, Any]) -> dict[str, Any]:
    sizes = ("patch_size", "depth", "embed_dim", "num_heads", "mlp_dim", "backbone", "backbone_width", "units", "width")
    return {key: value for key, value in (MODELS[model["name"]][1] | model).items() if key in sizes}


def _pixels_a_patch(model: dict[str, Any]) -> int:
    """Return how many pixels along a side a token, or a pixel of a ResNet's last map, stands for."""
    full = _sizes(model)
    units = full.get("units", full.get("backbone"))
    return full.get("patch_size", 1) * (1 if units is None else downsampling(units))


def _scaled(data: DataSettings, resolution: int) -> int | None:
    return data.resize and round(data.resize * resolution / data.resolution)


def _fill_in(
    table: dict[str, Any], about: About | None, folder: Path, make: bool
) -> tuple[dict[str, Any], dict | None]:
    """Give a smoke run the data and the weights that its settings do not name, made in ``folder`` on the spot.

    Args:
        table: Settings of the stage.
        about: Says whose weights a stage of fine-tuning wants.
        folder: For what is made.
        make: This rank makes it; the others only learn where it will be.

    Returns:
        The settings with all places, and the model of the weights, if any were made.
    """
    if "train" not in table.get("data", {}):
        if make:
            _make_data(folder)
        table = merge(table, {"data": {part: str(folder / "set" / part) for part in ("train", "val")}})
    if table.get("kind") != "finetune" or about is None or "init" in table or "name" in table.get("model", {}):
        return table, None
    model = small_model({"name": about.model})
    model |= {"image_size": PATCHES * _pixels_a_patch(model), "num_classes": len(CLASSES)}
    path = folder / f"{about.model}.safetensors"  # a run of other weights may be there
    if make:
        write_weights(path, create_model(**model).state_dict(), {"model": model, "classes": sorted(CLASSES)})
    return table | {"init": str(path)}, model


def _make_data(folder: Path) -> None:
    """Make a data set of a few of the example's drawings, ``folder/set/train`` and ``/val``."""
    if not IMAGES.is_dir():
        raise UserError(f"--smoke takes the drawings of {IMAGES}, which are not there; set data.train and data.val")
    for name in CLASSES:
        (folder / "images" / name).mkdir(parents=True, exist_ok=True)
        for path in sorted((IMAGES / name).iterdir())[:IMAGES_A_CLASS]:
            shutil.copy(path, folder / "images" / name)
    build(folder / "images", folder / "set", split={"val": 0.25}, workers=1)
