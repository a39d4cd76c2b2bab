"""Held-out images, with what a fine-tuned model says of them."""

import io
from html import escape

import numpy as np
import torch
from PIL import Image

from pipeline.convert.recognise import load_model
from pipeline.images import to_model_input
from pipeline.report.heldout import held_out
from pipeline.report.markup import image
from pipeline.report.run import Run, Stage
from shards.augment import TRANSFORMS
from shards.decode import decode

SAMPLES = 24


def tuned(run: Run) -> Stage | None:
    """Return the last finished stage that fine-tuned weights and has held-out images; None: there is none."""
    stages = [s for s in run.finished("finetune") if "init" in s.settings and "val" in s.settings["data"]]
    return stages[-1] if stages else None


def samples(stage: Stage) -> str:
    """Return images with the model's first guess and its share, green or red, as the stage evaluated them.

    Raises:
        PatchmillError: Model or images are not there any more.
    """
    evaluated = stage.settings["evaluate"]
    model, classes = load_model(stage.folder, evaluated["ema"])
    dataset, transform = held_out(stage), TRANSFORMS[evaluated["view"]](model.image_size)
    assert dataset is not None  # ``tuned`` takes no stage without
    figures = []
    for index in np.linspace(0, len(dataset) - 1, min(SAMPLES, len(dataset))).astype(int):
        sample = dataset[int(index)]
        pixels = decode(sample.image, sample.key)
        with torch.no_grad():
            logits = model(to_model_input(transform(pixels, (0, 0, 0))[None], torch.device("cpu")))[0]
        # What a sigmoid told of each class by itself is no share of one.
        shares = logits.sigmoid() if stage.settings["loss"] == "sigmoid" else logits.softmax(dim=0)
        guess, truth = int(shares.argmax()), sample.labels
        caption = f"{escape(classes[guess])} {100 * float(shares[guess]):.0f} %"
        how = ""  # of an image that nobody labelled
        if not truth:
            caption += "<br>has no label"
        elif guess in truth:
            how = " class=right"
        else:
            how = " class=wrong"
            caption += f"<br>is {escape(', '.join(classes[label] for label in truth))}"
        shown = image(_png(pixels), sample.key)
        figures.append(f"<figure>{shown}<figcaption{how}>{caption}</figcaption></figure>")
    return f"<div class=samples>{''.join(figures)}</div>"


def _png(pixels: np.ndarray) -> bytes:
    picture = Image.fromarray(pixels)
    picture.thumbnail((192, 192))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()
