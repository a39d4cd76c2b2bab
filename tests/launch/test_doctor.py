"""``patchmill doctor``: what would end a run is said before it starts, each with what to do."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from launch.doctor import diagnose
from launch.findings import Finding, of_all_hosts
from launch.local import free_port
from launch.machines import SLOW, ranks_together, software
from launch.plan import read_plan
from launch.rankprobe import check_card, pairings
from shards.cache import MARK
from shards.dataset import Dataset
from shards.droplist import write_exclude
from shards.errors import UserError
from tests.command import environment, patchmill, refused
from tests.disks import small_disk
from tests.images import build_image_set
from tests.shards.servers import serve_faults

PLAN = """
name = "x"
[[stage]]
name = "pretrain"
kind = "supervised"
ranks = {ranks}
[stage.set]
duration = "{duration}"
global_batch = {batch}
model = {{ name = "vit_ti16", depth = 2 }}
data = {{ train = "{train}", resolution = 32 }}
{more}
"""
RANK = {
    "host": "a", "versions": {"torch": "2.13.0"}, "device": "CPU", "free": 8e9, "clock": 1000.0, "product": 1e11,
    "reduce": 1e9, "links": [],
}  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return build_image_set(tmp_path_factory.mktemp("images"), per_class=8, shard_samples=4)


def plan(
    folder: Path, train: str | Path, more: str = "", ranks: int = 2, batch: int = 14, duration: str = "2 steps"
) -> Path:
    path = folder / "plan.toml"
    path.write_text(textwrap.dedent(PLAN.format(train=train, more=more, ranks=ranks, batch=batch, duration=duration)))
    return path


def found(folder: Path, *arguments, ranks: int = 2, hosts: str = "", **more) -> dict[str, tuple[str, str]]:
    """Return what is said of each thing, of a plan on so many ranks; ``hosts``: of each a letter."""
    checked = read_plan(plan(folder, *arguments, ranks=ranks, **more), folder / "runs")
    hosts = hosts or "a" * ranks
    started = [{**RANK, "host": host, "links": [((at + 1) % len(hosts), 1e9)]} for at, host in enumerate(hosts)]
    return {each.what.removeprefix("pretrain: "): each[1:3] for each in diagnose(checked, checked.stages, started)}


@pytest.mark.long
def test_a_plan_that_will_run_is_told_in_every_part(images, tmp_path):
    done = patchmill("doctor", plan(tmp_path, images), "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = {each["what"]: each for each in json.loads(done.stdout)}
    rest = told.keys() - {"matrix products", "links"}  # others may use these cores
    assert {told[what]["state"] for what in rest} == {"ok"}
    assert "torch 2." in told["versions"]["told"]
    assert told["ranks"]["told"].startswith("2 on ")
    assert "GFLOP/s a rank" in told["matrix products"]["told"]
    assert "GB/s a rank" in told["all-reduce"]["told"]
    assert "GB/s each way between two ranks, with no others to compare them with" in told["links"]["told"]
    assert told["pretrain: data"]["told"].startswith(f"24 samples in 6 shards of {images}, two read in ")
    assert told["pretrain: readers"]["told"] == f"each byte of {images} is read by 1 of 2 ranks"
    assert f"GB of {socket.gethostname()}" in told["pretrain: memory"]["told"]
    assert told["pretrain: checkpoints"]["told"].startswith("3 of 0.0")  # two are kept, and one is being written
    assert re.fullmatch(r"looked for \d+\.\d s", list(told.values())[-1]["told"])
    assert not (tmp_path / "runs").exists()  # nothing is left behind


@pytest.mark.long
def test_it_looks_with_the_ranks_that_are_asked_for(images, tmp_path):
    done = patchmill("doctor", plan(tmp_path, images, ranks=1), "--ranks", "2", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = {each["what"]: each["told"] for each in json.loads(done.stdout)}
    assert told["ranks"].startswith("2 on ")
    assert told["pretrain: readers"] == f"each byte of {images} is read by 1 of 2 ranks"
    wrong = refused(patchmill("doctor", "plan.toml", "--ranks", "3", cwd=tmp_path))
    assert "14 does not divide over 3 ranks" in wrong
    wrong = refused(patchmill("doctor", tmp_path, "--ranks", "2", cwd=tmp_path))
    assert "is a run, whose jobs have theirs; leave it out" in wrong


@pytest.mark.long
def test_of_a_plan_for_a_cluster_only_as_many_ranks_are_started_as_there_are_cores(images, tmp_path):
    """On a login node, that is: hundreds of processes of torch would take its memory, and its users' time."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})  # which what is started inherits
    try:
        done = patchmill("doctor", plan(tmp_path, images, ranks=16, batch=16), "--json", cwd=tmp_path)
    finally:
        os.sched_setaffinity(0, cores)
    assert done.returncode == 0, done.stderr
    told = {each["what"]: (each["state"], each["told"]) for each in json.loads(done.stdout)}
    assert told["ranks"][1].startswith("1 on ")
    assert told["pretrain: ranks"] == (
        "warning",
        "16 in the plan, and 1 were looked at, and memory is of so many; look again with all, as a step of its job",
    )  # fmt: skip


def test_what_will_not_run_is_told_on_one_page_and_ends_with_2(images, tmp_path):
    more = "checkpoint = { keep = 10_000_000 }"
    done = patchmill("doctor", plan(tmp_path, images, more, ranks=1), "--only", "pretrain", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: the plan will not run here: pretrain: checkpoints; see above what to do\n"
    assert "no room; make some, or give another --runs" in " ".join(done.stdout.split())


@pytest.mark.long
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
    assert "GB are estimated for 2 ranks on a, and there are 8.0" in told
    assert (
        "GB are estimated for 3 ranks on b, and there"
        in found(tmp_path, images, batch=140_000_000, ranks=4, hosts="abbb")["memory"][1]
    )


def test_memory_is_that_of_the_ranks_of_one_host(images, tmp_path):
    def told(hosts: str) -> str:
        return found(tmp_path, images, ranks=4, batch=4096, hosts=hosts)["memory"][1]

    together, apart = (float(told(hosts).split()[0]) for hosts in ("aaaa", "abcd"))
    assert together == pytest.approx(4 * apart, abs=0.3)  # of numbers with one place
    assert apart > 0
    state, said = found(tmp_path, images, ranks=4, batch=16, hosts="ab")["ranks"]
    assert state == "warning"
    assert said.startswith("4 in the plan, and 2 were looked at")


def test_all_checkpoints_that_are_kept_for_good_need_room(images, tmp_path):
    def count(more: str, duration: str = "20 steps") -> str:
        return found(tmp_path, images, f"checkpoint = {{ {more} }}", duration=duration)["checkpoints"][1].split()[0]

    assert count('every = "1 steps"') == "3"
    assert count('every = "1 steps", keep_every = "5 steps"') == "6"  # 5, 10, 15, 18, 19, and 20 that is being written
    assert count('every = "2 steps", keep_every = "1 steps"') == "10"  # each that there is
    assert count('every = "1 steps", keep_every = "30 steps"') == "3"


@pytest.mark.long
def test_what_one_host_alone_cannot_read_or_write_is_told_with_its_name(images, tmp_path):
    """Two hosts are two folders here, in which the same relative paths lead to other disks."""
    cached = 'cache = "scratch/cache", cache_bytes = "1 GB" }'
    shared = environment(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), LOCAL_RANK="0")
    ranks = []
    for rank, host in enumerate(("n1", "n2")):
        folder = tmp_path / host
        shutil.copytree(images, folder / "set")
        text = plan(folder, "set").read_text()
        (folder / "plan.toml").write_text(text.replace("resolution = 32 }", f"resolution = 32, {cached}"))
        if host == "n2":
            shard = folder / "set" / "shards" / "000005.tar"
            shard.write_bytes(shard.read_bytes()[:700])
            (folder / "scratch").touch()  # no folder
        command = [sys.executable, "-m", "launch.cli", "doctor", "plan.toml", "--json"]
        own = {**shared, "RANK": str(rank), "SLURMD_NODENAME": host}
        ranks.append(
            subprocess.Popen(command, cwd=folder, env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    (said, told), (nothing, other) = [rank.communicate(timeout=100) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], told + other
    assert nothing == ""
    wrong = {each["what"]: each["told"] for each in json.loads(said) if each["state"] == "error"}
    assert wrong.keys() == {"pretrain: data", "pretrain: cache"}
    assert wrong["pretrain: data"].startswith("on n2: ")
    assert "000005.tar" in wrong["pretrain: data"]
    assert wrong["pretrain: cache"].startswith("on n2: [Errno 20] Not a directory: ")
    assert not (tmp_path / "n1" / "scratch").exists()  # nothing is left behind


def test_what_all_hosts_find_is_told_once():
    ok, bad = Finding("a", "ok", "1 GB"), Finding("b", "error", "no room")
    low = Finding("a", "warning", "0 GB")
    told = of_all_hosts({"n1": [ok, bad], "n2": [ok, bad._replace(told="no room, or so")], "n3": [low], "n4": [low]})
    assert told == [ok, bad, Finding("a", "warning", "on n3, n4: 0 GB")]


def test_a_full_disk_takes_no_new_cache_and_leaves_an_old_one_as_it_is(images, tmp_path):
    with small_disk(tmp_path / "disk", "64k") as disk:
        train = f'{images}", cache_bytes = "1 GB", cache = "{disk}/cache'
        (disk / "full").write_bytes(bytes(2**15))
        state, told = found(tmp_path, train)["cache"]
        assert (state, "No space left" in told) == ("error", True)
        (disk / "cache").mkdir()
        (disk / "cache" / MARK).touch()
        assert found(tmp_path, train)["cache"] == (
            "warning", f"the disk of {disk}/cache is full, nothing more is kept there; make room"
        )  # fmt: skip
        (disk / "full").unlink()
        subprocess.run(["mount", "-o", "remount,size=1m", disk], timeout=10, check=True)
        assert found(tmp_path, train)["cache"] == ("ok", f"{disk}/cache can be written")


def test_what_a_stream_and_an_empty_data_set_lack_is_told(images, tmp_path):
    tars = f"{images}/shards/{{000000..000005}}.tar"
    with pytest.raises(UserError, match=r"does not tell its classes; set data\.val to a data set that has them"):
        found(tmp_path, tars)
    often = 'checkpoint = { every = "1 steps" }\nevaluate = { every = "1 steps" }'
    told = found(tmp_path, f'{tars}", val = "{images}', often)
    assert told["data"] == ("ok", f"a stream of 6 tars in {images}/shards")
    assert told["memory"][0] == told["checkpoints"][0] == "ok"
    state, said = found(tmp_path, f'{tars}", val = "{images}')["checkpoints"]
    assert (state, "nobody knows the epoch of a stream" in said) == ("error", True)

    everything = Dataset.open(images)
    rows = [(shard, index, "") for shard, size in enumerate(everything.shard_sizes) for index in range(size)]
    empty = build_image_set(tmp_path / "empty", per_class=8, shard_samples=4)
    write_exclude(empty, "all", rows)
    assert found(tmp_path, f'{empty}", exclude = "all')["data"] == (
        "error", f"drop list all leaves no sample of {empty}; take another, or none"
    )  # fmt: skip


def test_a_mirror_that_takes_nothing_is_an_error(images, tmp_path):
    more = 'checkpoint = { mirror = "http://127.0.0.1:9/there" }'
    state, told = found(tmp_path, images, more)["mirror"]
    assert state == "error"
    assert "give a bucket" in told
    (tmp_path / "there").mkdir()
    assert found(tmp_path, images, f'checkpoint = {{ mirror = "{tmp_path}/there" }}')["mirror"][0] == "ok"
    assert not list((tmp_path / "there").iterdir())


def test_a_card_beside_a_build_for_cpus_is_an_error(tmp_path, monkeypatch):
    assert {each.state for each in software(tmp_path / "none")} == {"ok"}
    (tmp_path / "nvidiactl").touch()
    states = {each.what: each for each in software(tmp_path / "nvidiactl")}
    assert states["devices"].state == "error"
    assert "is a build for CPUs; install torch with CUDA" in states["devices"].told
    check_card(tmp_path / "nvidiactl")  # alone it waits for nobody, and has all else told
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    check_card(tmp_path / "none")
    with pytest.raises(UserError, match=r"is a build for CPUs; .* says \(rank 1 on "):
        check_card(tmp_path / "nvidiactl")


def test_a_slow_rank_and_a_clock_that_is_wrong_are_named():
    ranks = [RANK, RANK, {**RANK, "host": "b", "product": SLOW * 0.9e11}, {**RANK, "host": "c", "clock": 900.0}]
    ranks = [{**rank, "links": [((number + step) % 4, 1e9) for step in (1, 3)]} for number, rank in enumerate(ranks)]
    told = {each.what: each for each in ranks_together(ranks)}
    assert told["ranks"].told == "4 on a, b, c, each on CPU"
    assert told["clocks"][1:] == ("warning", "that of c is 100 s behind that of a; set them by NTP", ())
    assert told["matrix products"].state == "warning"
    assert "but rank 2 on b 63 GFLOP/s; look at those machines" in told["matrix products"].told
    assert told["matrix products"].hosts == ("b",)
    assert told["all-reduce"].state == told["links"].state == "ok"
    assert not {"all-reduce", "links"} & {each.what for each in ranks_together([{**RANK, "reduce": None}])}
    strange = [RANK, {**RANK, "host": "b", "versions": {"torch": "2.12.0"}, "device": "H200"}]
    strange = [{**rank, "links": [(1 - number, 1e9)]} for number, rank in enumerate(strange)]
    told = {each.what: each for each in ranks_together(strange)}
    assert told["ranks"][1:3] == (
        "warning", "2 on a, b, each on CPU or H200: the slower ones hold all others up; take hosts that are alike"
    )  # fmt: skip
    assert told["versions"].state == "error"
    assert told["versions"].told.startswith("rank 1 on b has torch 2.12.0, rank 0 has others")


def test_a_rank_whose_links_are_all_slow_is_told_from_a_link_that_is():
    def told(*slow: tuple[int, int], ranks: int = 5) -> tuple:
        links = [[((number + step) % ranks, 1e9) for step in (1, ranks - 1)] for number in range(ranks)]
        links = [
            [(peer, 1e8 if (number, peer) in slow or (peer, number) in slow else speed) for peer, speed in each]
            for number, each in enumerate(links)
        ]
        ranks = [{**RANK, "host": host, "links": each} for host, each in zip("abcde"[:ranks], links, strict=True)]
        return next(each for each in ranks_together(ranks) if each.what == "links")[1:]

    assert told() == ("ok", "1 GB/s each way between two ranks, the slowest 1 GB/s", ())
    state, said, hosts = told((2, 3), (3, 4))
    assert (state, hosts) == ("warning", ("d",))
    assert "but rank 3 on d 0.1 GB/s; look at those machines" in said
    assert told((0, 1), (1, 2), ranks=3)[2] == ("b",)
    state, said, hosts = told((4, 0))
    assert (state, hosts) == ("warning", ())
    assert said.endswith("but 0.1 GB/s between rank 0 on a and rank 4 on e; look at what connects them")


@pytest.mark.parametrize("hosts", ["a", "aa", "ab", "aaa", "abc", "aabb", "aabbcc", "aaab", "abcde", "aaabbbccc"])
def test_each_rank_exchanges_with_two_others_and_with_one_at_a_time(hosts):
    together = list(pairings(list(hosts)))
    for pairs in together:
        ranks = [rank for pair in pairs for rank in pair]
        assert len(set(ranks)) == len(ranks)
    pairs = [pair for each in together for pair in each]
    assert len(set(pairs)) == len(pairs)
    degrees = [sum(rank in pair for pair in pairs) for rank in range(len(hosts))]
    assert degrees == [min(2, len(hosts) - 1)] * len(hosts)
    if len({hosts.count(host) for host in hosts}) == 1 < len(set(hosts)):  # all have a way out of their host
        assert all(hosts[one] != hosts[other] for one, other in pairs)
