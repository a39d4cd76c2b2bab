"""Indexes of tars on web servers and S3, and those that no longer fit their tars."""

import os

import pytest

from shards.dataset import Dataset
from shards.droplist import write_exclude
from shards.errors import UserError
from shards.index import index
from shards.store import open_store
from tests.shards.foreign import replace_with_same_size, samples, write_webdataset
from tests.shards.servers import serve_faults


@pytest.fixture
def web(tmp_path):
    write_webdataset(tmp_path / "site")
    for tar in (tmp_path / "site").iterdir():  # servers tell whole seconds: one of this second may be too new
        os.utime(tar, (tar.stat().st_mtime - 2,) * 2)
    with serve_faults(tmp_path / "site") as server:
        yield server.url


def test_tars_on_a_web_server(web, tmp_path):
    index(tmp_path / "site", tmp_path / "local")
    index(f"{web}/set-{{000000..000002}}.tar", tmp_path / "out")
    assert Dataset.open(tmp_path / "out").digest == Dataset.open(tmp_path / "local").digest
    assert samples(tmp_path / "out") == samples(tmp_path / "local")
    assert index(f"{web}/set-{{000000..000002}}.tar", tmp_path / "out").read == 0
    with pytest.raises(UserError, match="cannot list files; name each"):
        index(web, tmp_path / "out")
    with pytest.raises(UserError, match="takes no files: a web server; give --out"):
        index(f"{web}/set-{{000000..000002}}.tar")
    with pytest.raises(UserError, match=r"no object .*/set-000003\.tar"):
        index(f"{web}/set-{{000000..000003}}.tar", tmp_path / "more")


def test_tars_and_manifest_on_s3(s3, tmp_path):
    write_webdataset(tmp_path / "set")
    index(tmp_path / "set")
    bucket = open_store(f"{s3}/data/set")
    for path in sorted((tmp_path / "set").glob("*.tar")):
        bucket.write(path.name, path.read_bytes())
    assert index(f"{s3}/data/set", workers=2).read == 3
    dataset = Dataset.open(f"{s3}/data/set")
    assert dataset.digest == Dataset.open(tmp_path / "set").digest
    assert dataset.read_many(0, 2, 9) == samples(tmp_path / "set")[2:9]
    assert samples(f"{s3}/data/set") == samples(tmp_path / "set")
    assert index(f"{s3}/data/set").read == 0
    index(f"{s3}/data/set/set-*1.tar", tmp_path / "out")
    alone = [sample._replace(shard=1) for sample in samples(tmp_path / "out")]  # there it is the only shard
    assert alone == samples(tmp_path / "set")[10:20]
    write_exclude(f"{s3}/data/set", "v1", [(0, 1, "x")])
    assert len(samples(f"{s3}/data/set", exclude="v1")) == 23
    with pytest.raises(UserError, match="exists and never changes"):
        write_exclude(f"{s3}/data/set", "v1", [])


@pytest.mark.parametrize("where", ["local", "web"])
def test_an_index_that_no_longer_fits_is_found_on_reading(web, tmp_path, where):
    path = tmp_path / "site" / "set-000001.tar"
    index(tmp_path / "site" if where == "local" else f"{web}/set-{{000000..000002}}.tar", tmp_path / "out")
    whole, indexed = path.read_bytes(), samples(tmp_path / "out")

    replace_with_same_size(path)
    dataset = Dataset.open(tmp_path / "out")
    message = r"set-000001\.tar is not the tar that .* knows: sample000\d+ is not at byte \d+.*index them again"
    for read in (lambda: dataset.read(1, 4), lambda: dataset.read_many(1, 2, 5)):
        with pytest.raises(UserError, match=message):
            read()
    assert dataset.read(0, 0).key == "sample00000"

    path.write_bytes(whole[:5000])
    with pytest.raises(UserError, match=r"set-000001\.tar ends before byte .*cut short"):
        Dataset.open(tmp_path / "out").read(1, 9)

    path.write_bytes(whole + bytes(10240))  # the samples are where they were
    assert samples(tmp_path / "out") == indexed
    assert (
        index(tmp_path / "site" if where == "local" else f"{web}/set-{{000000..000002}}.tar", tmp_path / "out").read
        == 1
    )
    assert len(samples(tmp_path / "out")) == 24


def test_tars_that_moved_away_from_their_index(tmp_path):
    folder = write_webdataset(tmp_path / "set")
    index(folder, tmp_path / "out")
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"the tars of .*out are not at .*set; index them where they are"):
        Dataset.open(tmp_path / "out")
    index(tmp_path / "elsewhere", tmp_path / "again")
    assert len(Dataset.open(tmp_path / "again")) == 24
