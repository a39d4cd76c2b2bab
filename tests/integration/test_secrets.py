"""Secrets of a bucket come from the environment, and go nowhere: no log, settings file or report of a run has them."""

import os
from pathlib import Path

import pytest

from shards.store import open_store
from shards.storesettings import StoreSettings
from tests.command import patchmill, refused
from tests.images import make_image_folder

KEY, SECRET = "AKIAPATCHMILL", "hunter2/hunter2+hunter2"
SECRETS = {
    "AWS_ACCESS_KEY_ID": KEY,
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_SESSION_TOKEN": f"session-{SECRET}",
    "AZURE_STORAGE_ACCOUNT_KEY": f"azure-{SECRET}",
    "GOOGLE_SERVICE_ACCOUNT_KEY": f"google-{SECRET}",
}
PLAN = """
name = "{name}"

[[stage]]
name = "train"
kind = "supervised"
[stage.set]
duration = "1 epoch"
global_batch = 12
model = {{ name = "vit_ti8", embed_dim = 24, num_heads = 3, depth = 1 }}
engine = {{ kind = "accelerate" }}
[stage.set.data]
train = "{data}/train"
val = "{data}/val"
resolution = 16
[stage.set.data.store]
endpoint = "{endpoint}"
region = "eu-test-1"
concurrency = 4

[[stage]]
name = "report"
kind = "report"
"""


def with_secrets(folder: Path, *outputs: str) -> list[str]:
    """Return where secrets, or parts of them, are: files below a folder, and texts."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    texts = {str(path): path.read_bytes() for path in files} | {text[:99]: text.encode() for text in outputs}
    return [where for where, text in texts.items() if b"hunter2" in text or KEY.encode() in text]


@pytest.fixture
def bucket(s3, s3_server, tmp_path, monkeypatch):
    """A bucket with a data set; the environment has keys and no address."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_ENDPOINT_URL", "AWS_ALLOW_HTTP", "AWS_REGION"):
        monkeypatch.delenv(name)
    make_image_folder(tmp_path / "images", per_class=8)
    done = patchmill(
        "shards", "build", "images", f"{s3}/set", "--split", "val=0.25", "--workers", "1", cwd=tmp_path,
        PATCHMILL_STORE_ENDPOINT=s3_server,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not with_secrets(tmp_path, done.stdout, done.stderr)
    return s3


def run(folder: Path, **values: str):
    (folder / "plan.toml").write_text(PLAN.format(**values))
    return patchmill("run", "plan.toml", cwd=folder)


@pytest.mark.long
def test_no_file_and_no_line_of_a_run_has_a_secret(bucket, s3_server, tmp_path):
    done = run(tmp_path, name="good", data=f"{bucket}/set", endpoint=s3_server)
    assert done.returncode == 0, done.stderr
    made = tmp_path / "runs/good"
    assert f'endpoint = "{s3_server}"' in (made / "stages/train/resolved.toml").read_text()
    assert (made / "report.html").exists()
    assert list(made.glob("stages/train/checkpoints/*/checkpoint.json"))
    assert not with_secrets(made, done.stdout, done.stderr)


@pytest.mark.long
def test_nor_has_one_that_fails(bucket, s3_server, tmp_path):
    done = run(tmp_path, name="bad", data="s3://no-such-bucket/set", endpoint=s3_server)
    assert done.returncode == 2
    assert "no data set at s3://no-such-bucket/set/" in done.stderr
    assert not (tmp_path / "runs").exists()  # it was looked at before
    assert not with_secrets(tmp_path, done.stdout, done.stderr)

    open_store(f"{bucket}/set/train", settings=StoreSettings(endpoint=s3_server)).delete("shards/000000.tar")
    done = run(tmp_path, name="gone", data=f"{bucket}/set", endpoint=s3_server)
    assert done.returncode == 2
    assert "shards/000000.tar" in done.stderr
    assert not with_secrets(tmp_path / "runs", done.stdout, done.stderr)

    done = run(tmp_path, name="worse", data=f"https://me:{SECRET}@example.org/set", endpoint=s3_server)
    assert "the URL of" not in refused(done)  # which part of it is the server's name, nobody knows
    assert not with_secrets(tmp_path / "runs", done.stdout, done.stderr)


def test_a_secret_among_the_settings_is_refused_unseen(tmp_path):
    (tmp_path / "c.toml").write_text('data = { train = "x" }\nduration = "1 epoch"\nglobal_batch = 2\n')
    setting = f"data.store.secret_access_key={SECRET}"
    line = refused(patchmill("train", "c.toml", "model.name=vit_b16", setting, "--out", "run", cwd=tmp_path))
    assert "unknown setting data.store.secret_access_key" in line
    assert SECRET not in line
    assert os.listdir(tmp_path) == ["c.toml"]
