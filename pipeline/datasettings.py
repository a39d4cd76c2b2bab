"""The settings ``[data]`` of a training stage: where samples come from, and what happens to their pixels."""

from typing import Annotated, Any, Literal

from pydantic import ByteSize, Discriminator, Field, Tag, field_validator, model_validator

from pipeline.settings import Settings, Url
from shards.augreg import PRESETS
from shards.cache import ChunkCache
from shards.errors import UserError
from shards.storesettings import StoreSettings
from shards.tarstream import is_stream


class TrainSource(Settings):
    """One data set of a mixture, a ``[[data.train]]`` table."""

    url: Url
    weight: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="samples are drawn by the ratio of the weights; set in no table: by size, every image as often",
    )
    exclude: str | None = Field(None, description="version of the drop list that this run pins")
    subset: int | None = Field(
        None, gt=0, description="so many samples alone, in whole shards; smaller ones are parts of larger"
    )


def _url_or_tables(value: Any) -> str:
    return "|url" if isinstance(value, str) else "|tables"


class DataSettings(Settings):
    """Where the samples come from, and what happens to their pixels."""

    train: Annotated[
        Annotated[Url, Tag("|url")] | Annotated[tuple[TrainSource, ...], Tag("|tables")],
        Discriminator(_url_or_tables),
    ] = Field(
        description="a data set; [[data.train]] tables of several, drawn from by weight or size; or a stream: '-', "
        "'pipe:COMMAND' or tars without a manifest"
    )
    val: Url | None = None
    exclude: str | None = Field(None, description="version of the drop list that this run pins, of a single data set")
    subset: int | None = Field(
        None,
        gt=0,
        description="so many samples, of a single data set, in whole shards; smaller ones are parts of larger",
    )
    resolution: int = Field(224, gt=0)
    augment: Literal[
        "inception", "resize", "resize_crop", "light1", "light2", "medium1", "medium2", "strong1", "strong2"
    ] = Field("inception", description="the inception crop is part of AugReg's light1 to strong2")
    crop_area: tuple[float, float] = (0.05, 1.0)
    resize: int | None = Field(None, gt=0, description="side that resize_crop cuts from; unset: 7/6 of the resolution")
    mirror: bool = Field(
        True, description="half of the images, left to right, in every augment but resize; false where it tells classes"
    )
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
    def _of_one_set_or_several(cls, value: Any) -> Any:
        tables = isinstance(value, (list, tuple)) and all(isinstance(each, (dict, TrainSource)) for each in value)
        if not isinstance(value, str) and not (tables and value):
            raise ValueError("give the URL of a data set, or [[data.train]] tables with the url of each, and weights")
        return value

    @field_validator("train")
    @classmethod
    def _all_weighted_or_none(cls, value: str | tuple[TrainSource, ...]) -> str | tuple[TrainSource, ...]:
        without = [] if isinstance(value, str) else [source.url for source in value if source.weight is None]
        if without and len(without) < len(value):
            raise ValueError(
                f"{' and '.join(without)} without weight, and others with one; set it in all tables, or in none, which "
                "draws by size"
            )
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
        for key in ("exclude", "subset"):
            if getattr(self, key) is not None and not isinstance(self.train, str):
                raise ValueError(f"{key} is of one data set, and train lists several; set {key} in their tables")
        return self

    @model_validator(mode="after")
    def _streams_alone(self) -> "DataSettings":
        if isinstance(self.train, str):
            unused = next((key for key in ("exclude", "subset") if getattr(self, key) is not None), None)
            unused = unused or ("decode" if self.decode == "process" else None)
            if is_stream(self.train) and unused:
                raise ValueError(
                    f"{unused} is of a data set with a manifest, and train = {self.train!r} is a stream; unset it"
                )
        elif stream := next((source.url for source in self.train if is_stream(source.url)), None):
            raise ValueError(f"the stream {stream!r} cannot be one of several; index it with `patchmill shards index`")
        return self

    def open_cache(self) -> ChunkCache | None:
        """Return the cache of remote chunks, if one is set; a folder that cannot be one is a UserError."""
        return ChunkCache(self.cache, self.cache_bytes) if self.cache and self.cache_bytes else None

    def check_stream(self) -> None:
        """Raise a UserError where nothing tells the classes of a stream."""
        if is_stream(self.train) and self.val is None:
            raise UserError(
                f"the stream {self.train} does not tell its classes; set data.val to a data set that has them"
            )

    @property
    def sources(self) -> tuple[TrainSource, ...]:
        """The training sets, of which all or none have a weight."""
        if isinstance(self.train, str):
            return (TrainSource(url=self.train, exclude=self.exclude, subset=self.subset),)
        return self.train

    @property
    def mixup_alpha(self) -> float:
        """Parameter of mixup's Beta distribution, or 0 for none."""
        if self.mixup is not None:
            return self.mixup
        return PRESETS[self.augment].mixup if self.augment in PRESETS else 0.0
