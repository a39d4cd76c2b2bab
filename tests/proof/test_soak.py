"""The short form of ``make soak``: too short for steps' times, which others' work on the cores changes."""

import json
import subprocess
import sys

import pytest
from PIL import Image

from tests.command import ROOT, environment


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_two_minutes_leave_nothing_behind(tmp_path):
    program = ROOT / "tests/proof/soak.py"
    done = subprocess.run(
        [sys.executable, program, "--minutes", "2", "--json", "--picture", tmp_path / "soak.png"],
        capture_output=True, text=True, timeout=450, env=environment(),
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr
    found = json.loads(done.stdout)
    flat = {each["what"]: each["flat"] for each in found["findings"]}
    assert len(flat) == 9
    for what in ("memory, MB", "open files, at most", "threads, at most", "exit code when it was told to stop"):
        assert flat[what], found["findings"]
    with Image.open(tmp_path / "soak.png") as picture:
        assert picture.size == (1320, 550)
