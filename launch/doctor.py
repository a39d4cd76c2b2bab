"""Is a plan going to run here? What would fail after hours in a queue, found in a minute."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from math import gcd
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from launch.plan import Plan, Stage
from pipeline import provenance
from pipeline.checkpoint import whole_checkpoints
from pipeline.config import TrainSettings
from pipeline.convert.recognise import open_source
from pipeline.data import training_set
from pipeline.engines.states import checkpoint_bytes
from pipeline.estimate import ROOM, estimate_model
from pipeline.hostmemory import free_memory
from pipeline.memory import MemoryEstimate
from pipeline.mirror import open_mirror
from pipeline.shuffleroom import window_of_rank
from pipeline.weights import resolve_model
from shards.dataset import Dataset
from shards.errors import PatchmillError, UserError
from shards.mixture import Mixture
from shards.storesettings import StoreSettings
from shards.tarlist import find_tars
from shards.tarstream import is_stream

NVIDIA = Path("/dev/nvidiactl")  # there is one wherever the driver of a card is
HASTE = {"retry_seconds": 5.0}  # where a job would ask a store that does not answer for minutes
CLOCKS = 5.0  # seconds that clocks may be apart; at minutes stores refuse what is signed
SLOW = 0.7  # of the ranks' median: slower ones hold all others up


class Finding(NamedTuple):
    """One thing that was looked at.

    Attributes:
        what: It is.
        state: "ok"; "warning", when a run can be gone on with; or "error".
        told: What was found; where it is not good, what to do.
    """

    what: str
    state: str
    told: str


def diagnose(plan: Plan, ranks: list[dict[str, Any]]) -> list[Finding]:
    """Look at all that a plan needs.

    Args:
        plan: Checked already: settings that do not fit each other are found by reading it.
        ranks: Of ``probe_ranks``.
    """
    found = [*software(), *ranks_together(ranks)]
    for stage in plan.stages:
        if isinstance(stage.settings, TrainSettings):
            found += [Finding(f"{stage.table.name}: {each.what}", *each[1:]) for each in _of_stage(stage)]
    return found


def ranks_of(plan: Plan) -> int:
    """Return the ranks of the plan's largest stage."""
    return max(stage.table.ranks for stage in plan.stages)


def software(nvidia: Path = NVIDIA) -> Iterator[Finding]:
    """Tell versions, and whether torch is one that can use the card that is here."""
    versions = provenance.versions()
    yield Finding("versions", "ok", ", ".join(f"{name} {version}" for name, version in versions.items() if version))
    if torch.cuda.is_available():
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        cards = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        yield Finding("devices", "ok", f"{len(cards)} x {cards[0]}, CUDA {torch.version.cuda}, NCCL {nccl}")
    elif nvidia.exists() and torch.version.cuda is None:
        yield Finding(
            "devices", "error",
            f"there is an NVIDIA card, and torch {torch.__version__} is a build for CPUs; install torch with CUDA as "
            "the README says",
        )  # fmt: skip
    elif nvidia.exists():
        yield Finding(
            "devices", "error",
            f"there is an NVIDIA card, and torch {torch.__version__} for CUDA {torch.version.cuda} cannot use it; see "
            "nvidia-smi, and CUDA_VISIBLE_DEVICES",
        )  # fmt: skip
    else:
        yield Finding("devices", "ok", f"no GPU, {len(os.sched_getaffinity(0))} cores")


def ranks_together(ranks: list[dict[str, Any]]) -> Iterator[Finding]:
    """Compare what the ranks measured: clocks that are apart, and ranks that are slower than the others."""
    hosts = list(dict.fromkeys(rank["host"] for rank in ranks))
    yield Finding("ranks", "ok", f"{len(ranks)} on {', '.join(hosts)}, each on {ranks[0]['device']}")
    clocks = [rank["clock"] for rank in ranks]
    apart = max(clocks) - min(clocks)
    late = ranks[clocks.index(min(clocks))]["host"], ranks[clocks.index(max(clocks))]["host"]
    yield (
        Finding("clocks", "ok", f"{apart:.3f} s apart at most")
        if apart <= CLOCKS
        else Finding(
            "clocks", "warning", f"that of {late[0]} is {apart:.0f} s behind that of {late[1]}; set them by NTP"
        )
    )
    for key, what, unit in (("product", "matrix products", "FLOP/s"), ("reduce", "all-reduce", "B/s")):
        speeds = [rank[key] for rank in ranks]
        if None in speeds:
            continue
        told = f"{_with_prefix(median(speeds), unit)} a rank"
        slow = [
            f"rank {number} on {rank['host']} {_with_prefix(rank[key], unit)}"
            for number, rank in enumerate(ranks)
            if rank[key] < SLOW * median(speeds)
        ]
        if slow:
            yield Finding(what, "warning", f"{told}, but {', '.join(slow)}; look at those machines, or leave them out")
        else:
            yield Finding(what, "ok", f"{told}, the slowest {_with_prefix(min(speeds), unit)}")


def _with_prefix(value: float, unit: str) -> str:
    scale, prefix = (1e12, "T") if value >= 1e12 else (1e9, "G")
    return f"{value / scale:.3g} {prefix}{unit}"


def _of_stage(stage: Stage) -> Iterator[Finding]:
    """Look at what a training stage reads, holds and writes."""
    data = stage.settings.data
    hasty = data.model_copy(update={"store": data.store.model_copy(update=HASTE)})
    settings, ranks = stage.settings.model_copy(update={"data": hasty}), stage.table.ranks
    if waiting := _made_later(stage):
        yield Finding("data", "ok", f"{', '.join(waiting)}: to be made by the stages before")
    else:
        read = list(_data(settings, ranks))
        yield from read
        if all(each.state != "error" for each in read):
            yield from _guarded("memory", lambda: _memory(settings, ranks))
            yield from _guarded("checkpoints", lambda: _disk(settings, stage.folder))
    yield from _guarded("folder", lambda: _written(stage.folder))
    if settings.checkpoint.mirror:
        yield from _guarded("mirror", lambda: _mirrored(settings.checkpoint.mirror))


def _made_later(stage: Stage) -> list[str]:
    """Return the paths of a stage's settings that stages before it have yet to make."""
    data, run = stage.settings.data, stage.folder.parents[1]
    paths = [Path(url) for url in (*(source.url for source in data.sources), data.val, stage.settings.init) if url]
    return [str(path.relative_to(run)) for path in paths if path.is_relative_to(run) and not path.exists()]


def _guarded(what: str, look: Callable[[], Finding]) -> Iterator[Finding]:
    try:
        yield look()
    except (PatchmillError, OSError) as error:
        yield Finding(what, "error", str(error))


def _data(settings: TrainSettings, ranks: int) -> Iterator[Finding]:
    data = settings.data
    if data.val is not None:
        yield from _guarded("held-out data", lambda: _read(Dataset.open(data.val, settings=data.store)))
    if is_stream(data.train):
        yield from _guarded("data", lambda: _stream(data))
        return
    try:
        dataset = training_set(data)
    except (PatchmillError, OSError) as error:
        yield Finding("data", "error", str(error))
        return
    for each in dataset.datasets:
        yield from _guarded("data", lambda each=each: _read(each))
    yield from _window(dataset, settings, ranks)


def _stream(data) -> Finding:
    if not data.train.startswith(("-", "pipe:")):
        store, tars = find_tars(data.train, data.store)
        return Finding("data", "ok", f"a stream of {len(tars)} tars in {store.url}")
    return Finding("data", "ok", f"a stream, {data.train}")


def _read(dataset: Dataset) -> Finding:
    """Read a sample of the first and the last shard that has any."""
    there = [shard for shard, size in enumerate(dataset.shard_sizes) if size]
    began = time.monotonic()
    for shard in {there[0], there[-1]}:
        dataset.read(shard, 0)
    seconds = time.monotonic() - began
    told = f"{len(dataset):,} samples in {len(dataset.paths):,} shards of {dataset.url}, two read in {seconds:.2f} s"
    return Finding("data", "ok", told)


def _window(dataset: Dataset | Mixture, settings: TrainSettings, ranks: int) -> Iterator[Finding]:
    order = dataset.order(settings.seed, settings.data.window_bytes)
    wanted = 0.0
    for each, part in zip(dataset.datasets, getattr(order, "orders", [order]), strict=True):
        readers = ranks // gcd(ranks, part.shuffle.lanes)
        remote = not each.local.all()
        wanted += window_of_rank(part.shuffle, each.mean_bytes, ranks) if remote and not settings.data.cache else 0
        told = f"each byte of {each.url} is read by {readers} of {ranks} ranks"
        if readers > 1 and remote:
            yield Finding("readers", "warning", f"{told}; take a number of ranks that divides {part.shuffle.lanes}")
        else:
            yield Finding("readers", "ok", told)
    here, free = min(ranks, torch.cuda.device_count() or ranks), free_memory()
    told = f"{here * wanted / 1e9:.2f} GB of this machine's memory, {free / 1e9:.1f} GB are free"
    if here * wanted > free:
        yield Finding("shuffle window", "error", f"{told}; make data.window_bytes smaller, or set data.cache to a disk")
    else:
        yield Finding("shuffle window", "ok", told)


def _model(settings: TrainSettings) -> dict[str, Any]:
    data = settings.data
    labelled = Dataset.open(data.val, settings=data.store) if is_stream(data.train) else training_set(data)
    return resolve_model(settings, open_source(settings.init) if settings.init else None, len(labelled.classes))


def _memory(settings: TrainSettings, ranks: int) -> Finding:
    cuda = torch.cuda.is_available()
    memory = MemoryEstimate(settings, _model(settings), ranks, cuda)
    found = memory.at(settings.micro_batch or memory.local)
    host = sum(found.host.values())
    if cuda:
        room, here = ROOM * torch.cuda.get_device_properties(0).total_memory, min(ranks, torch.cuda.device_count())
        if found.device_peak > room:
            return Finding("memory", "error", _too_much("this card", found.device_peak, room, memory.largest(room)))
        told = f"{found.device_peak / 1e9:.1f} of {room / 1e9:.1f} GB of the card, "
    else:
        host, here, told = host + found.device_peak, ranks, ""
    free = free_memory()
    if here * host > free:
        return Finding("memory", "error", _too_much(f"{here} ranks on this machine", here * host, free, None))
    return Finding("memory", "ok", f"{told}{here * host / 1e9:.1f} of {free / 1e9:.1f} GB of this machine")


def _too_much(where: str, wanted: float, room: float, largest: int | None) -> str:
    told = f"{wanted / 1e9:.1f} GB are estimated for {where}, and there are {room / 1e9:.1f}; "
    return told + (f"a micro_batch of {largest} fits" if largest else "more ZeRO, recomputation or a smaller batch")


def _disk(settings: TrainSettings, stage: Path) -> Finding:
    """Tell whether the checkpoints that are kept, and the one that is being written, have room beside those there."""
    there, folder = _existing(stage), stage / "checkpoints"
    size = checkpoint_bytes(settings.optim, estimate_model(_model(settings), None)["parameters"])
    count = settings.checkpoint.keep + 1 + (settings.data.val is not None)  # and the best
    present = sum(file.stat().st_size for each in whole_checkpoints(folder) for file in each.iterdir())
    free = shutil.disk_usage(there).free
    told = f"{count} of {size / 1e9:.2f} GB, {present / 1e9:.2f} GB there, {free / 1e9:.1f} GB are free in {there}"
    if count * size - present > free:
        return Finding("checkpoints", "error", f"{told}: no room; make some, or give another --runs")
    return Finding("checkpoints", "ok", told)


def _existing(folder: Path) -> Path:
    """Return a folder, or the one that it will be made in."""
    return next(each for each in (folder, *folder.parents) if each.exists())


def _written(folder: Path) -> Finding:
    """Write, read and delete a file as a checkpoint is."""
    folder = _existing(folder)
    file, value = folder / f".doctor-{os.getpid()}", os.urandom(2**16)
    try:
        with open(file, "wb") as out:
            out.write(value)
            os.fsync(out.fileno())
        if file.read_bytes() != value:
            raise UserError(f"{folder} gives back other bytes than were written; look at its disk")
    finally:
        file.unlink(missing_ok=True)
    return Finding("folder", "ok", f"{folder} can be written")


def _mirrored(url: str) -> Finding:
    store, name, value = open_mirror(url, StoreSettings(**HASTE)), f".doctor-{os.getpid()}", os.urandom(2**10)
    store.write(name, value)
    try:
        if store.read(name) != value:
            raise UserError(f"{url} gives back other bytes than were written")
    finally:
        store.delete(name)
    return Finding("mirror", "ok", f"{url} can be written and read")


def print_findings(findings: list[Finding], width: int | None = None) -> None:
    """Print what was found, a line each."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    styles = {"ok": "green", "warning": "yellow", "error": "bold red"}
    for each in findings:
        table.add_row(Text(each.state, styles[each.state]), each.what, Text(each.told))
    Console(width=width, highlight=False).print(table)
