"""The kinds of stage a plan may hold. A stage is a ``patchmill`` command line: what it runs, anyone can run by hand."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from pipeline.config import Settings, TrainSettings

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
    """A checkpoint into weights: ``patchmill convert``."""

    source: str
    checkpoint: Literal["latest", "best"] = "latest"
    to: Literal["safetensors"] = "safetensors"
    ema: bool = False


class EvaluateStage(Settings):
    """Top-1 and top-5 on a data set: ``patchmill evaluate``."""

    weights: str
    data: str
    batch: int = Field(64, gt=0)
    view: Literal["resize", "center_crop"] = "resize"
    ema: bool = False


class FewshotStage(Settings):
    """Closed-form linear accuracy of frozen features: ``patchmill fewshot``."""

    weights: str
    train: str
    test: str
    shots: list[int] = [1, 5, 10, 25]


class ReportStage(Settings):
    """The whole run on one page: ``patchmill report``."""


@dataclass(frozen=True)
class Kind:
    """One kind of stage.

    Attributes:
        settings: What ``set`` may hold.
        paths: Keys of ``set`` that are paths: relative ones count from the plan's folder; what they hold is an input.
        output: What ``{stage}`` stands for in other stages: this path inside the stage's folder.
        command: ``command(settings, folder, run) -> arguments`` of ``patchmill``, without ``--json``.
    """

    settings: type[Settings]
    paths: tuple[str, ...]
    output: str
    command: Callable[[Settings, Path, Path], list[str]]


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
    arguments = ["convert", s.source, str(folder / "model.safetensors"), "--checkpoint", s.checkpoint, "--to", s.to]
    return arguments + (["--ema"] if s.ema else [])


def _evaluate(s: EvaluateStage, folder: Path, run: Path) -> list[str]:
    options = ["--batch", str(s.batch), "--view", s.view] + (["--ema"] if s.ema else [])
    return ["evaluate", s.weights, s.data, *options]


def _fewshot(s: FewshotStage, folder: Path, run: Path) -> list[str]:
    return ["fewshot", s.weights, s.train, s.test, "--shots", ",".join(map(str, s.shots))]


def _report(s: ReportStage, folder: Path, run: Path) -> list[str]:
    return ["report", str(run)]


TRAINING_PATHS = ("init", "data.train", "data.val", "probe.train", "probe.test")
KINDS = {
    "shards": Kind(ShardsStage, ("source",), "data", _shards),
    "supervised": Kind(TrainSettings, TRAINING_PATHS, "", _train),
    "masked_patch": Kind(TrainSettings, TRAINING_PATHS, "", _train),
    "mae": Kind(TrainSettings, TRAINING_PATHS, "", _train),
    "finetune": Kind(TrainSettings, TRAINING_PATHS, "", _train),
    "convert": Kind(ConvertStage, ("source",), "model.safetensors", _convert),
    "evaluate": Kind(EvaluateStage, ("weights", "data"), "result.json", _evaluate),
    "fewshot": Kind(FewshotStage, ("weights", "train", "test"), "result.json", _fewshot),
    "report": Kind(ReportStage, (), "result.json", _report),
}
