"""Is a plan going to run here? What would fail after hours in a queue, found in a minute."""

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NamedTuple

import torch

from launch.choice import meant
from launch.findings import Finding, of_all_hosts
from launch.machines import ranks_together, software
from launch.plan import Plan, Stage
from launch.rankprobe import probe_ranks
from launch.readable import HASTE, misfits
from pipeline import distributed
from pipeline.checkpoint import path_of, superseded, whole_checkpoints
from pipeline.config import TrainSettings
from pipeline.convert.recognise import open_source
from pipeline.data import training_set
from pipeline.engines.states import checkpoint_bytes
from pipeline.estimate import ROOM, estimate_model
from pipeline.memory import MemoryEstimate
from pipeline.mirror import open_mirror
from pipeline.schedule import Schedule
from pipeline.shuffleroom import window_of_rank
from pipeline.weights import resolve_model
from shards.cache import MARK
from shards.dataset import Dataset
from shards.errors import PatchmillError, UserError
from shards.mixture import Mixture
from shards.order import read_factor
from shards.store import local_path
from shards.storesettings import StoreSettings
from shards.tarlist import find_tars
from shards.tarstream import is_stream


class Room(NamedTuple):
    """The host that has the least memory for each of a stage's ranks.

    Attributes:
        host: Its name.
        ranks: Those of the stage that are there.
        free: Bytes of its memory.
    """

    host: str
    ranks: int
    free: float


def diagnose(plan: Plan, stages: list[Stage], ranks: list[dict[str, Any]]) -> list[Finding]:
    """Look at all that some stages of a plan need.

    Args:
        plan: Checked already: settings that do not fit each other are found by reading it.
        stages: Of the plan.
        ranks: Of ``probe_ranks``.
    """
    found = [*software(), *ranks_together(ranks)]
    for stage in stages:
        if isinstance(stage.settings, TrainSettings):
            looked = _of_stage(stage, stage.settings, ranks)
            found += [each._replace(what=f"{stage.table.name}: {each.what}") for each in looked]
    told = {each.told for each in found}
    for name, setting, error in misfits(plan, {stage.table.name for stage in stages}):
        if str(error) not in told:
            found.append(Finding(f"{name}: {setting}", "error", str(error)))
    return found


def diagnose_together(plan: Plan, stages: list[Stage]) -> list[Finding]:
    """Look at all that some stages need, as one of a job's ranks; one rank of each host looks. Collective.

    What a host cannot read or write, or has less of, the first host knows nothing of: its own disk, what it mounts.

    Args:
        plan: As for ``diagnose``.
        stages: Likewise.
    """
    ranks = probe_ranks()
    hosts = [each["host"] for each in ranks]
    first = hosts.index(hosts[distributed.rank()]) == distributed.rank()
    found = distributed.everyone(diagnose(plan, stages, ranks) if first else None)
    return of_all_hosts({host: looked for host, looked in zip(hosts, found, strict=True) if looked is not None})


def stages_of(plan: Plan, only: str | None) -> list[Stage]:
    """Return the stages of a plan to be looked at: all, or those that a name means.

    Raises:
        UserError: There is no such stage.
    """
    names = meant(plan, only) if only is not None else None
    return [stage for stage in plan.stages if names is None or stage.table.name in names]


def _of_stage(stage: Stage, settings: TrainSettings, started: list[dict[str, Any]]) -> Iterator[Finding]:
    """Look at what a training stage reads, holds and writes."""
    waiting, data, ranks = _made_later(stage, settings), settings.data, stage.table.ranks
    hasty = data.model_copy(update={"store": data.store.model_copy(update=HASTE)})
    settings, room = settings.model_copy(update={"data": hasty}), _least_room(started[:ranks])
    if len(started) < ranks:
        told = f"{ranks} in the plan, and {len(started)} were looked at, and memory is of so many"
        told += "; look again with all, as a step of its job"
        yield Finding("ranks", "warning", told)
    if waiting:
        yield Finding("data", "ok", f"{', '.join(waiting)}: to be made by the stages before")
    else:
        read = list(_data(settings, ranks, room))
        yield from read
        if all(each.state != "error" for each in read):
            yield from _guarded("memory", lambda: _memory(settings, ranks, room))
            yield from _guarded("checkpoints", lambda: _disk(settings, stage.folder))
    yield from _guarded("folder", lambda: _written("folder", stage.folder))
    if cache := data.cache:
        yield from _guarded("cache", lambda: _cached(local_path(cache, "the cache")))
    if mirror := settings.checkpoint.mirror:
        yield from _guarded("mirror", lambda: _mirrored(mirror))


def _least_room(ranks: list[dict[str, Any]]) -> Room:
    hosts = [rank["host"] for rank in ranks]
    rooms = [Room(rank["host"], hosts.count(rank["host"]), rank["free"]) for rank in ranks]
    return min(rooms, key=lambda room: room.free / room.ranks)


def _made_later(stage: Stage, settings: TrainSettings) -> list[str]:
    """Return the paths of a stage's settings that stages before it have yet to make."""
    data, probe, run = settings.data, settings.probe, stage.folder.parents[1]
    urls = [*(source.url for source in data.sources), data.val, settings.init]
    urls += [probe.train, probe.test] if probe else []
    paths = [Path(url) for url in urls if url]
    return [str(path.relative_to(run)) for path in paths if path.is_relative_to(run) and not path.exists()]


def _guarded(what: str, look: Callable[[], Finding]) -> Iterator[Finding]:
    try:
        yield look()
    except (PatchmillError, OSError) as error:
        yield Finding(what, "error", str(error))


def _data(settings: TrainSettings, ranks: int, room: Room) -> Iterator[Finding]:
    data, probe = settings.data, settings.probe
    others = {"held-out data": data.val, "training data of the probe": probe.train if probe else None}
    for what, url in (others | {"test data of the probe": probe.test if probe else None}).items():
        if url is not None:
            yield from _guarded(what, partial(_opened_and_read, what, url, data.store))
    if is_stream(data.train):
        yield from _guarded("data", partial(_stream, data.train, data.store))
        return
    try:
        dataset = training_set(data)
    except (PatchmillError, OSError) as error:
        yield Finding("data", "error", str(error))
        return
    read = [each for one in dataset.datasets for each in _guarded("data", partial(_read, "data", one))]
    yield from read
    if all(each.state != "error" for each in read):
        yield from _window(dataset, settings, ranks, room)


def _stream(url: str, settings: StoreSettings) -> Finding:
    if not url.startswith(("-", "pipe:")):
        store, tars = find_tars(url, settings)
        return Finding("data", "ok", f"a stream of {len(tars)} tars in {store.url}")
    return Finding("data", "ok", f"a stream, {url}")


def _opened_and_read(what: str, url: str, store: StoreSettings) -> Finding:
    return _read(what, Dataset.open(url, settings=store))


def _read(what: str, dataset: Dataset) -> Finding:
    """Read a sample of the first and the last shard that has any."""
    there = [shard for shard, size in enumerate(dataset.shard_sizes) if size]
    if not there:
        raise UserError(f"drop list {dataset.exclude} leaves no sample of {dataset.url}; take another, or none")
    began = time.monotonic()
    for shard in {there[0], there[-1]}:
        dataset.read(shard, 0)
    seconds = time.monotonic() - began
    told = f"{len(dataset):,} samples in {len(dataset.paths):,} shards of {dataset.url}, two read in {seconds:.2f} s"
    return Finding(what, "ok", told)


def _window(dataset: Dataset | Mixture, settings: TrainSettings, ranks: int, room: Room) -> Iterator[Finding]:
    order = dataset.order(settings.seed, settings.data.window_bytes)
    wanted = 0.0
    for each, part in zip(dataset.datasets, order.orders, strict=True):
        readers = read_factor(ranks, part.shuffle.lanes)
        remote = not each.local.all()
        wanted += window_of_rank(part.shuffle, each.mean_bytes, ranks) if remote and not settings.data.cache else 0
        told = f"each byte of {each.url} is read by {readers} of {ranks} ranks"
        if readers > 1 and remote:
            yield Finding("readers", "warning", f"{told}; take a number of ranks that divides {part.shuffle.lanes}")
        else:
            yield Finding("readers", "ok", told)
    wanted *= room.ranks
    told = f"{wanted / 1e9:.2f} GB of the memory of {room.host}, {room.free / 1e9:.1f} GB are free"
    if wanted > room.free:
        yield Finding("shuffle window", "error", f"{told}; make data.window_bytes smaller, or set data.cache to a disk")
    else:
        yield Finding("shuffle window", "ok", told)


def _model(settings: TrainSettings) -> tuple[dict[str, Any], int | None]:
    """Return what ``create_model`` takes, and the samples of an epoch; nobody knows those of a stream."""
    data, stream = settings.data, is_stream(settings.data.train)
    labelled = Dataset.open(data.val, settings=data.store) if stream and data.val else training_set(data)
    init = open_source(settings.init) if settings.init else None
    return resolve_model(settings, init, len(labelled.classes)), None if stream else len(labelled)


def _memory(settings: TrainSettings, ranks: int, room: Room) -> Finding:
    cuda = torch.cuda.is_available()
    memory = MemoryEstimate(settings, _model(settings)[0], ranks, cuda)
    found = memory.at(settings.micro_batch or memory.local)
    host, told = sum(found.host.values()), ""
    if cuda:
        card = ROOM * torch.cuda.get_device_properties(0).total_memory
        if found.device_peak > card:
            return Finding("memory", "error", _too_much("this card", found.device_peak, card, memory.largest(card)))
        told = f"{found.device_peak / 1e9:.1f} of {card / 1e9:.1f} GB of the card, "
    else:
        host += found.device_peak
    host *= room.ranks
    if host > room.free:
        return Finding("memory", "error", _too_much(f"{_counted(room.ranks)} on {room.host}", host, room.free, None))
    return Finding("memory", "ok", f"{told}{host / 1e9:.1f} of {room.free / 1e9:.1f} GB of {room.host}")


def _counted(ranks: int) -> str:
    return "1 rank" if ranks == 1 else f"{ranks} ranks"


def _too_much(where: str, wanted: float, room: float, largest: int | None) -> str:
    told = f"{wanted / 1e9:.1f} GB are estimated for {where}, and there are {room / 1e9:.1f}; "
    return told + (f"a micro_batch of {largest} fits" if largest else "more ZeRO, recomputation or a smaller batch")


def _disk(settings: TrainSettings, stage: Path) -> Finding:
    """Tell whether the checkpoints that are kept, and the one that is being written, have room beside those there."""
    there, folder = _existing(stage), stage / "checkpoints"
    model, epoch = _model(settings)
    size = checkpoint_bytes(settings.optim, estimate_model(model, None)["parameters"])
    count = _most_kept(settings, epoch) + 1 + (settings.data.val is not None)  # and the best
    present = sum(file.stat().st_size for each in whole_checkpoints(folder) for file in each.iterdir())
    free = shutil.disk_usage(there).free
    told = f"{count} of {size / 1e9:.2f} GB, {present / 1e9:.2f} GB there, {free / 1e9:.1f} GB are free in {there}"
    if count * size - present > free:
        return Finding("checkpoints", "error", f"{told}: no room; make some, or give another --runs")
    return Finding("checkpoints", "ok", told)


def _most_kept(settings: TrainSettings, epoch: int | None) -> int:
    """Return how many checkpoints stay while the last one is written, those that are kept for good among them."""
    schedule, batch = Schedule.of(settings, epoch, settings.global_batch), settings.global_batch
    period = max(schedule.periods["save"], batch)  # at most one a step
    due = range(period, schedule.total - batch + 1, period)
    names = sorted({path_of(Path(), -(-each // batch) * batch).name for each in due})
    keep, every = settings.checkpoint.keep, schedule.periods.get("keep")
    return max(keep, len(names) - len(superseded(names, None, None, keep, every)))


def _existing(folder: Path) -> Path:
    """Return a folder, or the one that it will be made in."""
    return next(each for each in (folder, *folder.parents) if each.exists())


def _written(what: str, folder: Path) -> Finding:
    """Write a file as into a folder, and read it; it has no name, which another host that looks could take as well."""
    folder, value = _existing(folder), os.urandom(2**16)
    with TemporaryFile(dir=folder) as file:
        file.write(value)
        file.flush()
        os.fsync(file.fileno())
        file.seek(0)
        if file.read() != value:
            raise UserError(f"{folder} gives back other bytes than were written; look at its disk")
    return Finding(what, "ok", f"{folder} can be written")


def _cached(folder: Path) -> Finding:
    """Write as into a cache; one that is there already is used as it is when its disk is full."""
    try:
        return _written("cache", folder)
    except OSError as error:
        if error.errno != errno.ENOSPC or not (folder / MARK).exists():
            raise
        return Finding("cache", "warning", f"the disk of {folder} is full, nothing more is kept there; make room")


def _mirrored(url: str) -> Finding:
    store, value = open_mirror(url, StoreSettings(**HASTE)), os.urandom(2**10)
    name = f".doctor-{os.urandom(8).hex()}"  # of which other hosts have others
    store.write(name, value)
    try:
        if store.read(name) != value:
            raise UserError(f"{url} gives back other bytes than were written")
    finally:
        store.delete(name)
    return Finding("mirror", "ok", f"{url} can be written and read")
