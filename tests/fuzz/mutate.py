"""Damage, drawn by a seed: to bytes, and to the trees of values that JSON and TOML hold."""

import math
from collections.abc import Sequence
from random import Random
from typing import Any

EDGES = [0, 1, 2, 7, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0xFFFF, *(2**n - m for n in (31, 32, 63, 64) for m in (0, 1))]
JUNK: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, -(2**63) - 1, 0.5, -0.0, math.nan, math.inf, -math.inf, 1e308,
    "", " ", "a", "../../outside", "/nowhere/at/all", "/dev/zero", ".", "\0", "line\nline", "\ud800", "é" * 300,
    "9" * 5000, "{0..999}", "{a", "{pretrain}", "pipe:touch outside", "s3://", "http://", "1 epoch", "0 steps",
    "1e400 steps", [], [[]], [0], ["a", 1], {}, {"": ""}, {"a": {"b": None}}, [None] * 50,
]  # fmt: skip
"""Values that stand where others should: wrong types, ends of ranges, names that lead elsewhere."""


def damaged(data: bytes, rng: Random, tokens: tuple[bytes, ...] = (), within: int | None = None) -> bytes:
    """Return bytes with one to eight changes, of which half are near each other; ``within``: in so many first ones."""
    found = bytearray(data)
    near = rng.randrange(len(found) or 1)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        size = min(len(found), within or len(found))
        at = min(rng.randrange(size + 1), len(found))
        if rng.random() < 0.5:
            at = min(max(0, near + rng.randrange(-32, 33)), len(found))
        _change(found, at, rng, tokens)
    return bytes(found)


def _change(data: bytearray, at: int, rng: Random, tokens: tuple[bytes, ...]) -> None:
    match rng.randrange(8):
        case 0 | 1 if at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        case 2 if at < len(data):
            data[at] = rng.choice((0, 1, 0x2F, 0x30, 0x7F, 0x80, 0xFE, 0xFF, rng.randrange(256)))
        case 3:
            width = rng.choice((1, 2, 4, 8))
            edge = rng.choice(EDGES) & ((1 << 8 * width) - 1)
            data[at : at + width] = edge.to_bytes(width, rng.choice(("big", "little")))
        case 4:
            del data[at : at + rng.choice((1, 2, 4, 16, 512, len(data)))]
        case 5:
            start = rng.randrange(len(data) + 1)
            data[at:at] = data[start : start + rng.choice((1, 4, 16, 512))]
        case 6 if tokens:
            token = rng.choice(tokens)
            data[at : at + rng.choice((0, len(token)))] = token
        case _:
            data[at:at] = rng.randbytes(rng.choice((1, 4, 32)))


def damaged_tree(tree: Any, rng: Random, odd: Sequence[Any] = ()) -> Any:
    """Return a tree of tables, lists and values with one to three changes anywhere in it; ``odd``: values to put in."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(_places(tree))
        path = rng.choice(places)
        others = [_at(tree, each) for each in rng.sample(places, min(3, len(places)))]
        tree = _with(tree, path, rng, [*others, *odd])
    return tree


def _places(tree: Any, path: tuple = ()) -> Any:
    yield path
    inside = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in inside:
        yield from _places(value, (*path, key))


def _at(tree: Any, path: tuple) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _with(tree: Any, path: tuple, rng: Random, others: list[Any]) -> Any:
    """Return the tree with another value at a path, without that, or with its name changed."""
    if not path:
        return _another(tree, rng, others)
    key, *rest = path
    tree = dict(tree) if isinstance(tree, dict) else list(tree)
    if rest:
        tree[key] = _with(tree[key], tuple(rest), rng, others)
    elif rng.random() < 0.15:
        del tree[key]
    elif isinstance(tree, dict) and rng.random() < 0.1:
        tree[rng.choice(["", "x", f"{key}s", "__class__"])] = tree.pop(key)
    else:
        tree[key] = _another(tree[key], rng, others)
    return tree


def _another(value: Any, rng: Random, others: list[Any]) -> Any:
    if isinstance(value, str) and value and rng.random() < 0.3:
        return damaged(value.encode("utf-8", "replace"), rng).decode("utf-8", "replace")
    if isinstance(value, (int, float)) and not isinstance(value, bool) and rng.random() < 0.4:
        return rng.choice([-value, value + 1, value - 1, value * 1000, 0, float(value), str(value)])
    return rng.choice([*JUNK, *others])
