import json

from pipeline.telemetry import Telemetry, read_metrics


def test_a_resumed_run_has_every_line_once(tmp_path):
    first = Telemetry(tmp_path, "x", total=100, start=0)
    for samples in (10, 20, 30):
        first.log(samples, {"loss": 1.0 / samples})
    first.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"samples": 40, "lo')  # what a kill leaves

    second = Telemetry(tmp_path, "x", total=100, start=20)  # the checkpoint stood at 20
    second.log(30, {"loss": 0.5})
    second.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["samples"] for line in lines] == [10, 20, 30]
    assert lines[-1]["loss"] == 0.5
    assert read_metrics(tmp_path / "metrics.jsonl") == lines


def test_tensorboard_mirrors_the_lines(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    telemetry = Telemetry(tmp_path, "x", total=10, start=0)
    telemetry.log(5, {"loss": 0.25})
    telemetry.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(5, 0.25)]
