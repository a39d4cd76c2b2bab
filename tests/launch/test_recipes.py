"""``patchmill recipes``: the table, and one recipe."""

import io
import json
import tomllib
from contextlib import redirect_stdout

import pytest
from typer.testing import CliRunner

from launch.cli import app
from launch.recipes import in_order, print_recipe, print_table
from pipeline.recipe import read_recipe, recipe_names

ALL = [read_recipe(name) for name in recipe_names()]


def printed(call, *arguments) -> str:
    out = io.StringIO()
    with redirect_stdout(out):
        call(*arguments)
    return out.getvalue()


@pytest.mark.parametrize("width", [80, 100, 132, 160, 240])
def test_the_table_fits_the_terminal(width):
    text = printed(print_table, in_order(ALL), width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    for recipe in ALL:
        [line] = [line for line in lines if line.startswith(f"{recipe.name} ")]
        assert f"{recipe.about.exaflops:g}" in line.split()
    assert ("not shown for want of room: model" in text) == (width < 200)


def test_a_pipe_gets_every_column():
    done = CliRunner().invoke(app, ["recipes"])
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert " ".join(lines[0].split()) == "name model data length batch LR decay schedule expected exaFLOPs source"
    [huge] = [line for line in lines if line.startswith("vit_h14_jft300m ")]
    assert " ".join(huge.split()) == (
        "vit_h14_jft300m vit_h14 JFT-300M 14 epochs 4096 0.0003 0.1 linear 88.08 ImageNet 4262 ViT paper, Table 3"
    )
    assert "not shown" not in done.stdout


def test_json_has_all_of_them():
    listed = json.loads(CliRunner().invoke(app, ["recipes", "--json"]).stdout)
    assert [each["name"] for each in listed] == [recipe.name for recipe in in_order(ALL)]
    exaflops = {each["name"]: each["exaflops"] for each in listed}
    assert exaflops["vit_h14_jft300m"] == 4262
    one = json.loads(CliRunner().invoke(app, ["recipes", "finetune_cifar10", "--json"]).stdout)
    assert one in listed
    assert len(one["commands"]) == 4


def test_one_recipe_is_printed_whole_with_its_commands():
    text = printed(print_recipe, read_recipe("finetune_pets"))
    assert tomllib.loads(text) == tomllib.loads(read_recipe("finetune_pets").text)
    commands = [line for line in text.splitlines() if line.startswith("# patchmill train")]
    assert len(commands) == 4
    assert commands[0].endswith("data.val=VAL optim.lr=0.001")
    text = printed(print_recipe, read_recipe("augreg_imagenet"))
    assert "#     data.augment: inception, light1, light2" in text
    assert "# 252 runs in all" in text
