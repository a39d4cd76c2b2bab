"""``patchmill estimate``: recipes without their data, one line for a mistake, and numbers that are never cut."""

import io
import json
import re
from contextlib import redirect_stdout

import pytest

from launch.estimate import estimates, print_estimates
from pipeline.recipe import read_recipe
from shards.errors import UserError
from tests.command import patchmill, refused


def of(*arguments: str, model: str | None = None, samples=None, classes=None, epoch=None) -> list[dict]:
    return estimates(list(arguments), model, samples, classes, epoch)


@pytest.mark.parametrize(
    ("name", "parameters", "samples"),
    [
        ("vit_h14_jft300m", 630_764_800 + 1281 * 1280 + 1281 * 18_291, 14 * 303_000_000),
        ("finetune_imagenet", 86_859_496, 20_000 * 512),
        ("small_pretrain", None, None),
        ("masked_patch_vit_b16_jft300m", None, None),
    ],
)
def test_a_recipe_is_estimated_without_its_data(name, parameters, samples):
    [found] = of(name)
    about = read_recipe(name).about
    assert (found["name"], found["model"]) == (name, about.model)
    assert found["exaflops"] == pytest.approx(about.exaflops, rel=0.005)
    if samples is not None:
        assert found["samples"] == pytest.approx(samples, abs=4096)
        assert found["parameters"] == parameters


def test_what_a_user_says_goes_before_what_a_recipe_says():
    [found] = of("vit_b16_jft300m", "model.depth=2", "model.representation=false", classes=10, epoch=8192)
    assert found["samples"] == 7 * 8192
    [same] = of("num_classes=10", "depth=2", model="vit_b16", samples=7 * 8192)
    assert {**same, "name": "vit_b16_jft300m"}.items() <= found.items()
    [found] = of("finetune_imagenet", "model.name=vit_l32")
    assert found["model"] == "vit_l32"


def test_a_resolution_that_does_not_fit_is_called_what_the_settings_call_it():
    said = "vit_h14_jft300m: data.resolution 384 is not divisible by patch_size 14; take 378 or 392"
    with pytest.raises(UserError, match=f"^{said}$"):
        of("vit_h14_jft300m", "data.resolution=384")
    assert of("vit_h14_jft300m", "data.resolution=378", "model.depth=1")[0]["parameters"] > 0


def test_a_recipe_for_several_data_sets_asks_how_many_classes():
    with pytest.raises(UserError, match=r"bit_hyperrule_500 is for Pets or Flowers, .* give --classes"):
        of("bit_hyperrule_500")
    [found] = of("bit_hyperrule_500", classes=37)
    assert (found["model"], found["samples"]) == ("bit_r152x4", 500 * 512)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("depth=1.5", "setting depth = 1.5 in --model vit_b16 does not fit"),
        ("image_size=abc", "setting image_size = 'abc' in --model vit_b16 does not fit"),
        ("seed=3", "unknown setting seed in --model vit_b16"),
        ("name=vit_l16", "name=vit_l16 is one model and --model vit_b16 another"),
        ("units=[1]", "unknown setting of vit_b16: 'units'"),
        ("depth.x=1", "setting depth in --model vit_b16 does not fit"),
    ],
)
def test_mistakes_in_a_models_settings_are_one_line(setting, words):
    with pytest.raises(UserError) as error:
        of(setting, model="vit_b16")
    assert str(error.value).startswith(words)
    assert "\n" not in str(error.value)


@pytest.mark.long
def test_the_command_line_prints_whole_numbers_and_refuses_mistakes(tmp_path):
    done = patchmill("estimate", "vit_h14_jft300m", cwd=tmp_path, COLUMNS="80")
    assert done.returncode == 0, done.stderr
    head, row, _ = done.stdout.splitlines()
    assert head.split() == ["name", "model", "parameters", "GMAC", "GFLOPs", "samples", "exaFLOPs"]
    [found] = of("vit_h14_jft300m")
    assert row.split()[:3] == ["vit_h14_jft300m", "vit_h14", f"{found['parameters']:,}"]
    assert row.split()[5:] == [f"{found['samples']:,}", f"{found['exaflops']:,.4g}"]
    assert "depth = 1.5" in refused(patchmill("estimate", "--model", "vit_b16", "depth=1.5", cwd=tmp_path))


@pytest.mark.parametrize("width", [None, 200, 80, 40])
def test_a_narrow_terminal_folds_names_and_cuts_no_number(width):
    found = [
        {"name": name, "model": "r50_vit_l16", "parameters": 123_456_789_012, "forward_macs": 65_540_123_456_789,
         "forward_flops": 131_080_246_913_578, "samples": 4_242_000_000_000, "exaflops": 12345.0}
        for name in ("r50_vit_l16_jft300m_14ep", "a")
    ]  # fmt: skip
    out = io.StringIO()
    with redirect_stdout(out):
        print_estimates(found, width)
    text = out.getvalue()
    for number in ("123,456,789,012", "65,540.123", "131,080.25", "4,242,000,000,000", "1.234e+04"):
        assert text.count(number) == 2, number
    assert "…" not in text
    if width is None:
        assert "r50_vit_l16_jft300m_14ep " in text


def test_a_model_alone_is_named_once():
    out = io.StringIO()
    with redirect_stdout(out):
        print_estimates(of(model="vit_ti16"), 80)
    head, row, _ = out.getvalue().splitlines()
    assert head.split() == ["model", "parameters", "GMAC", "GFLOPs"]
    assert row.split() == ["vit_ti16", "5,717,416", "1.254", "2.51"]
    assert json.dumps(of(model="vit_ti16")).startswith('[{"name": "vit_ti16", "model": "vit_ti16"')


STAGE = ("small_pretrain", "model.depth=2", "data.train=x", "engine.kind=deepspeed")


@pytest.mark.long
def test_memory_disk_and_time_on_gpus(tmp_path):
    arguments = [*STAGE, "global_batch=64", "--classes", 10, "--epoch", 1000, "--gpus", 8, "--gpu", "H100"]
    done = patchmill("estimate", *arguments, cwd=tmp_path, COLUMNS="80")
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines()[3:])) <= 80
    assert "small_pretrain on 8 x H100: ZeRO 1, float32, micro-batch 8 x 1" in done.stdout
    [told] = json.loads(patchmill("estimate", *arguments, "--json", cwd=tmp_path).stdout)
    memory = told["memory"]
    assert re.search(rf"^most at once +{memory['device_peak'] / 1e9:.2f} ", done.stdout, re.MULTILINE)
    assert told["fits"]
    assert told["largest_micro_batch"] == 8
    assert told["checkpoint_bytes"] == 3 * 4 * told["parameters"]
    assert told["shard_bytes"] == 1000 * 110_000
    assert told["image_bytes_assumed"]
    speed = 8 * 0.4 * 66.9e12 / (3 * told["forward_flops"])
    assert told["images_per_second"] == pytest.approx(speed)
    assert told["days"] == pytest.approx(told["samples"] / speed / 86400)
    assert told["shuffle_window_bytes"] <= told["shard_bytes"]


def test_a_card_that_is_too_small_says_what_would_fit():
    over = ["model.name=vit_l16", "model.depth=2", "model.embed_dim=1024", "data.resolution=224", "global_batch=4096"]
    [told] = estimates([*STAGE, *over], None, None, 10, 1000, gpus=1, gpu="l4")
    assert not told["fits"]
    assert 1 < told["largest_micro_batch"] < 4096
    [fits] = estimates([*STAGE, *over, f"micro_batch={told['largest_micro_batch']}"], None, None, 10, 1000, gpu="l4")
    assert fits["fits"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"gpu": "h1000"}, r"unknown GPU 'h1000' \(did you mean 'h100'\?\); those known are a10, "),
        ({"gpus": 7}, "global_batch .* does not divide over 7 ranks"),
        ({"gpus": 2, "model": "vit_b16", "arguments": []}, "--gpus and --gpu are of a training stage"),
    ],
)
def test_mistakes_in_the_hardware_are_one_line(more, words):
    asked = {"arguments": list(STAGE), "model": None, "samples": None, "classes": 10, "epoch": 100, **more}
    with pytest.raises(UserError, match=words) as error:
        estimates(**asked)
    assert "\n" not in str(error.value)
