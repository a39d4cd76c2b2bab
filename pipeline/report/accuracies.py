"""Top-1 on held-out images of everything a run measured, next to honest baselines."""

from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np

from pipeline.convert.recognise import open_source
from pipeline.report.heldout import held_out
from pipeline.report.run import TRAINING, Run, Stage
from shards.errors import PatchmillError, UserError


@dataclass(frozen=True)
class Row:
    """One line of the table of accuracies: ``top1`` in [0, 1]; ``main`` marks what the run is about."""

    what: str
    top1: float
    how: str
    main: bool = False


def accuracies(run: Run) -> list[Row]:
    """Return top-1 on held-out images of everything the run measured, chance first."""
    sets = run.finished("shards")
    rows = [_chance(stage, f" in {stage.name}" if len(sets) > 1 else "") for stage in sets]
    rows += _most_frequent(run, len(sets) > 1)
    few = run.finished("fewshot")
    for stage in few:
        where = f" ({stage.name})" if len(few) > 1 else ""
        rows += [replace(row, what=row.what + where) for row in _closed_form(stage)]
    for stage in [*run.of("supervised"), *run.of("finetune")]:
        if stage.val is not None and "top1" in stage.val:
            rows.append(_trained(run, stage, stage.val["top1"]))
    for stage in run.finished("evaluate"):
        how = f"{stage.told['images']} images, each once; top-5 {100 * stage.told['top5']:.1f} %"
        how += f"; {stage.told['labels']} labels" if "labels" in stage.told else ""
        rows.append(Row(f"{stage.name} (evaluate)", stage.told["top1"], how))
    return _seeds_together(run, rows)


def _chance(stage: Stage, where: str) -> Row:
    classes = stage.told["classes"]
    return Row(f"chance{where}", 1 / max(len(classes), 1), f"a guess among {len(classes)} classes")


def _most_frequent(run: Run, several: bool) -> list[Row]:
    """Return what always saying the most frequent class of held-out images comes to, of each data set the last ones."""
    last: dict[str, tuple[str, Stage]] = {}  # by data set: the name of its held-out images, and a stage that has them
    for stage in run.of(*TRAINING):
        if url := stage.settings.get("data", {}).get("val"):
            made = run.at(url)
            last[made.name if made else url] = (f"{made.name}/{Path(url).name}" if made else url, stage)
    rows = []
    for name, stage in last.values():
        try:
            val = held_out(stage)
        except PatchmillError:
            continue  # they are not there any more
        assert val is not None  # it has their URL
        labels = list(chain.from_iterable(val.rows(shard).labels for shard in range(len(val.shard_sizes))))
        counts = np.bincount(list(chain.from_iterable(labels)))
        if len(counts):
            where = f" in {name}" if several or len(last) > 1 else ""
            how = f"always saying {val.classes[counts.argmax()]}"
            rows.append(Row(f"most frequent class{where}", counts.max() / sum(map(bool, labels)), how))
    return rows


def _closed_form(stage: Stage) -> list[Row]:
    features, pixels = stage.told["features"], stage.told.get("pixels")  # which a large set has not
    rows = []
    if pixels:
        rows.append(Row("raw pixels, least squares", pixels["all"], "closed form, every training image"))
    rows.append(Row("frozen features, least squares", features["all"], "closed form, every training image"))
    for shots, top1 in features["shots"].items():
        beside = f"; raw pixels {100 * pixels['shots'][shots]:.1f} %" if pixels else ""
        rows.append(Row(f"frozen features, {shots}-shot", top1, f"mean of 3 seeds{beside}"))
    if "linear" in features:
        rows.append(Row("frozen features, linear probing", features["linear"], "logistic regression, every image"))
    if "knn" in features:
        rows.append(Row("frozen features, nearest neighbours", features["knn"], "weighted vote, every training image"))
    return rows


def _trained(run: Run, stage: Stage, top1: float) -> Row:
    so_far = "" if stage.result is not None else " so far"
    how = f"{stage.settings['data']['resolution']} px, {stage.samples:,} images seen{so_far}"
    init = stage.settings.get("init") if stage.kind == "finetune" else None
    if init is not None:
        seen = _samples_behind(run, init)
        how += f", after {seen:,} in pre-training" if seen else f", from {init}"
    else:
        how += ", from scratch"
    return Row(f"{stage.name} ({stage.kind})", top1, how, main=init is not None)


def _samples_behind(run: Run, init: str) -> int | None:
    """Return how many samples the weights of a path have seen, if that is told: by the run, or else by them."""
    if stage := run.at(init):
        return stage.told.get("samples") or stage.samples or None
    try:
        return open_source(init).note.get("samples")
    except UserError:
        return None  # they are not there any more


def _seeds_together(run: Run, rows: list[Row]) -> list[Row]:
    """Put the runs of a sweep over seeds into one row: their mean, and the standard deviation."""
    for names in run.sweeps.values():
        table, kind = run.stages[names[0]].table, run.stages[names[0]].kind
        if not isinstance(table["sweep"], dict) or table["sweep"].keys() != {"seed"}:
            continue
        mine = [row for row in rows if row.what in [f"{name} ({kind})" for name in names]]
        if len(mine) > 1:
            top1 = np.array([row.top1 for row in mine])
            how = f"{mine[0].how}; mean of {len(mine)} seeds, ± {100 * top1.std(ddof=1):.2f}"
            one = Row(f"{table['name']} ({kind})", top1.mean(), how, mine[0].main)
            rows = [one if row is mine[0] else row for row in rows if row is mine[0] or row not in mine]
    return rows
