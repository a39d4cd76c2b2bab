"""What the doctor found, and how it is told."""

import json
import sys
from typing import NamedTuple, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}


class Finding(NamedTuple):
    """One thing that was looked at.

    Attributes:
        what: It is.
        state: "ok"; "warning", when a run can be gone on with; or "error".
        told: What was found; where it is not good, what to do.
        hosts: That a job is better off without.
    """

    what: str
    state: str
    told: str
    hosts: tuple[str, ...] = ()


def of_all_hosts(found: dict[str, list[Finding]]) -> list[Finding]:
    """Return what was found on the first host, and what is not ok on others alone, with their names.

    Args:
        found: By host; whatever all share, each has found.
    """
    first, *_ = found.values()
    told = {(each.what, each.state) for each in first}
    others: dict[tuple[str, str, str], list[str]] = {}
    for host, findings in found.items():
        for what, state, why, _ in findings:
            if state != "ok" and (what, state) not in told:
                others.setdefault((what, state, why), []).append(host)
    return first + [Finding(what, state, f"on {', '.join(at)}: {why}") for (what, state, why), at in others.items()]


def print_result(findings: list[Finding], as_json: bool) -> None:
    """Print what was found on stdout, for people or for scripts."""
    if as_json:
        print(json.dumps([each._asdict() for each in findings]), flush=True)
    else:
        print_findings(findings, Console().width if sys.stdout.isatty() else None)


def print_findings(findings: list[Finding], width: int | None = None, file: TextIO | None = None) -> None:
    """Print what was found, as a table so many characters wide; of no width, each on one line, however long."""
    if width is None:
        what, state = (max((len(each[column]) for each in findings), default=0) for column in (0, 1))
        for each in findings:
            print(f"{each.state:{state}}  {each.what:{what}}  {each.told}", file=file, flush=True)
        return
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for _ in range(3):
        table.add_column(overflow="fold")
    for each in findings:
        table.add_row(Text(each.state, STYLES[each.state]), each.what, Text(each.told))
    Console(file=file, width=width, highlight=False).print(table)
