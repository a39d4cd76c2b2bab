"""The short form of ``make proof``."""

import json
import subprocess
import sys

import pytest

from tests.command import ROOT, environment

FAULTS = 8


@pytest.mark.slurm
@pytest.mark.timeout(900)
def test_under_eight_faults_everything_holds():
    program = ROOT / "tests/proof/prove.py"
    process = subprocess.Popen(
        [sys.executable, program, "--faults", str(FAULTS), "--steps", "500", "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    try:
        stdout, stderr = process.communicate(timeout=840)
    finally:
        process.terminate()  # it ends what it started, and then itself
        process.wait(60)
    assert process.returncode == 0, f"{stdout}\n{stderr}"
    found = json.loads(stdout)
    assert [fault["outcome"] for fault in found["faults"]] == ["went on"] * FAULTS
    assert [claim for claim in found["claims"] if not claim["holds"]] == []
