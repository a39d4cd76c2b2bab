"""The curves of training stages, those of several stages and runs over each other, and their speed as a table."""

from typing import Any

from pipeline.report.charts import Series, chart, legend
from pipeline.report.markup import table
from pipeline.report.run import Run, Stage

GROUPS = {
    "masked_patch": "Masked patch prediction",
    "mae": "Masked autoencoding",
    "supervised": "Supervised training",
    "finetune": "Fine-tuning",
}
PANELS = (  # key, title, factor, whether the axis begins at 0
    ("loss", "training loss", 1, False),
    ("val_loss", "held-out loss", 1, False),
    ("val_top1", "held-out top-1 (%)", 100, True),
    ("lr", "learning rate", 1, True),
    ("grad_norm", "gradient norm", 1, True),
    ("images_per_second", "throughput (images/s)", 1, True),
    ("utilisation", "utilisation (% of what matrix products reach here)", 100, True),
    ("data_wait", "waiting for data (% of the time)", 100, True),
)


def curves(runs: dict[str, Run]) -> str:
    """Return a group of charts for each kind of stage: losses of different kinds mean different things.

    Args:
        runs: By what they are called on the page.
    """
    parts = []
    for kind, title in GROUPS.items():
        stages = {called(name, stage, runs): stage for name, run in runs.items() for stage in run.of(kind)}
        charts = "".join(_chart(stages, *panel) for panel in [*_panels(kind), *_probes(stages)])
        if charts:
            parts.append(f"<h3>{title}</h3>{legend(list(stages))}<div class=charts>{charts}</div>")
    return "".join(parts)


def called(name: str, stage: Stage, runs: dict[str, Run]) -> str:
    """Return what a stage is called on the page: with the run's name, where there are several."""
    return stage.name if len(runs) == 1 or stage.name == name else f"{name} / {stage.name}"


def speeds(runs: dict[str, Run]) -> str:
    """Return a table of what the training stages took."""
    rows = []
    for name, run in runs.items():
        for stage in run.of(*GROUPS):
            rows.append([called(name, stage, runs), *_speed(stage)])
    heads = ["stage", "samples", "images/s", "a rank", "utilisation", "waiting for data", "decoding", "median step",
             "memory", "last try", "troubles"]  # fmt: skip
    return table(heads, rows, range(1, 10)) if rows else ""


def _speed(stage: Stage) -> list[str]:
    def mean(key: str) -> float | None:
        found = [line[key] for line in stage.lines if line.get(key) is not None]
        return sum(found) / len(found) if found else None

    def said(value: float | None, form: str) -> str:
        return "–" if value is None else form.format(value)

    overall = stage.told.get("images_per_second") or mean("images_per_second")
    memory = max((line["memory_gb"] for line in stage.lines if "memory_gb" in line), default=None)
    last: dict[str, Any] = next((line for line in reversed(stage.lines) if "skipped" in line), {})
    troubles = [f"{last[key]:,} {key}" for key in ("skipped", "retries", "replaced", "quarantined") if last.get(key)]
    return [
        f"{stage.samples:,}{'' if stage.result is not None else ' so far'}", said(overall, "{:,.0f}"),
        said(mean("images_per_second_per_rank"), "{:,.0f}"), said(mean("utilisation"), "{:.0%}"),
        said(mean("data_wait"), "{:.1%}"), said(mean("decode_share"), "{:.1%}"),
        said(mean("step_ms_median"), "{:,.0f} ms"), said(memory, "{:.2f} GB"), said(stage.seconds, "{:,.0f} s"),
        ", ".join(troubles) or "none",
    ]  # fmt: skip


def _panels(kind: str) -> list[tuple[str, str, int, bool]]:
    if kind == "masked_patch":
        title_of = {"val_top1": "hidden patches told right (%)"}
        return [(key, title_of.get(key, title), factor, from_zero) for key, title, factor, from_zero in PANELS]
    return list(PANELS)


def _probes(stages: dict[str, Stage]) -> list[tuple[str, str, int, bool]]:
    keys = {key for stage in stages.values() for line in stage.lines for key in line if key.startswith("probe_")}
    return [(key, f"probe {key.removeprefix('probe_')}, top-1 (%)", 100, True) for key in sorted(keys)]


def _chart(stages: dict[str, Stage], key: str, title: str, factor: int, from_zero: bool) -> str:
    series = [
        Series(name, style, [(line["samples"], factor * line[key]) for line in stage.lines if _is_number(line, key)])
        for style, (name, stage) in enumerate(stages.items())
    ]
    return chart(title, "samples seen", series, from_zero)


def _is_number(line: dict[str, Any], key: str) -> bool:
    return isinstance(line.get(key), (int, float))  # a window without a step has no loss
