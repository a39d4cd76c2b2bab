"""Stages of a plan in processes that are forked from one which has imported everything: a plan of eight in seconds."""

from pathlib import Path

from tests.command import ROOT
from tests.ranks import ends_of_ranks


def run_ranks(arguments: list[str], ranks: int, logs: Path) -> tuple[int, str]:
    """Do what launch/local.py does for a stage, but wait for all ranks; to take its place in ``launch.run``."""
    logs.mkdir(parents=True, exist_ok=True)
    ends = ends_of_ranks(ROOT / "launch" / "cli.py", ranks, *arguments)
    for rank, end in enumerate(ends):
        (logs / f"rank-{rank}.log").write_text(end.stderr)
    return max(abs(end.code) for end in ends), ends[0].stdout
