"""Looks for inputs that lead where none led before, by the coverage of our Python code: the fuzzing's long form.

``pip install atheris==3.0.0``, then ``python -m tests.fuzz.guided plan --minutes 10``. What it changes, how, and what
may come of it are the target's, as in ``worker.py``, but for the bounds of memory and of what is written; which inputs
it goes on from is libFuzzer's choice. What breaks the contract is told and kept in ``build/fuzz/TARGET``, what is new
in its ``corpus``, from which the next run goes on; an input that takes ten seconds ends the run.
"""

import argparse
import sys
from pathlib import Path
from random import Random

import atheris

from tests.fuzz.worker import SECONDS, reading

LARGEST = 1 << 20


def main() -> None:
    """Try inputs on one target for some minutes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("target")
    parser.add_argument("--minutes", type=float, default=10.0)
    options = parser.parse_args()
    with atheris.instrument_imports(include=["shards", "pipeline", "launch"]):
        from tests.fuzz.targets import CORPUS, target_of

        target = target_of(options.target)
    folder = Path("build/fuzz").resolve() / options.target
    (folder / "corpus").mkdir(parents=True, exist_ok=True)
    found: set[str] = set()

    def look(data: bytes) -> None:
        problem = reading(target, data, folder / "room", folder / "around")[1] if data else None
        if problem and (first := problem.partition("\n")[0]) not in found:
            found.add(first)
            (folder / f"found-{len(found)}").write_bytes(data)
            print(f"{folder}/found-{len(found)}: {problem}", file=sys.stderr, flush=True)

    good = [path.read_bytes() for path in sorted((CORPUS / options.target).iterdir())]

    def change(data: bytes, most: int, seed: int) -> bytes:
        rng = Random(seed)
        try:
            changed = target.change(data, rng)
        except Exception:  # noqa: BLE001 (it is too far gone to be changed by what it means)
            changed = rng.choice(good)
        return changed if len(changed) <= most else rng.choice(good)

    limits = [
        f"-max_total_time={60 * options.minutes:.0f}",
        f"-timeout={SECONDS}",
        f"-max_len={LARGEST}",
        f"-artifact_prefix={folder}/found-",
    ]
    atheris.Setup(["", *limits, str(folder / "corpus"), str(CORPUS / options.target)], look, custom_mutator=change)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
