"""The committed demo images are what the README and the demo plan count on."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

CLIPART = Path(__file__).parents[1] / "examples/clipart"


def test_the_committed_images():
    files = sorted(path for path in (CLIPART / "images").rglob("*") if path.is_file())
    counts = Counter(path.parent.name for path in files)
    assert 8 <= len(counts) <= 12
    assert min(counts.values()) >= 90
    assert len(files) >= 2000
    assert sum(path.stat().st_size for path in files) <= 4_000_000
    assert {path.suffix for path in files} == {".jpg", ".png"}
    assert len({path.read_bytes() for path in files}) == len(files)
    for path in files:
        with Image.open(path) as image:
            assert 64 <= min(image.size) <= 96, path
    readme = (CLIPART / "README.md").read_text()
    for label, count in counts.items():
        assert f"| {label} | {count} |" in readme


def test_make_leaves_out_what_is_unfit(tmp_path):
    def draw(name: str, width: int, height: int, ink: int = 40) -> Path:
        path = tmp_path / "png" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.zeros((height, width, 4), np.uint8)
        pixels[-1] = pixels[:, -1] = (255, 255, 255, 255)  # opaque white: a margin that counts
        pixels[:ink, :ink] = (sum(name.encode()) % 200, 0, 0, 255)
        Image.fromarray(pixels).save(path)
        return path

    good = draw("animals/birds/owl.v2.png", 100, 150)
    draw("animals/small.png", 40, 150)
    draw("animals/long.png", 300, 100)
    draw("animals/empty.png", 100, 100, ink=5)
    draw("people/clothing/hat.png", 100, 100)
    (tmp_path / "png/food").mkdir()
    (tmp_path / "png/food/copy.png").write_bytes(good.read_bytes())
    (tmp_path / "png/animals/link.png").symlink_to(good)

    script = [
        sys.executable,
        CLIPART / "make.py",
        tmp_path / "png",
        "--side",
        "50",
        "--out",
        tmp_path / "out",
    ]
    subprocess.run(script, check=True)
    [made] = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert made.stem in ("birds_owl_v2", "copy")
    with Image.open(made) as image:
        assert image.size == (50, 75)
        assert image.convert("RGB").getpixel((30, 60)) == (255, 255, 255)

    again = subprocess.run(script, capture_output=True, text=True)
    assert again.returncode == 2
    assert "remove it first" in again.stderr

    subprocess.run([*script[:-1], tmp_path / "full", "--full"], check=True)
    labels = {path.name for path in (tmp_path / "full").iterdir()}
    assert "people_clothing" in labels
    assert labels & {"animals_birds", "food"}
