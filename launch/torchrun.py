"""torchrun: the command for each node."""

import sys

from launch.start import Start


def command(start: Start, node: int) -> list[str]:
    """Return the command that starts a node's ranks."""
    return [
        sys.executable, "-m", "torch.distributed.run", f"--nnodes={start.nodes}", f"--node-rank={node}",
        f"--nproc-per-node={start.each}", f"--master-addr={start.address}", f"--master-port={start.port}",
        # Else USR1 and USR2, with which schedulers warn of their end, would end torchrun and leave its ranks.
        "--signals_to_handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2", "--module", *start.rank(),
    ]  # fmt: skip
