"""What the training loop adds to a step: our loop against a bare loop around DeepSpeed, the data being in memory.

Both train the same model with the same DeepSpeed configuration, optimizer and batches, each in a process of its own,
in turns; ours with everything on that is on by default: guard, watchdog, telemetry (a line every ten steps), schedule,
keyed dropout. Times are from batch to batch, of all steps but the first; saving and evaluating are left out.
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
    "ViT-Ti/16 at 224, batch 8": {"name": "vit_ti16", "image_size": 224, "batch": 8, "steps": 21},
    "a ViT of 0.06 M parameters at 16, batch 8": {
        "name": "vit_ti8", "image_size": 16, "batch": 8, "steps": 201, "embed_dim": 48, "depth": 2,
    },
}  # fmt: skip
QUICK = {"tiny": {**CASES["a ViT of 0.06 M parameters at 16, batch 8"], "steps": 11}}
ROUNDS, CLASSES = 5, 100


def main():
    args = arguments(__doc__)
    rows, ratios = [], {}
    for title, case in (QUICK if args.quick else CASES).items():
        times: dict[str, list[float]] = {"patchmill": [], "bare DeepSpeed": []}
        for _ in range(1 if args.quick else ROUNDS):
            for name, found in times.items():
                found.append(run(name, case))
        for name, found in times.items():
            rows.append(row(f"{name}, {title}", "ms a step", found))
        ours, bare = times.values()
        rows.append(row(f"the loop adds, {title}", "ms a step", [a - b for a, b in zip(ours, bare, strict=True)]))
        ratios[f"bare DeepSpeed, {title}"] = median(b / a for a, b in zip(ours, bare, strict=True))
    report("step_overhead", rows, ratios, args.json)


def run(name: str, case: dict) -> float:
    """Return the milliseconds of a step, in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, name, json.dumps(case)], stdout=subprocess.PIPE, text=True, check=True
    )
    return float(done.stdout.splitlines()[-1])


# ---- what runs in the processes


class Memory:
    """Batches that are there already, which notes when each is asked for; what our loop wants of a loader."""

    def __init__(self, case: dict):
        import numpy as np

        from shards.batch import Batch

        size, batch = case["image_size"], case["batch"]
        random = np.random.default_rng(0)
        self.images = random.integers(0, 256, (batch, size, size, 3), dtype=np.uint8)
        self.labels = random.integers(0, CLASSES, batch)
        self.times, self.samples, self._case, self._kind = [], 0, case, Batch

    def __iter__(self):
        import numpy as np

        batch = self._case["batch"]
        while True:
            self.times.append(time.perf_counter())
            self.samples += batch
            yield self._kind(self.images, self.labels, np.arange(self.samples - batch, self.samples))

    def milliseconds(self) -> float:
        """Return the median time from batch to batch."""
        return 1e3 * median(b - a for a, b in zip(self.times[1:], self.times[2:], strict=False))

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
    steps = f"{case['steps']} steps"
    return check(TrainSettings, {
        "duration": steps, "global_batch": case["batch"], "model": model,
        "data": {"train": "memory", "resolution": case["image_size"]}, "optim": {"clip": 1.0, "weight_decay": 0.1},
        "checkpoint": {"every": steps}, "evaluate": {"every": steps}, "engine": {"zero_stage": 1},
    }, "bench")  # fmt: skip


def patchmill(case: dict) -> float:
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
    return memory.milliseconds()


def bare(case: dict) -> float:
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
    for _, _ in zip(range(case["steps"]), memory, strict=False):
        engine.backward(F.cross_entropy(engine(images).float(), labels))
        engine.step()
    return memory.milliseconds()


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] in ("patchmill", "bare DeepSpeed"):
        chosen = patchmill if sys.argv[1] == "patchmill" else bare
        print(chosen(json.loads(sys.argv[2])))
    else:
        main()
