"""Attention in bfloat16 on the CPU beside PyTorch's own in float64, and where it is taken."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from pipeline.models import create_model
from pipeline.models.cpuattention import attention, pays


def own(qkv):
    q, k, v = (each.transpose(1, 2) for each in qkv.unbind(2))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("shape", [(2, 70, 3, 2, 8), (1, 197, 3, 3, 64)])
def test_as_exact_as_pytorchs_own(shape):
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(shape, generator=generator).bfloat16()
    grad = torch.randn((*shape[:2], shape[3] * shape[4]), generator=generator).bfloat16()

    def results(function, dtype):
        value = qkv.to(dtype, copy=True).requires_grad_()
        out = function(value)
        return out.double(), torch.autograd.grad(out, value, grad.to(dtype))[0].double()

    exact = results(own, torch.float64)
    ours, theirs = results(attention, torch.bfloat16), results(own, torch.bfloat16)
    assert torch.equal(ours[0], theirs[0])
    for part in range(3):  # gradients of queries, keys, values
        at = (slice(None), slice(None), part)
        size = exact[1][at].norm()
        error, known = ((each[1][at] - exact[1][at]).norm() / size for each in (ours, theirs))
        assert error < 2**-7  # a rounding to bfloat16
        assert error < 3 * known  # logits are rounded once more


def test_where_it_is_taken():
    def taken(tokens, dtype=torch.bfloat16, device="cpu"):
        return pays(torch.empty(1, tokens, 3, 2, 8, dtype=dtype, device=device, requires_grad=True))

    assert taken(197)
    assert not taken(197, torch.float32)
    assert not taken(197, device="meta")
    assert taken(640)
    assert taken(32)
    assert not taken(31)  # 31 * 31 * 2 * 8 < 2**14
    assert not taken(641)
    with torch.no_grad():
        assert not taken(197)


@pytest.mark.parametrize(("position", "nodes"), [({}, 2), ({"position": "relative", "position_at": "every"}, 0)])
def test_a_model_takes_it(position, nodes):
    size = {"image_size": 64, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    model = create_model("vit_ti16", **size, num_classes=5, **position, seed=0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(torch.randn(2, 3, 64, 64)).square().mean()
    found, seen = [loss.grad_fn], set()
    while found:
        node = found.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found += [each for each, _ in node.next_functions]
    assert sum(type(node).__name__ == "_AttentionBackward" for node in seen) == nodes
    loss.backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "qkv" in name)
