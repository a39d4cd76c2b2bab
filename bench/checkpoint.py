"""Saving and going on: what a save costs the loop, how long until it is on disk, how long to load it, and memory.

Two CPU ranks hold the states of a ViT under ZeRO 3 with AdamW, no gradients. In turns, each round: a plain copy of
a rank's share into memory that is there already; our save; torch.save of the same share, flushed; DeepSpeed's own
save_checkpoint, flushed; dd of as many bytes as our files have, with fsync. The loop waits for all of the last three.
Loading is of files that are in the page cache or not as the machine has it, on two ranks again and on one.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from common import Row, arguments, report, row

sys.path.append(str(Path(__file__).parents[1]))

CASES = {"ViT-L/16": {"name": "vit_l16"}, "ViT-H/14": {"name": "vit_h14"}}
QUICK = {"tiny": {"name": "vit_ti16", "depth": 2}}
ROUNDS = 3
WORKER = Path(__file__).with_name("checkpoint_rank.py")


def main():
    args = arguments(__doc__)
    rows, ratios = [], {}
    for title, model in (QUICK if args.quick else CASES).items():
        with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", ".")) as folder:
            found = run(2, "write", model, folder, 1 if args.quick else ROUNDS)
            for name, values in found.items():
                rows.append(named(name, title, values))
            loads = {ranks: run(ranks, "read", model, folder, 1 if args.quick else ROUNDS) for ranks in (2, 1)}
            for ranks, each in loads.items():
                for name, values in each.items():
                    rows.append(named(name, f"{ranks} rank{'s' * (ranks > 1)}, {title}", values))

        def times(ours: str, peer: str, found: dict = found) -> float:
            return median(b / a for a, b in zip(found[ours], found[peer], strict=True))

        stall, durable = "patchmill: the loop stalls, s", "patchmill: until it is durable, s"
        ratios |= {
            f"memory copy, {title}": times(stall, "memory copy, s"),
            f"torch.save, {title}": times(stall, "torch.save: the loop stalls, s"),
            f"DeepSpeed, {title}": times(stall, "DeepSpeed: the loop stalls, s"),
            f"dd, {title}": times(durable, "dd with fsync, s"),
            f"torch.save until durable, {title}": times(durable, "torch.save: the loop stalls, s"),
            f"DeepSpeed until durable, {title}": times(durable, "DeepSpeed: the loop stalls, s"),
        }
    report("checkpoint", rows, ratios, args.json)


def named(name: str, of: str, values: list[float]) -> Row:
    """Return a row of what is called "NAME, UNIT"."""
    name, _, unit = name.rpartition(", ")
    return row(f"{name}, {of}", unit, values)


def run(ranks: int, what: str, model: dict, folder: str, rounds: int) -> dict[str, list[float]]:
    """Return what rank 0 measured over all ranks."""
    from launch.local import free_port

    shared = {
        **os.environ, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1]),
    }  # fmt: skip
    command = [sys.executable, str(WORKER), what, json.dumps(model), folder, str(rounds)]
    processes = [
        subprocess.Popen(
            command, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE, text=True
        )
        for rank in range(ranks)
    ]
    try:
        outputs = [process.communicate()[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(process.returncode for process in processes):
        sys.exit("error: a rank failed")
    return json.loads(outputs[0].splitlines()[-1])


if __name__ == "__main__":
    main()
