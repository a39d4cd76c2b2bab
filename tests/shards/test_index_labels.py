"""What labels an index takes from the files beside the images of tars of others."""

import json

import pytest
from typer.testing import CliRunner

from launch.cli import app
from shards.dataset import Dataset
from shards.errors import UserError
from shards.index import index
from tests.shards.foreign import image, samples, write_named, write_tar
from tests.shards.sources.servers import serve

LABELS = {
    "number": ("", {"cls": "2\n"}, [2]),
    "name": ("", {"cls": "cat"}, ["cat"]),
    "leading zeros": ("", {"cls": "007"}, ["007"]),
    "whole float": ("", {"cls": "2.0"}, [2]),
    "negative float": ("", {"cls": "-1.0"}, []),
    "float in json": ("", {"json": {"label": 2.0}}, [2]),
    "none": ("", {"cls": ""}, []),
    "skipped": ("", {"cls": "-1"}, []),
    "text of a list": ("", {"cls": "[1, 2]"}, [1, 2]),
    "json number": ("", {"json": 1}, [1]),
    "json list": ("", {"json": [2, 0]}, [2, 0]),
    "label": ("", {"json": {"label": 1, "cls": 2}}, [1]),
    "labels": ("", {"json": {"labels": [0, 2], "x": 1}}, [0, 2]),
    "cls in json": ("", {"json": {"cls": "dog"}}, ["dog"]),
    "names": ("", {"json": {"labels": ["dog", "cat"]}}, ["dog", "cat"]),
    "null": ("", {"json": {"label": None}}, []),
    "cls first": ("", {"cls": "1", "json": {"label": 2}}, [1]),
    "json where cls is empty": ("", {"cls": "", "json": {"label": 2}}, [2]),
    "caption": ("", {"txt": "2", "json": {"caption": "a cat"}}, []),
    "text asked for": ("txt", {"txt": " a cat ", "cls": "1"}, ["a cat"]),
    "field": ("json:meta.class", {"json": {"meta": {"class": 2}, "label": 1}}, [2]),
    "field with a dot": ("json:a.b", {"json": {"a.b": 1}}, [1]),
    "field is missing": ("json:other", {"json": {"label": 1}, "cls": "1"}, []),
    "other member": (".meta.json:y", {"meta.json": {"y": 2}, "json": {"label": 1}}, [2]),
}


@pytest.mark.parametrize(("rule", "members", "expected"), LABELS.values(), ids=LABELS)
def test_label_rules(tmp_path, rule, members, expected):
    beside = [(f"a.{e}", (v if isinstance(v, str) else json.dumps(v)).encode()) for e, v in members.items()]
    write_tar(tmp_path / "t.tar", [("a.jpg", image(0)), *beside])
    made = index(tmp_path, label=rule)
    dataset = Dataset.open(tmp_path)
    names = [dataset.classes[label] for label in dataset[0].labels]
    assert names == [str(label) for label in expected]
    assert made.unlabelled == (not expected)
    if all(isinstance(label, int) for label in expected):
        assert list(dataset[0].labels) == expected


BAD_LABELS = {
    "broken json": ("", {"json": b"{"}, ".json cannot be read"),
    "no text": ("", {"cls": b"\xff\xfe"}, ".cls cannot be read"),
    "fraction": ("", {"json": b"1.5"}, "'1.5' is neither an index nor a class name"),
    "truth": ("", {"json": b'{"label": true}'}, "'True' is neither"),
    "vector": ("", {"json": b"[0, 1, 0, 0]"}, ".json has a label twice"),
    "object": ("", {"json": b'{"label": {"a": 1}}'}, "is neither"),
    "huge": ("", {"cls": b"99999999999"}, "too large for a class index"),
    "weights": ("", {"json": b'{"labels": [0, 1], "weights": [1]}'}, "1 weights for 2 labels"),
    "weight beyond float32": ("", {"json": b'{"labels": [0], "weights": [1e39]}'}, "weight 1e+39: a weight"),
    "enormous weight": ("", {"json": b'{"labels": [0], "weights": [1' + b"0" * 400 + b"]}"}, "float32 can hold"),
    "list of floats": ("", {"json": b"[1.0, 0.0]"}, "'1.0' is neither"),
    "bad weight": ("", {"json": b'{"labels": [0], "weights": [NaN]}'}, "a weight is a number from 0 on"),
}


@pytest.mark.parametrize(("rule", "members", "reason"), BAD_LABELS.values(), ids=BAD_LABELS)
def test_labels_that_make_no_sense_are_told(tmp_path, rule, members, reason):
    good = [("a.jpg", image(0)), ("a.cls", b"0")]
    write_tar(tmp_path / "t.tar", [*good, ("b.jpg", image(1)), *((f"b.{e}", data) for e, data in members.items())])
    with pytest.raises(UserError, match=r"1 broken sample in .* 0 allowed: t\.tar b \(.*--max-rejected 1"):
        index(tmp_path, label=rule)
    made = index(tmp_path, label=rule, max_rejected=1)
    assert [where for where, _ in made.rejected] == ["t.tar b"]
    assert reason in made.rejected[0][1]
    assert [s.key for s in samples(tmp_path)] == ["a"]


def test_many_labels_and_weights(tmp_path):
    beside = [{"labels": [2, 0], "weights": [0.25, 0.75]}, {"labels": [1], "weights": [1.0]}, {"labels": []}]
    members = [
        (f"{i}.{e}", d) for i, j in enumerate(beside) for e, d in [("jpg", image(i)), ("json", json.dumps(j).encode())]
    ]
    write_tar(tmp_path / "t.tar", members)
    assert index(tmp_path).unlabelled == 1
    dataset = Dataset.open(tmp_path)
    assert [(s.labels, s.weights) for s in dataset.read_many(0, 0, 3)] == [((2, 0), (0.25, 0.75)), ((1,), ()), ((), ())]
    assert dataset.classes == ["0", "1", "2"]


def test_names_become_sorted_classes_over_all_tars(tmp_path):
    shards = (["zebra", "cat"], ["ant", "zebra", ""], ["cat"])
    write_named(tmp_path, *shards)
    index(tmp_path)
    dataset = Dataset.open(tmp_path)
    assert dataset.classes == ["ant", "cat", "zebra"]
    assert [[dataset.classes[x] for x in s.labels] for s in samples(tmp_path)] == [
        [name] if name else [] for names in shards for name in names
    ]


def test_a_file_of_classes_gives_the_numbers(tmp_path):
    write_named(tmp_path, ["zebra", "1"], ["ant"])
    (tmp_path / "names.txt").write_text("zebra\nant\n7\n1\n\n")
    index(tmp_path, classes=tmp_path / "names.txt")
    assert Dataset.open(tmp_path).classes == ["zebra", "ant", "7", "1"]
    assert [s.labels for s in samples(tmp_path)] == [(0,), (3,), (1,)]  # "1" is a name here
    (tmp_path / "names.txt").write_text("zebra\nlion\n")
    made = index(tmp_path, classes=tmp_path / "names.txt", max_rejected=1)
    assert made.rejected == [("1.tar 1-0", "there is no class 'ant'")]
    assert [s.labels for s in samples(tmp_path)] == [(0,), (1,)]  # 1 is a number here
    (tmp_path / "names.txt").write_text("zebra\n")
    made = index(tmp_path, classes=tmp_path / "names.txt", max_rejected=2)
    assert made.rejected[0] == ("0.tar 0-1", "label 1 is beyond the 1 classes")
    for content, message in [(b"a\n\nb\n", "line 2 is empty"), (b"", "line 1 is empty"), (b"\xff", "cannot read")]:
        (tmp_path / "names.txt").write_bytes(content)
        with pytest.raises(UserError, match=message):
            index(tmp_path, classes=tmp_path / "names.txt")


def test_numbers_with_leading_zeros_are_names_of_their_own(tmp_path):
    write_named(tmp_path, ["01", "1", "0456"])
    assert index(tmp_path).classes == ["01", "0456", "1"]
    dataset = Dataset.open(tmp_path)
    assert [[dataset.classes[x] for x in s.labels] for s in samples(tmp_path)] == [["01"], ["1"], ["0456"]]


def test_names_of_classes_may_lie_anywhere_and_be_ambiguous(tmp_path):
    write_named(tmp_path / "set", ["dog", "2"], ["crane"])
    (tmp_path / "names.txt").write_text("crane\ndog\ncrane\n")  # as ImageNet's own
    with serve(tmp_path) as web:
        command = ["shards", "index", f"{tmp_path}/set", "--classes", f"{web}/names.txt", "--max-rejected", "1"]
        done = CliRunner().invoke(app, [*command, "--json"])
    assert json.loads(done.stdout)["rejected"] == [["1.tar 1-0", "two classes are called 'crane'"]]
    assert Dataset.open(tmp_path / "set").classes == ["crane", "dog", "crane"]
    assert [s.labels for s in samples(tmp_path / "set")] == [(1,), (2,)]


def test_names_and_numbers_together_need_a_file_of_classes(tmp_path):
    write_named(tmp_path, ["1", "2"], ["ant"])
    with pytest.raises(UserError, match=r"such as ant in 1\.tar, and numbers, such as 2 in 0\.tar; give --classes"):
        index(tmp_path)
    write_tar(
        tmp_path / "x" / "0.tar", [("a.jpg", image(0)), ("a.json", b"3"), ("b.jpg", image(1)), ("b.json", b'"c"')]
    )
    with pytest.raises(UserError, match="a has the label 3, others have class names; give --classes"):
        index(tmp_path / "x")


def test_a_number_that_is_no_class_is_told(tmp_path):
    write_tar(tmp_path / "0.tar", [("a.jpg", image(0)), ("a.cls", b"1700000000")])
    with pytest.raises(UserError, match=r"label 1700000000 in 0\.tar would make 1,700,000,001 classes"):
        index(tmp_path)


def test_reading_other_labels_makes_another_data_set(tmp_path):
    labels = [{"fine": i % 3, "coarse": 2 - i % 3} for i in range(6)]
    members = [(f"{i}.{kind}", data) for i, row in enumerate(labels)
               for kind, data in (("jpg", image(i)), ("json", json.dumps(row).encode()))]  # fmt: skip
    write_tar(tmp_path / "set" / "0.tar", members)
    digests = set()
    for label in ("json:fine", "json:coarse"):
        index(tmp_path / "set", tmp_path / label, label=label)
        digests.add(Dataset.open(tmp_path / label).digest)
    assert len(digests) == 2  # a run on one does not go on with the other
