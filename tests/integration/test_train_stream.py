"""A training stage on tars that have no manifest: from standard input, and from commands on two ranks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command import LAUNCH, TINY, environment
from tests.images import build_image_set
from tests.shards.foreign import write_tar

CONFIG = (
    """
duration = "192 samples"
global_batch = 12
log_every = "1 step"
[data]
val = "set/val"
resolution = 16
augment = "light2"
[checkpoint]
every = "5 steps"
[evaluate]
every = "100 steps"
batch = 8
"""
    + TINY
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A set of 128 training images in 8 tars."""
    folder = tmp_path_factory.mktemp("stream")
    build_image_set(folder, per_class=40, split={"val": 0.2}, shard_samples=16)
    (folder / "run.toml").write_text(CONFIG)
    return folder


def train(folder: Path, out: str, *over: str, data: bytes = b"", ranks: int = 1) -> tuple[int, str]:
    alone = ["-m", "launch.cli"] if ranks == 1 else ["-c", LAUNCH, str(ranks), "logs"]
    done = subprocess.run(
        [sys.executable, *alone, "train", "run.toml", *over, "--out", out], input=data, capture_output=True,
        cwd=folder, timeout=180, env=environment(),
    )  # fmt: skip
    return done.returncode, done.stderr.decode()


def samples(folder: Path, out: str) -> list[int]:
    lines = [json.loads(line) for line in (folder / out / "metrics.jsonl").read_text().splitlines()]
    assert all(line["epoch"] is None for line in lines if "loss" in line)
    return [line["samples"] for line in lines if "loss" in line]


@pytest.mark.long
def test_standard_input_ends_is_saved_and_more_of_it_goes_on(folder):
    files = [
        (label, path)
        for label, name in enumerate(("blue", "green", "red"))
        for path in (folder / "images" / name).iterdir()
    ]
    members = []
    for number, (label, path) in enumerate(files):
        members += [(f"{number}{path.suffix}", path.read_bytes()), (f"{number}.cls", b"%d" % label)]
    data = write_tar(folder / "one.tar", members).read_bytes()
    seen = len(files) // 12 * 12
    code, stderr = train(folder, "stdin", "data.train='-'", data=data)
    assert code == 2, stderr
    assert f"error: - ended at {seen} of 192 samples, saved in stdin/checkpoints/samples-{seen:012d};" in stderr
    assert "warning: - has no manifest: a run on it cannot be resumed" in stderr
    assert samples(folder, "stdin") == list(range(12, seen + 1, 12))
    code, stderr = train(folder, "stdin", "data.train='-'", data=data)
    assert code == 0, stderr
    assert f"warning: - begins anew after {seen} samples: some come again" in stderr
    assert samples(folder, "stdin") == list(range(12, 193, 12))


@pytest.mark.long
def test_commands_on_two_ranks(folder):
    pipe = "data.train='pipe:cat set/train/shards/{000000..000003}.tar'"
    code, stderr = train(folder, "pipe", pipe, "data.allow_pipe=true", ranks=2)
    assert code == 0, stderr
    assert stderr.count("has no manifest") == 1
    assert samples(folder, "pipe") == list(range(12, 193, 12))
