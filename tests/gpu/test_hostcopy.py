"""Saving on a real device, beside the loop or not: what is written is what was there when it began."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from pipeline.checkpoint import Checkpoint
from pipeline.config import TrainSettings
from pipeline.hostcopy import HostCopy
from pipeline.saver import Saver
from pipeline.settings import check

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

COUNT = 2**24


def test_weights_that_change_right_after_the_copy_are_copied_as_they_were():
    live, copy = [torch.zeros(COUNT, device="cuda") for _ in range(4)], HostCopy()
    for step in range(1, 4):
        torch.cuda._sleep(200_000_000)  # cycles, some 100 ms: the step below has yet to run when the copy begins
        for each in live:
            each.fill_(step)
        taken = copy.take([("weight", str(number), 0, each) for number, each in enumerate(live)])
        for each in live:  # the next step
            each.fill_(-1)
        assert [(float(each.min()), float(each.max())) for *_, each in taken] == [(step, step)] * len(live)
        assert all(each.is_pinned() for *_, each in taken)


def test_memory_that_was_reserved_in_a_thread_is_pinned_and_used():
    live, copy = torch.arange(float(COUNT), device="cuda"), HostCopy()
    with ThreadPoolExecutor(1) as thread:
        thread.submit(copy.reserve, COUNT, live.device).result()
    (slab,) = copy._slabs
    ((*_, taken),) = copy.take([("weight", "a", 0, live)])
    assert taken.is_pinned()
    assert taken.data_ptr() == slab.data_ptr()
    assert torch.equal(taken, live.cpu())


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_save_holds_what_was_there_when_it_began(tmp_path, alone, asynchronous):
    settings = check(TrainSettings, {
        "duration": "9 steps", "global_batch": 8, "data": {"train": "-"}, "model": {"name": "vit_b16"},
        "checkpoint": {"asynchronous": asynchronous},
    }, "test")  # fmt: skip
    live = torch.zeros(COUNT, device="cuda")
    with Saver(tmp_path, {"a": (COUNT,)}, settings) as saver:
        for samples in (8, 16, 24):
            torch.cuda._sleep(200_000_000)
            live.fill_(samples)
            path = saver.save(samples, [("weight", "a", 0, live)], {})
            live.fill_(-1)
            saver.wait()
            found = Checkpoint(path)
            found.verify()
            assert found.read("weight", "a", 0, COUNT).unique().tolist() == [samples]
