"""Every benchmark runs alone in its short form and keeps the contract of its JSON."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MANY = len(os.sched_getaffinity(0))
CORES = "1 core" if MANY == 1 else f"{MANY} cores"
PEERS = ("webdataset,", "dali,", "streaming,", "timm,", "transformers,")  # whose rows are there if they are installed


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "rows", "peers"),
    [
        ("order", 8, set()),
        ("loader", 3, {f"{peer}, noise, {CORES}" for peer in ("webdataset", "dali")}),
        ("shuffle", 6, {f"{peer}, {batch}" for peer in ("webdataset", "streaming") for batch in ("local", "global")}),
        pytest.param("seek", 8, {"sample 0, local", "sample 0, HTTP"}, marks=pytest.mark.slow),
        pytest.param("memory", 4, set(), marks=pytest.mark.slow),
        pytest.param("beside", 8, {"short steps alone", "longer steps alone"}, marks=pytest.mark.slow),
        pytest.param(
            "train_step",
            3,
            {f"{peer}, noise, batch 2, bfloat16" for peer in ("timm", "transformers")},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "checkpoint",
            21,
            {
                f"{peer}, tiny"
                for peer in (
                    "memory copy",
                    "torch.save",
                    "DeepSpeed",
                    "dd",
                    "torch.save until durable",
                    "DeepSpeed until durable",
                )
            },
            marks=pytest.mark.slow,
        ),
        pytest.param("step_overhead", 3, {"bare DeepSpeed, tiny"}, marks=pytest.mark.slow),
        pytest.param(
            "scale",
            17,
            {
                f"as many times 1 rank, 2 ranks{what}"
                for what in (", ZeRO 0", ", ZeRO 1", ", ZeRO 2", ", ZeRO 3", " apart, ZeRO 0")
            },
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "features", 3, {"transformers, end to end", "transformers, preprocessing"}, marks=pytest.mark.slow
        ),
        ("manifest", 16, set()),
        ("ledger", 6, set()),
        ("dedupe", 21, set()),
        ("build", 6, {"tar, 1 worker", "tar, 2 workers", "Pillow + webdataset, 1 worker", "1 worker, 2 workers"}),
    ],
)
def test_quick_form_writes_the_contract(name, rows, peers, tmp_path):
    out = tmp_path / "out.json"
    command = [sys.executable, f"bench/{name}.py", "--quick", "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["bench"] == name
    assert set(result["ratios"]) == peers
    assert result["machine"]["torch"] == version("torch")
    assert sum(not row["name"].startswith(PEERS) for row in result["rows"]) == rows
    for row in result["rows"]:
        assert row["min"] <= row["value"] <= row["max"]
        assert row["unit"]


def test_versions_of_packages_are_told_wherever_they_are(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    from common import OURS, PEERS, installed

    assert installed(OURS) == {name: version(name) for name in OURS}
    assert installed(PEERS, [tmp_path / "none"]) == {}
    for name, found in (("timm", "1.0.31"), ("mosaicml_streaming", "0.13.0")):
        (tmp_path / f"{name}-{found}.dist-info").mkdir()
        (tmp_path / f"{name}-{found}.dist-info/METADATA").write_text(f"Name: {name}\nVersion: {found}\n")
    assert installed(PEERS, [tmp_path]) == {"timm": "1.0.31", "mosaicml-streaming": "0.13.0"}


def test_rounds_of_the_training_step_end(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    from train_step import LIMITS

    cpu, gpu = LIMITS["cpu"], LIMITS["cuda"]
    assert [cpu.want_more(done, 89.0, late=False) for done in (0, 19, 20)] == [True, True, False]
    assert [cpu.want_more(done, 91.0, late=False) for done in (6, 7)] == [True, False]
    assert [gpu.want_more(done, 21.0, late=False) for done in (2, 3)] == [True, False]
    assert [gpu.want_more(done, 0.0, late=True) for done in (0, 1)] == [True, False]
    assert 6 * gpu.enough < gpu.all < 8 * 60
