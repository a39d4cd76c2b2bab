"""The held-out images of a training stage."""

import json
from functools import cache

from pipeline.evaluate.classify import has_real_labels
from pipeline.report.run import Stage
from shards.dataset import Dataset
from shards.errors import PatchmillError
from shards.storesettings import StoreSettings


def held_out(stage: Stage) -> Dataset | None:
    """Return the held-out images of a training stage; None: it had none.

    Raises:
        PatchmillError: They are not there any more, or cannot be reached.
    """
    data = stage.settings.get("data", {})
    return _open(data["val"], json.dumps(data.get("store", {}))) if "val" in data else None


def is_real(stage: Stage) -> bool:
    """Tell whether the held-out images of a training stage have ReaL labels; those that are gone count as others."""
    data = stage.settings.get("data", {})
    return "val" in data and _is_real(data["val"], json.dumps(data.get("store", {})))


@cache  # many rows ask, and a server that is gone takes its time
def _is_real(url: str, store: str) -> bool:
    try:
        return has_real_labels(_open(url, store))
    except PatchmillError:
        return False


def _open(url: str, store: str) -> Dataset:
    return Dataset.open(url, settings=StoreSettings(**json.loads(store)))
