"""One loop for every kind of training stage, read from top to bottom.

Where a run starts, in this order: its own newest checkpoint > converted weights (``init``) > scratch.
Where it stands is one integer, the samples consumed; schedules, saves and evaluations are functions of it.
"""

import json
import math
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline import checkpoint, distributed, provenance, stop
from pipeline.config import TrainSettings
from pipeline.data import open_data
from pipeline.droppath import drop_path_draws
from pipeline.engines import create_engine
from pipeline.models import create_model
from pipeline.objectives import create_objective
from pipeline.prefetch import prefetched
from pipeline.resume import check_resume
from pipeline.telemetry import Telemetry
from pipeline.weights import Weights, first_values, resolve_model
from pipeline.window import Window
from shards.atomic import write_text
from shards.batch import Batch
from shards.errors import PatchmillError, StoppedOnRequestError, UserError
from shards.hashing import hash_int


class MicroBatch(NamedTuple):
    """What goes through the model at once: what the objective prepared, n of each, and what dropouts draw."""

    inputs: tuple[Tensor, ...]
    draws: Tensor
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
    loaded = checkpoint.newest(out / "checkpoints")
    if rank == 0 and loaded is None:
        (out / "quarantine.jsonl").unlink(missing_ok=True)  # of a run that nothing is left of
    state: dict[str, Any] = {"steps": 0, "best": None, "val": None, "first_batch": settings.global_batch}
    if loaded is not None:
        check_resume(settings, loaded)
        state |= {key: loaded.state[key] for key in state if key in loaded.state}
    data = open_data(settings, out, state["first_batch"])
    loader, schedule = data.loader, data.schedule

    # ---- model, objective, engine
    init = Weights(settings.init) if settings.init else None
    model_settings = resolve_model(settings, init, len(data.classes))
    with torch.device("meta"):
        template = create_model(**model_settings, seed=None)
    shapes = {name: tuple(parameter.shape) for name, parameter in template.named_parameters()}
    value_of = first_values(template, init, settings)
    engine = create_engine(lambda: create_model(**model_settings, seed=None), value_of, settings)
    objective = create_objective(settings, template, data.epoch, len(data.classes))

    def loss_fn(model: Any, batch: MicroBatch) -> Tensor:
        torch.manual_seed(batch.seed)  # dropout
        return objective.loss(partial(model, draws=batch.draws), *batch.inputs)

    def prepare(batch: Batch) -> tuple[Tensor, ...]:
        blocks = len(template.blocks) if template.drop_path else 0
        draws = drop_path_draws(batch.positions, data.epoch, settings.seed, blocks)
        return *objective.prepare(batch), torch.from_numpy(draws).to(distributed.device())

    # ---- start
    if loaded is not None:
        loader.load_state_dict(loaded.state["loader"], settings.data.allow_decoder_change)
        engine.load(loaded.read)
        loaded.close()
    samples = loader.state_dict()["samples"]
    if rank == 0:
        provenance.note(out, settings, engine.configuration)
        checkpoint.clear_partial(out / "checkpoints")
        (out / "stopped.json").unlink(missing_ok=True)
    telemetry = Telemetry(out, out.name, schedule.total, samples) if rank == 0 else None
    stop.listen()

    # ---- what happens between two steps
    notes = {
        "settings": settings.model_dump(mode="json"), "model": model_settings, "classes": data.classes,
        "versions": provenance.versions(), "commit": provenance.commit(),
    }  # fmt: skip

    def save(best: bool) -> Path:
        noted = {**notes, **state, "loader": {**loader.state_dict(), "samples": samples}}
        path = checkpoint.save(out / "checkpoints", samples, engine.pieces(), shapes, noted, best)
        if rank == 0:
            checkpoint.prune(out / "checkpoints", settings.checkpoint.keep)
        return path

    def evaluate() -> bool:
        """Evaluate the held-out set; return whether it is the best so far."""
        engine.model.eval()
        with engine.averaged() if settings.evaluate.ema else nullcontext():
            state["val"] = objective.evaluate(engine.model, data.held_out)
        if telemetry:
            telemetry.log(samples, {f"val_{key}": value for key, value in state["val"].items()})
        if state["best"] is not None and not objective.better(state["val"], state["best"]):
            return False
        state["best"] = {"samples": samples, **state["val"]}
        return True

    # ---- the loop
    micro_batch = settings.micro_batch or settings.global_batch // world_size
    path = loaded.path if loaded else None
    batches = prefetched(iter(loader), prepare, distributed.device())
    window = Window(settings, loader)
    while samples < schedule.total:
        if (batch := window.next(batches)) is None:
            raise UserError(
                f"{settings.data.train} ended at {samples} of {schedule.total} samples, saved in {save(False)}; give "
                "it more and run again, or set a shorter duration"
            )
        micro_batches = []
        for i in range(0, len(batch[0]), micro_batch):
            *inputs, draws = (tensor[i : i + micro_batch] for tensor in batch)
            micro_batches.append(MicroBatch(tuple(inputs), draws, hash_int(settings.seed, samples, rank, i)))
        samples, state["steps"] = samples + settings.global_batch, state["steps"] + 1
        lr = schedule.rate(samples)
        step = engine.step(micro_batches, loss_fn, lr)
        window.add(step.loss)

        saving = schedule.due("save", samples)
        evaluating = data.held_out is not None and schedule.due("evaluate", samples)
        if not (saving or evaluating or schedule.due("log", samples)):
            continue  # nothing below touches the hot path

        # A save or an evaluation ends the logging window too, so a resumed run logs the same lines.
        measured, stopping = window.measure(stop.asked())
        values = {
            "step": state["steps"], "epoch": data.epoch and samples / data.epoch, "lr": lr,
            "grad_norm": float(step.grad_norm), **measured,
        }  # fmt: skip
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            raise PatchmillError(
                f"the loss is {values['loss']} and the gradient norm {values['grad_norm']} at {samples} samples; lower "
                f"optim.lr or set optim.clip, then run again: it goes on from {path or 'the start'}"
            )
        if telemetry:
            telemetry.log(samples, values)
        best = evaluating and evaluate()
        if telemetry:
            telemetry.show(samples, {**values, "val_top1": state["val"] and state["val"].get("top1")})
        if saving or best or stopping:
            path = save(best)
        if stopping and samples < schedule.total:
            if telemetry:
                telemetry.close()
                write_text(out / "stopped.json", json.dumps({"samples": samples, "checkpoint": str(path)}))
            raise StoppedOnRequestError(f"stopped on request at {samples} samples, saved in {path}; run again to go on")
        window.open()

    batches.close()
    if telemetry:
        telemetry.close()
    return {
        "samples": samples, "steps": state["steps"], "val": state["val"], "best": state["best"],
        "checkpoint": str(path), "images_per_second": window.images / window.seconds if window.images else None,
    }  # fmt: skip
