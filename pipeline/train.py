"""One loop for every kind of training stage, read from top to bottom.

Where a run starts, in this order: its own newest checkpoint > converted weights (``init``) > scratch.
Where it stands is one integer, the samples consumed; schedules, saves and evaluations are functions of it.
"""

import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline import checkpoint, distributed, provenance, stop
from pipeline.config import TrainSettings
from pipeline.engines import create_engine
from pipeline.evaluate.classify import classify
from pipeline.images import to_model_input, training_transform
from pipeline.models import create_model
from pipeline.objectives.supervised import supervised_loss
from pipeline.resume import check_resume
from pipeline.schedule import learning_rate
from pipeline.telemetry import Telemetry
from pipeline.weights import Weights, first_values, resolve_model
from shards.atomic import write_text
from shards.dataset import Dataset
from shards.errors import StoppedOnRequestError, UserError
from shards.hashing import hash_int
from shards.loader import Loader


class MicroBatch(NamedTuple):
    """What goes through the model at once: images [n,3,H,W] float, labels [n] int64, and the seed of its dropout."""

    images: Tensor
    labels: Tensor
    seed: int


def train(settings: TrainSettings, out: Path) -> dict[str, Any]:
    """Run one training stage to its end, from wherever it stands; collective over all ranks.

    Args:
        settings: The stage.
        out: The stage's folder: checkpoints, metrics and settings go there.

    Returns:
        ``samples``, ``steps``, ``val`` and ``best`` metrics, ``checkpoint`` (path), ``images_per_second``.

    Raises:
        UserError: Anything wrong with settings, data or weights, before the first step.
        StoppedOnRequestError: A signal asked for a stop; everything is saved.
    """
    rank, world_size = distributed.rank(), distributed.world_size()

    # ---- data
    train_set = Dataset.open(settings.data.train, settings.data.exclude)
    val_set = Dataset.open(settings.data.val) if settings.data.val else None
    if val_set is not None and val_set.classes != train_set.classes:
        raise UserError(
            f"{settings.data.val} has other classes than {settings.data.train}; build both with one command"
        )
    loader = Loader(
        train_set, global_batch=settings.global_batch, rank=rank, world_size=world_size, seed=settings.seed,
        transform=training_transform(settings.data),
        threads=settings.data.threads, window_bytes=settings.data.window_bytes,
        quarantine=out / "quarantine.jsonl",
    )  # fmt: skip
    in_samples = {
        name: max(1, duration.samples(len(train_set), settings.global_batch))
        for name, duration in {
            "total": settings.duration, "warmup": settings.schedule.warmup, "log": settings.log_every,
            "save": settings.checkpoint.every, "evaluate": settings.evaluate.every,
        }.items()
    }  # fmt: skip
    steps = max(1, round(in_samples["total"] / settings.global_batch))
    total = steps * settings.global_batch

    # ---- model, objective, engine
    init = Weights(settings.init) if settings.init else None
    model_settings = resolve_model(settings, init, len(train_set.classes))
    with torch.device("meta"):
        template = create_model(**model_settings, seed=None)
    shapes = {name: tuple(parameter.shape) for name, parameter in template.named_parameters()}
    value_of = first_values(template, init, settings)
    engine = create_engine(lambda: create_model(**model_settings, seed=None), value_of, settings)
    objective = supervised_loss(settings, len(train_set.classes))

    def loss_fn(model: Any, batch: MicroBatch) -> Tensor:
        torch.manual_seed(batch.seed)  # dropout
        return objective(model, (batch.images, batch.labels))

    # ---- start
    state: dict[str, Any] = {"best": None, "val": None}
    loaded = checkpoint.newest(out / "checkpoints")
    if loaded is not None:
        check_resume(settings, loaded)
        loader.load_state_dict(loaded.state["loader"])
        engine.load(loaded.read)
        state = {key: loaded.state[key] for key in state}
    samples = loader.state_dict()["samples"]
    if rank == 0:
        provenance.note(out, settings)
        (out / "stopped.json").unlink(missing_ok=True)
    telemetry = Telemetry(out, out.name, total, samples) if rank == 0 else None
    stop.listen()

    # ---- what happens between two steps
    def due(what: str) -> bool:
        """Tell whether the step that ended at ``samples`` crossed a point of this kind."""
        return samples == total or samples // in_samples[what] > (samples - settings.global_batch) // in_samples[what]

    notes = {
        "settings": settings.model_dump(mode="json"), "model": model_settings, "classes": train_set.classes,
        "versions": provenance.versions(), "commit": provenance.commit(),
    }  # fmt: skip

    def save(best: bool) -> Path:
        noted = {**notes, **state, "loader": loader.state_dict()}
        path = checkpoint.save(out / "checkpoints", samples, engine.pieces(), shapes, noted, best)
        if rank == 0:
            checkpoint.prune(out / "checkpoints", settings.checkpoint.keep)
        return path

    def evaluate() -> bool:
        """Evaluate the held-out set; return whether it is the best so far."""
        engine.model.eval()
        state["val"] = classify(engine.model, val_set, settings.data.resolution, settings.evaluate.batch)
        if telemetry:
            telemetry.log(samples, {f"val_{key}": value for key, value in state["val"].items()})
        if state["best"] is not None and state["val"]["top1"] <= state["best"]["top1"]:
            return False
        state["best"] = {"samples": samples, **state["val"]}
        return True

    # ---- the loop
    micro_batch = settings.micro_batch or settings.global_batch // world_size
    window_loss, window_steps, window_wait, window_start = 0.0, 0, 0.0, time.monotonic()
    trained, began, path = 0, time.monotonic(), loaded.path if loaded else None
    batches = iter(loader)
    while samples < total:
        waited = time.monotonic()
        batch = next(batches)
        window_wait += time.monotonic() - waited

        images = to_model_input(batch.images, distributed.device())
        labels = torch.from_numpy(batch.labels).to(images.device)
        micro_batches = [
            MicroBatch(
                images[i : i + micro_batch], labels[i : i + micro_batch], hash_int(settings.seed, samples, rank, i)
            )
            for i in range(0, len(labels), micro_batch)
        ]
        samples += settings.global_batch
        lr = learning_rate(
            samples, shape=settings.schedule.shape, base=settings.optim.lr, end=settings.schedule.end_lr,
            warmup=in_samples["warmup"], total=total,
        )  # fmt: skip
        step = engine.step(micro_batches, loss_fn, lr)
        window_loss, window_steps, trained = window_loss + step.loss, window_steps + 1, trained + settings.global_batch

        saving, evaluating = due("save"), val_set is not None and due("evaluate")
        if not (saving or evaluating or due("log")):
            continue  # nothing below touches the hot path

        # A save or an evaluation ends the logging window too, so a resumed run logs the same lines.
        loss_sum, wait, stopping = distributed.sum_over_ranks([float(window_loss), window_wait, float(stop.asked())])
        seconds = time.monotonic() - window_start
        values = {
            "step": samples // settings.global_batch, "epoch": samples / len(train_set),
            "loss": loss_sum / window_steps / world_size, "lr": lr, "grad_norm": float(step.grad_norm),
            "images_per_second": window_steps * settings.global_batch / seconds,
            "data_wait": wait / world_size / seconds,
        }  # fmt: skip
        if telemetry:
            telemetry.log(samples, values)
        best = evaluating and evaluate()
        if telemetry:
            telemetry.show(samples, {**values, "val_top1": state["val"] and state["val"]["top1"]})
        if saving or best or stopping:
            path = save(best)
        if stopping and samples < total:
            if telemetry:
                telemetry.close()
                write_text(out / "stopped.json", json.dumps({"samples": samples, "checkpoint": str(path)}))
            raise StoppedOnRequestError(f"stopped on request at {samples} samples, saved in {path}; run again to go on")
        window_loss, window_steps, window_wait, window_start = 0.0, 0, 0.0, time.monotonic()

    batches.close()
    if telemetry:
        telemetry.close()
    return {
        "samples": samples, "steps": steps, "val": state["val"], "best": state["best"], "checkpoint": str(path),
        "images_per_second": trained / (time.monotonic() - began) if trained else None,
    }  # fmt: skip
