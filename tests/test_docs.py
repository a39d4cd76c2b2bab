"""What the documentation shows is what the code does."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
import typer

from launch.cli import app
from launch.cli_checkpoint import checkpoint_app
from launch.cluster import Cluster, PodSettings
from launch.plan import read_plan
from launch.slurm import layout
from launch.stages import KINDS
from launch.status import COLOURS, DEAD, WORDS
from pipeline.config import CheckpointSettings, ModelSettings, TrainSettings
from pipeline.figures.distance import patch_distances
from pipeline.flops import cost_of
from pipeline.hardware import CARDS
from pipeline.images import training_transform
from pipeline.models import MODELS, create_model
from pipeline.recipe import read_recipe, read_settings, recipe_names
from pipeline.report.learned import CAPTIONS
from pipeline.resume import RULES
from pipeline.schedule import Schedule
from pipeline.settings import check, override
from pipeline.weights import check_model
from tests.command import patchmill
from tests.pipeline import paper
from tests.plans import write_plan

DOCS = Path(__file__).parent.parent / "docs"
MODELS_PAGE = (DOCS / "models.md").read_text()
COUNTED = {
    name: (none, thousand, many, macs)
    for name, none, thousand, many, macs in re.findall(
        r"^\| `(\w+)` \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \| ([\d.]+) \|$", MODELS_PAGE, re.MULTILINE
    )
}


def test_the_picture_of_the_order_is_of_this_order():
    drawn = subprocess.run(
        [sys.executable, DOCS / "order_picture.py"], capture_output=True, text=True, timeout=60, check=True
    )
    assert drawn.stdout == (DOCS / "order.svg").read_text()


def parameters(name: str, classes: int, **settings) -> int:
    with torch.device("meta"):
        model = create_model(name, seed=None, num_classes=classes, **settings)
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_models_page_counts_every_model():
    assert list(COUNTED) == list(MODELS)
    for name, counts in COUNTED.items():
        none, thousand = parameters(name, 0), parameters(name, 1000)
        head = (thousand - none) // 1000  # linear: every class costs the same
        assert counts[:3] == (f"{none:,}", f"{thousand:,}", f"{none + 21843 * head:,}"), name
    assert f"{parameters('vit_b16', 1000, representation=True):,}" in MODELS_PAGE
    assert f"{parameters('vit_b16', 21843, representation=True):,}" in MODELS_PAGE
    assert f"{parameters('vit_l32', 1000, representation=True):,}" in MODELS_PAGE


@pytest.mark.slow
def test_the_models_page_has_the_arithmetic_of_every_model():
    for name, counts in COUNTED.items():
        assert counts[3] == f"{cost_of(name).macs / 1e9:.3f}", name


def section(title: str) -> list[list[str]]:
    """Return the cells of the table rows under a heading."""
    text = re.search(rf"^## {title}.*?(?=^## |\Z)", MODELS_PAGE, re.MULTILINE | re.DOTALL)[0]
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows]


def recipes_of(row: list[str]) -> list[str]:
    return re.findall(r"`patchmill train (\w+)", row[-1])


def numbers(cells: list[str]) -> tuple[float, ...]:
    return tuple(float(cell) for cell in cells)


def test_the_models_page_has_the_results_of_the_paper():
    found = {recipes_of(row)[0]: row for row in section("Table 2")[2:6]}
    assert {name: numbers(row[1:8]) for name, row in found.items()} == paper.TABLE_2
    assert {name: row[8] for name, row in found.items()} == paper.CORE_DAYS
    assert {recipes_of(row)[0]: numbers(row[2:8]) for row in section("Table 5")[2:]} == paper.TABLE_5
    found = {recipes_of(row)[0]: row for row in section("Table 6")[2:]}
    printed = {name: (int(row[1]), numbers(row[2:8]), int(row[8])) for name, row in found.items()}
    assert printed == paper.TABLE_6
    assert {recipes_of(row)[0]: numbers(row[2:7]) for row in section("Table 7")[2:]} == paper.TABLE_7
    assert [float(row[1]) for row in section("Table 8")[2:]] == paper.TABLE_8
    results = " / ".join(str(top1) for top1, *_ in paper.SIMPLE_RESULTS.values())
    assert f"90/150/300 epochs | {results} |" in MODELS_PAGE


def test_the_models_page_has_the_settings_of_the_paper():
    found = {name: row for row in section("Table 3")[2:] for name in recipes_of(row)}
    in_table = {name: row for name, row in paper.TABLE_3.items() if name in found}
    assert paper.TABLE_3.keys() - in_table == {
        "bit_r152x2_jft300m_14ep", "bit_r200x3_jft300m", "vit_h14_imagenet21k"
    }  # fmt: skip
    for name, (epochs, rate, shape, decay, dropout) in in_table.items():
        assert str(epochs) in found[name][2].split("/")
        assert (float(found[name][3]), found[name][4], *numbers(found[name][5:7])) == (rate, shape, decay, dropout)
    found = {recipes_of(row)[0]: row for row in section("Table 4")[2:]}
    assert {name: (int(row[1].replace(",", "")), list(numbers(row[2].split(",")))) for name, row in found.items()} == {
        name: (steps, rates) for name, (steps, rates, _) in paper.TABLE_4.items()
    }


def test_the_commands_of_the_models_page_are_whole():
    commands = re.findall(r"`(patchmill train [^`]*)`", MODELS_PAGE.split("## Table 1")[1])
    assert len(commands) > 70
    for command in commands:
        _, _, name, *over = shlex.split(command)
        settings = check(TrainSettings, override(read_settings(name)[0], over), command)
        assert (settings.data.train, settings.data.val) == ("TRAIN", "VAL"), command
        assert settings.init == ("WEIGHTS.safetensors" if settings.kind == "finetune" else None), command


def test_the_models_page_has_the_exaflops_of_table_6():
    rows = section("Table 6")[2:]
    assert len(rows) == 18
    for row in rows:
        recipe = read_recipe(recipes_of(row)[0])
        samples = Schedule.of(recipe.checked, recipe.about.images, 4096).total
        macs = float(COUNTED[recipe.about.model][3]) * 1e9
        assert row[-2] == f"{3 * 2 * macs * samples / 1e18:,.0f}", recipe.name


def test_the_models_page_names_every_recipe_and_no_other():
    named = {word for word in re.findall(r"`([a-z0-9_]+)`", MODELS_PAGE) if "_" in word}
    named |= set(re.findall(r"`patchmill (?:train|recipes) ([a-z0-9_]+)[ `]", MODELS_PAGE))
    named -= MODELS.keys() | ModelSettings.model_fields.keys()
    others = {"learned_2d", "sincos_2d", "sincos_2d_moco", "weight_decay", "create_model", "image_size"}
    assert named - others == {name for name in recipe_names() if not name.startswith("small_")}


def test_the_models_page_sets_what_can_be_set():
    rows = re.findall(r"^\| .*\| `((?:[\w.]+=[\w.]+ ?)+)` \|$", MODELS_PAGE, re.MULTILINE)
    assert len(rows) == 7 + 5
    for row in rows:
        table, _ = read_settings("vit_b16_jft300m")
        settings = check(TrainSettings, override(table, [*row.split(), "data.train=a"]), row)
        check_model(settings, row)


FINETUNING_PAGE = (DOCS / "finetuning.md").read_text()


def test_the_page_on_fine_tuning_names_every_recipe():
    tuning = {name for name in recipe_names() if read_recipe(name).settings.get("kind") == "finetune"}
    named = re.search(r"\| recipe .*?\n\n", FINETUNING_PAGE, re.DOTALL)[0]
    assert set(re.findall(r"`(\w+)`", named)) == tuning - {"small_finetune"}
    cells = re.findall(r"^\| (`[\w.]+=[\w.]+.*?) \|", FINETUNING_PAGE, re.MULTILINE)
    assert len(cells) == 4
    for cell in cells:
        over = [each for part in re.findall(r"`([^`]+=[^`]+)`", cell) for each in part.split()]
        places = ["data.train=T", "data.val=V", "init=W"]
        check(TrainSettings, override(read_settings("finetune_pets")[0], over + places), cell)


def test_the_tasks_of_vtab_are_cropped_and_mirrored_as_bit_has_it():
    rows = re.findall(r"^\| (`cifar`.*|`clevr.*|`dsprites.*) \|(?: `(.*)`)? \|$", FINETUNING_PAGE, re.MULTILINE)
    places = np.dstack([*np.mgrid[0:200:2, 0:200:2], np.zeros((100, 100))]).astype(np.uint8)
    found = {"whole": set(), "upright": set()}
    for tasks, over in rows:
        table = override(read_settings("finetune_vtab")[0], ["data.train=T", "init=W", *over.split()])
        transform = training_transform(check(TrainSettings, table, tasks).data)
        seen = [transform(places, (0, 0, position))[..., :2].astype(int) for position in range(20)]
        for task in re.findall(r"`(\w+)`", tasks):
            if all(each[..., 0].min() == 0 and each[..., 0].max() == 198 for each in seen):
                found["whole"].add(task)
            if all(each[0, 0, 1] < each[0, -1, 1] for each in seen):
                found["upright"].add(task)
            found.setdefault("all", set()).add(task)
    assert found == {"all": paper.VTAB, "whole": paper.VTAB_WHOLE, "upright": paper.VTAB_UPRIGHT}
    script = re.search(r"```sh\n(.*?)```", FINETUNING_PAGE, re.DOTALL)[1]
    for task in paper.VTAB:  # the loop sets the same
        case = re.search(r"case.*?esac", script, re.DOTALL)[0]
        own = subprocess.run(
            ["bash", "-c", f"task={task}; {case}; echo $own"], capture_output=True, text=True, check=True
        )
        assert own.stdout.strip() == next(over for tasks, over in rows if f"`{task}`" in tasks), task


SCALE_PAGE = (DOCS / "scale.md").read_text()


def test_the_page_on_scale_names_every_card():
    assert f"Cards by name: {', '.join(f'`{name}`' for name in CARDS)}." in " ".join(SCALE_PAGE.split())


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_page_on_scale_shows_what_estimate_prints(tmp_path):
    shown = re.findall(r"^\$ (patchmill estimate .*)\n((?:.*\n)*?)```$", SCALE_PAGE, re.MULTILINE)
    assert len(shown) >= 4
    for command, output in shown:
        done = patchmill(*shlex.split(command)[1:], cwd=tmp_path, COLUMNS="200")
        assert [line.rstrip() for line in done.stdout.splitlines()] == output.splitlines(), command


def test_the_page_on_checkpoints_shows_every_setting_command_and_kind_of_row():
    page = (DOCS / "checkpoints.md").read_text()
    table = tomllib.loads(re.search(r"```toml\n(.*?)```", page, re.DOTALL)[1])
    assert table["checkpoint"].keys() == CheckpointSettings.model_fields.keys()
    stage = {"duration": "1 epoch", "global_batch": 8, "data": {"train": "a"}, "model": {"name": "vit_b16"}}
    check(TrainSettings, stage | table, "the page")
    commands = set(re.findall(r"patchmill checkpoint (\w+)", page))
    assert commands == {command.name for command in checkpoint_app.registered_commands}
    rows = dict(re.findall(r"^\| (free|allowed|refused)[^|]*\| (.*) \|$", page, re.MULTILINE))
    for row, rule in RULES.items():
        assert "." in row or rule != "allowed" or f"`{row}`" in rows[rule], row


def test_the_page_on_what_was_learned_shows_every_figure_and_no_large_ones():
    page = (DOCS / "learned.md").read_text()
    shown = re.findall(r"!\[[^]]*\]\((learned/[\w-]+\.png)\)", page)
    assert sorted(shown) == sorted(f"learned/{path.name}" for path in (DOCS / "learned").iterdir())
    assert sum((DOCS / each).stat().st_size for each in shown) < 400_000
    named = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert set(named) == set(CAPTIONS)
    assert {Path(each).stem.split("-")[0] for each in shown} == set(named)
    for number in ("6", "7", "10", "11", "14"):
        assert re.search(rf"[Ff]igures? [\w ,]*\b{number}\b", page), number
    for grid, span in ((14, 16), (7, 32), (16, 14)):
        golden = patch_distances(grid, span).mean().item()
        assert f"{golden:.2f}" in page
        assert f"{grid} × {grid}" in page
    assert f"(the grey line, {patch_distances(6, 8).mean().item():.1f} pixels)" in page


def test_the_commands_of_the_page_on_what_was_learned_are_whole():
    commands = re.findall(r"^    patchmill figures (.*)$", (DOCS / "learned.md").read_text(), re.MULTILINE)
    assert len(commands) == 5
    options = {each for parameter in typer.main.get_command(app).commands["figures"].params for each in parameter.opts}
    for command in commands:
        assert {word for word in shlex.split(command) if word.startswith("-")} <= options, command


def test_the_page_on_the_report_names_every_section():
    page = (DOCS / "report.md").read_text().lower()
    text = (DOCS.parent / "pipeline" / "report" / "page.py").read_text()
    sections = re.findall(r'^        "([A-Z][a-z ,-]+)": ', text, re.MULTILINE)
    assert len(sections) == 11
    assert [name for name in sections if f"| {name.lower()} |" not in page] == ["Stages"]


def test_the_pages_on_clusters_show_a_plan_and_profiles_that_hold(tmp_path):
    page, launchers = (DOCS / "cluster.md").read_text(), (DOCS / "launchers.md").read_text()
    plan, profile = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    checked = read_plan(write_plan(tmp_path, plan, "first.toml"), tmp_path / "runs")  # it needs nothing of a checkout
    pods = re.search(r"```toml\n(.*?)```", launchers, re.DOTALL)[1]
    for name, text, of in (("cluster.toml", profile, "Slurm"), ("pods.toml", pods, "Kubernetes")):
        (tmp_path / name).write_text(text)
        Cluster(tmp_path / name, of=of).check_names(list(KINDS), [stage.name for stage in checked.table.stage])
    layouts = [
        layout(stage.table.ranks, Cluster(tmp_path / "cluster.toml").job(stage.table.kind, stage.table.name), "")
        for stage in checked.stages
    ]
    assert layouts == [(1, 1), (2, 8), (1, 8), (1, 1), (1, 1)]  # as the picture has them
    told = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| `.*\n", launchers, re.MULTILINE))))
    assert PodSettings.model_fields.keys() <= told | set(re.findall(r"^(\w+) =", pods, re.MULTILINE))
    states = {*WORDS.values(), *DEAD, *COLOURS, "stopped", "crashed", "not begun", "begun"}
    told = re.search(r"\| state \|.*?\n\n", page, re.DOTALL)[0]
    assert states == set(re.findall(r"`([a-z ]+)`", told)) - {"patchmill run"}
