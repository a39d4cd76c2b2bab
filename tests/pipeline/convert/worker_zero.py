"""A rank that trains under stock DeepSpeed and saves with its save_checkpoint: ``worker_zero.py OUT STAGE...``.

OUT/STAGE is of a Vision Transformer with a frozen parameter, a shared one and a buffer. Beside it lie its float32
masters, asked of DeepSpeed parameter by parameter.
"""

import json
import sys
from pathlib import Path

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param
from safetensors.torch import save_file
from torch import nn

from pipeline import distributed
from pipeline.models import create_model
from tests.pipeline.convert.made import ODD


def model() -> nn.Module:
    made = create_model(**ODD, seed=3)
    made.pos_embed.requires_grad_(False)
    nn.init.normal_(made.head.weight, generator=torch.Generator().manual_seed(0))
    made.blocks[1].mlp.fc1.bias = made.blocks[0].mlp.fc1.bias
    made.register_buffer("scale", torch.full((3,), 2.0))
    return made


def run(stage: int, out: Path) -> None:
    made = model()
    parameters = [p for p in made.parameters() if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1}]
    groups += [{"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, "sub_group_size": 3000},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=made, optimizer=torch.optim.AdamW(groups, lr=1e-2), config=config)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(distributed.rank())).bfloat16()
    for _ in range(2):
        engine.backward(engine(images).float().square().mean())
        engine.step()
    masters = {"scale": torch.full((3,), 2.0)}
    for name, parameter in engine.module.named_parameters(remove_duplicate=False):
        with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
            value, shape = parameter.detach().float().clone(), parameter.shape
        masters[name] = safe_get_full_fp32_param(parameter).clone().view(shape) if parameter.requires_grad else value
    engine.save_checkpoint(str(out))
    if distributed.rank() == 0:
        save_file(masters, out / "masters.safetensors")


if __name__ == "__main__":
    with distributed.together():
        for each in map(int, sys.argv[2:]):
            run(each, Path(sys.argv[1]) / str(each))
        print(json.dumps("done"))
