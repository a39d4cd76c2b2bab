"""Masked autoencoding in NumPy and float64, image by image: written from section 3 of the MAE paper and its code.

It shares nothing with the model but the names of the parameters.
"""

import math

import numpy as np


def sines(side: int, width: int) -> np.ndarray:
    """Return the fixed position embeddings of MoCo v3 and MAE, [side * side, width], without a class token's zeros."""
    rows = []
    for row in range(side):
        for column in range(side):
            at = []
            for place in (column, row):
                angles = [place / 10_000 ** (i / (width / 4)) for i in range(width // 4)]
                at += [*map(math.sin, angles), *map(math.cos, angles)]
            rows.append(at)
    return np.array(rows)


def reconstruction(p: dict[str, np.ndarray], image: np.ndarray, visible: list[int], heads: int, decoder_heads: int):
    """Return what a model tells of every patch, [N, P * P * 3], of image [3, H, W] and the patches that are seen."""
    side = image.shape[1] // p["patch_embed.proj.weight"].shape[-1]
    patch, width = image.shape[1] // side, len(p["cls_token"][0, 0])

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p[f"{name}.weight"] + p[f"{name}.bias"]

    def dense(x, name):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def blocks(z, prefix, heads):
        d = z.shape[1] // heads
        for i in range(1 + max(int(n[len(prefix) :].split(".")[0]) for n in p if n.startswith(prefix))):
            q, k, v = np.split(dense(norm(z, f"{prefix}{i}.norm1"), f"{prefix}{i}.attn.qkv"), 3, axis=1)
            outputs = []
            for head in range(heads):
                part = slice(head * d, (head + 1) * d)
                a = np.exp(q[:, part] @ k[:, part].T / math.sqrt(d))
                outputs.append(a / a.sum(1, keepdims=True) @ v[:, part])
            z = z + dense(np.concatenate(outputs, 1), f"{prefix}{i}.attn.proj")
            hidden = dense(norm(z, f"{prefix}{i}.norm2"), f"{prefix}{i}.mlp.fc1")
            hidden = 0.5 * hidden * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
            z = z + dense(hidden, f"{prefix}{i}.mlp.fc2")
        return z

    z = [p["cls_token"][0, 0]]
    for each in visible:
        row, column = divmod(each, side)
        pixels = image[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch].reshape(-1)
        kernel = p["patch_embed.proj.weight"].reshape(width, -1)
        z.append(kernel @ pixels + p["patch_embed.proj.bias"] + sines(side, width)[each])
    z = dense(norm(blocks(np.stack(z), "blocks.", heads), "norm"), "decoder.embed")
    whole = [z[0]]
    for each in range(side**2):
        token = z[1 + visible.index(each)] if each in visible else p["decoder.mask_token"][0, 0]
        whole.append(token + sines(side, len(token))[each])
    z = blocks(np.stack(whole), "decoder.blocks.", decoder_heads)
    return dense(norm(z, "decoder.norm"), "decoder.pred")[1:]


def patch_pixels(image: np.ndarray, side: int) -> np.ndarray:
    """Return the pixels of each patch of image [3, H, W], [side * side, P * P * 3], pixel by pixel."""
    patch = image.shape[1] // side
    found = []
    for row in range(side):
        for column in range(side):
            cut = image[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            found.append([cut[c, y, x] for y in range(patch) for x in range(patch) for c in range(3)])
    return np.array(found)


def mae_loss(told: np.ndarray, image: np.ndarray, visible: list[int], norm: bool) -> float:
    """Return the mean squared error of what is told of the patches that are not seen."""
    losses = []
    for each, pixels in enumerate(patch_pixels(image, math.isqrt(len(told)))):
        if each not in visible:
            if norm:
                pixels = (pixels - pixels.mean()) / math.sqrt(pixels.var(ddof=1) + 1e-6)
            losses.append(((told[each] - pixels) ** 2).mean())
    return float(np.mean(losses))
