"""Make labelled images from the drawings of the Open Clip Art Library, as Debian packages them.

    python examples/clipart/make.py            # the subset beside this file
    python examples/clipart/make.py --full --out /data/clipart --side 256

The same package gives the same choice of images; the bytes also depend on Pillow's version.
"""

import argparse
import hashlib
import io
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

# Folder of the package -> class of the subset; the longest match counts, None leaves a folder out.
CLASSES = {
    "animals": "animals",
    "food": "food",
    "recreation/games": "games",
    "signs_and_symbols/flags": "flags",
    "computer/icons": "icons",
    "signs_and_symbols/map_symbols": "map_symbols",
    "geography": "geography",
    "geography/astronomy": None,
    "people": "people",
    "people/clothing": None,
    "tools": "tools",
    "transportation": "transportation",
    "transportation/roadsigns": None,
}
# Drawings of which the package shows only a box that says "Linked Image Not Found".
NOT_RENDERED = {
    "animals/birds/duck_yellow_ii_kurt_cagl_.png",
    "animals/birds/penguin/tux_didier_fabert_01.png",
    *(f"people/stylized_yoga_person_ger_0{i}.png" for i in range(1, 6)),
}
IMAGES_PER_CLASS = 300
MAX_PIXELS = 25_000_000
MAX_ASPECT = 2.5
# A drawing is nearly empty if fewer than this share of its pixels differ from the commonest colour.
MIN_INK = 0.03


def main() -> None:
    """Read the arguments, write the images, print the number of each class."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", nargs="?", type=Path, default=Path("/usr/share/openclipart/png"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "images")
    parser.add_argument("--side", type=int, default=72, help="short side of the images, in pixels")
    parser.add_argument("--full", action="store_true", help="all images, a class for each folder")
    args = parser.parse_args()
    if not args.source.is_dir():
        parser.error(f"no such folder: {args.source}; install the package openclipart-png, or name its png folder")
    if args.out.exists():
        parser.error(f"{args.out} exists; remove it first")
    partial = args.out.with_name(f".{args.out.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    counts: dict[str, int] = {}
    seen: set[bytes] = set()
    for path, label in drawings(args.source, args.full):
        if not args.full and counts.get(label, 0) == IMAGES_PER_CLASS:
            continue
        image = small_image(args.source / path, args.side)
        if image is None:
            continue
        digest = hashlib.sha256(image.resize((32, 32), Image.Resampling.BOX).tobytes()).digest()
        if digest in seen:
            continue
        seen.add(digest)
        suffix, data = encode(image)
        name = re.sub(r"[^A-Za-z0-9_-]+", "_", "_".join(path.with_suffix("").parts[1:]))
        file = partial / label / f"{name}.{suffix}"
        if file.exists():
            raise FileExistsError(f"two drawings would be named {file}")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        counts[label] = counts.get(label, 0) + 1
    size = sum(file.stat().st_size for file in partial.rglob("*.*"))
    partial.rename(args.out)
    for label, count in sorted(counts.items()):
        print(f"{label:24} {count:5}")
    print(f"{'total':24} {sum(counts.values()):5}  {size:,} bytes")


def drawings(source: Path, full: bool) -> Iterator[tuple[Path, str]]:
    """Yield the path, relative to ``source``, and class of every PNG file, ordered by a hash of the path."""
    paths = (path.relative_to(source) for path in source.rglob("*.png") if not path.is_symlink())
    paths = (path for path in paths if path.as_posix() not in NOT_RENDERED)
    for path in sorted(paths, key=lambda path: hashlib.sha256(path.as_posix().encode()).digest()):
        folders = path.parts[:-1]
        if full:
            yield path, "_".join(folders[:2])
        elif label := CLASSES.get("/".join(folders[:2]), CLASSES.get(folders[0])):
            yield path, label


def small_image(path: Path, side: int) -> Image.Image | None:
    """Return the drawing on white with the given short side, or None where it is not fit for use.

    Transparent margins are cut off. Not fit are drawings that are smaller than that, of more than
    ``MAX_PIXELS``, very long, or nearly empty.
    """
    with Image.open(path) as image:
        if image.width * image.height > MAX_PIXELS:
            return None
        image = image.convert("RGBA")
    image = image.crop(image.getchannel("A").getbbox())
    short, long = sorted(image.size)
    if short < side or long > MAX_ASPECT * short:
        return None
    white = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(white, image).convert("RGB")
    size = tuple(round(pixels * side / short) for pixels in image.size)
    image = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    pixels = np.asarray(image.quantize(16, dither=Image.Dither.NONE))
    ink = 1 - np.bincount(pixels.ravel()).max() / pixels.size
    return image if ink >= MIN_INK else None


def encode(image: Image.Image) -> tuple[str, bytes]:
    """Return ("png", bytes) with a palette or ("jpg", bytes), whichever is smaller."""
    files = {"png": io.BytesIO(), "jpg": io.BytesIO()}
    image.quantize(32, dither=Image.Dither.NONE).save(files["png"], "PNG", optimize=True)
    image.save(files["jpg"], "JPEG", quality=80, subsampling="4:2:0", optimize=True)
    return min(((suffix, file.getvalue()) for suffix, file in files.items()), key=lambda item: len(item[1]))


if __name__ == "__main__":
    Image.MAX_IMAGE_PIXELS = None  # small_image asks for the size before it decodes
    main()
