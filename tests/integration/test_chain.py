"""The whole chain on tiny data, as a user runs it: a plan from raw images to the report; killed, and run again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.browser import CHROMIUM, browser
from tests.command import environment
from tests.images import make_image_folder

pytestmark = pytest.mark.long
MODEL = 'model = { name = "vit_ti8", embed_dim = 24, num_heads = 3, depth = 2, representation = true }'
PLAN = f"""
name = "tiny"

[[stage]]
name = "shards"
kind = "shards"
set = {{ source = "images", split = {{ val = 0.25 }}, shard_samples = 16 }}

[[stage]]
name = "pretrain"
kind = "supervised"
recipe = "small_pretrain"
ranks = 2
[stage.set]
{MODEL}
duration = "30 epochs"
global_batch = 16
log_every = "1 step"
data = {{ train = "{{shards}}/train", val = "{{shards}}/val", resolution = 16 }}
checkpoint = {{ every = "2 epochs" }}

[[stage]]
name = "convert"
kind = "convert"
set = {{ source = "{{pretrain}}" }}

[[stage]]
name = "finetune"
kind = "finetune"
recipe = "small_finetune"
init = "convert"
ranks = 2
[stage.set]
model = {{ depth = 2, embed_dim = 24, num_heads = 3 }}
duration = "2 epochs"
global_batch = 16
data = {{ train = "{{shards}}/train", val = "{{shards}}/val", resolution = 24 }}

[[stage]]
name = "evaluate"
kind = "evaluate"
ranks = 2
set = {{ weights = "{{finetune}}", data = "{{shards}}/val", batch = 4 }}

[[stage]]
name = "fewshot"
kind = "fewshot"
set = {{ weights = "{{convert}}", train = "{{shards}}/train", test = "{{shards}}/val", shots = [1, 5] }}

[[stage]]
name = "report"
kind = "report"
"""


def start(folder: Path, runs: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "launch.cli", "run", "plan.toml", "--runs", runs],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=environment(),
    )  # fmt: skip


def finish(process: subprocess.Popen) -> tuple[str, str]:
    try:
        stdout, stderr = process.communicate(timeout=240)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, stderr[-3000:]
    return stdout, stderr


def shown(board: Path) -> list[int]:
    """Return the samples at which TensorBoard shows a loss."""
    return [event.step for event in EventAccumulator(str(board)).Reload().Scalars("loss")]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chain")
    make_image_folder(folder / "images", per_class=24)
    (folder / "plan.toml").write_text(PLAN)
    return folder


@pytest.fixture(scope="module")
def undisturbed(folder) -> Path:
    stdout, _ = finish(start(folder, "runs"))
    assert "top-1" in stdout
    assert "report.html" in stdout
    return folder / "runs" / "tiny"


def test_every_stage_left_its_result(undisturbed):
    results = {path.parent.name: json.loads(path.read_text()) for path in undisturbed.glob("stages/*/result.json")}
    assert set(results) == {"shards", "pretrain", "convert", "finetune", "evaluate", "fewshot", "report"}
    val = results["shards"]["result"]["parts"]["val"]["samples"]
    assert results["evaluate"]["result"]["images"] == val  # each once, on 2 ranks and a batch that does not divide
    assert results["evaluate"]["result"]["top1"] == pytest.approx(results["finetune"]["result"]["val"]["top1"])
    assert results["pretrain"]["result"]["best"]["top1"] >= 0.6  # three colours: chance is a third
    steps = [line["step"] for line in lines(undisturbed / "stages/pretrain/metrics.jsonl") if "loss" in line]
    assert steps == list(range(1, results["pretrain"]["result"]["steps"] + 1))


def test_a_second_run_skips_what_is_done(folder, undisturbed):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*.safetensors")}
    stdout, stderr = finish(start(folder, "runs"))
    assert stderr.count("done before, skipped") == 7
    assert "top-1" in stdout
    assert {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*.safetensors")} == before


def test_killed_in_pre_training_and_run_again_it_ends_with_the_same_weights(folder, undisturbed):
    process = start(folder, "killed")
    stage = folder / "killed" / "tiny" / "stages" / "pretrain"
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            saved = sorted(stage.glob("checkpoints/samples-*/checkpoint.json"))
            seen = lines_or_nothing(stage / "metrics.jsonl")
            if len(saved) >= 2 and seen and seen[-1]["samples"] > int(saved[-1].parent.name[-12:]):
                break
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # launcher and ranks at once
        process.wait()
    assert not (stage / "result.json").exists(), "the kill came too late to prove anything"

    finish(start(folder, "killed"))
    here, there = folder / "killed" / "tiny" / "stages", undisturbed / "stages"
    ours, theirs = (load_file(stages / "convert" / "model.safetensors") for stages in (here, there))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)
    curve = [
        [(line["samples"], line["loss"]) for line in lines(stages / "pretrain" / "metrics.jsonl") if "loss" in line]
        for stages in (here, there)
    ]
    assert curve[0] == curve[1]
    boards = [stages / "pretrain" / "tensorboard" for stages in (here, there)]
    assert [len(list(board.iterdir())) for board in boards] == [2, 1]
    assert shown(boards[0]) == shown(boards[1]) == [samples for samples, _ in curve[0]]  # one run, each line once


def test_a_changed_setting_redoes_its_stage_and_what_follows_and_keeps_the_old(folder, undisturbed):
    plan = folder / "plan.toml"
    plan.write_text(PLAN.replace("shots = [1, 5]", "shots = [2]"))
    try:
        _, stderr = finish(start(folder, "runs"))
    finally:
        plan.write_text(PLAN)
    assert stderr.count("done before, skipped") == 5
    assert (undisturbed / "stages" / "fewshot.before-1" / "result.json").exists()
    assert list(
        json.loads((undisturbed / "stages/fewshot/result.json").read_text())["result"]["features"]["shots"]
    ) == ["2"]


def test_stock_webdataset_reads_the_shards(undisturbed):
    import webdataset

    part = undisturbed / "stages" / "shards" / "data" / "train"
    tars = sorted(map(str, part.glob("shards/*.tar")))
    samples = list(webdataset.WebDataset(tars, shardshuffle=False).decode("pil"))
    described = json.loads((part / "manifest" / "dataset.json").read_text())
    assert len(samples) == described["samples"]
    images = [sample.get("png") or sample.get("jpg") for sample in samples]
    assert all(image.size[1] == 20 for image in images)
    for sample in samples:
        assert sample["__key__"].startswith(described["classes"][int(sample["cls"])])


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here; CI installs it")
def test_the_report_renders_in_a_browser_without_network(undisturbed, tmp_path):
    page = undisturbed / "report.html"
    with browser(tmp_path) as shown:
        shown.open(page, 1000)
        assert shown.complaints == []
        assert shown.requests == [page.as_uri()]
        pixels = shown.picture().reshape(-1, 3)
        headings = shown.ask("[...document.querySelectorAll('h2')].map(each => each.textContent)")
        assert shown.ask("[...document.images].every(each => each.complete && each.naturalWidth > 0)")
    assert headings == [
        "Accuracy on held-out images", "Beside what was published", "Curves", "Speed", "What the models learned",
        "What they say of held-out images", "Where the weights come from", "Stages", "Plan and settings",
    ]  # fmt: skip
    colours, counts = np.unique(pixels, axis=0, return_counts=True)
    seen = {tuple(map(int, colour)): int(count) for colour, count in zip(colours, counts, strict=True)}
    assert seen.get((36, 99, 180), 0) > 10  # the colour of the first curve
    noise = (pixels.max(axis=1) > 150) & (pixels.min(axis=1) < 100)  # the sample images: noise around full colours
    assert noise.sum() > 10 * 96 * 96 / 2


def lines_or_nothing(path: Path) -> list[dict]:
    try:
        return lines(path)
    except ValueError:  # read while a line was being written
        return []
