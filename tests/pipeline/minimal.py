"""Settings of a training stage that has nothing but what must be set."""

from typing import Any

from pipeline.config import TrainSettings
from pipeline.settings import check, merge

MINIMAL = {"duration": "2 epochs", "global_batch": 8, "data": {"train": "somewhere"}, "model": {"name": "vit_b16"}}
MIXED = [{"url": "a", "weight": 3}, {"url": "b", "weight": 1, "exclude": "v1"}]


def settings(**over: Any) -> TrainSettings:
    """Return the settings with others laid over them."""
    return check(TrainSettings, merge(MINIMAL, over), "here.toml")
