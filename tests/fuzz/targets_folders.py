"""What reads folders: DeepSpeed's ZeRO checkpoints, transformers' models, runs and their ledgers."""

import io
import json
import os
from contextlib import redirect_stdout
from pathlib import Path
from random import Random
from typing import Any

import torch

from launch.cli_model import report
from launch.status import print_status
from pipeline.convert.recognise import open_source
from shards.audit import audit
from shards.errors import PatchmillError
from shards.ledger import _HEAD, _frame
from tests.fuzz.mutate import damaged, damaged_tree
from tests.fuzz.target import Target
from tests.fuzz.targets_pipeline import _change_archive, _change_safetensors, _change_toml
from tests.fuzz.targets_shards import pack, unpacked


def _lay(data: bytes, folder: Path) -> None:
    """Write the files of a packed folder, none outside it."""
    for name, content in unpacked(data).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _read_model(data: bytes, folder: Path) -> None:
    """Tell what the weights of a folder are, and read all of them into a model."""
    _lay(data, folder)
    open_source(folder, given={"num_heads": 3}).build()


# ---- ZeRO


class _Code:
    """A value that would run a program where it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/outside-of-fuzz",)


def _change_zero(data: bytes, rng: Random) -> bytes:
    """Change a rank's file, in its bytes or its values; or which files there are."""
    files = unpacked(data)
    name = rng.choice([each for each in files if each.endswith(".pt")])
    match rng.randrange(10):
        case 0:
            del files[name]
        case 1:
            files[name] = files[name][: rng.randrange(len(files[name]))]
        case 2:
            files[name] = files[rng.choice(list(files))]
        case 3:
            other = name.replace("rank_0", f"rank_{rng.choice([1, 2, 7, 10**9, 'x'])}")
            files[other] = files[name] if rng.random() < 0.5 else files.pop(name)
        case 4:
            files["latest"] = damaged(files["latest"], rng, (b"../..", b"/", b"\0", b"\n", b"9" * 5000, b"*"))
        case 5:
            files[name] = _change_archive(files[name], rng)
        case _:
            files[name] = _change_values(files[name], rng)
    return pack(files)


def _change_values(data: bytes, rng: Random) -> bytes:
    """Change what a rank's file holds: counts, names, shapes, and tensors for others of any kind."""
    tree = _plain(torch.load(io.BytesIO(data), weights_only=True))
    odd = [
        torch.zeros(()), torch.zeros(0), torch.zeros(3), torch.zeros(2, 3, 4), torch.zeros(7, dtype=torch.int64),
        torch.zeros(5, dtype=torch.complex64), torch.zeros(1).expand(2**40), torch.zeros(1).expand(2**20, 2**20),
        torch.full((2000,), torch.nan), torch.zeros(3, 3).to_sparse(), torch.Size([2**40, 2**40]), _Code(),
    ]  # fmt: skip
    file = io.BytesIO()
    torch.save(_shaped(damaged_tree(tree, rng, odd)), file, _use_new_zipfile_serialization=rng.random() < 0.9)
    return file.getvalue()


def _plain(value: Any) -> Any:
    """Return a table with lists in place of shapes, whose numbers are then changed too."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def _shaped(value: Any, key: str = "") -> Any:
    """Return what ``_plain`` made lists of as shapes again."""
    if isinstance(value, dict):
        return {name: _shaped(each, "shape" if "shapes" in key else name) for name, each in value.items()}
    if isinstance(value, list):
        whole = key == "shape" and all(type(each) is int and -(2**63) <= each < 2**63 for each in value)
        return torch.Size(value) if whole else [_shaped(each, key) for each in value]
    return value


# ---- transformers


def _change_transformers(data: bytes, rng: Random) -> bytes:
    """Change the tables in JSON, or a file of weights."""
    files = unpacked(data)
    name = rng.choice(list(files))
    if rng.random() < 0.1:
        del files[name]
    elif name.endswith(".safetensors"):
        files[name] = _change_safetensors(files[name], rng)
    elif rng.random() < 0.2:
        files[name] = damaged(files[name], rng)
    else:
        files[name] = json.dumps(damaged_tree(json.loads(files[name]), rng)).encode()
    return pack(files)


# ---- runs


def _read_run(data: bytes, folder: Path) -> None:
    """Look at a run as ``patchmill status`` and ``report`` do; nobody knows the queue."""
    _lay(data, folder)
    os.environ["PATH"] = "/nowhere"
    errors = []
    for look in (_by_status, _by_report):
        try:
            with redirect_stdout(io.StringIO()):
                look(folder)
        except PatchmillError as error:  # the others have a look nevertheless
            errors.append(error)
    if errors:
        raise errors[0]


def _by_status(folder: Path) -> None:
    print_status(folder)


def _by_report(folder: Path) -> None:
    report([folder], folder / "report.html")


def _change_run(data: bytes, rng: Random) -> bytes:
    """Change what stands in a file of a run, or its bytes; or remove it."""
    files = unpacked(data)
    name = rng.choice(list(files))
    if rng.random() < 0.1:
        del files[name]
    elif name.endswith(".toml"):
        files[name] = _change_toml(files[name], rng)
    elif rng.random() < 0.3 or not name.endswith((".json", ".jsonl")):
        files[name] = damaged(files[name], rng)
    else:
        lines = [json.loads(line) for line in files[name].splitlines()]
        at = rng.randrange(len(lines))
        lines[at] = damaged_tree(lines[at], rng)
        files[name] = "\n".join(map(json.dumps, lines)).encode()
    return pack(files)


# ---- ledgers


def _read_ledger(data: bytes, folder: Path) -> None:
    """Audit a training stage whose data set lies beside it."""
    _lay(data, folder)
    audit(folder / "stage", [str(folder / "data")], workers=1)


def _change_ledger(data: bytes, rng: Random) -> bytes:
    """Change a ledger, nearly always with checksums that fit; or the quarantine list, or a checkpoint."""
    files = unpacked(data)
    name = rng.choice([each for each in files if not each.startswith("data/")])
    if not name.endswith(".ledger"):
        lines = files[name].splitlines() if rng.random() < 0.8 else []
        told = [json.dumps(damaged_tree(json.loads(line), rng)).encode() for line in lines if line.startswith(b"{")]
        files[name] = b"\n".join(told) or damaged(files[name], rng)
    elif rng.random() < 0.2:
        files[name] = damaged(files[name], rng)
    else:
        frames, at = [], 0
        while at < len(files[name]):
            _, _, size, *fields = _HEAD.unpack_from(files[name], at)
            frames.append((tuple(fields), files[name][at + _HEAD.size : at + _HEAD.size + size]))
            at += _HEAD.size + size
        at = rng.randrange(len(frames))
        fields, content = frames[at]
        if at == 0:
            content = json.dumps(damaged_tree(json.loads(content), rng)).encode()
        elif rng.random() < 0.3:
            content = damaged(content, rng)
        else:
            place = rng.randrange(len(fields))
            number = rng.choice([0, 1, fields[place] + 1, 2**16 + 1, 2**31 - 1, 2**32 - 1, 2**40])
            number = number if place == 0 else number & (2**32 - 1)
            fields = (*fields[:place], number, *fields[place + 1 :])
        frames[at] = fields, content
        files[name] = b"".join(_frame(*each) for each in frames)
    return pack(files)


TARGETS = {
    "zero": Target(_read_model, _change_zero, 200),
    "transformers": Target(_read_model, _change_transformers, 200),
    "run": Target(_read_run, _change_run, 200),
    "ledger": Target(_read_ledger, _change_ledger, 100, room=1 << 29),  # 64 MiB a thread are only set apart
}
