"""Which faults, when: drawn from a seed alone."""

import random
from dataclasses import dataclass

KILLS = ("rank killed", "node killed", "job requeued", "job pre-empted", "job cancelled and submitted again")
STORAGE = ("error", "reset", "cut", "stall", "flip", "server killed")
RANKS = "ranks changed"
DISK = "disk full"
STAGES = ("supervised", "masked", "finetune")  # that train, in the plan's order
STEADY, CHANGING = "supervised", "masked"  # of these: whose disk is full once, and whose ranks change
CYCLE = (1, 4, 2)  # ranks of the changing stage, one change after the other; it begins with 2


@dataclass
class Fault:
    """One fault, and what became of it.

    Attributes:
        stage: That it hits.
        samples: That the stage has behind it when it is hit, at least.
        kind: Of the above.
        detail: What it was, more exactly.
        outcome: In words; empty: not done yet.
        seconds: Until the stage was further than before the fault.
    """

    stage: str
    samples: int
    kind: str
    detail: str = ""
    outcome: str = ""
    seconds: float = 0.0


def schedule(seed: int, faults: int, lengths: dict[str, int]) -> list[Fault]:
    """Return faults in the order in which they come.

    Three of eight are kills, of each kind about as many; of 16 faults one is a change of ranks; one is a full disk; the
    rest is storage. Each stage gets about as many: it trains on while one is done, and so many may outlast it.

    Args:
        seed: Of all that is drawn.
        faults: How many, 8 or more.
        lengths: Samples of each stage that may be hit, in the plan's order.
    """
    draw = random.Random(seed)
    kills, changes = max(3, round(faults * 0.38)), max(1, faults // 16)
    kinds = _each(draw, KILLS, kills) + _each(draw, STORAGE, faults - kills - changes - 1)
    pairs = [(CHANGING, RANKS)] * changes + [(STEADY, DISK)]
    where = _each(draw, tuple(lengths), faults)
    for stage, _ in pairs:
        where.remove(stage)
    pairs += zip(where, kinds, strict=True)
    found = [Fault(stage, _moment(draw, lengths[stage]), kind) for stage, kind in pairs]
    return sorted(found, key=lambda fault: (list(lengths).index(fault.stage), fault.samples))


def _moment(draw: random.Random, length: int) -> int:
    return round(draw.uniform(0.05, 0.5) * length)  # later, and the stage may have ended when it comes


def _each(draw: random.Random, some: tuple[str, ...], count: int) -> list[str]:
    """Return so many of some, each about as often; which come once more is drawn, and so is the order."""
    found = [*some * (count // len(some)), *draw.sample(some, count % len(some))]
    draw.shuffle(found)
    return found
