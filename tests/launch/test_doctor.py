"""``patchmill doctor``: what would end a run is said before it starts, each with what to do."""

import json
import textwrap
from pathlib import Path

import pytest

from launch.doctor import SLOW, diagnose, ranks_together, software
from launch.plan import read_plan
from tests.command import patchmill
from tests.images import build_image_set
from tests.shards.servers import serve_faults

PLAN = """
name = "x"
[[stage]]
name = "pretrain"
kind = "supervised"
ranks = {ranks}
[stage.set]
duration = "2 steps"
global_batch = {batch}
model = {{ name = "vit_ti16", depth = 2 }}
data = {{ train = "{train}", resolution = 32 }}
{more}
"""
RANK = {"host": "a", "clock": 1000.0, "device": "CPU", "product": 1e11, "reduce": 1e9}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return build_image_set(tmp_path_factory.mktemp("images"), per_class=8, shard_samples=4)


def plan(folder: Path, train: str | Path, more: str = "", ranks: int = 2, batch: int = 14) -> Path:
    path = folder / "plan.toml"
    path.write_text(textwrap.dedent(PLAN.format(train=train, more=more, ranks=ranks, batch=batch)))
    return path


def found(folder: Path, *arguments, ranks: int = 2, **more) -> dict[str, tuple[str, str]]:
    """Return what is said of each thing, of a plan on so many ranks."""
    checked = read_plan(plan(folder, *arguments, ranks=ranks, **more), folder / "runs")
    return {each.what.removeprefix("pretrain: "): each[1:] for each in diagnose(checked, [RANK] * ranks)}


def test_a_plan_that_will_run_is_told_in_every_part(images, tmp_path):
    done = patchmill("doctor", plan(tmp_path, images), "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = {each["what"]: each for each in json.loads(done.stdout)}
    rest = told.keys() - {"matrix products", "all-reduce"}  # others may use these cores
    assert {told[what]["state"] for what in rest} == {"ok"}
    assert "torch 2." in told["versions"]["told"]
    assert told["ranks"]["told"].startswith("2 on ")
    assert "GFLOP/s a rank" in told["matrix products"]["told"]
    assert "GB/s a rank" in told["all-reduce"]["told"]
    assert told["pretrain: data"]["told"].startswith(f"24 samples in 6 shards of {images}, two read in ")
    assert told["pretrain: readers"]["told"] == f"each byte of {images} is read by 1 of 2 ranks"
    assert "GB of this machine" in told["pretrain: memory"]["told"]
    assert told["pretrain: checkpoints"]["told"].startswith("3 of 0.0")  # two are kept, and one is being written
    assert not (tmp_path / "runs").exists()  # nothing is left behind


def test_what_will_not_run_is_told_on_one_page_and_ends_with_2(images, tmp_path):
    more = "checkpoint = { keep = 10_000_000 }"
    done = patchmill("doctor", plan(tmp_path, images, more), cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: the plan will not run here: pretrain: checkpoints; see above what to do\n"
    assert "no room; make some, or give another --runs" in " ".join(done.stdout.split())


def test_a_shard_that_cannot_be_read_is_an_error(images, tmp_path):
    broken = build_image_set(tmp_path / "broken", per_class=8, shard_samples=4)
    shard = broken / "shards" / "000005.tar"
    shard.write_bytes(shard.read_bytes()[:700])
    state, told = found(tmp_path, broken)["data"]
    assert state == "error"
    assert "000005.tar" in told
    state, told = found(tmp_path, "http://127.0.0.1:9/none")["data"]
    assert state == "error"
    assert "127.0.0.1:9" in told


def test_ranks_that_read_the_same_bytes_over_a_network_are_a_warning(images, tmp_path):
    with serve_faults(images) as server:
        told = found(tmp_path, server.url, ranks=7)
    assert told["readers"][0] == "warning"
    assert "is read by 7 of 7 ranks; take a number of ranks that divides" in told["readers"][1]
    assert found(tmp_path, images, ranks=7)["readers"][0] == "ok"  # of a local file it costs nothing


def test_too_little_memory_is_an_error_with_both_numbers(images, tmp_path):
    state, told = found(tmp_path, images, batch=140_000_000)["memory"]
    assert state == "error"
    assert "GB are estimated for 2 ranks on this machine, and there are" in told


def test_a_mirror_that_takes_nothing_is_an_error(images, tmp_path):
    more = 'checkpoint = { mirror = "http://127.0.0.1:9/there" }'
    state, told = found(tmp_path, images, more)["mirror"]
    assert state == "error"
    assert "give a bucket" in told
    (tmp_path / "there").mkdir()
    assert found(tmp_path, images, f'checkpoint = {{ mirror = "{tmp_path}/there" }}')["mirror"][0] == "ok"
    assert not list((tmp_path / "there").iterdir())


def test_a_card_beside_a_build_for_cpus_is_an_error(tmp_path):
    assert {each.state for each in software(tmp_path / "none")} == {"ok"}
    (tmp_path / "nvidiactl").touch()
    states = {each.what: each for each in software(tmp_path / "nvidiactl")}
    assert states["devices"].state == "error"
    assert "is a build for CPUs; install torch with CUDA" in states["devices"].told


def test_a_slow_rank_and_a_clock_that_is_wrong_are_named():
    ranks = [RANK, RANK, {**RANK, "host": "b", "product": SLOW * 0.9e11}, {**RANK, "host": "c", "clock": 900.0}]
    told = {each.what: each for each in ranks_together(ranks)}
    assert told["ranks"].told == "4 on a, b, c, each on CPU"
    assert told["clocks"][1:] == ("warning", "that of c is 100 s behind that of a; set them by NTP")
    assert told["matrix products"].state == "warning"
    assert "but rank 2 on b 63 GFLOP/s; look at those machines" in told["matrix products"].told
    assert told["all-reduce"].state == "ok"
    assert "all-reduce" not in {each.what for each in ranks_together([{**RANK, "reduce": None}])}
