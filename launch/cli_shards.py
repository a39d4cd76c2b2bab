"""The command line of data sets: ``patchmill shards ...``."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from shards.merge import Result

# Torch takes seconds to import, so each command imports what it needs.

shards_app = typer.Typer(no_args_is_help=True, help="Data sets: build, index, check, inspect, look at.")

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@shards_app.command("build")
def shards_build(
    source: Annotated[
        str, typer.Argument(help="Folder, table, tars, Parquet, CIFAR or ImageNet archive: path or URL.")
    ],
    out: Annotated[str, typer.Argument(help="Folder or URL of the new data set.")],
    shard_samples: Annotated[int, typer.Option(help="Samples a shard, at most.")] = 10_000,
    shard_bytes: Annotated[int, typer.Option(help="Image bytes a shard, at most.")] = 1_000_000_000,
    split: Annotated[str | None, typer.Option(help="Held-out parts, such as val=0.01; the rest is train.")] = None,
    seed: Annotated[int, typer.Option(help="Of the shuffle.")] = 0,
    resize_short: Annotated[int | None, typer.Option(help="Shrink to this short side, pixels.")] = None,
    format: Annotated[str | None, typer.Option(help="Make all images jpg, png or webp.")] = None,
    quality: Annotated[int | None, typer.Option(help="Of jpg and webp made anew, 1 to 100; default 90.")] = None,
    decode: Annotated[bool, typer.Option("--decode", help="Decode every image, to find damage inside.")] = False,
    captions: Annotated[bool, typer.Option("--captions", help="Add KEY.txt with the class names.")] = False,
    workers: Annotated[int | None, typer.Option(help="Processes; default: the cores, as far as they pay.")] = None,
    slice_: Annotated[
        str, typer.Option("--slice", metavar="I/N", help="Build each N-th shard from I; then merge.")
    ] = "0/1",
    max_rejected: Annotated[int, typer.Option(help="Broken images to leave out before giving up.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be built; write nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Build WebDataset shards and their manifest from images; a killed build goes on where it was."""
    from shards.build import build, parse_split
    from shards.encode import Encoding
    from shards.plan import Slice

    built = build(
        source, out, shard_samples=shard_samples, shard_bytes=shard_bytes, split=parse_split(split) if split else None,
        seed=seed, encoding=Encoding(resize_short, format, quality), decode=decode, captions=captions, workers=workers,
        own=Slice.parse(slice_), max_rejected=max_rejected, dry_run=dry_run, progress=True,
    )  # fmt: skip
    _print_built(built, as_json)
    if not (built.finished or dry_run or as_json):
        print(f"slice {slice_} is done; when all are: patchmill shards merge {out}", file=sys.stderr)


@shards_app.command("merge")
def shards_merge(
    out: Annotated[str, typer.Argument(help="Folder or URL that all slices were built into.")],
    as_json: Json = False,
) -> None:
    """End a build in slices: write the manifest, once all shards are there."""
    from shards.merge import merge

    _print_built(merge(out), as_json)


def _print_built(built: "Result", as_json: bool) -> None:
    if as_json:
        print(json.dumps(asdict(built)))
        return
    for name, part in built.parts.items():
        rejected = f", {len(part.rejected)} images rejected" if part.rejected else ""
        print(f"{name}: {part.samples:,} samples in {part.shards} shards, {part.bytes:,} bytes{rejected}: {part.url}")
    if built.others:
        print("left out: " + ", ".join(f"{count} {suffix}" for suffix, count in built.others.items()), file=sys.stderr)


@shards_app.command("dedupe")
def shards_dedupe(
    url: Annotated[str, typer.Argument(help="Training set.")],
    against: Annotated[
        list[str] | None, typer.Option(help="Test set whose images must not be in it; once each.")
    ] = None,
    version: Annotated[str, typer.Option(help="Name of the new drop list.")] = "dedupe-1",
    exclude: Annotated[str | None, typer.Option(help="Older drop list, which the new one takes in.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of report and findings, shared by slices; default: VERSION.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes; default: the cores.")] = None,
    slice_: Annotated[
        str, typer.Option("--slice", metavar="I/N", help="Scan each N-th shard from I; the last to end finishes.")
    ] = "0/1",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write the report, but no drop list.")] = False,
    as_json: Json = False,
) -> None:
    """List training images that are copies of test images; a killed run goes on where it was."""
    from shards.dedupe import dedupe
    from shards.plan import Slice

    found = dedupe(
        url, against or [], version=version, base=exclude, out=out, workers=workers, own=Slice.parse(slice_),
        dry_run=dry_run, progress=True,
    )  # fmt: skip
    if as_json:
        print(json.dumps(asdict(found)))
        return
    for test in found.tests:
        print(f"{test.name}: {test.exact:,} same bytes, {test.near:,} same picture ({test.mirrored:,} mirrored)")
    if found.undecodable:
        print(f"{len(found.undecodable):,} training images cannot be decoded", file=sys.stderr)
    if not found.finished:
        print(f"{found.shards_left:,} of {found.shards:,} shards are still to be scanned", file=sys.stderr)
        return
    print(f"{found.copies:,} of {found.images:,} training images are copies of test images")
    if found.exclude:
        print(f"drop list: {found.exclude}, {found.dropped:,} samples")
    print(f"report: {found.report}")


@shards_app.command("stats")
def shards_stats(
    url: Annotated[str, typer.Argument(help="Data set.")],
    exclude: Annotated[str | None, typer.Option(help="Version of the drop list.")] = None,
    as_json: Json = False,
) -> None:
    """Count classes, sizes and formats, from the manifest alone."""
    from shards.dataset import Dataset
    from shards.stats import render, stats

    counted = stats(Dataset.open(url, exclude))
    if as_json:
        print(json.dumps(asdict(counted)))
    else:
        Console().print(render(counted))


@shards_app.command("show")
def shards_show(
    url: Annotated[str, typer.Argument(help="Data set.")],
    out: Annotated[Path, typer.Argument(help="PNG to write.")] = Path("contact-sheet.png"),
    samples: Annotated[int, typer.Option(help="Images on the sheet, at most.")] = 96,
    as_json: Json = False,
) -> None:
    """Write a contact sheet: a row of images for each class."""
    from shards.dataset import Dataset
    from shards.show import show

    keys = show(Dataset.open(url), out, samples)
    print(json.dumps({"sheet": str(out), "keys": keys}) if as_json else out)
