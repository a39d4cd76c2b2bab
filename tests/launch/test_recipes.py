"""``patchmill recipes``: the table, and one recipe."""

import io
import json
import tomllib
from contextlib import redirect_stdout

import pytest
from typer.testing import CliRunner

from launch.cli import app
from launch.recipes import COLUMNS, in_order, print_recipe, print_table
from pipeline.recipe import read_recipe, recipe_names
from tests.command import patchmill, refused

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
        number, _, unit = COLUMNS["length"](recipe, recipe.checked).partition(" ")
        assert number in line.split()
        assert unit in text
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
    assert not [line for line in lines if line != line.rstrip()]
    rows = {line.split()[0]: " ".join(line.split()) for line in lines if line}
    assert " 85.49 vit_b16 449 " in rows["augreg_imagenet21k"]
    assert " 30-300 epochs " in rows["augreg_imagenet21k"]
    assert " 0.001 0.03-0.1 " in rows["augreg_imagenet21k"]
    assert " 72.72-77.63 by weights 0.426 " in rows["finetune_vtab"]
    assert " 83.97 vit_b16_imagenet21k 3.41 " in rows["finetune_imagenet"]
    assert " 500-2,500 steps 512 0.001-0.01 0 cosine " in rows["augreg_finetune_pets"]
    assert " 1,000,000 steps " in rows["masked_patch_vit_b16_jft300m"]
    assert " 76.5 90 epochs " in rows["simple_vit_s16_imagenet"]
    # All of Table 3 stand together, with those that Tables 5 and 6 add to it.
    blocks = [{line.split()[0] for line in block.splitlines()} for block in done.stdout.split("\n\n")]
    [table_3] = [block for block in blocks if "vit_b16_jft300m" in block]
    assert {"bit_r200x3_jft300m", "bit_r152x2_jft300m_14ep", "vit_h14_imagenet21k"} <= table_3


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


@pytest.mark.long
def test_smoke_forms_run_from_the_command_line(tmp_path):
    done = patchmill("recipes", "small_pretrain", "--smoke", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    [ran] = json.loads(done.stdout)
    assert (ran["name"], ran["val"]["images"]) == ("small_pretrain", 12)
    done = patchmill("train", "small_finetune", "optim.lr=0.02", "--smoke", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 6
    assert not list(tmp_path.iterdir())
    assert "data.train is missing" in refused(patchmill("train", "vit_b16_imagenet", cwd=tmp_path))
