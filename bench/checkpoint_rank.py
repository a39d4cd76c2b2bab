"""One rank of bench/checkpoint.py: ``checkpoint_rank.py write|read MODEL FOLDER ROUNDS``; rank 0 prints JSON."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import torch
import torch.distributed as dist
from common import memory

from pipeline import checkpoint, distributed
from pipeline.config import TrainSettings
from pipeline.engines import create_engine
from pipeline.models import create_model
from pipeline.saver import Saver
from pipeline.settings import check

CLASSES = 1000
RING = 2**27  # values, far more than caches hold: a second whole copy of ViT-H/14 would not fit


def main():
    what, model, folder, rounds = sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
    distributed.start()
    settings = check(TrainSettings, {
        "duration": "1 step", "global_batch": distributed.world_size(), "data": {"train": "-"},
        "model": {"name": model["name"]}, "engine": {"zero_stage": 3}, "checkpoint": {"keep": 2},
    }, "bench")  # fmt: skip

    def build():
        return create_model(**model, num_classes=CLASSES, seed=None)

    with torch.device("meta"):
        shapes = {name: tuple(parameter.shape) for name, parameter in build().named_parameters()}
    engine = create_engine(build, lambda _, shape: torch.full(shape, 0.02), settings)
    for *_, tensor in engine.pieces():
        tensor.uniform_(0, 0.02)  # what nobody wrote to takes no memory, and is copied for nothing
    found = write(engine, shapes, settings, folder, rounds) if what == "write" else read(engine, folder, rounds)
    worst = {name: distributed.gather_floats(values).max(axis=0).tolist() for name, values in found.items()}
    print(json.dumps(worst), flush=True)
    distributed.finish()
    distributed.end_process(0)


def write(engine, shapes: dict, settings: TrainSettings, folder: Path, rounds: int) -> dict[str, list[float]]:
    """Save in all ways, in turns."""
    rank, found = distributed.rank(), {}
    share = sum(tensor.nbytes for *_, tensor in engine.pieces())
    there = torch.ones(min(RING, share // 4))
    size = int(sum(distributed.gather_floats([float(share)])[:, 0]))

    def note(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    def plain_copy() -> None:
        at = 0
        for *_, tensor in engine.pieces():
            at = 0 if at + len(tensor) > len(there) else at
            there[at : at + len(tensor)].copy_(tensor)
            at += len(tensor)

    def torch_save() -> None:
        with open(folder / f"torch-{rank}", "wb") as file:
            torch.save({f"{kind}/{name}": tensor for kind, name, _, tensor in engine.pieces()}, file)
            file.flush()
            os.fsync(file.fileno())

    def deepspeed_save() -> None:
        engine.model.save_checkpoint(str(folder / "deepspeed"))
        for file in (folder / "deepspeed").rglob("*"):
            if file.is_file() and ((file.name.startswith("mp_rank") and rank == 0) or f"_rank_{rank}_" in file.name):
                with open(file, "rb") as opened:
                    os.fsync(opened.fileno())

    def dd() -> None:
        if rank == 0:
            command = [
                "dd",
                "if=/dev/zero",
                f"of={folder / 'dd'}",
                "bs=16M",
                f"count={-(-size // 2**24)}",
                "conv=fsync",
            ]
            subprocess.run(command, check=True, capture_output=True)

    with Saver(folder / "checkpoints", shapes, settings) as saver:
        note("patchmill: the first save stalls the loop, s", timed(lambda: saver.save(1, engine.pieces(), {})))
        saver.wait()
        for number in range(rounds):
            note("memory copy, s", timed(plain_copy))
            before = reset_peak()
            dist.barrier()
            began = perf_counter()
            saver.save(2 + number, engine.pieces(), {})
            note("patchmill: the loop stalls, s", perf_counter() - began)
            saver.wait()
            note("patchmill: until it is durable, s", perf_counter() - began)
            note("patchmill: memory at its peak above that before, MB", memory("VmHWM") - before)
            for name, action, left in (
                ("torch.save", torch_save, f"torch-{rank}"), ("DeepSpeed", deepspeed_save, "deepspeed"),
            ):  # fmt: skip
                before = reset_peak()
                note(f"{name}: the loop stalls, s", timed(action))
                note(f"{name}: memory at its peak above that before, MB", memory("VmHWM") - before)
                dist.barrier()
                remove(folder / left)
            note("dd with fsync, s", timed(dd))
            remove(folder / "dd")
    note("the copy that is kept, MB", share / 1e6)
    note("files of a checkpoint, MB", size / 1e6)
    return found


def read(engine, folder: Path, rounds: int) -> dict[str, list[float]]:
    """Load the newest checkpoint: every file is verified, and then read."""
    found = {"verifying, s": [], "loading, s": []}
    for _ in range(rounds):
        dist.barrier()
        began = perf_counter()
        loaded = checkpoint.newest(folder / "checkpoints")
        found["verifying, s"].append(perf_counter() - began)
        found["loading, s"].append(timed(lambda loaded=loaded: engine.load(loaded.read)))
        loaded.close()
    return found


def timed(action: Callable[[], object]) -> float:
    """Return the seconds that an action takes on the slowest rank."""
    dist.barrier()
    began = perf_counter()
    action()
    dist.barrier()
    return perf_counter() - began


def reset_peak() -> float:
    """Let the peak of memory begin anew; return what is held now, MB."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def remove(path: Path) -> None:
    """Remove what was written, whoever comes first."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    dist.barrier()


if __name__ == "__main__":
    main()
