import json

import numpy as np
import pytest
import torch

from pipeline.config import TrainSettings
from pipeline.convert.convert import convert
from pipeline.convert.recognise import load_model, open_source
from pipeline.ema import CHUNK, Ema
from pipeline.engines.gate import Gate
from pipeline.evaluate.classify import classify
from pipeline.settings import check, merge
from pipeline.train import train
from shards.augment import Resize
from shards.dataset import Dataset
from shards.errors import UserError
from tests.images import build_image_set


def test_the_average_is_numpys_and_steps_held_back_are_none_of_it():
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(3, 5)), torch.nn.Parameter(torch.randn(7))]
    optimizer = torch.optim.AdamW([{"params": [each]} for each in parameters], lr=0.1, fused=True)
    gate = Gate(optimizer, lambda loss, norm: loss < 0)
    ema = Ema(optimizer, 0.9)
    expected = []
    for parameter in parameters:
        ema.begin(parameter)
        expected.append(parameter.detach().numpy().astype(np.float64))
    for number in range(6):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter) * (torch.nan if number == 4 else 1)
        loss, norm = torch.tensor(-1.0 if number == 2 else 1.0), torch.tensor(torch.nan if number == 4 else 1.0)
        before = [ema.averages[parameter].clone() for parameter in parameters]
        gate.close(loss, lambda norm=norm: norm)
        optimizer.step()
        for parameter, average, old in zip(parameters, expected, before, strict=True):
            if number in (2, 4):
                assert torch.equal(ema.averages[parameter], old)
            else:
                average *= 0.9
                average += 0.1 * parameter.detach().numpy()
    for parameter, average in zip(parameters, expected, strict=True):
        np.testing.assert_allclose(ema.averages[parameter], average, atol=1e-6)


def test_weights_and_their_average_change_places_and_back():
    master = torch.nn.Parameter(torch.arange(CHUNK + 3.0))
    optimizer = torch.optim.SGD([master], lr=0.0, fused=True)
    ema = Ema(optimizer, 0.5)
    ema.begin(master)
    with torch.no_grad():
        master += 1
    where = master.data_ptr(), ema.averages[master].data_ptr()
    ema.exchange(master)
    assert torch.equal(master, torch.arange(CHUNK + 3.0))
    assert torch.equal(ema.averages[master], torch.arange(CHUNK + 3.0) + 1)
    assert (master.data_ptr(), ema.averages[master].data_ptr()) == where


def test_the_average_is_evaluated_saved_converted_and_begun_in_a_run_without(tmp_path, alone, capsys):
    folder = build_image_set(tmp_path, per_class=12, split={"val": 0.25}, shard_samples=8)
    base = {
        "duration": "4 steps", "global_batch": 12, "data": {"train": str(folder / "train"), "resolution": 16},
        "model": {"name": "vit_ti8", "embed_dim": 24, "num_heads": 3, "depth": 1}, "optim": {"lr": 0.05},
        "checkpoint": {"every": "2 steps"}, "evaluate": {"every": "4 steps", "ema": True},
    }  # fmt: skip
    over = {"data": {"val": str(folder / "val")}, "optim": {"ema": 0.9}, "engine": {"zero_stage": 1}}
    run = tmp_path / "run"
    done = train(check(TrainSettings, merge(base, over), "test"), run)
    assert json.loads((run / "deepspeed.json").read_text())["zero_optimization"]["stage"] == 1

    converted = convert(run, tmp_path / "average.safetensors", ema=True)
    assert converted["samples"] == 48
    convert(run, tmp_path / "weights.safetensors")
    average, weights = open_source(tmp_path / "average.safetensors"), open_source(tmp_path / "weights.safetensors")
    assert average.note["ema"]
    assert average.parameters().keys() == weights.parameters().keys()
    held_out = Dataset.open(folder / "val")
    for model, same in ((average.build(), True), (load_model(run, True)[0], True), (load_model(run)[0], False)):
        found = classify(model, held_out, Resize(16), 4)
        assert (found["loss"] == pytest.approx(done["val"]["loss"], abs=1e-6)) == same
    with pytest.raises(UserError, match=r"average\.safetensors holds one set of weights; give the checkpoint"):
        load_model(tmp_path / "average.safetensors", True)

    # Another run keeps no average, then does; under Accelerate, which has no configuration of DeepSpeed.
    run, without = tmp_path / "without", merge(base, {"evaluate": {"ema": False}, "engine": {"kind": "accelerate"}})
    train(check(TrainSettings, without, "test"), run)
    with pytest.raises(UserError, match=r"has no moving average of the weights; train with optim\.ema"):
        convert(run, tmp_path / "none.safetensors", ema=True)
    assert not (run / "deepspeed.json").exists()
    capsys.readouterr()
    train(check(TrainSettings, merge(without, {"duration": "5 steps", "optim": {"ema": 0.75}}), "test"), run)
    assert "optim.ema changed from None to 0.75; the average begins as the weights" in capsys.readouterr().err
    before = dict(load_model(run / "checkpoints" / "samples-000000000048")[0].named_parameters())
    after, average = (dict(load_model(run, ema)[0].named_parameters()) for ema in (False, True))
    for name, value in average.items():
        torch.testing.assert_close(value, 0.75 * before[name] + 0.25 * after[name], atol=1e-6, rtol=0)
