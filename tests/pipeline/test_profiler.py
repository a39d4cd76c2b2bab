"""The trace of a few steps: which steps are in it, as Perfetto reads it."""

import gzip
import json

import pytest
import torch

from pipeline.profiler import Profiler


def trace(folder, first, steps, taken) -> list[str] | None:
    """Return the marks in the trace that profiling ``taken`` steps leaves, in their order."""
    with Profiler(folder, first, steps) as profiler:
        for number in range(taken):
            profiler.step()
            with torch.profiler.record_function(f"step {number}"):
                torch.ones(4, 4) @ torch.ones(4, 4)
    path = folder / "rank-00000.json.gz"
    if not path.exists():
        return None
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert any(event.get("name") == "aten::mm" and "Input Dims" in event["args"] for event in events)
    marks = [event for event in events if event.get("cat") == "user_annotation" and event["name"].startswith("step ")]
    return [event["name"] for event in sorted(marks, key=lambda event: event["ts"])]


@pytest.mark.parametrize(
    ("first", "steps", "taken", "recorded"),
    [
        (0, 2, 5, ["step 0", "step 1"]),
        (3, 2, 9, ["step 3", "step 4"]),
        (3, 9, 5, ["step 3", "step 4"]),  # the run ended earlier
        (3, 2, 5, ["step 3", "step 4"]),
        (3, 0, 9, None),
        (9, 2, 5, None),
    ],
)
def test_which_steps_are_recorded(alone, tmp_path, first, steps, taken, recorded):
    assert trace(tmp_path / "profile", first, steps, taken) == recorded
