"""The Vision Transformer in NumPy and float64, image by image and head by head: what the model is compared with.

Written from equations 1 to 4 and appendices A and D.4 of the paper; the MAP head and the sines and cosines from
big_vision's code. It shares nothing with the model but the names of the parameters.
"""

import math

import numpy as np


def vit_logits(
    p: dict[str, np.ndarray],
    images: np.ndarray,
    heads: int,
    gelu: str = "tanh",
    pooling: str = "cls",
    position: str = "learned",
    position_at: str = "stem",
) -> np.ndarray:
    """Return the logits [n, K] of images [n, 3, H, W], by a model's parameters under their names.

    The number of blocks and of registers, and what other layers there are, is read from the names.
    """
    patch = p["patch_embed.proj.weight"].shape[-1]
    side, width = images.shape[-1] // patch, len(p["patch_embed.proj.weight"])
    depth = 1 + max(int(name.split(".")[1]) for name in p if name.startswith("blocks."))
    d = width // heads

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p[f"{name}.weight"] + p[f"{name}.bias"]

    def dense(x, name):
        return x @ p[f"{name}.weight"].T + p.get(f"{name}.bias", 0.0)

    def activation(x):
        if gelu == "exact":
            return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def mlp(x, name):
        return dense(activation(dense(x, f"{name}.fc1")), f"{name}.fc2")

    def attend(q, k, v, bias=None):
        """q [T, D] asks k and v [T', D]; ``bias(head)`` is [T, T']."""
        outputs = []
        for head in range(heads):
            part = slice(head * d, (head + 1) * d)
            logits = q[:, part] @ k[:, part].T / math.sqrt(d)
            a = np.exp(logits if bias is None else logits + bias(head))
            outputs.append(a / a.sum(1, keepdims=True) @ v[:, part])
        return np.concatenate(outputs, 1)

    # The places of the tokens: (row, column) of a patch, or what other token it is, in the order of the tokens.
    classes = ["cls"] if "cls_token" in p else []
    registers = [f"register {i}" for i in range(p["reg_token"].shape[1])] if "reg_token" in p else []
    patches = [(row, column) for row in range(side) for column in range(side)]
    tokens = classes + registers + patches

    def added(values, token):
        """What a kind of position embeddings that is added gives a token."""
        if position == "learned" and token not in registers:
            return values[0, (classes + patches).index(token)]
        if token not in patches or position == "learned":
            return np.zeros(width)
        row, column = token
        if position == "learned_2d":
            return np.concatenate([values[0, column], values[0, side + row]])
        omega = [1 / 10_000 ** (i / (width // 4 - 1)) for i in range(width // 4)]
        x, y = [column * w for w in omega], [row * w for w in omega]
        return np.array([*map(math.sin, x), *map(math.cos, x), *map(math.sin, y), *map(math.cos, y)])

    def relative(q, keys):
        """The logits of an attention whose keys are the offsets' embeddings."""

        def bias(head):
            part = slice(head * d, (head + 1) * d)
            logits = np.zeros((len(tokens), len(tokens)))
            for i, asking in enumerate(tokens):
                for j, asked in enumerate(tokens):
                    if asking in patches and asked in patches:
                        offset = patches.index(asked) - patches.index(asking)
                        logits[i, j] = q[i, part] @ keys[0, len(patches) - 1 + offset, part] / math.sqrt(d)
            return logits

        return bias

    def values_of(block):
        """The position embeddings at a block's input."""
        if position == "none" or (position_at == "stem" and block > 0):
            return None
        own = f"blocks.{block}.pos_embed"
        if position_at == "every" and (block > 0 or position == "relative"):
            return p[own]
        return p["pos_embed"] if position != "sincos_2d" else "fixed"

    logits = []
    for image in images:
        z = []
        for token in tokens:
            if token in patches:
                row, column = token
                pixels = image[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch].reshape(-1)
                kernel = p["patch_embed.proj.weight"].reshape(width, -1)
                z.append(kernel @ pixels + p["patch_embed.proj.bias"])
            else:
                z.append(p["cls_token"][0, 0] if token == "cls" else p["reg_token"][0, registers.index(token)])
        z = np.stack(z)
        for i in range(depth):
            values = values_of(i)
            if values is not None and position != "relative":
                z = z + np.stack([added(values, token) for token in tokens])
            q, k, v = np.split(dense(norm(z, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv"), 3, axis=1)
            bias = relative(q, values) if position == "relative" else None
            z = z + dense(attend(q, k, v, bias), f"blocks.{i}.attn.proj")
            z = z + mlp(norm(z, f"blocks.{i}.norm2"), f"blocks.{i}.mlp")
        y = norm(z, "norm")
        if pooling == "cls":
            y = y[tokens.index("cls")]
        else:
            y = y[[token in patches for token in tokens]]
            if pooling == "mean":
                y = y.mean(0)
            else:
                q = dense(p["attn_pool.latent"][0], "attn_pool.q")
                k, v = np.split(dense(y, "attn_pool.kv"), 2, axis=1)
                y = dense(attend(q, k, v), "attn_pool.proj")[0]
                y = y + mlp(norm(y, "attn_pool.norm"), "attn_pool.mlp")
        if "pre_logits.fc.weight" in p:
            y = np.tanh(dense(y, "pre_logits.fc"))
        logits.append(dense(y, "head"))
    return np.stack(logits)
