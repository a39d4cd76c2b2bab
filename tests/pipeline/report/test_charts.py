import math
import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest

from pipeline.report.charts import COLOURS, MOST, Series, chart, legend, short, thinned, ticks
from pipeline.report.curves import curves, speeds
from pipeline.report.run import read_run
from tests.pipeline.report.made import made_run, trained


def quoted(text):
    """Return the chart's SVG with its attributes quoted, as XML wants them."""
    svg = text[text.index("<svg") : text.index("</svg>") + 6]
    return re.sub(r"(\w+)=([\w.-]+)(?=[\s/>])", r'\1="\2"', svg)


@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 1), (2.21, 5.56), (0, 196032), (0, 0), (3, 3), (-3, -3), (-2, 7), (0, 1e-7), (0, 1.3e12), (0.1, 0.12)],
)
def test_ticks_are_few_even_round_and_cover_what_is_drawn(low, high):
    found = ticks(low, high)
    assert 3 <= len(found) <= 7
    assert found[0] <= low + 1e-9 * abs(low)
    assert found[-1] >= high - 1e-9 * abs(high)
    steps = [b - a for a, b in pairwise(found)]
    assert steps == pytest.approx([steps[0]] * len(steps))
    digits = f"{steps[0]:.3e}".split("e")[0].rstrip("0").rstrip(".")
    assert digits in ("1", "2", "2.5", "5")


def test_numbers_are_short():
    shown = {
        0: "0",
        0.0002: "0.0002",
        1500: "1.5k",
        2500000: "2.5M",
        303e6 * 7: "2.121B",
        -0.25: "-0.25",
        2.2775: "2.2775",
    }
    assert {value: short(value) for value in shown} == shown


def test_a_long_curve_keeps_its_peaks_and_its_order():
    points = [(float(x), math.sin(x / 500)) for x in range(100_000)]
    points[31_415] = (31_415.0, 99.0)
    points[27_182] = (27_182.0, -99.0)
    found = thinned(points)
    assert len(found) <= 2 * MOST
    assert found == sorted(found)
    assert {points[31_415], points[27_182]} < set(found) < set(points)
    assert thinned(points[:600]) == points[:600]


def test_a_chart_has_its_curves_where_their_points_are():
    text = chart("a <b> & c", "samples", [Series("x & y", 0, [(0, 0), (10, 5)]), Series("z", 9, [(5, 2.5)])], True)
    svg = ElementTree.fromstring(quoted(text))
    lines = [each.get("points") for each in svg.iter("polyline")]
    (left, bottom), (right, top) = ([float(n) for n in point.split(",")] for point in lines[0].split())
    ((x, y),) = ([float(n) for n in point.split(",")] for point in lines[1].split())
    assert (x, y) == pytest.approx(((left + right) / 2, (top + bottom) / 2), abs=0.1)
    assert left < right
    assert top < bottom  # down is up
    assert "a &lt;b&gt; &amp; c" in text
    assert "x &amp; y: 5 at 10" in text
    groups = list(svg.iter("g"))
    assert [each.get("class") for each in groups] == ["curve c0", f"curve c{9 % COLOURS}"]
    assert groups[1].find("polyline").get("stroke-dasharray")


def test_points_that_are_no_numbers_are_left_out_and_nothing_is_no_chart():
    bad = [(1, math.nan), (2, math.inf), (3, 1.0)]
    text = chart("t", "x", [Series("a", 0, bad)], False)
    assert text.count("<circle") == 1
    assert "nan" not in text
    assert chart("t", "x", [Series("a", 0, bad[:2]), Series("b", 1, [])], False) == ""


def test_the_legend_and_the_curves_agree(tmp_path):
    for name in ("a", "b"):
        plan = '[[stage]]\nname = "one"\nkind = "supervised"\nrecipe = "small_pretrain"\n'
        folder = made_run(tmp_path / name, plan)
        trained(folder, "one", "small_pretrain", 0.5)
    runs = {name: read_run(tmp_path / name) for name in ("a", "b")}
    text = curves(runs)
    assert text.startswith("<h3>Supervised training</h3>" + legend(["a / one", "b / one"]))
    assert text.count("<figure class=chart>") == 7  # no gradient norm was logged
    assert text.count("<title>a / one: ") == text.count("<title>b / one: ") == 7
    assert curves({"a": runs["a"]}).count("<title>one: ") == 7
    cells = [cell.rpartition(">")[2] for cell in speeds(runs).split("<tbody>")[1].split("</td>")]
    assert cells[:11] == ["a / one", "200", "20", "–", "60%", "3.0%", "–", "–", "–", "12 s", "none"]
