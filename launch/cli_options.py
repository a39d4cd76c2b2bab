"""What several commands share: options, and how their results are shown."""

import json
import os
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Smoke = Annotated[
    bool, typer.Option("--smoke", help="Shrink depth, width, resolution, batch and steps to a run of seconds.")
]


def print_result(result: dict[str, Any], as_json: bool) -> None:
    """Print a command's result once, on rank 0."""
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        print(json.dumps(result))
        return
    table = Table(show_header=False)
    for key, value in result.items():
        table.add_row(key, shown(value))
    Console().print(table)


def shown(value: Any) -> str:
    """Return a value for people: numbers short, those of a table or a list in a line, a table of tables in several."""
    if isinstance(value, dict):
        apart = "\n" if any(isinstance(each, dict) for each in value.values()) else "  "
        return apart.join(f"{key}{':' * key.isdigit()} {shown(each)}" for key, each in value.items())
    if isinstance(value, list) and value:
        return ", ".join(map(shown, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
