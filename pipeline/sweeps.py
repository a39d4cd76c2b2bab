"""Sweeps of a finished run, a row for each of their runs: what it changed, what came out, and what others found."""

import html
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.settings import flat, read_toml

Cell = float | int | str | bool | None


@dataclass(frozen=True)
class Member:
    """One run of a sweep.

    Attributes:
        name: Of its stage.
        changed: The settings that it does not share with all other runs, by dotted key; those of the run that it starts
            from among them.
        model: Name of its model, if it or the run that it starts from tells one.
        exaflops: Of its training, or where it starts from another stage, of that one's.
        top1: On held-out images, in [0, 1]: at the end, or where patience could end it before, the best.
        result: As the stage left it.
    """

    name: str
    changed: dict[str, Cell]
    model: str | None
    exaflops: float | None
    top1: float | None
    result: dict[str, Any]


@dataclass(frozen=True)
class Swept:
    """A sweep whose runs have ended, as far as they have.

    Attributes:
        name: Of the stage.
        members: Its runs.
        beside: What others found, a column by title, a value for each run that there is to be.
    """

    name: str
    members: list[Member]
    beside: dict[str, list[Cell]]

    def table(self) -> dict[str, list[Cell]]:
        """Return the columns of its table by title, with a cell for each of the members.

        What all of them set has a column each; what some do, as the sizes of different models, one together.
        """
        keys = list(dict.fromkeys(key for member in self.members for key in member.changed))
        words = [short(key) for key in keys]
        titles = {key: word if words.count(word) == 1 else key for key, word in zip(keys, words, strict=True)}
        some = [key for key in keys if any(key not in member.changed for member in self.members)]
        columns: dict[str, list[Cell]] = {"run": [member.name for member in self.members]}
        columns |= {titles[key]: [member.changed[key] for member in self.members] for key in keys if key not in some}
        if some:
            columns["with"] = [
                ", ".join(f"{titles[key]} {member.changed[key]}" for key in some if key in member.changed)
                for member in self.members
            ]
        for title, values in self._measured().items():
            if any(value is not None for value in values):
                columns[title] = values
        numbers = [int(member.name.rpartition("-")[2]) for member in self.members]
        return columns | {title: [values[number] for number in numbers] for title, values in self.beside.items()}

    def _measured(self) -> dict[str, list[Cell]]:
        """Return what the runs measured, in the units that papers print."""
        probes = dict.fromkeys(key for member in self.members for key in member.result if key.startswith("probe_"))
        columns: dict[str, list[Cell]] = {"exaFLOPs": [_digits(member.exaflops) for member in self.members]}
        columns["top-1 (%)"] = [_percent(member.top1) for member in self.members]
        if columns["top-1 (%)"].count(None) == len(self.members):
            columns["loss"] = [_digits((member.result["val"] or {}).get("loss")) for member in self.members]
        for key in probes:
            title = key.removeprefix("probe_").replace("shot", "-shot")
            columns[f"{title} (%)"] = [_percent(member.result.get(key)) for member in self.members]
        return columns


def read_sweeps(run: Path) -> list[Swept]:
    """Return the sweeps of a run's folder, those of which a run has ended."""
    found: dict[str, Swept] = {}
    stages = {stage["name"]: stage for stage in read_toml(run / "plan.toml")["stage"]}
    for name, stage in stages.items():
        if "sweep" in stage and (members := _members(run, name, stages, found)):
            found[name] = Swept(name, members, stage.get("beside", {}))
    return list(found.values())


def short(key: str) -> str:
    """Return the last word of a setting's key, or what it is the name of."""
    return key.removesuffix(".name").rpartition(".")[2]


def print_sweeps(sweeps: list[Swept]) -> None:
    """Print the table of each on stdout."""
    for swept in sweeps:
        table = Table(title=swept.name, title_justify="left")
        for title, values in (columns := swept.table()).items():
            table.add_column(title, justify="right" if _numbers(values) else "left")
        for row in zip(*columns.values(), strict=True):
            table.add_row(*map(_text, row))
        Console().print(table)


def html_table(swept: Swept) -> str:
    """Return the table of a sweep for a page."""
    columns = swept.table()
    head = "".join(f"<th>{html.escape(title)}</th>" for title in columns)
    right = [" class=n" if _numbers(values) else "" for values in columns.values()]
    rows = "".join(
        "<tr>"
        + "".join(f"<td{how}>{html.escape(_text(cell))}</td>" for how, cell in zip(right, row, strict=True))
        + "</tr>"
        for row in zip(*columns.values(), strict=True)
    )
    return f"<table><tr>{head}</tr>{rows}</table>"


def _members(run: Path, name: str, stages: dict[str, dict], before: dict[str, Swept]) -> list[Member]:
    folders = {
        int(each.name[len(name) + 1 :]): each for each in (run / "stages").glob(f"{name}-*") if _is_of(name, each)
    }
    results = {
        folders[n]: json.loads((folders[n] / "result.json").read_text(encoding="utf-8")) for n in sorted(folders)
    }
    settings = {each: flat(read_toml(each / "config.toml")) for each in results}
    known = {member.name: member for swept in before.values() for member in swept.members}
    keys = dict.fromkeys(key for each in settings.values() for key in each)
    differing = [key for key in keys if len({repr(each.get(key)) for each in settings.values()}) > 1]
    members = []
    for folder, result in results.items():
        mine, config = result["result"], settings[folder]
        changed = {key: config[key] for key in differing if key in config}
        source = _stage_of(run, config.get("init"), stages)
        start = known.get(source) if source else None
        if "init" in changed:
            changed = {key: value for key, value in changed.items() if key != "init"}
            changed = {"from": source or config["init"]} | (start.changed if start else {}) | changed
        model = config.get("model.name") or (start.model if start else None)
        exaflops = start.exaflops if start else None if "init" in config else mine.get("exaflops")
        found = mine["best" if "evaluate.patience" in config else "val"] or {}
        members.append(Member(folder.name, changed, model, exaflops, found.get("top1"), mine))
    return members


def _is_of(name: str, folder: Path) -> bool:
    return re.fullmatch(r"\d+", folder.name[len(name) + 1 :]) is not None and (folder / "result.json").is_file()


def _stage_of(run: Path, init: str | None, stages: dict[str, dict]) -> str | None:
    """Return the name of the stage that trained the weights at a path, through a conversion; None: none of this run."""
    if init is None or not Path(init).is_relative_to((run / "stages").resolve()):
        return None
    name = Path(init).relative_to((run / "stages").resolve()).parts[0]
    source = re.match(r"\{([\w-]+)\}", str(stages.get(name, {}).get("set", {}).get("source", "")))
    return source[1] if source and stages[name]["kind"] == "convert" else name


def _percent(share: float | None) -> float | None:
    return None if share is None else round(100 * share, 2)


def _digits(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def _numbers(values: list[Cell]) -> bool:
    return all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values if value is not None)


def _text(cell: Cell) -> str:
    return "" if cell is None else str(cell)
