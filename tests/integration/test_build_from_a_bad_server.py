"""Builds from a web server that fails for ever, then recovers: the command line says so, then makes the same bytes."""

from pathlib import Path

import pytest

from shards.build import build
from tests.command import patchmill, refused
from tests.shards.foreign import image, write_webdataset
from tests.shards.images import tree
from tests.shards.servers import serve_faults


@pytest.fixture
def site(tmp_path):
    """A web server with images, and tars."""
    write_webdataset(tmp_path / "site")
    for number in range(24):
        (tmp_path / "site" / f"{number}.jpg").write_bytes(image(number))
    with serve_faults(tmp_path / "site") as server:
        yield server


def table(url: str, folder: Path) -> Path:
    """Write a table of URLs; what is made of it tells nothing of where it lies."""
    folder.mkdir()
    rows = [f"{url}/{number}.jpg,{'cat' if number % 2 else 'dog'}\n" for number in range(24)]
    (folder / "table.csv").write_text("url,label\n" + "".join(rows))
    return folder / "table.csv"


@pytest.mark.parametrize(
    ("source", "fault", "message"),
    [
        ("table", "error", "500 Internal Server Error"),
        ("table", "half body", "response body"),
        ("tars", "error", "500 Internal Server Error"),
    ],
)
@pytest.mark.long
def test_a_build_says_what_failed_and_ends_well_when_the_server_does(site, tmp_path, source, fault, message):
    url = table(site.url, tmp_path / "table") if source == "table" else f"{site.url}/set-{{000000..000002}}.tar"

    def command():
        return patchmill(
            "shards", "build", url, "out", "--shard-samples", "5", "--workers", "1", cwd=tmp_path,
            PATCHMILL_STORE_RETRY_SECONDS="0.5",
        )  # fmt: skip

    build(url, tmp_path / "undisturbed", shard_samples=5, workers=1)
    expected = tree(tmp_path / "undisturbed")
    assert "manifest/dataset.json" in expected

    site.fault, site.good, site.bad = fault, 9, 10**9
    line = refused(command(), code=1)
    assert message in line
    assert site.url in line
    left = tree(tmp_path / "out") if (tmp_path / "out").exists() else {}
    assert "manifest/dataset.json" not in left
    assert not [path for path in left if path.endswith(".tar") and left[path] != expected[path]]

    site.bad = 0
    done = command()
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "out") == expected
