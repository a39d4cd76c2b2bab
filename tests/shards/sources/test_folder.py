"""Folders of class folders, on disk and in a bucket."""

import os
import subprocess
import sys

import pytest

from shards.errors import UserError
from shards.sources.open import open_source
from shards.sources.reader import Reader
from tests.shards.images import encode, make_source
from tests.shards.sources.servers import upload

NAMES = ["a b/c d.jpg", "dots.and.more/x.y.z.jpeg", "Ünï/日本.png", "q/%20+~#[1].webp", "@/at.jpg", "q/deep/er/x.JPG"]


@pytest.fixture
def odd(tmp_path):
    for number, name in enumerate(NAMES):
        path = tmp_path / "odd" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(number, "PNG"))
    (tmp_path / "odd/q/notes.txt").touch()
    (tmp_path / "odd/README").touch()
    (tmp_path / "odd/.DS_Store").touch()
    (tmp_path / "odd/.cache").mkdir()
    (tmp_path / "odd/.cache/x.jpg").touch()
    (tmp_path / "odd/q/.hidden.jpg").touch()
    return tmp_path / "odd"


def contents(url, tmp_path):
    source = open_source(url, unpacked=tmp_path / "unpacked")
    assert source.kind == "folder"
    reader = Reader(source.root, tmp_path / "unpacked")
    found = {item.key: (source.classes[item.labels[0]], data) for item, data in reader.read_all(source.items())}
    assert source.others == {".txt": 1, "hidden": 2, "no extension": 1}
    return found


def test_odd_names_are_the_same_on_disk_and_in_a_bucket(odd, s3, tmp_path):
    local = contents(odd, tmp_path)
    assert local == {
        name.rpartition(".")[0].replace(".", "_"): (name.split("/")[0], encode(number, "PNG"))
        for number, name in enumerate(NAMES)
    }
    assert contents(odd.as_uri(), tmp_path) == local
    assert contents(upload(odd, f"{s3}/some/prefix"), tmp_path) == local


def test_keys_are_paths_without_extension_and_dots(tmp_path):
    source = make_source(tmp_path / "source")
    items = list(open_source(source, unpacked=tmp_path).items())
    files = {path.relative_to(source).as_posix(): path for path in source.rglob("*") if path.is_file()}
    assert {item.file for item in items} == set(files)
    assert all(item.key == item.file.rpartition(".")[0].replace(".", "_") for item in items)
    assert all(item.size == files[item.file].stat().st_size for item in items)
    assert all(item.changed == files[item.file].stat().st_ctime_ns for item in items)
    assert "class_0/deep/er/im_4" in {item.key for item in items}


def test_items_come_twice_the_same(odd, tmp_path):
    source = open_source(odd, unpacked=tmp_path)
    assert list(source.items()) == list(source.items())
    assert source.others == {".txt": 1, "hidden": 2, "no extension": 1}


def test_an_empty_class_is_an_error(odd, s3, tmp_path):
    (odd / "zebra").mkdir()
    (odd / "zebra/readme.md").touch()
    for url in (odd, upload(odd, s3)):
        with pytest.raises(UserError, match=r"class folder zebra .* no images"):
            list(open_source(url, unpacked=tmp_path).items())


@pytest.mark.parametrize("parts", [("train", "val"), ("Train", "test", "validation"), ("valid",)])
def test_parts_are_no_classes(tmp_path, s3, parts):
    for part in parts:
        make_source(tmp_path / "images" / part, 2, 1)
    for url in (tmp_path / "images", upload(tmp_path / "images", s3)):
        first = sorted(parts)[0]
        with pytest.raises(UserError, match=rf"divided into .*{parts[-1]}.* give one .*/{first}$"):
            open_source(url, unpacked=tmp_path)
        assert len(list(open_source(f"{url}/{first}", unpacked=tmp_path).items())) == 2
    make_source(tmp_path / "images/truck", 1, 1)
    assert open_source(tmp_path / "images", unpacked=tmp_path).classes == sorted([*parts, "truck"])


@pytest.mark.parametrize("name", ["x.jpg", "x.parquet"])
def test_a_pipe_is_an_error_and_not_waited_for(tmp_path, name):
    make_source(tmp_path / "images", 1, 3)
    os.mkfifo(tmp_path / "images/class.0" / name)
    program = """
import sys
from pathlib import Path
from shards.sources.open import open_source
for kind in (None, "folder", "parquet"):
    try:
        print(len(list(open_source(sys.argv[1], kind, unpacked=Path("/nowhere")).items())))
    except Exception as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "images"], capture_output=True, text=True, timeout=30, check=True
    )
    refused = (
        f"cannot read {tmp_path}/images/class.0/{name}: it is a link to nowhere or no plain file; mend or remove it"
    )
    nothing = f"no Parquet files in {tmp_path}/images; check the path"
    assert done.stdout.splitlines() == ([refused] * 2 + [nothing] if name == "x.jpg" else ["3", "3", refused])


def test_a_link_that_leads_to_itself_is_an_error(tmp_path):
    make_source(tmp_path / "images", 1, 3)
    (tmp_path / "images/class.0/self").symlink_to(tmp_path / "images/class.0")
    with pytest.raises(UserError, match=r"cannot read .*/self/self.*: Too many levels of symbolic links; mend or"):
        list(open_source(tmp_path / "images", unpacked=tmp_path).items())
    (tmp_path / "images/class.0/self").unlink()
    (tmp_path / "images/class.0/b.jpg").symlink_to("b.jpg")
    with pytest.raises(UserError, match=r"cannot read .*/b\.jpg"):
        list(open_source(tmp_path / "images", unpacked=tmp_path).items())


def test_what_is_no_folder_of_folders(tmp_path, s3):
    with pytest.raises(UserError, match=r"no folder or file .*nothing; check"):
        open_source(tmp_path / "nothing", unpacked=tmp_path)
    with pytest.raises(UserError, match="is empty"):
        open_source(s3, unpacked=tmp_path)
    (tmp_path / "a.jpg").touch()
    with pytest.raises(UserError, match="1 images but no class folders"):
        open_source(tmp_path, unpacked=tmp_path)
    with pytest.raises(UserError, match="cannot list"):
        open_source("http://127.0.0.1:9/images", unpacked=tmp_path)
    (tmp_path / "a.zip").touch()
    with pytest.raises(UserError, match=r"a\.zip is nothing that is known here; .*folder"):
        open_source(tmp_path / "a.zip", unpacked=tmp_path)
    with pytest.raises(UserError, match="no source of kind zip"):
        open_source(tmp_path, "zip", unpacked=tmp_path)
    with pytest.raises(UserError, match="folder has no option label; it takes none"):
        open_source(tmp_path, "folder", unpacked=tmp_path, label="x")
