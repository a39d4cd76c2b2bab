"""The settings of a training stage, in the order of its TOML file; an unknown key names the nearest one."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.datasettings import DataSettings
from pipeline.settings import Duration, Period, Settings, Url, View
from shards.errors import UserError


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
    lr: float = Field(1e-3, gt=0, description="at the end of the warm-up")
    betas: tuple[Rate, Rate] = Field((0.9, 0.999), description="of adamw")
    momentum: Rate = Field(0.9, description="of sgd")
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
    warmup: Duration = Field(Duration("0 samples"), description="in which the rate rises from 0 to optim.lr")
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
    others: Literal["image", "batch"] = Field(
        "image", description="that others are taken from: a patch's own image, or a rank's whole micro-batch"
    )
    positions: Literal["last", "first"] = Field(
        "last", description="when their embeddings are added: to what is corrupted, or before it is"
    )
    reduction: Literal["mean", "sum"] = Field("mean", description="of the losses of an image's corrupted patches")

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
    steps: int = Field(0, ge=0, description="recorded then; 0: none")


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
    batch: int = Field(64, gt=0, description="images a rank takes at once")
    view: View = Field(
        "resize",
        description="the whole image, squeezed; its middle, of 8/7 of the resolution on the short side; or that of the "
        "whole, squeezed to a square of 8/7",
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
    view: View = Field("resize_center_crop", description="as of [evaluate]; by default as few-shot is published")

    @model_validator(mode="after")
    def _of_something(self) -> "ProbeSettings":
        if not (self.fewshot or self.linear):
            raise ValueError("neither fewshot nor linear is to be probed; set one of them, or leave the table out")
        return self


class TrainSettings(Settings):
    """One training stage."""

    kind: Literal["supervised", "masked_patch", "mae", "finetune"] = "supervised"
    seed: int = Field(0, description="of first values, order, augmentation, masks and dropout")
    duration: Period = Field(description="of the whole stage")
    global_batch: int = Field(gt=0, description="samples of a step over all ranks")
    micro_batch: int | None = Field(
        None, gt=0, description="samples a rank takes through the model at once; unset: all"
    )
    init: str | None = Field(
        None, description="weights to start from, in any format; a checkpoint of the run itself goes first"
    )
    resume: str | None = Field(
        None,
        description="checkpoint, or folder of a training stage, of another run to go on from, if there is none here",
    )
    loss: Literal["softmax", "sigmoid"] = Field("softmax", description="of one class of many; of each class for itself")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share that is spread over all classes")
    masked_patch: MaskedPatchSettings = MaskedPatchSettings()
    mae: MaeSettings = MaeSettings()
    log_every: Period = Field(Duration("10 steps"), description="a line in metrics.jsonl")
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
            fits = [m for m in range(1, min(local, 2**16) + 1) if local % m == 0]  # a slip may make it any number
            raise UserError(
                f"micro_batch {micro} does not divide the {local} samples of a rank "
                f"(global_batch {self.global_batch} over {world_size} ranks); set it to one of {fits}"
            )
        return local // micro
