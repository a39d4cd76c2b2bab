"""What models learned, as the figures of ``pipeline/figures``: of each kind of training, that which came out best."""

from collections.abc import Iterator
from html import escape

from pipeline.figures.write import draw_figures
from pipeline.report.heldout import held_out
from pipeline.report.markup import image
from pipeline.report.run import TRAINING, Run, Stage, best
from shards.dataset import Dataset
from shards.errors import PatchmillError
from shards.storesettings import StoreSettings
from shards.tarstream import is_stream

CAPTIONS = {
    "filters": "Principal components of the filters that patches are embedded with (paper, figure 7 left)",
    "positions": "How alike the position embeddings of patches are (figures 7 centre and 10)",
    "distance": "How far each head looks, by depth (figures 7 right and 11)",
    "rollout": "What of an image the answer comes from (figures 6 and 14)",
    "reconstruction": "What the model makes of hidden patches",
}


def learned(run: Run) -> Iterator[tuple[Stage, str]]:
    """Yield, of each kind of training that has begun, the stage that came out best, and its figures."""
    for kind in TRAINING:
        if (stage := best(run.of(kind))) is not None:
            yield stage, _figures(stage)


def _figures(stage: Stage) -> str:
    shown: list[str] = []
    missing: dict[str, list[str]] = {}  # names by reason
    images, why_none = _images(stage)
    try:
        for drawn in draw_figures(stage.folder, images, stage.settings["evaluate"]["ema"]):
            if drawn.data is None:
                missing.setdefault(why_none if drawn.wants_images else drawn.why_not, []).append(drawn.name)
            else:
                caption = CAPTIONS[drawn.name]
                shown.append(f"<figure>{image(drawn.data, caption)}<figcaption>{caption}</figcaption></figure>")
    except PatchmillError as error:  # no checkpoint, no matplotlib
        missing[str(error)] = ["more"]
    notes = [f"<p class=note>No {escape(', '.join(names))}: {escape(why)}.</p>" for why, names in missing.items()]
    return f"<div class=figures>{''.join(shown)}</div>{''.join(notes)}"


def _images(stage: Stage) -> tuple[Dataset | None, str]:
    """Return the held-out images, or else those it is trained on; or None and why there are none."""
    try:
        data = stage.settings["data"]
        if "val" not in data and isinstance(data["train"], str) and not is_stream(data["train"]):
            return Dataset.open(data["train"], settings=StoreSettings(**data.get("store", {}))), ""
        return held_out(stage), "the stage has no held-out images"
    except PatchmillError as error:
        return None, str(error)
