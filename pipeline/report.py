"""A run on one page: accuracies next to honest baselines, curves, sample images. HTML, and a terminal table."""

import base64
import html
import io
import json
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain, count, takewhile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from pipeline.convert.recognise import load_model, open_source
from pipeline.figures.canvas import png
from pipeline.figures.sweeps import draw
from pipeline.settings import read_toml
from pipeline.sweeps import html_table, print_sweeps, read_sweeps
from pipeline.telemetry import read_metrics
from shards.atomic import whole_file, write_text
from shards.dataset import Dataset
from shards.decode import decode
from shards.errors import UserError
from shards.storesettings import StoreSettings

SAMPLES = 24
TRAINING = ("masked_patch", "mae", "supervised", "finetune")  # kinds of stages

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1c2430}
h1{margin-bottom:0}h2{margin-top:2.5rem;border-bottom:1px solid #d8dee6}
p.note{color:#5b6673;margin-top:.3rem}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.3rem .9rem;border-bottom:1px solid #e6eaef;text-align:left}
td.n{text-align:right;font-variant-numeric:tabular-nums}tr.main td{font-weight:600;background:#f0f6ff}
.samples{display:grid;grid-template-columns:repeat(auto-fill,minmax(104px,1fr));gap:.8rem}
.samples figure{margin:0;font-size:12px;text-align:center}.samples img{width:96px;height:96px;object-fit:contain}
.right{color:#0a7a3d}.wrong{color:#b3261e}pre{background:#f6f8fa;padding:1rem;overflow:auto;font-size:13px}svg,img{max-width:100%;height:auto}
"""


@dataclass(frozen=True)
class Row:
    """One line of the table of accuracies: ``top1`` in [0, 1]; ``main`` marks what the run is about."""

    what: str
    top1: float
    how: str
    main: bool = False


@dataclass(frozen=True)
class Run:
    """What a run folder holds.

    Attributes:
        folder: The run.
        results: ``result.json`` of each finished stage, by name, in the plan's order.
        plan: The plan file's tables.
    """

    folder: Path
    results: dict[str, dict[str, Any]]
    plan: dict[str, Any]

    def stages(self, *kinds: str) -> list[str]:
        """Return the names of the finished stages of these kinds."""
        return [name for name, result in self.results.items() if result["kind"] in kinds]


def read_run(folder: str | Path) -> Run:
    """Read a run's plan and the results of its finished stages."""
    folder = Path(folder)
    if not (folder / "plan.toml").is_file():
        raise UserError(
            f"{folder} is no run: it holds no plan.toml; give the folder RUNS/NAME that `patchmill run` made"
        )
    plan = read_toml(folder / "plan.toml")
    results = {}
    for stage in plan["stage"]:
        name = stage["name"]
        runs = (f"{name}-{number}" for number in count()) if "sweep" in stage else [name]
        for path in takewhile(Path.is_file, (folder / "stages" / each / "result.json" for each in runs)):
            results[path.parent.name] = json.loads(path.read_text(encoding="utf-8"))
    return Run(folder, results, plan)


def accuracies(run: Run) -> list[Row]:
    """Return top-1 on held-out images of everything the run measured, chance first."""
    rows = []
    for name in run.stages("shards"):
        classes = run.results[name]["result"]["classes"]
        rows.append(Row("chance", 1 / len(classes), f"a guess among {len(classes)} classes"))
    val = _validation_set(run)
    if val is not None:
        labels = chain.from_iterable(val.rows(shard).labels for shard in range(len(val.shard_sizes)))
        counts = np.bincount(list(chain.from_iterable(labels)))
        most = val.classes[counts.argmax()]
        rows.append(Row("most frequent class", counts.max() / len(val), f"always saying {most}"))
    for name in run.stages("fewshot"):
        result = run.results[name]["result"]
        features, pixels = result["features"], result.get("pixels")  # which a large set has not
        if pixels:
            rows.append(Row("raw pixels, least squares", pixels["all"], "closed form, every training image"))
        rows.append(Row("frozen features, least squares", features["all"], "closed form, every training image"))
        for shots, top1 in features["shots"].items():
            beside = f"; raw pixels {100 * pixels['shots'][shots]:.1f} %" if pixels else ""
            rows.append(Row(f"frozen features, {shots}-shot", top1, f"mean of 3 seeds{beside}"))
        if "linear" in features:
            rows.append(Row("frozen features, linear probing", features["linear"], "logistic regression, every image"))
        if "knn" in features:
            rows.append(
                Row("frozen features, nearest neighbours", features["knn"], "weighted vote, every training image")
            )
    for kind in ("supervised", "finetune"):
        for name in run.stages(kind):
            result = run.results[name]["result"]
            if result["val"] is None:
                continue
            config = read_toml(run.folder / "stages" / name / "resolved.toml")
            pretrained = kind == "finetune" and "init" in config
            how = f"{config['data']['resolution']} px, {result['samples']:,} images seen"
            if pretrained:
                seen = open_source(config["init"]).note.get("samples")
                how += f", after {seen:,} in pre-training" if seen else f", from {config['init']}"
            else:
                how += ", from scratch"
            rows.append(Row(f"{name} ({kind})", result["val"]["top1"], how, main=pretrained))
    for name in run.stages("evaluate"):
        result = run.results[name]["result"]
        rows.append(
            Row(
                f"{name} (evaluate)",
                result["top1"],
                f"{result['images']} images, each once; top-5 {100 * result['top5']:.1f} %",
            )
        )
    return _seeds_together(run, rows)


def _seeds_together(run: Run, rows: list[Row]) -> list[Row]:
    """Put the runs of a sweep over seeds into one row: their mean, and the standard deviation."""
    for stage in run.plan["stage"]:
        if not isinstance(stage.get("sweep"), dict) or stage["sweep"].keys() != {"seed"}:
            continue
        names = [f"{stage['name']}-{number} ({stage['kind']})" for number in range(len(stage["sweep"]["seed"]))]
        mine = [row for row in rows if row.what in names]
        if len(mine) > 1:
            top1 = np.array([row.top1 for row in mine])
            how = f"{mine[0].how}; mean of {len(mine)} seeds, ± {100 * top1.std(ddof=1):.2f}"
            one = Row(f"{stage['name']} ({stage['kind']})", top1.mean(), how, mine[0].main)
            rows = [one if row is mine[0] else row for row in rows if row is mine[0] or row not in mine]
    return rows


def _validation_set(run: Run) -> Dataset | None:
    """Return the held-out images of the run's last training stage."""
    for name in reversed(run.stages(*TRAINING)):
        data = read_toml(run.folder / "stages" / name / "resolved.toml")["data"]
        if "val" in data:
            return Dataset.open(data["val"], settings=StoreSettings(**data.get("store", {})))
    return None


def print_table(run: Run) -> None:
    """Print the accuracies on stdout."""
    table = Table(title=f"{run.plan['name']}: top-1 on held-out images", title_justify="left")
    table.add_column("what")
    table.add_column("top-1", justify="right")
    table.add_column("how")
    for row in accuracies(run):
        table.add_row(row.what, f"{100 * row.top1:.1f} %", row.how, style="bold" if row.main else None)
    Console().print(table)
    print_sweeps(read_sweeps(run.folder))


def write_html(run: Run) -> Path:
    """Write ``report.html`` into the run's folder: no scripts, no other files, nothing from the network."""
    name = html.escape(run.plan["name"])
    sections = [
        f"<h1>{name}</h1><p class=note>A Patchmill run: {len(run.results)} finished stages.</p>",
        "<h2>Accuracy on held-out images</h2>" + _accuracy_table(run),
        "<h2>Curves</h2>" + _curves(run),
        _sweeps(run),
        _samples(run),
        "<h2>Stages</h2>" + _stage_table(run),
        "<h2>Plan</h2><pre>" + html.escape((run.folder / "plan.toml").read_text(encoding="utf-8")) + "</pre>",
    ]
    page = run.folder / "report.html"
    write_text(
        page,
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{name} - Patchmill</title>'
        f"<style>{STYLE}</style><body>{''.join(sections)}</body></html>",
    )
    return page


def _accuracy_table(run: Run) -> str:
    rows = "".join(
        f"<tr{' class=main' if row.main else ''}><td>{html.escape(row.what)}</td>"
        f"<td class=n>{100 * row.top1:.1f} %</td><td>{html.escape(row.how)}</td></tr>"
        for row in accuracies(run)
    )
    return f"<table><tr><th>what</th><th>top-1</th><th>how</th></tr>{rows}</table>"


def _sweeps(run: Run) -> str:
    """Show each sweep: its table, and its figure, which is ``sweeps/NAME.png`` too."""
    sections = []
    for swept in read_sweeps(run.folder):
        sections.append(f"<h2>Sweep {html.escape(swept.name)}</h2>{html_table(swept)}")
        if find_spec("matplotlib") and (figure := draw(swept)):
            data = png(figure)
            (run.folder / "sweeps").mkdir(exist_ok=True)
            with whole_file(run.folder / "sweeps" / f"{swept.name}.png") as partial:
                partial.write_bytes(data)
            told = f"sweep {html.escape(swept.name)}, drawn"
            sections.append(f'<img alt="{told}" src="data:image/png;base64,{base64.b64encode(data).decode()}">')
    return "".join(sections)


def _stage_table(run: Run) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{result['kind']}</td><td class=n>{result['seconds']:.0f} s</td></tr>"
        for name, result in run.results.items()
    )
    return f"<table><tr><th>stage</th><th>kind</th><th>time of the last try</th></tr>{rows}</table>"


def _curves(run: Run) -> str:
    """Draw loss, held-out accuracy, speed and data wait of every training stage as one inline SVG."""
    try:
        import matplotlib
    except ImportError:
        return "<p class=note>Curves need matplotlib: pip install patchmill[figures].</p>"
    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10, 6.4), layout="constrained")
    panels = [
        (axes[0, 0], "loss", "training loss", 1),
        (axes[0, 1], "val_top1", "held-out top-1 (%)", 100),
        (axes[1, 0], "images_per_second", "images/s", 1),
        (axes[1, 1], "data_wait", "waiting for data (%)", 100),
    ]
    for name in run.stages(*TRAINING):
        lines = read_metrics(run.folder / "stages" / name / "metrics.jsonl")
        for axis, key, _, scale in panels:
            points = [(line["samples"], scale * line[key]) for line in lines if key in line]
            if points:
                axis.plot(*zip(*points, strict=True), label=name, linewidth=1.6)
    for axis, _, title, _ in panels:
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_xlabel("samples seen", fontsize=8)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
        axis.set_ylim(bottom=0)
    axes[0, 0].legend(frameon=False, fontsize=8)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    plt.close(figure)
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def _samples(run: Run) -> str:
    """Show held-out images with what the last fine-tuned model says of them."""
    configs = {name: read_toml(run.folder / "stages" / name / "resolved.toml") for name in run.stages("finetune")}
    tuned = [name for name, config in configs.items() if "init" in config and "val" in config["data"]]
    if not tuned:
        return ""
    import torch

    from pipeline.images import to_model_input
    from shards.augment import Resize

    folder = run.folder / "stages" / tuned[-1]
    model, classes = load_model(folder)
    data = configs[tuned[-1]]["data"]
    dataset = Dataset.open(data["val"], settings=StoreSettings(**data.get("store", {})))
    figures = []
    for index in np.linspace(0, len(dataset) - 1, min(SAMPLES, len(dataset))).astype(int):
        sample = dataset[int(index)]
        pixels = decode(sample.image, sample.key)
        resized = Resize(model.image_size)(pixels, (0, 0, 0))
        with torch.no_grad():
            shares = model(to_model_input(resized[None], torch.device("cpu"))).softmax(dim=1)[0]
        guess, truth = int(shares.argmax()), sample.labels
        caption = f"{html.escape(classes[guess])} {100 * float(shares[guess]):.0f} %"
        if guess not in truth:
            caption += f"<br>is {html.escape(', '.join(classes[label] for label in truth))}"
        figures.append(
            f'<figure><img alt="{html.escape(sample.key)}" src="data:image/png;base64,{_png(pixels)}">'
            f'<figcaption class="{"right" if guess in truth else "wrong"}">{caption}</figcaption></figure>'
        )
    return f"<h2>What {html.escape(tuned[-1])} says of held-out images</h2><div class=samples>{''.join(figures)}</div>"


def _png(pixels: np.ndarray) -> str:
    image = Image.fromarray(pixels)
    image.thumbnail((192, 192))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()
