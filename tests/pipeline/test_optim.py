import numpy as np
import pytest
import torch

from pipeline.config import OptimSettings, TrainSettings
from pipeline.models import create_model
from pipeline.optim import create_optimizer, layer_scales, parameter_groups, set_rate
from pipeline.settings import check
from shards.errors import UserError


def names_of(group: dict, model: torch.nn.Module) -> set[str]:
    by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    return {by_id[id(parameter)] for parameter in group["params"]}


def test_kernels_are_the_matrices_and_all_is_all():
    model = create_model("vit_ti16", depth=1, num_classes=3, representation=True)
    plain, decayed = parameter_groups(model.named_parameters(), OptimSettings(weight_decay=0.1, decay="kernels"))
    assert decayed["weight_decay"] == 0.1
    assert plain["weight_decay"] == 0.0
    assert names_of(decayed, model) == {
        "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.attn.proj.weight",
        "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight", "pre_logits.fc.weight", "head.weight",
    }  # fmt: skip
    (everything,) = parameter_groups(model.named_parameters(), OptimSettings(weight_decay=0.1, decay="all"))
    assert everything["weight_decay"] == 0.1
    assert names_of(everything, model) == dict(model.named_parameters()).keys()


def test_layers_learn_slower_towards_the_image():
    """The layers of BEiT's and MAE's fine-tuning: embeddings 0, block i layer i + 1, the rest last."""
    model = create_model("vit_ti16", depth=12, num_classes=3, representation=True)
    scales = layer_scales([name for name, _ in model.named_parameters()], 0.75)
    layer = {"cls_token": 0, "pos_embed": 0, "patch_embed.proj.weight": 0, "patch_embed.proj.bias": 0,
             "norm.weight": 13, "norm.bias": 13, "pre_logits.fc.weight": 13, "pre_logits.fc.bias": 13,
             "head.weight": 13, "head.bias": 13}  # fmt: skip
    for i in range(12):
        for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"):
            layer |= {f"blocks.{i}.{part}.weight": i + 1, f"blocks.{i}.{part}.bias": i + 1}
    assert scales == pytest.approx({name: 0.75 ** (13 - number) for name, number in layer.items()})
    groups = parameter_groups(model.named_parameters(), OptimSettings(layer_decay=0.75, weight_decay=0.1))
    assert len(groups) == 14
    assert sum(len(group["params"]) for group in groups) == len(layer)
    optimizer = create_optimizer(groups, OptimSettings())
    set_rate(optimizer, 0.5)
    assert {group["lr"] for group in optimizer.param_groups} == {0.5 * 0.75**k for k in range(14)}


FAMILIES = {
    "vit_ti16": {"depth": 2, "registers": 2, "representation": True, "position": "learned_2d"},
    "vit_s32": {"depth": 2, "pooling": "map", "position": "relative", "position_at": "every"},
    "vit_ti32": {"depth": 2, "patch_target": "mean_color"},
    "r26_vit_s32": {"depth": 2},
    "axial_vit_b32": {"depth": 1},
    "bit_r50x1": {},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_in_every_family_kernels_decay_and_layers_are_those_between_image_and_head(name):
    with torch.device("meta"):
        model = create_model(name, **FAMILIES[name], num_classes=3, seed=None)
    kernels = {
        f"{path}.weight"
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    }
    groups = parameter_groups(model.named_parameters(), OptimSettings(weight_decay=0.1, decay="kernels"))
    decayed = set().union(*(names_of(group, model) for group in groups if group["weight_decay"]))
    assert decayed == kernels
    scales = layer_scales([parameter for parameter, _ in model.named_parameters()], 0.5)
    if name == "bit_r50x1":
        blocks = [f"stages.{stage}.blocks.{unit}." for stage, units in enumerate((3, 4, 6, 3)) for unit in range(units)]
    else:
        blocks = ["blocks.0.", "blocks.1."]
    first = ("cls_token", "pos_embed", "reg_token", "mask_token", "patch_embed.", "stem.")
    last = ("norm.", "pre_logits.", "attn_pool.", "head.", "patch_head.")
    for parameter, scale in scales.items():
        at = next((i + 1 for i, block in enumerate(blocks) if parameter.startswith(block)), None)
        if at is None:
            assert parameter.startswith(first + last), parameter
            at = 0 if parameter.startswith(first) else len(blocks) + 1
        assert scale == 0.5 ** (len(blocks) + 1 - at), parameter


def steps_of(settings: OptimSettings, values: np.ndarray, gradients: list[np.ndarray], rate: float) -> np.ndarray:
    weight = torch.nn.Parameter(torch.from_numpy(values.copy()))
    optimizer = create_optimizer(parameter_groups([("head.weight", weight)], settings), settings)
    for gradient in gradients:
        set_rate(optimizer, rate)
        weight.grad = torch.from_numpy(gradient)
        optimizer.step()
    return weight.detach().numpy()


@pytest.fixture(params=[1, 7, 1000])
def numbers(request) -> tuple[np.ndarray, list[np.ndarray]]:
    rng = np.random.default_rng(0)
    gradients = [rng.normal(size=request.param).astype(np.float32) for _ in range(5)]
    return rng.normal(size=request.param).astype(np.float32), gradients


def test_adamw_is_the_papers_adam(numbers):
    """flax.optim.Adam of that time: bias-corrected moments, and a decay that the learning rate multiplies."""
    values, gradients = numbers
    rate, b1, b2, eps, decay = 1e-2, 0.9, 0.999, 1e-8, 0.3
    p, m, v = values.astype(np.float64), 0.0, 0.0
    for t, g in enumerate(np.array(gradients, np.float64), start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        direction = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
        p = p - rate * direction - rate * decay * p
    ours = steps_of(OptimSettings(weight_decay=decay), values, gradients, rate)
    np.testing.assert_allclose(ours, p, rtol=1e-5, atol=1e-6)


def test_sgd_has_momentum_and_a_decay_in_the_gradient(numbers):
    values, gradients = numbers
    rate, momentum, decay = 1e-2, 0.9, 1e-2
    p, v = values.astype(np.float64), 0.0
    for g in np.array(gradients, np.float64):
        v = momentum * v + g + decay * p
        p = p - rate * v
    ours = steps_of(OptimSettings(name="sgd", momentum=momentum, weight_decay=decay), values, gradients, rate)
    np.testing.assert_allclose(ours, p, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "words"),
    [("lamb", "flattened parameters break"), ("adafactor", "LAMB and Adafactor"), ("adam", "is 'adamw'; take that"),
     ("admaw", "take 'adamw' or 'sgd'"), (3, "take 'adamw' or 'sgd'")],
)  # fmt: skip
def test_other_optimizers_are_refused_with_the_reason(name, words):
    table = {"duration": "1 epoch", "global_batch": 1, "data": {"train": "a"}, "optim": {"name": name}}
    with pytest.raises(UserError, match=words) as error:
        check(TrainSettings, table, "test")
    assert "\n" not in str(error.value)
