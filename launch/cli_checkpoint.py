"""The command line of checkpoints: ``patchmill checkpoint ...``."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from launch.cli_options import Json
from shards.errors import PatchmillError

# Torch takes seconds to import, so each command imports what it needs.

checkpoint_app = typer.Typer(no_args_is_help=True, help="Checkpoints: list, look at, check, compare.")

Where = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a training stage, or one checkpoint.")]
LISTED = 20  # tensors that differ


@checkpoint_app.command("list")
def checkpoint_list(run: Where, as_json: Json = False) -> None:
    """List the checkpoints of a training stage, oldest first; sizes of files are looked at, checksums are not."""
    from pipeline.catalogue import facts, find

    found = [facts(path) for path in find(run)]
    if as_json:
        print(json.dumps(found))
        return
    table = Table(box=None, pad_edge=False)
    for title in ("checkpoint", "step", "samples", "ranks", "engine", "GB", "digest", ""):
        right = title in ("step", "samples", "ranks", "GB")
        table.add_column(title, justify="right" if right else "left", no_wrap=True)
    for each in found:
        notes = ", ".join([*each["pointers"], *(["BROKEN"] if each["problem"] else [])])
        if "samples" not in each:
            table.add_row(each["name"], *[""] * 6, notes)
            continue
        table.add_row(
            each["name"], str(each["step"]), f"{each['samples']:,}", str(each["world_size"]), _engine(each),
            f"{each['bytes'] / 1e9:.3g}", each["digest"][:8], notes,
        )  # fmt: skip
    _console().print(table)
    for each in found:
        if each["problem"]:
            print(each["problem"])


@checkpoint_app.command("show")
def checkpoint_show(run: Where, as_json: Json = False) -> None:
    """Show what the newest checkpoint of a training stage, or one by its path, is of."""
    from pipeline.catalogue import facts, newest

    found = facts(newest(run))
    if as_json:
        print(json.dumps(found))
        return
    table = Table(show_header=False)
    for key, value in found.items():
        if isinstance(value, dict):
            value = "  ".join(f"{name} {each}" for name, each in value.items())
        table.add_row(key, "" if value is None else f"{value:,}" if isinstance(value, int) else str(value))
    _console().print(table)


@checkpoint_app.command("verify")
def checkpoint_verify(run: Where, as_json: Json = False) -> None:
    """Check sizes and checksums of all checkpoints of a training stage, or of one; exit code 1 if one is broken."""
    from pipeline.catalogue import find
    from pipeline.checkpoint import Checkpoint

    found = []
    for path in find(run):
        problem = None
        try:
            Checkpoint(path).verify()
        except PatchmillError as error:  # broken, or of a newer Patchmill
            problem = str(error)
        found.append({"path": str(path), "whole": problem is None, "problem": problem})
        if not as_json:
            print(f"{path}: {problem or 'whole'}")
    if as_json:
        print(json.dumps(found))
    if broken := [each["path"] for each in found if not each["whole"]]:
        raise PatchmillError(
            f"{len(broken)} of {len(found)} checkpoints are broken; a run goes on from the newest whole one"
        )


@checkpoint_app.command("diff")
def checkpoint_diff(first: Where, second: Where, as_json: Json = False) -> None:
    """Compare two checkpoints tensor by tensor, whatever number of ranks and ZeRO stage wrote each."""
    from pipeline.catalogue import newest
    from pipeline.checkpoint import Checkpoint
    from pipeline.compare import compare, summary

    one, other = Checkpoint(newest(first)), Checkpoint(newest(second))
    rows = compare(one, other)
    result: dict[str, Any] = {
        "first": str(one.path), "second": str(other.path), "samples": [one.samples, other.samples],
        "world_sizes": [one.world_size, other.world_size], "same": all(row["same"] for row in rows),
        "kinds": summary(rows), "differences": [row for row in rows if not row["same"]],
    }  # fmt: skip
    if as_json:
        print(json.dumps(result))
        return
    table = Table(box=None, pad_edge=False)
    for title in ("kind", "tensors", "differ", "largest difference", "of"):
        table.add_column(title, justify="left" if title in ("kind", "of") else "right")
    for kind, each in result["kinds"].items():
        largest = "" if not each["differ"] else "not a number" if each["largest"] is None else f"{each['largest']:.3g}"
        table.add_row(kind, str(each["tensors"]), str(each["differ"]), largest, each["parameter"] or "")
    _console().print(table)
    apart = [row for row in rows if row["only_in"] or "shapes" in row]
    for row in apart[:LISTED]:
        told = f"is only in the {row['only_in']}" if row["only_in"] else "has shapes {} and {}".format(*row["shapes"])
        print(f"{row['kind']} of {row['parameter']} {told}")
    if len(apart) > LISTED:
        print(f"and {len(apart) - LISTED} more", file=sys.stderr)
    print("the same, to the bit" if result["same"] else "not the same")


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 200, highlight=False)


def _engine(each: dict[str, Any]) -> str:
    return "accelerate" if each["engine"] == "accelerate" else f"ZeRO {each['zero_stage']}"
