"""What a Slurm cluster asks of a job: the profile, a TOML file that ``patchmill submit --cluster`` reads."""

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from pipeline.settings import Settings, check, merge, nearest, read_toml
from shards.errors import UserError


def _one_line(text: str) -> str:
    if any(not each.isprintable() for each in text):
        raise ValueError("must be one line of printable characters")
    return text


def _variable(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError(f"{name!r} is no name of an environment variable")
    return name


Line = Annotated[str, AfterValidator(_one_line)]
Variable = Annotated[str, AfterValidator(_variable)]


class JobSettings(Settings):
    """The job of a stage; what is not said, the cluster decides."""

    partition: Line | None = None
    account: Line | None = None
    qos: Line | None = None
    constraint: Line | None = None
    time: Line | None = Field(None, description="limit of one try, as sbatch takes it: 1-12:00:00")
    gpus_per_node: int = Field(0, ge=0, description="of a whole node; a job of fewer ranks asks for fewer")
    ranks_per_node: int | None = Field(None, gt=0, description="default: gpus_per_node, else all on one node")
    cpus_per_rank: int | None = Field(None, gt=0)
    memory: Line | None = Field(None, description="of a node: 480G")
    slices: int = Field(1, gt=0, description="of a stage of kind shards: so many jobs of an array build it")
    grace: int = Field(120, gt=0, description="seconds before the time limit at which the ranks are told to save")
    retries: int = Field(3, ge=0, description="after crashes without progress between them")
    health: list[Line] = Field([], description="command that a node must pass before each try, or it is excluded")
    doctor: bool = Field(False, description="look at all that the stage needs on the nodes of each try, before it")
    modules: list[Line] = []
    env: dict[Variable, Line] = {}
    setup: list[str] = Field([], description="lines of shell, run as they are on the first node")
    container: list[Line] = Field([], description="words before a rank's command: apptainer exec --nv image.sif")
    python: Line | None = Field(None, description="of the ranks; default: the one that submits")
    sbatch: list[Line] = Field([], description="more options of sbatch, each as it is: --exclusive")
    srun: list[Line] = Field([], description="more options of srun: --container-image=...")


class ClusterTable(JobSettings):
    """A profile file: settings of all jobs, and what differs for stages of a kind, and of a name."""

    kind: dict[str, dict[str, Any]] = {}
    stage: dict[str, dict[str, Any]] = {}


class Cluster:
    """A profile.

    Args:
        path: Of the TOML file; None: none, and Slurm's defaults hold.

    Raises:
        UserError: There is no such file, or it does not fit.
    """

    def __init__(self, path: str | Path | None = None):
        self._path = str(path) if path else "no profile"
        self._table = read_toml(path) if path else {}
        check(ClusterTable, self._table, self._path)

    def check_names(self, kinds: list[str], stages: list[str]) -> None:
        """Check that kinds and stages that have settings of their own are there.

        Raises:
            UserError: One is not, or its settings do not fit.
        """
        for what, known in (("kind", kinds), ("stage", stages)):
            for name in self._table.get(what, {}):
                if name not in known:
                    there = f"{nearest(name, known)}; name one of {', '.join(known)}"
                    raise UserError(f"[{what}.{name}] of {self._path}: there is no such {what}{there}")
                check(JobSettings, self._table[what][name], f"[{what}.{name}] of {self._path}")

    def job(self, kind: str, stage: str) -> JobSettings:
        """Return the settings of a stage's job: its own go before those of its kind, and those before all jobs'."""
        table = {key: value for key, value in self._table.items() if key not in ("kind", "stage")}
        for what, name in (("kind", kind), ("stage", stage)):
            table = merge(table, self._table.get(what, {}).get(name, {}))
        return check(JobSettings, table, self._path)
