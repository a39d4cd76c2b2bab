"""What is released: the wheel, its version's notes, and the licences of what it needs."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, version

import pytest

from shards.ledger import FORMAT as LEDGER_FORMAT
from shards.manifest import SCHEMA_VERSION
from shards.order import ORDER_VERSION
from tests.command import ROOT, environment
from tests.plans import SHARDS, converting, training, write_plan

PACKAGES = ("shards", "pipeline", "launch")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of the checkout, unpacked as pip unpacks it."""
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    for each in (*PACKAGES, "tests", "bench", "docs"):
        shutil.copytree(ROOT / each, folder / "checkout" / each, ignore=ignored)
    (folder / "checkout/shards/native/jpegcrop-0.so").write_bytes(b"of this machine")
    for each in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / each, folder / "checkout")
    quiet = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index")
    command = [sys.executable, "-m", "pip", "wheel", *quiet, "./checkout"]
    done = subprocess.run(command, cwd=folder, timeout=200, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (made,) = folder.glob("*.whl")
    with zipfile.ZipFile(made) as archive:
        archive.extractall(folder / "installed")
    return folder / "installed"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_wheel_installs_with_all_that_it_needs(wheel, tmp_path):
    """In an environment that nothing was put in before, far from the checkout: what no dependency names is missing."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}

    def run(*command):
        done = subprocess.run(
            [*map(str, command)], cwd=tmp_path, env=clean, capture_output=True, text=True, timeout=1800
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(sys.executable, "-m", "venv", "venv")
    (made,) = wheel.parent.glob("*.whl")
    run("venv/bin/pip", "install", "--quiet", made, "-c", ROOT / "constraints.txt")
    assert run("venv/bin/patchmill", "--version") == f"patchmill {version('patchmill')}\n"
    assert "vit_h14_jft300m" in run("venv/bin/patchmill", "recipes")
    write_plan(tmp_path, 'name = "chain"\n' + SHARDS + training("pretrain") + converting("pretrain"))
    run("venv/bin/patchmill", "run", "plan.toml", "--smoke")
    (weights,) = (tmp_path / "runs").rglob("model.safetensors")
    assert weights.is_relative_to(tmp_path / "runs/chain-smoke")
    inside = "import shards, pipeline, launch; print(*{each.__path__[0] for each in (shards, pipeline, launch)})"
    assert all(each.startswith(f"{tmp_path}/venv/") for each in run("venv/bin/python", "-c", inside).split())
    shutil.rmtree(tmp_path / "venv")  # 2 GB, which pytest would keep


def names(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_the_wheel_has_all_of_the_packages_and_nothing_else(wheel):
    there = names(wheel)
    (info,) = {name.partition("/")[0] for name in there if ".dist-info/" in name}
    there = {name for name in there if not name.startswith(info)}
    wanted = {
        f"{package}/{name}" for package in PACKAGES for name in names(ROOT / package)
        if "__pycache__" not in name and not name.endswith(".so")
    }  # fmt: skip
    assert there == wanted
    assert {"shards/native/jpegcrop.c", "pipeline/recipes/small_pretrain.toml", "pipeline/report/page.css"} <= there
    assert {f"{package}/py.typed" for package in PACKAGES} <= there  # their annotations are for who imports them too
    assert (wheel / info / "licenses/LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert "patchmill = launch.cli:main" in (wheel / info / "entry_points.txt").read_text()


def test_the_wheel_runs_without_the_checkout(wheel, tmp_path):
    script = "import sys, launch.cli; print(launch.cli.__file__, file=sys.stderr); sys.exit(launch.cli.main())"
    done = subprocess.run(
        [sys.executable, "-c", script, "recipes"], cwd=tmp_path, env=environment(PYTHONPATH=str(wheel)),
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "vit_h14_jft300m" in done.stdout
    assert str(wheel) in done.stderr


def test_the_newest_notes_are_of_this_version():
    notes = (ROOT / "CHANGELOG.md").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert re.search(r"^## (.+)$", notes, re.MULTILINE)[1] == project["version"]


def test_the_newest_notes_tell_the_versions_of_formats():
    from pipeline.checkpointindex import FORMAT_VERSION  # imports torch

    newest = (ROOT / "CHANGELOG.md").read_text().split("\n## ")[1]
    ledger = f"`ledger/` | format {LEDGER_FORMAT} |"
    for told in (f"| schema {SCHEMA_VERSION} |", f"| format {FORMAT_VERSION} |", f"| order {ORDER_VERSION} |", ledger):
        assert told in newest


def test_all_that_is_pinned_is_installed_and_its_licences_are_listed():
    for line in (ROOT / "constraints.txt").read_text().split():
        name, _, pinned = line.partition("==")
        try:
            assert version(name).partition("+")[0] == pinned, name
        except PackageNotFoundError:
            pytest.fail(f"{line} is pinned, but not installed; run make, or remove the pin")
    made = subprocess.run(
        [sys.executable, ROOT / "docs/licences.py"], capture_output=True, text=True, timeout=60, check=True
    )
    assert made.stdout == (ROOT / "docs/licences.md").read_text()
    rows = [line.split(" | ") for line in made.stdout.splitlines() if line.startswith("| ")][1:]
    assert not [row[0] for row in rows if "not told" in row[2] or not row[3].strip(" |")]
