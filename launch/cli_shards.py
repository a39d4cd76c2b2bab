"""The command line of data sets: ``patchmill shards ...``."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from launch.cli_options import Json

if TYPE_CHECKING:
    from shards.merge import Result

# Torch takes seconds to import, so each command imports what it needs.

shards_app = typer.Typer(no_args_is_help=True, help="Data sets: build, index, check, inspect, look at.")

SAY_WHERE = (
    "if class names or numbers stand somewhere, say where with --label, such as --label txt or --label json:FIELD"
)
LISTED = 10  # rejected images, with where and why


@shards_app.command("build")
def shards_build(
    source: Annotated[
        str, typer.Argument(help="Folder, table, tars, Parquet, CIFAR or ImageNet archive: path or URL.")
    ],
    out: Annotated[str, typer.Argument(help="Folder or URL of the new data set.")],
    kind: Annotated[
        str | None,
        typer.Option(help="Of the source, if it cannot be told; docs/sharding.md lists the kinds."),
    ] = None,
    image: Annotated[str | None, typer.Option(help="Column of images; of tars, the image's extension.")] = None,
    label: Annotated[str | None, typer.Option(help="Column of labels; of tars, cls, txt, json:FIELD ...")] = None,
    weight: Annotated[str | None, typer.Option(help="Column of the labels' weights.")] = None,
    key: Annotated[str | None, typer.Option(help="Column of keys; default: made of paths or rows.")] = None,
    separator: Annotated[str | None, typer.Option(help="Between several labels in one CSV cell.")] = None,
    classes: Annotated[
        str | None, typer.Option(help="File with the name of a class a line; default: all names.")
    ] = None,
    devkit: Annotated[
        str | None, typer.Option(help="ILSVRC2012_devkit_t12.tar.gz; default: beside the images.")
    ] = None,
    real: Annotated[str | None, typer.Option(help="real.json, ReaL labels for ImageNet's validation images.")] = None,
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
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Say what would be built; write nothing (a .tar.gz of tars: unpack it into TMPDIR)."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Build WebDataset shards and their manifest from images; a killed build goes on where it was."""
    from shards.build import build, parse_split
    from shards.encode import Encoding
    from shards.plan import Slice

    options = {
        "image": image, "label": label, "weight": weight, "key": key, "separator": separator, "classes": classes,
        "devkit": devkit, "real": real,
    }  # fmt: skip
    built = build(
        source,
        out,
        kind=kind,
        options={name: value for name, value in options.items() if value is not None},
        shard_samples=shard_samples,
        shard_bytes=shard_bytes,
        split=parse_split(split) if split else None,
        seed=seed,
        encoding=Encoding(resize_short, format, quality),
        decode=decode,
        captions=captions,
        workers=workers,
        own=Slice.parse(slice_),
        max_rejected=max_rejected,
        dry_run=dry_run,
        progress=True,
    )
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
        rejected = f", {_count(len(part.rejected), 'image')} rejected" if part.rejected else ""
        classes = _count(len(built.classes), "class", "classes")
        what = f"{_count(part.samples, 'sample')} of {classes} in {_count(part.shards, 'shard')}"
        size = f"{part.bytes:,} bytes" if part.bytes else "bytes not known yet"
        print(f"{name}: {what}, {size}{rejected}: {part.url}")
        _print_rejected(part.rejected, "image")
    if not built.classes:
        print(f"no image has a label; {SAY_WHERE}")
    if built.others:
        print("left out: " + ", ".join(f"{count} {suffix}" for suffix, count in built.others.items()), file=sys.stderr)


def _print_rejected(rejected: list[tuple[str, str]], what: str) -> None:
    for where, reason in rejected[:LISTED]:
        print(f"left out: {where}: {reason}")
    if len(rejected) > LISTED:
        print(f"left out: {len(rejected):,} {what}s in all; --json lists them")


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


@shards_app.command("index")
def shards_index(
    url: Annotated[str, typer.Argument(help="Folder, bucket, pattern such as x-{000..146}.tar, or tar.")],
    out: Annotated[str | None, typer.Option(help="Where the manifest goes; default: beside the tars.")] = None,
    label: Annotated[
        str, typer.Option(help="Where labels stand: cls, txt, json:FIELD ...; default: cls, or else json.")
    ] = "",
    image: Annotated[str, typer.Option(help="Extension of the image, where samples have several.")] = "",
    classes: Annotated[str | None, typer.Option(help="File with the name of a class a line.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes; default: the cores, as far as they pay.")] = None,
    max_rejected: Annotated[int, typer.Option(help="Broken samples to leave out before giving up.")] = 0,
    as_json: Json = False,
) -> None:
    """Make a manifest for tars of img2dataset, webdataset, timm or Energon, which stay as they are."""
    from shards.index import index

    made = index(
        url, out, label=label, image=image, classes=classes, workers=workers, max_rejected=max_rejected, progress=True
    )
    if as_json:
        print(json.dumps(asdict(made)))
        return
    kept = f" ({made.shards - made.read:,} as they were)" if made.read < made.shards else ""
    what = f"{_count(made.samples, 'sample')} in {_count(made.shards, 'shard')}"
    print(f"{what}{kept}, {made.bytes:,} bytes: {made.url}")
    if made.unlabelled == made.samples:
        print(f"no sample has a label: captions (KEY.txt, or a caption in KEY.json) are none; {SAY_WHERE}")
    else:
        bare = f", {_count(made.unlabelled, 'sample')} without label" if made.unlabelled else ""
        print(_count(len(made.classes), "class", "classes") + bare)
    _print_rejected(made.rejected, "sample")
    if made.skipped:
        print("passed over: " + ", ".join(f"{count:,} {kind}" for kind, count in made.skipped.items()), file=sys.stderr)
    for tar, size in made.trailing.items():
        print(f"{tar}: {size:,} bytes behind the end of the archive, which no reader sees", file=sys.stderr)


@shards_app.command("verify")
def shards_verify(
    url: Annotated[str, typer.Argument(help="Data set.")],
    decode: Annotated[bool, typer.Option("--decode", help="Decode every image, too.")] = False,
    exclude: Annotated[str | None, typer.Option(help="Drop list in use: its samples are no faults.")] = None,
    quarantine: Annotated[str | None, typer.Option(help="New drop list to write, with the faulty samples.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes; default: the cores, as far as they pay.")] = None,
    as_json: Json = False,
) -> None:
    """Compare every tar with the manifest: checksums, places, keys, labels. Exit code 1 if there are faults."""
    from shards.errors import UserError
    from shards.verify import render, verify

    found = verify(url, decode=decode, exclude=exclude, quarantine=quarantine, workers=workers, progress=True)
    if as_json:
        print(json.dumps(asdict(found)))
    else:
        if found.faults:
            Console().print(render(found))
        for note in found.notes:
            print(f"{note.tar}: {note.reason}; the samples in use are whole", file=sys.stderr)
        verdict = "no faults"
        if found.faults:
            verdict = f"{_count(len(found.faults), 'fault')} in {_count(found.faulty, 'sample')}"
        what = f"{_count(found.samples, 'sample')} in {_count(found.shards, 'shard')}"
        print(f"{verdict}: {what}, {found.bytes:,} bytes: {found.url}")
        if found.quarantine:
            dropped = _count(found.faulty + found.dropped, "sample")
            told = f'data.exclude = "{found.quarantine}"'
            print(f"drop list {found.quarantine} leaves out {dropped}; runs use it once told: {told}")
    if found.unwritten:
        raise UserError(found.unwritten)
    if found.faults:
        raise typer.Exit(1)


@shards_app.command("audit")
def shards_audit(
    stage: Annotated[Path, typer.Argument(help="Folder of a training stage, or a checkpoint in it.")],
    data: Annotated[
        list[str] | None, typer.Option(help="Data set of the run, if it has moved; of a mixture all.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes; default: the cores, as far as they pay.")] = None,
    as_json: Json = False,
) -> None:
    """Prove from a run's ledger that its weights saw every sample once an epoch. Exit code 1 if they did not."""
    from shards.audit import audit
    from shards.auditspan import KINDS

    found = audit(stage, data or (), workers, progress=True)
    if as_json:
        print(json.dumps(asdict(found)))
    else:
        for kind in found.counts:
            named = [misfit.reason for misfit in found.misfits if misfit.kind == kind]
            print(f"{kind}: {KINDS[kind]}, {found.counts[kind]:,} times")
            print("\n".join(f"  {reason}" for reason in named))
            if found.counts[kind] > len(named):
                print("  ...")
        starts = f"{_count(len(found.ranks), 'start')} on {', '.join(map(str, found.ranks))} ranks"
        print(f"{found.positions:,} positions to {found.checkpoint}, from {starts}")
        for source in found.sources:
            print(f"{_count(source.epochs, 'whole epoch')} of {_count(source.samples, 'sample')}: {source.url}")
        print(f"{_count(found.stand_ins, 'stand-in')} for {_count(found.replaced, 'sample')} on the quarantine list")
        print("it does not fit" if found.counts else "it fits: each position once, each sample once an epoch")
    if found.counts:
        raise typer.Exit(1)


@shards_app.command("drop")
def shards_drop(
    url: Annotated[str, typer.Argument(help="Data set.")],
    quarantine: Annotated[list[Path], typer.Argument(help="quarantine.jsonl of runs that met broken images.")],
    version: Annotated[str, typer.Option(help="Name of the new drop list.")] = "quarantine-1",
    exclude: Annotated[str | None, typer.Option(help="Older drop list, which the new one takes in.")] = None,
    as_json: Json = False,
) -> None:
    """Write a drop list of the images that training could not decode."""
    from shards.quarantine import drop_quarantined

    new, old = drop_quarantined(url, quarantine, version, exclude)
    if as_json:
        print(json.dumps({"exclude": version, "new": new, "dropped": new + old}))
    else:
        print(f"drop list {version} leaves out {_count(new + old, 'sample')}, {new:,} of them new")


@shards_app.command("dedupe")
def shards_dedupe(
    url: Annotated[str, typer.Argument(help="Training set.")],
    against: Annotated[
        list[str] | None, typer.Option(help="Test set whose images must not be in it; once each.")
    ] = None,
    version: Annotated[str, typer.Option(help="Name of the new drop list.")] = "dedupe-1",
    exclude: Annotated[str | None, typer.Option(help="Older drop list, to read less and to build on.")] = None,
    out: Annotated[
        str | None, typer.Option(help="Folder of report and findings, shared by slices; default: VERSION.")
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
        print(f"{_count(len(found.undecodable), 'training image')} cannot be decoded", file=sys.stderr)
    if not found.finished:
        print(f"{found.shards_left:,} of {found.shards:,} shards are still to be scanned", file=sys.stderr)
        return
    print(f"{found.copies:,} of {found.images:,} training images are copies of test images")
    if found.exclude:
        print(f"drop list: {found.exclude}, {_count(found.dropped, 'sample')}")
    print(f"report: {found.report}")


@shards_app.command("stats")
def shards_stats(
    url: Annotated[str, typer.Argument(help="Data set.")],
    exclude: Annotated[str | None, typer.Option(help="Version of the drop list.")] = None,
    html: Annotated[str | None, typer.Option(metavar="FILE", help="Write a page with histograms as well.")] = None,
    as_json: Json = False,
) -> None:
    """Count classes, labels, sizes, formats and repeats, from the manifest alone."""
    from shards.dataset import Dataset
    from shards.stats import stats
    from shards.stats_view import tables, write_page
    from shards.store import local_path

    to_write = local_path(html, "--html") if html else None
    counted = stats(Dataset.open(url, exclude), progress=True)
    if to_write:
        write_page(to_write, counted)
    if as_json:
        print(json.dumps(asdict(counted)))
    else:
        Console().print(tables(counted))


@shards_app.command("show")
def shards_show(
    url: Annotated[str, typer.Argument(help="Data set.")],
    out: Annotated[str, typer.Argument(help="PNG to write.")] = "contact-sheet.png",
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
    print(json.dumps({"sheet": out, "keys": shown}) if as_json else out)
