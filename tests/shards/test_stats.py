"""Statistics against counts made from the samples themselves."""

import json
import re
from collections import Counter
from dataclasses import asdict, replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from typer.testing import CliRunner

from launch.cli import app
from shards import repeats as repeats_module
from shards.dataset import Dataset
from shards.droplist import write_exclude
from shards.errors import UserError
from shards.header import read_header
from shards.index import index
from shards.repeats import Place, repeats
from shards.stats import PERCENTS, stats
from shards.stats_view import page, tables
from tests.shards.datasets import Made, plain, write_dataset
from tests.shards.foreign import write_tar
from tests.shards.images import encode

CLASSES = ["cat", "dog <b>", "empty", "owl"]


def samples() -> list[list[Made]]:
    """Return 30 samples: many sizes, three formats, none to two labels, a turned one, repeats of both kinds."""
    made = [
        Made(
            key=f"k/{i}",
            image=encode(i, ("JPEG", "PNG", "WEBP")[i % 3], (4 + 2 * i, 90 - 3 * i)),
            labels=[(), (0,), (1,), (0, 3)][i % 4],
            weights=(0.25, 0.75) if i % 4 == 3 else None,
            orientation=6 if i == 5 else 1,
        )
        for i in range(26)
    ]
    made += [Made("k/3", made[3].image), Made("again", made[3].image), Made("k/3", encode(99)), Made("k/9", encode(98))]
    return [made[:10], made[10:17], made[17:]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("stats") / "set", CLASSES, samples())


def text_of(found) -> str:
    console = Console(width=140)
    with console.capture() as capture:
        console.print(tables(found))
    return capture.get()


def test_counts_are_those_of_the_samples(folder):
    found = stats(Dataset.open(folder))
    made = [sample for shard in samples() for sample in shard]
    assert (found.samples, found.shards) == (len(made), 3)
    labels = Counter(label for sample in made for label in sample.labels)
    assert found.classes == [(name, labels[label]) for label, name in enumerate(CLASSES)]
    assert found.labels_per_image == Counter(len(sample.labels) for sample in made)
    assert found.unlabelled == found.labels_per_image[0] == 7
    headers = [read_header(sample.image) for sample in made]
    assert found.formats == Counter(header.format for header in headers)
    assert found.orientations == {1: 29, 6: 1}
    assert found.bytes == sum(len(sample.image) for sample in made)
    width, height = (np.array([getattr(header, name) for header in headers]) for name in ("width", "height"))
    every = {
        "width": width,
        "height": height,
        "short side": np.minimum(width, height),
        "bytes": np.array([len(sample.image) for sample in made]),
    }
    for name, values in every.items():
        assert found.percentiles[name] == np.percentile(values, PERCENTS, method="nearest").tolist()
    aspect = np.percentile(width / height, PERCENTS, method="nearest")
    np.testing.assert_allclose(found.percentiles["aspect"], aspect, rtol=1e-3)
    for name, values in every.items():
        counts = [((bar.low <= values) & (values < bar.high)).sum() for bar in found.histograms[name]]
        assert [bar.count for bar in found.histograms[name]] == counts
        assert sum(counts) == len(made)
    wide = sum(bar.count for bar in found.histograms["aspect"] if bar.low >= 1)
    assert wide == (width >= height).sum()
    assert sum(bar.count for bar in found.histograms["aspect"]) == len(made)


def test_repeats_are_counted_and_the_first_named(folder):
    found = stats(Dataset.open(folder))
    keys, images = found.repeated_keys, found.repeated_images
    assert (keys.values, keys.extra) == (2, 3)
    assert keys.examples == [[Place(0, "k/3"), Place(2, "k/3"), Place(2, "k/3")], [Place(0, "k/9"), Place(2, "k/9")]]
    assert (images.values, images.extra) == (1, 2)
    assert images.examples == [[Place(0, "k/3"), Place(2, "k/3"), Place(2, "again")]]


def test_many_repeats_are_counted_in_pieces_and_few_named(tmp_path, monkeypatch):
    image = plain("red")
    keys = [f"{i % 40}" for i in range(130)]  # 40 keys: ten four times, thirty three times
    shards = [[Made(key, image) for key in keys[start : start + 50]] for start in range(0, 130, 50)]
    dataset = Dataset.open(write_dataset(tmp_path / "set", ["a"], shards))
    for chunk in (1, 2, 7, 64, 1 << 24):
        monkeypatch.setattr(repeats_module, "CHUNK", chunk)
        found = repeats(dataset, "key")
        assert (found.values, found.extra) == (40, 90)
    assert [[place.key for place in places] for places in found.examples] == [[str(i)] * 4 for i in range(10)]
    same = repeats(dataset, "xxh128")
    assert (same.values, same.extra, len(same.examples), len(same.examples[0])) == (1, 129, 1, repeats_module.PLACES)


def test_dropped_samples_do_not_count(folder):
    sizes = enumerate([10, 7, 13])
    write_exclude(folder, "some", [(2, index, "x") for index in range(9, 13)])  # the repeats
    write_exclude(folder, "all", [(shard, index, "x") for shard, size in sizes for index in range(size)])
    some = stats(Dataset.open(folder, exclude="some"))
    assert some.samples == sum(some.labels_per_image.values()) == sum(some.formats.values()) == 26
    assert (some.exclude, some.repeated_keys.extra, some.repeated_images.extra) == ("some", 0, 0)
    nothing = stats(Dataset.open(folder, exclude="all"))
    assert (nothing.samples, nothing.bytes, nothing.percentiles["width"], nothing.histograms["aspect"]) == (
        0,
        0,
        [],
        [],
    )
    text_of(nothing)
    assert "nothing" in page(nothing)


def test_tables_show_the_numbers(folder):
    text = text_of(stats(Dataset.open(folder)))
    for part in (
        "samples",
        "30",
        "dog <b>",
        "13 jpg, 9 png, 8 webp",
        "short side",
        "3 beyond the first of 2 keys",
        "k/9",
    ):
        assert part in text
    assert re.search(r"classes without images\W+1\b", text)
    assert re.search(r"images without a label\W+7\b", text)


def test_many_classes_are_summed_up(tmp_path):
    image = plain("red")
    made = [Made(f"{label}/{i}", image, (label,)) for label in range(1000) for i in range(1 + (label == 7))]
    folder = write_dataset(tmp_path / "set", [f"class {label}" for label in range(1001)], [made])
    found = stats(Dataset.open(folder))
    lines = text_of(found).splitlines()
    assert len(lines) < 100
    assert any("class 7 " in line for line in lines)
    assert any("class 1000 " in line for line in lines)  # the empty one
    assert len(found.classes) == 1001
    assert len(page(found)) < 100_000


def test_classes_that_share_a_name_are_both_counted(tmp_path):
    made = [Made(f"{i}", plain("red"), (label,)) for i, label in enumerate([0, 1, 1, 2, 2, 2])]
    found = stats(Dataset.open(write_dataset(tmp_path / "set", ["crane", "dog", "crane"], [made])))
    assert found.classes == [("crane", 1), ("dog", 2), ("crane", 3)]
    text = text_of(found)
    assert re.search(r"classes\W+3\b", text)
    assert len(re.findall(r"crane\W+[13]\b", text)) == 2
    assert page(found).count("<td>crane</td>") == 2


def test_rejected_images_are_counted_by_reason(tmp_path):
    write_tar(tmp_path / "0.tar", [("a.jpg", encode(0)), ("b.jpg", b""), ("c.jpg", b"<html>")])
    write_tar(tmp_path / "1.tar", [("d.jpg", encode(1)), ("e.jpg", b""), ("f.cls", b"0")])
    index(tmp_path, max_rejected=4)
    found = stats(Dataset.open(tmp_path))
    assert list(found.rejected.items()) == [
        ("empty file", 2), ("no image, only .cls", 1), ("not a jpg, png or webp image", 1)
    ]  # fmt: skip
    assert json.loads(json.dumps(asdict(found)))["rejected"] == found.rejected
    assert re.search(r"rejected\W+4\b", text_of(found))
    assert re.search(r"empty file\W+2\b", text_of(found))
    assert "<td>empty file</td><td class=n>2</td><td class=n>50.0%</td>" in page(found)
    many = replace(found, rejected={f"reason {n}": 1 for n in range(1000)})
    assert re.search(r"980 other reasons\W+980\b", text_of(many))
    assert "<td>980 other reasons</td>" in page(many)


def test_without_rejected_images_nothing_is_listed(folder):
    found = stats(Dataset.open(folder))
    assert found.rejected == {}
    assert "left out" not in text_of(found)
    assert "Rejected images of the source</h2><p>None." in page(found)


def test_a_table_without_receipt_is_told(tmp_path):
    folder = write_dataset(tmp_path / "set", ["a"], [[Made("k", plain("red"))]])
    path = folder / "manifest/samples/000000.parquet"
    pq.write_table(pq.read_table(path).replace_schema_metadata(), path)
    with pytest.raises(UserError, match=r"000000\.parquet is damaged"):
        stats(Dataset.open(folder))


def test_bars_say_what_is_done(folder, capfd):
    stats(Dataset.open(folder), progress=True)
    shown = capfd.readouterr().err
    assert "repeated keys" in shown
    assert "repeated images" in shown
    assert "xxh128" not in shown


def test_a_page_goes_to_a_local_file(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["shards", "stats", str(folder), "--html", "s3://bucket/page.html"])
    assert str(done.exception) == "--html s3://bucket/page.html: must be a local path"
    assert list(tmp_path.iterdir()) == []


def test_the_page_stands_alone_and_escapes_names(folder):
    text = page(stats(Dataset.open(folder)))
    assert "dog &lt;b&gt;" in text
    assert "dog <b>" not in text
    assert not re.search(r"<script|src=|href=|url\(|@import|https?://", text)
    assert text.count("<svg") == 5


def test_everything_goes_through_json(folder):
    found = stats(Dataset.open(folder))
    read = json.loads(json.dumps(asdict(found)))
    assert read["classes"] == [list(each) for each in found.classes]
    assert read["labels_per_image"] == {str(number): count for number, count in found.labels_per_image.items()}
    assert read["repeated_keys"]["examples"][0][0] == [0, "k/3"]
    assert read["histograms"]["width"][0] == list(found.histograms["width"][0])
