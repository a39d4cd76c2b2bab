"""What every benchmark shares: its arguments, the machine, medians, the table and the JSON."""

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterable
from importlib.metadata import distributions
from pathlib import Path
from statistics import median
from typing import NamedTuple

from peers import VENV

OURS = ("numpy", "torch", "deepspeed", "transformers", "webdataset", "pillow", "opencv-python-headless", "simplejpeg")
PEERS = ("torch", "torchvision", "timm", "transformers", "webdataset", "pillow", "mosaicml-streaming",
         "nvidia-dali-cuda120")  # fmt: skip


class Row(NamedTuple):
    """One measured quantity: the median of its rounds, with least and greatest."""

    name: str
    value: float
    unit: str
    min: float
    max: float


def row(name: str, unit: str, values: list[float]) -> Row:
    """Sum up the rounds of one quantity."""
    return Row(name, median(values), unit, min(values), max(values))


def parser(description: str) -> argparse.ArgumentParser:
    """Return a parser of the arguments that every benchmark takes: ``quick`` and ``json``."""
    found = argparse.ArgumentParser(description=description)
    found.add_argument("--quick", action="store_true", help="little data, for tests: the numbers mean nothing")
    found.add_argument("--json", type=Path, metavar="PATH", help="write the result there as well")
    return found


def arguments(description: str) -> argparse.Namespace:
    """Parse the arguments that every benchmark takes."""
    return parser(description).parse_args()


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))


def machine() -> dict:
    """Describe the machine in words that outlive it, no host name, and the versions of what is measured on it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
    versions = {**installed(OURS), "peers": installed(PEERS, VENV.glob("lib/python*/site-packages"))}
    return {"cpu": model, "cores": cores(), "python": platform.python_version(), **versions}


def installed(names: Iterable[str], folders: Iterable[Path] | None = None) -> dict[str, str]:
    """Return the versions of those packages that are installed, here or in folders of packages; imports none."""
    path = sys.path if folders is None else [str(folder) for folder in folders]
    found = {name: next(iter(distributions(name=name, path=path)), None) for name in names}
    return {name: each.version for name, each in found.items() if each}


def memory(field: str) -> float:
    """Return a memory counter of this process in MB: VmRSS is what it holds now, VmHWM the peak of that."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"no {field} in /proc/self/status")


def report(bench: str, rows: list[Row], ratios: dict[str, float | None], path: Path | None) -> None:
    """Print the table, and write the JSON if a path is given.

    A ratio above 1 means that ours is better; None that the peer is missing.
    """
    from rich.console import Console  # which the peers' environment has not
    from rich.table import Table

    where = machine()
    table = Table("", "median", "min", "max", "unit", title=f"{bench}: {where['cpu']}, {where['cores']} cores")
    for each in rows:
        table.add_row(each.name, *(f"{x:,.4g}" for x in (each.value, each.min, each.max)), each.unit)
    for peer, ratio in ratios.items():
        shown = "missing" if ratio is None else f"{ratio:.2f}"
        table.add_row(f"ours / {peer}", shown, "", "", "" if ratio is None else "x")
    Console().print(table)
    if path:
        result = {
            "bench": bench,
            "machine": where,
            "rows": [each._asdict() for each in rows],
            "ratios": ratios,
        }
        path.write_text(json.dumps(result, indent=1) + "\n")
