"""Settings of a training stage: read from TOML with ``key=value`` overrides; an unknown key names the nearest one."""

import difflib
import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ByteSize,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from shards.augreg import PRESETS
from shards.cache import ChunkCache
from shards.errors import UserError
from shards.storesettings import StoreSettings
from shards.tarstream import is_stream
from shards.urls import refuse_secrets


class Settings(BaseModel):
    """Base of every settings table: immutable, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Duration(str):
    """A length of training as users say it: ``"90 epochs"``, ``"1.5 epochs"``, ``"10_000 steps"``, ``"9 samples"``."""

    PATTERN = re.compile(r"^\s*([\d_]+(?:\.\d+)?)\s*(epoch|step|sample)s?\s*$")

    def samples(self, epoch: int | None, global_batch: int) -> int:
        """Return the length in samples, given the samples of an epoch, if anybody knows, and of a global batch."""
        number, unit = self.PATTERN.match(self).groups()
        if unit == "epoch" and epoch is None:
            raise UserError(
                f"{self!r}: nobody knows the epoch of a stream; give duration, schedule, checkpoint.every and "
                "evaluate.every in steps or samples"
            )
        return round(float(number) * {"epoch": epoch, "step": global_batch, "sample": 1}[unit])

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        """Teach pydantic to check and build durations from strings."""
        from pydantic_core import core_schema

        return core_schema.no_info_after_validator_function(cls._checked, core_schema.str_schema())

    @classmethod
    def _checked(cls, text: str) -> "Duration":
        if not cls.PATTERN.match(text):
            raise ValueError('give a number and a unit, such as "30 epochs", "500 steps" or "100_000 samples"')
        return cls(text)


def _longer_than_nothing(value: Duration) -> Duration:
    if float(Duration.PATTERN.match(value)[1]) == 0:
        raise ValueError("must be longer than nothing")
    return value


Period = Annotated[Duration, AfterValidator(_longer_than_nothing)]


def _without_secrets(url: str) -> str:
    refuse_secrets(url)
    return url


Url = Annotated[str, AfterValidator(_without_secrets)]


class TrainSource(Settings):
    """One data set of a mixture, a ``[[data.train]]`` table."""

    url: Url
    weight: float = Field(gt=0, allow_inf_nan=False, description="samples are drawn by the ratio of the weights")
    exclude: str | None = Field(None, description="version of the drop list that this run pins")


def _url_or_tables(value: Any) -> str:
    return "|url" if isinstance(value, str) else "|tables"


class DataSettings(Settings):
    """Where the samples come from, and what happens to their pixels."""

    train: Annotated[
        Annotated[Url, Tag("|url")] | Annotated[tuple[TrainSource, ...], Tag("|tables")],
        Discriminator(_url_or_tables),
    ] = Field(
        description="a data set; [[data.train]] tables of several to draw from by weight; or a stream: '-', "
        "'pipe:COMMAND' or tars without a manifest"
    )
    val: Url | None = None
    exclude: str | None = Field(None, description="version of the drop list that this run pins, of a single data set")
    resolution: int = Field(224, gt=0)
    augment: Literal[
        "inception", "resize", "resize_crop", "light1", "light2", "medium1", "medium2", "strong1", "strong2"
    ] = Field("inception", description="the inception crop is part of AugReg's light1 to strong2")
    crop_area: tuple[float, float] = (0.05, 1.0)
    resize: int | None = Field(None, gt=0, description="side that resize_crop cuts from; unset: 7/6 of the resolution")
    mixup: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="of its Beta distribution, 0 for none; unset: that of the augment"
    )
    scaled_decoding: bool = Field(
        False, description="large JPEGs at a fraction of their size: quicker, but antialiased"
    )
    threads: int = Field(2, gt=0, description="decode threads of each rank")
    decode: Literal["threads", "process"] = Field(
        "threads", description="in the training process, or in one beside it that keeps Python's work off the step"
    )
    allow_pipe: bool = Field(False, description="train = 'pipe:COMMAND' may run its command")
    allow_decoder_change: bool = Field(False, description="go on although the image libraries' versions changed")
    window_bytes: int = Field(16_000_000_000, gt=0, description="shuffle window over the whole cluster")
    cache: str | None = Field(None, description="local folder for chunks of remote data, one for all jobs of a machine")
    cache_bytes: ByteSize | None = Field(None, gt=0, description='limit of the cache, as in "200 GB"')
    store: StoreSettings = Field(default_factory=StoreSettings, description="how buckets and web servers are reached")

    @field_validator("train", mode="before")
    @classmethod
    def _url_or_tables(cls, value: Any) -> Any:
        tables = isinstance(value, (list, tuple)) and all(isinstance(each, (dict, TrainSource)) for each in value)
        if not isinstance(value, str) and not (tables and value):
            raise ValueError("give the URL of a data set, or [[data.train]] tables with the url and weight of each")
        return value

    @field_validator("crop_area")
    @classmethod
    def _shares(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1] <= 1:
            raise ValueError("give the least and the greatest share of the image's area, above 0 and at most 1")
        return value

    @model_validator(mode="after")
    def _limited_cache(self) -> "DataSettings":
        if (self.cache is None) != (self.cache_bytes is None):
            raise ValueError('cache and cache_bytes go together; set both, as in cache_bytes = "200 GB", or none')
        return self

    @model_validator(mode="after")
    def _scaled_crops(self) -> "DataSettings":
        if self.scaled_decoding and self.augment in ("resize", "resize_crop"):
            raise ValueError(
                f"scaled_decoding is for crops, and augment {self.augment!r} takes the whole image; unset it"
            )
        return self

    @model_validator(mode="after")
    def _resized_to_crop(self) -> "DataSettings":
        if self.resize is not None and self.augment != "resize_crop":
            raise ValueError(f"resize is of augment 'resize_crop', and augment is {self.augment!r}; unset it")
        if self.resize is not None and self.resize < self.resolution:
            raise ValueError(f"the resolution {self.resolution} cannot be cut from {self.resize}; make resize larger")
        return self

    @model_validator(mode="after")
    def _drop_list_of_one(self) -> "DataSettings":
        if self.exclude is not None and not isinstance(self.train, str):
            raise ValueError("exclude is of one data set, and train lists several; set exclude in their tables")
        return self

    @model_validator(mode="after")
    def _streams_alone(self) -> "DataSettings":
        if isinstance(self.train, str):
            unused = "exclude" if self.exclude is not None else "decode" if self.decode == "process" else None
            if is_stream(self.train) and unused:
                raise ValueError(
                    f"{unused} is of a data set with a manifest, and train = {self.train!r} is a stream; unset it"
                )
        elif stream := next((source.url for source in self.train if is_stream(source.url)), None):
            raise ValueError(f"the stream {stream!r} cannot be one of several; index it with `patchmill shards index`")
        return self

    def open_cache(self) -> ChunkCache | None:
        """Return the cache of remote chunks, if one is set; a folder that cannot be one is a UserError."""
        return ChunkCache(self.cache, self.cache_bytes) if self.cache else None

    @property
    def sources(self) -> tuple[TrainSource, ...]:
        """The training sets; a single one has all the weight."""
        if isinstance(self.train, str):
            return (TrainSource(url=self.train, weight=1.0, exclude=self.exclude),)
        return self.train

    @property
    def mixup_alpha(self) -> float:
        """Parameter of mixup's Beta distribution, or 0 for none."""
        if self.mixup is not None:
            return self.mixup
        return PRESETS[self.augment].mixup if self.augment in PRESETS else 0.0


class ModelSettings(Settings):
    """A model by name; every other key overrides what the name stands for. Unset keys keep the name's value."""

    name: str | None = Field(None, description="taken from the weights of `init` when unset")
    patch_size: int | None = None
    embed_dim: int | None = None
    depth: int | None = None
    num_heads: int | None = None
    mlp_dim: int | None = None
    backbone: list[int] | None = Field(None, description="of a hybrid: the units of its ResNet's stages")
    backbone_width: int | None = None
    units: list[int] | None = Field(None, description="of a BiT ResNet: the units of each stage")
    width: int | None = Field(None, description="of a BiT ResNet: channels inside the units of the first stage")
    pooling: Literal["cls", "mean", "map"] | None = None
    representation: bool | None = None
    position: Literal["learned", "learned_2d", "relative", "sincos_2d", "sincos_2d_moco", "none"] | None = None
    position_at: Literal["stem", "every", "shared"] | None = None
    registers: int | None = None
    qkv_bias: bool | None = None
    norm_eps: float | None = Field(None, gt=0)
    gelu: Literal["tanh", "exact"] | None = None
    dropout: float | None = None
    drop_path: float | None = None
    head_bias: float | str | None = Field(None, description='a number, or "log_prior"')

    def overrides(self) -> dict[str, Any]:
        """Return the keys that are set, without the name."""
        return self.model_dump(exclude_none=True, exclude={"name"})


Rate = Annotated[float, Field(ge=0, lt=1)]


class OptimSettings(Settings):
    """The optimizer (vit-paper 2.4: decay is decoupled and multiplied by the learning rate)."""

    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = Field(1e-3, gt=0)
    betas: tuple[Rate, Rate] = (0.9, 0.999)
    momentum: Rate = 0.9
    weight_decay: float = Field(
        0.0, ge=0, description="adamw: a share of the weights, times the learning rate; sgd: added to the gradient"
    )
    decay: Literal["all", "kernels"] = Field(
        "all", description="what decays: everything, or no biases, norms, tokens and position embeddings"
    )
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="learning rate of each block over that of the next, the embeddings coming first"
    )
    clip: float | None = Field(None, gt=0, description="global gradient norm")
    ema: float | None = Field(
        None, ge=0, lt=1, description="keep a moving (Polyak) average of the weights, of this decay a step, as 0.9999"
    )

    @field_validator("name", mode="before")
    @classmethod
    def _safe_when_flattened(cls, value: Any) -> Any:
        if value == "adam":
            raise ValueError("the paper's Adam, whose decay is decoupled from the gradient, is 'adamw'; take that")
        if value not in ("adamw", "sgd"):
            raise ValueError(
                "take 'adamw' or 'sgd', which treat each value alone; ZeRO's flattened parameters break those that "
                "need a parameter's norm or shape, such as LAMB and Adafactor"
            )
        return value


class ScheduleSettings(Settings):
    """Linear warm-up, then linear or cosine decay or steps down, as functions of samples seen."""

    shape: Literal["linear", "cosine", "steps"] = "cosine"
    warmup: Duration = Duration("0 samples")
    end_lr: float = Field(0.0, ge=0, description="of linear and cosine decay")
    milestones: tuple[Period, ...] = Field((), description='of "steps": after each the rate is multiplied by factor')
    factor: float = Field(0.1, gt=0, lt=1)

    @model_validator(mode="after")
    def _milestones_of_steps(self) -> "ScheduleSettings":
        if self.shape == "steps" and not self.milestones:
            raise ValueError('shape "steps" goes down at milestones; set them, as in milestones = ["30 epochs"]')
        if self.shape != "steps" and self.milestones:
            raise ValueError(f'milestones are of shape "steps", not {self.shape!r}; set milestones = []')
        if self.shape == "steps" and self.end_lr:
            raise ValueError('shape "steps" ends at the last milestone\'s rate; unset end_lr')
        return self


OWNED = {
    "train_batch_size": "global_batch", "train_micro_batch_size_per_gpu": "micro_batch",
    "gradient_accumulation_steps": "micro_batch", "gradient_clipping": "optim.clip", "optimizer": "optim",
    "scheduler": "schedule", "fp16": "engine.precision", "bf16": "engine.precision",
    "bfloat16": "engine.precision", "torch_autocast": "engine.precision", "data_types": "engine.precision",
    "zero_optimization.stage": "engine.zero_stage",
    "zero_optimization.offload_optimizer": "engine.offload_optimizer",
    "zero_optimization.offload_param": "engine.offload_parameters",
    "zero_optimization.cpu_offload": "engine.offload_optimizer",
    "zero_optimization.cpu_offload_param": "engine.offload_parameters",
}  # fmt: skip
"""Keys of DeepSpeed's configuration whose place is another of our settings."""


class EngineSettings(Settings):
    """Who owns backward, step, precision and sharding."""

    kind: Literal["deepspeed", "accelerate"] = "deepspeed"
    zero_stage: Literal[0, 1, 2, 3] = Field(1, description="0 for accelerate")
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of the passes; weights, their gradients' sums and optimizer states are float32 always"
    )
    offload_optimizer: str | None = Field(
        None, description='where optimizer states and fp32 weights are: "cpu", or a folder on NVMe (ZeRO 3)'
    )
    offload_parameters: str | None = Field(
        None, description='where parameters that are not in use are, under ZeRO 3: "cpu", or a folder on NVMe'
    )
    recompute_every: int = Field(
        0, ge=0, description="activations of every k-th block are computed again for the backward pass; 1: of all"
    )
    compile: bool = Field(False, description="torch.compile, block by block")
    deepspeed: dict[str, Any] = Field({}, description="laid over the configuration that is made for DeepSpeed")

    @model_validator(mode="before")
    @classmethod
    def _no_stage_of_accelerate(cls, table: Any) -> Any:
        if isinstance(table, dict) and table.get("kind") == "accelerate":
            return {"zero_stage": 0} | table
        return table

    @model_validator(mode="after")
    def _of_deepspeed(self) -> "EngineSettings":
        alone = {
            f"zero_stage {self.zero_stage}": self.zero_stage > 0, "deepspeed": self.deepspeed,
            "offload_optimizer": self.offload_optimizer, "offload_parameters": self.offload_parameters,
        }  # fmt: skip
        wrong = [key for key, value in alone.items() if value]
        if self.kind == "accelerate" and wrong:
            raise ValueError(f'kind "accelerate" has no {" and no ".join(wrong)}; unset it, or set kind = "deepspeed"')
        return self

    @model_validator(mode="after")
    def _of_their_stages(self) -> "EngineSettings":
        if self.offload_optimizer and not self.zero_stage:
            raise ValueError("offload_optimizer is of zero_stage 1, 2 and 3, and zero_stage is 0; set one of them")
        if self.offload_optimizer not in (None, "cpu") and self.zero_stage < 3:
            raise ValueError(
                f"offload_optimizer to a folder ({self.offload_optimizer!r}) is of zero_stage 3, and zero_stage is "
                f'{self.zero_stage}; set zero_stage = 3, or offload_optimizer = "cpu"'
            )
        if self.offload_parameters and self.zero_stage < 3:
            raise ValueError(f"offload_parameters is of zero_stage 3, and zero_stage is {self.zero_stage}; set it to 3")
        return self

    @field_validator("deepspeed")
    @classmethod
    def _with_a_place_of_its_own(cls, table: dict[str, Any]) -> dict[str, Any]:
        zero = table.get("zero_optimization", {})
        if not isinstance(zero, dict):
            raise ValueError("zero_optimization is a table of DeepSpeed's; give its keys")
        for key in [*table, *(f"zero_optimization.{key}" for key in zero)]:
            if key in OWNED:
                raise ValueError(f"{key} of DeepSpeed follows our setting {OWNED[key]}; set that")
        return table


class MaskedPatchSettings(Settings):
    """Masked patch prediction (paper, appendix B.1.2)."""

    target: Literal["mean_color", "mean_colors_4x4", "pixels"] = Field(
        "mean_color", description="of each corrupted patch: its mean colour of 512, those of its 4 x 4 parts, or itself"
    )
    share: float = Field(0.5, gt=0, le=1, description="of an image's patches that are corrupted")
    mask: float = Field(0.8, ge=0, le=1, description="of those: that a learned embedding replaces")
    other: float = Field(0.1, ge=0, le=1, description="of those: that another patch's embedding replaces")
    counts: Literal["exact", "drawn"] = Field("exact", description="in every image, or each patch drawn for itself")

    @model_validator(mode="after")
    def _at_most_all(self) -> "MaskedPatchSettings":
        if self.mask + self.other > 1:
            raise ValueError(f"mask {self.mask} and other {self.other} are more than all; make their sum at most 1")
        return self


class GuardSettings(Settings):
    """What is done about steps whose loss or gradient norm is not finite, or leaps: they are not taken."""

    sigmas: float = Field(
        8.0, ge=0, description="standard deviations of the logarithm above the running mean that are a leap; 0: none is"
    )
    in_row: int = Field(5, gt=0, description="held back one after another, and something must be done")
    then: Literal["roll_back", "stop"] = Field(
        "roll_back", description="to the last checkpoint, and pass over the batches in question; or stop"
    )


class TrackSettings(Settings):
    """Who shows the metrics besides ``metrics.jsonl``."""

    tensorboard: bool = True
    wandb: str | None = Field(None, description="project of Weights & Biases; WANDB_MODE=offline keeps it here")


class ProfileSettings(Settings):
    """Steps to record with torch.profiler, into the stage's ``profile/rank-R.json.gz``."""

    first: int = Field(10, ge=0, description="steps after each start before those that are recorded")
    steps: int = Field(0, ge=0)


class MaeSettings(Settings):
    """Masked autoencoding; the share is of a count that is exact in every image."""

    share: float = Field(0.75, gt=0, lt=1, description="of an image's patches that are masked")
    norm_pixels: bool = Field(True, description="targets are the pixels of a patch at mean 0 and variance 1")
    decoder_depth: int = Field(8, gt=0)
    decoder_dim: int = Field(512, gt=0)
    decoder_heads: int = Field(16, gt=0)

    def decoder(self) -> dict[str, int]:
        """Return what the model takes of these settings."""
        return self.model_dump(include={"decoder_depth", "decoder_dim", "decoder_heads"})


class CheckpointSettings(Settings):
    """When a checkpoint is written and how, and which are kept (the best and the newest always are)."""

    every: Period = Duration("1 epoch")
    minutes: float | None = Field(None, gt=0, description="besides, when so many have gone since the last one")
    keep: int = Field(2, ge=2, description="at least 2, so that a broken newest one never ends a run")
    keep_every: Period | None = Field(None, description="the first one after each such period is kept for good")
    mirror: Url | None = Field(
        None, description="bucket or folder that gets a copy; a run on an empty disk goes on from there"
    )
    asynchronous: bool = Field(
        True, description="training goes on once states are copied to host memory, where there is room for the copy"
    )


class EvaluateSettings(Settings):
    """When the held-out set is evaluated, and its batch a rank."""

    every: Period = Duration("1 epoch")
    batch: int = Field(64, gt=0)
    view: Literal["resize", "center_crop"] = Field(
        "resize", description="the whole image, squeezed; or its middle, of 8/7 of the resolution on the short side"
    )
    ema: bool = Field(False, description="evaluate the moving average of the weights that optim.ema keeps")
    patience: int | None = Field(
        None, gt=0, description="so many evaluations in a row that are not the best so far end the stage"
    )


class ProbeSettings(Settings):
    """What frozen features are worth while a model trains: top-1 on ``test`` of classifiers fitted to ``train``."""

    train: Url
    test: Url
    every: Period = Duration("1 epoch")
    fewshot: bool = Field(True, description="least squares on a few images of each class, mean of three draws")
    shots: tuple[Annotated[int, Field(gt=0)], ...] = Field((5,), min_length=1, description="images of each class")
    linear: bool = Field(False, description="logistic regression on all images of train")

    @model_validator(mode="after")
    def _of_something(self) -> "ProbeSettings":
        if not (self.fewshot or self.linear):
            raise ValueError("neither fewshot nor linear is to be probed; set one of them, or leave the table out")
        return self


class TrainSettings(Settings):
    """One training stage."""

    kind: Literal["supervised", "masked_patch", "mae", "finetune"] = "supervised"
    seed: int = 0
    duration: Period
    global_batch: int = Field(gt=0)
    micro_batch: int | None = Field(
        None, gt=0, description="samples a rank takes through the model at once; unset: all"
    )
    init: str | None = Field(None, description="safetensors file to start from; the run's own checkpoint goes first")
    resume: str | None = Field(
        None,
        description="checkpoint, or folder of a training stage, of another run to go on from, if there is none here",
    )
    loss: Literal["softmax", "sigmoid"] = "softmax"
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    masked_patch: MaskedPatchSettings = MaskedPatchSettings()
    mae: MaeSettings = MaeSettings()
    log_every: Period = Duration("10 steps")
    data: DataSettings
    model: ModelSettings = ModelSettings()
    optim: OptimSettings = OptimSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    engine: EngineSettings = EngineSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    guard: GuardSettings = GuardSettings()
    track: TrackSettings = TrackSettings()
    profile: ProfileSettings = ProfileSettings()
    watchdog: float = Field(
        600.0, gt=0, le=2 * 86400,
        description="seconds that a step may take before the job is ended, each rank telling where it is",
    )  # fmt: skip
    probe: ProbeSettings | None = None

    @model_validator(mode="after")
    def _of_classes_alone(self) -> "TrainSettings":
        without = self.kind in ("masked_patch", "mae")
        if without and (self.loss != "softmax" or self.label_smoothing or self.data.mixup_alpha):
            raise ValueError(
                f"loss, label_smoothing and mixup are of classes, and kind {self.kind!r} has none; unset them "
                "(data.mixup = 0.0 keeps the rest of an AugReg augmentation)"
            )
        return self

    @model_validator(mode="after")
    def _of_this_kind(self) -> "TrainSettings":
        for kind in ("masked_patch", "mae"):
            # By their values: settings that are read again have every table.
            changed = getattr(self, kind).model_dump(exclude_defaults=True)
            if changed and self.kind != kind:
                set_so = ", ".join(f"{kind}.{key} = {value!r}" for key, value in changed.items())
                raise ValueError(f"{set_so}, and kind {self.kind!r} would ignore it; unset it, or set kind = {kind!r}")
        if self.model.head_bias is not None and self.kind in ("masked_patch", "mae"):
            raise ValueError(
                f"model.head_bias = {self.model.head_bias!r} is of a head of classes, and kind {self.kind!r} has none; "
                "unset it"
            )
        return self

    @model_validator(mode="after")
    def _something_to_lose_patience_with(self) -> "TrainSettings":
        if self.evaluate.patience is not None and self.data.val is None:
            raise ValueError("evaluate.patience counts evaluations, and there is no data.val; set it, or no patience")
        return self

    @model_validator(mode="after")
    def _model_or_init(self) -> "TrainSettings":
        if self.model.name is None and self.init is None:
            raise ValueError(
                'model.name is not set and there is no init to take it from; set model.name, e.g. "vit_b16"'
            )
        return self

    @model_validator(mode="after")
    def _average_to_evaluate(self) -> "TrainSettings":
        if self.evaluate.ema and self.optim.ema is None:
            raise ValueError("evaluate.ema wants an average to evaluate; set optim.ema, e.g. 0.9999, or unset it")
        if self.evaluate.ema and self.data.val is None:
            raise ValueError("evaluate.ema is of evaluations, and there is no data.val; set it, or unset evaluate.ema")
        return self

    @property
    def hidden_share(self) -> float:
        """Share of an image's patches that the model has to tell, where it has to tell patches."""
        return self.mae.share if self.kind == "mae" else self.masked_patch.share

    def accumulation(self, world_size: int) -> int:
        """Return the number of micro-batches a rank takes per step, or raise a UserError that names what would fit."""
        if self.global_batch % world_size:
            below = self.global_batch - self.global_batch % world_size
            near = " or ".join(str(b) for b in (below, below + world_size) if b)
            raise UserError(
                f"global_batch {self.global_batch} does not divide over {world_size} ranks; set it to {near}"
            )
        local = self.global_batch // world_size
        if self.data.mixup_alpha and local % 2:
            raise UserError(
                f"global_batch {self.global_batch} over {world_size} ranks gives a rank {local}, and mixup pairs them; "
                f"set it to {' or '.join(str(n * world_size) for n in (local - 1, local + 1) if n)}"
            )
        micro = self.micro_batch or local
        if local % micro:
            fits = [m for m in range(1, local + 1) if local % m == 0]
            raise UserError(
                f"micro_batch {micro} does not divide the {local} samples of a rank "
                f"(global_batch {self.global_batch} over {world_size} ranks); set it to one of {fits}"
            )
        return local // micro


S = TypeVar("S", bound=Settings)


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read a TOML file; a missing file or a syntax error is a UserError."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no settings file {path}; give the path of a TOML file") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; give the path of a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML: {error}; mend that line") from None


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return ``base`` with the tables of ``over`` laid over it, key by key."""
    merged = dict(base)
    for key, value in over.items():
        both_tables = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both_tables else value
    return merged


def flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of a nested table by dotted key."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def override(table: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """Lay ``key.sub=value`` assignments over a table; values are TOML, and a bare word is a string."""
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UserError(f"{text!r} is not a setting; write key=value, such as optim.lr=1e-3")
        try:
            parsed = tomllib.loads(f"x = {value}")["x"]
        except tomllib.TOMLDecodeError:
            parsed = value
        for part in reversed(key.split(".")):
            parsed = {part: parsed}
        table = merge(table, parsed)
    return table


def check(kind: type[S], table: dict[str, Any], where: str) -> S:
    """Build settings of type ``kind`` from a table; a UserError of one line names key, value and remedy."""
    try:
        return kind.model_validate(table)
    except ValidationError as error:
        first = min(
            error.errors(), key=lambda each: each["type"] != "extra_forbidden"
        )  # a typo may hide what is missing
        path = [part for part in first["loc"] if not str(part).startswith("|")]  # tags of what may have several types
        key = ".".join(map(str, path))
        if first["type"] == "extra_forbidden":
            known = list(_table_of(kind, path[:-1]).model_fields)
            hint = nearest(str(path[-1]), known)
            raise UserError(
                f"unknown setting {key} in {where}{hint}; the settings there are: {', '.join(known)}"
            ) from None
        if first["type"] == "missing":
            raise UserError(f"setting {key} is missing in {where}; add it") from None
        reason = first["msg"].removeprefix("Value error, ")
        if not key:
            raise UserError(f"settings in {where} do not fit each other: {reason}") from None
        value = "" if isinstance(first["input"], dict) else f" = {first['input']!r}"
        raise UserError(f"setting {key}{value} in {where} does not fit: {reason}") from None


def nearest(word: str, known: list[str], most: int = 1) -> str:
    """Return ``" (did you mean X?)"`` for the known words nearest to ``word``, at most so many, or nothing.

    Capitals and whatever is no letter or digit do not count, so that ViT-B/16 is vit_b16 and nothing else. Of several,
    those that begin with the word come first.
    """
    bare = {re.sub(r"[\W_]", "", each.lower()): each for each in known}
    asked = re.sub(r"[\W_]", "", word.lower())
    near = difflib.get_close_matches(asked, bare, n=most, cutoff=0.5)
    begun = sorted((each for each in bare if most > 1 and asked and each.startswith(asked)), key=len)
    close = [asked] if asked in bare else list(dict.fromkeys([*begun, *near]))[:most]
    return f" (did you mean {' or '.join(repr(bare[each]) for each in close)}?)" if close else ""


def dump_toml(table: dict[str, Any]) -> str:
    """Write a nested table of plain values as TOML; ``None`` is left out, since TOML has no null."""
    lines: list[str] = []
    for key, value in table.items():
        if value is not None and not isinstance(value, dict):
            lines.append(f"{_toml_key(key)} = {_toml_value(value)}")

    def sub(prefix: str, inner: dict[str, Any]) -> None:
        lines.append(f"\n[{prefix}]")
        for key, value in inner.items():
            if value is not None and not isinstance(value, dict):
                lines.append(f"{_toml_key(key)} = {_toml_value(value)}")
        for key, value in inner.items():
            if isinstance(value, dict):
                sub(f"{prefix}.{_toml_key(key)}", value)

    for key, value in table.items():
        if isinstance(value, dict):
            sub(_toml_key(key), value)
    return "\n".join(lines) + "\n"


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key)


def _toml_value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if isinstance(value, dict):
        pairs = (f"{_toml_key(key)} = {_toml_value(item)}" for key, item in value.items() if item is not None)
        return "{ " + ", ".join(pairs) + " }"
    return json.dumps(value, ensure_ascii=False)  # TOML's strings, numbers and booleans read as JSON's


def _table_of(kind: type[BaseModel], path: list) -> type[BaseModel]:
    for part in path:
        if isinstance(part, str):  # a number is a place in a list of tables
            kind = next(_tables_in(kind.model_fields[part].annotation))
    return kind


def _tables_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _tables_in(inner)
