import numpy as np
import pytest
import torch

from pipeline.config import TrainSettings
from pipeline.datasettings import DataSettings
from pipeline.images import to_model_input, training_input, training_transform
from pipeline.settings import check
from shards.augment import InceptionCrop, ResizeCrop
from shards.batch import Batch
from shards.errors import UserError
from shards.mixup import mixup_weights
from shards.order import rank_positions
from shards.randaugment import RandAugment

CPU = torch.device("cpu")


def settings(augment) -> TrainSettings:
    data = {"train": "-", "augment": augment}
    return check(TrainSettings, {"duration": "1 step", "global_batch": 1, "data": data, "model": {"name": "a"}}, "test")


def batch_of(positions) -> Batch:
    """Pixels and labels that follow from the positions."""
    images = np.stack(
        [np.random.default_rng(p).integers(0, 256, (4, 5, 3), dtype=np.uint8) for p in positions.tolist()]
    )
    return Batch(images, positions % 7, positions)


def test_pixels_become_the_floats_of_torch_in_the_same_order():
    images = np.random.default_rng(0).integers(0, 256, (3, 5, 7, 3), dtype=np.uint8)
    images[0, :, :, 0].flat[:2] = 0, 255
    kept = images.copy()
    want = torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)
    for part, wanted in ((images, want), (images[:0], want[:0]), (images[::2, 1:], want[::2, :, 1:])):
        got = to_model_input(part, CPU)
        assert got.dtype == torch.float32
        assert got.equal(wanted)
        assert got.stride() == wanted.contiguous(memory_format=torch.channels_last).stride() or not len(part)
    assert (images == kept).all()
    assert want.min() == -1
    assert want.max() == 1


@pytest.mark.parametrize("augment", ["medium1", "strong2"])
def test_rows_are_mixed_with_their_partners_on_any_ranks(augment):
    mine = settings(augment)
    batch = batch_of(np.arange(24, 48))
    keep = mixup_weights(batch.positions, 31, mine.seed, mine.data.mixup_alpha).astype(np.float64)
    partner = [*range(12, 24), *range(12)]
    pixels = batch.images.transpose(0, 3, 1, 2) / 127.5 - 1
    want = keep[:, None, None, None] * pixels + (1 - keep)[:, None, None, None] * pixels[partner]
    one_hot = np.eye(7)[batch.labels]
    shares = keep[:, None] * one_hot + (1 - keep)[:, None] * one_hot[partner]

    whole = training_input(batch, mine, 31, 7, CPU)
    assert np.abs(whole[0].numpy() - want).max() < 1e-6
    assert np.abs(whole[1].numpy() - shares).max() < 1e-6
    assert 0.5 < keep.mean() < 0.95
    for world_size in (2, 3, 4, 6, 12):
        for rank in range(world_size):
            part = training_input(batch_of(rank_positions(24, 24, rank, world_size)), mine, 31, 7, CPU)
            assert part[0].equal(whole[0][rank::world_size])
            assert part[1].equal(whole[1][rank::world_size])


@pytest.mark.parametrize("augment", ["inception", "resize_crop", "light1"])
def test_without_mixup_labels_stay_indices(augment):
    batch = batch_of(np.arange(3))
    images, labels = training_input(batch, settings(augment), 31, 7, CPU)
    assert labels.tolist() == [0, 1, 2]
    assert np.abs(images.numpy() - (batch.images.transpose(0, 3, 1, 2) / 127.5 - 1)).max() < 1e-6


def test_transforms_are_those_that_settings_name():
    def of(augment):
        return training_transform(DataSettings(train="-", resolution=32, augment=augment, crop_area=(0.2, 0.9)))

    crop = InceptionCrop(32, (0.2, 0.9))
    assert of("inception") == crop
    assert of("resize_crop") == ResizeCrop(32)
    assert not crop.shrink
    assert of("light1") == RandAugment(crop, 2, 0)
    assert of("medium2") == RandAugment(crop, 2, 15)
    resized = DataSettings(train="-", resolution=32, augment="resize_crop", resize=40)
    assert training_transform(resized) == ResizeCrop(32, larger=40)
    shrinking = DataSettings(train="-", augment="light1", scaled_decoding=True)
    assert training_transform(shrinking) == RandAugment(InceptionCrop(224, shrink=True), 2, 0)


def test_mixup_is_that_of_the_augmentation_or_what_is_set():
    def alpha(**data):
        return DataSettings(train="-", **data).mixup_alpha

    assert [alpha(augment=augment) for augment in ("inception", "light1", "light2", "strong2")] == [0, 0, 0.2, 0.8]
    assert alpha(augment="resize_crop", mixup=0.1) == 0.1
    assert alpha(augment="strong2", mixup=0.0) == 0


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"augment": "inception", "resize": 256}, "resize is of augment 'resize_crop', and augment is 'inception'"),
        ({"augment": "resize_crop", "resize": 200}, "the resolution 224 cannot be cut from 200; make resize larger"),
        ({"mixup": -1}, r"setting data\.mixup = -1 in test does not fit"),
    ],
)
def test_images_that_cannot_be_made_are_refused(data, words):
    with pytest.raises(UserError, match=words):
        check(
            TrainSettings,
            {"duration": "1 step", "global_batch": 1, "data": {"train": "-", **data}, "model": {"name": "a"}},
            "test",
        )
