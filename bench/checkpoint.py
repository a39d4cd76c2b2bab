"""Saving and going on: what a save costs the loop, how long until it is on disk, how long to load it, and memory.

Two CPU ranks hold the states of a ViT under ZeRO 3 with AdamW, no gradients. In turns, forth and back: a plain copy of
a rank's share into memory that is there already, and our save, of which the loop's stall counts. Then, in turns again:
our save until it is on disk; torch.save of the same share, flushed; DeepSpeed's own save_checkpoint, flushed; dd of as
many bytes as our files have, with fsync. The loop waits for all of the last three.
Loading is of files that no cache holds, on two ranks again and on one, beside reading these files and no more. A model
that memory or disk has no room for loses blocks until it fits, and says so.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from shutil import disk_usage
from statistics import median

from common import Row, parser, report, row

sys.path.append(str(Path(__file__).parents[1]))

CASES = {
    title: {"name": name, "num_classes": 1000} for title, name in (("ViT-L/16", "vit_l16"), ("ViT-H/14", "vit_h14"))
}
QUICK = {"tiny": {"name": "vit_ti16", "num_classes": 1000, "depth": 2}}
RANKS = 2
ROUNDS = 8
WORKER = Path(__file__).with_name("checkpoint_rank.py")
MEMORY = 16 + 12 + 1.25 * 12
"""Bytes a parameter: weights, masters and AdamW's two; a plain copy; ours, and what of it is on its way to the disk."""
DISK = 2 * 12 + 16
"""Bytes a parameter: two checkpoints of ours, and the one of a peer."""
BESIDE = 1.5e9
"""Bytes that a rank takes besides: libraries, and buffers of ZeRO 3."""


def main():
    options = parser(__doc__)
    options.add_argument(
        "--model", action="append", choices=list(CASES), help="this one alone; may be given several times"
    )
    args = options.parse_args()
    cases = QUICK if args.quick else {title: CASES[title] for title in args.model or CASES}
    rounds = 1 if args.quick else ROUNDS
    rows, ratios = [], {}
    scratch = Path(os.environ.get("TMPDIR", Path(__file__).parents[1] / "build/bench"))
    for title, model in cases.items():
        scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            model, lacking = fitting(model, folder)
            title += lacking
            found = run(RANKS, "write", model, folder, rounds)
            for name, values in found.items():
                rows.append(named(name, title, values))
            loads = {ranks: run(ranks, "read", model, folder, rounds) for ranks in (RANKS, 1)}
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


def fitting(model: dict, folder: str) -> tuple[dict, str]:
    """Return a model without the blocks that memory or disk have no room for, and what that adds to its name."""
    import torch

    from pipeline.hostmemory import free_memory
    from pipeline.models import create_model

    def size(**changed) -> tuple[int, int]:
        with torch.device("meta"):
            made = create_model(**model | changed, seed=None)
        return sum(each.numel() for each in made.parameters()), len(made.blocks)

    room = min((free_memory() - RANKS * BESIDE) / MEMORY, disk_usage(folder).free / DISK)
    (parameters, blocks), (least, _) = size(), size(depth=1)
    fit = 1 + int((room - least) * (blocks - 1) / (parameters - least))
    if fit >= blocks:
        return model, ""
    if fit < 1:
        sys.exit(f"error: not even a block of {model['name']} fits; free some memory and disk")
    return model | {"depth": fit}, f", {fit} of its {blocks} blocks"


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
