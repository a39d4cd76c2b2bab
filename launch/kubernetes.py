"""A plan as a Kubernetes manifest: a JobSet, in which each stage is a job, one after the other, and each node a pod.

JobSet gives the pods names under which they find each other, and starts a job when the one before is done
(``dependsOn``, of version 0.8).
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import yaml

from launch.cluster import Cluster, PodSettings, layout
from launch.plan import Plan, Stage
from launch.stages import KINDS
from shards.errors import StoppedOnRequestError, UserError

PORT = 29400
LONGEST = 63 - len("-00000")  # of a pod's name, which gets five random letters
CONTAINER = "patchmill"


def manifest(plan: Plan, cluster: Cluster, path: Path, runs: Path) -> str:
    """Return the text of the manifest of a plan.

    Args:
        plan: All of its stages are in it; one that is done ends at once.
        cluster: Its profile, of Kubernetes.
        path: Of the plan's file, as the pods find it.
        runs: Folder of runs, likewise.

    Raises:
        UserError: A name is too long for Kubernetes, there is no image, or ranks do not fill nodes.
    """
    cluster.check_names(list(KINDS), [stage.name for stage in plan.table.stage])
    name = _name(plan.run.name, "the plan")
    jobs: list[dict[str, Any]] = []
    used: dict[str, str] = {}  # names of stages by what Kubernetes calls them
    for stage in plan.stages:
        settings = cluster.job(stage.table.kind, stage.sweep.name if stage.sweep else stage.table.name)
        job = _job(plan, stage, settings, name, path, runs)
        if (other := used.setdefault(job["name"], stage.table.name)) != stage.table.name:
            raise UserError(f"stages {other} and {stage.table.name} are both {job['name']} to Kubernetes; rename one")
        if jobs:
            job["dependsOn"] = [{"name": jobs[-1]["name"], "status": "Complete"}]
        jobs.append(job)
    settings = cluster.job("", "")
    metadata: dict[str, Any] = {"name": name}
    metadata |= {"namespace": settings.namespace} if settings.namespace else {}
    metadata |= {"labels": {"kueue.x-k8s.io/queue-name": settings.queue}} if settings.queue else {}
    table = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "replicatedJobs": jobs,
        },
    }
    told = f"# {json.dumps(str(plan.path))} as a JobSet, written by `patchmill manifest`.\n"
    return told + yaml.dump(table, Dumper=_Readable, sort_keys=False, width=120)


def _job(plan: Plan, stage: Stage, settings: PodSettings, jobset: str, path: Path, runs: Path) -> dict[str, Any]:
    nodes, each = layout(stage.table.ranks, settings, stage.table.name)
    name = _name(stage.table.name, f"stage {stage.table.name}")
    if len(last := f"{jobset}-{name}-0-{nodes - 1}") > LONGEST:
        raise UserError(
            f"a pod would be called {last}, {len(last)} letters of {LONGEST}; shorten the plan's name or the stage's"
        )
    words = [*settings.command, "run", str(path), "--runs", str(runs), "--only", stage.table.name]
    words += ["--smoke"] if plan.smoke else []
    words = [_literal(word) for word in words]
    if nodes > 1:
        endpoint = f"{jobset}-{name}-0-0.{jobset}:{PORT}"
        words += ["--launcher", "torchrun", "--nodes", str(nodes), "--node-rank", "$(NODE_RANK)"]
        words += ["--rdzv-endpoint", endpoint]
    return {
        "name": name,
        "replicas": 1,
        "template": {
            "spec": {
                "completionMode": "Indexed",
                "completions": nodes,
                "parallelism": nodes,
                "backoffLimit": settings.retries * nodes,
                "podFailurePolicy": {"rules": _rules()},
                "template": {"spec": _pod(stage, settings, words, each)},
            }
        },
    }


def _rules() -> list[dict[str, Any]]:
    """Return what becomes of a pod that ends: a mistake fails at once, what was stopped comes back for nothing."""
    ended = {"containerName": CONTAINER, "operator": "In"}
    return [
        {"action": "FailJob", "onExitCodes": {**ended, "values": [UserError.exit_code]}},
        {"action": "Ignore", "onExitCodes": {**ended, "values": [StoppedOnRequestError.exit_code]}},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]


def _pod(stage: Stage, settings: PodSettings, words: list[str], each: int) -> dict[str, Any]:
    if settings.image is None:
        raise UserError(
            f"no image is said for stage {stage.table.name}; set image in the profile, and give it by --cluster"
        )
    gpus, index = min(settings.gpus_per_node, each), "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    memory = {"memory": settings.memory} if settings.memory else {}
    requests = ({"cpu": str(settings.cpus_per_rank * each)} if settings.cpus_per_rank else {}) | memory
    limits = ({settings.gpu_resource: str(gpus)} if gpus else {}) | memory
    mounts = [{"name": f"volume-{number}", "mountPath": where} for number, where in enumerate(settings.volumes)]
    container = {
        "name": CONTAINER,
        "image": settings.image,
        "workingDir": settings.directory or os.getcwd(),
        "command": words[: len(settings.command)],
        "args": words[len(settings.command) :],
        "env": [
            {"name": "NODE_RANK", "valueFrom": {"fieldRef": {"fieldPath": index}}},
            *({"name": name, "value": _literal(value)} for name, value in settings.env.items()),
        ],
        "resources": {"requests": requests, "limits": limits},
        # Ranks share memory, and a container has 64 MB of it.
        "volumeMounts": [*mounts, {"name": "shared-memory", "mountPath": "/dev/shm"}],
    }
    if settings.secrets:  # their values stand nowhere in the manifest
        container["envFrom"] = [{"secretRef": {"name": name}} for name in settings.secrets]
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": settings.grace,
        "containers": [container],
        "volumes": [
            *(
                {"name": mount["name"], "persistentVolumeClaim": {"claimName": claim}}
                for mount, claim in zip(mounts, settings.volumes.values(), strict=True)
            ),
            {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},
        ],
    }
    return pod | ({"nodeSelector": settings.node_selector} if settings.node_selector else {})


def _literal(word: str) -> str:
    """Return what Kubernetes, which fills in ``$(NAME)``, makes this word of."""
    return word.replace("$", "$$")


def _name(name: str, what: str) -> str:
    found = name.lower().replace("_", "-")
    if not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", found):
        raise UserError(
            f"{what} is called {name!r}; names in Kubernetes begin with a letter and end with one or a digit"
        )
    return found


class _Readable(yaml.SafeDumper):
    """As Kubernetes reads it too: whatever could be taken for something else than a string stands in quotes."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write everything out."""
        return True


def _string(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    plain = re.fullmatch(r"[A-Za-z/][\w./:-]*\w", text) and isinstance(yaml.safe_load(text), str)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


_Readable.add_representer(str, _string)
