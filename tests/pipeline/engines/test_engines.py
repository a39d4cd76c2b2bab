"""Every engine and ZeRO stage: the same first values and losses, and checkpoints that each of them reads."""

import math
import shutil
from pathlib import Path

import pytest

from tests.ranks import run_on_ranks

WORKER = Path(__file__).parent / "worker.py"
ENGINES = [("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3), ("accelerate", 0)]


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> dict:
    """Four undisturbed steps of one rank."""
    return run_on_ranks(WORKER, 1, "accelerate", 0, "float32", "adamw", 4, tmp_path_factory.mktemp("reference"))[0]


@pytest.mark.parametrize(
    ("kind", "stage"),
    [
        *(pytest.param(*each, marks=pytest.mark.slow) for each in ENGINES[:3]),
        ENGINES[3],
        pytest.param(*ENGINES[4], marks=pytest.mark.long),
    ],
)
def test_two_ranks_resume_to_the_bit_and_hand_over_to_any_other_shape(kind, stage, reference, tmp_path):
    whole = run_on_ranks(WORKER, 2, kind, stage, "float32", "adamw", 4, tmp_path / "whole")
    assert whole[0]["weights"] == whole[1]["weights"]
    assert whole[0]["first"] == reference["first"]  # exact masters, whatever the ranks and the stage
    assert whole[0]["losses"] == pytest.approx(reference["losses"], abs=1e-6)
    assert whole[0]["norms"] == pytest.approx(reference["norms"], rel=1e-5)

    run_on_ranks(WORKER, 2, kind, stage, "float32", "adamw", 2, tmp_path / "half")
    shutil.copytree(tmp_path / "half", tmp_path / "elsewhere")
    resumed = run_on_ranks(WORKER, 2, kind, stage, "float32", "adamw", 2, tmp_path / "half", "resume")[0]
    assert resumed["losses"] == whole[0]["losses"][2:]
    assert resumed["weights"] == whole[0]["weights"]

    other_kind, other_stage = ENGINES[(ENGINES.index((kind, stage)) + 2) % len(ENGINES)]
    moved = run_on_ranks(WORKER, 3, other_kind, other_stage, "float32", "adamw", 2, tmp_path / "elsewhere", "resume")[0]
    assert moved["losses"] == pytest.approx(reference["losses"][2:], abs=1e-6)
    assert moved["norms"] == pytest.approx(reference["norms"][2:], rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "stage"),
    [
        pytest.param("deepspeed", 1, marks=pytest.mark.slow),
        pytest.param("deepspeed", 3, marks=pytest.mark.long),
        ("accelerate", 0),
    ],
)
def test_momentum_moves_with_the_checkpoint(kind, stage, tmp_path):
    whole = run_on_ranks(WORKER, 2, kind, stage, "float32", "sgd", 4, tmp_path / "whole")[0]
    run_on_ranks(WORKER, 2, kind, stage, "float32", "sgd", 2, tmp_path / "half")
    resumed = run_on_ranks(WORKER, 1, "accelerate", 0, "float32", "sgd", 2, tmp_path / "half", "resume")[0]
    assert resumed["losses"] == pytest.approx(whole["losses"][2:], abs=1e-6)


@pytest.mark.long
def test_one_group_of_parameters_goes_on_as_many_under_any_engine_stage_and_number_of_ranks(tmp_path):
    """With layer decay, ``decay = "kernels"`` and no clipping; against plain torch, each rate by hand."""
    worker = Path(__file__).parent / "worker_groups.py"
    third = run_on_ranks(worker, 2, tmp_path, "plain")[0]
    fourth = run_on_ranks(worker, 1, tmp_path, "many")[0]
    expected = third.pop("reference")
    assert fourth.pop("reference") == expected
    assert len(third) == len(fourth) == len(ENGINES)
    for engine in third:
        assert third[engine] == pytest.approx(third["accelerate-0"], abs=1e-6), engine
        assert fourth[engine] == pytest.approx(fourth["accelerate-0"], abs=1e-6), engine
        # Adam's first steps are as long for a gradient of nothing but rounding; one rate for all is 2e-2 off, one
        # decay 3e-4.
        assert third[engine] == pytest.approx(expected[2:3], abs=1e-4), engine
        assert fourth[engine] == pytest.approx(expected[3:], abs=1e-4), engine


@pytest.mark.slow
@pytest.mark.parametrize("model", ["hybrid", "axial", "bit"])
def test_other_models_train_the_same_under_zero_3(model, tmp_path):
    alone = run_on_ranks(WORKER, 1, "accelerate", 0, "float32", "adamw", 3, tmp_path / "alone", "", model)[0]
    shared = run_on_ranks(WORKER, 2, "deepspeed", 3, "float32", "adamw", 3, tmp_path / "shared", "", model)[0]
    assert shared["first"] == alone["first"]
    assert shared["losses"] == pytest.approx(alone["losses"], abs=1e-4)
    assert shared["norms"] == pytest.approx(alone["norms"], rel=1e-4)


@pytest.mark.long
def test_a_step_that_is_held_back_changes_nothing_on_any_rank_under_any_engine(tmp_path):
    """Steps 0 and 2 by the guard, 3 because one rank's gradient is not a number; the first one is SGD's first too."""
    ranks = run_on_ranks(Path(__file__).parent / "worker_guard.py", 2)
    assert len(ranks[0]) == 2 * len(ENGINES)
    losses = ranks[0]["accelerate-0-adamw"]["losses"]
    for rank in ranks:
        for engine, found in rank.items():
            digests = found["digests"]
            assert found["applied"] == [False, True, False, False, True], engine
            assert digests[0] == digests[1] != digests[2] == digests[3] == digests[4] != digests[5], engine
            assert digests[5] == found["without"], engine
            assert found["losses"][:2] == pytest.approx(losses[:2], abs=1e-6), engine  # of both ranks
            assert [loss for loss, _ in found["asked"]] == pytest.approx(found["losses"], nan_ok=True), engine
            norms = [norm for _, norm in found["asked"]]
            assert norms == pytest.approx([norm for _, norm in ranks[0][engine]["asked"]], nan_ok=True), engine
            assert [math.isfinite(norm) for norm in norms] == [True, True, True, False, True], engine
