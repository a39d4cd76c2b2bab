"""The Axial-ViT against the words of appendix D.6, patch by patch."""

import math

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.models import create_model
from shards.errors import UserError

TINY = {"image_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 7}


def randomized(**settings) -> torch.nn.Module:
    """Return a tiny model in eval mode whose every parameter is random, so that none is without effect."""
    model = create_model("axial_vit_b16", **(TINY | settings)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2, generator=generator)
    return model


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("name", "patch"), [("axial_vit_b16", 16), ("axial_vit_b32", 32)])
def test_counts(name, patch):
    """Two blocks for each of ViT-B's, no class token, and attention over g patches instead of g*g."""
    g, width, mlp, num_classes = 224 // patch, 768, 3072, 1000
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = create_model(name, seed=None)
        model(torch.empty(1, 3, 224, 224))
    block = 4 * width**2 + 4 * width + 2 * width * mlp + mlp + width + 4 * width
    parameters = 3 * patch**2 * width + width + g**2 * width + 24 * block + 2 * width + (width + 1) * num_classes
    assert sum(p.numel() for p in model.parameters()) == parameters
    pair = 4 * g**2 * width**2 + 2 * g**3 * width + 2 * g**2 * width * mlp
    assert counter.get_total_flops() == 2 * (3 * patch**2 * g**2 * width + 24 * pair + width * num_classes)


def numpy_forward(p: dict, image: np.ndarray, heads: int) -> np.ndarray:
    """Logits of one image in float64: z[row][column] is a patch, which attends to its row, then to its column."""
    kernel = p["patch_embed.proj.weight"]
    width, patch = kernel.shape[0], kernel.shape[-1]
    g, d = image.shape[-1] // patch, width // heads

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p[f"{name}.weight"] + p[f"{name}.bias"]

    def dense(x, name):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def attention(line, name):
        q, k, v = np.split(dense(norm(line, f"{name}.norm1"), f"{name}.attn.qkv"), 3, axis=1)
        outputs = []
        for part in (slice(head * d, (head + 1) * d) for head in range(heads)):
            a = np.exp(q[:, part] @ k[:, part].T / math.sqrt(d))
            outputs.append(a / a.sum(1, keepdims=True) @ v[:, part])
        return dense(np.concatenate(outputs, 1), f"{name}.attn.proj")

    def mlp(x, name):
        x = dense(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")
        x = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        return dense(x, f"{name}.mlp.fc2")

    z = np.empty((g, g, width))
    for row in range(g):
        for column in range(g):
            pixels = image[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            z[row, column] = kernel.reshape(width, -1) @ pixels.reshape(-1) + p["patch_embed.proj.bias"]
            z[row, column] += p["pos_embed"][0, row * g + column]
    for pair in range(TINY["depth"]):
        rows, columns = f"blocks.{2 * pair}", f"blocks.{2 * pair + 1}"
        z = z + np.stack([attention(z[row], rows) for row in range(g)])
        z = z + mlp(z, rows)
        z = z + np.stack([attention(z[:, column], columns) for column in range(g)], axis=1)
        z = z + mlp(z, columns)
    return dense(norm(z, "norm").mean((0, 1)), "head")


def test_forward_equals_the_definition(images):
    model = randomized()
    p = {name: value.double().numpy() for name, value in model.state_dict().items()}
    expected = np.stack([numpy_forward(p, image, TINY["num_heads"]) for image in images.double().numpy()])
    with torch.no_grad():
        scale = np.abs(expected).max()
        np.testing.assert_allclose(model(images).numpy(), expected, rtol=0, atol=1e-5)
        np.testing.assert_allclose(model.double()(images.double()).numpy(), expected, rtol=0, atol=1e-11 * scale)


def test_two_pairs_show_every_patch_to_every_other(images):
    """A patch reaches its row in the first block, and so the whole grid in the second; one block alone does not."""
    model = randomized(depth=1)
    other = images.clone()
    other[:, :, 0, 0] += 1  # a pixel of the patch in row 0 and column 0

    def changed(blocks):
        with torch.no_grad():
            before, after = model.patch_embed(images), model.patch_embed(other)
            for block in model.blocks[:blocks]:
                before, after = block(before), block(after)
        return (before != after).any(2).view(2, 4, 4)

    assert changed(0).sum() == 2
    assert changed(1)[:, 0].all()
    assert not changed(1)[:, 1:].any()
    assert changed(2).all()


def test_first_values_and_names_are_vits():
    axial = create_model("axial_vit_b16", **TINY, representation=True, head_bias="log_prior", seed=3)
    vit = create_model("vit_b16", **(TINY | {"depth": 4}), representation=True, head_bias="log_prior", seed=3)
    ours, theirs = axial.state_dict(), vit.state_dict()
    assert set(ours) == set(theirs) - {"cls_token"}
    for name in set(ours) - {"pos_embed"}:
        assert torch.equal(ours[name], theirs[name]), name
    assert ours["pos_embed"].shape == (1, 16, 48)
    assert ours["pos_embed"].std().item() == pytest.approx(0.02, rel=0.1)


def test_drop_path_is_of_whole_images(images):
    """An image that skips all branches but those of the first pair sees a model of that pair alone."""
    model = randomized(drop_path=0.5).train()
    assert [block.drop_path for block in model.blocks] == pytest.approx([0, 1 / 6, 1 / 3, 1 / 2])
    draws = torch.full((2, 4, 2), 0.999)
    draws[0, 2:] = 0
    with torch.no_grad():
        mixed, all_kept = model(images, draws), model(images, torch.full((2, 4, 2), 0.999))
        torch.testing.assert_close(mixed[1], all_kept[1])
        del model.blocks[2:]
        torch.testing.assert_close(model(images, draws[:, :2])[0], mixed[0])
    assert randomized(drop_path=0.5).train()(images).shape == (2, 7)


def test_a_compiled_model_is_one_graph(images):
    model, draws = randomized(drop_path=0.3).train(), torch.rand(2, 4, 2)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images, draws), model(images, draws), rtol=1e-5, atol=1e-5)


def test_mistakes_are_one_line():
    with pytest.raises(UserError, match="unknown setting of axial_vit_b16: 'pooling'"):
        create_model("axial_vit_b16", pooling="cls")
    with pytest.raises(UserError, match=r"image_size 230 is not divisible by patch_size 16; take 224 or 240$"):
        create_model("axial_vit_b16", image_size=230)
