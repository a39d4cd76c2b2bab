"""The command line of data sets: ``patchmill shards ...``."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

# Torch takes seconds to import, so each command imports what it needs.

shards_app = typer.Typer(no_args_is_help=True, help="Data sets: build, index, check, inspect, look at.")

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@shards_app.command("build")
def shards_build(
    source: Annotated[Path, typer.Argument(help="Folder with one folder of images a class.")],
    out: Annotated[Path, typer.Argument(help="Folder of the new data set.")],
    shard_samples: Annotated[int, typer.Option(help="Samples a shard, at most.")] = 10_000,
    shard_bytes: Annotated[int, typer.Option(help="Image bytes a shard, at most.")] = 1_000_000_000,
    workers: Annotated[
        int | None, typer.Option(help="Processes; default: one for each 10,000 images, up to the cores.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Held-out parts, such as val=0.01; the rest is train.")] = None,
    max_rejected: Annotated[int, typer.Option(help="Broken images to leave out before giving up.")] = 0,
    as_json: Json = False,
) -> None:
    """Build WebDataset shards and their manifest from raw images; a killed build goes on where it was."""
    from shards.build import build, parse_split

    built = build(
        source, out, shard_samples=shard_samples, shard_bytes=shard_bytes, workers=workers,
        split=parse_split(split) if split else None, max_rejected=max_rejected, progress=True,
    )  # fmt: skip
    if as_json:
        print(json.dumps(asdict(built)))
        return
    for name, part in built.parts.items():
        rejected = f", {len(part.rejected)} images rejected" if part.rejected else ""
        print(f"{name}: {part.samples:,} samples in {part.shards} shards, {part.bytes:,} bytes{rejected}: {part.url}")
    if built.others:
        print("left out: " + ", ".join(f"{count} {suffix}" for suffix, count in built.others.items()), file=sys.stderr)


@shards_app.command("stats")
def shards_stats(
    url: Annotated[str, typer.Argument(help="Data set.")],
    exclude: Annotated[str | None, typer.Option(help="Version of the drop list.")] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page with histograms as well.")] = None,
    as_json: Json = False,
) -> None:
    """Count classes, labels, sizes, formats and repeats, from the manifest alone."""
    from shards.atomic import write_text
    from shards.dataset import Dataset
    from shards.stats import stats
    from shards.stats_view import page, tables

    counted = stats(Dataset.open(url, exclude), progress=True)
    if html:
        write_text(html, page(counted))
    if as_json:
        print(json.dumps(asdict(counted)))
    else:
        Console().print(tables(counted))


@shards_app.command("show")
def shards_show(
    url: Annotated[str, typer.Argument(help="Data set.")],
    out: Annotated[Path, typer.Argument(help="PNG to write.")] = Path("contact-sheet.png"),
    class_names: Annotated[
        list[str] | None, typer.Option("--class", metavar="NAME", help="Only these; repeat it, or put commas between.")
    ] = None,
    keys: Annotated[
        list[str] | None, typer.Option("--key", metavar="KEY", help="Exactly these samples; repeat it.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Images on the sheet, at most.")] = 96,
    exclude: Annotated[str | None, typer.Option(help="Version of the drop list.")] = None,
    as_json: Json = False,
) -> None:
    """Write a contact sheet: images of each class, evenly, or those asked for by class or key."""
    from shards.dataset import Dataset
    from shards.show import show

    shown = show(Dataset.open(url, exclude), out, samples, class_names or (), keys or ())
    print(json.dumps({"sheet": str(out), "keys": shown}) if as_json else out)
