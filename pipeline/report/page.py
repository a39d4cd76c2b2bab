"""One self-contained HTML page of one run or several: no scripts, no other files, nothing from the network."""

from html import escape
from pathlib import Path

from pipeline.report.accuracies import Row, accuracies
from pipeline.report.curves import curves, speeds
from pipeline.report.expected import compared
from pipeline.report.learned import learned
from pipeline.report.lineage import lineage
from pipeline.report.markup import Html, table
from pipeline.report.run import Run, Stage
from pipeline.report.samples import samples, tuned
from pipeline.report.settings import differences, settings
from pipeline.report.sweeps import sweeps
from pipeline.writable import make_writable, writing
from shards.atomic import write_text
from shards.errors import PatchmillError, UserError

STYLE = Path(__file__).with_name("page.css")
NOTHING_ELSE = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""What a browser may load for the page, by its own word: pictures and style that are in it."""


def write_page(runs: list[Run], page: Path) -> None:
    """Write the page of runs, over each other where there are several.

    What is not there any more, as checkpoints or images, is told on the page in its place.

    Raises:
        UserError: The page cannot be written.
    """
    make_writable(page.parent)
    named = dict(zip(names(runs), runs, strict=True))
    sections = {
        "Accuracy on held-out images": _accuracies(named),
        "Beside what was published": _compared(named),
        "Sweeps": sweeps(named),
        "Curves": curves(named),
        "Speed": speeds(named),
        "What the models learned": _learned(named),
        "What they say of held-out images": _samples(named),
        "Where the weights come from": _lineage(named),
        "Stages": _stages(named),
        "Settings that differ": differences(named),
        "Plan and settings": settings(named),
    }
    sections = {title: text for title, text in sections.items() if text}
    links = "".join(f'<a href="#{_anchor(title)}">{title}</a>' for title in sections)
    body = "".join(
        f'<section id="{_anchor(title)}"><h2>{title}</h2>{text}</section>' for title, text in sections.items()
    )
    title = escape(", ".join(named))
    text = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{NOTHING_ELSE}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{title} - Patchmill</title><style>{STYLE.read_text(encoding='utf-8')}</style></head>"
        f"<body><h1>{title}</h1>{_summary(named)}<nav>{links}</nav>{body}</body></html>"
    )
    with writing(page.parent):
        write_text(page, text)


def names(runs: list[Run]) -> list[str]:
    """Return what each run is called: its name, or as much of its path as tells runs of one name apart."""
    paths = [run.folder.resolve().parts for run in runs]
    for depth in range(max(map(len, paths))):
        found = ["/".join(path[-depth - 1 :]) if depth else run.name for run, path in zip(runs, paths, strict=True)]
        if len(set(found)) == len(found):
            return found
    raise UserError(f"one run is given twice: {', '.join(str(run.folder) for run in runs)}; name each once")


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def _summary(runs: dict[str, Run]) -> str:
    told = []
    for name, run in runs.items():
        stages = [stage for stage in run.stages.values() if stage.kind != "report"]  # which this page may be of
        kinds = f"{sum(stage.result is not None for stage in stages)} of {len(stages)} stages finished"
        told.append(f"{name}: {kinds}" if run.plan is not None else f"{name}: a training stage that was run by hand")
    return f"<p class=note>{escape('; '.join(told))}.</p>"


def _accuracies(runs: dict[str, Run]) -> str:
    found = {name: {row.what: row for row in accuracies(run)} for name, run in runs.items()}
    whats = dict.fromkeys(what for rows in found.values() for what in rows)
    if len(runs) == 1:
        rows = [[what, _top1(row), row.how] for what, row in next(iter(found.values())).items()]
        return table(["what", "top-1", "how"], rows, [1]) if rows else ""

    def shown(row: Row | None) -> Html:
        return Html(f"{_top1(row)}<small>{escape(row.how)}</small>" if row else "–")

    rows = [[what, *(shown(found[name].get(what)) for name in runs)] for what in whats]
    return table(["top-1", *runs], rows) if rows else ""


def _top1(row: Row) -> Html:
    return Html(f"<strong>{100 * row.top1:.1f} %</strong>" if row.main else f"{100 * row.top1:.1f} %")


def _compared(runs: dict[str, Run]) -> str:
    rows, changed = [], {}
    for name, run in runs.items():
        for each in compared(run):
            low, high = each.expected
            stage = each.stage if len(runs) == 1 else f"{name} / {each.stage}"
            apart = "–" if each.ours is None or low != high else f"{each.ours - low:+.2f}"
            rows.append([
                stage, each.what, each.source, f"{low:g}" if low == high else f"{low:g} to {high:g}",
                "not measured" if each.ours is None else f"{each.ours:.2f}", apart,
            ])  # fmt: skip
            changed[f"{stage}, by {each.recipe}"] = each.changed
    if not rows:
        return ""
    notes = "".join(
        f"<p class=note>{escape(stage)}: {escape('; '.join(each) or 'nothing but data, weights and seed')}.</p>"
        for stage, each in changed.items()
    )
    heads = ["stage", "what", "source", "published (%)", "here (%)", "difference"]
    return f"{table(heads, rows, [3, 4, 5])}<h3>What is not as the recipe has it</h3>{notes}"


def _learned(runs: dict[str, Run]) -> str:
    return "".join(
        f"<h3>{escape(stage.name if len(runs) == 1 else f'{name} / {stage.name}')}</h3>{figures}"
        for name, run in runs.items()
        for stage, figures in learned(run)
    )


def _samples(runs: dict[str, Run]) -> str:
    parts = []
    for name, run in runs.items():
        if (stage := tuned(run)) is None:
            continue
        try:
            shown = samples(stage)
        except PatchmillError as error:
            shown = f"<p class=note>Not shown: {escape(str(error))}.</p>"
        parts.append(f"<h3>{escape(stage.name if len(runs) == 1 else f'{name} / {stage.name}')}</h3>{shown}")
    return "".join(parts)


def _lineage(runs: dict[str, Run]) -> str:
    found = {name: lineage(run) for name, run in runs.items()}
    return "".join(
        f"{f'<h3>{escape(name)}</h3>' if len(runs) > 1 else ''}<div class=lineage>{text}</div>"
        for name, text in found.items()
        if text
    )


def _stages(runs: dict[str, Run]) -> str:
    rows = []
    for name, run in runs.items():
        for stage in run.stages.values():
            rows.append([*([name] if len(runs) > 1 else []), stage.name, stage.kind, _state(run, stage)])
    heads = [*(["run"] if len(runs) > 1 else []), "stage", "kind", "time of the last try"]
    return table(heads, rows, [len(heads) - 1])


def _state(run: Run, stage: Stage) -> str:
    if run.plan is None:
        return "run by hand"
    if stage.seconds is not None:
        return f"{stage.seconds:,.0f} s"
    return "not finished" if stage.folder.is_dir() else "not begun"
