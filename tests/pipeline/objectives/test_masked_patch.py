import numpy as np
import pytest
import torch

from pipeline.config import TrainSettings
from pipeline.corruption import MASK, UNTOLD, corruption
from pipeline.models import create_model
from pipeline.objectives.masked_patch import MaskedPatch, patch_targets
from pipeline.settings import check
from pipeline.weights import resolve_model
from shards.batch import Batch
from shards.errors import UserError
from shards.evaluation import EvaluationBatch
from tests.pipeline.objectives.reference_masked_patch import cross_entropy, mean_colors

SIDE, GRID = 32, 4
TINY = {"image_size": SIDE, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}


def settings(**over) -> TrainSettings:
    base = {
        "kind": "masked_patch", "duration": "1 step", "global_batch": 4,
        "data": {"train": "x", "resolution": SIDE},
        "model": {"name": "vit_ti8", "embed_dim": 24, "depth": 2, "num_heads": 3},
    }  # fmt: skip
    return check(TrainSettings, base | over, "test")


def model_of(settings: TrainSettings):
    """Return a model whose every value is away from zero."""
    model = create_model(**resolve_model(settings, None, 7))
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) / 10)
    return model.eval()


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, SIDE, SIDE, 3), dtype=np.uint8)
    images = (images * rng.random((5, 1, 1, 3))).astype(np.uint8)  # else all means are grey
    return Batch(images, np.zeros(5, dtype=np.int64), np.arange(5) * 7)


def drawn(share=0.5, masked=0.8, replaced=0.1, patches=196, samples=400, seed=0, epoch=1000):
    return corruption(np.arange(samples), epoch, seed, patches, share, masked, replaced)


def test_half_is_corrupted_and_of_that_80_10_10_become_mask_other_and_themselves():
    found = drawn()
    where, source = found[..., 0], found[..., 1]
    assert where.shape == (400, 98)
    assert all(len(set(each)) == 98 for each in where)
    masks, kept = source == MASK, source == where
    others = ~masks & ~kept
    assert (masks.sum(axis=1) == 78).all()
    assert (others.sum(axis=1) == 10).all()
    assert (kept.sum(axis=1) == 10).all()
    assert source[others].min() >= 0
    assert source[others].max() < 196


def test_every_patch_is_corrupted_in_every_way_as_often_as_any_other():
    found = drawn(samples=20_000, patches=16)
    where, source = found[..., 0], found[..., 1]
    assert where.shape[1] == 8
    masks, kept = source == MASK, source == where
    for chosen, each in ((masks, 6), (kept, 1), (~masks & ~kept, 1)):
        counts = np.bincount(where[chosen], minlength=16)
        expected = 20_000 * each / 16
        assert np.abs(counts - expected).max() < 6 * np.sqrt(expected)
    steps = (source - where)[~masks & ~kept] % 16
    counts = np.bincount(steps, minlength=16)
    assert counts[0] == 0
    assert np.abs(counts[1:] - 20_000 / 15).max() < 6 * np.sqrt(20_000 / 15)


def test_patches_may_be_drawn_each_for_itself(batch):
    found = corruption(np.arange(4000), 10_000, 0, 196, 0.15, 0.8, 0.1, exact=False)
    where, source = found[..., 0], found[..., 1]
    assert (where == np.arange(196)).all()
    shares = {"mask": source == MASK, "self": source == where, "untold": source == UNTOLD}
    shares["other"] = ~sum(shares.values()).astype(bool)
    for kind, share in {"mask": 0.12, "self": 0.015, "untold": 0.85, "other": 0.015}.items():
        assert shares[kind].mean() == pytest.approx(share, abs=6 * (share * (1 - share) / source.size) ** 0.5), kind
    assert source[shares["other"]].min() >= 0
    counts = (~shares["untold"]).sum(axis=1)
    assert counts.std() == pytest.approx((196 * 0.15 * 0.85) ** 0.5, rel=0.1)

    chosen = settings(masked_patch={"counts": "drawn", "share": 0.3})
    model = model_of(chosen)
    objective = MaskedPatch(chosen, model, epoch=1000)
    images, drawn = objective.prepare(batch)
    losses = []
    with torch.no_grad():
        for n, image in enumerate(batch.images):  # one image and its corrupted patches alone
            told = [pair for pair in drawn[n].tolist() if pair[1] != UNTOLD]
            logits = model(images[n : n + 1], corruption=torch.tensor([told]))[0].double().numpy()
            colors = mean_colors(image, GRID, 1)
            losses += [cross_entropy(row, colors[patch, 0]) for row, (patch, _) in zip(logits, told, strict=True)]
        loss = objective.loss(model, images, drawn).item()
    assert loss == pytest.approx(sum(losses) / (5 * 0.3 * 16), rel=1e-5)


def test_draws_depend_on_seed_epoch_and_position_alone():
    first = drawn(samples=40)
    assert (corruption(np.array([7, 3, 39]), 1000, 0, 196, 0.5, 0.8, 0.1) == first[[7, 3, 39]]).all()
    assert (drawn(samples=40, seed=1) != first).any(axis=(1, 2)).all()
    again = corruption(np.arange(40) + 20, 20, 0, 196, 0.5, 0.8, 0.1)
    assert (again != first).any(axis=(1, 2)).all()
    assert drawn(share=0.15).shape[1] == 29
    assert drawn(share=1e-9).shape[1] == 1
    assert (drawn(share=1.0, masked=1.0, replaced=0.0, patches=4)[..., 1] == MASK).all()
    assert corruption(np.arange(3), None, 0, 1, 0.5, 0.0, 1.0).tolist() == [[[0, 0]]] * 3


def test_colours_are_those_of_the_numpy_reference(batch):
    images = torch.from_numpy(batch.images).permute(0, 3, 1, 2).float() / 127.5 - 1
    for target, parts in (("mean_color", 1), ("mean_colors_4x4", 4)):
        found = patch_targets(images, GRID, target)
        expected = np.stack([mean_colors(image, GRID, parts) for image in batch.images])
        assert (found.numpy() == expected).all()
        assert len(set(found.flatten().tolist())) > 10
    pixels = patch_targets(images, GRID, "pixels")
    assert pixels.shape == (5, 16, 3 * 8 * 8)
    assert torch.equal(pixels[2, 6].view(3, 8, 8), images[2, :, 8:16, 16:24])


def test_bins_split_0_to_255_evenly():
    levels = torch.arange(256).view(256, 1, 1, 1).expand(-1, 3, 2, 2).float() / 127.5 - 1
    found = patch_targets(levels, 1, "mean_color").flatten()
    red, green, blue = found // 64, found // 8 % 8, found % 8
    assert torch.equal(red, green)
    assert torch.equal(red, blue)
    assert torch.equal(torch.bincount(red), torch.full((8,), 32))
    assert torch.equal(red, red.sort().values)
    below_32 = torch.full((1, 3, 10, 10), 32.0)
    below_32[:, :, 0] = 31
    assert patch_targets(below_32 / 127.5 - 1, 1, "mean_color").item() == 0  # 31.9
    assert patch_targets(levels[:1] * torch.tensor([-1.0, 1, 1]).view(1, 3, 1, 1), 1, "mean_color").item() == 7 * 64


@pytest.mark.parametrize("target", ["mean_color", "mean_colors_4x4", "pixels"])
def test_the_loss_is_of_the_corrupted_patches_alone_and_as_the_reference_has_it(batch, target):
    chosen = settings(masked_patch={"target": target})
    model = model_of(chosen)
    objective = MaskedPatch(chosen, model, epoch=1000)
    images, drawn = objective.prepare(batch)
    with torch.no_grad():
        told = model(images, corruption=drawn).double().numpy()
        loss = objective.loss(model, images, drawn).item()
    losses = []
    for n, image in enumerate(batch.images):
        colors = None if target == "pixels" else mean_colors(image, GRID, 1 if target == "mean_color" else 4)
        for m, patch in enumerate(drawn[n, :, 0].tolist()):
            if target == "pixels":
                row, column = divmod(patch, GRID)
                cut = image[8 * row : 8 * row + 8, 8 * column : 8 * column + 8].transpose(2, 0, 1).reshape(-1)
                losses += ((told[n, m] - (cut / 127.5 - 1)) ** 2).tolist()
            else:
                logits = told[n, m].reshape(-1, 512)
                losses += [cross_entropy(each, color) for each, color in zip(logits, colors[patch], strict=True)]
    assert loss == pytest.approx(np.mean(losses), rel=1e-5)


def test_patch_embeddings_are_replaced_before_positions_are_added(batch):
    model = model_of(settings())
    images = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    drawn = torch.tensor([[[3, MASK], [5, 9], [7, 7]], [[0, 15], [15, 0], [1, MASK]]])
    with torch.no_grad():
        embedded = model.patch_embed(images)
        embedded[0, 3], embedded[0, 5] = model.mask_token[0, 0], embedded[0, 9].clone()
        embedded[1, [0, 15]] = embedded[1, [15, 0]].clone()
        embedded[1, 1] = model.mask_token[0, 0]
        x = torch.cat([model.cls_token.expand(2, -1, -1), embedded], dim=1) + model.pos_embed
        for block in model.blocks:
            x = block(x)
        x = model.norm(x)[:, 1:]
        expected = model.patch_head(torch.stack([x[0, [3, 5, 7]], x[1, [0, 15, 1]]]))
        assert torch.allclose(model(images, corruption=drawn), expected, atol=1e-6)


def test_patch_embeddings_may_be_replaced_with_their_positions(batch):
    chosen = settings(masked_patch={"positions": "first"}, model={"name": "vit_ti8", "embed_dim": 24, "depth": 2,
                      "num_heads": 3, "registers": 2})  # fmt: skip
    model = model_of(chosen)
    objective = MaskedPatch(chosen, model, epoch=1000)
    images, drawn = objective.prepare(batch)
    with torch.no_grad():
        x = torch.cat([model.cls_token.expand(5, -1, -1), model.patch_embed(images)], dim=1) + model.pos_embed
        for n, pairs in enumerate(drawn.tolist()):
            before = x[n].clone()
            for patch, source in pairs:
                x[n, 1 + patch] = model.mask_token[0, 0] if source == MASK else before[1 + source]
        x = torch.cat([x, model.reg_token.expand(5, -1, -1)], dim=1)
        for block in model.blocks:
            x = block(x)
        x = model.norm(x)[:, 1:17]
        told = model.patch_head(torch.stack([x[n, drawn[n, :, 0]] for n in range(5)]))  # [5, 8, 512]
        target = patch_targets(images, GRID, "mean_color")[..., 0].gather(1, drawn[..., 0])
        expected = torch.nn.functional.cross_entropy(told.flatten(0, 1), target.flatten()).item()
        assert objective.loss(model, images, drawn).item() == pytest.approx(expected, rel=1e-6)


def test_other_patches_may_be_of_any_image_of_the_micro_batch(batch):
    found = corruption(np.arange(20_000), 100_000, 0, 4, 1.0, 0.0, 1.0, images=5)
    where, source = found[..., 0], found[..., 1]
    steps = np.bincount((source - where).ravel() % 20, minlength=20)
    assert steps[0] == 0  # itself
    assert np.abs(steps[1:] - 80_000 / 19).max() < 6 * np.sqrt(80_000 / 19)

    chosen = settings(masked_patch={"others": "batch", "mask": 0.0, "other": 1.0}, global_batch=4, micro_batch=2)
    model = model_of(chosen)
    images, drawn = MaskedPatch(chosen, model, epoch=1000).prepare(batch)
    assert set((drawn[..., 1] // 16).flatten().tolist()) == {0, 1}  # two go through the model at once
    held_out = EvaluationBatch(batch.images, batch.labels, batch.positions, np.ones(5, dtype=bool))
    assert set((MaskedPatch(chosen, model, epoch=1000).prepare(held_out)[1][..., 1] // 16).flatten().tolist()) == {0}
    with torch.no_grad():
        embedded = model.patch_embed(images[1:3])
        found = model._corrupted(embedded, drawn[1:3])
        for n, pairs in enumerate(drawn[1:3].tolist()):
            for patch, source in pairs:
                other, of_it = divmod(source, 16)
                assert torch.equal(found[n, patch], embedded[(n + other) % 2, of_it])


@pytest.mark.parametrize("counts", ["exact", "drawn"])
def test_losses_may_be_summed_over_the_patches_of_an_image(batch, counts):
    masked = {"counts": counts, "share": 0.3, "target": "mean_colors_4x4"}
    losses = []
    for reduction in ("mean", "sum"):
        chosen = settings(masked_patch={**masked, "reduction": reduction})
        model = model_of(chosen)
        objective = MaskedPatch(chosen, model, epoch=1000)
        with torch.no_grad():
            losses.append(objective.loss(model, *objective.prepare(batch)).item())
    assert losses[1] == pytest.approx(losses[0] * (5 if counts == "exact" else 0.3 * 16), rel=1e-6)


def test_a_hybrid_and_models_without_a_class_token_can_do_it(batch):
    for over in ({"pooling": "mean", "position": "sincos_2d"}, {"backbone": [1], "patch_size": 2, "registers": 2}):
        model = create_model("vit_ti8", **TINY | {"num_classes": 0, "patch_target": "mean_color"} | over)
        objective = MaskedPatch(settings(), model, epoch=1000)
        loss = objective.loss(model, *objective.prepare(batch))
        loss.backward()
        assert loss.item() == pytest.approx(np.log(512), abs=1.5)
        assert model.mask_token.grad.abs().sum() > 0


def test_what_does_not_go_together_is_told():
    with pytest.raises(UserError, match="mixup are of classes"):
        settings(data={"train": "x", "augment": "light2"})
    with pytest.raises(UserError, match=r"mask 0.8 and other 0.3 are more than all"):
        settings(masked_patch={"other": 0.3})
    first = settings(masked_patch={"positions": "first"})
    with pytest.raises(UserError, match=r"'first' wants embeddings that are added .* and model.position is 'none'"):
        MaskedPatch(first, create_model("vit_ti8", **TINY, position="none", patch_target="pixels"), epoch=None)
    with pytest.raises(UserError, match=r"'first' wants embeddings .* model.position_at is 'every'"):
        MaskedPatch(first, create_model("vit_ti8", **TINY, position_at="every", patch_target="pixels"), epoch=None)
    alone = settings(masked_patch={"others": "batch"}, global_batch=4, micro_batch=1)
    with pytest.raises(UserError, match="'batch' takes patches of other images, and a micro_batch has one; make it"):
        MaskedPatch(alone, create_model("vit_ti8", **TINY, patch_target="pixels"), epoch=None)
    with pytest.raises(UserError, match="'bit_r50x1' has no such head"):
        resolve_model(settings(model={"name": "bit_r50x1"}), None, 3)
    with pytest.raises(UserError, match="pooling 'map' has nothing to do"):
        create_model("vit_ti8", **TINY, pooling="map", patch_target="pixels")
    with pytest.raises(UserError, match=r"unknown patch_target: 'color'; take one of mean_color, "):
        create_model("vit_ti8", **TINY, patch_target="color")
