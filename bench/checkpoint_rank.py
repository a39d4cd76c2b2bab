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

import numpy as np
import torch
import torch.distributed as dist
from common import memory

from pipeline import checkpoint, distributed
from pipeline.config import TrainSettings
from pipeline.engines import create_engine
from pipeline.hostmemory import free_memory
from pipeline.models import create_model
from pipeline.saver import Saver
from pipeline.settings import check
from shards.ending import end_process


def main():
    what, model, folder, rounds = sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
    distributed.start()
    settings = check(TrainSettings, {
        "duration": "1 step", "global_batch": distributed.world_size(), "data": {"train": "-"},
        "model": {"name": model["name"]}, "engine": {"zero_stage": 3}, "checkpoint": {"keep": 2},
    }, "bench")  # fmt: skip

    def build():
        return create_model(**model, seed=None)

    with torch.device("meta"):
        shapes = {name: tuple(parameter.shape) for name, parameter in build().named_parameters()}
    engine = create_engine(build, lambda _, shape: torch.full(shape, 0.02), settings)
    for *_, tensor in engine.pieces():
        tensor.uniform_(0, 0.02)  # what nobody wrote to takes no memory, and is copied for nothing
    found = write(engine, shapes, settings, folder, rounds) if what == "write" else read(engine, folder, rounds)
    worst = {name: distributed.gather_floats(values).max(axis=0).tolist() for name, values in found.items()}
    print(json.dumps(worst), flush=True)
    distributed.finish()
    end_process(0)


def write(engine, shapes: dict, settings: TrainSettings, folder: Path, rounds: int) -> dict[str, list[float]]:
    """Save in all ways, in turns, forth and back: first beside a copy alone, whose time others' writing disturbs."""
    rank, found = distributed.rank(), {}
    share = sum(tensor.nbytes for *_, tensor in engine.pieces())
    there = torch.from_numpy(np.full(share // 4, 1, np.float32))
    size = int(sum(distributed.gather_floats([float(share)])[:, 0]))
    saved = []

    def note(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    def plain_copy() -> None:
        at = 0
        for *_, tensor in engine.pieces():
            there[at : at + len(tensor)].copy_(tensor)
            at += len(tensor)

    def patchmill() -> tuple[float, float, float]:
        """Return the seconds that the loop stalls and those until it is durable, and the MB above those before."""
        before = reset_peak()
        dist.barrier()
        began = perf_counter()
        saved.append(saver.save(1 + len(saved), engine.pieces(), {}))
        stalled = perf_counter() - began
        saver.wait()
        durable = perf_counter() - began
        if len(saved) > 1:
            remove(saved[-2])  # else the next save would delete it
        return stalled, durable, memory("VmHWM") - before

    def stall_alone() -> None:
        note("patchmill: the loop stalls, s", patchmill()[0])

    def until_durable() -> None:
        _, durable, above = patchmill()
        note("patchmill: until it is durable, s", durable)
        note("patchmill: memory at its peak above that before, MB", above)

    def peer(name: str, action: Callable[[], object], left: str) -> Callable[[], None]:
        def save() -> None:
            before = reset_peak()
            note(f"{name}: the loop stalls, s", timed(action))
            note(f"{name}: memory at its peak above that before, MB", memory("VmHWM") - before)
            remove(folder / left)

        return save

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
            many = f"count={-(-size // 2**24)}"
            command = ["dd", "if=/dev/zero", f"of={folder / 'dd'}", "bs=16M", many, "conv=fsync"]
            subprocess.run(command, check=True, capture_output=True)

    def dd_alone() -> None:
        note("dd with fsync, s", timed(dd))
        remove(folder / "dd")

    def copy_alone() -> None:
        note("memory copy, s", timed(plain_copy))

    def in_turns(ways: list[Callable[[], None]], settled: int) -> None:
        for number in range(rounds):
            for way in reversed(ways) if number % 2 else ways:
                settle(settled)
                way()

    peers = [peer("torch.save", torch_save, f"torch-{rank}"), peer("DeepSpeed", deepspeed_save, "deepspeed")]
    with Saver(folder / "checkpoints", shapes, settings) as saver:
        saver.prepare()
        note("patchmill: memory for the copy is taken beside the loop in, s", timed(saver.wait))
        note("patchmill: the first save stalls the loop, s", patchmill()[0])
        in_turns([copy_alone, stall_alone], 0)
        in_turns([until_durable, *peers, dd_alone], size)
    note("the copy that is kept, MB", share / 1e6)
    note("files of a checkpoint, MB", size / 1e6)
    return found


def read(engine, folder: Path, rounds: int) -> dict[str, list[float]]:
    """Load the newest checkpoint, which no cache holds: every file is verified, and then read; and read its files."""
    found = {
        name: []
        for name in ("reading the files, s", "verifying, s", "loading, s", "memory at its peak above that before, MB")
    }
    files = sorted((folder / "checkpoints").glob("samples-*/*.safetensors"))
    mine = files[distributed.rank() :: distributed.world_size()]

    def read_mine() -> None:
        buffer = bytearray(2**20)
        for file in mine:
            with open(file, "rb", buffering=0) as opened:
                while opened.readinto(buffer):
                    pass

    for _ in range(rounds):
        forget(files)
        found["reading the files, s"].append(timed(read_mine))
        forget(files)
        before = reset_peak()
        dist.barrier()
        began = perf_counter()
        loaded = checkpoint.newest(folder / "checkpoints")
        found["verifying, s"].append(perf_counter() - began)
        found["loading, s"].append(timed(lambda loaded=loaded: engine.load(loaded.read)))
        loaded.close()
        found["memory at its peak above that before, MB"].append(memory("VmHWM") - before)
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


def settle(size: int = 0) -> None:
    """Wait until the disk has everything that anybody wrote or removed before, and touch as much memory as comes next.

    A virtual machine gets memory from its host when it first uses it: whoever comes first would pay for that. Where
    there is not as much, no more than most of what is free.
    """
    if distributed.rank() == 0:
        os.sync()
        np.full(min(size, int(0.7 * free_memory())), 1, np.uint8)
    dist.barrier()


def forget(files: list[Path]) -> None:
    """Have the system read files from the disk the next time."""
    settle()
    if distributed.rank() == 0:
        for file in files:
            with open(file, "rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    dist.barrier()


if __name__ == "__main__":
    main()
