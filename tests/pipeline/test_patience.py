from pipeline import patience
from pipeline.config import TrainSettings
from pipeline.settings import check

BASE = {"duration": "9 epochs", "global_batch": 8, "data": {"train": "a", "val": "b"}, "model": {"name": "vit_b16"}}


def test_so_many_evaluations_in_a_row_without_a_better_one_end_a_stage():
    settings = check(TrainSettings, BASE | {"evaluate": {"patience": 2}}, "test")
    state, seen = {"best": None, "worse": 0, "val": None}, []
    for samples, loss in enumerate([3.0, 2.0, 2.0, 1.0, 1.5, 1.0, 0.5]):
        state["val"] = {"loss": loss}
        best = patience.note_best(state, samples, lambda val, best: val["loss"] < best["loss"])
        seen.append((best, patience.lost(settings, state)))
    assert [best for best, _ in seen] == [True, True, False, True, False, False, True]
    assert [lost for _, lost in seen] == [False, False, False, False, False, True, False]
    assert state["best"] == {"samples": 6, "loss": 0.5}


def test_without_patience_nothing_ends_early():
    settings = check(TrainSettings, BASE, "test")
    assert not patience.lost(settings, {"worse": 10**9})
