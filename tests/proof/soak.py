"""A long run, watched from outside: python tests/proof/soak.py [--minutes N] [--picture PATH] [--json].

Two ranks train a small ViT on small images with all that a long run has: average of the weights, held-out images,
asynchronous checkpoints that rotate, a tracker. Every few seconds memory, descriptors and threads are read, of each
rank and of the command that started them, and what lies on the disks. In the end the run is told to stop, and what grew
is told: the second sixth of the time against the last one, by the medians, for a save or an evaluation that is looked
at half-way has threads and files of its own; of steps the fastest tenth, which others' work on the cores changes least,
beside the median. Logs grow, by as much a step late as early. Exit code 1 if something did not hold.
"""

import argparse
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

import psutil

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.command import environment, losses  # noqa: E402
from tests.images import make_image_folder  # noqa: E402

GLOBAL_BATCH, SAVED, KEEP = 24, 500, 3  # images a step, steps, checkpoints
PLAN = f"""
name = "soak"

[[stage]]
name = "shards"
kind = "shards"
set = {{ source = "images", split = {{ val = 0.1 }}, shard_samples = 256, workers = 1 }}

[[stage]]
name = "train"
kind = "supervised"
ranks = 2
[stage.set]
duration = "100000000 steps"
global_batch = {GLOBAL_BATCH}
log_every = "100 steps"
checkpoint = {{ every = "{SAVED} steps", keep = {KEEP} }}
evaluate = {{ every = "1000 steps", ema = true }}
data = {{ train = "{{shards}}/train", val = "{{shards}}/val", resolution = 32, window_bytes = 1000000 }}
model = {{ name = "vit_ti8", embed_dim = 48, num_heads = 3, depth = 2 }}
optim = {{ name = "adamw", lr = 1e-4, clip = 1.0, ema = 0.999 }}
engine = {{ kind = "deepspeed", zero_stage = 2 }}
"""
IMAGES = 1500  # of each of three classes
EVERY = 5.0  # seconds between two looks
GROWTH = 10.0  # MB that the memory of all may grow by: an arena of the allocator
MORE = 1.05  # times as much that is written a step: compressed blocks end in one part or the next
FASTEST, MEDIAN = "time of a step, fastest tenth, ms", "the same, median, of all that others did on the cores too, ms"
SLOWER = 1.05  # times as long as before that a step may take, since others work on these cores


class Look(NamedTuple):
    """What is seen at one time, summed over the ranks and the command that started them.

    Attributes:
        minutes: Since the first look.
        steps: Done so far.
        memory: MB that belong to these processes alone (USS).
        descriptors: Open files.
        threads: Number of them.
        checkpoints: Folders of whole checkpoints.
        saved: Steps of the newest.
        disk: MB of them all.
        logs: MB of the stage's other files: metrics, ledger, tracker, what was said.
        temporary: Files of Patchmill's in the system's temporary folders.
    """

    minutes: float
    steps: int
    memory: float
    descriptors: int
    threads: int
    checkpoints: int
    saved: int
    disk: float
    logs: float
    temporary: int


class Finding(NamedTuple):
    """Of one quantity: what it was early, and late, and whether that is flat; None: it is not judged."""

    what: str
    early: float
    late: float
    flat: bool | None


def watched(command: psutil.Process) -> list[psutil.Process]:
    """Return a command and the ranks among what it started."""
    return [command, *(each for each in command.children(recursive=True) if "RANK" in each.environ())]


def look(began: float, processes: list[psutil.Process], stage: Path) -> Look:
    """Look at processes and at what their stage has on disk."""
    done = losses(stage)
    sizes = {path: path.stat().st_size / 1e6 for path in _files(stage)}
    logs = sum(size for path, size in sizes.items() if "checkpoints" not in path.parts)
    saved = [int(path.name.removeprefix("samples-")) for path in stage.glob("checkpoints/samples-*") if path.is_dir()]
    return Look(
        minutes=(time.monotonic() - began) / 60,
        steps=done[-1][0] // GLOBAL_BATCH if done else 0,
        memory=sum(process.memory_full_info().uss for process in processes) / 1e6,
        descriptors=sum(process.num_fds() for process in processes),
        threads=sum(process.num_threads() for process in processes),
        checkpoints=len(saved),
        saved=max(saved, default=0) // GLOBAL_BATCH,
        disk=sum(sizes.values()) - logs,
        logs=logs,
        temporary=sum(len(list(Path(folder).glob("*patchmill*"))) for folder in (tempfile.gettempdir(), "/dev/shm")),
    )


def _files(folder: Path) -> list[Path]:
    """Return the files below a folder that others write to meanwhile, less what goes as one looks."""
    return [path for path in folder.rglob("*") if path.is_file()]


def watch(folder: Path, minutes: float) -> tuple[list[Look], list[dict], int]:
    """Train for so many minutes; return what was seen, the metrics, and the exit code."""
    make_image_folder(folder / "images", IMAGES, side=40)
    (folder / "plan.toml").write_text(PLAN)
    stage = folder / "runs/soak/stages/train"
    with open(folder / "output", "w") as output:
        command = [sys.executable, "-m", "launch.cli", "run", "plan.toml"]
        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output, env=environment())
        try:
            _await_steps(process, stage, folder / "output")
            began, seen, processes = time.monotonic(), [], watched(psutil.Process(process.pid))
            while time.monotonic() - began < minutes * 60:
                if process.poll() is not None:
                    sys.exit(f"error: it ended by itself: {(folder / 'output').read_text()[-2000:]}")
                try:
                    seen.append(look(began, processes, stage))
                except FileNotFoundError:  # a checkpoint was rotated away as it was looked at
                    continue
                time.sleep(EVERY)
            process.send_signal(signal.SIGTERM)
            code = process.wait(120)
        finally:
            process.kill()
    metrics = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    return seen, metrics, code


def _await_steps(process: subprocess.Popen, stage: Path, output: Path) -> None:
    deadline = time.monotonic() + 300
    while not losses(stage):
        if process.poll() is not None or time.monotonic() > deadline:
            sys.exit(f"error: it did not begin: {output.read_text()[-2000:]}")
        time.sleep(0.5)


def judge(seen: list[Look], metrics: list[dict], code: int) -> list[Finding]:
    """Compare the second sixth of the time with the last."""
    sixth = len(seen) // 6
    early, late = seen[sixth : 2 * sixth], seen[-sixth:]
    found = []

    def both(what: str, of: str, room: float) -> None:
        before, after = (median(getattr(each, of) for each in part) for part in (early, late))
        found.append(Finding(what, before, after, after <= before + room))

    both("memory, MB", "memory", GROWTH)
    both("open files", "descriptors", 0)
    both("threads", "threads", 0)
    both("checkpoints on disk, MB", "disk", 0.5)
    both("temporary files", "temporary", 0)
    before, after = _written(early), _written(late)
    found.append(Finding("logs and ledger, kB written in 1,000 steps", before, after, after <= before * MORE))
    (before, middle), (after, later) = _step_ms(metrics, early), _step_ms(metrics, late)
    found.append(Finding(FASTEST, before, after, after <= before * SLOWER))
    found.append(Finding(MEDIAN, middle, later, None))
    written, kept = seen[-1].saved // SAVED, seen[-1].checkpoints
    rotates = KEEP <= kept <= KEEP + 1 < written and written >= seen[-1].steps // SAVED - 1
    found.append(Finding("checkpoints written, and kept", written, kept, rotates))
    found.append(Finding("exit code when it was told to stop", 75, code, code == 75))
    return found


def _written(part: list[Look]) -> float:
    """Return the kB that the stage's logs grew by in 1,000 steps."""
    steps = part[-1].steps - part[0].steps
    return (part[-1].logs - part[0].logs) * 1e6 / steps if steps else math.nan  # which is not flat


def _step_ms(metrics: list[dict], part: list[Look]) -> tuple[float, float]:
    """Return the milliseconds of the fastest steps and of the middle one, as the run itself logged their medians."""
    first, last = part[0].steps, part[-1].steps
    times = [line["step_ms_median"] for line in metrics if first < line.get("step", 0) <= last]
    if len(times) < 2:
        return math.nan, math.nan
    return quantiles(times, n=10, method="inclusive")[0], median(times)


def draw(seen: list[Look], path: Path) -> None:
    """Draw what was seen over time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = {
        "memory": "memory of ranks and command (MB)", "descriptors": "open files", "threads": "threads",
        "steps": "steps done", "checkpoints": "checkpoints on disk", "disk": "checkpoints on disk (MB)",
    }  # fmt: skip
    figure, axes = plt.subplots(2, 3, figsize=(12, 5), layout="constrained")
    for place, (name, title) in zip(axes.flat, shown.items(), strict=True):
        values = [getattr(each, name) for each in seen]
        place.plot([each.minutes for each in seen], values, color="#0b6e4f", lw=1)
        place.set_title(title, fontsize=9, loc="left")
        place.set_ylim(0, 1.15 * max(values))
        place.set_xlabel("minutes", fontsize=8)
        place.tick_params(labelsize=8)
    figure.savefig(path, dpi=110)


def main() -> int:
    """Watch one run."""
    parser = argparse.ArgumentParser(description=re.split(r"\n\n", __doc__)[0])
    parser.add_argument("--minutes", type=float, default=60, help="of training, 2 or more")
    parser.add_argument("--picture", type=Path, metavar="PATH", help="draw what was seen, as PNG")
    parser.add_argument("--json", action="store_true", help="the result as JSON")
    arguments = parser.parse_args()
    if arguments.minutes < 2:
        parser.error(f"--minutes {arguments.minutes:g}: with fewer than 2 there is nothing to compare")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    try:
        seen, metrics, code = watch(folder, arguments.minutes)
        found = judge(seen, metrics, code)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if arguments.picture:
        draw(seen, arguments.picture)
    if arguments.json:
        print(json.dumps({"findings": [each._asdict() for each in found], "seen": [each._asdict() for each in seen]}))
    else:
        print("| | early | late | |\n|---|---|---|---|")
        for each in found:
            told = {True: "flat", False: "NOT FLAT", None: ""}[each.flat]
            print(f"| {each.what} | {each.early:,.4g} | {each.late:,.4g} | {told} |")
        print(f"\n{seen[-1].steps:,} steps in {seen[-1].minutes:.0f} minutes, {len(seen)} looks")
    return 1 if any(each.flat is False for each in found) else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
