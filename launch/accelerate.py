"""Accelerate launch: the command for each node. ``--multi_gpu`` means several processes, on a CPU too."""

import sys

from launch.start import Start


def command(start: Start, node: int) -> list[str]:
    """Return the command that starts a node's ranks; what else ``accelerate`` may configure stays with our settings."""
    return [
        sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu",
        f"--num_processes={start.ranks}", f"--num_machines={start.nodes}", f"--machine_rank={node}",
        f"--main_process_ip={start.address}", f"--main_process_port={start.port}", "--same_network",
        "--mixed_precision=no", "--dynamo_backend=no", "--module", *start.rank(),
    ]  # fmt: skip
