"""The page of two real runs, in a real browser."""

import json
import re
import shutil
import sys

import numpy as np
import pytest

from pipeline.config import TrainSettings
from pipeline.report.page import write_page
from pipeline.report.run import read_run
from pipeline.settings import check, merge
from pipeline.train import train
from shards.build import build
from shards.dataset import Dataset
from tests.browser import CHROMIUM, browser
from tests.command import patchmill, refused
from tests.pipeline.report.made import made_run, trained
from tests.shards.images import make_source

TABLE = {
    "kind": "masked_patch", "duration": "6 steps", "global_batch": 4, "engine": {"kind": "accelerate"},
    "log_every": "1 step", "data": {"resolution": 32}, "evaluate": {"every": "3 steps"},
    "model": {"name": "vit_ti8", "embed_dim": 24, "num_heads": 3, "depth": 2},
}  # fmt: skip
FIGURES = ("filters", "positions", "distance", "rollout", "reconstruction")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    build(make_source(folder / "source", classes=2, each=8), folder / "set", split={"val": 0.25}, workers=1)
    return folder


@pytest.fixture
def runs(folder, alone):
    """Two runs by hand that differ in their rate."""
    data = {"train": str(folder / "set" / "train"), "val": str(folder / "set" / "val")}
    for name, lr in (("slow", 1e-4), ("quick", 1e-2)):
        if not (folder / name).exists():
            table = merge(TABLE, {"data": data, "optim": {"lr": lr}})
            train(check(TrainSettings, table, "test"), folder / name)
    return [folder / "slow", folder / "quick"]


@pytest.fixture
def page(folder, runs):
    if not (folder / "report.html").exists():
        done = patchmill("report", *runs, "--json", cwd=folder)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == {"report": "report.html"}
    return folder / "report.html"


@pytest.mark.long
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here; CI installs it")
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 1300])
def test_two_runs_lie_over_each_other_and_are_readable(page, tmp_path, width, dark):
    with browser(tmp_path) as shown:
        shown.open(page, width, dark)
        assert shown.complaints == []
        assert shown.requests == [page.as_uri()]
        whole, seen = shown.ask("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
        assert whole == seen  # wide tables scroll by themselves
        legend = shown.ask("[...document.querySelectorAll('.legend li')].map(each => each.textContent)")
        assert legend == ["slow", "quick"]
        charts = shown.ask(
            "[...document.querySelectorAll('.chart')].map(each => [each.querySelector('figcaption').textContent,"
            " [...each.querySelectorAll('polyline')].map(line => getComputedStyle(line).stroke)])"
        )
        assert shown.ask("[...document.images].filter(each => each.naturalWidth > 100).length") == 2 * len(FIGURES)
        assert shown.ask("[...document.images].every(each => each.getBoundingClientRect().right <= innerWidth)")
        text, ground = shown.ask(
            "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
        )
        soft = shown.ask("getComputedStyle(document.querySelector('.note')).color")
        small = shown.ask(
            "Math.min(...[...document.querySelectorAll('svg text')].map(each => each.getBoundingClientRect().height))"
        )
        pixels = shown.picture()
    titles = [title for title, _ in charts]
    assert titles[:3] == ["training loss", "held-out loss", "hidden patches told right (%)"]
    assert {"throughput (images/s)", "waiting for data (% of the time)"} <= set(titles)
    assert any(title.startswith("utilisation") for title in titles)
    strokes = charts[0][1]
    assert len(set(strokes)) == 2
    for stroke in strokes:
        assert (pixels == rgb(stroke)).all(axis=2).sum() > 20
        assert contrast(stroke, ground) > 3  # of graphics, WCAG 2
    assert contrast(text, ground) > 7
    assert contrast(soft, ground) > 4.5
    assert (luminance(ground) < 0.1) == dark
    assert small > 9  # pixels


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here; CI installs it")
def test_the_page_itself_forbids_what_is_not_in_it_and_the_browser_would_tell(page, tmp_path):
    worse = tmp_path / "worse.html"
    bad = '<img src="http://127.0.0.1:9/x.png"><script>console.error("seen")</script>'
    worse.write_text(page.read_text().replace("</body>", f"{bad}</body>"))
    with browser(tmp_path) as shown:
        shown.open(worse, 1000)
        assert len(shown.complaints) == 2
        assert all("Content Security Policy" in each for each in shown.complaints)
        worse.write_text(worse.read_text().replace("Content-Security-Policy", "x"))
        shown.open(worse, 1001)
        assert "['seen']" in shown.complaints
        assert "http://127.0.0.1:9/x.png" in shown.requests


def test_the_page_has_figures_lineage_settings_and_what_differs(page):
    text = page.read_text()
    assert "http" not in text.replace("http-equiv", "")
    assert text.count('src="data:image/png;base64,') == 2 * len(FIGURES)
    differ = text[text.index('<section id="settings-that-differ">') : text.index('<section id="plan-and-settings">')]
    assert "<th>slow</th><th>quick</th>" in differ
    assert re.findall("<td>(.*?)</td>", differ) == ["", "optim.lr", "0.0001", "0.01"]
    for name in ("slow", "quick"):
        assert f"<b>{name}</b> (masked_patch): <code>samples-000000000024</code>, 24 samples seen" in text
        assert f"<summary>{name}: every setting</summary>" in text


def test_of_a_mixture_the_digest_of_each_data_set_is_told(folder, tmp_path, alone):
    sets = [folder / "set" / part for part in ("train", "val")]
    data = {"train": [{"url": str(each)} for each in sets], "val": str(sets[1])}
    train(check(TrainSettings, merge(TABLE, {"kind": "supervised", "data": data}), "test"), tmp_path / "mixed")
    write_page([read_run(tmp_path / "mixed")], tmp_path / "p.html")
    text = (tmp_path / "p.html").read_text()
    first, second = (Dataset.open(each).digest for each in sets)
    told = " + ".join(f'<code title="{each}">{each[:10]}</code>' for each in (first, second))
    assert f"data {told}, checkpoint" in text


def test_the_stage_that_writes_the_page_is_not_among_those_to_finish(tmp_path):
    names = {"pretrain": "supervised", "convert": "convert", "page": "report"}
    run = made_run(tmp_path / "r", "".join(f'[[stage]]\nname = "{n}"\nkind = "{kind}"\n' for n, kind in names.items()))
    trained(run, "pretrain", "small_pretrain", 0.5)
    write_page([read_run(run)], tmp_path / "p.html")
    assert "<p class=note>r: 1 of 2 stages finished.</p>" in (tmp_path / "p.html").read_text()


def test_what_is_gone_is_said_in_its_place(folder, runs, tmp_path):
    for name in ("no-checkpoint", "no-images"):
        shutil.copytree(runs[0], tmp_path / name)
    shutil.rmtree(tmp_path / "no-checkpoint" / "checkpoints")
    settings = tmp_path / "no-images" / "resolved.toml"
    settings.write_text(settings.read_text().replace(str(folder / "set"), str(folder / "gone")))
    write_page([read_run(tmp_path / name) for name in ("no-checkpoint", "no-images")], tmp_path / "p.html")
    text = (tmp_path / "p.html").read_text()
    assert "no checkpoint is there any more" in text
    assert "No more: there is no whole latest checkpoint in" in text
    assert text.count('src="data:image/png;base64,') == 2  # filters and positions want no images
    assert f"No distance, rollout, reconstruction: no folder {folder / 'gone' / 'val'}; check the path." in text


def test_without_matplotlib_there_are_curves_and_a_word_for_the_figures(runs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    write_page([read_run(runs[0])], tmp_path / "p.html")
    text = (tmp_path / "p.html").read_text()
    assert "No more: figures need matplotlib; install it: pip install &#x27;patchmill[figures]&#x27;." in text
    assert text.count("<figure class=chart>") >= 8
    assert "data:image" not in text


@pytest.mark.long
def test_one_page_of_one_run_stands_in_its_folder_and_runs_are_given_once(folder, runs):
    done = patchmill("report", runs[0], cwd=folder)
    assert done.returncode == 0, done.stderr
    assert (runs[0] / "report.html").is_file()
    assert f"report: {runs[0] / 'report.html'}" in done.stdout.replace("\n", "")
    done = patchmill("report", runs[0], "--out", "there/mine.html", "--json", cwd=folder)
    assert json.loads(done.stdout) == {"report": "there/mine.html"}
    assert (folder / "there" / "mine.html").is_file()
    line = refused(patchmill("report", runs[0], "--out", "there/mine.html/p.html", cwd=folder))
    assert "cannot write into there/mine.html: File exists; give another folder, or make room" in line
    assert "one run is given twice" in refused(patchmill("report", runs[0], runs[0], cwd=folder))


def rgb(colour: str) -> np.ndarray:
    return np.array([int(part) for part in re.findall(r"\d+", colour)[:3]])


def luminance(colour: str) -> float:
    parts = rgb(colour) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)
