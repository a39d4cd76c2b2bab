"""The accuracies of a run as a table on stdout."""

from rich.console import Console
from rich.table import Table

from pipeline.report.accuracies import accuracies
from pipeline.report.run import Run
from pipeline.sweeps import print_sweeps, read_sweeps


def print_table(run: Run) -> None:
    """Print top-1 on held-out images of everything the run measured, and its sweeps."""
    table = Table(title=f"{run.name}: top-1 on held-out images", title_justify="left")
    table.add_column("what")
    table.add_column("top-1", justify="right")
    table.add_column("how")
    for row in accuracies(run):
        table.add_row(row.what, f"{100 * row.top1:.1f} %", row.how, style="bold" if row.main else None)
    Console().print(table)
    print_sweeps(read_sweeps(run.folder) if run.plan is not None else [])
