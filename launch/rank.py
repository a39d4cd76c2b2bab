"""One rank of a step that srun started: SLURM_* say which, and the rest of the code knows it by torchrun's names.

    srun python -m launch.rank LOGS train CONFIG ...

As on one machine (``launch.local``), rank 0 speaks on stderr and leaves its stdout in ``LOGS/stdout.log``, and the
others write ``LOGS/rank-N.log``. srun ends the others when one has ended with an error, and tells of the last: so
the exit code of a rank that knows why it ends is in ``LOGS/ended``.
"""

import os
import sys
from pathlib import Path

ENDED = "ended"


def main() -> None:
    """Run a command as this rank."""
    logs, sys.argv = Path(sys.argv[1]), [sys.argv[0], *sys.argv[2:]]
    rank, ranks = int(os.environ["SLURM_PROCID"]), os.environ["SLURM_NTASKS"]
    if ranks != "1":
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": ranks, "LOCAL_RANK": os.environ["SLURM_LOCALID"]}
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("SLURM_NTASKS_PER_NODE", "1"))
    os.environ.setdefault("OMP_NUM_THREADS", os.environ.get("SLURM_CPUS_PER_TASK", str(max(1, cores))))
    logs.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        os.dup2(os.open(logs / "stdout.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), 1)
    else:
        log = os.open(logs / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)

    from launch.cli import end, run_command

    code = run_command()
    if code:
        (logs / ENDED).write_text(str(code))
    end(code)


if __name__ == "__main__":
    main()
