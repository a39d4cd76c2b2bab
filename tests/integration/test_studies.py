"""The paper's studies in examples/studies, run to the end in their smoke form, on a few of the drawings."""

import shutil
from pathlib import Path

import pytest

from launch.plan import read_plan
from launch.run import run_plan
from pipeline.settings import dump_toml, read_toml
from pipeline.sweeps import read_sweeps
from tests import forked
from tests.command import ROOT
from tests.pipeline.paper import TABLE_7, TABLE_8

STUDIES = ROOT / "examples" / "studies"
PLANS = sorted(path.stem for path in STUDIES.glob("*.toml") if path.stem not in ("pretrain", "finetune"))
RUNS = {"adam_sgd": 4, "data_size": 8, "heads": 3, "positions": 8, "scaling": 6}
CLASSES, EACH = ("flags", "food", "tools"), 12
SUBSETS = [53, 177, 532, 1_791]


def small(name: str, folder: Path, runs: int | None = None) -> Path:
    """Write a study for a few images, with so many runs of each sweep, or all; return its plan."""
    shutil.copytree(STUDIES, folder / "examples" / "studies")
    for label in CLASSES:
        images = folder / "examples" / "clipart" / "images" / label
        images.mkdir(parents=True)
        for path in sorted((ROOT / "examples/clipart/images" / label).iterdir())[:EACH]:
            shutil.copy(path, images)
    path = folder / "examples" / "studies" / f"{name}.toml"
    plan = read_toml(path)
    plan["stage"][0]["set"]["split"]["val"] = 0.4
    for stage in plan["stage"][1:]:
        if "probe" in stage.get("set", {}):
            stage["set"]["probe"]["shots"] = [2]
        *outer, inner = _tables(stage)
        if inner.get("data", {}).get("subset") == SUBSETS:
            inner["data"]["subset"] = [3, 6, 12, 18]
        if runs:
            for table in outer:
                _cut(table, 1)
            _cut(inner, runs)
            stage["beside"] = {title: values[:runs] for title, values in stage.get("beside", {}).items()}
    path.write_text(dump_toml(plan))
    return path


def _tables(stage: dict) -> list[dict]:
    sweep = stage.get("sweep", {})
    return sweep if isinstance(sweep, list) else [sweep]


def _cut(table: dict, values: int) -> None:
    for key, value in table.items():
        _cut(value, values) if isinstance(value, dict) else table.update({key: value[:values]})


def ran(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: int | None = None) -> dict[str, dict]:
    """Run a study; return the table of each sweep."""
    monkeypatch.setattr("launch.launchers.run_ranks", forked.run_ranks)
    checked = read_plan(small(name, tmp_path, runs), tmp_path / "runs", smoke=True)
    run_plan(checked)
    run = tmp_path / "runs" / f"{name}-smoke"
    sweeps = {swept.name: swept.table() for swept in read_sweeps(run)}
    for stage in checked.stages:
        if stage.sweep:
            assert len(sweeps[stage.sweep.name]["top-1 (%)"]) == len(stage.sweep.members)
    page = (run / "report.html").read_text()
    assert all(f"<h3>{name}</h3>" in page for name in sweeps)
    return sweeps


def test_every_study_of_the_paper_has_a_plan_with_what_the_paper_prints(tmp_path):
    assert sorted(RUNS) == PLANS
    for name, runs in RUNS.items():
        stages = read_plan(STUDIES / f"{name}.toml", tmp_path).stages
        assert len([stage for stage in stages if stage.table.name.startswith("pretrain-")]) == runs
    beside = {
        name: next(list(stage["beside"].values()) for stage in read_toml(STUDIES / f"{name}.toml")["stage"][1:-1][::-1])
        for name in ("adam_sgd", "positions")
    }
    *columns, averages = map(tuple, beside["adam_sgd"])
    assert list(zip(*columns, strict=True)) == list(TABLE_7.values())
    assert averages == pytest.approx([sum(row) / 5 for row in TABLE_7.values()], abs=0.011)
    assert beside["positions"] == [[round(100 * accuracy, 3) for accuracy in TABLE_8]]


@pytest.mark.slow
def test_adam_and_sgd_stand_beside_table_7(tmp_path, monkeypatch):
    tables = ran("adam_sgd", tmp_path, monkeypatch, runs=2)
    assert tables["finetune"]["optim"] == ["adamw", "sgd"]
    assert tables["finetune"]["ImageNet"] == [77.54, 78.24]


@pytest.mark.long
def test_data_sizes_are_subsets(tmp_path, monkeypatch):
    tables = ran("data_size", tmp_path, monkeypatch, runs=2)
    assert tables["pretrain"]["subset"] == [3, 6]
    assert len(tables["pretrain"]["2-shot (%)"]) == 2


@pytest.mark.slow
def test_heads_stand_beside_what_figure_9_shows(tmp_path, monkeypatch):
    table = ran("heads", tmp_path, monkeypatch, runs=2)["pretrain"]
    assert (table["pooling"], table["Figure 9"]) == (["cls", "mean"], ["good", "bad"])


@pytest.mark.slow
def test_position_embeddings_stand_beside_table_8(tmp_path, monkeypatch):
    table = ran("positions", tmp_path, monkeypatch, runs=2)["pretrain"]
    assert table["position"] == ["none", "learned"]
    assert table["ViT-B/16 on ImageNet, 5-shot (%)"] == [61.382, 64.206]


@pytest.mark.long
def test_scaling_is_drawn(tmp_path, monkeypatch):
    tables = ran("scaling", tmp_path, monkeypatch, runs=2)
    assert tables["finetune"]["exaFLOPs"] == tables["pretrain"]["exaFLOPs"]
    assert (tmp_path / "runs" / "scaling-smoke" / "sweeps" / "finetune.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
def test_a_study_runs_with_all_of_its_runs(name, tmp_path, monkeypatch):
    tables = ran(name, tmp_path, monkeypatch)
    assert all(len(table["run"]) == RUNS[name] for table in tables.values())
