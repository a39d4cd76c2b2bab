"""Two ranks that are killed in the middle of a save, again and again, and go on; what they leave behind each time.

worker_killed.py FOLDER POINTS SEED   tells of each kill what it was, and what was wrong after it

One process imports everything and is forked for every start. A save is counted in calls of functions, C's among them,
of the threads that write: between any two of them a rank, or both, may end by SIGKILL.
"""

import contextlib
import importlib
import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import pipeline.engines.deepspeed  # noqa: F401 (once, for all starts)
from launch.local import free_port
from pipeline import checkpoint, distributed
from pipeline.checkpoint import BrokenCheckpointError, Checkpoint
from pipeline.config import TrainSettings
from pipeline.settings import check
from pipeline.train import train
from tests.command import losses

RANKS, EVERY, BATCH = 2, 2, 8  # ranks, steps from save to save, samples of a step
WRITERS = ("save", "flush")  # threads, as their names begin


def main(folder: str, points: str, seed: str) -> None:
    """Run undisturbed, then with kills, and compare."""
    root, draws, found = Path(folder), random.Random(int(seed)), []
    steps = EVERY * (2 * int(points) + 4)
    start(root, root / "undisturbed", steps, None)
    for name in json.loads((root / "modules.json").read_text()):  # that its ranks imported late, each for itself
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    calls = [json.loads((root / f"calls-{rank}.json").read_text()) for rank in range(RANKS)]
    run = root / "killed"
    while len(found) < int(points):
        victim, save = draws.choice(["rank 0", "rank 1", "all"]), draws.choice([1, 2])
        rank = 0 if victim == "all" else int(victim[-1])
        kill = {"victim": victim, "rank": rank, "save": save, "call": draws.randrange(calls[rank])}
        ended = start(root, run, steps, kill)
        assert ended[rank] == -signal.SIGKILL, f"{kill} came to nothing: {ended}"
        found.append(kill | {"wrong": wrong(root, run), "left": left(run), "at": whole_samples(run)})
    ended = start(root, run, steps, None)
    assert ended == [0] * RANKS, ended
    last = f"samples-{steps * BATCH:012d}"
    same = losses(run) == losses(root / "undisturbed") and whole_samples(run) == steps * BATCH
    print(
        json.dumps({"kills": found, "calls": calls, "same": same, "wrong": wrong(root, run, last), "left": left(run)})
    )


def start(root: Path, out: Path, steps: int, kill: dict | None) -> list[int]:
    """Fork the ranks of one start; return their exit codes, negative for signals."""
    port = str(free_port())
    ranks = []
    for rank in range(RANKS):
        if child := os.fork():
            ranks.append(child)
            continue
        try:
            os.environ |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }  # fmt: skip
            rank_main(root, out, steps, kill, rank)
            os._exit(0)
        except BaseException as error:  # noqa: BLE001 (this is a process of its own)
            print(f"rank {rank}: {error!r}", file=sys.stderr, flush=True)
            os._exit(3)
    codes: dict[int, int] = {}
    deadline = time.monotonic() + 100
    while len(codes) < RANKS:
        for rank, child in enumerate(ranks):
            if rank not in codes:
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    codes[rank] = os.waitstatus_to_exitcode(status)
        killed = -signal.SIGKILL in codes.values()
        if killed or time.monotonic() > deadline:
            time.sleep(0 if kill and kill["victim"] == "all" else 0.5)  # what the others do alone must do no harm
            for rank, child in enumerate(ranks):
                if rank not in codes:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                    codes[rank] = -signal.SIGALRM if not killed else -signal.SIGTERM
        time.sleep(0.005)
    return [codes[rank] for rank in range(RANKS)]


def rank_main(root: Path, out: Path, steps: int, kill: dict | None, rank: int) -> None:
    settings = {
        "duration": f"{steps} steps", "global_batch": BATCH, "log_every": "1 step",
        "data": {"train": str(root / "set"), "resolution": 16},
        "model": {"name": "vit_ti8", "embed_dim": 24, "num_heads": 3, "depth": 1}, "engine": {"zero_stage": 1},
        "checkpoint": {"every": f"{EVERY} steps", "keep": 999 if out.name == "undisturbed" else 2},
        "track": {"tensorboard": False},
    }  # fmt: skip
    count = Counter(kill if kill and kill["rank"] == rank else None, os.getppid())
    threading.setprofile(count)  # of threads that begin from here on
    out.mkdir(parents=True, exist_ok=True)
    distributed.start()
    train(check(TrainSettings, settings, "test"), out)
    (root / f"calls-{rank}.json").write_text(str(count.most))
    if rank == 0:
        (root / "modules.json").write_text(json.dumps(sorted(sys.modules)))


class Counter:
    """Counts calls since a save began, in the threads that write, and kills at one of them."""

    def __init__(self, kill: dict | None, parent: int):
        self.saves = self.calls = self.most = 0
        self._kill, self._parent = kill, parent

    def __call__(self, frame, event: str, argument) -> None:
        """Note a call, as ``sys.setprofile`` tells it."""
        if not threading.current_thread().name.startswith(WRITERS):
            sys.setprofile(None)  # of this thread
            return
        if event not in ("call", "c_call") or frame.f_globals["__name__"].startswith("json"):
            return  # of writing the index there are thousands, which do nothing to the disk
        if frame.f_code is checkpoint.save.__code__ and event == "call":
            self.saves, self.calls = self.saves + 1, 0
        self.calls += 1
        self.most = max(self.most, self.calls)
        if self._kill and (self.saves, self.calls) >= (self._kill["save"], self._kill["call"]):
            os.kill(os.getpid(), signal.SIGKILL)


def wrong(root: Path, run: Path, *names: str) -> list[str]:
    """Return what is wrong with the checkpoints of a killed run: each must be whole and as the undisturbed one's."""
    found = []
    for path in [run / "checkpoints" / name for name in names] or checkpoint.whole_checkpoints(run / "checkpoints"):
        try:
            Checkpoint(path).verify()
        except BrokenCheckpointError as error:
            found.append(str(error))
            continue
        other = root / "undisturbed" / "checkpoints" / path.name
        for file in path.glob("*.safetensors"):
            if file.read_bytes() != (other / file.name).read_bytes():
                found.append(f"{path.name}/{file.name} is not as it was undisturbed")
    return found


def left(run: Path) -> list[str]:
    """Return the names of what a killed save left."""
    return sorted(path.name for path in (run / "checkpoints").glob(".*"))


def whole_samples(run: Path) -> int:
    """Return where a run would go on."""
    return max(map(checkpoint.samples_of, checkpoint.whole_checkpoints(run / "checkpoints")), default=0)


if __name__ == "__main__":
    main(*sys.argv[1:])
