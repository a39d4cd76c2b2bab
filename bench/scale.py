"""What more ranks are worth: images a second of 1, 2, ... ranks under each ZeRO stage, and what a step sends.

Each rank takes the same number of images, the data being in memory: efficiency is the speed of N ranks over N times
that of one. On a CPU a rank has one thread, and there are two ranks: what they lose by sharing the machine alone is in
the row of two that know nothing of each other. There, too, the kernel counts what each rank's sockets sent. Theory is
2 (N - 1) / N times the float32 gradients under ZeRO 0, 1 and 2 (reduce, then gather what was stepped), and
3 (N - 1) / N under ZeRO 3, which gathers weights for the forward and for the backward pass. (DeepSpeed 0.19's stages 1
and 2 send half as much again: they reduce by an all-reduce.) On a machine with GPUs there are up to as many ranks as
those, in powers of two.
"""

import json
import os
import socket
import subprocess
import sys
from contextlib import suppress
from itertools import product
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from common import arguments, report, row

CUDA = torch.cuda.is_available()
CASE = (
    {"name": "vit_b16", "image_size": 224, "precision": "bfloat16", "batch": 64, "steps": 20}
    if CUDA
    else {"name": "vit_ti16", "image_size": 224, "precision": "float32", "batch": 8, "steps": 6}
)
QUICK = {"name": "vit_ti16", "image_size": 32, "precision": "float32", "batch": 8, "steps": 4}
RANKS = [n for n in (2, 4, 8, 16) if n <= torch.cuda.device_count()] if CUDA else [2]
STAGES = (0, 1, 2, 3)
ROUNDS, CLASSES, WARM = 3, 1000, 2
APART = "2 ranks apart, ZeRO 0"


def main():
    args = arguments(__doc__)
    case = QUICK if args.quick else CASE
    found: dict[str, list[dict]] = {}
    for _ in range(1 if args.quick else ROUNDS):
        for ranks, stage in product([1, *RANKS], STAGES):
            found.setdefault(f"{_ranks(ranks)}, ZeRO {stage}", []).append(together(case, ranks, stage))
        if not CUDA:
            found.setdefault(APART, []).append(apart(case))
    rows, ratios = [], {}
    for name, taken in found.items():
        rows.append(row(name, "images/s", [each["images"] for each in taken]))
    for name, taken in found.items():
        if taken[0]["sent"]:
            rows.append(row(f"sent by a rank, {name}", "MB a step", [each["sent"] / 1e6 for each in taken]))
            rows.append(row(f"theory, {name}", "MB a step", [taken[0]["theory"] / 1e6]))
        if not name.startswith("1 rank,"):
            alone = found["1 rank, ZeRO " + name[-1]]
            speeds = [many["images"] / one["images"] for many, one in zip(taken, alone, strict=True)]
            ratios[f"as many times 1 rank, {name}"] = median(speeds) / int(name.split()[0])
    report("scale", rows, ratios, args.json)


def _ranks(number: int) -> str:
    return "1 rank" if number == 1 else f"{number} ranks"


def together(case: dict, ranks: int, stage: int) -> dict:
    """Return the images a second of all ranks, and the bytes that the one which sent most sent in a step."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    taken = read(start([*command, __file__, json.dumps(case), str(stage)]))
    return {
        "images": ranks * case["batch"] / max(each["seconds"] for each in taken),
        "sent": max(each["sent"] for each in taken),
        "theory": taken[0]["values"] * 4 * (3 if stage == 3 else 2) * (ranks - 1) / ranks,
    }


def apart(case: dict) -> dict:
    """Return the images a second of two processes of one rank each, at once."""
    taken = [each for process in [start([sys.executable, __file__, json.dumps(case), "0"]) for _ in range(2)]
             for each in read(process)]  # fmt: skip
    return {"images": sum(case["batch"] / each["seconds"] for each in taken), "sent": 0}


def start(command: list[str]) -> subprocess.Popen:
    """Start ranks, of one thread each on a CPU."""
    threads = {} if CUDA else {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **threads})


def read(process: subprocess.Popen) -> list[dict]:
    """Wait for ranks, and return what each printed."""
    out, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"ranks ended with exit code {process.returncode}")
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")]


# ---- what runs as a rank


def rank(case: dict, stage: int) -> dict:
    """Take steps; return the median seconds of one, the bytes that this process sent in one, and the model's values."""
    from pipeline import distributed
    from pipeline.config import TrainSettings
    from pipeline.engines import create_engine
    from pipeline.models import create_model
    from pipeline.models.initial import initial_value
    from pipeline.objectives.supervised import Supervised
    from pipeline.settings import check

    distributed.start()
    model = {"name": case["name"], "image_size": case["image_size"], "num_classes": CLASSES}
    settings = check(TrainSettings, {
        "duration": "1 epoch", "global_batch": case["batch"] * distributed.world_size(), "data": {"train": "memory"},
        "model": {"name": case["name"]}, "optim": {"clip": 1.0, "weight_decay": 0.1},
        "engine": {"zero_stage": stage, "precision": case["precision"]},
    }, "bench")  # fmt: skip
    with torch.device("meta"):
        template = create_model(**model, seed=None)
    engine = create_engine(
        lambda: create_model(**model, seed=None), lambda name, shape: initial_value(template, name, shape, 0), settings
    )
    objective = Supervised(settings, None, CLASSES)
    where = distributed.device()
    images = torch.randn(case["batch"], 3, case["image_size"], case["image_size"], device=where)
    labels = torch.randint(0, CLASSES, (case["batch"],), device=where)

    seconds, before = [], 0
    for number in range(WARM + case["steps"]):
        if number == WARM:
            before = sent()
        began = perf_counter()
        engine.step([(images, labels)], lambda model, batch: objective.loss(model, *batch), lr=1e-4)
        if CUDA:
            torch.cuda.synchronize()
        seconds.append(perf_counter() - began)
    return {
        "seconds": median(seconds[WARM:]), "sent": (sent() - before) / case["steps"],
        "values": sum(parameter.numel() for parameter in template.parameters()),
    }  # fmt: skip


def sent() -> int:
    """Return the bytes that the TCP connections of this process have sent: ``tcpi_bytes_sent`` of Linux's tcp_info."""
    total = 0
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # no socket, or none of TCP
            with socket.socket(fileno=os.dup(int(entry.name))) as connection:
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 232)
            total += int.from_bytes(info[200:208], "little")
    return total


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[2].isdigit():
        # In one write: the ranks share a pipe.
        sys.stdout.write(json.dumps(rank(json.loads(sys.argv[1]), int(sys.argv[2]))) + "\n")
        sys.stdout.flush()
    else:
        main()
