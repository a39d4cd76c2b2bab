import pytest
import torch

from pipeline.config import OptimSettings
from pipeline.models import create_model
from pipeline.optim import create_optimizer, parameter_groups


def test_kernels_are_the_matrices_and_all_is_all():
    model = create_model("vit_ti16", depth=1, num_classes=3, representation=True)
    named = dict(model.named_parameters())
    by_id = {id(p): name for name, p in named.items()}
    decayed, plain = parameter_groups(named.items(), OptimSettings(weight_decay=0.1, decay="kernels"))
    assert decayed["weight_decay"] == 0.1
    assert plain["weight_decay"] == 0.0
    assert {by_id[id(p)] for p in decayed["params"]} == {
        "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.attn.proj.weight",
        "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight", "pre_logits.fc.weight", "head.weight",
    }  # fmt: skip
    (everything,) = parameter_groups(named.items(), OptimSettings(weight_decay=0.1, decay="all"))
    assert len(everything["params"]) == len(named)


def test_adamw_decays_by_rate_times_learning_rate():
    weight = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = create_optimizer([{"params": [weight], "weight_decay": 0.1}], OptimSettings())
    optimizer.param_groups[0]["lr"] = 0.5
    weight.grad = torch.zeros(1)
    optimizer.step()
    assert weight.item() == pytest.approx(2.0 * (1 - 0.5 * 0.1))
