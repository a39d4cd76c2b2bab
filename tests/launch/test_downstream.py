"""What is done with a trained model, through the command line: ObjectNet's protocol, few-shot, and what cannot be."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from launch.cli import app
from launch.cli_options import shown as as_shown
from pipeline.models import create_model
from pipeline.weights import write_weights
from shards.augment import CenterCrop, ResizeCenterCrop
from shards.dataset import Dataset
from shards.decode import decode
from shards.errors import UserError
from shards.sources.objectnet import WNIDS
from tests.command import TRAIN, patchmill, refused
from tests.images import make_image_folder
from tests.shards.datasets import Made, plain, write_dataset
from tests.shards.sources.test_imagenet import TRUTH, write_devkit, write_val
from tests.shards.sources.test_official import objectnet, pets

SMALL = {"name": "vit_ti8", "embed_dim": 24, "num_heads": 3, "depth": 1, "image_size": 16}
SEEDS = (0, 1, 2)
SHOTS = (1, 5, 10, 25)
CLASSES = ("blue", "green", "red")


def write_model(path: Path, classes: list[str], boost: dict[int, float]) -> torch.nn.Module:
    """Write a random model, with a head that says something; ``boost`` what it likes to say."""
    model = create_model(**SMALL, num_classes=len(classes), seed=3).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        model.head.weight.normal_(0, 1, generator=generator)
        for output, more in boost.items():
            model.head.bias[output] += more
    write_weights(path, model.state_dict(), {"model": SMALL | {"num_classes": len(classes)}, "classes": classes})
    return model


def mistake(*arguments: object) -> str:
    """Return the one line of an error of a command that starts no ranks: run here, which is quicker."""
    result = CliRunner().invoke(app, [str(each) for each in arguments])
    assert isinstance(result.exception, UserError), result.exception
    assert result.exception.exit_code == 2
    assert result.stdout == ""
    assert "\n" not in str(result.exception)
    return str(result.exception)


def pixels_of(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Sets of images, and a model of their classes."""
    folder = tmp_path_factory.mktemp("data")
    make_image_folder(folder / "images", per_class=40)
    done = patchmill("shards", "build", "images", "set", "--split", "val=0.3", "--workers", "1", cwd=folder)
    assert done.returncode == 0, done.stderr
    write_model(folder / "w.safetensors", list(CLASSES), {})
    (folder / "c.toml").write_text(TRAIN.format(train="set/train", val="set/val"))
    return folder


@pytest.mark.long
def test_objectnet_is_scored_as_its_authors_do(tmp_path):
    """Their code takes the five best of all 1,000, and calls each by ObjectNet's class or by none."""
    source = objectnet(tmp_path / "objectnet-1.0", each=8, side=(40, 30))
    done = patchmill("shards", "build", source, "set", "--workers", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "left out: 2 classes that ImageNet does not have" in done.stderr
    liked = {530: 19.0, 559: 21.0, 703: 20.0, 134: 17.0, 0: 15.0}
    model = write_model(tmp_path / "w.safetensors", WNIDS.read_text().split(), liked)

    of_objectnet = {409: "alarm_clock", 530: "alarm_clock", 423: "chair", 559: "chair", 765: "chair", 703: "bench"}
    best, five = [], []
    for path in sorted(source.glob("images/*/*.png")):
        if path.parent.name in of_objectnet.values():
            image = np.asarray(Image.open(path))[2:-2, 2:-2]
            with torch.no_grad():
                ranked = model(pixels_of(CenterCrop(16, 17)(image, (0, 0, 0))))[0].topk(5).indices.tolist()
            told = [of_objectnet.get(output) for output in ranked]
            best.append(told[0] == path.parent.name)
            five.append(path.parent.name in told)
    command = ("evaluate", "w.safetensors", "set", "--view", "center_crop", "--short", "17", "--out", "e", "--json")
    found = json.loads(patchmill(*command, cwd=tmp_path).stdout)
    assert (found["images"], "unlabelled" in found) == (24, False)
    assert found["top1"] == pytest.approx(np.mean(best))
    assert found["top5"] == pytest.approx(np.mean(five))
    assert 0 < np.mean(best) < np.mean(five) < 1


def by_numpy(x: np.ndarray, labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray, shots: int, seed: int):
    """The few-shot accuracy by solving the stacked problem [x; sqrt(l2) I] w = [y; 0]: no normal equations."""
    rng = np.random.default_rng(seed)
    chosen = np.concatenate([rng.permutation(np.flatnonzero(labels == c))[:shots] for c in range(len(CLASSES))])
    x, labels = x[chosen].astype(np.float64), labels[chosen]
    mean, std = x.mean(0), x.std(0) + 1e-5
    x, test = ((np.insert((each - mean) / std, each.shape[1], 100.0, axis=1)) for each in (x, test.astype(np.float64)))
    y = np.where(labels[:, None] == np.arange(len(CLASSES)), 1.0, -1.0)
    stacked = np.concatenate([x, 32.0 * np.eye(x.shape[1])])
    weights = np.linalg.lstsq(stacked, np.concatenate([y, np.zeros((x.shape[1], y.shape[1]))]), rcond=None)[0]
    return ((test @ weights).argmax(1) == test_labels).mean()


def noise(label: int, rng: np.random.Generator) -> bytes:
    """Return an image that is hard to tell: noise with a little of its class's colour."""
    pixels = rng.integers(0, 256, (16, 16, 3)).astype(float)
    pixels[..., label] += 12
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def test_few_shot_of_a_checkpoint_is_what_numpy_finds(data, tmp_path):
    """Of 1, 5, 10 and 25 shots and three seeds: 3 and 15 samples are fewer than the 25 unknowns, 30 and 75 more."""
    model = create_model(**SMALL, num_classes=3, seed=3).eval()
    found, rng = {}, np.random.default_rng(0)
    for part, each in (("train", 30), ("val", 40)):
        labels = rng.permutation(np.repeat(np.arange(3), each)).tolist()
        made = [Made(f"k{place}", noise(label, rng), (label,)) for place, label in enumerate(labels)]
        dataset = Dataset.open(write_dataset(tmp_path / part, list(CLASSES), [made[:50], made[50:]]))
        samples = [dataset[place] for place in range(len(dataset))]
        rows = []
        for each in samples:
            with torch.no_grad():
                image = ResizeCenterCrop(16)(decode(each.image, each.key), (0, 0, 0))
                rows.append(model.features(pixels_of(image))[0].numpy())
        found[part] = np.stack(rows), np.array([each.labels[0] for each in samples])
    command = ("fewshot", data / "w.safetensors", "train", "val", "--json")
    told = json.loads(patchmill(*command, cwd=tmp_path).stdout)["features"]
    for shots in SHOTS:
        expected = [by_numpy(*found["train"], *found["val"], shots, seed) for seed in SEEDS]
        assert told["seeds"][str(shots)] == pytest.approx(expected, abs=1e-6)
        assert told["shots"][str(shots)] == pytest.approx(np.mean(expected), abs=1e-6)
    assert 1 / 3 < told["shots"]["1"] < told["shots"]["25"] < 1
    shown = as_shown(told).splitlines()
    assert shown[0] == "shots " + "  ".join(f"{n}: {told['shots'][str(n)]:.4g}" for n in SHOTS)


def test_labels_that_do_not_match_the_head(data, tmp_path):
    animals = write_dataset(tmp_path / "animals", ["cat", "dog"], [[Made("k", plain("red"))]])
    line = mistake("evaluate", data / "w.safetensors", animals)
    assert "the model knows 3 classes (blue, green, red), " in line
    assert "animals has 2 classes (cat, dog); evaluate on the data it was trained for" in line
    model = SMALL | {"num_classes": 0}
    write_weights(tmp_path / "f.safetensors", create_model(**model).state_dict(), {"model": model, "classes": []})
    line = mistake("evaluate", tmp_path / "f.safetensors", data / "set/val")
    assert "the model has no head of classes; fine-tune it, or see what its features are worth" in line
    line = refused(patchmill("train", "c.toml", f"data.val={animals}", "--out", tmp_path / "run", cwd=data))
    assert "animals has other classes than" in line
    assert not list(tmp_path.glob("run/metrics.jsonl"))


def test_a_real_file_of_the_wrong_length(tmp_path):
    val = write_val(tmp_path / "ILSVRC2012_img_val.tar")
    write_devkit(tmp_path / "ILSVRC2012_devkit_t12.tar.gz", TRUTH)
    (tmp_path / "real.json").write_text(json.dumps([[0]] * 5))
    line = refused(patchmill("shards", "build", val, "out", "--real", "real.json", cwd=tmp_path))
    assert "real labels real.json are of 5 images, and the devkit's of 6; get real.json again" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_a_class_with_fewer_images_than_shots(data, tmp_path):
    sets = (data / "w.safetensors", data / "set/train", data / "set/val")
    line = refused(patchmill("fewshot", *sets, "--shots", "5,40", cwd=tmp_path))
    assert "training images for 40 shots; ask for fewer" in line
    probe = f"probe={{train='{data}/set/train', test='{data}/set/val', shots=[40]}}"
    line = refused(patchmill("train", "c.toml", probe, "--out", tmp_path / "run", cwd=data))
    assert "training images for 40 shots; ask for fewer" in line
    assert not list(tmp_path.glob("run/metrics.jsonl"))


def test_an_empty_split(data, tmp_path):
    line = refused(patchmill("shards", "build", data / "images", "out", "--split", "val=0.0001", cwd=tmp_path))
    assert "--split leaves no image for val out of 120; choose other shares" in line
    (pets(tmp_path / "pets") / "annotations/test.txt").write_text("")
    assert "pets has no images in its part test; get it again" in mistake(
        "shards", "build", tmp_path / "pets", tmp_path / "out"
    )
    assert not (tmp_path / "out").exists()
    empty = write_dataset(tmp_path / "empty", list(CLASSES), [[]])
    assert "empty has no images; build it of some" in mistake("evaluate", data / "w.safetensors", empty)
    bare = write_dataset(tmp_path / "bare", list(CLASSES), [[Made("k", plain("red"), ())]])
    said = "bare has a label; there is nothing to score"
    assert said in mistake("evaluate", data / "w.safetensors", bare)
    assert said in refused(patchmill("train", "c.toml", f"data.val={bare}", "--out", tmp_path / "run", cwd=data))
    assert not list(tmp_path.glob("run/metrics.jsonl"))


def test_the_middle_is_cut_of_something_larger(data):
    command = ("evaluate", data / "w.safetensors", data / "set/val", "--short", "12")
    assert "--short 12 is of --view center_crop, and the view is resize" in mistake(*command)
    line = mistake(*command, "--view", "center_crop")
    assert "--short 12 is less than the 16 pixels that the model sees; give 16 or more" in line


@pytest.mark.long
def test_where_nothing_can_be_written_is_told_before_the_evaluation(data, tmp_path):
    (tmp_path / "file").write_text("")
    for out, why in (("file", "File exists"), ("file/below", "Not a directory")):
        command = ("evaluate", data / "w.safetensors", data / "set/val", "--out", out)
        line = refused(patchmill(*command, cwd=tmp_path))
        assert f"cannot write into {out}: {why}; give another folder, or make room" in line


def test_what_an_evaluation_found_is_told_although_it_cannot_be_written(data, tmp_path):
    (tmp_path / "out/predictions.parquet").mkdir(parents=True)
    done = patchmill("evaluate", data / "w.safetensors", data / "set/val", "--out", "out", "--json", cwd=tmp_path)
    assert done.returncode == 2
    assert json.loads(done.stdout)["images"] == len(Dataset.open(data / "set/val"))
    (line,) = done.stderr.strip().splitlines()
    assert line == "error: cannot write into out: Is a directory; give another folder, or make room"
