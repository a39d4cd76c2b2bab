"""The held-out images of a training stage."""

from pipeline.report.run import Stage
from shards.dataset import Dataset
from shards.storesettings import StoreSettings


def held_out(stage: Stage) -> Dataset | None:
    """Return the held-out images of a training stage; None: it had none.

    Raises:
        PatchmillError: They are not there any more, or cannot be reached.
    """
    data = stage.settings.get("data", {})
    return Dataset.open(data["val"], settings=StoreSettings(**data.get("store", {}))) if "val" in data else None
