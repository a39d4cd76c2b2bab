"""How the ranks of a plan's stages are started: by us, or by another launcher, on this machine or several."""

import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch

from launch import accelerate, deepspeed, torchrun
from launch.driver import Asked, drive
from launch.leader import Leader, address_of, follow
from launch.local import free_port, run_ranks
from launch.plan import Plan, Stage
from launch.start import Start
from pipeline.settings import nearest
from shards.errors import PatchmillError, StoppedOnRequestError, UserError

A_NODE = {"torchrun": torchrun.command, "accelerate": accelerate.command}  # one command on each node
LAUNCHERS = ("local", *A_NODE, "deepspeed")
SETTINGS = {"nodes": tuple(A_NODE), "node_rank": tuple(A_NODE), "rdzv_endpoint": tuple(A_NODE),
            "hostfile": ("deepspeed",), "remote": ("deepspeed",)}  # fmt: skip


@dataclass
class Launch:
    """What the command line says of launching; checked.

    Attributes:
        launcher: One of ``LAUNCHERS``.
        nodes: That share the ranks of a stage evenly; a stage of one rank runs on node 0.
        node_rank: Which of them this is.
        rdzv_endpoint: ``HOST:PORT`` of node 0, where the nodes find each other.
        hostfile: Of DeepSpeed: a line ``HOST slots=N`` for each node.
        remote: How DeepSpeed reaches them: ``pdsh`` (the default) or ``openmpi``.

    Raises:
        UserError: There is no such launcher, or it has no such setting, or one is missing.
    """

    launcher: str = "local"
    nodes: int | None = None
    node_rank: int | None = None
    rdzv_endpoint: str | None = None
    hostfile: Path | None = None
    remote: str | None = None
    _leader: Leader | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.launcher not in LAUNCHERS:
            known = (
                f"{nearest(self.launcher, LAUNCHERS)}; give one of {', '.join(LAUNCHERS)}, or use `patchmill submit` "
            )
            known += "(Slurm) or `patchmill manifest` (Kubernetes)"
            raise UserError(f"there is no launcher {self.launcher!r}{known}")
        for name, launchers in SETTINGS.items():
            if getattr(self, name) is not None and self.launcher not in launchers:
                option = f"--{name.replace('_', '-')}"
                raise UserError(
                    f"{option} is a setting of --launcher {' and '.join(launchers)}, and the launcher is "
                    f"{self.launcher}; leave it out"
                )
        if self.remote not in (None, *deepspeed.NEEDS):
            raise UserError(f"--remote is {self.remote!r}; give {' or '.join(deepspeed.NEEDS)}")
        if self.several and self.rdzv_endpoint is None:
            raise UserError(f"--nodes {self.nodes} needs --rdzv-endpoint HOST:PORT: node 0, and a free port of it")
        for option, value in (("--rdzv-endpoint", self.rdzv_endpoint), ("--node-rank", self.node_rank)):
            if self.nodes is None and value is not None:
                raise UserError(f"{option} {value} is for several nodes; give --nodes N, too, or leave it out")
        if self.rdzv_endpoint is not None:
            address_of(self.rdzv_endpoint)
        if not 0 <= (self.node_rank or 0) < (self.nodes or 1):
            raise UserError(f"--node-rank {self.node_rank} of --nodes {self.nodes or 1}; they count from 0")

    @property
    def several(self) -> bool:
        """Whether the command is given on each of several nodes."""
        return (self.nodes or 1) > 1

    def unsaid_ranks(self) -> int:
        """Return the ranks of a training stage of which the plan does not say how many: one a GPU, or slot."""
        if self.hostfile is not None:
            return sum(deepspeed.read_slots(self.hostfile).values())
        return max(1, torch.cuda.device_count()) * (self.nodes or 1)

    def check(self, stages: Iterable[Stage]) -> None:
        """Check that stages can be started so, before any is.

        Raises:
            UserError: One cannot.
        """
        for stage in stages:
            ranks = stage.table.ranks
            if ranks > 1 and ranks % (self.nodes or 1):
                raise UserError(
                    f"stage {stage.table.name} has {ranks} ranks, which {self.nodes} nodes cannot share evenly; set "
                    "--ranks, or another --nodes"
                )
            if self.launcher == "deepspeed" and ranks > 1:
                hosts = deepspeed.read_hosts(self.hostfile, ranks)
                if (remote := self._remote(hosts)) is not None:
                    deepspeed.check_remote(remote)

    def run(self, arguments: list[str], ranks: int, folder: Path) -> tuple[int, str]:
        """Run ``patchmill ARGUMENTS`` on so many ranks, for the stage in ``folder``; as ``launch.local.run_ranks``."""
        if self._leader:
            self._leader.check()
        if ranks == 1 or self.launcher == "local":
            with self._leader.heeding() if self._leader else nullcontext():
                return run_ranks(arguments, ranks, folder / "logs")
        start, logs = self._start(arguments, ranks, folder), folder / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        if self.launcher == "deepspeed":
            deepspeed.write_hostfile(start, deepspeed.read_hosts(self.hostfile, ranks))
        code = drive(self._command(start, 0), start, 0, self._leader.tell if self._leader else None)
        return code, (logs / "stdout.log").read_text(encoding="utf-8") if code == 0 else ""

    @contextmanager
    def leading(self) -> Iterator[None]:
        """Tell the other nodes, if there are any, what this one starts, and how it ended."""
        if not self.several:
            yield
            return
        self._leader, code = Leader(self.rdzv_endpoint, self.nodes), 1
        try:
            yield
            code = 0
        except BaseException as error:
            code = code_of(error)
            raise
        finally:
            self._leader.end(code)
            self._leader = None

    def follows(self) -> bool:
        """Tell whether this is another node than 0.

        Raises:
            UserError: Nobody says.
        """
        if self.several and self.node_rank is None:
            raise UserError(f"--nodes {self.nodes} needs --node-rank I, on each node its own, from 0")
        return bool(self.node_rank)

    def follow(self) -> None:
        """Start, on another node than 0, what node 0 says."""

        def begin(start: Start) -> None:
            drive(self._command(start, self.node_rank), start, self.node_rank)

        with Asked() as asked:
            follow(self.rdzv_endpoint, self.node_rank, begin, lambda: bool(asked.signals))

    def commands(self, stage: Stage) -> dict[str, list[str]]:
        """Return what would be started for a stage, by node; the ports are chosen anew each time."""
        ranks, arguments = stage.table.ranks, [*stage.arguments, "--json"]
        nodes = [f"node {node}" for node in range(self.nodes)] if self.several else ["this machine"]
        if ranks == 1 or self.launcher == "local":
            return {nodes[0]: ["patchmill", *arguments]}
        start = self._start(arguments, ranks, stage.folder)
        return {name: self._command(start, node) for node, name in enumerate(nodes)}

    def _start(self, arguments: list[str], ranks: int, folder: Path) -> Start:
        nodes, address = self.nodes or 1, "127.0.0.1"
        if self.several:
            address = address_of(self.rdzv_endpoint)[0]
        elif self.launcher == "deepspeed":
            hosts = deepspeed.read_hosts(self.hostfile, ranks)
            nodes, address = len(hosts), next(iter(hosts))
        # Of the folder that it is started in DeepSpeed makes shell; its ranks go to the right one by themselves.
        apart = "/" if self.launcher == "deepspeed" else None
        return Start(arguments, str(folder / "logs"), ranks, nodes, address, free_port(), apart)

    def _command(self, start: Start, node: int) -> list[str]:
        if self.launcher in A_NODE:
            return A_NODE[self.launcher](start, node)
        hosts = deepspeed.read_hosts(self.hostfile, start.ranks)
        return deepspeed.command(start, self._remote(hosts))

    def _remote(self, hosts: dict[str, int]) -> str | None:
        return (self.remote or "pdsh") if len(hosts) > 1 or self.remote else None


LOCAL = Launch()


def code_of(error: BaseException) -> int:
    """Return the exit code that the end of a ``patchmill run`` means to others; a signal and Ctrl-C ask it to stop."""
    if isinstance(error, KeyboardInterrupt):
        return StoppedOnRequestError.exit_code
    return getattr(error, "exit_code", PatchmillError.exit_code)


def print_commands(launch: Launch, plan: Plan, names: set[str]) -> None:
    """Print on stdout what a run would start, stage by stage and node by node, as a shell would take it."""
    print("# `patchmill run` starts these, writes each stage's config.toml before, and notes its result after.")
    for stage in plan.stages:
        if stage.table.name in names:
            ranks = f", {stage.table.ranks} ranks" if stage.table.ranks > 1 else ""
            for where, command in launch.commands(stage).items():
                print(f"# {stage.table.name} ({stage.table.kind}{ranks}), on {where}\n{shlex.join(command)}")
