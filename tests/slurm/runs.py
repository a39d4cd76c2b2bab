"""Plans on a cluster: tiny ones written; submitted, disturbed, awaited."""

import json
import re
import tomllib
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.command import losses, patchmill
from tests.images import make_image_folder
from tests.slurm.cluster import Cluster, wait_for

SHARDS = """
name = "tiny"

[[stage]]
name = "shards"
kind = "shards"
set = { source = "images", split = { val = 0.25 }, shard_samples = 16, workers = 1 }
"""
TRAIN = """
[[stage]]
name = "train"
kind = "supervised"
ranks = 2
[stage.set]
duration = "700 steps"
global_batch = 12
log_every = "10 steps"
checkpoint = { every = "50 steps" }
data = { train = "{shards}/train", resolution = 16 }
model = { name = "vit_ti8", embed_dim = 24, num_heads = 3, depth = 2 }
engine = { kind = "deepspeed", zero_stage = 1, precision = "float32" }
"""


def write_plan(folder: Path, *parts: str) -> Path:
    """Write a plan and its images."""
    make_image_folder(folder / "images", per_class=8)
    (folder / "plan.toml").write_text("".join(parts))
    return folder / "plan.toml"


class Submitted:
    """A plan that was submitted.

    Args:
        cluster: Where.
        plan: Its file.
        profile: Text of the cluster's profile.
        folder: To submit it from; None: the plan's.
    """

    def __init__(self, cluster: Cluster, plan: Path, profile: str = "ranks_per_node = 1", folder: Path | None = None):
        self.cluster, self.plan, self._folder = cluster, plan, folder or plan.parent
        self.run = self._folder / "runs" / tomllib.loads(plan.read_text())["name"]
        (self._folder / "cluster.toml").write_text(profile)
        self.jobs: dict[str, str] = {}
        self.submit()

    def submit(self) -> None:
        """Submit what is left of it."""
        done = patchmill("submit", self.plan, "--cluster", "cluster.toml", "--json", cwd=self._folder)
        assert done.returncode == 0, done.stderr
        self.jobs |= json.loads(done.stdout)

    def cancel(self) -> None:
        """End all its jobs."""
        done = patchmill("cancel", self.run, cwd=self._folder)
        assert done.returncode == 0, done.stderr

    def stage(self, name: str) -> Path:
        """Return a stage's folder."""
        return self.run / "stages" / name

    def record(self, name: str) -> dict:
        """Return what a job noted of itself."""
        return json.loads((self.run / "slurm" / f"{name}.json").read_text())

    def log(self, name: str) -> str:
        """Return what a job said."""
        return (self.run / "slurm" / f"{name}.log").read_text()

    def shown(self, name: str) -> dict[str, str]:
        """Return what ``scontrol show job`` says of a job."""
        told = self.cluster.run("scontrol", "show", "job", "--oneliner", self.jobs[name])
        return dict(re.findall(r"(\w+)=(\S*)", told))

    def wait_for_steps(self, name: str, steps: int) -> None:
        """Wait until a stage of a tiny plan has logged so many steps."""
        self.wait_for_samples(name, 12 * steps, 240)

    def wait_for_samples(self, name: str, samples: int, seconds: float) -> None:
        """Wait until a stage has logged so many samples."""
        wait_for(lambda: [1 for at, _ in losses(self.stage(name)) if at >= samples], seconds, f"{samples} samples")

    def wait_for_end(self, seconds: float = 400) -> None:
        """Wait until no job of it is in the queue."""
        numbers = {number.partition("_")[0] for number in self.jobs.values()}
        wait_for(lambda: not numbers & set(self.cluster.run("squeue", "-h", "-o", "%F").split()), seconds, "the end")

    def result(self, name: str) -> dict:
        """Return what a stage came to."""
        path = self.stage(name) / "result.json"
        assert path.exists(), self.log(name)
        return json.loads(path.read_text())["result"]

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        """Return the pieces of a training stage's last checkpoint."""
        return weights_of(Path(self.result(name)["checkpoint"]))


def ranks_on(cluster: Cluster, node: str) -> list[int]:
    """Return the ranks on a node; the srun that starts them has the same words, and is none."""
    found = []
    for pid in cluster.tasks(node):
        with suppress(OSError):  # it ended
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
            found += [pid] if b"launch.rank" in words and not words.startswith(b"srun") else []
    return found


def weights_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return all pieces of a checkpoint."""
    return {key: value for file in sorted(checkpoint.glob("*.safetensors")) for key, value in load_file(file).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Tell whether two checkpoints, with something in them, are the same to the bit."""
    return bool(one) and one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
