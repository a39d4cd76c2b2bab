"""A training stage that does not train, for tests of ledger and audit: starts, checkpoints and kills."""

import json
import shutil
from pathlib import Path

from shards import ledger
from shards.augment import Resize
from shards.dataset import Dataset
from shards.droplist import write_exclude
from shards.ledger import Frame, RankFile, new_segment, read_frame
from shards.loader import Loader
from shards.mixture import Mixture
from tests.shards.datasets import Made, plain, write_dataset

SHARDS, A_SHARD, DROPPED = 6, 9, [(0, 2), (3, 0), (3, 1), (5, 8)]
SAMPLES = SHARDS * A_SHARD - len(DROPPED)
BATCH = 6


def write_numbered(folder: Path) -> Path:
    """Write a data set whose labels are the numbers of its samples, over all shards."""
    number = [[shard * A_SHARD + i for i in range(A_SHARD)] for shard in range(SHARDS)]
    made = [[Made(f"image{n:03d}", plain((n, 2 * n, 99)), (n,)) for n in shard] for shard in number]
    write_dataset(folder, [f"class{n}" for n in range(SHARDS * A_SHARD)], made)
    write_exclude(folder, "v1", [(*place, "test") for place in DROPPED])
    return folder


class Stage:
    """Starts, checkpoints and kills as the training loop has them."""

    def __init__(self, folder: Path, *data: Path, subset: int | None = None):
        self.folder, self.data, self.subset = folder, data, subset
        self.came: dict[int, int] = {}  # the sample of each position in the lineage, by its label

    def open(self) -> Dataset | Mixture:
        """Open the data set; of several, the first is drawn twice as often as each other."""
        opened = [Dataset.open(each, "v1", subset=self.subset) for each in self.data]
        return Mixture([(each, 2 - (i > 0)) for i, each in enumerate(opened)]) if len(opened) > 1 else opened[0]

    def start(self, ranks: int, steps: int, saves: set[int] = frozenset(), back: int = 0, batch: int = BATCH):
        """Run some steps from the newest checkpoint or one ``back`` before; save after those in ``saves``."""
        segment = new_segment(self.folder / "ledger")
        self.loaders = [
            Loader(
                self.open(), global_batch=batch, transform=Resize(4), seed=3, rank=rank,
                world_size=ranks, threads=1, ledger=segment, quarantine=self.folder / "quarantine.jsonl",
            )
            for rank in range(ranks)
        ]  # fmt: skip
        whole = sorted(self.folder.glob("checkpoints/samples-*"))
        if whole:
            taken = whole[max(0, len(whole) - 1 - back)]
            state = json.loads((taken / "checkpoint.json").read_text())["state"]["loader"]
            for loader in self.loaders:
                loader.load_state_dict(state)
        batches = [iter(loader) for loader in self.loaders]
        for step in range(steps):
            for each in batches:
                got = next(each)
                self.came |= dict(zip(got.positions.tolist(), got.labels.tolist(), strict=True))
            if step in saves:
                self.save()
        self.batches = batches

    def save(self) -> None:
        state, *_ = [loader.state_dict() for loader in self.loaders]  # all of them: each makes its file durable
        name = f"samples-{state['samples']:012d}"
        folder = self.folder / "checkpoints" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "checkpoint.json").write_text(json.dumps({"state": {"loader": state}}))
        (folder.parent / "latest").write_text(name + "\n")

    def kill(self, torn: int = 0) -> None:
        """End as a kill does: what was not handed to the system is lost, and of what was not made durable, a part."""
        kept = self.folder / "kept"
        shutil.copytree(self.folder / "ledger", kept)
        for each in self.batches:
            each.close()
        for path in kept.rglob("*.ledger"):
            size = (self.folder / "ledger" / path.relative_to(kept)).stat().st_size
            if size > path.stat().st_size:  # what was written on after the kill is a part of a frame
                data = (self.folder / "ledger" / path.relative_to(kept)).read_bytes()
                path.write_bytes(data[: min(path.stat().st_size + torn, size - 1)])
        shutil.rmtree(self.folder / "ledger")
        kept.rename(self.folder / "ledger")

    def end(self) -> None:
        self.save()
        self.came = {position: label for position, label in self.came.items() if position < self.loaders[0].samples}
        for each in self.batches:
            each.close()


def frames(path: Path) -> list[Frame]:
    return [read_frame(path, offset) for offset in RankFile(path).offset.tolist()]


def rewrite(path: Path, change) -> None:
    """Write a file of a ledger anew, with other frames instead of its single one."""
    head = path.read_bytes()[: RankFile(path).offset[0]]
    (frame,) = frames(path)
    writable = frame._replace(shard=frame.shard.copy(), index=frame.index.copy())
    path.write_bytes(head + b"".join(map(ledger._pack, change(writable))))
