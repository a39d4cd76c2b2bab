"""The plan and the settings of runs, and what differs between stages of one name."""

from itertools import chain

from pipeline.report.markup import folded, table
from pipeline.report.run import TRAINING, Run
from pipeline.settings import flat


def differences(runs: dict[str, Run]) -> str:
    """Return a table of the settings in which stages of one name differ from run to run; empty where none do."""
    stages = {  # those that were run by hand are compared whatever they are called
        name: {stage.name if run.plan is not None else "": flat(stage.settings) for stage in run.of(*TRAINING)}
        for name, run in runs.items()
    }
    rows = []
    for stage in dict.fromkeys(chain.from_iterable(stages.values())):
        mine = {name: found[stage] for name, found in stages.items() if stage in found}
        for key in sorted(set().union(*mine.values())):
            if len({str(each.get(key)) for each in mine.values()}) > 1:
                rows.append([stage, key, *(mine.get(name, {}).get(key, "–") for name in runs)])
    return table(["stage", "setting", *runs], rows) if rows else ""


def settings(runs: dict[str, Run]) -> str:
    """Return every plan and every training stage's settings as they were run, folded."""
    parts = []
    for name, run in runs.items():
        if run.plan is not None:
            parts.append(folded(f"{name}: plan.toml", run.plan))
        for stage in run.stages.values():
            path = stage.folder / "resolved.toml"
            if path.is_file():
                where = name if stage.name == name else f"{name} / {stage.name}"
                parts.append(folded(f"{where}: every setting", path.read_text(encoding="utf-8")))
    return "".join(parts)
