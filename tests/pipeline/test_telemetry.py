import json

from pipeline.telemetry import Telemetry, _folded, _in_words, read_metrics
from pipeline.tracking import TensorBoard


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


def test_a_damaged_line_costs_no_other(tmp_path):
    lines = [b'{"samples": 10}', b'{"samples": "2', b"[20]", b'{"samples": 25, "x": "\xff"}', b'{"samples": 30}']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    assert [line["samples"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [10, 25, 30]


def test_tensorboard_mirrors_the_lines(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    telemetry = Telemetry(tmp_path, "x", total=10, start=0, mirrors=[TensorBoard(tmp_path / "tensorboard", 0)])
    telemetry.log(5, {"loss": 0.25, "grad_norm": None})
    telemetry.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(5, 0.25)]


VALUES = {
    "loss": 2.3456, "images_per_second": 12345.6, "mb_per_second": 1060.0, "data_wait": 0.123, "decode_share": 0.44,
    "quarantined": 3, "retries": 0, "skipped": 0, "val_top1": 0.5512,
}  # fmt: skip


def test_without_a_terminal_the_progress_is_a_plain_line(tmp_path, capsys):
    telemetry = Telemetry(tmp_path, "pretrain", total=123456, start=0)
    telemetry.show(0, VALUES)
    telemetry.show(10, VALUES)  # too soon
    telemetry.show(123456, {**VALUES, "val_top1": None, "quarantined": 0, "mb_per_second": 1.25})
    telemetry.close()
    assert capsys.readouterr().err.splitlines() == [
        "pretrain: 0% loss 2.346  top-1 55.1%  12,346 images/s  0:00:10 left  waiting 12%  decoding 44%  1,060 MB/s"
        "  quarantined 3",
        "pretrain: 100% loss 2.346  12,346 images/s  0:00:00 left  waiting 12%  decoding 44%  1.2 MB/s",
    ]


def test_what_not_every_run_has_is_said_where_it_is(tmp_path, capsys):
    telemetry = Telemetry(tmp_path, "x", total=10, start=0)
    telemetry.show(10, {**VALUES, "quarantined": 0, "cache_hit_share": 0.931, "retries": 12, "skipped": 2})
    telemetry.close()
    assert capsys.readouterr().err.endswith("decoding 44%  1,060 MB/s  cache 93%  skipped 2  retried 12\n")
    probed = _in_words({**VALUES, "probe_5shot": 0.25, "probe_linear": 0.5}, 10.0)
    assert probed[1:4] == ["top-1 55.1%", "5shot 25.0%", "linear 50.0%"]


def test_where_no_step_was_taken(tmp_path, capsys):
    telemetry = Telemetry(tmp_path, "x", total=10, start=0)
    telemetry.show(10, {**VALUES, "loss": None, "images_per_second": 0.0})
    telemetry.close()
    assert capsys.readouterr().err.startswith("x: 100% no step taken  top-1 55.1%  0 images/s  0:00:00 left")


def test_on_a_terminal_every_piece_stays_whole():
    text = ["loss 2.346", "top-1 55.1%", "12,346 images/s", "0:00:10 left", "waiting 12%"]
    assert _folded(text, 200) == "  ".join(text)
    for width in (1, 20, 53):
        lines = _folded(text, width).split("\n")
        assert [piece for line in lines for piece in line.split("  ")] == text
        assert all(len(line) <= width or line in text for line in lines)
    assert _folded(text, 53).count("\n") == 1
