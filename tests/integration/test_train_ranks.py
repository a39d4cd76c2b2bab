"""A training stage on several ranks: stopped on request, a rank killed, gone on with on another number of ranks."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from shards.audit import audit
from shards.dataset import Dataset
from tests.command import LAUNCH, done, environment, losses, wait_for_steps
from tests.images import build_image_set
from tests.shards.sources.servers import serve

CONFIG = """
duration = "{epochs} epochs"
global_batch = 12
micro_batch = 1
log_every = "1 step"
[data]
train = "set/train"
val = "set/val"
resolution = 16
[model]
name = "vit_ti8"
embed_dim = 24
num_heads = 3
depth = 2
dropout = {dropout}
[optim]
lr = 1e-3
weight_decay = 0.1
clip = 1.0
[schedule]
warmup = "1 epoch"
[engine]
zero_stage = {stage}
[checkpoint]
every = "7 steps"
[evaluate]
every = "5 epochs"
batch = 4
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    build_image_set(folder, per_class=16, split={"val": 0.2}, shard_samples=8)
    return folder


def launch(
    folder: Path, ranks: int, run: str, epochs: int = 12, stage: int = 1, dropout: float = 0.0, over: tuple = ()
) -> subprocess.Popen:
    config = folder / f"{run}.toml"
    config.write_text(CONFIG.format(epochs=epochs, stage=stage, dropout=dropout))
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCH, str(ranks), f"{run}/logs", "train", config.name, *over, "--out", run, "--json"],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(folder) -> list[tuple[int, float]]:
    code, stderr = done(launch(folder, 2, "undisturbed"))
    assert code == 0, stderr
    return losses(folder / "undisturbed")


@pytest.mark.long
def test_log_lines_say_what_the_loaders_of_all_ranks_did(folder, undisturbed):
    lines = [json.loads(line) for line in (folder / "undisturbed" / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    dataset = Dataset.open(folder / "set" / "train")
    megabytes = sum(int(dataset.rows(shard).size.sum()) for shard in range(len(dataset.shard_sizes))) / 1e6
    read = sum(line["mb_per_second"] * 12 / line["images_per_second"] for line in lines)
    # What is decoded while a checkpoint is written or the held-out set evaluated is in no line.
    assert 0.6 < read / (megabytes * lines[-1]["epoch"]) < 1.2
    for share in ("data_wait", "read_share", "decode_share"):
        assert all(line[share] >= 0 for line in lines)
        assert (
            0
            < sum(line[share] / line["images_per_second"] for line in lines)
            < sum(1 / line["images_per_second"] for line in lines)
        )
    assert all(line["quarantined"] == line["replaced"] == 0 for line in lines)


@pytest.mark.parametrize(
    "ranks",
    [
        pytest.param(2, marks=pytest.mark.slow),
        pytest.param(1, marks=pytest.mark.slow),
        pytest.param(3, marks=pytest.mark.long),
    ],
)
def test_stopped_on_request_it_saves_and_goes_on_with_any_ranks_and_data_moved_to_a_server(folder, undisturbed, ranks):
    run = folder / f"stopped-{ranks}"
    first = launch(folder, 2, run.name)
    wait_for_steps(run, first, 9)
    first.send_signal(signal.SIGTERM)
    code, stderr = done(first)
    assert code == 75, stderr
    assert "stopped on request" in stderr
    stopped = json.loads((run / "stopped.json").read_text())
    assert 9 * 12 <= stopped["samples"] < undisturbed[-1][0]
    assert losses(run) == undisturbed[: stopped["samples"] // 12]

    with serve(folder / "set") as url:
        over = (
            f"data.train={url}/train",
            f"data.val={url}/val",
            f"data.cache={run.name}/cache",
            "data.cache_bytes=50 kB",
        )
        code, stderr = done(launch(folder, ranks, run.name, over=over))
    assert code == 0, stderr
    cached = [path.stat().st_size for path in (run / "cache").iterdir()]
    assert len(cached) > 1
    assert sum(cached) < 50_000
    assert not (run / "stopped.json").exists()
    after = losses(run)
    if ranks == 2:
        assert after == undisturbed
    else:
        assert [samples for samples, _ in after] == [samples for samples, _ in undisturbed]
        assert [loss for _, loss in after] == pytest.approx([loss for _, loss in undisturbed], abs=2e-4)


@pytest.mark.long
def test_decoding_in_a_process_of_its_own_trains_the_same_through_signals_to_all_and_leaves_nobody_behind(
    folder, undisturbed
):
    run, over = folder / "process", ("data.decode=process",)
    first = launch(folder, 2, run.name, over=over)
    wait_for_steps(run, first, 9)
    everybody = psutil.Process(first.pid).children(recursive=True)
    assert len(everybody) == 2 + 2 * 2  # a decode process a rank, and what Python watches over it with
    for each in [first, *everybody]:
        each.send_signal(signal.SIGTERM)  # as a scheduler does
    code, stderr = done(first)
    assert code == 75, stderr
    assert "Traceback" not in stderr
    assert psutil.wait_procs(everybody, timeout=20)[1] == []
    code, stderr = done(launch(folder, 2, run.name, over=over))
    assert code == 0, stderr
    assert losses(run) == undisturbed
    weights = [max((folder / name).glob("checkpoints/samples-*")) for name in ("process", "undisturbed")]
    for rank in range(2):
        assert len({(each / f"rank-{rank:05d}.safetensors").read_bytes() for each in weights}) == 1
    assert audit(run).counts == {}


@pytest.mark.long
def test_another_global_batch_on_resume_still_ends_with_a_save_and_an_evaluation(folder):
    run = folder / "other-batch"
    first = launch(folder, 2, run.name, epochs=14)
    wait_for_steps(run, first, 9)
    first.send_signal(signal.SIGINT)  # Ctrl-C asks for a stop too
    assert done(first)[0] == 75
    over = ("global_batch=10", "micro_batch=5", "checkpoint.every='50 epochs'", "evaluate.every='50 epochs'")
    stopped = losses(run)[-1][0]
    code, stderr = done(launch(folder, 2, run.name, epochs=14, over=over))
    assert code == 0, stderr
    assert "global_batch changed from 12 to 10" in stderr
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seen = [line["samples"] for line in lines if "loss" in line]
    assert seen[seen.index(stopped) :] == list(range(stopped, seen[-1] + 1, 10))
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, len(seen) + 1))
    assert (run / "checkpoints" / "latest").read_text().strip() == f"samples-{seen[-1]:012d}"
    assert lines[-1]["samples"] == seen[-1]
    assert "val_top1" in lines[-1]


@pytest.mark.long
def test_a_second_run_in_the_same_folder_waits_its_turn(folder):
    """As when a launcher is killed and started again while its ranks are still saving."""
    process = launch(folder, 1, "turns", epochs=2000)
    wait_for_steps(folder / "turns", process, 5)
    second = launch(folder, 1, "turns", epochs=2000)
    time.sleep(6)
    process.send_signal(signal.SIGTERM)
    assert done(process)[0] == 75
    wait_for_steps(folder / "turns", second, len(losses(folder / "turns")) + 5)
    second.send_signal(signal.SIGTERM)
    assert done(second)[0] == 75
    seen = [samples for samples, _ in losses(folder / "turns")]
    assert seen == list(range(12, seen[-1] + 1, 12))


@pytest.mark.long
def test_a_loss_that_is_not_finite_ends_the_run(folder):
    code, stderr = done(launch(folder, 2, "diverged", over=("optim.lr=1e30", "optim.clip=1e9")))
    assert code == 1
    assert "lower optim.lr" in stderr
    assert "Traceback" not in stderr
    assert "NaN" not in (folder / "diverged" / "metrics.jsonl").read_text()


@pytest.mark.long
def test_with_dropout_a_resumed_run_draws_the_same(folder):
    code, stderr = done(launch(folder, 2, "dropout", epochs=12, stage=2, dropout=0.2))
    assert code == 0, stderr
    first = launch(folder, 2, "dropout-stopped", epochs=12, stage=2, dropout=0.2)
    wait_for_steps(folder / "dropout-stopped", first, 4)
    first.send_signal(signal.SIGTERM)
    assert done(first)[0] == 75
    assert done(launch(folder, 2, "dropout-stopped", epochs=12, stage=2, dropout=0.2))[0] == 0
    assert losses(folder / "dropout-stopped") == losses(folder / "dropout")


@pytest.mark.long
def test_randaugment_mixup_and_stochastic_depth_are_the_same_on_any_ranks(folder, undisturbed):
    for ranks in (1, 2):
        over = ("data.augment=medium1", "model.drop_path=0.5")
        code, stderr = done(launch(folder, ranks, f"mixed-{ranks}", epochs=2, over=over))
        assert code == 0, stderr
    one, two = (losses(folder / f"mixed-{ranks}") for ranks in (1, 2))
    assert [samples for samples, _ in one] == [samples for samples, _ in two]
    assert [loss for _, loss in one] == pytest.approx([loss for _, loss in two], abs=2e-4)
    assert [loss for _, loss in one] != pytest.approx([loss for _, loss in undisturbed[: len(one)]], abs=2e-3)


@pytest.mark.long
def test_when_a_rank_is_killed_the_others_end_within_a_minute_and_the_launcher_says_so(folder):
    process = launch(folder, 2, "rank-killed", epochs=400)
    wait_for_steps(folder / "rank-killed", process, 3)
    children = psutil.Process(process.pid).children()
    assert len(children) == 2
    victim = next(child for child in children if child.environ()["RANK"] == "1")
    killed = time.monotonic()
    victim.kill()
    code, stderr = done(process)
    assert time.monotonic() - killed < 60
    assert code == 1
    assert "rank 1 ended with SIGKILL" in stderr


@pytest.mark.long
def test_when_the_launcher_is_killed_the_ranks_save_and_end(folder):
    run = folder / "launcher-killed"
    process = launch(folder, 2, run.name, epochs=400)
    wait_for_steps(run, process, 3)
    children = psutil.Process(process.pid).children()
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE], "the ranks outlive their launcher"
    assert (run / "stopped.json").exists()
