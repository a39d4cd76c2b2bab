import pytest

from pipeline.config import TrainSettings
from pipeline.data import open_data
from pipeline.settings import check
from shards.build import build
from shards.dataset import Dataset
from shards.errors import UserError
from shards.loader import Loader
from shards.stream import StreamLoader
from tests.shards.datasets import Made, plain, write_dataset
from tests.shards.images import make_source


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    build(make_source(folder / "source", classes=2, each=20), folder / "set", shard_samples=13, workers=1)
    return folder


def settings(folder, length="10 steps", **data) -> TrainSettings:
    table = {
        "duration": length, "global_batch": 8, "model": {"name": "vit_b16"}, "checkpoint": {"every": "5 steps"},
        "evaluate": {"every": "5 steps"},
        "data": {"train": f"{folder}/set/shards/*.tar", "val": f"{folder}/set", "resolution": 8, **data},
    }  # fmt: skip
    return check(TrainSettings, table, "test")


def test_tars_without_a_manifest_are_a_stream_whose_classes_are_those_of_the_held_out_set(folder, tmp_path):
    data = open_data(settings(folder), tmp_path, 8)
    assert isinstance(data.loader, StreamLoader)
    assert data.classes == ["class.0", "class.1"]
    assert data.epoch is None
    assert data.schedule.total == 80
    assert len(list(data.loader)) == 10
    with pytest.raises(UserError, match=r"does not tell its classes; set data.val"):
        open_data(settings(folder, val=None), tmp_path, 8)
    with pytest.raises(UserError, match=r"'2 epochs': nobody knows the epoch of a stream; give duration, .* steps"):
        open_data(settings(folder, length="2 epochs"), tmp_path, 8)
    pipe = {"train": f"pipe:cat {folder}/set/shards/000000.tar"}
    with pytest.raises(UserError, match=r"would run a command; .* set data.allow_pipe = true"):
        open_data(settings(folder, **pipe), tmp_path, 8)
    assert len(list(open_data(settings(folder, **pipe, allow_pipe=True), tmp_path, 8).loader)) == 10


def test_a_data_set_is_known_by_its_length(alone, folder, tmp_path):
    data = open_data(settings(folder, train=f"{folder}/set", length="2 epochs"), tmp_path, 8)
    assert isinstance(data.loader, Loader)
    assert data.epoch == 40
    assert data.schedule.total == 80
    assert len(list(data.loader)) == 10


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"exclude": "v1"}, r"exclude is of a data set with a manifest, and .*\.tar' is a stream; unset it"),
        ({"subset": 9}, r"subset is of a data set with a manifest, and .*\.tar' is a stream; unset it"),
        ({"train": [{"url": "a", "weight": 1}, {"url": "-", "weight": 1}]}, "the stream '-' cannot be one of several"),
    ],
)
def test_what_a_stream_cannot_have_is_found_with_the_settings(folder, data, words):
    with pytest.raises(UserError, match=words):
        settings(folder, **data)


def test_sets_without_weights_are_drawn_by_size_every_image_as_often(alone, folder, tmp_path):
    """As the final runs of fine-tuning take the dev split's images back."""
    source = make_source(tmp_path / "source", classes=2, each=20)
    build(source, tmp_path / "parts", shard_samples=13, workers=1, split={"dev": 0.2})
    urls = [f"{tmp_path}/parts/{part}" for part in ("train", "dev")]
    data = open_data(settings(folder, train=[{"url": url} for url in urls], length="2 epochs"), tmp_path, 8)
    sets = [Dataset.open(url) for url in urls]
    sizes = [len(each) for each in sets]
    assert (data.epoch, sum(sizes)) == (40, 40)
    assert sizes[1] != sizes[0]
    assert (data.loader.order.quotas / data.loader.order.period).tolist() == [size / 40 for size in sizes]


def test_a_set_too_small_to_be_drawn_by_size_is_told_in_sizes(alone, tmp_path):
    classes = ["a"]
    many = [[Made(f"k{shard}/{n}", plain("red")) for n in range(100)] for shard in range(11)]
    large = write_dataset(tmp_path / "large", classes, many)
    small = write_dataset(tmp_path / "small", classes, [[Made("k", plain("red"))]])
    said = (
        r"small has 1 of 1,101 images, and drawn by size a set must have 1 of 1024; give each a weight, or leave it out"
    )
    sources = [{"url": str(each)} for each in (large, small)]
    with pytest.raises(UserError, match=said):
        open_data(settings(tmp_path, train=sources, val=str(small)), tmp_path, 8)
    weighted = [{**each, "weight": weight} for each, weight in zip(sources, (1023, 1), strict=True)]
    assert open_data(settings(tmp_path, train=weighted, val=str(small)), tmp_path, 8).epoch == 1101
