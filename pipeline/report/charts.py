"""Charts as inline SVG: no library, no script, colours from the page, so that they are light or dark as it is."""

import math
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 420, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 18, 8, 34  # room for the axes
COLOURS, DASHES = 8, ("", "7 3", "2 3")  # then they begin again
MOST = 300  # points that are drawn of a curve: twice as many, at most
FEW = 40  # points that are drawn as such


class Series(NamedTuple):
    """A curve: its name, which of the colours it has, and its points."""

    name: str
    style: int
    points: list[tuple[float, float]]


def chart(title: str, across: str, series: list[Series], from_zero: bool) -> str:
    """Return a figure with all curves over each other; empty where no curve has a point.

    Args:
        title: Over the chart: what goes up.
        across: Under it: what goes across.
        series: Points that are not finite are left out.
        from_zero: The axis upwards begins at 0.
    """
    series = [s._replace(points=[p for p in s.points if all(map(math.isfinite, p))]) for s in series]
    series = [s._replace(points=thinned(s.points)) for s in series if s.points]
    if not series:
        return ""
    x_ticks = ticks(0, max(x for s in series for x, _ in s.points) or 1)
    values = [y for s in series for _, y in s.points]
    y_ticks = ticks(0, max(values) or 1) if from_zero else ticks(min(values), max(values))

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (WIDTH - LEFT - RIGHT) * (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]),
            HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]),
        )

    parts = []
    for y in y_ticks:
        _, down = place(0, y)
        parts.append(f'<line class=grid x1={LEFT} x2={WIDTH - RIGHT} y1="{down:.1f}" y2="{down:.1f}"/>')
        parts.append(f'<text class=end x={LEFT - 5} y="{down + 4:.1f}">{short(y)}</text>')
    for x in x_ticks:
        right, _ = place(x, y_ticks[0])
        parts.append(f'<text class=middle x="{right:.1f}" y={HEIGHT - BOTTOM + 15}>{short(x)}</text>')
    parts.append(f"<text class=middle x={(LEFT + WIDTH - RIGHT) // 2} y={HEIGHT - 4}>{escape(across)}</text>")
    parts += [_curve(s, [place(*point) for point in s.points]) for s in series]
    return (
        f"<figure class=chart><figcaption>{escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role=img aria-label="{escape(title)}">{"".join(parts)}</svg></figure>'
    )


def legend(names: list[str]) -> str:
    """Return what colour and dashes each curve has, the n-th name those of style n."""
    swatches = [
        f'<li><svg viewBox="0 0 26 10" width=26 height=10 aria-hidden=true>'
        f'<path class="curve {_style(n)}" {_dash(n)} d="M1 5H25"/></svg>{escape(name)}</li>'
        for n, name in enumerate(names)
    ]
    return f"<ul class=legend>{''.join(swatches)}</ul>"


def thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return at most ``2 * MOST`` points: of each part of a longer curve the least and the greatest, so peaks stay."""
    if len(points) <= 2 * MOST:
        return points
    found = []
    for part in range(MOST):
        near = points[part * len(points) // MOST : (part + 1) * len(points) // MOST]
        found += sorted({min(near, key=lambda p: p[1]), max(near, key=lambda p: p[1])})
    return found


def ticks(low: float, high: float) -> list[float]:
    """Return three to seven round numbers, the first at most ``low`` and the last at least ``high``."""
    if high <= low:  # of one value, or of several that are alike: it goes to the middle
        low, high = (0.95 * low, 1.05 * high) if low > 0 else (low - 1.0, high + 1.0)
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if (high - low) / (step * factor) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [n * step for n in range(first, last + 1)]


def short(value: float) -> str:
    """Return a number as an axis shows it: 2500000 as 2.5M."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.6g}{unit}"
    return f"{value:.6g}" if abs(value) > 1e-12 else "0"


def _curve(series: Series, places: list[tuple[float, float]]) -> str:
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    last = series.points[-1]
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r=2.5 />' for x, y in places) if len(places) <= FEW else ""
    return (
        f'<g class="curve {_style(series.style)}"><title>{escape(series.name)}: {last[1]:.4g} at {last[0]:,.0f}</title>'
        f'<polyline {_dash(series.style)} points="{line}"/>{dots}</g>'
    )


def _style(number: int) -> str:
    return f"c{number % COLOURS}"


def _dash(number: int) -> str:
    dash = DASHES[number // COLOURS % len(DASHES)]
    return f'stroke-dasharray="{dash}"' if dash else ""
