"""An engine that is closed leaves no memory behind, so that a rollback has room for the next one."""

import gc

import pytest
import torch

from pipeline.config import TrainSettings
from pipeline.engines import create_engine
from pipeline.models import create_model
from pipeline.models.initial import initial_value
from pipeline.objectives.supervised import Supervised
from pipeline.settings import check

MODEL = {"name": "vit_ti16", "image_size": 32, "depth": 2, "num_classes": 5}


def held() -> int:
    """Return the bytes of all tensors that are alive."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter)]
    return sum({each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in tensors}.values())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_nothing_is_left(alone, stage):
    gathered = {"deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}} if stage == 3 else {}
    settings = check(TrainSettings, {
        "duration": "1 epoch", "global_batch": 2, "data": {"train": "-"}, "model": {"name": "vit_ti16"},
        "optim": {"ema": 0.9}, "engine": {"zero_stage": stage, **gathered},
    }, "test")  # fmt: skip
    with torch.device("meta"):
        template = create_model(**MODEL, seed=None)
    size = 4 * sum(parameter.numel() for parameter in template.parameters())
    before = held()
    engine = create_engine(
        lambda: create_model(**MODEL, seed=None), lambda *of: initial_value(template, *of, 0), settings
    )
    objective = Supervised(settings, None, 5)
    batch = torch.randn(2, 3, 32, 32), torch.zeros(2, dtype=torch.int64)
    engine.step([batch], lambda model, batch: objective.loss(model, *batch), lr=0.01)
    assert held() - before > 4 * size  # weights, two states, an average
    engine.close()
    del engine, batch
    assert held() - before < 0.05 * size
