"""The kinds of stage a plan may hold. A stage is a ``patchmill`` command line: what it runs, anyone can run by hand."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipeline.config import TrainSettings
from pipeline.settings import Settings, View

SourceOption = Literal["image", "label", "weight", "key", "separator", "classes", "devkit", "real"]


class ShardsStage(Settings):
    """Images into shards: ``patchmill shards build``."""

    source: str
    kind: str | None = None
    options: dict[SourceOption, str] = {}
    split: dict[str, float] = {}
    seed: int = 0
    shard_samples: int = Field(10_000, gt=0)
    shard_bytes: int = Field(1_000_000_000, gt=0)
    resize_short: int | None = Field(None, gt=0)
    format: Literal["jpg", "png", "webp"] | None = None
    quality: int | None = Field(None, ge=1, le=100)
    decode: bool = False
    workers: int | None = Field(None, gt=0)
    max_rejected: int = Field(0, ge=0)


class ConvertStage(Settings):
    """A checkpoint, or weights in any format, into weights: ``patchmill convert``."""

    source: str
    checkpoint: Literal["latest", "best"] = "latest"
    to: Literal["safetensors", "transformers", "npz"] = "safetensors"
    ema: bool = False
    image_size: int | None = Field(None, gt=0)
    resize: Literal["official", "bicubic"] = "official"
    classes: int | str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    set: dict[str, bool | int | float | str] = {}


class EvaluateStage(Settings):
    """Top-1 and top-5 on a data set, and every prediction: ``patchmill evaluate``."""

    weights: str
    data: str
    batch: int = Field(64, gt=0)
    view: View = "resize"
    short: int | None = Field(None, gt=0)
    ema: bool = False

    @model_validator(mode="after")
    def _of_the_middle(self) -> "EvaluateStage":
        if self.short is not None and self.view != "center_crop":
            raise ValueError(f"short = {self.short} is of view center_crop, and the view is {self.view}; leave one out")
        return self


class FewshotStage(Settings):
    """Closed-form linear accuracy of frozen features: ``patchmill fewshot``."""

    weights: str
    train: str
    test: str
    shots: list[Annotated[int, Field(gt=0)]] = Field([1, 5, 10, 25], min_length=1)
    knn: int | None = Field(None, gt=0)
    linear: bool = False
    view: View = "resize_center_crop"
    ema: bool = False


class FiguresStage(Settings):
    """What a model learned, drawn: ``patchmill figures``."""

    weights: str
    images: str | None = None
    ema: bool = False


class ReportStage(Settings):
    """The whole run on one page: ``patchmill report``."""


@dataclass(frozen=True)
class Kind:
    """One kind of stage.

    Attributes:
        settings: What ``set`` may hold.
        paths: Keys of ``set`` that are paths: relative ones count from the plan's folder; what they hold is an input.
        output: ``output(settings)``, what ``{stage}`` stands for in other stages: this path inside the stage's folder.
        command: ``command(settings, folder, run) -> arguments`` of ``patchmill``, without ``--json``.
        parallel: It can run on several ranks.
    """

    settings: type[Settings]
    paths: tuple[str, ...]
    output: Callable[[Any], str]
    command: Callable[[Any, Path, Path], list[str]]
    parallel: bool = False


def _shards(s: ShardsStage, folder: Path, run: Path) -> list[str]:
    arguments = ["shards", "build", s.source, str(folder / "data")]
    for name in (
        "kind",
        "seed",
        "shard_samples",
        "shard_bytes",
        "resize_short",
        "format",
        "quality",
        "workers",
        "max_rejected",
    ):
        value = getattr(s, name)
        arguments += [f"--{name.replace('_', '-')}", str(value)] if value is not None else []
    for name, value in s.options.items():
        arguments += [f"--{name}", value]
    arguments += ["--decode"] if s.decode else []
    if s.split:
        arguments += ["--split", ",".join(f"{part}={share}" for part, share in s.split.items())]
    return arguments


def _train(s: TrainSettings, folder: Path, run: Path) -> list[str]:
    return ["train", str(folder / "config.toml"), "--out", str(folder)]


def _convert(s: ConvertStage, folder: Path, run: Path) -> list[str]:
    arguments = ["convert", s.source, str(folder / CONVERTED[s.to]), "--checkpoint", s.checkpoint, "--to", s.to]
    arguments += ["--ema"] if s.ema else []
    arguments += ["--resize", s.resize, "--dtype", s.dtype]
    arguments += ["--image-size", str(s.image_size)] if s.image_size is not None else []
    arguments += ["--classes", str(s.classes)] if s.classes is not None else []
    return arguments + [each for key, value in s.set.items() for each in ("--set", f"{key}={json.dumps(value)}")]


def _evaluate(s: EvaluateStage, folder: Path, run: Path) -> list[str]:
    options = ["--batch", str(s.batch), "--view", s.view] + (["--ema"] if s.ema else [])
    options += ["--short", str(s.short)] if s.short else []
    return ["evaluate", s.weights, s.data, *options, "--out", str(folder)]


def _fewshot(s: FewshotStage, folder: Path, run: Path) -> list[str]:
    options = (["--knn", str(s.knn)] if s.knn else []) + (["--linear"] if s.linear else [])
    options += ["--view", s.view] + (["--ema"] if s.ema else [])
    return ["fewshot", s.weights, s.train, s.test, "--shots", ",".join(map(str, s.shots)), *options]


def _figures(s: FiguresStage, folder: Path, run: Path) -> list[str]:
    options = (["--images", s.images] if s.images else []) + (["--ema"] if s.ema else [])
    return ["figures", s.weights, *options, "--out", str(folder / "figures")]


def _report(s: ReportStage, folder: Path, run: Path) -> list[str]:
    return ["report", str(run)]


CONVERTED = {"safetensors": "model.safetensors", "transformers": "model", "npz": "model.npz"}
"""What a conversion makes in its stage's folder, by format."""
TRAINING_PATHS = ("init", "resume", "data.train", "data.val", "probe.train", "probe.test")
KINDS = {
    "shards": Kind(ShardsStage, ("source",), lambda s: "data", _shards),
    "supervised": Kind(TrainSettings, TRAINING_PATHS, lambda s: "", _train, True),
    "masked_patch": Kind(TrainSettings, TRAINING_PATHS, lambda s: "", _train, True),
    "mae": Kind(TrainSettings, TRAINING_PATHS, lambda s: "", _train, True),
    "finetune": Kind(TrainSettings, TRAINING_PATHS, lambda s: "", _train, True),
    "convert": Kind(ConvertStage, ("source", "classes"), lambda s: CONVERTED[s.to], _convert),
    "evaluate": Kind(EvaluateStage, ("weights", "data"), lambda s: "result.json", _evaluate, True),
    "fewshot": Kind(FewshotStage, ("weights", "train", "test"), lambda s: "result.json", _fewshot, True),
    "figures": Kind(FiguresStage, ("weights", "images"), lambda s: "figures", _figures),
    "report": Kind(ReportStage, (), lambda s: "result.json", _report),
}
