"""What reads the tables and archives of images that others publish."""

import json
from pathlib import Path
from random import Random

from shards.sources.open import open_source
from tests.fuzz.mutate import damaged, damaged_tree
from tests.fuzz.target import Target
from tests.fuzz.targets_shards import _change_table, pack, unpacked

PLAIN = ("table.csv", "table.jsonl", "hub.parquet")
"""Files that are a source by themselves; any others together are one as a folder."""


def _read_source(data: bytes, folder: Path) -> None:
    """List all images of a source, unpacking what is to be unpacked."""
    files = unpacked(data)
    inside = folder / "source" / "cifar-100-python"
    inside.mkdir(parents=True)
    for name, content in files.items():
        (inside / name).write_bytes(content)
    url = inside / next((name for name in PLAIN if name in files), "")
    source = open_source(url, unpacked=folder / "unpacked")
    for item in source.items():
        assert item.size >= -1
        assert all(0 <= label < len(source.classes) for label in item.labels)


def _change_source(data: bytes, rng: Random) -> bytes:
    """Change bytes of a file, or what stands in a table."""
    files = unpacked(data)
    name = rng.choice(list(files))
    if name.endswith(".jsonl") and rng.random() < 0.7:
        lines = [json.loads(line) for line in files[name].splitlines()]
        at = rng.randrange(len(lines))
        lines[at] = damaged_tree(lines[at], rng)
        files[name] = "\n".join(map(json.dumps, lines)).encode()
    elif name.endswith(".parquet") and rng.random() < 0.6:
        files[name] = _change_table(files[name], rng)
    else:
        tokens = (b",", b'"', b"\r", b"\xef\xbb\xbf", b"cos\nsystem\n", b"R.", b"9" * 5000, b"../../outside", b"c")
        files[name] = damaged(files[name], rng, tokens, rng.choice((None, 200)))
    return pack(files)


TARGETS = {"source": Target(_read_source, _change_source, 400)}
