"""What the documentation shows is what the code does."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.config import ModelSettings, TrainSettings, check, override
from pipeline.flops import cost_of
from pipeline.models import MODELS, create_model
from pipeline.recipe import read_recipe, read_settings, recipe_names
from pipeline.schedule import Schedule
from pipeline.weights import check_model

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


def test_the_models_page_has_the_exaflops_of_table_6():
    rows = re.findall(r"\| (\d+) \| ([\d,]+) \| `(\w+_jft300m\w*)` \|$", MODELS_PAGE, re.MULTILINE)
    assert len(rows) == 18
    for paper, ours, name in rows:
        recipe = read_recipe(name)
        samples = Schedule.of(recipe.checked, recipe.about.images, 4096).total
        macs = float(COUNTED[recipe.about.model][3]) * 1e9
        assert ours == f"{3 * 2 * macs * samples / 1e18:,.0f}", name
        assert float(paper) == recipe.about.exaflops


def test_the_models_page_names_every_recipe_and_no_other():
    named = {
        word for word in re.findall(r"`(?:patchmill (?:train|recipes) )?([a-z0-9_]+)`", MODELS_PAGE) if "_" in word
    }
    named -= MODELS.keys() | ModelSettings.model_fields.keys()
    others = {"learned_2d", "sincos_2d", "weight_decay", "create_model"}
    assert named - others == {name for name in recipe_names() if not name.startswith("small_")}


def test_the_models_page_sets_what_can_be_set():
    rows = re.findall(r"^\| .*\| `((?:[\w.]+=[\w.]+ ?)+)` \|$", MODELS_PAGE, re.MULTILINE)
    assert len(rows) == 7 + 5
    for row in rows:
        table, _ = read_settings("vit_b16_jft300m")
        settings = check(TrainSettings, override(table, [*row.split(), "data.train=a"]), row)
        check_model(settings, row)
