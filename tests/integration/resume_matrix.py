"""Who goes on from whose checkpoint: python tests/integration/resume_matrix.py makes the table of docs/checkpoints.md.

Each number of ranks and each setup of the engine writes, and one process of Accelerate goes on; each goes on from what
three ranks of ZeRO 2 wrote; and 24 pairs are drawn at random. Four steps before, four after, of a global batch of 24.
"""

import json
import random
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from pipeline.checkpoint import Checkpoint  # noqa: E402
from pipeline.compare import compare  # noqa: E402
from shards.audit import audit  # noqa: E402
from tests.command import losses  # noqa: E402
from tests.images import build_image_set  # noqa: E402
from tests.integration.worker_resume import GLOBAL_BATCH, SETUPS  # noqa: E402
from tests.ranks import run_on_ranks  # noqa: E402

HALF, WHOLE = 4, 8  # steps
TOLERANCE = 1e-5  # of losses around 1.1, between any two shapes of a run, in float32
RANKS = (1, 2, 3, 4, 8)
PAGE = ROOT / "docs" / "checkpoints.md"
BEGIN, END = "<!-- resume matrix -->\n", "<!-- end of resume matrix -->\n"


class Shape(NamedTuple):
    """What wrote a checkpoint, or goes on from it."""

    setup: str
    ranks: int

    def folder(self) -> str:
        """Return a name of its own."""
        return f"{self.setup}-{self.ranks}".replace(" ", "").replace(",", "-")


REFERENCE, WRITER = Shape("Accelerate", 1), Shape("ZeRO 2", 3)
SHAPES = [Shape(setup, ranks) for setup in SETUPS for ranks in RANKS]


class Pair(NamedTuple):
    """One goes on from what the other wrote."""

    writer: Shape
    reader: Shape

    def folder(self) -> str:
        """Return a name of its own."""
        return f"{self.writer.folder()}-to-{self.reader.folder()}"


def all_pairs() -> list[Pair]:
    """Return the pairs of the whole matrix."""
    pairs = [Pair(shape, REFERENCE) for shape in SHAPES] + [Pair(WRITER, shape) for shape in SHAPES]
    return list(dict.fromkeys(pairs + mixed_pairs()))


def mixed_pairs() -> list[Pair]:
    """Return 24 pairs of which neither is the reference or the one writer."""
    others = [shape for shape in SHAPES if shape not in (REFERENCE, WRITER)]
    draws = random.Random(0)
    pairs: list[Pair] = []
    while len(pairs) < 24:
        pair = Pair(*draws.sample(others, 2))
        if pair not in pairs and pair.writer.ranks != pair.reader.ranks:
            pairs.append(pair)
    return pairs


def run(folder: Path, pairs: Iterable[Pair], timeout: float = 300) -> dict[Pair, float]:
    """Write and go on as all pairs say; return of each how far its losses are from those of an undisturbed run.

    Raises:
        AssertionError: After loading, a value of weights, moments or average is not, to the bit, what was written; or
            other samples were trained on than in an undisturbed run.
    """
    build_image_set(folder, per_class=20, shard_samples=7)
    pairs = list(pairs)
    writers = dict.fromkeys(pair.writer for pair in pairs)
    jobs = {shape: [_job(folder / shape.folder(), None, shape.setup, HALF)] for shape in writers}
    _work(folder, jobs, timeout)
    undisturbed = folder / "undisturbed"
    jobs = {REFERENCE: [_job(undisturbed, None, REFERENCE.setup, WHOLE)]}
    for pair in pairs:
        job = _job(folder / pair.folder(), folder / pair.writer.folder(), pair.reader.setup, WHOLE)
        jobs.setdefault(pair.reader, []).append(job)
    _work(folder, jobs, timeout)
    expected = losses(undisturbed)
    assert [samples for samples, _ in expected] == [GLOBAL_BATCH * step for step in range(1, WHOLE + 1)]
    return {pair: _far(folder, pair, expected) for pair in pairs}


def _far(folder: Path, pair: Pair, expected: list[tuple[int, float]]) -> float:
    """Return the largest difference of a loss, having checked that what was loaded is what was written."""
    out = folder / pair.folder()
    written = Checkpoint(folder / pair.writer.folder() / "checkpoints" / f"samples-{HALF * GLOBAL_BATCH:012d}")
    rows = compare(written, Checkpoint(out / "loaded" / f"samples-{0:012d}"))
    kinds = {row["kind"] for row in rows}
    assert kinds == {"weight", "exp_avg", "exp_avg_sq", "ema", "step"}, (pair, kinds)
    assert [row for row in rows if not row["same"]] == [], pair
    found = losses(out)
    assert [samples for samples, _ in found] == [samples for samples, _ in expected], pair
    assert audit(out).counts == {}, pair  # of what the order says, each sample was trained on as often as it says
    return max(abs(loss - other) for (_, loss), (_, other) in zip(found, expected, strict=True))


def _job(out: Path, source: Path | None, setup: str, steps: int) -> dict:
    return {"out": str(out), "source": source and str(source), "setup": setup, "steps": steps}


def _work(folder: Path, jobs: dict[Shape, list[dict]], timeout: float) -> None:
    worker = Path(__file__).with_name("worker_resume.py")
    for ranks in RANKS:
        here = [job for shape, each in jobs.items() if shape.ranks == ranks for job in each]
        if here:
            run_on_ranks(worker, ranks, folder / "set", json.dumps(here), timeout=timeout + 20 * len(here))
            print(f"{len(here)} on {ranks} ranks", file=sys.stderr, flush=True)


def table(found: dict[Pair, float]) -> str:
    """Return the tables of the docs page: the largest difference of a loss."""
    lines = ["| | " + " | ".join(f"{ranks} rank{'s' * (ranks > 1)}" for ranks in RANKS) + " |"]
    lines.append("|---|" + "---|" * len(RANKS))
    for setup in SETUPS:
        cells = []
        for ranks in RANKS:
            shape = Shape(setup, ranks)
            cells.append(f"{found[Pair(shape, REFERENCE)]:.0e} / {found[Pair(WRITER, shape)]:.0e}")
        lines.append(f"| {setup} | " + " | ".join(cells) + " |")
    lines += ["", "| written by | goes on with | |", "|---|---|---|"]
    for pair in mixed_pairs():
        writer, reader = (f"{shape.setup}, {shape.ranks}" for shape in pair)
        lines.append(f"| {writer} | {reader} | {found[pair]:.0e} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the whole matrix, and write its tables into the docs page."""
    with tempfile.TemporaryDirectory() as folder:
        found = run(Path(folder), all_pairs())
    worst = max(found, key=found.get)
    print(f"{len(found)} pairs; largest difference {found[worst]:.1e}, of {worst}")
    if found[worst] > TOLERANCE:
        sys.exit(f"error: that is more than {TOLERANCE}")
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + table(found) + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
