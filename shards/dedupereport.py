"""The audit of ``shards dedupe`` on one page: what was scanned, what was found, and the pairs side by side."""

import base64
import html
import io
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
from PIL import Image

from shards import phash
from shards.atomic import write_text
from shards.dataset import Dataset
from shards.decode import DecodeError, decode

if TYPE_CHECKING:
    from shards.dedupe import Result

PAIRS = 200  # shown of each test set
LISTED = 50  # undecodable images named of each data set
PIXELS = 128  # longest side of an image on the page

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#1c2430}
h1{margin-bottom:0}h2{margin-top:2.5rem;border-bottom:1px solid #d8dee6}p.note{color:#5b6673;margin-top:.3rem}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.3rem .9rem;border-bottom:1px solid #e6eaef;text-align:left}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
.pairs{display:grid;grid-template-columns:repeat(auto-fill,minmax(290px,1fr));gap:1rem}
figure{margin:0;padding:.5rem;border:1px solid #e6eaef;border-radius:6px;font-size:12px;overflow-wrap:anywhere}
figure div{display:grid;grid-template-columns:1fr 1fr;gap:.4rem;place-items:center;min-height:128px}
figure img{max-width:128px;max-height:128px;background:#f6f8fa}
figcaption b{color:#0a4fa3}
"""


def write_report(
    path: Path, result: "Result", pairs: pa.Table, train: Dataset, tests: list[Dataset], base: str | None
) -> None:
    """Write ``report.html``: no scripts, no other files, nothing from the network.

    Args:
        path: The file.
        result: The counts.
        pairs: Rows of ``PAIRS_SCHEMA``.
        train: The training set, nothing dropped.
        tests: The test sets, in the order of ``result.tests``.
        base: The older drop list that the new one builds on.
    """
    sections = [
        "<h1>Copies of test images</h1>"
        f"<p class=note>{result.copies:,} of {result.images:,} training images show a test image.</p>",
        "<h2>What was scanned</h2>" + _summary(result, base),
        "<h2>Test sets</h2>" + _test_table(result),
        *(_pairs(result.tests[i].name, pairs, train, test) for i, test in enumerate(tests)),
        "<h2>Thresholds</h2>" + _table(["", ""], ((name, f"{value:g}") for name, value in phash.THRESHOLDS.items())),
        _undecodable("Training images that cannot be decoded", result.undecodable),
        *(_undecodable(f"Images of {test.name} that cannot be decoded", test.undecodable) for test in result.tests),
    ]
    write_text(
        path,
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Copies of test images - Patchmill</title>'
        f"<style>{STYLE}</style><body>{''.join(sections)}</body></html>",
    )


def _summary(result: "Result", base: str | None) -> str:
    drop_list = "none: a dry run" if result.exclude is None else f"{result.exclude}, {result.dropped:,} samples"
    if base and result.exclude:
        drop_list += f", those of {base} among them"
    rows = [
        ("training set", result.url),
        ("images", f"{result.images:,} in {result.shards:,} shards"),
        ("only compared by their bytes", f"{result.blank:,} blank, "
                                         f"{len(result.undecodable):,} that cannot be decoded"),
        ("drop list", drop_list),
    ]  # fmt: skip
    return _table(["", ""], rows)


def _test_table(result: "Result") -> str:
    heads = ["test set", "images", "blank", "undecodable", "copies found: same bytes", "same picture",
             "of these mirrored", "test images hit"]  # fmt: skip
    return _table(
        heads,
        (
            (each.url, *(f"{count:,}" for count in (each.images, each.blank, len(each.undecodable), each.exact,
                                                    each.near, each.mirrored, each.hit)))
            for each in result.tests
        ),
        numbers_from=1,
    )  # fmt: skip


def _table(heads: list[str], rows: Iterable[tuple[str, ...]], numbers_from: int = 9) -> str:
    def line(cells: Iterable[str], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=n' if i >= numbers_from else ''}>{html.escape(cell)}</{tag}>"
            for i, cell in enumerate(cells)
        )

    head = f"<tr>{line(heads, 'th')}</tr>" if any(heads) else ""
    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return f"<table>{head}{body}</table>"


def _pairs(name: str, pairs: pa.Table, train: Dataset, test: Dataset) -> str:
    rows = [row for row in pairs.to_pylist() if row["test"] == name]
    if not rows:
        return f"<h2>{html.escape(name)}</h2><p class=note>No copies found.</p>"
    rows.sort(key=lambda row: (row["kind"] == "exact", -row["mismatch"], row["shard"], row["index"]))
    shown = rows[:PAIRS]
    said = f"All {len(rows):,}" if len(shown) == len(rows) else f"{len(shown):,} of {len(rows):,}"
    figures = "".join(
        f"<figure><div>{_image(train, row['shard'], row['index'])}"
        f"{_image(test, row['test_shard'], row['test_index'])}</div><figcaption>{_caption(row)}</figcaption></figure>"
        for row in shown
    )
    return (
        f"<h2>{html.escape(name)}</h2><p class=note>{said} pairs, the least certain first: training image left, "
        f"test image right.</p><div class=pairs>{figures}</div>"
    )


def _caption(row: dict) -> str:
    how = ["same bytes"]
    if row["kind"] == "near":
        how = ["mirrored"] * row["mirrored"]
        how += [f"pictures {row['whole']:.3f}, detail {row['detail']:.3f}, mismatch {row['mismatch']:.2f}"]
        how += [f"corner moved {100 * row['moved']:.1f} %"] * (row["moved"] > 0)
    return f"<b>{', '.join(how)}</b><br>{html.escape(row['key'])}<br>{html.escape(row['test_key'])}"


def _image(dataset: Dataset, shard: int, index: int) -> str:
    sample = dataset.read(shard, index)
    try:
        image = Image.fromarray(decode(sample.image, sample.key, short=PIXELS))
    except DecodeError:
        return "<span>cannot be decoded</span>"
    image.thumbnail((PIXELS, PIXELS))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=80)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(sample.key)}" src="data:image/jpeg;base64,{data}">'


def _undecodable(title: str, entries: list[tuple[str, str]]) -> str:
    if not entries:
        return ""
    more = f"<p class=note>and {len(entries) - LISTED:,} more</p>" if len(entries) > LISTED else ""
    return f"<h2>{html.escape(title)}</h2>" + _table(["key", "reason"], entries[:LISTED]) + more
