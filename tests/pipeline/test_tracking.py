"""Weights & Biases for real, in its offline mode: one run however often it starts, and our numbers in its file.

And what is told where TensorBoard is not installed.
"""

import json
import subprocess
import sys

import pytest

from tests.command import environment

SETTINGS = {
    "duration": "10 steps", "global_batch": 8, "data": {"train": "x"}, "model": {"name": "vit_b16"},
    "track": {"tensorboard": False, "wandb": "patchmill-test"},
}  # fmt: skip
START = """
import json, sys
from pathlib import Path
from pipeline.config import TrainSettings
from pipeline.tracking import mirrors
mirror, = mirrors(TrainSettings(**json.loads(sys.argv[1])), Path(sys.argv[2]), int(sys.argv[3]))
mirror.log(int(sys.argv[3]) + 8, {"loss": float(sys.argv[4])})
mirror.close()
"""
REFUSED = """
import json, sys
from pathlib import Path
from pipeline.config import TrainSettings
from pipeline.tracking import mirrors
from shards.errors import UserError
try:
    mirrors(TrainSettings(**json.loads(sys.argv[1])), Path(sys.argv[2]), 0)
except UserError as error:
    print(error)
"""
BARE = """
import json, sys
sys.modules["tensorboard"] = None  # as after a bare pip install
from pathlib import Path
from pipeline.config import TrainSettings
from pipeline.tracking import mirrors
print(len(mirrors(TrainSettings(**json.loads(sys.argv[1])), Path(sys.argv[2]), 0)))
"""


def records(path):
    """Yield what a run's file holds: 7 bytes of header, then blocks of 32 KiB, as LevelDB writes its log."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, record = path.read_bytes(), 7, b""
    while at < len(data):
        if (left := 2**15 - at % 2**15) < 7:
            at += left  # too little for another piece's head
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            yield Record.FromString(record)
            record = b""


def start(out, samples, loss):
    """Start a run there, as a process of its own, log a loss, and end it."""
    command = [sys.executable, "-c", START, json.dumps(SETTINGS), str(out), str(samples), str(loss)]
    ran = subprocess.run(
        command, env=environment(WANDB_MODE="offline"), capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == ""  # of results alone


@pytest.mark.long
@pytest.mark.timeout(300)
def test_the_same_run_after_a_restart(tmp_path):
    pytest.importorskip("wandb")
    out = tmp_path / "pretrain"
    out.mkdir()
    start(out, 0, 2.5)
    start(out, 8, 1.25)
    files = sorted(out.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    runs, logged = [], []
    for path in files:
        for record in records(path):
            if record.HasField("run"):
                runs.append((record.run.run_id, record.run.project, record.run.display_name))
            if record.HasField("history"):
                items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                logged.append((items["samples"], items["loss"]))
    assert set(runs) == {((out / "wandb_id").read_text(), "patchmill-test", "pretrain")}
    assert logged == [(8, 2.5), (16, 1.25)]


@pytest.mark.parametrize(("key", "reason"), [("", "No API key configured"), ("short", "WANDB_API_KEY invalid")])
def test_without_a_key_it_is_told_what_to_do(tmp_path, key, reason):
    pytest.importorskip("wandb")
    (tmp_path / "home").mkdir()
    own = environment(HOME=str(tmp_path / "home"), WANDB_API_KEY=key, WANDB_BASE_URL="http://127.0.0.1:1")
    for name in ("WANDB_MODE", "NETRC"):
        own.pop(name, None)
    command = [sys.executable, "-c", REFUSED, json.dumps(SETTINGS), str(tmp_path)]
    ran = subprocess.run(
        command, cwd=tmp_path, env=own, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=True
    )
    refused = ran.stdout.removesuffix("\n")
    assert refused.startswith(f"track.wandb = 'patchmill-test' cannot be opened: {reason}")
    assert "run `wandb login`, set WANDB_API_KEY, set WANDB_MODE=offline" in refused
    assert "\n" not in refused


@pytest.mark.parametrize("on", [True, False])
def test_where_tensorboard_is_on_and_not_installed_a_line_says_so(tmp_path, on):
    settings = SETTINGS | {"track": {"tensorboard": on}}
    command = [sys.executable, "-c", BARE, json.dumps(settings), str(tmp_path)]
    ran = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout == "0\n"
    told = [line for line in ran.stderr.splitlines() if line.startswith("warning: track.tensorboard is on, and tenso")]
    assert len(told) == on
    assert not list(tmp_path.iterdir())
