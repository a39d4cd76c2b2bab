"""The short form of ``make soak``: too short for steps' times, which others' work on the cores changes."""

import json
import subprocess
import sys

import pytest
from PIL import Image

from tests.command import ROOT, environment
from tests.proof.soak import FASTEST, SAVED, Look, judge


def seen(grows: str = "", by: float = 0.0) -> list[Look]:
    """Sixty looks at a run of which one quantity grows by so much from one to the next."""
    flat = {
        "memory": 700.0,
        "descriptors": 95,
        "threads": 39,
        "checkpoints": 4,
        "disk": 4.6,
        "temporary": 0,
    }
    return [
        Look(
            **flat
            | {"minutes": at, "steps": SAVED * at, "saved": SAVED * at, "logs": 0.1 * at}
            | ({grows: flat[grows] + by * at} if by else {})
        )
        for at in range(60)
    ]


def metrics(slower: float = 1.0) -> list[dict]:
    """The lines of such a run, whose last steps take so many times as long."""
    return [
        {"step": at, "step_ms_median": 20.0 * (slower if at > 40 * SAVED else 1.0)} for at in range(0, 60 * SAVED, 100)
    ]


@pytest.mark.parametrize(
    ("grows", "by"),
    [("memory", 0.5), ("descriptors", 1), ("threads", 1), ("disk", 0.1), ("temporary", 1), ("checkpoints", 1)],
)
def test_what_grows_is_told(grows, by):
    assert [each.what for each in judge(seen(), metrics(), 75) if each.flat is False] == []
    (told,) = (each.what for each in judge(seen(grows, by), metrics(), 75) if each.flat is False)
    assert {"descriptors": "open files"}.get(grows, grows) in told


def test_slower_steps_another_code_more_logs_and_no_checkpoints_are_told():
    (told,) = (each.what for each in judge(seen(), metrics(slower=1.1), 75) if each.flat is False)
    assert told == FASTEST
    (told,) = (each.what for each in judge(seen(), metrics(), 0) if each.flat is False)
    assert told == "exit code when it was told to stop"
    more = [each._replace(logs=each.logs * each.logs) for each in seen()]
    (told,) = (each.what for each in judge(more, metrics(), 75) if each.flat is False)
    assert told == "logs and ledger, kB written in 1,000 steps"
    none = [each._replace(checkpoints=0, saved=0) for each in seen()]
    (told,) = (each.what for each in judge(none, metrics(), 75) if each.flat is False)
    assert told == "checkpoints written, and kept"


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
    assert len(flat) == 10
    for what in ("memory, MB", "open files", "threads", "temporary files", "exit code when it was told to stop"):
        assert flat[what], found["findings"]
    with Image.open(tmp_path / "soak.png") as picture:
        assert picture.size == (1320, 550)
