"""Which copies of photographs `shards dedupe` finds, what it mistakes for copies, and what it costs.

Test set: 1,000 photographs. Training set: six kinds of copies of each, and 20,000 distractors: 2,000 crops of other
photographs and 18,000 drawings. The photographs come from Debian's packages: whole ones from gcompris, and pieces
of wallpapers that do not overlap. A wallpaper gives either queries or distractors, never both. Pieces with next to
nothing on them (out of focus, plain sky) are counted apart: the standard deviation of grey below 12 of 255 at 32 x 32.
The thresholds were set on other draws, with other wallpapers as queries (but the same whole photographs).
The index of 1 million test images holds synthetic pictures: noise with the spectrum of photographs.
"""

import io
import multiprocessing
import re
import struct
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

import numpy as np
import pyarrow.parquet as pq
from common import Row, arguments, report, row
from photographs import WALLPAPERS, photograph_files
from PIL import Image, ImageEnhance

from shards import phash
from shards.build import build
from shards.dedupe import dedupe
from shards.hashindex import HashIndex, TestImages, write_index

PACKAGES = (
    f"{WALLPAPERS} gcompris-qt-data openclipart-png oxygen-icon-theme gnome-icon-theme tango-icon-theme "
    "adwaita-icon-theme tuxpaint-stamps-default"
)
GCOMPRIS = Path("/usr/share/gcompris-qt/rcc")
DRAWINGS = [Path("/usr/share") / name for name in (
    "openclipart/png", "icons/oxygen", "icons/gnome", "icons/Tango", "icons/Adwaita", "tuxpaint/stamps")]  # fmt: skip
# The activities of gcompris whose pictures without transparency are photographs, but for a few.
ACTIVITIES = (
    "categorization erase explore_farm_animals explore_monuments explore_world_animals explore_world_music lang"
)
SIDE = 320  # pixels of a query cut from a wallpaper
PLAIN = 12  # standard deviation of grey, of 255
DRAWING_PIXELS = 1 << 20  # at most: larger ones only take longer
ROUNDS = 3


def main():
    args = arguments(__doc__)
    rng = np.random.default_rng(5)
    if args.quick:
        queries, plain, distractors, drawings = quick_data(rng)
    else:
        queries, plain, distractors, drawings = real_data(rng)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        source = folder / "source"
        for name, images in (("query", queries), ("plain", plain)):
            write(source / "test" / name, (encode(image, 95) for image in images))
            for number, copy in enumerate(COPIES.values()):
                write(source / "train" / f"{name}-{number}", (copy(image, rng) for image in images))
        write(source / "train/photograph", (encode(image, 90) for image in distractors))
        write(source / "train/drawing", drawings)
        for part in ("train", "test"):
            build(source / part, folder / part)
        began = perf_counter()
        found = dedupe(folder / "train", [folder / "test"], out=folder / "out", workers=1)
        seconds = perf_counter() - began
        rows = quality(pq.read_table(found.pairs).to_pylist(), queries, plain, distractors, drawings)
        rows.append(row("whole run, one process", "µs/image", [1e6 * seconds / (found.images + found.tests[0].images)]))
        photographs = [encode(image, 90) for image in distractors]
        rows += cost(folder / "out/index", photographs, f"{found.tests[0].images:,} test images")
        rows += large_index(folder / "large", photographs, 5_000 if args.quick else 1_000_000)
    report("dedupe", rows, {}, args.json)


def encode(image: np.ndarray | Image.Image, quality: int) -> bytes:
    """Return a JPEG of quality 1 to 100."""
    file = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(np.ascontiguousarray(image))
    image.save(file, "JPEG", quality=int(quality))
    return file.getvalue()


def resized(image: np.ndarray, rng: np.random.Generator) -> bytes:
    height, width = image.shape[:2]
    factor = 2 ** rng.uniform(-2, 1)
    size = max(1, round(width * factor)), max(1, round(height * factor))
    kernel = rng.choice([Image.BILINEAR, Image.BICUBIC, Image.LANCZOS])
    return encode(Image.fromarray(image).resize(size, kernel), rng.integers(75, 96))


def cropped(image: np.ndarray, rng: np.random.Generator) -> bytes:
    """Take up to 5 % off the height and up to 5 % off the width, anywhere."""
    height, width = image.shape[:2]
    lost = rng.uniform(0, 0.05, 2) * (height, width)
    top, left = rng.uniform(0, 1, 2) * lost
    return encode(image[int(top) : int(top + height - lost[0]), int(left) : int(left + width - lost[1])],
                  rng.integers(75, 96))  # fmt: skip


def coloured(image: np.ndarray, rng: np.random.Generator) -> bytes:
    """Change brightness, contrast and saturation by up to 30 % and each channel's gain by up to 15 %."""
    picture = Image.fromarray(image)
    for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        picture = change(picture).enhance(rng.uniform(0.7, 1.3))
    gains = rng.uniform(0.85, 1.15, 3)
    return encode((np.asarray(picture) * gains).clip(0, 255).astype(np.uint8), rng.integers(75, 96))


COPIES = {
    "re-encoded, quality 30 to 95": lambda image, rng: encode(image, rng.integers(30, 96)),
    "re-encoded, quality 30": lambda image, rng: encode(image, 30),
    "resized, 0.25 to 2 times": resized,
    "cropped, up to 5 % of each side": cropped,
    "colours shifted": coloured,
    "mirrored": lambda image, rng: encode(image[:, ::-1], rng.integers(75, 96)),
}


def write(folder: Path, images: Iterator[bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, data in enumerate(images):
        extension = "jpg" if data.startswith(b"\xff\xd8") else "png"
        (folder / f"{i:05d}.{extension}").write_bytes(data)


def real_data(rng: np.random.Generator) -> tuple[list, list, list, list]:
    """Return queries, plain pieces and distractors as pixels, and drawings as files' bytes."""
    wallpapers = photograph_files()
    activities = [GCOMPRIS / f"{name}.rcc" for name in ACTIVITIES.split()]
    missing = [path for path in [*wallpapers, *activities, *DRAWINGS] if path is None or not path.exists()]
    if missing:
        sys.exit(f"the pictures are missing: apt-get install --no-install-recommends {PACKAGES}")
    queries, plain = distinct([image for path in activities for image in carved(path)]), []
    of_queries = [path for i, path in enumerate(wallpapers) if i % 3 != 0]
    pieces = [piece for path in of_queries for piece in grid(path)]
    for i in rng.permutation(len(pieces)):
        small = np.asarray(Image.fromarray(pieces[i]).convert("L").resize((32, 32), Image.BOX))
        (queries if small.std() >= PLAIN else plain).append(pieces[i])
    of_distractors = [path for i, path in enumerate(wallpapers) if i % 3 == 0]
    each = -(-2000 // len(of_distractors))
    distractors = [crop for path in of_distractors for crop in crops(path, each, rng)][:2000]
    files = [path for folder in DRAWINGS for path in sorted(folder.rglob("*.png"))]
    drawings = {}
    for path in sorted(files, key=lambda path: -path.stat().st_size):
        if not path.is_symlink():
            data = path.read_bytes()
            width, height = struct.unpack(">II", data[16:24])  # of a PNG
            if width * height <= DRAWING_PIXELS:
                drawings[data] = None  # once each
    if len(queries) < 1000 or len(drawings) < 18000:
        sys.exit(f"{len(queries)} photographs and {len(drawings)} drawings are too few; install all of: {PACKAGES}")
    return queries[:1000], plain[:200], distractors, list(drawings)[:18000]


def distinct(images: list[np.ndarray]) -> list[np.ndarray]:
    """Leave out photographs that several activities have, as they are or cut a little otherwise."""
    small = [np.asarray(Image.fromarray(image).convert("L").resize((16, 16), Image.BOX)).ravel() for image in images]
    same = np.triu(np.corrcoef(np.stack(small)) > 0.9, 1)
    return [image for i, image in enumerate(images) if not same[:, i].any()]


def carved(path: Path) -> Iterator[np.ndarray]:
    """Yield the opaque pictures in a Qt resource file, where they lie one after the other."""
    data = path.read_bytes()
    for found in re.finditer(rb"RIFF(....)WEBP", data, re.DOTALL):
        stop = found.start() + 8 + int.from_bytes(found.group(1), "little")
        with Image.open(io.BytesIO(data[found.start() : stop])) as image:
            if image.mode == "RGB" and min(image.size) >= 200:
                yield np.asarray(image)


def grid(path: Path) -> Iterator[np.ndarray]:
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    for top in range(0, pixels.shape[0] - SIDE + 1, SIDE):
        for left in range(0, pixels.shape[1] - SIDE + 1, SIDE):
            yield pixels[top : top + SIDE, left : left + SIDE]


def crops(path: Path, count: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    for _ in range(count):
        height = int(rng.integers(250, 700))
        width = min(int(height * rng.uniform(0.75, 1.5)), pixels.shape[1])
        top, left = rng.integers(0, pixels.shape[0] - height + 1), rng.integers(0, pixels.shape[1] - width + 1)
        yield pixels[top : top + height, left : left + width]


def quick_data(rng: np.random.Generator) -> tuple[list, list, list, list]:
    """Return noise with the spectrum of photographs, and the drawings of the repository."""
    drawings = sorted((Path(__file__).parents[1] / "examples/clipart/images").rglob("*.png"))[::20]
    queries, distractors = ([np.repeat(each[:, :, None], 3, 2) for each in noise(rng, 20, 128)] for _ in range(2))
    blank = [np.full((128, 128, 3), 200, np.uint8)] * 2
    return queries, blank, distractors, [path.read_bytes() for path in drawings]


def noise(rng: np.random.Generator, count: int, side: int) -> np.ndarray:
    """Return grey noise whose spectrum falls with the frequency, uint8 [count, side, side]."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = np.inf
    waves = rng.standard_normal((2, count, *frequency.shape), np.float32)
    planes = np.fft.irfft2((waves[0] + 1j * waves[1]) / frequency, (side, side))
    return (planes / planes.std() * 45 + 128).clip(0, 255).astype(np.uint8)


def quality(pairs: list[dict], queries: list, plain: list, distractors: list, drawings: list) -> list[Row]:
    """Count what was found: keys are CLASS/NUMBER."""
    matches = {tuple(pair["key"].split("/")): tuple(pair["test_key"].split("/")) for pair in pairs}
    rows, elsewhere = [], 0
    for name, images in (("query", queries), ("plain", plain)):
        for number, kind in enumerate(COPIES):
            found = [matches.get((f"{name}-{number}", f"{i:05d}")) for i in range(len(images))]
            right = [match == (name, f"{i:05d}") for i, match in enumerate(found)]
            elsewhere += sum(match is not None for match in found) - sum(right)
            label = f"recall, {kind}" + (" (hardly anything on them)" if name == "plain" else "")
            rows.append(row(label, "%", [100 * float(np.mean(right))]))
    for name, images in (("photograph", distractors), ("drawing", drawings)):
        false = sum(folder == name for folder, _ in matches)
        rows.append(row(f"false matches among {len(images):,} {name}s", "images", [false]))
    rows.append(row("copies matched with another query", "images", [elsewhere]))
    return rows


def cost(folder: Path, images: list[bytes], name: str) -> list[Row]:
    """Time decoding and looking up, on one core."""
    index = HashIndex(folder)
    decoding, probing = [], []
    for _ in range(ROUNDS):
        began = perf_counter()
        pictures = np.stack([phash.small_picture(data, "") for data in images])
        decoding.append(1e6 * (perf_counter() - began) / len(images))
        began = perf_counter()
        for start in range(0, len(pictures), 64):
            index.near(pictures[start : start + 64])
        probing.append(1e6 * (perf_counter() - began) / len(images))
    return [row("decoding a photograph", "µs/image", decoding), row(f"probing {name}", "µs/image", probing)]


def large_index(folder: Path, photographs: list[bytes], images: int) -> list[Row]:
    """Make a large synthetic index and probe it, each in a process of its own, whose peak of memory counts."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        made = pool.apply(make_large, (folder, images))
        rows, peak = pool.apply(probe_large, (folder, photographs, f"{images:,} test images (synthetic)"))
    return [
        rows[1],
        row(f"peak memory of making the index of {images:,}", "MB", [made]),
        row(f"peak memory of probing the index of {images:,}", "MB", [peak]),
    ]


def make_large(folder: Path, images: int) -> float:
    rng = np.random.default_rng(1)

    def parts() -> Iterator[TestImages]:
        for start in range(0, images, 500):
            count = min(500, images - start)
            where = np.stack([np.zeros(count), np.full(count, start // 500), np.arange(count)], 1).astype(np.int32)
            yield TestImages(where, rng.integers(0, 256, (count, 32), np.uint8), noise(rng, count, phash.SIDE))

    write_index(folder, parts(), images, [])
    return peak_megabytes()


def probe_large(folder: Path, photographs: list[bytes], name: str) -> tuple[list[Row], float]:
    return cost(folder, photographs, name), peak_megabytes()


def peak_megabytes() -> float:
    """Return the most memory this process ever had resident, mapped files included."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) / 1000


if __name__ == "__main__":
    main()
