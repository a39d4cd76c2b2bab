"""Official .npz files made here, and what their models say in NumPy and float64, from their own names and layouts.

Ports of google-research/vision_transformer and google-research/big_transfer: nothing of the package is used.
"""

import math

import numpy as np

from tests.pipeline.models.numpy_layers import conv, group_norm, max_pool, same

Arrays = dict[str, np.ndarray]

OLD = ("MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3")  # before flax had linen; all released ViTs
NEW = ("MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0")


def _filled(shapes: dict[str, tuple]) -> Arrays:
    draw = np.random.default_rng(0)
    return {
        name: (draw.standard_normal(shape, np.float32) * 0.2 + ("scale" in name or "gamma" in name)).astype(np.float32)
        for name, shape in shapes.items()
    }


def vit_shapes(
    d: int, depth: int, heads: int, m: int, patch: int, tokens: int, k: int,
    names: tuple = OLD, cls: bool = True, pre_logits: bool = False, units: list[int] | None = None, width: int = 64,
) -> dict[str, tuple]:  # fmt: skip
    """Return names and shapes of a ViT, or with ``units`` of a hybrid, as in the released files."""
    mha, second, mlp = names
    channels = 3
    shapes: dict[str, tuple] = {}
    if units is not None:
        shapes |= {"conv_root/kernel": (7, 7, 3, width), "gn_root/scale": (1, 1, 1, width)}
        shapes |= {"gn_root/bias": (1, 1, 1, width)}
        channels = width
        for b, count in enumerate(units, 1):
            inside = width * 2 ** (b - 1)
            for u in range(1, count + 1):
                unit = f"block{b}/unit{u}"
                sizes = {"1": (1, 1, channels, inside), "2": (3, 3, inside, inside), "3": (1, 1, inside, 4 * inside)}
                sizes |= {"_proj": (1, 1, channels, 4 * inside)} if u == 1 else {}
                for what, size in sizes.items():
                    shapes[f"{unit}/conv{what}/kernel"] = size
                    shapes[f"{unit}/gn{what}/scale"] = shapes[f"{unit}/gn{what}/bias"] = (1, 1, 1, size[-1])
                channels = 4 * inside
    shapes |= {"embedding/kernel": (patch, patch, channels, d), "embedding/bias": (d,)}
    shapes |= {"cls": (1, 1, d)} if cls else {}
    shapes["Transformer/posembed_input/pos_embedding"] = (1, tokens, d)
    for i in range(depth):
        block = f"Transformer/encoderblock_{i}"
        for part in ("query", "key", "value"):
            shapes[f"{block}/{mha}/{part}/kernel"] = (d, heads, d // heads)
            shapes[f"{block}/{mha}/{part}/bias"] = (heads, d // heads)
        shapes |= {f"{block}/{mha}/out/kernel": (heads, d // heads, d), f"{block}/{mha}/out/bias": (d,)}
        for norm in ("LayerNorm_0", second):
            shapes |= {f"{block}/{norm}/scale": (d,), f"{block}/{norm}/bias": (d,)}
        shapes |= {f"{block}/{mlp}/Dense_0/kernel": (d, m), f"{block}/{mlp}/Dense_0/bias": (m,)}
        shapes |= {f"{block}/{mlp}/Dense_1/kernel": (m, d), f"{block}/{mlp}/Dense_1/bias": (d,)}
    shapes |= {"Transformer/encoder_norm/scale": (d,), "Transformer/encoder_norm/bias": (d,)}
    if pre_logits:
        shapes |= {"pre_logits/kernel": (d, d), "pre_logits/bias": (d,)}
    return shapes | {"head/kernel": (d, k), "head/bias": (k,)}


def vit(*arguments, **settings) -> Arrays:
    """Return a file of ``vit_shapes`` with random values."""
    return _filled(vit_shapes(*arguments, **settings))


def bit_shapes(units: list[int], width: int, k: int) -> dict[str, tuple]:
    """Return names and shapes of a BiT ResNet, as in the released files."""
    shapes: dict[str, tuple] = {"resnet/root_block/standardized_conv2d/kernel": (7, 7, 3, width)}
    channels = width
    for b, count in enumerate(units, 1):
        inside = width * 2 ** (b - 1)
        for u in range(1, count + 1):
            unit = f"resnet/block{b}/unit{u:02d}"
            parts = {"a": (1, 1, channels, inside), "b": (3, 3, inside, inside), "c": (1, 1, inside, 4 * inside)}
            for part, size in parts.items():
                shapes[f"{unit}/{part}/standardized_conv2d/kernel"] = size
                shapes[f"{unit}/{part}/group_norm/gamma"] = shapes[f"{unit}/{part}/group_norm/beta"] = (size[2],)
            if u == 1:
                shapes[f"{unit}/a/proj/standardized_conv2d/kernel"] = (1, 1, channels, 4 * inside)
            channels = 4 * inside
    shapes |= {"resnet/group_norm/gamma": (channels,), "resnet/group_norm/beta": (channels,)}
    return shapes | {"resnet/head/conv2d/kernel": (1, 1, channels, k), "resnet/head/conv2d/bias": (k,)}


def bit(*arguments) -> Arrays:
    """Return a file of ``bit_shapes`` with random values."""
    return _filled(bit_shapes(*arguments))


def vit_logits(p: Arrays, image: np.ndarray, names: tuple = OLD) -> np.ndarray:
    """Return the logits of one image [3, H, W] by the arrays of a ViT or hybrid, as models_vit.py computes them."""
    p = {name: value.astype(np.float64) for name, value in p.items()}
    mha, second, mlp = names

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p[f"{name}/scale"] + p[f"{name}/bias"]

    def attention(x, name):
        q, k, v = (
            np.einsum("td,dhe->hte", x, p[f"{name}/{part}/kernel"]) + p[f"{name}/{part}/bias"][:, None]
            for part in ("query", "key", "value")
        )
        a = np.exp(np.einsum("hte,hse->hts", q, k) / math.sqrt(q.shape[-1]))
        seen = np.einsum("hts,hse->hte", a / a.sum(-1, keepdims=True), v)
        return np.einsum("hte,hed->td", seen, p[f"{name}/out/kernel"]) + p[f"{name}/out/bias"]

    def dense(x, name):
        return x @ p[f"{name}/kernel"] + p[f"{name}/bias"]

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    x = _root(p, image.astype(np.float64)) if "conv_root/kernel" in p else image.astype(np.float64)
    patch = p["embedding/kernel"].shape[0]
    x = conv(x, p["embedding/kernel"].transpose(3, 2, 0, 1), patch).reshape(p["embedding/bias"].size, -1).T
    x = x + p["embedding/bias"]
    if "cls" in p:
        x = np.concatenate([p["cls"][0], x])
    x = x + p["Transformer/posembed_input/pos_embedding"][0]
    i = 0
    while f"Transformer/encoderblock_{i}/LayerNorm_0/scale" in p:
        block = f"Transformer/encoderblock_{i}"
        x = x + attention(norm(x, f"{block}/LayerNorm_0"), f"{block}/{mha}")
        hidden = gelu(dense(norm(x, f"{block}/{second}"), f"{block}/{mlp}/Dense_0"))
        x = x + dense(hidden, f"{block}/{mlp}/Dense_1")
        i += 1
    x = norm(x, "Transformer/encoder_norm")
    x = x[0] if "cls" in p else x.mean(0)
    if "pre_logits/kernel" in p:
        x = np.tanh(dense(x, "pre_logits"))
    return dense(x, "head")


def _root(p: Arrays, x: np.ndarray) -> np.ndarray:
    """Return the feature map of a hybrid's ResNet, as models_resnet.py computes it."""

    def std_conv(x, name, stride=1):
        w = p[f"{name}/kernel"]
        w = w - w.mean((0, 1, 2))
        w = w / (w.std((0, 1, 2)) + 1e-5)
        return conv(x, w.transpose(3, 2, 0, 1), stride, same(x.shape[1], w.shape[0], stride))

    def norm(x, name):
        return group_norm(x, p[f"{name}/scale"].reshape(-1), p[f"{name}/bias"].reshape(-1), 1e-6)

    x = np.maximum(norm(std_conv(x, "conv_root", 2), "gn_root"), 0)
    x = max_pool(x, 3, 2, same(x.shape[1], 3, 2), -np.inf)
    b = 1
    while f"block{b}/unit1/conv1/kernel" in p:
        u = 1
        while f"block{b}/unit{u}/conv1/kernel" in p:
            unit, stride = f"block{b}/unit{u}", 2 if b > 1 and u == 1 else 1
            rest = norm(std_conv(x, f"{unit}/conv_proj", stride), f"{unit}/gn_proj") if u == 1 else x
            y = np.maximum(norm(std_conv(x, f"{unit}/conv1"), f"{unit}/gn1"), 0)
            y = np.maximum(norm(std_conv(y, f"{unit}/conv2", stride), f"{unit}/gn2"), 0)
            x = np.maximum(rest + norm(std_conv(y, f"{unit}/conv3"), f"{unit}/gn3"), 0)
            u += 1
        b += 1
    return x


def bit_logits(p: Arrays, image: np.ndarray) -> np.ndarray:
    """Return the logits of one image [3, H, W] by the arrays of a BiT, as bit_pytorch/models.py computes them."""
    p = {name: value.astype(np.float64) for name, value in p.items()}

    def std_conv(x, name, stride=1, pad=0):
        w = p[f"{name}/standardized_conv2d/kernel"]
        w = (w - w.mean((0, 1, 2))) / np.sqrt(w.var((0, 1, 2)) + 1e-10)
        return conv(x, w.transpose(3, 2, 0, 1), stride, (pad, pad))

    def norm(x, name):
        return np.maximum(group_norm(x, p[f"{name}/group_norm/gamma"], p[f"{name}/group_norm/beta"], 1e-5), 0)

    x = std_conv(image.astype(np.float64), "resnet/root_block", 2, 3)
    x = max_pool(x, 3, 2, (1, 1), 0.0)
    b = 1
    while f"resnet/block{b}/unit01/a/standardized_conv2d/kernel" in p:
        u = 1
        while f"resnet/block{b}/unit{u:02d}/a/standardized_conv2d/kernel" in p:
            unit, stride = f"resnet/block{b}/unit{u:02d}", 2 if b > 1 and u == 1 else 1
            y = norm(x, f"{unit}/a")
            rest = std_conv(y, f"{unit}/a/proj", stride) if u == 1 else x
            y = std_conv(y, f"{unit}/a")
            y = std_conv(norm(y, f"{unit}/b"), f"{unit}/b", stride, 1)
            x = rest + std_conv(norm(y, f"{unit}/c"), f"{unit}/c")
            u += 1
        b += 1
    x = norm(x, "resnet").mean((1, 2))
    return x @ p["resnet/head/conv2d/kernel"][0, 0] + p["resnet/head/conv2d/bias"]
