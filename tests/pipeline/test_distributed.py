"""The cores and the card that a rank has."""

import datetime
import os
from pathlib import Path

import pytest
import torch.distributed as dist

from pipeline import distributed
from shards.errors import UserError
from tests.ranks import run_on_ranks

WORKER = Path(__file__).parent / "worker_cores.py"


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_that_may_use_all_cores_share_them(ranks):
    cores = len(os.sched_getaffinity(0))
    assert run_on_ranks(WORKER, ranks) == [max(1, cores // ranks)] * ranks


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="wants two cores")
def test_ranks_that_are_bound_have_the_cores_that_they_are_bound_to():
    """As Slurm binds tasks: dividing one's own cores by the ranks would leave most of them idle."""
    first, second, *others = sorted(os.sched_getaffinity(0))
    assert run_on_ranks(WORKER, 2, first, second) == [1, 1]
    both = ",".join(map(str, (first, second)))
    assert run_on_ranks(WORKER, 1, both) == [2]
    if len(others) > 1:
        assert run_on_ranks(WORKER, 2, both, ",".join(map(str, others[:2]))) == [2, 2]


@pytest.mark.parametrize(
    ("cards", "local", "taken"),
    [(4, "3", "3"), (1, "0", "0"), (1, "3", "0")],  # the last: `srun --gpus-per-task=1` shows each rank its own
)
def test_a_rank_that_sees_one_card_alone_has_that_one(cards, local, taken, monkeypatch):
    for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"):  # of which DeepSpeed wants to know that they are the same
        monkeypatch.setenv(name, local)
    distributed.settle_on_card(cards)
    assert [os.environ[name] for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")] == [taken, taken]


def test_a_lone_process_is_no_local_rank(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    distributed.settle_on_card(1)
    distributed.settle_on_card(2)
    assert "LOCAL_RANK" not in os.environ


def test_more_ranks_than_cards_are_one_line(monkeypatch):
    monkeypatch.setenv("RANK", "6")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match=r"^rank 6 is number 2, from 0, of .*, and sees 2 GPUs; start one rank a GPU"):
        distributed.settle_on_card(2)


@pytest.mark.parametrize("kind", ["tcp", "hash"])
def test_two_ranks_with_one_card_are_one_line(kind, monkeypatch):
    """On a machine with a single one each rank sees it alone, too, and NCCL would say much, and late."""
    limit = datetime.timedelta(seconds=20)
    plain = dist.HashStore() if kind == "hash" else dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=limit)
    store = dist.PrefixStore("default_pg", plain)
    for rank, card in enumerate(("GPU-a", "GPU-b")):
        monkeypatch.setenv("RANK", str(rank))
        distributed.claim_card(card, store)
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(UserError, match=r"^ranks 1 and 2 on .* have the same GPU \(GPU-b\); start one rank a GPU"):
        distributed.claim_card("GPU-b", store)
