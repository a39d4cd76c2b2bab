"""The device prefetcher on a real device: same values, nothing overwritten while in use, copies beside the compute."""

import numpy as np
import pytest
import torch

from pipeline.images import to_model_input
from pipeline.prefetch import pinned_array, prefetched
from shards.augment import InceptionCrop
from shards.batch import Batch
from shards.build import build
from shards.dataset import Dataset
from shards.loader import Loader
from tests.shards.images import make_source

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

STEPS, SHAPE = 40, (64, 96, 96, 3)


def prepare(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    device = torch.device("cuda")
    return to_model_input(batch.images, device), torch.from_numpy(batch.labels).to(device)


def batches():
    """Batches of one colour each, in pinned memory that goes back to its pool as soon as the prefetcher lets go."""
    for step in range(STEPS):
        images = pinned_array(SHAPE)
        images[:] = step
        yield Batch(images, np.full(SHAPE[0], step), np.arange(SHAPE[0]))


def test_a_busy_model_still_sees_every_batch_whole():
    device = torch.device("cuda")
    seen = []
    for images, labels in prefetched(batches(), prepare, device):
        torch.cuda._sleep(20_000_000)  # cycles, some 10 ms: the kernels below wait while the next batches are copied
        seen.append(torch.stack([images.min(), images.max(), labels.min().float(), labels.max().float()]))
        del images, labels  # their memory is free for the prefetcher, the kernels above still wait
    assert len(seen) == STEPS
    for step, (low, high, least, most) in enumerate(torch.stack(seen).tolist()):
        assert low == pytest.approx(step / 127.5 - 1, abs=1e-6)
        assert low == high
        assert least == most == step


def test_the_loader_makes_its_batches_in_pinned_memory_and_values_are_those_of_the_cpu(tmp_path):
    build(make_source(tmp_path / "source", classes=2, each=20), tmp_path / "set", shard_samples=13, workers=1)

    def stream():
        return iter(
            Loader(Dataset.open(tmp_path / "set"), global_batch=12, transform=InceptionCrop(8), allocate=pinned_array)
        )

    plain = stream()
    ahead = prefetched(stream(), prepare, torch.device("cuda"))
    for _ in range(6):
        want, (images, labels) = next(plain), next(ahead)
        assert torch.from_numpy(want.images).is_pinned()
        # The device multiplies by 1/127.5 where the CPU divides.
        assert torch.allclose(images.cpu(), to_model_input(want.images, torch.device("cpu")), rtol=0, atol=1e-6)
        assert labels.tolist() == want.labels.tolist()
    ahead.close()
    plain.close()


def test_batches_are_copied_while_the_model_works():
    ahead = prefetched(batches(), prepare, torch.device("cuda"))
    for _ in range(4):
        next(ahead)  # until both pools have memory: getting it from the driver waits for the device
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second on the model's stream
    model_is_done = torch.cuda.current_stream().record_event()
    next(ahead)
    images, _ = next(ahead)  # its copy began after the model did
    other = torch.cuda.Stream()
    with torch.cuda.stream(other):
        assert float(images.min()) == pytest.approx(5 / 127.5 - 1, abs=1e-6)
    assert not model_is_done.query()
    torch.cuda.synchronize()
    ahead.close()
