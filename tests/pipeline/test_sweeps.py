"""The tables and figures of a run's sweeps: what each run changed, what came out, what others found."""

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.lines import Line2D

from pipeline.figures.canvas import png
from pipeline.figures.sweeps import draw, paper_points
from pipeline.report.run import read_run
from pipeline.report.sweeps import sweeps
from pipeline.settings import dump_toml
from pipeline.sweeps import html_table, print_sweeps, read_sweeps
from tests.pipeline.paper import TABLE_6

PLAN = """
name = "x"
[[stage]]
name = "big"
kind = "supervised"
sweep = { model = [] }
[[stage]]
name = "weights"
kind = "convert"
set.source = "{big-1}"
[[stage]]
name = "tune"
kind = "finetune"
sweep = { init = ["{big-*}", "{weights}"] }
beside = { "Table 6 <%>" = [80.73, 84.15, 77.54, "-"] }
[[stage]]
name = "size"
kind = "supervised"
sweep = [{ "optim.name" = ["adamw", "sgd"] }, { "data.subset" = [10, 100, 1000] }]
[[stage]]
name = "later"
kind = "supervised"
sweep = { seed = [0, 1] }
"""


@pytest.fixture
def run(tmp_path):
    (tmp_path / "plan.toml").write_text(PLAN)
    return tmp_path


def ended(run: Path, name: str, settings: dict, top1: float | None = None, **more) -> None:
    """Leave behind what a training stage leaves that has finished."""
    folder = run / "stages" / name
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(dump_toml({"global_batch": 64, **settings}))
    val = {"loss": 1.25} | ({} if top1 is None else {"top1": top1})
    told = {"samples": 9, "val": val, "best": {**val, "samples": 3}, **more}
    (folder / "result.json").write_text(json.dumps({"digest": "", "kind": "supervised", "result": told}))


def scaled(run: Path) -> None:
    """Three models pre-trained, each fine-tuned, one from converted weights too."""
    models = [
        {"name": "vit_ti8", "depth": 2}, {"name": "bit_r50x1", "width": 32}, {"name": "r26_vit_s32", "depth": 2}
    ]  # fmt: skip
    for number, model in enumerate(models):
        ended(run, f"big-{number}", {"model": model}, 0.25 * number, exaflops=10.0**number)
    for number, init in enumerate(["big-0", "big-1", "big-2", "weights/model.safetensors"]):
        config = {"init": str(run.resolve() / "stages" / init)}
        ended(run, f"tune-{number}", config, 0.5 + 0.125 * number, exaflops=7.0)


def test_a_fine_tuning_has_the_settings_and_the_compute_of_what_it_starts_from(run):
    scaled(run)
    big, tune = read_sweeps(run)
    assert (big.name, tune.name) == ("big", "tune")
    assert big.table() == {
        "run": ["big-0", "big-1", "big-2"],
        "model": ["vit_ti8", "bit_r50x1", "r26_vit_s32"],
        "with": ["depth 2", "width 32", "depth 2"],
        "exaFLOPs": [1.0, 10.0, 100.0],
        "top-1 (%)": [0.0, 25.0, 50.0],
    }
    table = tune.table()
    assert table["from"] == ["big-0", "big-1", "big-2", "big-1"]
    assert table["model"] == ["vit_ti8", "bit_r50x1", "r26_vit_s32", "bit_r50x1"]
    assert table["exaFLOPs"] == [1.0, 10.0, 100.0, 10.0]
    assert table["Table 6 <%>"] == [80.73, 84.15, 77.54, "-"]
    assert "<th>Table 6 &lt;%&gt;</th>" in html_table(tune)
    assert "<td class=n>62.5</td><td>84.15</td>" in html_table(tune)


def test_accuracy_over_compute_is_drawn_beside_the_papers_models(run):
    scaled(run)
    axis = draw(read_sweeps(run)[1]).axes[0]
    drawn = {line.get_label(): points_of(line) for line in axis.get_lines()}
    assert drawn["ViT"] == [(1.0, 50.0)]
    assert drawn["ResNet"] == [(10.0, 62.5), (10.0, 87.5)]
    assert drawn["hybrid"] == [(100.0, 75.0)]
    papers = sorted(point for label, points in drawn.items() if "Table 6" in label for point in points)
    assert papers == sorted((float(exaflops), top1[0]) for _, top1, exaflops in TABLE_6.values())
    assert len(paper_points()) == len(TABLE_6) == 18
    assert axis.get_xscale() == "log"


def points_of(line: Line2D) -> list[tuple[float, float]]:
    return [tuple(map(float, point)) for point in np.asarray(line.get_xydata())]


def test_accuracy_over_a_setting_is_a_curve_for_each_of_the_others(run, capsys):
    for number, (name, subset) in enumerate((n, s) for n in ("adamw", "sgd") for s in (10, 100, 1000)):
        config = {"optim": {"name": name}, "data": {"subset": subset}, "evaluate": {"patience": 3}}
        best = {"top1": 0.1 * (number + 1)}
        ended(run, f"size-{number}", config, 0.0, best=best, probe_5shot=0.5, exaflops=1.0)
    (size,) = read_sweeps(run)
    # Where patience may end a run, its best counts.
    assert size.table()["top-1 (%)"] == [10.0, 20.0, 30.0, 40.0, 50.0, 60.0]
    assert size.table()["5-shot (%)"] == [50.0] * 6
    figure = draw(size)
    curves = {line.get_label(): points_of(line) for line in figure.axes[0].get_lines()}
    assert list(curves) == ["optim adamw", "optim sgd"]
    np.testing.assert_allclose(curves["optim sgd"], [(10, 40), (100, 50), (1000, 60)])
    assert figure.axes[0].get_xlabel() == "data.subset"
    assert png(figure).startswith(b"\x89PNG")
    print_sweeps([size])
    assert "│ size-5 │ sgd   │   1000 │      1.0 │      60.0 │       50.0 │\n" in capsys.readouterr().out


def test_what_has_no_axis_is_a_table_alone_and_what_has_not_ended_is_left_out(run):
    assert read_sweeps(run) == []
    ended(run, "later-1", {"seed": 1})
    ended(run, "later-1-weights", {"seed": 1})  # another stage's
    (later,) = read_sweeps(run)
    assert later.table() == {"run": ["later-1"], "loss": [1.25]}
    assert draw(later) is None
    ended(run, "later-0", {"seed": 0})
    (later,) = read_sweeps(run)
    assert later.table() == {"run": ["later-0", "later-1"], "seed": [0, 1], "loss": [1.25, 1.25]}
    assert draw(later) is None


def test_a_figure_is_on_the_page_and_beside_the_run_if_that_can_be_written(run):
    scaled(run)
    found = read_run(run)
    text = sweeps({"x": found})
    (run / "sweeps").rename(run / "before")
    assert list((run / "before").glob("*.png"))
    (run / "sweeps").write_text("where no folder can be made")
    assert sweeps({"x": found}) == text
    assert "data:image/png" in text
