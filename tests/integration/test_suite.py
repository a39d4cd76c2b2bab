"""All that is done with a pre-trained model, on drawings and on files of CIFAR's layout, from one plan."""

import csv
import json
import re
import runpy
import shutil

import pytest
from PIL import Image

from launch.plan import read_plan
from launch.run import run_plan
from pipeline.settings import dump_toml, read_toml
from pipeline.sweeps import read_sweeps
from shards.dataset import Dataset
from shards.decode import decode
from tests import forked
from tests.command import ROOT

CLASSES, EACH = ("flags", "food", "tools"), 16


@pytest.fixture
def suite(tmp_path):
    """The plan with few drawings and one run of each sweep, and CIFAR's files as examples/suite makes them of these."""
    folder = tmp_path / "examples" / "suite"
    shutil.copytree(ROOT / "examples" / "suite", folder, ignore=shutil.ignore_patterns("cifar-*"))
    for name in CLASSES:
        images = tmp_path / "examples" / "clipart" / "images" / name
        images.mkdir(parents=True)
        for path in sorted((ROOT / "examples/clipart/images" / name).iterdir())[:EACH]:
            shutil.copy(path, images)
    plan = read_toml(folder / "plan.toml")
    for stage in plan["stage"]:
        if "sweep" in stage:
            stage["sweep"] = {key: values[:1] for key, values in stage["sweep"].items()}
        if stage["kind"] == "shards":
            stage["set"]["split"]["dev"] = 0.2
        if stage["kind"] == "fewshot":
            stage["set"] |= {"shots": [1, 2], "knn": 3}
    (folder / "plan.toml").write_text(dump_toml(plan))
    write_as_cifar(folder)
    return folder / "plan.toml"


def write_as_cifar(folder):
    runpy.run_path(folder / "as_cifar.py")["write"](folder.parent / "clipart/images", folder / "cifar-10-batches-bin")


@pytest.mark.slow
def test_the_whole_suite_runs_on_two_data_sets_from_one_plan(suite, tmp_path, monkeypatch):
    monkeypatch.setattr("launch.launchers.run_ranks", forked.run_ranks)
    run_plan(read_plan(suite, tmp_path / "runs", smoke=True))
    run = tmp_path / "runs" / "suite-smoke"
    assert [swept.name for swept in read_sweeps(run)] == [
        f"{data}-{stage}" for data in ("clipart", "cifar") for stage in ("rates", "final")
    ]
    for data, part in (("clipart", "val"), ("cifar", "test")):
        held_out = Dataset.open(run / "stages" / data / "data" / part)
        stages = {name: run / "stages" / f"{data}-{name}" for name in ("features", "evaluation", "final-0")}
        results = {name: json.loads((path / "result.json").read_text())["result"] for name, path in stages.items()}
        assert {"shots", "all", "linear", "knn"} <= results["features"]["features"].keys()
        assert results["evaluation"]["images"] == len(held_out)
        assert results["evaluation"]["top1"] == pytest.approx(results["final-0"]["val"]["top1"])
        for table in ("classes", "confusion", "calibration"):
            with open(stages["evaluation"] / f"{table}.csv", encoding="utf-8") as file:
                assert list(csv.DictReader(file)), table
        assert (stages["evaluation"] / "predictions.parquet").is_file()
    drawn = {path.stem for path in (run / "stages" / "figures" / "figures").glob("*.png")}
    assert drawn == {"filters", "positions", "distance", "rollout"}
    page = (run / "report.html").read_text(encoding="utf-8")
    for data, part in (("clipart", "val"), ("cifar", "test")):
        features = json.loads((run / "stages" / f"{data}-features" / "result.json").read_text())["result"]["features"]
        measured = {"least squares": features["all"], "linear probing": features["linear"]}
        measured |= {"nearest neighbours": features["knn"]}
        measured |= {f"{shots}-shot": top1 for shots, top1 in features["shots"].items()}
        assert list(features["shots"]) == ["1", "2"]
        for how, top1 in measured.items():
            row = rf"frozen features, {how} \({data}-features\)</td>\s*<td[^>]*>{100 * top1:.1f} %"
            assert re.search(row, page), (data, how)
        assert f"most frequent class in {data}/{part}<" in page


@pytest.mark.long
def test_the_drawings_in_cifars_layout_are_themselves_with_what_the_plan_holds_out_as_test(suite, tmp_path):
    plan = read_plan(suite, tmp_path / "runs")
    for stage in plan.stages[:2]:
        assert stage.table.kind == "shards"
        assert forked.run_ranks(stage.arguments, 1, stage.folder)[0] == 0
    drawings, cifar = (
        Dataset.open(stage.folder / "data" / part) for stage, part in zip(plan.stages[:2], ("val", "test"), strict=True)
    )
    assert cifar.classes == drawings.classes == list(CLASSES)

    def small(dataset: Dataset) -> set[tuple]:
        samples = [dataset[place] for place in range(len(dataset))]
        images = [Image.fromarray(decode(sample.image, sample.key)) for sample in samples]
        squares = [image.resize((32, 32), Image.Resampling.BOX).tobytes() for image in images]
        return {(sample.labels, square) for sample, square in zip(samples, squares, strict=True)}

    assert small(cifar) == small(drawings)
    assert len(small(cifar)) == len(cifar)
    with pytest.raises(SystemExit, match=r"cifar-10-batches-bin is there already; remove it"):
        write_as_cifar(suite.parent)
