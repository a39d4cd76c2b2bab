"""Makes the corpus anew: good inputs for each target, small ones. What once broke something lies beside them.

Run as ``python -m tests.fuzz.seeds``.
"""

import io
import json
import pickle
import shutil
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import save as safetensors

from pipeline import checkpoint, distributed
from pipeline.convert import transformers
from pipeline.convert.source import Source
from pipeline.convert.tensors import NOTE
from pipeline.models import create_model
from pipeline.recipe import read_recipe
from pipeline.settings import dump_toml
from shards import manifest
from shards.droplist import write_exclude
from tests.fuzz.targets import CORPUS
from tests.fuzz.targets_shards import pack
from tests.pipeline.convert import official
from tests.shards.datasets import Made, write_dataset
from tests.shards.stage import Stage

MODEL = {"name": "vit_ti16", "image_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 1, "num_heads": 3}
MODEL |= {"num_classes": 2, "mlp_dim": 12}


def main() -> None:
    """Write all seeds."""
    for target, seeds in {
        "tar": tars(), "image": images(), "manifest": manifests(), "npz": npz(), "safetensors": weights(),
        "torch": torchs(), "checkpoint": checkpoints(), "plan": plans(), "settings": settings(), "zero": zeros(),
        "transformers": transformers_folders(), "profile": profiles(), "run": runs(), "ledger": ledgers(),
        "source": sources(),
    }.items():  # fmt: skip
        folder = CORPUS / target
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in seeds.items():
            (folder / name).write_bytes(data)


def encode(mode: str, size: tuple[int, int], format: str, **options: object) -> bytes:
    """Return an encoded image of noise."""
    depth = {"RGB": 3, "RGBA": 4, "CMYK": 4, "LA": 2}.get(mode, 1)
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], depth), dtype=np.uint8)
    image = Image.fromarray(pixels.squeeze(2) if depth == 1 else pixels, "L" if depth == 1 else mode)
    file = io.BytesIO()
    (image if image.mode == mode else image.convert(mode)).save(file, format, **options)
    return file.getvalue()


def images() -> dict[str, bytes]:
    """Return images of all formats, depths and layouts that are decoded in different ways."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "420.jpg": encode("RGB", (40, 30), "JPEG", quality=50),
        "444.jpg": encode("RGB", (17, 9), "JPEG", subsampling="4:4:4", exif=exif.tobytes()),
        "grey.jpg": encode("L", (24, 24), "JPEG"),
        "progressive.jpg": encode("RGB", (33, 16), "JPEG", progressive=True, quality=30),
        "restart.jpg": encode("RGB", (32, 32), "JPEG", quality=30, restart_marker_blocks=1),
        "cmyk.jpg": encode("CMYK", (16, 16), "JPEG", quality=30),
        "rgb.png": encode("RGB", (9, 7), "PNG"),
        "rgba.png": encode("RGBA", (8, 8), "PNG", exif=exif.tobytes()),
        "palette.png": encode("P", (8, 8), "PNG", transparency=3),
        "bits.png": encode("1", (19, 5), "PNG"),
        "deep.png": deep(),
        "lossy.webp": encode("RGB", (16, 16), "WEBP", quality=30),
        "lossless.webp": encode("RGBA", (8, 8), "WEBP", lossless=True, exif=exif.tobytes()),
        "line.png": line(),
        "pixels.gif": encode("P", (8, 8), "GIF"),
    }


def line() -> bytes:
    """Return a PNG of a row of pixels."""
    file = io.BytesIO()
    Image.new("L", (500_000, 1), 128).save(file, "PNG")
    return file.getvalue()


def deep() -> bytes:
    """Return a PNG of 16 bits."""
    file = io.BytesIO()
    Image.fromarray(np.arange(25, dtype=np.uint16).reshape(5, 5) * 2000).save(file, "PNG")
    return file.getvalue()


def tars() -> dict[str, bytes]:
    """Return tars of all dialects, with labels of all kinds."""
    image = encode("RGB", (4, 4), "PNG")
    files = {
        "a/0.png": image,
        "a/0.cls": b"1",
        "a/1.png": image,
        "a/1.json": b'{"labels": [0, 1], "weights": [0.5, 1]}',
    }
    odd = {"ä" * 60 + "/x.jpg": encode("L", (8, 8), "JPEG", quality=20), "ä" * 60 + "/x.cls": b"1", "none": b"x"}
    found = {}
    for name, kind in {"pax": tarfile.PAX_FORMAT, "gnu": tarfile.GNU_FORMAT, "ustar": tarfile.USTAR_FORMAT}.items():
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=kind, bufsize=512) as tar:
            tar.copybufsize = 512
            for path, content in (files | odd if kind != tarfile.USTAR_FORMAT else files).items():
                member = tarfile.TarInfo(path)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            link = tarfile.TarInfo("a/2.png")
            link.type, link.linkname = tarfile.SYMTYPE, "../../outside"
            tar.addfile(link)
        found[f"{name}.tar"] = file.getvalue().rstrip(b"\0") + bytes(1536)
    return found


def manifests() -> dict[str, bytes]:
    """Return a data set with a drop list, as a tar of its files."""
    with tempfile.TemporaryDirectory() as folder:
        image = encode("RGB", (4, 4), "PNG")
        made = [
            Made("a", image, (0,)),
            Made("b", image, (1, 0), (1.0, 0.5)),
            Made("c", image, (1,)),
            Made("d", image, ()),
        ]
        root = write_dataset(Path(folder), ["one", "two"], [made, made[:2]])
        write_exclude(root, "v1", [(0, 2, "why")])
        files = {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
        index = json.loads(files[manifest.DATASET])
        index["build"] = {"source": "index", "label": "cls", "image": "", "classes": None}
        index["digest"] = manifest.digest(
            index["classes"], manifest.read_table(files[manifest.SHARDS])["sha256"].to_pylist(), index["build"]
        )
        files["shards/000000.tar"] = files["shards/000000.tar"].rstrip(b"\0") + bytes(1536)
        return {"built": pack(files), "indexed": pack(files | {manifest.DATASET: json.dumps(index).encode()})}


def tiny() -> dict[str, torch.Tensor]:
    """Return the values of a tiny ViT by our names."""
    return {name: torch.full_like(value, 0.5) for name, value in create_model(**MODEL, seed=0).state_dict().items()}


def npz() -> dict[str, bytes]:
    """Return an official file of a tiny ViT."""
    file = io.BytesIO()
    arrays = official.vit(6, 1, 3, 6, 2, 5, 2)
    np.savez(file, **{key: value.astype(np.float16) for key, value in arrays.items()})
    return {"vit.npz": file.getvalue()}


def weights() -> dict[str, bytes]:
    """Return safetensors: of ours, with its note, and of timm's names without."""
    values = {name: value.half() for name, value in tiny().items()}
    return {
        "ours.safetensors": safetensors(values, {NOTE: json.dumps({"model": MODEL, "classes": ["a", "b"]})}),
        "timm.safetensors": safetensors({f"module.{name}": value for name, value in values.items()}),
    }


def torchs() -> dict[str, bytes]:
    """Return what torch.save wrote, in its new and in its old format."""
    found = {}
    for name, new in (("new.pth", True), ("old.pth", False)):
        file = io.BytesIO()
        values = {key: value.half() for key, value in tiny().items()}
        torch.save({"state_dict": values, "epoch": 3, "arch": "x"}, file, _use_new_zipfile_serialization=new)
        found[name] = file.getvalue()
    return found


def zeros() -> dict[str, bytes]:
    """Return what DeepSpeed saves of two ranks, of all stages: with a frozen parameter, a shared one and a buffer."""
    return {f"stage-{stage}": pack(zero(stage)) for stage in (0, 1, 2, 3)}


def zero(stage: int, ranks: int = 2) -> dict[str, bytes]:
    """Return the files of one ZeRO checkpoint; ``tests/pipeline/convert`` has DeepSpeed's own beside such."""
    whole = tiny()
    frozen, shared, buffer = "pos_embed", {"norm.bias": "blocks.0.norm1.bias"}, "blocks.0.norm2.bias"
    trained = {name: value for name, value in whole.items() if name not in (frozen, buffer, *shared)}
    groups = [{n: v for n, v in trained.items() if (v.dim() > 1) == wide} for wide in (True, False)]
    files = {"latest": b"step"}

    def part(value: torch.Tensor, rank: int) -> torch.Tensor:
        size = -(-value.numel() // ranks)
        return torch.nn.functional.pad(value.flatten(), (0, size * ranks - value.numel())).split(size)[rank].clone()

    def add(name: str, table: dict) -> None:
        file = io.BytesIO()
        torch.save(table, file)
        files[f"step/{name}.pt"] = file.getvalue()

    for rank in range(ranks):
        half = {name: value.bfloat16() for name, value in whole.items()}
        model = {"module": half, "buffer_names": [buffer], "shared_params": shared}
        model["param_shapes"] = [{name: value.shape for name, value in group.items()} for group in groups]
        state = {"zero_stage": stage, "partition_count": ranks if stage == 3 else [ranks, ranks]}
        if stage == 3:
            state["fp32_flat_groups"] = [torch.cat([part(v, rank) for v in group.values()]) for group in groups]
            model["module"] = {name: value if name == buffer else value[:0].clone() for name, value in half.items()}
            model["frozen_param_shapes"] = {frozen: whole[frozen].shape}
            model["frozen_param_fragments"] = {frozen: part(half[frozen], rank)}
        else:
            flats = [torch.cat([value.flatten() for value in group.values()]) for group in groups]
            state["single_partition_of_fp32_groups"] = [part(flat, rank) for flat in flats]
            state |= {"param_alignment_paddings": [[0] * len(group) for group in groups]} if stage == 1 else {}
        if stage == 3 or rank == 0:
            add(f"zero_pp_rank_{rank}_mp_rank_00_model_states" if stage == 3 else "mp_rank_00_model_states", model)
        if stage:
            add(f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states", {"optimizer_state_dict": state})
    return files


def transformers_folders() -> dict[str, bytes]:
    """Return folders of a tiny ViT: one of transformers with one file of weights, and one of timm with two."""
    with tempfile.TemporaryDirectory() as folder:
        values = tiny()
        made = Source("x", MODEL, values.__getitem__, ["a", "b"])
        transformers.write(Path(folder), made, torch.Tensor.half, {"model": MODEL})
        one = {name: (Path(folder) / name).read_bytes() for name in (transformers.CONFIG, transformers.WEIGHTS)}
    config = {
        "architecture": "x",
        "num_classes": 2,
        "global_pool": "token",
        "pretrained_cfg": {"input_size": [3, 8, 8]},
    }
    names = sorted(values)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    index = {"metadata": {}, "weight_map": {name: file for file, those in parts.items() for name in those}}
    two = {"config.json": json.dumps(config).encode(), "model.safetensors.index.json": json.dumps(index).encode()}
    two |= {file: safetensors({name: values[name].half() for name in those}) for file, those in parts.items()}
    return {"transformers": pack(one), "timm": pack(two)}


def checkpoints() -> dict[str, bytes]:
    """Return a checkpoint of one rank, with a moving average, as a tar of its files."""
    distributed.start()
    try:
        with tempfile.TemporaryDirectory() as folder:
            pieces = [(kind, name, 0, value.flatten()) for kind in ("weight", "ema") for name, value in tiny().items()]
            state = {
                "model": MODEL,
                "classes": ["a", "b"],
                "val": None,
                "commit": "0" * 40,
                "versions": {},
                "settings": {"optim": {"ema": 0.9}},
            }
            path = checkpoint.save(
                Path(folder), 64, pieces, {name: tuple(value.shape) for name, value in tiny().items()}, state
            )
            return {"one": pack({each.name: each.read_bytes() for each in sorted(path.iterdir())})}
    finally:
        distributed.finish()


def plans() -> dict[str, bytes]:
    """Return a plan with stages of all kinds, and one with sweeps."""
    head = 'name = "tiny"\n'
    chain = """
[[stage]]
name = "shards"
kind = "shards"
set = { source = "images", split = { val = 0.1 } }
[[stage]]
name = "pretrain"
kind = "supervised"
recipe = "own.toml"
ranks = 2
[stage.set.data]
train = "{shards}/train"
val = "{shards}/val"
resolution = 32
[[stage]]
name = "convert"
kind = "convert"
set = { source = "{pretrain}", to = "safetensors" }
[[stage]]
name = "finetune"
kind = "finetune"
init = "convert"
recipe = "own.toml"
set = { data = { train = "{shards}/train", resolution = 48 }, optim = { lr = 0.01, name = "sgd" } }
[[stage]]
name = "evaluate"
kind = "evaluate"
after = ["pretrain"]
set = { weights = "{finetune}", data = "{shards}/val" }
[[stage]]
name = "fewshot"
kind = "fewshot"
set = { weights = "{convert}", train = "{shards}/train", test = "{shards}/val", shots = [1, 5] }
[[stage]]
name = "figures"
kind = "figures"
set = { weights = "{convert}" }
[[stage]]
name = "report"
kind = "report"
"""
    sweeps = """
[[stage]]
name = "sweep"
kind = "masked_patch"
recipe = "own.toml"
sweep = { "optim.lr" = [0.1, 0.2], "seed" = [1, 2] }
beside = { theirs = [1.0, "x"] }
set = { data = { train = "images", val = "images", resolution = 32 }, engine = { zero_stage = 2 } }
[[stage]]
name = "after"
kind = "finetune"
init = "sweep"
recipe = "own.toml"
sweep = [{ "seed" = [1, 2] }, { "init" = ["{sweep-*}"] }]
[stage.set.data]
train = [{ url = "images", weight = 1 }, { url = "images", weight = 2 }]
val = "images"
resolution = 32
[[stage]]
name = "last"
kind = "supervised"
recipe = "own.toml"
best = "after"
set = { data = { train = "images", resolution = 32 } }
"""
    return {"chain.toml": (head + chain).encode(), "sweeps.toml": (head + sweeps).encode()}


def settings() -> dict[str, bytes]:
    """Return settings of stages; in the first line, assignments over them."""
    return {
        "supervised.toml": b"""# optim.lr=3e-3 schedule.warmup=10_steps model.head_bias=log_prior
duration = "2 epochs"
global_batch = 8
[data]
train = "x"
resolution = 32
[model]
name = "vit_b16"
[schedule]
shape = "steps"
milestones = ["1 epoch", "10 steps"]
[engine]
zero_stage = 3
offload_optimizer = "cpu"
deepspeed = { zero_optimization = { overlap_comm = true } }
[probe]
train = "a"
test = "b"
shots = [1, 5]
""",
        "mixed.toml": b"""# data.resolution=64
kind = "masked_patch"
duration = "1_000 samples"
global_batch = 8
[data]
train = [{ url = "a", weight = 3 }, { url = "b", weight = 1, exclude = "v1" }]
[model]
name = "vit_ti16"
""",
    }


def profiles() -> dict[str, bytes]:
    """Return profiles of clusters; the first line says of which."""
    return {
        "slurm.toml": b"""# jobs
partition = "gpu"
time = "04:00:00"
gpus_per_node = 4
memory = "64G"
sbatch = ["--exclusive"]
env = { A = "b" }
[kind.shards]
partition = "cpu"
gpus_per_node = 0
[stage.one]
time = "1-00:00:00"
srun = ["--container-image=x"]
""",
        "pods.toml": b"""# pods
image = "there/patchmill:1"
gpus_per_node = 4
volumes = { "/data" = "claim" }
secrets = ["keys"]
namespace = "x"
node_selector = { "a/b" = "c" }
[kind.shards]
gpus_per_node = 0
""",
    }


def runs() -> dict[str, bytes]:
    """Return a run with a finished stage, one under way and a sweep: by hand, and submitted."""
    plan = """name = "x"
[[stage]]
name = "one"
kind = "supervised"
set = { duration = "1 epoch", global_batch = 4 }
[[stage]]
name = "two"
kind = "shards"
[[stage]]
name = "rates"
kind = "finetune"
sweep = { "optim.lr" = [0.1, 0.2] }
"""
    settings = dump_toml(read_recipe("finetune_cifar10").checked.model_dump(mode="json", exclude_none=True)).encode()
    line = {"step": 3, "samples": 12, "epoch": 0.5, "images_per_second": 9.5, "loss": 0.7, "lr": 0.1}
    line |= {"utilisation": 0.5, "data_wait": 0.02}
    result = {"digest": "d", "kind": "finetune", "seconds": 3.5, "result": {"val": {"top1": 0.5, "loss": 0.6}}}
    files = {
        "plan.toml": plan.encode(),
        "stages/one/resolved.toml": settings,
        **{f"stages/rates-{i}/{name}.toml": settings for i in range(2) for name in ("config", "resolved")},
        "stages/one/metrics.jsonl": "".join(
            json.dumps(each) + "\n" for each in (line, {"samples": 12, "val_top1": 0.5}, line)
        ).encode(),
        "stages/one/state.json": b'{"state": "stopped", "reason": "asked"}',
        "stages/one/logs/rank-0.log": b"{}",
        "stages/rates-0/result.json": json.dumps(result).encode(),
        "stages/rates-1/result.json": json.dumps(result).encode(),
    }
    job = {"id": "3", "stage": "one", "needs": [], "digest": "d", "settings": {}}
    jobs = {"one": job, "two": job | {"id": "4", "stage": "two", "needs": ["one"]}, "two.1": job | {"slice": "1/2"}}
    submission = {"plan": "p", "name": "x", "smoke": False, "known": {}, "recipes": {"own.toml": "0"}, "jobs": jobs}
    record = {"state": "running", "tries": 2, "job": "3", "barren": 0, "at": 12, "nodes": "n1", "reason": None}
    slurm = {
        "slurm/submission.json": json.dumps(submission).encode(),
        "slurm/one.json": json.dumps(record).encode(),
        "slurm/two.begun": b"1 0",
    }
    return {"by-hand": pack(files), "submitted": pack(files | slurm)}


def ledgers() -> dict[str, bytes]:
    """Return a stage with two starts on two ranks, and its data set."""
    with tempfile.TemporaryDirectory() as folder:
        image = encode("RGB", (4, 4), "PNG")
        data, stage = Path(folder) / "data", Path(folder) / "stage"
        write_dataset(data, ["one", "two"], [[Made(f"{s}{i}", image, (i % 2,)) for i in range(6)] for s in range(2)])
        write_exclude(data, "v1", [(0, 2, "why")])
        made = Stage(stage, data)
        made.start(2, 3, {2}, batch=4)
        made.kill()
        made.start(2, 2, batch=4)
        made.end()
        note = {"position": 99, "key": "10", "data": "x", "source": 0, "shard": 1, "index": 0, "offset": 0}
        (stage / "quarantine.jsonl").write_text(json.dumps(note | {"reason": "why"}) + "\n")
        for old in sorted(stage.glob("checkpoints/samples-*"))[:-1]:
            shutil.rmtree(old)
        paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return {"one": pack({str(path.relative_to(folder)): path.read_bytes() for path in paths})}


def sources() -> dict[str, bytes]:
    """Return tables of all forms, a file as the hub has them, and CIFAR-100 of one image a part."""
    csv = 'path,label,weight,id\na.png,x,0.5,1\n"b,c.png",y,1,2\n'
    rows = [
        {"image": "a.png", "label": {"x": 0.5, "y": 1}, "key": "a"},
        {"image": "http://a/b.png?c", "label": ["x"], "key": 3},
    ]
    image = {"bytes": encode("RGB", (4, 4), "PNG"), "path": None}
    hub = pa.table({"image": [image, image], "label": [0, 1]})
    note = json.dumps({"info": {"features": {"label": {"names": ["a", "b"], "_type": "ClassLabel"}}}})
    file = io.BytesIO()
    pq.write_table(hub.replace_schema_metadata({"huggingface": note}), file)
    part = pickle.dumps({"fine_labels": [1], "data": np.zeros((1, 3072), np.uint8)}, protocol=2)
    meta = pickle.dumps({"fine_label_names": ["a", "b"]}, protocol=2)
    return {
        "csv": pack({"table.csv": csv.encode()}),
        "jsonl": pack({"table.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode()}),
        "parquet": pack({"hub.parquet": file.getvalue()}),
        "cifar": pack({"meta": meta, "train": part, "test": part}),
    }


if __name__ == "__main__":
    main()
