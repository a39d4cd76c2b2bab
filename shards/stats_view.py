"""The statistics of a data set to look at: tables on a terminal, and one HTML page."""

import html
import math
from pathlib import Path

from rich.console import Group
from rich.table import Table

from shards.atomic import write_text
from shards.errors import UserError
from shards.histogram import Bar
from shards.repeats import Repeats
from shards.stats import PERCENTS, Stats

BAR = 40  # characters of the longest bar
ALL_CLASSES = 40  # so many are listed; of more, the largest and the smallest
SOME_CLASSES = 10
REASONS = 20  # why images were rejected
SPARKS = " ▁▂▃▄▅▆▇█"

STYLE = """
:root{color-scheme:light dark;--ink:#1c2430;--soft:#5b6673;--line:#dfe4ea;--bar:#3b6fb6;--back:#fff}
@media(prefers-color-scheme:dark){:root{--ink:#e6eaf0;--soft:#9aa5b3;--line:#333c48;--bar:#6ea0e6;--back:#14181d}}
body{font:15px/1.5 system-ui,sans-serif;max-width:66rem;margin:2rem auto;padding:0 1rem}
body{color:var(--ink);background:var(--back)}
h1{margin:0 0 .2rem;font-size:1.6rem;overflow-wrap:anywhere}h2{margin:2.4rem 0 .6rem;font-size:1.2rem}
.soft{color:var(--soft)}.cards{display:flex;flex-wrap:wrap;gap:.6rem;margin:1.2rem 0}
.cards div{border:1px solid var(--line);border-radius:.5rem;padding:.5rem 1rem}.cards b{display:block;font-size:1.25rem}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(19rem,1fr));gap:1.2rem}
figure{margin:0;border:1px solid var(--line);border-radius:.5rem;padding:.7rem .9rem;min-width:0}
figcaption{font-weight:600}svg{display:block;width:100%;height:auto}rect{fill:var(--bar)}
text{fill:var(--soft);font:11px system-ui,sans-serif}line{stroke:var(--line)}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
td,th{padding:.2rem .9rem .2rem 0;border-bottom:1px solid var(--line)}
td,th{text-align:left;vertical-align:top;overflow-wrap:anywhere}
td.n,th.n{text-align:right;white-space:nowrap}.scroll{overflow-x:auto}
td.bar{width:40%;min-width:6rem}td.bar i{display:block;height:.8em;background:var(--bar);border-radius:2px}
"""


def tables(found: Stats) -> Group:
    """Return the tables to print on a terminal with rich."""
    total = Table(title=found.url, show_header=False)
    for name, value in _totals(found):
        total.add_row(name, value)

    sizes = Table("of an image", *(f"{percent} %" for percent in PERCENTS), "log scale", title="sizes as stored")
    for name, values in found.percentiles.items():
        sizes.add_row(name, *map(_number, values), _sparks(found.histograms[name]))

    largest, smallest = _chosen(found)
    title = f"largest and smallest of {len(found.classes):,} classes" if smallest else "classes"
    classes = Table("class", "images", "", title=title)
    longest = max((count for _, count in found.classes), default=0)
    for group in (largest, smallest):
        for name, count in group:
            classes.add_row(name, f"{count:,}", "█" * round(BAR * count / max(longest, 1)))
        classes.add_section()

    parts = [total, sizes, classes]
    for what, repeated in (("key", found.repeated_keys), ("image", found.repeated_images)):
        if repeated.examples:
            table = Table(f"the same {what}", "shard", title=f"first repeated {what}s")
            for places in repeated.examples:
                for place in places:
                    table.add_row(place.key, f"{place.shard:,}")
                table.add_section()
            parts.append(table)
    if found.rejected:
        table = Table("left out", "images", title="rejected images of the source")
        for reason, count in _reasons(found).items():
            table.add_row(reason, f"{count:,}")
        parts.append(table)
    return Group(*parts)


def write_page(path: str | Path, found: Stats) -> None:
    """Write the statistics as one HTML page.

    Raises:
        UserError: It cannot be written there.
    """
    try:
        write_text(path, page(found))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another place") from error


def page(found: Stats) -> str:
    """Return an HTML page: no scripts, no other files, nothing from the network."""
    name = html.escape(found.url)
    cards = "".join(
        f"<div>{html.escape(what)}<b>{html.escape(value)}</b></div>"
        for what, value in _totals(found)
        if what not in ("labels an image", "formats", "EXIF orientation")  # these have tables of their own
    )
    charts = "".join(_figure(what, bars, found.percentiles[what]) for what, bars in found.histograms.items())
    rows = "".join(
        f"<tr><td>{what}</td>{''.join(f'<td class=n>{_number(value)}</td>' for value in values)}</tr>"
        for what, values in found.percentiles.items()
    )
    heads = "".join(f"<th class=n>{percent} %</th>" for percent in PERCENTS)
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{name}</title>
<style>{STYLE}</style>
<h1>{name}</h1>
<div class=soft>{f"without drop list {html.escape(found.exclude)}" if found.exclude else "no drop list in use"}</div>
<div class=cards>{cards}</div>
<h2>Classes</h2>{_classes(found)}
<h2>Sizes</h2>
<p class=soft>As stored: EXIF orientation is not applied. Bars have equal ratio (logarithmic scale).</p>
<div class=grid>{charts}</div>
<h2>Percentiles</h2><div class=scroll><table><tr><th></th>{heads}</tr>{rows}</table></div>
<h2>Labels, formats, orientations</h2><div class=grid>
{_counts("labels an image", found.labels_per_image)}{_counts("format", found.formats)}
{_counts("EXIF orientation (1: upright or none)", found.orientations)}</div>
<h2>Repeats</h2>{_repeats("key", found.repeated_keys)}{_repeats("image", found.repeated_images)}
<h2>Rejected images of the source</h2>{_rejected(found)}
</html>
"""


def _totals(found: Stats) -> list[tuple[str, str]]:
    counts = sorted(count for _, count in found.classes)
    totals = [("samples", f"{found.samples:,}"), ("shards", f"{found.shards:,}")]
    totals += [("image bytes", f"{found.bytes:,}"), ("classes", f"{len(counts):,}")]
    if counts:
        spread = f"{counts[0]:,} / {counts[len(counts) // 2]:,} / {counts[-1]:,}"
        totals += [("images a class: least / median / most", spread)]
        totals += [("classes without images", f"{counts.count(0):,}")]
    labels = ", ".join(f"{count:,} with {number}" for number, count in found.labels_per_image.items())
    totals += [("labels an image", labels), ("images without a label", f"{found.unlabelled:,}")]
    totals += [("formats", ", ".join(f"{count:,} {name}" for name, count in found.formats.items()))]
    turned = ", ".join(f"{count:,} with {number}" for number, count in found.orientations.items())
    totals += [("EXIF orientation", turned)]
    for what, repeated in (("keys", found.repeated_keys), ("images", found.repeated_images)):
        text = f"{repeated.extra:,}"
        if repeated.extra:
            text += f" beyond the first of {repeated.values:,} {what}"
        totals.append((f"repeated {what}", text))
    return [*totals, ("rejected", f"{sum(found.rejected.values()):,}")]


def _reasons(found: Stats) -> dict[str, int]:
    """Return the most frequent reasons, and the others as one."""
    listed = dict(list(found.rejected.items())[:REASONS])
    others = len(found.rejected) - len(listed)
    if others:
        listed[f"{others:,} other reasons"] = sum(found.rejected.values()) - sum(listed.values())
    return listed


def _chosen(found: Stats) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Return all classes with their images, or the largest and the smallest of them."""
    if len(found.classes) <= ALL_CLASSES:
        return found.classes, []
    ordered = sorted(found.classes, key=lambda item: -item[1])
    return ordered[:SOME_CLASSES], ordered[-SOME_CLASSES:]


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def _sparks(bars: list[Bar]) -> str:
    most = max((bar.count for bar in bars), default=0)
    return "".join(SPARKS[math.ceil(8 * bar.count / most)] for bar in bars)


def _figure(name: str, bars: list[Bar], percentiles: list[float]) -> str:
    """Draw a histogram as SVG, its axis marked at the ends and the median."""
    if not bars:
        return f"<figure><figcaption>{html.escape(name)}</figcaption>nothing</figure>"
    most = max(bar.count for bar in bars)
    step = 360 / max(len(bars), 8)
    drawn = []
    for index, bar in enumerate(bars):
        height = 110 * bar.count / most
        drawn.append(
            f'<rect x="{index * step + 0.5:.1f}" y="{120 - height:.1f}" width="{step - 1:.1f}" height="{height:.1f}">'
            f"<title>{_number(bar.low)} to {_number(bar.high)}: {bar.count:,}</title></rect>"
        )
    marks = {0: bars[0].low, len(bars): bars[-1].high}
    if len(bars) >= 8:
        marks |= {place: bars[place].low for place in (len(bars) // 4, len(bars) // 2, 3 * len(bars) // 4)}
    for place, value in sorted(marks.items()):
        anchor = "start" if place == 0 else "end" if place * step > 340 else "middle"
        drawn.append(f'<text x="{place * step:.1f}" y="135" text-anchor="{anchor}">{_short(value)}</text>')
    median = _number(percentiles[PERCENTS.index(50)])
    return (
        f"<figure><figcaption>{html.escape(name)} <span class=soft>median {median}</span></figcaption>"
        f'<svg viewBox="0 0 360 140" role="img"><line x2="360" y1="120.5" y2="120.5"/>{"".join(drawn)}</svg></figure>'
    )


def _short(value: float) -> str:
    """Write an axis mark in four or five characters."""
    for power, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 10 * power or (letter != "k" and value >= power):
            return f"{value / power:.3g}{letter}"
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _classes(found: Stats) -> str:
    largest, smallest = _chosen(found)
    longest = max((count for _, count in found.classes), default=0) or 1
    if not found.classes:
        return "<p>No classes.</p>"
    if not smallest:
        return f"<div class=scroll>{_class_table(largest, longest)}</div>"
    return (
        f"{_ranks(sorted((count for _, count in found.classes), reverse=True))}<div class=grid>"
        f"<figure><figcaption>largest</figcaption>{_class_table(largest, longest)}</figure>"
        f"<figure><figcaption>smallest</figcaption>{_class_table(smallest, longest)}</figure></div>"
    )


def _class_table(classes: list[tuple[str, int]], longest: int) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td class=n>{count:,}</td>"
        f'<td class=bar><i style="width:{100 * count / longest:.2f}%"></i></td></tr>'
        for name, count in classes
    )
    return f'<table style="width:100%"><tr><th>class</th><th class=n>images</th><th></th></tr>{rows}</table>'


def _ranks(counts: list[int]) -> str:
    """Draw images a class over classes from the largest to the smallest, the height logarithmic."""
    most = math.log10(max(counts[0], 1) + 1)
    columns = min(len(counts), 200)
    left, drawn, step = 60, [], 840 / columns
    for column in range(columns):
        rank = column * len(counts) // columns
        height = 150 * math.log10(counts[rank] + 1) / most
        drawn.append(
            f'<rect x="{left + column * step:.2f}" y="{170 - height:.1f}" width="{step:.2f}" height="{height:.1f}">'
            f"<title>class {rank + 1:,} by size: {counts[rank]:,} images</title></rect>"
        )
    for power in range(math.floor(most) + 1):
        y = 170 - 150 * math.log10(10**power + 1) / most
        drawn.append(f'<line x1="{left - 6}" x2="900" y1="{y:.1f}" y2="{y:.1f}"/>')
        drawn.append(f'<text x="{left - 9}" y="{y + 4:.1f}" text-anchor="end">{10**power:,}</text>')
    return (
        "<figure><figcaption>images a class <span class=soft>from the largest class to the smallest, logarithmic</span>"
        f'</figcaption><svg viewBox="0 0 900 172" role="img">{"".join(drawn)}</svg></figure><br>'
    )


def _counts(name: str, counts: dict) -> str:
    total = sum(counts.values()) or 1
    rows = "".join(
        f"<tr><td>{html.escape(str(value))}</td><td class=n>{count:,}</td><td class=n>{count / total:.1%}</td></tr>"
        for value, count in counts.items()
    )
    return f"<figure><figcaption>{html.escape(name)}</figcaption><table>{rows}</table></figure>"


def _rejected(found: Stats) -> str:
    return f"<div class=grid>{_counts('why', _reasons(found))}</div>" if found.rejected else "<p>None.</p>"


def _repeats(what: str, repeated: Repeats) -> str:
    text = f"No {what} is there more than once."
    if repeated.extra:
        text = f"{repeated.values:,} {what}s are there more than once, {repeated.extra:,} samples beyond their first."
    rows = "".join(
        f"<tr><td>{'<br>'.join(html.escape(place.key) for place in places)}</td>"
        f"<td class=n>{'<br>'.join(f'{place.shard:,}' for place in places)}</td></tr>"
        for places in repeated.examples
    )
    head = f"<tr><th>the first with the same {what}</th><th class=n>shard</th></tr>"
    return f"<p>{text}</p>" + (f"<div class=scroll><table>{head}{rows}</table></div>" if rows else "")
