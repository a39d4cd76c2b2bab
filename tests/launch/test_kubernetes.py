"""The manifest, parsed as YAML, held against fields and types that are written out here, and read as its pods do."""

import json
import re

import pytest
import yaml
from typer.testing import CliRunner

from launch.cli import app
from launch.cluster import Cluster
from launch.kubernetes import manifest
from launch.plan import read_plan
from shards.errors import UserError
from tests.images import build_image_set
from tests.plans import SHARDS, training, write_plan

SWEEP = 'sweep = { "optim.lr" = [0.1, 0.2] }'
PLAN = 'name = "My_plan"' + SHARDS + training("rates", head=f"ranks = 16\n{SWEEP}")
PROFILE = """
image = "registry.example/patchmill:0.1"
directory = "/data/me"
volumes = { "/data" = "shared", "/scratch" = "fast" }
gpus_per_node = 8
cpus_per_rank = 12
memory = "480Gi"
retries = 2
grace = 300
namespace = "vision"
queue = "nights"
node_selector = { "gpu.kind" = "h100" }
[kind.shards]
gpus_per_node = 0
[stage.rates]
memory = "900Gi"
"""


def table_of(folder, profile: str = PROFILE, plan: str = PLAN, name: str = "plan.toml") -> dict:
    write_plan(folder, plan, name)
    (folder / "pods.toml").write_text(profile)
    cluster = Cluster(folder / "pods.toml", of="Kubernetes")
    return yaml.safe_load(manifest(read_plan(folder / name, folder / "runs"), cluster, name, "my runs"))


def holds(table: dict, **kinds: type) -> None:
    """Check that a table has these keys and no other, each of its kind."""
    assert {key: type(value) for key, value in table.items()} == kinds


def test_a_jobset_of_a_job_a_stage_and_a_pod_a_node(tmp_path):
    table = table_of(tmp_path)
    holds(table, apiVersion=str, kind=str, metadata=dict, spec=dict)
    assert (table["apiVersion"], table["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert table["metadata"] == {
        "name": "my-plan", "namespace": "vision", "labels": {"kueue.x-k8s.io/queue-name": "nights"}
    }  # fmt: skip
    holds(table["spec"], network=dict, replicatedJobs=list)
    jobs = table["spec"]["replicatedJobs"]
    assert [job["name"] for job in jobs] == ["shards", "rates-0", "rates-1"]
    assert "dependsOn" not in jobs[0]  # which JobSet refuses
    assert [job["dependsOn"] for job in jobs[1:]] == [
        [{"name": "shards", "status": "Complete"}], [{"name": "rates-0", "status": "Complete"}]
    ]  # fmt: skip
    for job in jobs:
        job.pop("dependsOn", None)
        holds(job, name=str, replicas=int, template=dict)
        spec = job["template"]["spec"]
        holds(spec, completionMode=str, completions=int, parallelism=int, backoffLimit=int, podFailurePolicy=dict,
              template=dict)  # fmt: skip
        assert spec["completionMode"] == "Indexed"
        pod = spec["template"]["spec"]
        holds(pod, restartPolicy=str, terminationGracePeriodSeconds=int, containers=list, volumes=list,
              nodeSelector=dict)  # fmt: skip
        assert pod["restartPolicy"] == "Never"  # or podFailurePolicy is refused
        assert pod["terminationGracePeriodSeconds"] == 300
        assert {volume["name"] for volume in pod["volumes"]} == {
            mount["name"] for mount in pod["containers"][0]["volumeMounts"]
        }
        holds(pod["containers"][0], name=str, image=str, workingDir=str, command=list, args=list, env=list,
              resources=dict, volumeMounts=list)  # fmt: skip
    shards, rates = (job["template"]["spec"] for job in jobs[:2])
    assert (shards["completions"], shards["backoffLimit"]) == (1, 2)
    assert (rates["completions"], rates["parallelism"], rates["backoffLimit"]) == (2, 2, 4)


def test_exit_codes_decide_what_becomes_of_a_pod(tmp_path):
    spec = table_of(tmp_path)["spec"]["replicatedJobs"][1]["template"]["spec"]
    rules = spec["podFailurePolicy"]["rules"]
    of = spec["template"]["spec"]["containers"][0]["name"]
    assert rules == [
        {"action": "FailJob", "onExitCodes": {"containerName": of, "operator": "In", "values": [2]}},
        {"action": "Ignore", "onExitCodes": {"containerName": of, "operator": "In", "values": [75]}},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]


def test_a_pod_runs_its_stage_with_what_the_profile_gives_it(tmp_path):
    jobs = table_of(tmp_path)["spec"]["replicatedJobs"]
    shards, rates = (job["template"]["spec"]["template"]["spec"]["containers"][0] for job in jobs[:2])
    assert [*shards["command"], *shards["args"]] == [
        "patchmill", "run", "plan.toml", "--runs", "my runs", "--only", "shards"
    ]  # fmt: skip
    assert rates["args"][5:] == [
        "rates-0", "--launcher", "torchrun", "--nodes", "2", "--node-rank", "$(NODE_RANK)",
        "--rdzv-endpoint", "my-plan-rates-0-0-0.my-plan:29400",
    ]  # fmt: skip
    assert shards["resources"] == {"requests": {"cpu": "12", "memory": "480Gi"}, "limits": {"memory": "480Gi"}}
    assert rates["resources"] == {
        "requests": {"cpu": "96", "memory": "900Gi"}, "limits": {"nvidia.com/gpu": "8", "memory": "900Gi"}
    }  # fmt: skip
    assert rates["workingDir"] == "/data/me"
    assert [mount["mountPath"] for mount in rates["volumeMounts"]] == ["/data", "/scratch", "/dev/shm"]


def test_each_pod_takes_the_plan_as_the_manifest_was_made_of_it(tmp_path, monkeypatch):
    """Ranks fit the batch of the pod's own stage, and not of the others."""
    build_image_set(tmp_path / "data", per_class=8)
    heads = {
        "pre": ("ranks = 16", 64),
        "tune": ("ranks = 6", 48),
        "loose": ("", 16),
        "rates": (f"ranks = 2\n{SWEEP}", 2),
    }
    stages = [
        training(name, head=head, data='train = "data/set"').replace("global_batch = 48", f"global_batch = {batch}")
        for name, (head, batch) in heads.items()
    ]
    table = table_of(tmp_path, 'image = "x"\ngpus_per_node = 2', "".join(['name = "x"\n', *stages]))
    monkeypatch.chdir(tmp_path)
    ranks = {}
    for job in table["spec"]["replicatedJobs"]:
        spec = job["template"]["spec"]
        words = spec["template"]["spec"]["containers"][0]["args"]
        name = words[words.index("--only") + 1]
        for node in range(spec["completions"]):
            read = [word.replace("$(NODE_RANK)", str(node)) for word in words]
            done = CliRunner().invoke(app, [*read, "--dry-run"])
            assert done.exit_code == 0, done.exception
            ranks[name] = int(re.search(rf"\b{name}\W+supervised\W+(\d+)\W+runs", done.stdout)[1])
    assert ranks == {"pre": 16, "tune": 6, "loose": 1, "rates-0": 2, "rates-1": 2}


ODD = ["a b", "it's", '"', "$(NODE_RANK)", "$$", "`x`", "yes", "1e3", "0x1f", "a: b", "- x", "# x", "\\", "~"]


def test_no_setting_and_no_path_becomes_anything_else(tmp_path):
    values = "\n".join(f"V{number} = {json.dumps(text)}" for number, text in enumerate(ODD))
    name = "".join(ODD) + ".toml"
    profile = PROFILE + f"\n[kind.supervised]\ncommand = {json.dumps(ODD)}\n[kind.supervised.env]\n{values}\n"
    jobs = table_of(tmp_path, profile=profile, name=name)["spec"]["replicatedJobs"]
    container = jobs[1]["template"]["spec"]["template"]["spec"]["containers"][0]
    literal = [text.replace("$", "$$") for text in ODD]  # of two dollars Kubernetes makes one, which begins no $(NAME)
    assert [each["value"] for each in container["env"][1:]] == literal
    assert container["command"] == literal
    assert container["args"][1] == name.replace("$", "$$")
    cluster = Cluster(tmp_path / "pods.toml", of="Kubernetes")
    raw = manifest(read_plan(tmp_path / name, tmp_path / "runs"), cluster, tmp_path, tmp_path)
    for text in ("yes", "1e3", "0x1f", "~"):  # which other readers of YAML take for no string
        assert f'value: "{text}"\n' in raw


def test_secrets_are_named_and_nowhere_written(tmp_path):
    profile = PROFILE + '[kind.supervised]\nsecrets = ["bucket", "wandb.key"]\n'
    jobs = table_of(tmp_path, profile=profile)["spec"]["replicatedJobs"]
    shards, rates = (job["template"]["spec"]["template"]["spec"]["containers"][0] for job in jobs[:2])
    assert "envFrom" not in shards
    assert rates["envFrom"] == [{"secretRef": {"name": "bucket"}}, {"secretRef": {"name": "wandb.key"}}]


@pytest.mark.parametrize(
    "name", ["AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "WANDB_API_KEY", "HF_TOKEN", "db_password", "SECRET"]
)
@pytest.mark.parametrize("of", ["Slurm", "Kubernetes"])
def test_a_secret_in_a_profile_is_refused_and_not_repeated(tmp_path, name, of):
    (tmp_path / "cluster.toml").write_text(f'env = {{ {name} = "hunter2" }}')
    with pytest.raises(UserError, match=rf"{name} is a secret by its name, .* on Slurm export it in the shell") as told:
        Cluster(tmp_path / "cluster.toml", of=of)
    assert "hunter2" not in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("env", ["NCCL_SOCKET_IFNAME", "TOKENIZERS_PARALLELISM", "NCCL_IB_PKEY", "KEYS", "AWS_REGION"])
def test_what_is_no_secret_passes(tmp_path, env):
    (tmp_path / "cluster.toml").write_text(f'env = {{ {env} = "x" }}\nsetup = ["export HF_TOKEN=$(cat ~/token)"]')
    assert Cluster(tmp_path / "cluster.toml").job("", "").env == {env: "x"}


def test_a_secret_in_a_line_of_shell_is_refused(tmp_path):
    for line in ("export HF_TOKEN=hunter2", "HF_TOKEN='hunter2' x", 'a=1; export HF_TOKEN="hunter2"'):
        (tmp_path / "cluster.toml").write_text(f"setup = [{json.dumps(line)}]")
        with pytest.raises(
            UserError, match="setup in the profile sets HF_TOKEN, which is a secret by its name"
        ) as told:
            Cluster(tmp_path / "cluster.toml")
        assert "hunter2" not in str(told.value)


@pytest.mark.parametrize("key", ["sbatch", "srun", "container", "health"])
def test_a_secret_among_words_of_a_command_is_refused(tmp_path, key):
    (tmp_path / "cluster.toml").write_text(f'[kind.supervised]\n{key} = ["--export=ALL,WANDB_API_KEY=hunter2"]')
    cluster = Cluster(tmp_path / "cluster.toml")
    with pytest.raises(UserError, match=f"{key} in the profile sets WANDB_API_KEY, which is a secret") as told:
        cluster.job("supervised", "")
    assert "hunter2" not in str(told.value)
    (tmp_path / "cluster.toml").write_text(f'{key} = ["--export=ALL,WANDB_API_KEY"]')  # its name alone
    assert getattr(Cluster(tmp_path / "cluster.toml").job("", ""), key) == ["--export=ALL,WANDB_API_KEY"]


@pytest.mark.parametrize(
    ("profile", "told"),
    [
        ('image = "x"\nsecrets = ["A b"]', r"secrets.0 .*'A b' is no name of a Secret"),
        (
            'partition = "gpu"',
            r"partition in .*pods.toml is a setting of Slurm, and this is for Kubernetes; leave it out",
        ),
        ('image = "x"\n[stage.rates]\ntime = "1-0"', r"time in \[stage.rates\] of .* is a setting of Slurm"),
        ("gpus_per_node = 8", r"no image is said for stage shards; set image in the profile"),
        ('image = "x"\nranks_per_node = 3', r"stage rates-0 has 16 ranks, and a node takes 3"),
        ('image = "x"\n[stage.rate]\nmemory = "1Gi"', r"there is no such stage .did you mean 'rates'"),
    ],
)
def test_a_profile_that_does_not_fit(tmp_path, profile, told):
    with pytest.raises(UserError, match=told):
        table_of(tmp_path, profile=profile)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("My_plan", "9plan", "the plan is called '9plan'; names in Kubernetes begin with a letter"),
        ("My_plan", "p" * 50, r"a pod would be called p+-shards-0-0, 61 letters of 57; shorten"),
        ('name = "rates"', 'name = "Shards"', "stages shards and Shards are both shards to Kubernetes; rename one"),
    ],
)
def test_a_name_that_kubernetes_does_not_take(tmp_path, old, new, told):
    plan = PLAN.replace(SWEEP, "")
    with pytest.raises(UserError, match=told):
        table_of(tmp_path, profile='image = "x"', plan=plan.replace(old, new))


def test_a_setting_of_kubernetes_is_none_of_slurm(tmp_path):
    (tmp_path / "cluster.toml").write_text('image = "x"')
    with pytest.raises(UserError, match=r"image in .* is a setting of Kubernetes, and this is for Slurm; leave it out"):
        Cluster(tmp_path / "cluster.toml")
