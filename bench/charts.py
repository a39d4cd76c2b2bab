"""Draw bench/charts.png of the table in bench/README.md: ours beside its peers, wherever a row has them.

The table is what was measured, and the picture says nothing else; ``tests/bench/test_charts.py`` holds it to that.
"""

import hashlib
import re
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

HERE = Path(__file__).parent
PICTURE, README = HERE / "charts.png", HERE / "README.md"
SOURCE = "Source"  # of the PNG's own texts: the digest of the rows that it was drawn of
COLOURS = {
    "Patchmill": "#0b6e4f", "DALI": "#76b7b2", "webdataset": "#f28e2b", "streaming": "#e15759", "timm": "#4e79a7",
    "transformers": "#edc948", "dd": "#bab0ac", "torch.save": "#9c755f", "DeepSpeed": "#b07aa1",
}  # fmt: skip
"""Of whatever is compared, the peers by the names that the table calls them."""

PANELS = {
    "Photographs, decoded and cropped (images/s)": {
        "55 kB,\none core": ("loader", "photographs of 500 × 375, 55 kB"),
        "55 kB,\ntwo cores": ("loader", "the same on two cores: 87 %"),
        "100 kB,\none core": ("loader", "photographs of 100 kB"),
        "100 kB,\ntwo cores": ("loader", "the same on two cores: 103 %"),
    },
    "Distinct shards in a batch": {"of 4,096, data sorted by class": ("shuffle", "data sorted by class")},
    "Features, ViT-S/16 (images/s)": {"end to end": ("features", "features of photographs")},
    "Training step (images/s)": {
        f"{size}/16\n× {batch}\n{short}": ("train_step", f"training step of ViT-{size}/16, batch {batch}, {dtype}")
        for size in "SB"
        for batch in (8, 16)
        for short, dtype in (("fp32", "float32"), ("bf16", "bfloat16"))
    },
    "A checkpoint until on disk (s; less is better)": {
        "ViT-L/16": ("checkpoint.py --model ViT-L/16", "until it is durable"),
        "ViT-H/14": ("checkpoint.py --model ViT-H/14", "until it is durable"),
    },
    "Their preprocessing (images/s)": {"alone": ("features", "their preprocessing")},
}
"""Bars of each panel: what is written below, and which row it is, by its command and how its text begins."""


class Measured(NamedTuple):
    """A median, and what it lies between."""

    median: float
    least: float
    greatest: float


def table(text: str) -> list[tuple[str, str, str, list[str]]]:
    """Return (command, what, ours, cells of peers) of each row of the table in a README's text."""
    rows, command = [], ""
    for line in text.splitlines():
        if not line.startswith("| ") or line.startswith("| command"):
            continue
        first, what, ours, peer, _ = (cell.strip() for cell in line[1:-1].split("|"))
        command = first or command
        if what:
            rows.append((command, what, ours, [peer]))
        else:
            rows[-1][3].append(peer)  # another peer of the row before
    return rows


def values(rows: list[tuple[str, str, str, list[str]]], command: str, begins: str) -> dict[str, Measured]:
    """Return what was measured, by name, of the row of a command that begins so."""
    (found,) = [row for row in rows if command in row[0] and row[1].startswith(begins)]
    said = {"Patchmill": _measured(found[2])}
    for piece in "; ".join(found[3]).split("; "):
        for name in COLOURS:
            if re.search(rf"\b{re.escape(name)}\b", piece):
                said[name] = _measured(piece.rpartition(": ")[2] if ": " in piece else piece.partition(name)[2])
    return said


def _measured(text: str) -> Measured:
    number = r"(\d[\d,]*(?:\.\d+)?)"
    found = re.search(rf"{number}(?: \({number}–{number}\))?", text)
    median, least, greatest = (each and float(each.replace(",", "")) for each in found.groups())
    return Measured(median, least or median, greatest or median)


def digest(rows: list[tuple[str, str, str, list[str]]]) -> str:
    """Return the digest of all that the picture shows."""
    shown = [[values(rows, *row) for row in bars.values()] for bars in PANELS.values()]
    return hashlib.sha256(repr(shown).encode()).hexdigest()


def draw(axes: Axes, title: str, groups: dict[str, dict[str, Measured]]) -> None:
    """Draw one panel: of each group a bar for everybody measured, and a line from the least to the greatest."""
    names = [name for name in COLOURS if any(name in group for group in groups.values())]
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        at = np.arange(len(groups)) + (place - (len(names) - 1) / 2) * width
        found = [group.get(name, Measured(0.0, 0.0, 0.0)) for group in groups.values()]
        axes.bar(at, [each.median for each in found], width * 0.94, color=COLOURS[name], label=name)
        axes.vlines(at, [each.least for each in found], [each.greatest for each in found], color="#333333", lw=0.8)
        for x, each in zip(at, found, strict=True):
            label = f"{each.median:,.0f}" if each.median >= 100 else f"{each.median:.3g}"
            axes.annotate(label, (x, each.greatest), (0, 2), textcoords="offset points", ha="center", fontsize=6)
    axes.set_title(title, fontsize=9, loc="left", weight="bold")
    axes.set_xticks(range(len(groups)), list(groups), fontsize=7)
    axes.tick_params(axis="y", labelsize=7)
    axes.margins(x=0.05 if len(groups) > 1 else 0.4, y=0.18)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False, ncols=len(names), loc="upper left", handlelength=1, columnspacing=1)


def main() -> None:
    """Draw the picture."""
    rows = table(README.read_text(encoding="utf-8"))
    figure, axes = plt.subplots(2, 3, figsize=(15, 7), width_ratios=[5, 3, 2], layout="constrained")
    for place, (title, bars) in zip(axes.flat, PANELS.items(), strict=True):
        draw(place, title, {label: values(rows, *row) for label, row in bars.items()})
    figure.savefig(PICTURE, dpi=110, metadata={SOURCE: digest(rows)})


if __name__ == "__main__":
    main()
