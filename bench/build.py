"""Building shards: keeping the bytes against plain tar, and shrinking against a Pillow and webdataset loop.

Keeping: MB/s of JPEGs of 110 kB, from files to disk (fsync on both sides); our hashes, checks of images, offsets and
manifest are included. Shrinking: 500 × 375 to a short side of 256, JPEG quality 90, images/s; the peer is the loop that
everybody writes, in one process: Pillow's open, resize, save, webdataset's ShardWriter.
"""

import io
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from time import perf_counter

import numpy as np
import simplejpeg
from common import arguments, cores, report, row
from PIL import Image

from shards.build import build
from shards.encode import Encoding

SHORT, QUALITY = 256, 90


def main():
    args = arguments(__doc__)
    images, shrunk, rounds = (64, 32, 3) if args.quick else (30_000, 8_000, 5)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        synthesise(folder / "keep", images)
        synthesise(folder / "shrink", shrunk)
        megabytes = sum(path.stat().st_size for path in (folder / "keep").rglob("*.jpg")) / 1e6
        keeping = {
            "tar": lambda out: plain_tar(folder / "keep", out),
            "patchmill, 1 worker": lambda out: build(folder / "keep", out, shard_samples=images // 8, workers=1),
            f"patchmill, {cores()} workers": lambda out: build(
                folder / "keep", out, shard_samples=images // 8, workers=cores()
            ),
        }
        shrinking = {
            "Pillow + webdataset": lambda out: loop(folder / "shrink", out),
            "patchmill, 1 worker": lambda out: shrink(folder / "shrink", out, shrunk // 32, 1),
            "patchmill, 2 workers": lambda out: shrink(folder / "shrink", out, shrunk // 32, 2),
        }
        import webdataset  # noqa: F401, so that its import is in nobody's time

        kept = in_turns(keeping, folder / "out", rounds)
        made = in_turns(shrinking, folder / "out", rounds)
    rows = [row(f"keep: {name}", "MB/s", [megabytes / s for s in seconds]) for name, seconds in kept.items()]
    rows += [row(f"shrink: {name}", "images/s", [shrunk / s for s in seconds]) for name, seconds in made.items()]
    value = [each.value for each in rows]
    ratios = {
        "tar, 1 worker": value[1] / value[0],
        f"tar, {cores()} workers": value[2] / value[0],
        "Pillow + webdataset, 1 worker": value[4] / value[3],
        "1 worker, 2 workers": value[5] / value[4],
    }
    report("build", rows, ratios, args.json)


def synthesise(folder: Path, images: int) -> None:
    """Write JPEGs of 1/f noise, whose spectrum is that of photographs, 500 × 375, 4:2:0, about 110 kB, no two alike."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(375)[:, None], np.fft.rfftfreq(500)[None])
    frequency[0, 0] = 1
    distinct = []
    for _ in range(min(images, 100)):
        planes = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((3, 375, 500)), axes=(1, 2)) / frequency, (375, 500))
        pixels = (planes / planes.std() * 45 + 128).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)
        distinct.append(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), 90, colorsubsampling="420"))
    for i in range(images):
        data = distinct[i % len(distinct)]
        comment = b"\xff\xfe\x00\x0a" + f"{i:08d}".encode()
        path = folder / f"class{i % 10}" / f"{i:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data[:2] + comment + data[2:])


def in_turns(contestants: dict, out: Path, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each contestant, round by round; each begins with nothing left to write to disk."""
    seconds = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, contestant in contestants.items():
            os.sync()
            began = perf_counter()
            contestant(out)
            seconds[name].append(perf_counter() - began)
            shutil.rmtree(out)
    return seconds


def plain_tar(source: Path, out: Path) -> None:
    """Pack a folder as one tar with the system's tar, and wait for the disk."""
    out.mkdir()
    subprocess.run(["tar", "cf", out / "all.tar", "-C", source, "."], check=True)
    with open(out / "all.tar", "rb") as file:
        os.fsync(file.fileno())


def shrink(source: Path, out: Path, shard_samples: int, workers: int) -> None:
    """Shrink with ours."""
    build(source, out, shard_samples=shard_samples, workers=workers, encoding=Encoding(SHORT, quality=QUALITY))


def loop(source: Path, out: Path) -> None:
    """Shrink with the loop that everybody writes."""
    import webdataset  # here, since our worker processes read this file, too, and would wait for torch

    out.mkdir()
    classes = sorted(path.name for path in source.iterdir())
    with webdataset.ShardWriter(f"{out}/%06d.tar", maxcount=10_000, verbose=0) as sink:
        for path in sorted(source.rglob("*.jpg")):
            image = Image.open(path).convert("RGB")
            scale = SHORT / min(image.size)
            if scale < 1:
                image = image.resize([round(side * scale) for side in image.size], Image.BICUBIC)
            file = io.BytesIO()
            image.save(file, "JPEG", quality=QUALITY)
            label = str(classes.index(path.parent.name)).encode()
            sink.write({"__key__": path.stem, "jpg": file.getvalue(), "cls": label})


if __name__ == "__main__":
    main()
