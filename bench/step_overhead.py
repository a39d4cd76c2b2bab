"""What the training loop adds to a step: our loop against a bare loop around DeepSpeed, the data being in memory.

Both train the same model with the same DeepSpeed configuration, optimizer and batches, each in a process of its own;
ours with everything on that is on by default: guard, watchdog, telemetry (a line every ten steps), schedule, keyed
dropout. They take ten steps in turns, so that what else the machine does slows down both alike; saving and evaluating
are left out.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from common import arguments, report, row

CASES = {
    "ViT-Ti/16 at 224, batch 8": {"name": "vit_ti16", "image_size": 224, "batch": 8, "rounds": 16},
    "a ViT of 0.06 M parameters at 16, batch 8": {
        "name": "vit_ti8", "image_size": 16, "batch": 8, "rounds": 40, "embed_dim": 48, "depth": 2,
    },
}  # fmt: skip
QUICK = {"tiny": {**CASES["a ViT of 0.06 M parameters at 16, batch 8"], "rounds": 2}}
TOLD = "a step took"
TURN, CLASSES = 10, 100  # steps of a turn: as many as are between two lines of the log


def main():
    args = arguments(__doc__)
    rows, ratios = [], {}
    for title, case in (QUICK if args.quick else CASES).items():
        ours, bare = turns(case)
        rows.append(row(f"patchmill, {title}", "ms a step", ours))
        rows.append(row(f"bare DeepSpeed, {title}", "ms a step", bare))
        rows.append(row(f"the loop adds, {title}", "ms a step", [a - b for a, b in zip(ours, bare, strict=True)]))
        ratios[f"bare DeepSpeed, {title}"] = median(b / a for a, b in zip(ours, bare, strict=True))
    report("step_overhead", rows, ratios, args.json)


def turns(case: dict) -> list[list[float]]:
    """Return the milliseconds of a step of our loop, and of the bare one, in each turn but the first."""
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, name, json.dumps(case)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for name in ("patchmill", "bare DeepSpeed")
    ]

    def turn(process: subprocess.Popen) -> float:
        process.stdin.write("go\n")
        process.stdin.flush()
        for line in process.stdout:
            if line.startswith(TOLD):  # DeepSpeed prints there, too
                return float(line.removeprefix(TOLD))
        sys.exit(f"a process ended with {process.wait()}")

    try:
        found: dict[subprocess.Popen, list[float]] = {process: [] for process in processes}
        for number in range(case["rounds"] + 1):  # whoever goes first is some per cent slower: the order changes
            for process in processes if number % 2 else processes[::-1]:
                found[process].append(turn(process))
    finally:
        for process in processes:
            process.kill()
    return [found[process][1:] for process in processes]


# ---- what runs in the processes


class Memory:
    """Batches that are there already, given out in turns; what our loop wants of a loader.

    A turn begins with a line of stdin, and ends with one of stdout: the milliseconds of a step.
    """

    def __init__(self, case: dict):
        import numpy as np

        from shards.batch import Batch

        size, batch = case["image_size"], case["batch"]
        random = np.random.default_rng(0)
        self.images = random.integers(0, 256, (batch, size, size, 3), dtype=np.uint8)
        self.labels = random.integers(0, CLASSES, batch)
        self.samples, self._case, self._kind = 0, case, Batch

    def __iter__(self):
        import numpy as np

        batch = self._case["batch"]
        while True:
            sys.stdin.readline()
            began = time.perf_counter()
            for _ in range(TURN):
                self.samples += batch
                yield self._kind(self.images, self.labels, np.arange(self.samples - batch, self.samples))
            print(TOLD, 1e3 * (time.perf_counter() - began) / TURN, flush=True)

    def counts(self):
        """Return nothing counted."""
        from shards.meter import Counts

        return Counts()

    def state_dict(self):
        """Return where it stands, for a start."""
        return {"samples": 0}

    def awaited(self):
        """Return what it waits for: never anything."""
        return []


def settings_of(case: dict):
    """Return the settings of both."""
    from pipeline.config import TrainSettings
    from pipeline.settings import check

    model = {key: value for key, value in case.items() if key in ("name", "embed_dim", "depth")}
    steps = f"{TURN * (case['rounds'] + 2)} steps"  # more than there are turns for
    return check(TrainSettings, {
        "duration": steps, "global_batch": case["batch"], "model": model,
        "data": {"train": "memory", "resolution": case["image_size"]}, "optim": {"clip": 1.0, "weight_decay": 0.1},
        "checkpoint": {"every": steps}, "evaluate": {"every": steps}, "engine": {"zero_stage": 1},
    }, "bench")  # fmt: skip


def patchmill(case: dict) -> None:
    """Run our loop."""
    from pipeline import distributed, train
    from pipeline.data import TrainingData
    from pipeline.schedule import Schedule

    settings, memory = settings_of(case), Memory(case)
    schedule = Schedule.of(settings, None, settings.global_batch)
    classes = [str(number) for number in range(CLASSES)]
    train.open_data = lambda *_: TrainingData(memory, classes, None, None, schedule, None)
    with tempfile.TemporaryDirectory() as folder, distributed.together():
        train.train(settings, Path(folder))


def bare(case: dict) -> None:
    """Run the least loop."""
    import deepspeed
    import torch.nn.functional as F  # noqa: N812

    from pipeline import distributed
    from pipeline.engines.configuration import deepspeed_config
    from pipeline.models import create_model
    from pipeline.optim import create_optimizer, parameter_groups, set_rate

    settings, memory = settings_of(case), Memory(case)
    distributed.start()
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    model = create_model(**settings.model.overrides(), name=case["name"], image_size=case["image_size"],
                         num_classes=CLASSES).to(distributed.device())  # fmt: skip
    sizes = [parameter.numel() for parameter in model.parameters()]
    optimizer = create_optimizer(parameter_groups(model.named_parameters(), settings.optim), settings.optim)
    set_rate(optimizer, 1e-3)
    config = deepspeed_config(settings, 1, sizes, torch.cuda.is_available())
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    images = torch.from_numpy(memory.images).to(engine.device).permute(0, 3, 1, 2).float().div(127.5).sub(1)
    labels = torch.from_numpy(memory.labels).to(engine.device)
    for _ in memory:
        engine.backward(F.cross_entropy(engine(images).float(), labels))
        engine.step()


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] in ("patchmill", "bare DeepSpeed"):
        chosen = patchmill if sys.argv[1] == "patchmill" else bare
        chosen(json.loads(sys.argv[2]))
    else:
        main()
