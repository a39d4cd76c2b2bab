"""Which tars a URL names."""

import pytest

from shards.errors import UserError
from shards.tarlist import find_tars
from tests.shards.foreign import write_tar


def names(url):
    return find_tars(url)[1]


def test_which_tars_a_url_means(tmp_path, monkeypatch):
    for name in ("b.tar", "a.tar", ".hidden.tar", "a10.tar", "a2.tar", "t/x.tar", "v/y.tar", "t/deep/z.tar"):
        write_tar(tmp_path / name, [])
    for name in ("a.parquet", "a_stats.json", "a.tar.idx", ".nv-meta/index.sqlite", ".nv-meta/dataset.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)  # of img2dataset and Energon
        (tmp_path / name).write_bytes(b"")
    assert (
        names(tmp_path) == names(f"{tmp_path}/") == names(tmp_path.as_uri()) == ["a.tar", "a10.tar", "a2.tar", "b.tar"]
    )
    assert names(f"{tmp_path}/a*.tar") == ["a.tar", "a10.tar", "a2.tar"]
    assert names(f"{tmp_path}/a{{2,10,}}.tar") == ["a2.tar", "a10.tar", "a.tar"]
    assert names(f"{tmp_path}/a?.tar") == ["a2.tar"]
    assert names(f"{tmp_path}/*/[x-y].tar") == ["t/x.tar", "v/y.tar"]
    assert names(f"{tmp_path}/{{v,t}}/*.tar") == ["v/y.tar", "t/x.tar"]
    assert names(tmp_path / "b.tar") == ["b.tar"]
    monkeypatch.chdir(tmp_path)
    assert names("b.tar") == names("[b].tar") == ["b.tar"]
    assert names("t/*.tar") == ["x.tar"]
    weird = write_tar(tmp_path / "w" / "{x}[1]" / "q.tar", []).parent
    assert names(weird) == ["q.tar"]  # a folder that is there is no pattern


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("{}/nothing", "no folder"),
        ("{}", r"no tars in .* itself, but in its folders t, v; give one"),
        ("{}/t/deep", "no tars in .*; check the path"),
        ("{}/packed", "compressed ones such as x.tar.gz"),
        ("{}/z*.tar", "no tar fits"),
        ("{}/{{a,a}}.tar", "names a tar twice"),
        ("{}/{{a", "a brace is not closed"),
        ("{}/none.tar", "no object"),
    ],
)
def test_no_tars_is_an_error(tmp_path, url, message):
    write_tar(tmp_path / "t" / "x.tar", [])
    write_tar(tmp_path / "v" / "y.tar", [])
    for path in ("packed/x.tar.gz", "t/deep/x"):
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).write_bytes(b"")
    with pytest.raises(UserError, match=message):
        find_tars(url.format(tmp_path))
