"""What reads weights, checkpoints, plans and settings."""

import io
import json
import struct
import tomllib
import zipfile
from pathlib import Path
from random import Random

from launch.cluster import Cluster, layout
from launch.plan import read_plan
from pipeline import checksum
from pipeline.catalogue import facts
from pipeline.checkpoint import Checkpoint
from pipeline.checkpointindex import index_text
from pipeline.compare import compare, summary
from pipeline.config import TrainSettings
from pipeline.convert.recognise import open_source
from pipeline.recipe import read_settings
from pipeline.settings import check, dump_toml, override
from tests.fuzz.mutate import damaged, damaged_tree
from tests.fuzz.target import Target
from tests.fuzz.targets_shards import pack, unpacked

# ---- weights


def _weights(name: str, **given: int):
    def read(data: bytes, folder: Path) -> None:
        """Tell what weights are, and read all of them into a model."""
        path = folder / name
        path.write_bytes(data)
        open_source(path, given=given).build()

    return read


def _change_archive(data: bytes, rng: Random) -> bytes:
    """Change bytes of an archive, or of a member, whose checksum is then right; of arrays often the header."""
    if rng.random() < 0.2:
        return damaged(data, rng)
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(made, "w") as new:
        members = {each.filename: old.read(each) for each in old.infolist()}
        for _ in range(rng.choice((1, 1, 2))):
            name = rng.choice(list(members))
            name = next((each for each in members if each.endswith("data.pkl")), name) if rng.random() < 0.7 else name
            content = members.pop(name)
            if rng.random() < 0.1:
                name = rng.choice([f"{name}x", "../../outside.npy", "/outside", name.upper()])
            if rng.random() < 0.05:
                continue
            tokens = (
                b"9" * 12,
                b"<f8",
                b"|O",
                b"|V2",
                b"<U9",
                b"True",
                b"(",
                b"c__builtin__\neval\n",
                b"cos\nsystem\n",
                b"R.",
            )
            members[name] = damaged(content, rng, tokens, rng.choice((None, 128, 128)))
        for name, content in members.items():
            new.writestr(name, content, rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))
        new.comment = damaged(old.comment, rng) if rng.random() < 0.1 else old.comment
    return made.getvalue()


def _change_safetensors(data: bytes, rng: Random) -> bytes:
    """Change bytes, or the header's values, and its length to fit."""
    if rng.random() < 0.3:
        return damaged(data, rng, (b"F64", b"BOOL", b'"__metadata__"', b"9" * 12), rng.choice((None, 8, 600)))
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    note = header.get("__metadata__", {})
    key = next((each for each in note if note[each][:1] == "{" and rng.random() < 0.5), None)
    if key:
        note[key] = json.dumps(damaged_tree(json.loads(note[key]), rng))
    else:
        header = damaged_tree(header, rng)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def _change_torch(data: bytes, rng: Random) -> bytes:
    return _change_archive(data, rng) if data[:2] == b"PK" else damaged(data, rng)


# ---- checkpoints


def _read_checkpoint(data: bytes, folder: Path) -> None:
    """Read all of a checkpoint, which comes packed: as showing, comparing, going on and converting do."""
    for name, content in unpacked(data).items():
        (folder / name).write_bytes(content)
    facts(folder)
    found = Checkpoint(folder)
    summary(compare(found, found))
    for (kind, name), count in found.counts().items():
        found.read(kind, name, 0, count)
    open_source(folder).build()
    open_source(folder, ema=True).build()


def _change_checkpoint(data: bytes, rng: Random) -> bytes:
    """Change the index or a rank's file; nearly always with checksums that fit."""
    files = unpacked(data)
    index = json.loads(files["checkpoint.json"])
    name = rng.choice([each for each in files if each != "checkpoint.json"])
    if rng.random() < 0.15:
        return pack(files | {"checkpoint.json": damaged(files["checkpoint.json"], rng)})
    if rng.random() < 0.5:
        files[name] = _change_safetensors(files[name], rng)
        told = next(each for each in index["files"] if each["name"] == name)
        told["bytes"] = len(files[name])
        told[checksum.WRITTEN] = _checksum(files[name])
    else:
        index = damaged_tree(index, rng)
    if isinstance(index, dict):
        index.pop("xxh3_128", None)
        files["checkpoint.json"] = index_text(index).encode()
    else:
        files["checkpoint.json"] = json.dumps(index).encode()
    return pack(files)


def _checksum(data: bytes) -> str:
    """Return the checksum of a rank's file: of its values, and then of the header before them."""
    front = 8 + int.from_bytes(data[:8], "little")
    found = checksum.begin()
    found.update(data[front:])
    found.update(data[:front])
    return found.hexdigest()


# ---- plans and settings


def _read_plan(data: bytes, folder: Path) -> None:
    """Check a plan, also as ``--smoke`` and on two ranks; beside it there are images and a recipe."""
    (folder / "images" / "a").mkdir(parents=True)
    (folder / "own.toml").write_text('duration = "1 epoch"\nglobal_batch = 4\n[model]\nname = "vit_ti16"\n')
    path = folder / "plan.toml"
    path.write_bytes(data)
    for smoke, ranks in ((False, None), (True, 2)):
        for stage in read_plan(path, folder / "runs", smoke, ranks).stages:
            assert all(isinstance(each, str) for each in stage.arguments)
    assert not (folder / "runs").exists()


def _change_toml(data: bytes, rng: Random) -> bytes:
    if rng.random() < 0.2:
        return damaged(data, rng, (b'"""', b"[[", b"]]", b"{", b"}", b"= ", b"1e999", b"[a.b]\n", b"\n" + b"[" * 2000))
    tree = damaged_tree(tomllib.loads(data.decode()), rng)
    try:
        text = dump_toml(tree)
        tomllib.loads(text)
        return text.encode("utf-8", "surrogatepass")
    except Exception:  # noqa: BLE001 (what TOML cannot say)
        return damaged(data, rng)


def _read_settings(data: bytes, folder: Path) -> None:
    """Read the settings of a stage, over which an assignment is laid that stands in the first line's comment."""
    path = folder / "x.toml"
    path.write_bytes(data)
    words = data.partition(b"\n")[0].decode("utf-8", "replace").removeprefix("# ").split(" ")
    table, _ = read_settings(path)
    settings = check(TrainSettings, override(table, words if words != [""] else []), "x.toml")
    check(TrainSettings, tomllib.loads(dump_toml(settings.model_dump(mode="json"))), "what was written")


def _read_profile(data: bytes, folder: Path) -> None:
    """Read a profile of a cluster, of Slurm's or Kubernetes' as its first line says, for stages of two kinds."""
    path = folder / "cluster.toml"
    path.write_bytes(data)
    profile = Cluster(path, "Kubernetes" if data.startswith(b"# pods") else "Slurm")
    profile.check_names(["supervised", "shards"], ["one", "two"])
    for kind, stage in (("supervised", "one"), ("shards", "two")):
        layout(8, profile.job(kind, stage), stage)


def _change_profile(data: bytes, rng: Random) -> bytes:
    line, _, rest = data.partition(b"\n")
    return line + b"\n" + _change_toml(rest, rng)


def _change_settings(data: bytes, rng: Random) -> bytes:
    line, _, rest = data.partition(b"\n")
    if rng.random() < 0.4:
        tokens = (b"=", b".", b'"', b"[", b"optim.lr=", b"data=", b"{", b"nan", b"1e999", b" a=1", b"\n")
        return damaged(line, rng, tokens).replace(b"\n", b"") + b"\n" + rest
    return b"# \n" + _change_toml(rest, rng)


TARGETS = {
    "npz": Target(_weights("x.npz", image_size=4), _change_archive, 120),
    "safetensors": Target(_weights("x.safetensors", num_heads=3), _change_safetensors, 250),
    "torch": Target(_weights("x.pth", num_heads=3), _change_torch, 250),
    "checkpoint": Target(_read_checkpoint, _change_checkpoint, 200),
    "plan": Target(_read_plan, _change_toml, 120),
    "settings": Target(_read_settings, _change_settings, 800),
    "profile": Target(_read_profile, _change_profile, 400),
}
