"""Tables of paths and URLs, with labels of every form, on disk, S3 and the web."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from shards.errors import UserError
from shards.header import BrokenImageError
from shards.sources.open import open_source
from shards.sources.reader import Reader
from tests.shards.images import encode
from tests.shards.sources.servers import serve, upload

ROWS = [
    {"path": "images/a b.jpg", "label": "cat"},
    {"path": "images/x.y.z.jpg", "label": "dog"},
    {"path": "images/Ünï/日本.png", "label": "ape, great"},
    {"path": "../outside/o.jpg", "label": "cat"},
]
KEYS = ["images/a b", "images/x_y_z", "images/Ünï/日本", "__/outside/o"]


@pytest.fixture
def folder(tmp_path):
    """Images, with a folder ``set`` for the table."""
    for number, row in enumerate(ROWS):
        path = tmp_path / "set" / row["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(number))
    return tmp_path / "set"


def write(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    elif path.suffix == ".csv":
        pa.csv.write_csv(pa.Table.from_pylist(rows), path)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def labels(source):
    return [[source.classes[label] for label in item.labels] for item in source.items()]


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("where", ["disk", "s3", "web"])
def test_paths_count_from_the_table_wherever_it_is(folder, form, where, request):
    url = str(write(folder / f"table.{form}", ROWS))
    with serve(folder.parent) as web:
        if where == "s3":
            url = upload(folder.parent, f"{request.getfixturevalue('s3')}/p q") + f"/set/table.{form}"
        elif where == "web":
            url = f"{web}/set/table.{form}"
        source = open_source(url, unpacked=folder / "unpacked")
        assert source.kind == "table"
        assert source.classes == ["ape, great", "cat", "dog"]
        assert not source.multi_label
        items = list(source.items())
        got = list(Reader(source.root, folder / "unpacked").read_all(items))
    assert [item.key for item in items] == KEYS
    assert [data for _, data in got] == [encode(number) for number in range(4)]
    assert [item.labels for item in items] == [(1,), (2,), (0,), (1,)]
    assert all((item.size > 0 and item.changed > 0) == (where == "disk") for item in items)


def test_urls(folder, s3):
    upload(folder, f"{s3}/b")
    with serve(folder) as web:
        files = [f"{web}/images/a%20b.jpg", f"{web}/images/a%20b.jpg?v=1.5/2", f"{s3}/b/images/x.y.z.jpg",
                 (folder / "images/a b.jpg").as_uri(), str(folder / "images/a b.jpg"), f"{web}/none.jpg", "none.jpg",
                 "images", "http://[::1/x.y.jpg"]  # fmt: skip
        path = write(folder / "t.csv", [{"url": file, "class": number} for number, file in enumerate(files)])
        source = open_source(path, unpacked=folder)
        got = list(Reader(source.root, folder).read_all(source.items()))
    assert source.classes == [str(number) for number in range(9)]
    assert [item.labels for item, _ in got] == [(number,) for number in range(9)]
    host = web.removeprefix("http://").replace(".", "_")
    assert [item.key for item, _ in got][:3] == [
        f"{host}/images/a b", f"{host}/images/a b_v=1_5_2", f"{s3.removeprefix('s3://')}/b/images/x_y_z"
    ]  # fmt: skip
    assert [data for _, data in got[:5]] == [encode(0), encode(0), encode(1), encode(0), encode(0)]
    assert [isinstance(data, BrokenImageError) for _, data in got] == [False] * 5 + [True] * 4
    assert got[-1][0].key == "[::1/x_y"


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_many_labels(folder, form):
    rows = [{"image": str(n), "tags": tags} for n, tags in enumerate([["b", "a"], [], None, ["c"]])]
    source = open_source(write(folder / f"t.{form}", rows), unpacked=folder, label="tags")
    assert source.multi_label
    assert labels(source) == [["b", "a"], [], [], ["c"]]
    assert [item.weights for item in source.items()] == [()] * 4


def test_many_labels_in_one_cell_of_csv(folder):
    path = folder / "t.csv"
    path.write_text('image,label,weight\n1,"b | a",0.5|1\n2,,\n3,c,2\n')
    source = open_source(path, unpacked=folder, separator="|")
    assert labels(source) == [["b", "a"], [], ["c"]]
    assert [item.weights for item in source.items()] == [(0.5, 1.0), (), (2.0,)]
    path.write_text('image,weights\n1,"{""b"": 0.5, ""a"": 1}"\n2,{}\n')
    source = open_source(path, unpacked=folder)
    assert labels(source) == [["b", "a"], []]
    assert [item.weights for item in source.items()] == [(0.5, 1.0), ()]


WEIGHTED = [{"cat": 0.5, "dog": 0.25}, {"dog": 1}, {}]


@pytest.mark.parametrize(
    ("form", "rows"),
    [
        ("jsonl", [{"image": str(n), "label": each} for n, each in enumerate(WEIGHTED)]),
        ("jsonl", [{"image": str(n), "weights": each} for n, each in enumerate(WEIGHTED)]),
        ("parquet", [{"image": str(n), "label": each} for n, each in enumerate(WEIGHTED)]),
        ("parquet map", [{"image": str(n), "weights": list(each.items())} for n, each in enumerate(WEIGHTED)]),
        *((form, [{"image": str(n), "labels": list(each), "weights": [*each.values()]} for n, each in
                  enumerate(WEIGHTED)]) for form in ("jsonl", "parquet")),
    ],
)  # fmt: skip
def test_weights(folder, form, rows):
    path = folder / f"t.{form.split()[0]}"
    if form == "parquet map":
        schema = pa.schema([("image", pa.string()), ("weights", pa.map_(pa.string(), pa.float64()))])
        pq.write_table(pa.Table.from_pylist(rows, schema), path)
    else:
        write(path, rows)
    source = open_source(path, kind="table", unpacked=folder)
    assert source.classes == ["cat", "dog"]
    assert source.multi_label
    items = list(source.items())
    assert [dict(zip(item.labels, item.weights, strict=True)) for item in items] == [{0: 0.5, 1: 0.25}, {1: 1.0}, {}]
    assert all(type(each) is int for item in items for each in item.labels)


def test_given_classes_give_the_order(folder):
    (folder / "names.txt").write_text("dog\ncat\nape, great\nnone such\n")
    path = write(folder / "t.csv", ROWS)
    source = open_source(path, unpacked=folder, classes=str(folder / "names.txt"))
    assert source.classes == ["dog", "cat", "ape, great", "none such"]
    assert [item.labels for item in source.items()] == [(1,), (0,), (2,), (1,)]
    write(path, [{"path": "x", "label": 3}, {"path": "y", "label": 0}])
    assert [i.labels for i in open_source(path, unpacked=folder, classes=str(folder / "names.txt")).items()] == [
        (3,), (0,)
    ]  # fmt: skip
    (folder / "names.txt").write_text("dog\ncat\n")
    write(path, ROWS)
    with pytest.raises(UserError, match="no class 'ape, great'"):
        open_source(path, unpacked=folder, classes=str(folder / "names.txt"))


def test_keys_are_made_harmless(folder):
    path = write(folder / "t.csv", [{"path": "x", "label": 0, "key": key} for key in ("../../a.b", "/abs", "plain 7")])
    assert [item.key for item in open_source(path, unpacked=folder).items()] == ["__/__/a_b", "abs", "plain 7"]


def test_numbers_in_csv_keep_their_text_as_keys_and_become_labels(folder):
    (folder / "t.csv").write_text("path,label,key\nx,7,007\ny,0,008\n")
    source = open_source(folder / "t.csv", unpacked=folder)
    assert [(item.key, item.labels) for item in source.items()] == [("007", (7,)), ("008", (0,))]
    assert len(source.classes) == 8


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (["01", "1", "0456"], ["01", "0456", "1"]),  # zip codes: each is a class of its own
        (["007", "006", "007"], ["006", "007"]),
        (["2.0", "10.0", "0.0"], ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10"]),  # integers with gaps
        (["2.00", "1", "0"], ["0", "1", "2"]),
        (["1.5", "2.0"], ["1.5", "2.0"]),
        (["4006381333931", "0012345678905"], ["0012345678905", "4006381333931"]),
    ],
)
def test_text_in_csv_is_a_number_if_all_of_it_is(folder, cells, expected):
    path = folder / "t.csv"
    path.write_text("path,label\n" + "".join(f"{n},{cell}\n" for n, cell in enumerate(cells)))
    source = open_source(path, unpacked=folder)
    assert source.classes == expected
    assert labels(source) == [[cell if cell in expected else str(int(float(cell)))] for cell in cells]


def test_a_file_of_classes_may_have_one_name_twice_and_lie_anywhere(folder):
    (folder / "names.txt").write_text("crane\ndog\ncrane\n")  # as ImageNet's own
    path = write(folder / "t.csv", [{"path": "x", "label": "dog"}, {"path": "y", "label": "2"}])
    with serve(folder) as web:
        source = open_source(path, unpacked=folder, classes=f"{web}/names.txt")
    assert source.classes == ["crane", "dog", "crane"]
    assert [item.labels for item in source.items()] == [(1,), (2,)]
    write(path, [{"path": "x", "label": "crane"}])
    with pytest.raises(UserError, match="two classes are called 'crane'"):
        open_source(path, unpacked=folder, classes=str(folder / "names.txt"))


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("x,label\na,1\n", {}, "no column of images among x, label"),
        ("path,y\na,1\n", {}, "no column of labels among path, y"),
        ("path,url,label\na,b,1\n", {}, "columns path and url could both be the image"),
        ("path,label\na,1\n", {"label": "tag"}, "label=tag: there is no such column"),
        ("path,label\na,1\nb,\n", {}, r"row 2 of .* has no label"),
        ("path,label\na,1\n,2\n", {}, r"row 2 of .* has no image"),
        ("path,label,key\na,1,\n", {}, r"row 1 of .* has no key"),
        ("path,label\na,1\nb\n", {}, r"cannot read table .*t\.csv: .*columns"),
        ("path,label\na,2.0\nb,-1.0\n", {}, r"row 2 of .* has no label"),
        ("path,label\na,-5\n", {}, "has the label '-5'"),
        ("path,label\na,9999999\n", {}, "would make 10,000,000 classes"),
        ("path,label,weight\na,x,y\n", {}, r"row 1 of .* has the weights 'y'"),
        ("path,label,weight\na,x,-1\n", {}, r"row 1 of .* has the weight -1\.0"),
        ("path,label,weight\na,x,1e39\n", {}, r"row 1 of .* has the weight 1e\+39; .* float32"),
        ('path,weights\na,"{""x"": 1' + "0" * 400 + '}"\n', {}, "row 1 of .* has the weight 1000"),
        ("path,label,weight\na,x,1|2\n", {"separator": "|"}, "2 weights for 1 labels"),
        ("path,label\na,x|x\n", {"separator": "|"}, "twice"),
        ("path,label\na,1|1.0\n", {"separator": "|"}, r"row 1 of .* has one class twice, \['1', '1\.0'\]"),
        ("", {}, r"t\.csv is empty"),
    ],
)
def test_bad_tables(folder, text, options, message):
    (folder / "t.csv").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        list(open_source(folder / "t.csv", unpacked=folder, **options).items())
    assert "\n" not in str(caught.value)
    assert "; " in str(caught.value)


def test_bad_json_lines(folder):
    for text, message in [
        ('{"path": "a", "label": 1}\n{"path"\n', "line 2: "),
        ("[1]\n", "line 1: an object is wanted"),
        ('{"path": "a", "label": 1}\n{"path": "b", "label": ' + "9" * 5000 + "}\n", "line 2: .*4300 digits"),
        ("[" * 200_000 + "\n", "line 1: maximum recursion depth"),
        (b'{"path": "a", "label": 1}\n{"path": "\xff"}\n', "line 2: .*0xff"),
        (
            '{"path": "a", "label": 1}\n{"path": "b", "label": "x"}\n',
            "such as x in .*, and numbers, such as 1 in ",
        ),
        ('{"path": "a", "label": true}\n', "'True', which is neither"),
        ('{"path": "a", "label": [[1]]}\n', "neither a class index nor a name"),
    ]:
        (folder / "t.jsonl").write_bytes(text.encode() if isinstance(text, str) else text)
        with pytest.raises(UserError, match=message) as caught:
            open_source(folder / "t.jsonl", unpacked=folder)
        assert len(str(caught.value)) < 1000
