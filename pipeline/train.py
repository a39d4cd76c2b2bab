"""One loop for every kind of training stage, read from top to bottom.

Where a run starts: its own newest checkpoint > another run's (``resume``) > converted weights (``init``) > scratch.
Where it stands is one integer, the samples consumed; schedules, saves and evaluations are functions of it.
"""

import gc
from contextlib import ExitStack, closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline import distributed, patience, provenance, stop, watchdog
from pipeline.ceiling import product_flops
from pipeline.config import TrainSettings
from pipeline.convert.recognise import open_source
from pipeline.data import open_data
from pipeline.droppath import drop_path_draws
from pipeline.engines import create_engine
from pipeline.flops import cost_of
from pipeline.garbage import collected_between_steps
from pipeline.guard import Guard
from pipeline.lookout import Lookout
from pipeline.microbatch import MicroBatch, micro_batches, seed_dropout
from pipeline.models import create_model
from pipeline.objectives import create_objective
from pipeline.prefetch import prefetched
from pipeline.profiler import Profiler
from pipeline.resume import last_checkpoint
from pipeline.saver import Saver
from pipeline.telemetry import Telemetry
from pipeline.tracking import mirrors
from pipeline.troubles import RollBack, Troubles
from pipeline.validation import Validation
from pipeline.watchdog import Watchdog
from pipeline.weights import first_values, resolve_model
from pipeline.window import Window
from shards.batch import Batch


def train(settings: TrainSettings, out: Path) -> dict[str, Any]:
    """Run one training stage to its end, from wherever it stands; collective over all ranks.

    Args:
        settings: The stage.
        out: The stage's folder: checkpoints, metrics and settings go there.

    Returns:
        ``samples``, ``exaflops``, ``steps``, ``val`` and ``best`` metrics, ``checkpoint`` (path), what probes found,
        ``images_per_second``, how many steps were ``skipped``, what was ``passed_over``, ``early``: by patience.

    Raises:
        UserError: Anything wrong with settings, data or weights, before the first step.
        StoppedOnRequestError: A signal asked for a stop; everything is saved.
        PatchmillError: Too many steps in a row were skipped.
    """
    stop.listen()
    while True:
        with suppress(RollBack), ExitStack() as ending:  # after a rollback, as if killed and started again
            return _train(settings, out, ending)
        gc.collect()  # the engine, before there is another one


def _train(settings: TrainSettings, out: Path, ending: ExitStack) -> dict[str, Any]:
    rank, world_size = distributed.rank(), distributed.world_size()

    # ---- data
    watch = ending.enter_context(Watchdog(out / "logs", settings.watchdog, rank, lambda: loader.awaited()))
    loaded = last_checkpoint(settings, out, watch)
    state: dict[str, Any] = {"steps": 0, "best": None, "val": None, "worse": 0, "probe": {}}
    state["first_batch"] = settings.global_batch
    if loaded is not None:
        state |= {key: loaded.state[key] for key in state if key in loaded.state}
    init = open_source(settings.init) if settings.init else None  # before a ledger is begun
    data = open_data(settings, out, state["first_batch"])
    loader, schedule = data.loader, data.schedule
    validation = Validation(settings, data.held_out, schedule, state)

    # ---- model, objective, engine
    model_settings = resolve_model(settings, init, len(data.classes))
    with torch.device("meta"):
        template = create_model(**model_settings, seed=None)
    shapes = {name: tuple(parameter.shape) for name, parameter in template.named_parameters()}
    value_of = first_values(template, init, settings)
    objective = create_objective(settings, template, data.epoch, len(data.classes))
    guard = Guard(settings.guard.sigmas, distributed.device())
    engine = create_engine(lambda: create_model(**model_settings, seed=None), value_of, settings, guard)
    ending.push(lambda error, *_: engine.close() if error is RollBack else None)  # there will be another one

    def loss_fn(model: Any, batch: MicroBatch) -> Tensor:
        seed_dropout(batch.seed)
        with window.forward():
            return objective.loss(partial(model, draws=batch.draws), *batch.inputs)

    def prepare(batch: Batch) -> tuple[Tensor, ...]:
        blocks = len(template.blocks) if template.drop_path else 0
        draws = drop_path_draws(batch.positions, data.epoch, settings.seed, blocks)
        return *objective.prepare(batch), torch.from_numpy(draws).to(distributed.device())

    # ---- start
    flops = cost_of(**model_settings, hidden=settings.hidden_share).training_flops(1)
    window = Window(settings, loader, flops / product_flops(settings.engine.precision))
    if loaded is not None:
        loader.load_state_dict(loaded.state["loader"], settings.data.allow_decoder_change)
        engine.load(loaded.read)
        guard.load_state_dict(loaded.state.get("guard"))
        window.load_state_dict(loaded.state.get("window"))
        loaded.close()
    samples = loader.state_dict()["samples"]
    troubles = Troubles(settings, out, data.names, samples)
    telemetry = None
    if rank == 0:
        provenance.note(out, settings, engine.configuration)
        (out / stop.STOPPED).unlink(missing_ok=True)
        telemetry = Telemetry(out, out.name, schedule.total, samples, mirrors(settings, out, samples))
        ending.callback(telemetry.close)
    kept, at = schedule.periods.get("keep"), lambda what: watch.at(what, samples)
    saver = ending.enter_context(Saver(out / "checkpoints", shapes, settings, kept, at))
    profiler = ending.enter_context(Profiler(out / "profile", settings.profile.first, settings.profile.steps))
    lookout = Lookout(settings.checkpoint.minutes, saver=saver)
    ending.enter_context(collected_between_steps())

    # ---- what happens between two steps
    notes = provenance.of(settings, model_settings, data.classes)

    def save(best: bool) -> Path:
        noted = {
            **notes, **state, "guard": guard.state_dict(), "window": window.state_dict(),
            "loader": {**loader.state_dict(), "samples": samples},
        }  # fmt: skip
        path = saver.save(samples, engine.pieces(), noted, best)
        lookout.saved()
        return path

    # ---- the loop
    micro_batch = settings.micro_batch or settings.global_batch // world_size
    path, owed = loaded.path if loaded else None, False  # owed: a save that came due at a step held back
    batches = ending.enter_context(closing(prefetched(iter(loader), prepare, distributed.device())))
    if lookout.look(now=True).stop:  # while all of this started
        raise stop.stopped(out, samples, path)
    watch.at(watchdog.WAITING, samples)
    window.open()
    while samples < schedule.total and not patience.lost(settings, state):
        batch = window.next(batches)
        if batch is None:
            path = save(False)
            saver.wait()
            raise stop.ended(settings.data.train, samples, schedule.total, path)
        parts = list(micro_batches(batch, micro_batch, settings.seed, samples, rank))
        samples += settings.global_batch
        if not troubles.passes_over(samples):
            watch.at(watchdog.TRAINING, samples - settings.global_batch)
            profiler.step()
            window.add(samples, engine.step(parts, loss_fn, schedule.rate(samples)))
            state["steps"] += 1
        watch.at(watchdog.WAITING, samples)

        # A line ends the window, which is why a save or an evaluation by samples always has one, and what comes when
        # it comes has none: so a run that was stopped and went on logs the same lines.
        saving, validating = schedule.due("save", samples), validation.due(samples)
        logging = saving or validating or schedule.due("log", samples)
        seen = lookout.look(now=logging)
        saving = saving or seen.save or owed
        if not (logging or saving or seen.stop):
            continue  # nothing below touches the hot path

        troubles.note(window.settle(), path)
        if logging:
            values = {
                "step": state["steps"], "epoch": data.epoch and samples / data.epoch, "lr": schedule.rate(samples),
                **window.measure(), "skipped": troubles.skipped,
            }  # fmt: skip
            window.clear()
            saver.prepare()
            if telemetry:
                telemetry.log(samples, values)
        watch.at(watchdog.EVALUATING, samples)
        best = validating and validation.measure(engine, objective, samples, telemetry)
        if telemetry and logging:
            telemetry.show(samples, {**values, **validation.shown()})
        owed = saving and troubles.now and samples < schedule.total
        if (saving and not owed) or best or seen.stop or patience.lost(settings, state):
            path = save(best)
        if seen.stop and samples < schedule.total:
            saver.wait()
            raise stop.stopped(out, samples, path)
        gc.collect(1)
        watch.at(watchdog.WAITING, samples)
        window.open()

    saver.finish()
    return {
        "samples": samples, "exaflops": samples * flops / 1e18, **{key: state[key] for key in ("steps", "val", "best")},
        **state["probe"], "checkpoint": str(path), "images_per_second": window.speed, "skipped": troubles.skipped,
        "passed_over": troubles.passed_over, "early": patience.lost(settings, state),
    }  # fmt: skip
