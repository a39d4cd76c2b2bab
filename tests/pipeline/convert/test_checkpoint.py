"""Our own checkpoints into every format: the weights, their moving average, and a card that tells the training."""

import pytest
import torch

from pipeline import checkpoint
from pipeline.config import TrainSettings
from pipeline.convert.convert import convert
from pipeline.convert.recognise import load_model, open_source
from pipeline.models import create_model
from pipeline.settings import check
from shards.errors import UserError
from tests.pipeline.convert.made import TINY

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def write(folder, model: dict, best: bool = False, samples: int = 64, ema: bool = True, train="/data/birds"):
    """Write a checkpoint in pieces that end in the middle of rows; the average is the weights and one."""
    made = create_model(**model, seed=3)
    pieces = []
    for name, parameter in made.named_parameters():
        flat, cut = parameter.detach().flatten(), parameter.numel() // 3 + 1
        for kind, value in (
            ("weight", flat),
            *([("ema", flat + 1)] if ema else []),
            ("exp_avg", torch.zeros_like(flat)),
        ):
            pieces += [(kind, name, 0, value[:cut].clone()), (kind, name, cut, value[cut:].clone())]
    over = {"kind": "supervised", "duration": "1 epoch", "global_batch": 8, "data": {"train": train}}
    over["model"] = {"name": "vit_ti16"}
    settings = check(TrainSettings, over | {"optim": {"lr": 0.125} | ({"ema": 0.9} if ema else {})}, "test")
    state = {"settings": settings.model_dump(mode="json"), "model": model, "classes": [f"bird {i}" for i in range(7)]}
    state |= {"val": {"top1": 0.625, "images": 40}, "commit": "0123abcd", "versions": {"torch": "2"}}
    shapes = {name: tuple(parameter.shape) for name, parameter in made.named_parameters()}
    pieces = [piece for piece in pieces if piece[3].numel()]
    return made.eval(), checkpoint.save(folder / "checkpoints", samples, pieces, shapes, state, best)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(("to", "where"), [("safetensors", "w"), ("transformers", "folder"), ("npz", "w.npz")])
def test_a_checkpoint_goes_everywhere(to, where, tmp_path):
    made, path = write(tmp_path / "run", {"name": "vit_ti16", **TINY})
    done = convert(path, tmp_path / where, to)
    assert done["samples"] == 64
    average = convert(tmp_path / "run", tmp_path / f"ema-{where}", to, ema=True)
    assert average["proof"]["largest_difference_of_logits"] == 0
    found, mean = open_source(tmp_path / where), open_source(tmp_path / f"ema-{where}")
    assert found.classes[2] == "bird 2"
    assert (found.note["samples"], found.note["val"]["top1"], mean.note["ema"]) == (64, 0.625, True)
    for name, parameter in made.named_parameters():
        assert found.tensor(name).equal(parameter), name
        assert mean.tensor(name).equal(parameter + 1), name
    with open(done["card"]) as file:
        card = file.read()
    for told in ("| data | /data/birds |", "| samples seen | 64 |", "| commit of Patchmill | 0123abcd |",
                 "| validation top1 | 0.625 |", '"lr": 0.125', "| weights | of the last step |"):  # fmt: skip
        assert told in card, told


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("train", "told"),
    [
        ([{"url": "a/train"}, {"url": "a/dev"}], "a/train; a/dev"),
        (
            [{"url": "a", "weight": 3}, {"url": "b", "weight": 1, "exclude": "v"}],
            "a (weight 3.0); b (weight 1.0, exclude v)",
        ),
    ],
)
def test_the_card_tells_every_set_of_a_mixture(train, told, tmp_path):
    write(tmp_path / "run", {"name": "vit_ti16", **TINY}, train=train)
    with open(convert(tmp_path / "run", tmp_path / "w", "safetensors")["card"]) as file:
        assert f"| data | {told} |" in file.read()


@pytest.mark.usefixtures("alone")
def test_latest_best_and_none(tmp_path):
    model = {"name": "vit_ti16", **TINY}
    write(tmp_path / "run", model, best=True, samples=32)
    write(tmp_path / "run", model, samples=64, ema=False)
    assert convert(tmp_path / "run", tmp_path / "w")["samples"] == 64
    assert convert(tmp_path / "run", tmp_path / "w", which="best")["samples"] == 32
    with pytest.raises(UserError, match="has no moving average of the weights"):
        convert(tmp_path / "run", tmp_path / "w", ema=True)
    (tmp_path / "run/checkpoints/best").unlink()
    with pytest.raises(UserError, match="there is no whole best checkpoint in"):
        convert(tmp_path / "run", tmp_path / "w", which="best")


@pytest.mark.usefixtures("alone")
def test_a_decoder_stays_behind_but_is_loaded_with_its_checkpoint(tmp_path):
    decoder = {"decoder_depth": 1, "decoder_dim": 16, "decoder_heads": 2}
    model = {"name": "vit_ti16", **TINY, "num_classes": 0, "position": "sincos_2d_moco"} | decoder
    made, path = write(tmp_path / "run", model)
    whole, _ = load_model(path)
    assert whole.decoder.pred.weight.equal(made.decoder.pred.weight)
    convert(path, tmp_path / "w")
    assert not [name for name in open_source(tmp_path / "w").parameters() if name.startswith("decoder")]
    convert(path, tmp_path / "folder", "transformers")
    with torch.no_grad():
        assert open_source(tmp_path / "folder").build()(IMAGES).equal(made(IMAGES))
