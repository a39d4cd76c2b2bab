"""Images a second of a training step (forward, backward, AdamW) of our model, of timm's and of transformers'.

Each is in a process of its own, and they take their steps in turns. See step.py for what each of them does. Beside the
speed: utilisation, which is the arithmetic of the model (three times the forward pass's) a second over that of the
product of two square matrices of the same precision, in turns with them; and the peak of memory, on the CPU above what
the imports hold. On a machine with a GPU the rows are B/16, L/16 and H/14 in bfloat16, with and without torch.compile;
on another S/16 and B/16, batches of 8 and 16, float32 and bfloat16 (autocast).
"""

import argparse
import json
import subprocess
import sys
from itertools import product
from math import inf
from pathlib import Path
from random import Random
from statistics import median
from time import monotonic
from typing import NamedTuple

import torch
from common import parser, report, row
from peers import PYTHON, is_installed
from step import CLASSES, CONTESTANTS, SIDES

from pipeline.flops import cost_of
from pipeline.models import MODELS

SHAPE = ("patch_size", "embed_dim", "depth", "num_heads")


class Limits(NamedTuple):
    """How long is measured: ``least`` to ``most`` rounds of a case, no more than least after ``enough`` seconds.

    Once the whole command has taken ``all`` seconds, a case gets a single round, and the table says so.
    """

    least: int
    most: int
    enough: float
    all: float

    def want_more(self, done: int, spent: float, late: bool) -> bool:
        """Tell whether another round is to follow so many, which took so many seconds."""
        return done < 1 or (not late and (done < self.least or (spent < self.enough and done < self.most)))


LIMITS = {"cpu": Limits(7, 20, 90, inf), "cuda": Limits(3, 6, 20, 360)}  # of the GPU all rows are to come in 8 minutes


class Case(NamedTuple):
    """One row of the comparison: what all contestants do."""

    model: str
    batch: int
    precision: str
    compiled: bool
    numbers: dict

    def __str__(self) -> str:
        return f"{self.model}, batch {self.batch}, {self.precision}{', compiled' if self.compiled else ''}"


class Contestant:
    """A process that takes steps when told to."""

    def __init__(self, name: str, case: Case):
        python = PYTHON if name == "timm" else sys.executable
        self.name = name
        self.process = subprocess.Popen(
            [
                python, Path(__file__).with_name("step.py"), name, "--numbers", json.dumps(case.numbers),
                "--batch", str(case.batch), "--precision", case.precision, *(["--compile"] if case.compiled else []),
            ],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def ask(self, steps: int) -> None:
        """Let it take so many steps."""
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()

    def answer(self) -> dict:
        """Return what it found, once it has taken them."""
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.name} ended with {self.process.wait()}")
        return json.loads(line)

    def take(self, steps: int) -> dict:
        """Do both."""
        self.ask(steps)
        return self.answer()


def main():
    args = arguments()
    cuda = torch.cuda.is_available()
    present = [name for name in CONTESTANTS if name != "timm" or is_installed("timm", "torchvision")]
    limits = Limits(1, 1, 0, inf) if args.quick else LIMITS["cuda" if cuda else "cpu"]
    rows, ratios, began = [], {}, monotonic()
    for case in cases(args, cuda):
        print(case, file=sys.stderr)
        found = measure(case, present, cuda, limits, began + limits.all)
        short = ", one round: out of time" if len(found["matmul"]) < limits.least else ""
        flops = cost_of("vit_b16", **case.numbers, num_classes=CLASSES).training_flops(1)
        ceiling = found.pop("matmul")
        for name, rounds in found.items():
            speeds = [case.batch / each["seconds"] for each in rounds]
            most = [2 * SIDES["cuda" if cuda else "cpu"] ** 3 / each["seconds"] for each in ceiling]
            shares = [100 * speed * flops / each for speed, each in zip(speeds, most, strict=True)]
            rows.append(row(f"{name}, {case}{short}", "images/s", speeds))
            rows.append(row(f"{name}, {case}: utilisation", "%", shares))
            rows.append(row(f"{name}, {case}: peak of memory", "MB", [rounds[-1]["peak MB"]]))
        for peer in ("timm", "transformers"):  # by rounds: the machine is others' too
            pairs = zip(found[peer], found["patchmill"], strict=True) if peer in found else ()
            of_rounds = [theirs["seconds"] / ours["seconds"] for theirs, ours in pairs]
            ratios[f"{peer}, {case}"] = median(of_rounds) if of_rounds else None
    report("train_step", rows, ratios, args.json)


def arguments() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--model", action="append", metavar="NAME", help="this one alone; may be given several times")
    options.add_argument("--precision", choices=("float32", "bfloat16"), help="this one alone")
    args = options.parse_args()
    if args.precision == "float32" and torch.cuda.is_available():
        options.error("--precision float32 is measured on CPUs alone; leave it out")
    return args


def cases(args: argparse.Namespace, cuda: bool) -> list[Case]:
    """Return what is to be measured on this machine."""
    if args.quick:
        numbers = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "image_size": 16}
        return [Case("noise", 2, "bfloat16", False, numbers)]
    if cuda:
        batches = {"vit_b16": [256], "vit_l16": [128], "vit_h14": [64]}
        kinds = [("bfloat16", False), ("bfloat16", True)]
    else:
        batches = {"vit_s16": [8, 16], "vit_b16": [8, 16]}
        kinds = [("float32", False), ("bfloat16", False)]
    default = [64] if cuda else [8]
    return [
        Case(model, batch, *kind, {**{key: MODELS[model][1][key] for key in SHAPE}, "image_size": 224})
        for model in args.model or batches
        for batch, kind in product(batches.get(model, default), kinds)
        if args.precision in (None, kind[0])
    ]


def measure(case: Case, present: list[str], cuda: bool, limits: Limits, end: float) -> dict[str, list[dict]]:
    """Return the rounds of each contestant and of the matrix product, with the seconds of one step of each.

    After the moment ``end`` of the clock there is one round only.
    """
    contestants = [Contestant(name, case) for name in (*present, "matmul")]  # all at once: imports take time
    if cuda and case.compiled:  # and compiling does; what is compiled needs less memory
        for each in contestants:
            each.ask(3)
        for each in contestants:
            each.answer()
    elif cuda:  # the memory may not hold the steps of all
        for each in contestants:
            each.take(3)
    steps, rounds, spent, orders = {}, {each.name: [] for each in contestants}, 0.0, Random(0)
    for each in contestants:
        warm_up = each.take(1)["seconds"]
        steps[each.name] = 1 if limits.most == 1 else max(1, round((1.0 if cuda else 0.3) / warm_up))
    while limits.want_more(len(rounds["matmul"]), spent, monotonic() > end):
        for each in contestants:
            taken = each.take(steps[each.name])
            spent += taken["seconds"]
            rounds[each.name].append({**taken, "seconds": taken["seconds"] / steps[each.name]})
        orders.shuffle(contestants)  # whoever goes first is some per cent slower, and whom one follows counts too
    for each in contestants:
        each.process.stdin.close()
        each.process.wait()
    return rounds


if __name__ == "__main__":
    main()
