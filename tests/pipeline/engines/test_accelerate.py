"""What the accelerate engine does by itself."""

from torch.nn.parallel import DistributedDataParallel

from pipeline.config import TrainSettings
from pipeline.engines import create_engine
from pipeline.models import create_model
from pipeline.models.initial import initial_value
from pipeline.settings import check

MODEL = {"name": "vit_ti16", "image_size": 32, "depth": 1, "num_classes": 5}


def test_a_single_rank_keeps_no_second_copy_of_its_gradients_to_reduce(alone):
    settings = check(TrainSettings, {
        "duration": "1 epoch", "global_batch": 2, "data": {"train": "-"}, "model": {"name": "vit_ti16"},
        "engine": {"kind": "accelerate"},
    }, "test")  # fmt: skip
    template = create_model(**MODEL, seed=None)
    engine = create_engine(
        lambda: create_model(**MODEL, seed=None), lambda *of: initial_value(template, *of, 0), settings
    )
    assert not isinstance(engine.model, DistributedDataParallel)
