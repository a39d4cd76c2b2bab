"""Whether what the stages of a plan read is there and goes together, opened as they will open it, before one starts.

Only manifests are read, of shards on this machine the first bytes, and of weights what they are. What a stage of the
plan has yet to make is left to the stages that read it; but of weights to be made, the classes are those of the data.
"""

import json
import sys
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from launch.choice import is_done
from launch.plan import Plan, Stage
from launch.stages import ConvertStage, EvaluateStage, FewshotStage, FiguresStage
from pipeline.checkpoint import Checkpoint, whole_checkpoints
from pipeline.config import TrainSettings
from pipeline.convert.recognise import open_source
from pipeline.convert.source import Source, said
from pipeline.data import OF_CLASSES, check_held_out, check_same_classes, mixed
from pipeline.datasettings import TrainSource
from pipeline.evaluate.classify import check_known_classes, check_labelled
from pipeline.resume import changes
from pipeline.schedule import Schedule
from pipeline.weights import check_heads, resolve_model
from shards.dataset import BLOCK, Dataset
from shards.errors import PatchmillError, UserError
from shards.mixture import Mixture
from shards.storesettings import StoreSettings
from shards.tarlist import find_tars
from shards.tarstream import PIPE, STDIN, is_stream

HASTE = {"retry_seconds": 5.0}  # where a job would ask a store that does not answer for minutes


class Misfit(NamedTuple):
    """What is wrong with what a stage reads.

    Attributes:
        stage: Its name.
        setting: That names it.
        error: A UserError where the stage would fail; another where nobody knows: a store does not answer from here.
    """

    stage: str
    setting: str
    error: PatchmillError


def check_readable(plan: Plan, names: Set[str], again: Set[str] = frozenset()) -> None:
    """Check what stages read that is there already; a warning on stderr where a store does not answer.

    Args:
        plan: Of the stages.
        names: Of those that are to run.
        again: Of those that are to be made anew, finished or not.

    Raises:
        UserError: One could not run.
    """
    warned = set()
    for stage, setting, error in misfits(plan, names, again):
        if isinstance(error, UserError):
            raise UserError(f"stage {stage} of {plan.path}, {setting}: {error}") from error
        if str(error) not in warned:
            warned.add(str(error))
            print(f"warning: stage {stage}, {setting}, could not be looked at: {error}", file=sys.stderr)


def misfits(plan: Plan, names: Set[str], again: Set[str] = frozenset()) -> Iterator[Misfit]:
    """Yield all that is wrong with what stages read; arguments as of ``check_readable``."""
    look = _Look(plan, again)
    for stage in plan.stages:
        if stage.table.name in names and look.unmade(stage.folder):
            look.at_stage(stage)
            for setting, error in look.wrong:
                yield Misfit(stage.table.name, setting, error)


class _Look:
    """One look at what stages read: what is the same for many, as the runs of a sweep, is opened once."""

    def __init__(self, plan: Plan, again: Set[str]):
        self._plan = plan
        self._opened: dict[tuple, Any] = {}  # what is at a path or URL, or the error that came of it
        self._unmade = {stage.folder: stage for stage in plan.stages if stage.table.name in again or not is_done(stage)}
        self.wrong: list[tuple[str, PatchmillError]] = []

    def unmade(self, path: str | Path) -> Stage | None:
        """Return the stage that has yet to make what is at a path."""
        return next((stage for folder, stage in self._unmade.items() if Path(path).is_relative_to(folder)), None)

    def at_stage(self, stage: Stage) -> None:
        """Look at what a stage reads, and keep what is wrong in ``wrong``, with the setting that names it."""
        self.wrong = []
        settings = stage.settings
        if isinstance(settings, TrainSettings):
            self._training(stage, settings)
        elif isinstance(settings, EvaluateStage):
            dataset = self._dataset("data", settings.data)
            with self._at("data"):
                if dataset is not None:
                    check_labelled(dataset)
            self._source("weights", settings.weights, ema=settings.ema)
            with self._at("weights"):
                if dataset is not None and (known := self._classes_of(settings.weights)) is not None:
                    check_known_classes(*known, dataset)
        elif isinstance(settings, FewshotStage):
            self._source("weights", settings.weights, ema=settings.ema)
            self._pair("train", settings.train, "test", settings.test)
        elif isinstance(settings, ConvertStage):
            self._source("source", settings.source, settings.checkpoint, settings.ema, _given(settings))
        elif isinstance(settings, FiguresStage):
            self._source("weights", settings.weights, ema=settings.ema)

    def _training(self, stage: Stage, settings: TrainSettings) -> None:
        data, epoch = settings.data, None
        held_out = self._dataset("data.val", data.val, settings)
        with self._at("data.val"):
            check_held_out(settings, held_out)
        classes = held_out.classes if held_out is not None else None  # of a stream: it has none of its own
        if is_stream(data.train):
            with self._at("data.train"):
                if data.train != STDIN and not data.train.startswith(PIPE):
                    find_tars(data.train, _hasty(data.store))
        elif (dataset := self._training_set("data.train", settings)) is not None:
            classes, epoch = dataset.classes, len(dataset)
            with self._at("data.val"):
                check_same_classes(dataset, held_out)
        if is_stream(data.train) or epoch is not None:
            with self._at("duration"):
                Schedule.of(settings, epoch, settings.global_batch)
        if settings.probe:
            self._pair("probe.train", settings.probe.train, "probe.test", settings.probe.test, settings)
        if settings.init is not None:
            init = self._source("init", settings.init)
            with self._at("init"):
                if init is not None and classes is not None:
                    check_heads(settings, init, resolve_model(settings, init, len(classes)))
        if settings.resume is not None and not self._plan.smoke and not whole_checkpoints(stage.folder / "checkpoints"):
            with self._at("resume"):
                self._resume(settings, settings.resume)

    def _resume(self, settings: TrainSettings, resume: str) -> None:
        path = Path(resume)
        if self.unmade(path):
            return
        found = [path] if (path / "checkpoint.json").is_file() else whole_checkpoints(path / "checkpoints")
        if not found:
            raise UserError(f"{path} has no whole checkpoint; give one, or a training stage's folder")
        changes(settings, Checkpoint(found[0]).state, found[0])

    def _pair(self, train: str, train_url: str, test: str, test_url: str, stage: TrainSettings | None = None) -> None:
        """Open data sets of which one is to tell the classes of the other's images."""
        dataset, other = self._dataset(train, train_url, stage), self._dataset(test, test_url, stage)
        with self._at(test):
            if dataset is not None:
                check_same_classes(dataset, other)

    def _training_set(self, setting: str, settings: TrainSettings) -> Dataset | Mixture | None:
        """Open the training sets of a stage; None where one is not there, or not yet."""
        opened = [self._dataset(setting, source, settings) for source in settings.data.sources]
        with self._at(setting):
            there = [each for each in opened if each is not None]
            if len(there) == len(opened):
                dataset = mixed(settings.data, there)
                dataset.order(settings.seed, settings.data.window_bytes)  # a drop list may leave nothing
                return dataset
        return None

    def _dataset(self, setting: str, at: str | TrainSource | None, of: TrainSettings | None = None) -> Dataset | None:
        """Open a data set, by the settings of a training stage if it is of one; None: there is none, or not yet."""
        source = TrainSource(url=at) if isinstance(at, str) else at
        if source is None or self.unmade(source.url):
            return None
        store = _hasty(of.data.store if of else StoreSettings())
        with self._at(setting):
            return self._once((source.url, source.exclude, source.subset, store), lambda: _open(source, store))
        return None

    def _source(
        self, setting: str, path: str, which: str = "latest", ema: bool = False, given: tuple[str, ...] = ()
    ) -> Source | None:
        """Open weights; None where there are none, or not yet."""
        if self.unmade(path):
            return None
        with self._at(setting):
            return self._once((path, which, ema, *given), lambda: open_source(path, which, ema, said(list(given))))
        return None

    def _classes_of(self, weights: str) -> tuple[int, list[str]] | None:
        """Return how many classes weights have, and their names, be they there or of a stage to come; None: unknown."""
        stage = self.unmade(weights)
        wrong, self.wrong = self.wrong, []  # of another stage: told there
        try:
            if stage is None:
                source = self._source("", weights)
                return (source.template().num_classes, source.classes) if source else None
            if isinstance(stage.settings, ConvertStage) and stage.settings.classes is None:
                return self._classes_of(stage.settings.source)
            if isinstance(stage.settings, TrainSettings) and stage.settings.kind in OF_CLASSES:
                data = stage.settings.data
                stream = is_stream(data.train)
                made = self._dataset("", data.val, stage.settings) if stream else self._training_set("", stage.settings)
                return (len(made.classes), made.classes) if made is not None else None
            return None
        finally:
            self.wrong = wrong

    def _once(self, key: tuple, opening: Callable[[], Any]) -> Any:
        """Return what is at a path or URL, the first of a key, or raise what went wrong; it is opened once."""
        if key not in self._opened:
            try:
                self._refuse_gone(Path(key[0]))
                self._opened[key] = opening()
            except PatchmillError as error:  # what is on this machine does not answer later
                self._opened[key] = error if "://" in str(key[0]) else UserError(str(error))
        if isinstance(self._opened[key], PatchmillError):
            raise self._opened[key]
        return self._opened[key]

    def _refuse_gone(self, path: Path) -> None:
        for stage in self._plan.stages:
            if path.is_relative_to(stage.folder) and not path.exists():
                told = f"stage {stage.table.name} made {path}, which is gone; to have it made again, move away "
                raise UserError(f"{told}{stage.folder}")

    @contextmanager
    def _at(self, setting: str) -> Iterator[None]:
        try:
            yield
        except PatchmillError as error:
            self.wrong.append((setting, error))


def _open(source: TrainSource, store: StoreSettings) -> Dataset:
    """Open a data set, and see that its first and last shards are there, if they are to be on this machine."""
    dataset = Dataset.open(source.url, source.exclude, settings=store, subset=source.subset)
    there = [shard for shard, size in enumerate(dataset.shard_sizes) if size]
    for shard in {*there[:1], *there[-1:]}:
        if dataset.local[shard]:
            dataset.tars.read_range(dataset.paths[shard], 0, BLOCK)
    return dataset


def _hasty(store: StoreSettings) -> StoreSettings:
    return store.model_copy(update=HASTE)


def _given(settings: ConvertStage) -> tuple[str, ...]:
    return tuple(f"{key}={json.dumps(value)}" for key, value in settings.set.items())
