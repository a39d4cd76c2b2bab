"""What the paper, or whoever a recipe is from, reached with it, beside what a run reached."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.evaluate.scores import REAL
from pipeline.models import MODELS
from pipeline.recipe import Expected, Recipe, read_recipe, recipe_names
from pipeline.report.heldout import is_real
from pipeline.report.lineage import ancestors
from pipeline.report.run import TRAINING, Run, Stage
from pipeline.resume import rule_of
from pipeline.settings import flat


@dataclass(frozen=True)
class Compared:
    """A published number and the run's own.

    Attributes:
        stage: Of the plan.
        recipe: Of the stage.
        what: Metric, and what it is of.
        source: Of the published number.
        expected: In per cent; the least and the greatest where which one is meant is not known.
        ours: In per cent; None: the run did not measure that.
        changed: Settings of the stage that are not the recipe's, as ``key = value (recipe: value)``.
    """

    stage: str
    recipe: str
    what: str
    source: str
    expected: tuple[float, float]
    ours: float | None
    changed: tuple[str, ...]


def compared(run: Run) -> list[Compared]:
    """Return what is published of the recipes that a run's stages were made by, those that ship with Patchmill.

    Not of sweeps that settings were chosen by: their accuracy is of a dev split, and what is published of test images.
    """
    rows: list[Compared] = []
    known = recipe_names()
    for name in dict.fromkeys(_plan_name(run, stage) for stage in run.of(*TRAINING)):
        stage = run.named(name)
        if name not in run.trials and stage is not None and stage.table.get("recipe") in known:
            recipe = read_recipe(stage.table["recipe"])
            changed = tuple(changes(recipe, stage))
            for each in recipe.about.expected:
                for what, value, ours in _applying(run, stage, recipe, each):
                    rows.append(Compared(name, recipe.name, what, each.source, value, ours, changed))
    return rows


def changes(recipe: Recipe, stage: Stage) -> Iterator[str]:
    """Yield the settings of a stage that are not its recipe's, but those that change nothing of what is learned."""
    theirs, ours = flat(recipe.checked.model_dump(mode="json", exclude_none=True)), flat(stage.settings)
    for key in sorted(theirs.keys() | ours.keys()):
        before, now = theirs.get(key), ours.get(key)
        if before == now or rule_of(key) == "free" or key == "seed" or now in recipe.swept.get(key, []):
            continue
        yield f"{key} = {now} (recipe: {before})"
    if "init" in theirs and "init" not in ours:
        yield "from nothing (recipe: from weights)"


def _plan_name(run: Run, stage: Stage) -> str:
    return next((name for name, names in run.sweeps.items() if stage.name in names), stage.name)


def _applying(
    run: Run, stage: Stage, recipe: Recipe, told: Expected
) -> Iterator[tuple[str, tuple[float, float], float | None]]:
    """Yield what is meant, the published number and ours, of the values that are of a stage like this one."""
    by_weights = set(told.values) <= set(recipe_names())
    by_model = set(told.values) <= MODELS.keys()
    above = ancestors(run, stage)
    own = [each.table.get("recipe") for each in above]
    models = [each.settings["model"].get("name") for each in (stage, *above) if "model" in each.settings]
    if by_weights and not set(told.values) & set(own):
        values = told.values.values()
        yield f"{told.metric}, over all of its weights", (min(values), max(values)), _top1(run, stage, told.metric)
        return
    for key, value in told.values.items():
        is_of = own if by_weights else models if by_model else None
        if is_of is None and key.endswith("epochs"):
            is_of = [stage.settings["duration"]]
        if is_of is not None and key not in is_of:
            continue
        at = stage if is_of else _measured_on(run, stage, recipe, told, key)
        what = f"{told.metric}: {key}"
        yield what, (value, value), None if at is None else _top1(run, at, what)


def _measured_on(run: Run, stage: Stage, recipe: Recipe, told: Expected, data: str) -> Stage | None:
    """Return the stage that measured a model on a data set: itself, or the last one that was fine-tuned from it."""
    of_images = "ImageNet" if data == REAL else data
    if "after fine-tuning" not in told.metric or stage.kind == "finetune":
        return stage if of_images in recipe.about.data.split(" or ") else None
    tuned = [each for each in run.of("finetune") if stage in ancestors(run, each)]
    for each in reversed(tuned):
        name, recipe_name = _plan_name(run, each), each.table.get("recipe")
        if name in run.trials or recipe_name not in recipe_names():
            continue
        if of_images in read_recipe(recipe_name).about.data.split(" or "):
            return run.named(name)
    return None


def _top1(run: Run, stage: Stage, what: str) -> float | None:
    """Return top-1 of a stage in per cent, over seeds their mean; None: it has none, or another number is meant."""
    if any(word in what for word in ("v2", "linear probing", "19 tasks", "after fine-tuning by")):
        return None
    sweep: Any = stage.table.get("sweep")
    stages = [stage]
    if isinstance(sweep, dict) and sweep.keys() == {"seed"}:
        stages = [run.stages[name] for name in run.sweeps[stage.table["name"]]]
    top1 = [top1 for each in stages if (top1 := _measured(run, each, real=REAL in what)) is not None]
    return 100 * sum(top1) / len(top1) if top1 else None


def _measured(run: Run, stage: Stage, real: bool) -> float | None:
    """Return top-1 of a stage on its held-out images; ``real``: with ReaL labels, there or in an evaluation of it."""
    if stage.val and "top1" in stage.val and stage.kind != "masked_patch" and is_real(stage) == real:
        return stage.val["top1"]
    for each in run.finished("evaluate") if real else []:
        trained = next((above for above in ancestors(run, each) if above.kind in TRAINING), None)
        if trained is stage and each.told.get("labels") == REAL:
            return each.told["top1"]
    return None
