"""The whole thing under fire: python tests/proof/prove.py [--seed N] [--faults N] [--json]; root, for cluster and disk.

A plan of four stages runs twice: here, on local shards, undisturbed; and on a cluster of two nodes, on shards in an S3
server behind a bad proxy, disturbed by faults that a seed draws. Prints a table of the faults and what became of them,
then what was proved; exit code 1 if a fault was not survived or something does not hold.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.command import patchmill  # noqa: E402
from tests.proof.chaos import Chaos  # noqa: E402
from tests.proof.checks import Claim, check_all  # noqa: E402
from tests.proof.faults import STAGES, Fault, schedule  # noqa: E402
from tests.proof.images import make_shards  # noqa: E402
from tests.proof.storage import Storage  # noqa: E402
from tests.slurm.cluster import Cluster, ClusterError  # noqa: E402
from tests.slurm.runs import Submitted  # noqa: E402

CLUSTER, PORT = Path("/tmp/patchmill-slurm-proof"), 17200
DISK = 64  # MB of the file system that the disturbed run is on
GLOBAL_BATCH = 12  # of small.toml
PROFILE = """
ranks_per_node = 1
retries = 10  # faults come at any moment, many before the first checkpoint after the one before
env = { OMP_NUM_THREADS = "1" }
[stage.masked]
ranks_per_node = 2  # 1, 2 and 4 ranks are one node or both
"""


def write_plan(folder: Path, data: str, steps: int) -> Path:
    """Write the plan into a folder of its own; return its file."""
    folder.mkdir(exist_ok=True)
    for name in ("plan.toml", "small.toml"):
        text = Path(__file__).with_name(name).read_text()
        (folder / name).write_text(text.replace("DATA", data).replace("STEPS", str(steps)))
    return folder / "plan.toml"


def run_undisturbed(folder: Path, data: Path, steps: int) -> Path:
    """Run the plan on this machine; return the run's folder."""
    plan = write_plan(folder, str(data), steps)
    done = patchmill("run", plan.name, cwd=folder, timeout=900)
    if done.returncode:
        sys.exit(f"error: the undisturbed run failed: {done.stderr[-2000:]}")
    return folder / "runs" / "proof"


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """Mount a file system of a few MB at a new folder; in the end, what is on it is copied beside it."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}m", "tmpfs", folder], check=True, timeout=30)
    try:
        yield folder
    finally:
        try:
            with suppress(OSError):  # a file that goes meanwhile
                shutil.copytree(folder, folder.with_name("left"))
        finally:
            subprocess.run(["umount", "--lazy", folder], check=False, timeout=30)


def prove(folder: Path, seed: int, faults: int, steps: int) -> tuple[list[Fault], list[Claim]]:
    """Run both, and compare; return the faults with their outcomes, and what holds or not."""
    data, broken = make_shards(folder, seed)
    _say("undisturbed, on this machine")
    undisturbed = run_undisturbed(folder / "undisturbed", data, steps)
    positions = steps * GLOBAL_BATCH
    drawn = schedule(seed, faults, dict.fromkeys(STAGES, positions))
    with ExitStack() as stack:
        disk = stack.enter_context(small_disk(folder / "disturbed" / "runs"))
        cluster = Cluster(CLUSTER, PORT)
        os.environ["SLURM_CONF"] = str(cluster.conf)
        stack.callback(cluster.stop)
        cluster.start()
        storage = stack.enter_context(Storage(data))
        os.environ |= storage.environment
        plan = write_plan(disk.parent, storage.url, steps)
        _say(f"disturbed, {faults} faults")
        run = Submitted(cluster, plan, PROFILE)
        Chaos(run, storage, disk, seed).disturb(drawn)
        with suppress(ClusterError):  # what did not end is no stage that is done
            run.wait_for_end(300 if drawn[-1].outcome == "went on" else 10)
        return drawn, check_all(run, undisturbed, broken, positions)


def table(drawn: list[Fault], claims: list[Claim]) -> str:
    """Return all that came out, as Markdown."""
    lines = ["| | stage | samples | fault | | outcome | back after |", "|---|---|---|---|---|---|---|"]
    for number, fault in enumerate(drawn, start=1):
        cells = (number, fault.stage, fault.samples, fault.kind, fault.detail, fault.outcome, f"{fault.seconds:.0f} s")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", "| what must hold | | |", "|---|---|---|"]
    lines += [f"| {claim.what} | {'yes' if claim.holds else 'NO'} | {claim.found} |" for claim in claims]
    return "\n".join(lines) + "\n"


def _say(text: str) -> None:
    print(f"[{time.strftime('%T')}] {text}", file=sys.stderr, flush=True)


def main() -> int:
    """Prove it once."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1, help="of the faults")
    parser.add_argument("--faults", type=int, default=50, help="8 or more")
    parser.add_argument("--steps", type=int, default=1000, help="of each training stage")
    parser.add_argument("--json", action="store_true", help="the result as JSON")
    parser.add_argument("--keep", action="store_true", help="leave the folder of both runs, even if all holds")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that all that was started is ended
    began, folder = time.monotonic(), Path(tempfile.mkdtemp(prefix="patchmill-proof-"))
    proved = None
    try:
        drawn, claims = prove(folder, arguments.seed, arguments.faults, arguments.steps)
        survived = sum(fault.outcome == "went on" for fault in drawn)
        proved = survived == len(drawn) and all(claim.holds for claim in claims)
    except Exception:
        proved = False  # so that what there is stays
        raise
    finally:
        if arguments.keep or proved is False:
            _say(f"both runs are in {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    minutes = (time.monotonic() - began) / 60
    if arguments.json:
        found = {"faults": list(map(asdict, drawn)), "claims": list(map(asdict, claims)), "minutes": minutes}
        print(json.dumps({"seed": arguments.seed, **found}))
    else:
        print(table(drawn, claims))
        print(f"seed {arguments.seed}: {survived} of {len(drawn)} faults survived in {minutes:.1f} minutes")
    return 0 if proved else 1


if __name__ == "__main__":
    sys.exit(main())
