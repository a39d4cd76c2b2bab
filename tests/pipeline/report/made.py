"""Runs as they lie on disk when they have ended, without their training."""

import json
from pathlib import Path
from typing import Any

from pipeline.recipe import read_recipe
from pipeline.settings import dump_toml, merge


def made_run(folder: Path, stages: str) -> Path:
    """Make a run of a plan's ``[[stage]]`` tables."""
    folder.mkdir(parents=True)
    (folder / "plan.toml").write_text(f'name = "{folder.name}"\n{stages}')
    return folder


def trained(run: Path, name: str, recipe: str, top1: float | None, **over: Any) -> Path:
    """Leave behind what a training stage by a recipe leaves; ``over`` is laid over its settings."""
    folder = run / "stages" / name
    folder.mkdir(parents=True)
    table = merge(read_recipe(recipe).checked.model_dump(mode="json", exclude_none=True), over)
    if over.get("init", "") is None:
        del table["init"]
    (folder / "resolved.toml").write_text(dump_toml(table))
    val = {"loss": 1.0} | ({} if top1 is None else {"top1": top1})
    lines = [
        {"samples": 100, "loss": 3.0, "lr": 0.1, "images_per_second": 10.0, "utilisation": 0.5, "data_wait": 0.02},
        {"samples": 200, "loss": None, "lr": 0.1, "images_per_second": 30.0, "utilisation": 0.7, "data_wait": 0.04},
        {"samples": 200, **{f"val_{key}": value for key, value in val.items()}},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ended(run, name, table["kind"], {"samples": 200, "val": val, "images_per_second": 20.0})
    return folder


def ended(run: Path, name: str, kind: str, result: dict[str, Any]) -> None:
    """Leave behind what any stage leaves that has ended."""
    folder = run / "stages" / name
    folder.mkdir(parents=True, exist_ok=True)
    told = {"digest": "0", "kind": kind, "seconds": 12.0, "result": result}
    (folder / "result.json").write_text(json.dumps(told))
