"""What a cluster asks of a job: the profile, a TOML file that ``patchmill submit`` and ``manifest --cluster`` read."""

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationInfo, create_model

from pipeline.settings import Settings, check, merge, nearest, read_toml
from shards.errors import UserError

SECRET = re.compile(r"(^|_)(KEY|TOKEN|SECRET|PASSWORD)$", re.IGNORECASE)
"""How variables are called that others must not read: AWS_SECRET_ACCESS_KEY, WANDB_API_KEY, HF_TOKEN."""
IN_THE_OPEN = (
    "is a secret by its name, and scripts and manifests are readable; on Slurm export it in the shell that submits, "
    "which sbatch hands on, on Kubernetes keep it in a Secret and name that in secrets"
)

MOVED = "moves what a job says, and `patchmill status` and `logs` read that beside its script"
OURS = {
    "--j|-J": "names the job, and Patchmill knows its jobs by their names",
    "--ou|-o": MOVED,
    "--er|-e": MOVED,
    "--ar|-a": "makes an array of the job, and Patchmill has its own: of sweeps, and of slices",
    "--cl|-M": "submits to another cluster, of which the commands here know no jobs; submit from a login node of that",
    "--si": "takes the warning before the time limit away, upon which ranks save; `grace` says how long before",
}
"""Options that Patchmill itself gives sbatch, by as much of them as it must see, and what another would do."""


def _one_line(text: str) -> str:
    if any(not each.isprintable() for each in text):
        raise ValueError("must be one line of printable characters")
    return text


def _variable(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError(f"{name!r} is no name of an environment variable")
    if SECRET.search(name):
        raise ValueError(f"{name} {IN_THE_OPEN}")
    return name


def _no_secret(line: str, info: ValidationInfo) -> str:
    """Refuse a secret that stands in a line or word, without repeating it; from a file or a program it may come."""
    for name in re.findall(r"(?<![\w$])(\w+)=[\"']?[^\s\"'$`]", line):
        if SECRET.search(name):
            raise UserError(f"{info.field_name} in the profile sets {name}, which {IN_THE_OPEN}")
    return line


def _not_ours(option: str, info: ValidationInfo) -> str:
    for ours, why in OURS.items():
        if (info.field_name == "sbatch" or why == MOVED) and re.search(rf"(^|\s)({ours})", option):  # several on a line
            raise ValueError(f"{option!r} {why}; leave it out")
    return option


def _secret(name: str) -> str:
    if not re.fullmatch(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?", name):
        raise ValueError(f"{name!r} is no name of a Secret; give the one that `kubectl get secrets` shows")
    return name


Line = Annotated[str, AfterValidator(_one_line)]
Variable = Annotated[str, AfterValidator(_variable)]
Shell = Annotated[str, AfterValidator(_no_secret)]
Word = Annotated[Line, AfterValidator(_no_secret)]
Option = Annotated[Word, AfterValidator(_not_ours)]
Secret = Annotated[str, AfterValidator(_secret)]


class NodeSettings(Settings):
    """What a stage takes of nodes, and what it may suffer, on any cluster."""

    gpus_per_node: int = Field(0, ge=0, description="of a whole node; a job of fewer ranks asks for fewer")
    ranks_per_node: int | None = Field(None, gt=0, description="default: gpus_per_node, else all on one node")
    cpus_per_rank: int | None = Field(None, gt=0)
    memory: Line | None = Field(None, description="of a whole node, 480G, as gpus_per_node is; of a pod, 480Gi")
    env: dict[Variable, Line] = Field({}, description="variables of the ranks; secrets are refused")
    grace: int = Field(120, gt=0, description="seconds that ranks get to save before the end: of the time limit, a pod")
    retries: int = Field(3, ge=0, description="after crashes without progress between them")


class JobSettings(NodeSettings):
    """The job of a stage on Slurm; what is not said, the cluster decides."""

    partition: Line | None = None
    account: Line | None = None
    qos: Line | None = None
    constraint: Line | None = None
    time: Line | None = Field(None, description="limit of one try, as sbatch takes it: 1-12:00:00")
    slices: int = Field(1, gt=0, description="of a stage of kind shards: so many jobs of an array build it")
    health: list[Word] = Field([], description="command that a node must pass before each try, or it is excluded")
    doctor: bool = Field(False, description="look at all that the stage needs on the nodes of each try, before it")
    modules: list[Line] = []
    setup: list[Shell] = Field([], description="lines of shell, run as they are on the first node")
    container: list[Word] = Field([], description="words before a rank's command: apptainer exec --nv image.sif")
    python: Line | None = Field(None, description="of the ranks; default: the one that submits")
    sbatch: list[Option] = Field([], description="more options of sbatch, each as it is: --exclusive")
    srun: list[Option] = Field([], description="more options of srun: --container-image=...")


class PodSettings(NodeSettings):
    """The pods of a stage on Kubernetes, one a node."""

    image: Line | None = Field(None, description="with Patchmill in it")
    command: list[Line] = Field(["patchmill"], min_length=1, description="that is Patchmill in the image")
    directory: Line | None = Field(None, description="in the container, that paths count from; default: this one")
    volumes: dict[Line, Line] = Field({}, description="persistent volume claim by the path that it is mounted at")
    secrets: list[Secret] = Field([], description="names of Secrets, whose keys become variables of the pods")
    namespace: Line | None = None
    queue: Line | None = Field(None, description="of Kueue")
    node_selector: dict[Line, Line] = {}
    gpu_resource: Line = Field("nvidia.com/gpu", description="what a GPU is called")


def layout(ranks: int, settings: NodeSettings, where: str) -> tuple[int, int]:
    """Return nodes and ranks on each.

    Raises:
        UserError: The ranks do not fill the nodes.
    """
    each = min(ranks, settings.ranks_per_node or settings.gpus_per_node or ranks)
    if ranks % each:
        raise UserError(
            f"stage {where} has {ranks} ranks, and a node takes {each}; make ranks a multiple of that, or set "
            "ranks_per_node"
        )
    return ranks // each, each


CLUSTERS: dict[str, type[NodeSettings]] = {"Slurm": JobSettings, "Kubernetes": PodSettings}


def _profile(settings: type[NodeSettings]) -> type[NodeSettings]:
    """Return the settings of a whole file: those of all jobs, and tables of kinds and stages."""
    tables: Any = (dict[str, dict[str, Any]], {})
    return create_model("Profile", __base__=settings, kind=tables, stage=tables)


class Cluster:
    """A profile: settings of all jobs, and in ``[kind.NAME]`` and ``[stage.NAME]`` what differs.

    Args:
        path: Of the TOML file; None: none, and the cluster's defaults hold.
        of: What runs the jobs, of ``CLUSTERS``.

    Raises:
        UserError: There is no such file, or it does not fit.
    """

    def __init__(self, path: str | Path | None = None, of: str = "Slurm"):
        self._path, self._of, self._settings = str(path) if path else "no profile", of, CLUSTERS[of]
        self._table = read_toml(path) if path else {}
        self._refuse_others(self._table, self._path)
        check(_profile(self._settings), self._table, self._path)

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
                where = f"[{what}.{name}] of {self._path}"
                self._refuse_others(self._table[what][name], where)
                check(self._settings, self._table[what][name], where)

    def job(self, kind: str, stage: str) -> Any:
        """Return the settings of a stage's job: its own go before those of its kind, and those before all jobs'."""
        table = {key: value for key, value in self._table.items() if key not in ("kind", "stage")}
        for what, name in (("kind", kind), ("stage", stage)):
            table = merge(table, self._table.get(what, {}).get(name, {}))
        return check(self._settings, table, self._path)

    def _refuse_others(self, table: dict[str, Any], where: str) -> None:
        for other, settings in CLUSTERS.items():
            for key in table:
                if key in settings.model_fields and key not in self._settings.model_fields:
                    raise UserError(
                        f"{key} in {where} is a setting of {other}, and this is for {self._of}; leave it out"
                    )
