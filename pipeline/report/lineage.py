"""Where weights come from: stage by stage, from nothing or from a file, to the last checkpoint of each."""

import re
from html import escape
from pathlib import Path
from typing import Any

from pipeline import catalogue
from pipeline.report.run import TRAINING, Run, Stage
from shards.errors import PatchmillError

MAKERS = (*TRAINING, "convert")  # kinds of stages that make weights
USERS = {"convert": "source", "evaluate": "weights", "fewshot": "weights"}  # and the setting that names them


def parent(run: Run, stage: Stage) -> Stage | str | None:
    """Return what the weights of a stage come from: a stage, a path outside of the run, or None, from nothing."""
    if stage.kind in TRAINING:
        told = stage.settings.get("init") or stage.settings.get("resume")
    else:
        told = stage.table.get("set", {}).get(USERS[stage.kind])
        if found := re.match(r"\{([^}]+)\}", told or ""):
            return run.named(found[1])
    return told and (run.at(told) or told)


def ancestors(run: Run, stage: Stage) -> list[Stage]:
    """Return the stages of the run that a stage's weights went through, the nearest first."""
    found: list[Stage] = []
    above = parent(run, stage)
    while isinstance(above, Stage) and above not in found:
        found.append(above)
        above = parent(run, above)
    return found


def lineage(run: Run) -> str:
    """Return a nested list: under what each stage started from stands what it made."""
    under: dict[str, list[Stage]] = {}
    for stage in [*run.of(*MAKERS), *run.finished("evaluate", "fewshot")]:
        above = parent(run, stage)
        root = f"from {above}" if isinstance(above, str) else "from nothing"
        under.setdefault(above.name if isinstance(above, Stage) else root, []).append(stage)

    def listed(key: str) -> str:
        items = "".join(f"<li>{_told(stage)}{listed(stage.name)}</li>" for stage in under.pop(key, []))
        return f"<ul>{items}</ul>" if items else ""

    roots = [key for key in under if key not in run.stages]
    return "".join(f"<p class=root>{escape(root)}</p>{listed(root)}" for root in roots)


def _told(stage: Stage) -> str:
    if stage.kind == "convert":
        path = Path(stage.told["weights"]).name
        facts = f"{path}, {stage.told['parameters']:,} parameters"
    elif stage.kind in TRAINING:
        facts = _checkpoint(stage)
    elif stage.kind == "evaluate":
        facts = f"top-1 {100 * stage.told['top1']:.1f} %"
    else:
        facts = f"least squares on its features: top-1 {100 * stage.told['features']['all']:.1f} %"
    return f"<b>{escape(stage.name)}</b> ({stage.kind}): {facts}"


def _checkpoint(stage: Stage) -> str:
    try:
        found = catalogue.facts(catalogue.newest(stage.folder))
    except PatchmillError:
        return "no checkpoint is there any more"
    if found["problem"]:
        return f"{escape(found['name'])}, which is broken: {escape(found['problem'])}"
    return f"<code>{found['name']}</code>, {found['samples']:,} samples seen, {_made(found)}"


def _made(found: dict[str, Any]) -> str:
    ranks = "1 rank" if found["world_size"] == 1 else f"{found['world_size']} ranks"
    engine = f"DeepSpeed ZeRO {found['zero_stage']}" if found["engine"] == "deepspeed" else "Accelerate"
    facts = [f"{found['parameters']:,} parameters", f"{ranks}, {engine}"]
    for what, digest in (("code", found["commit"]), ("data", found["data"]), ("checkpoint", found["digest"])):
        if digest:  # of a stream there is none of the data, of a mixture one of each set
            facts.append(f"{what} {' + '.join(map(_short, [digest] if isinstance(digest, str) else digest))}")
    return ", ".join(facts)


def _short(digest: str) -> str:
    return f'<code title="{digest}">{digest[:10]}{"+" if digest.endswith("+") else ""}</code>'
