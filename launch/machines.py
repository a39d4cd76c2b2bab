"""What a job finds on its machines: versions, devices, clocks, and ranks that hold all others up."""

import os
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch

from launch.findings import Finding
from pipeline import provenance

NVIDIA = Path("/dev/nvidiactl")  # there is one wherever the driver of a card is
CLOCKS = 5.0  # seconds that clocks may be apart; at minutes stores refuse what is signed
SLOW = 0.7  # of the ranks' median: slower ones hold all others up


def software(nvidia: Path = NVIDIA) -> Iterator[Finding]:
    """Tell versions, and whether torch is one that can use the card that is here."""
    yield Finding("versions", "ok", _in_words(provenance.versions()))
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
    """Compare what the ranks measured: versions that differ, clocks that are apart, and what is slow."""
    hosts = list(dict.fromkeys(rank["host"] for rank in ranks))
    devices = list(dict.fromkeys(rank["device"] for rank in ranks))
    told = f"{len(ranks)} on {', '.join(hosts)}, each on {' or '.join(devices)}"
    if len(devices) > 1:
        yield Finding("ranks", "warning", f"{told}: the slower ones hold all others up; take hosts that are alike")
    else:
        yield Finding("ranks", "ok", told)
    yield from _versions(ranks)
    yield _clocks(ranks)
    yield _products(ranks)
    if len(ranks) > 1:
        sent = _with_prefix(median(rank["reduce"] for rank in ranks), "B/s")
        yield Finding("all-reduce", "ok", f"{sent} a rank; all end together, and links tell of each alone")
        yield _links(ranks)


def _versions(ranks: list[dict[str, Any]]) -> Iterator[Finding]:
    """Tell where versions are others than on rank 0; the same ones were told already."""
    for number, rank in enumerate(ranks):
        if other := {name: has for name, has in rank["versions"].items() if has != ranks[0]["versions"].get(name)}:
            told = f"rank {number} on {rank['host']} has {_in_words(other)}, rank 0 has others; install the same on all"
            yield Finding("versions", "error", told)
            return


def _clocks(ranks: list[dict[str, Any]]) -> Finding:
    clocks = [rank["clock"] for rank in ranks]
    apart = max(clocks) - min(clocks)
    if apart <= CLOCKS:
        return Finding("clocks", "ok", f"{apart:.3f} s apart at most")
    late, early = (ranks[clocks.index(which(clocks))]["host"] for which in (min, max))
    return Finding("clocks", "warning", f"that of {late} is {apart:.0f} s behind that of {early}; set them by NTP")


def _products(ranks: list[dict[str, Any]]) -> Finding:
    speeds = [rank["product"] for rank in ranks]
    told = f"{_with_prefix(median(speeds), 'FLOP/s')} a rank"
    slow = {number: speed for number, speed in enumerate(speeds) if speed < SLOW * median(speeds)}
    if slow:
        return _slow("matrix products", told, ranks, slow, "FLOP/s")
    return Finding("matrix products", "ok", f"{told}, the slowest {_with_prefix(min(speeds), 'FLOP/s')}")


def _links(ranks: list[dict[str, Any]]) -> Finding:
    """Compare what pairs of ranks exchanged: each link of a slow rank is slow, and of its neighbours only that one."""
    links = {tuple(sorted((number, peer))): speed for number, rank in enumerate(ranks) for peer, speed in rank["links"]}
    best = {number: max(speed for _, speed in rank["links"]) for number, rank in enumerate(ranks)}
    usual = median(best.values())
    told = f"{_with_prefix(usual, 'B/s')} each way between two ranks"
    if len(ranks) < 3:
        return Finding("links", "ok", f"{told}, with no others to compare them with")
    if slow := {number: speed for number, speed in best.items() if speed < SLOW * usual}:
        return _slow("links", told, ranks, slow, "B/s")
    if pairs := {pair: speed for pair, speed in links.items() if speed < SLOW * usual}:
        named = ", ".join(
            f"{_with_prefix(speed, 'B/s')} between {' and '.join(_name(ranks, each) for each in pair)}"
            for pair, speed in pairs.items()
        )
        return Finding("links", "warning", f"{told}, but {named}; look at what connects them")
    return Finding("links", "ok", f"{told}, the slowest {_with_prefix(min(links.values()), 'B/s')}")


def _slow(what: str, told: str, ranks: list[dict[str, Any]], slow: dict[int, float], unit: str) -> Finding:
    named = ", ".join(f"{_name(ranks, number)} {_with_prefix(speed, unit)}" for number, speed in slow.items())
    hosts = tuple(dict.fromkeys(ranks[number]["host"] for number in slow))
    return Finding(what, "warning", f"{told}, but {named}; look at those machines, or leave them out", hosts)


def _name(ranks: list[dict[str, Any]], number: int) -> str:
    return f"rank {number} on {ranks[number]['host']}"


def _in_words(versions: dict[str, str | None]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items() if version)


def _with_prefix(value: float, unit: str) -> str:
    scale, prefix = (1e12, "T") if value >= 1e12 else (1e9, "G")
    return f"{value / scale:.3g} {prefix}{unit}"
