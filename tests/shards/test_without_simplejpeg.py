"""Where simplejpeg cannot be imported: Pillow decodes, and says so once."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, ImageOps

from pipeline import provenance
from shards import manifest
from shards.build import build
from shards.dataset import Dataset
from shards.decode import DECODER, decode
from shards.header import read_header
from tests.shards.images import make_source, tree

PROGRAM = """
import json, sys
from pathlib import Path

from shards import jpegcrop
from shards.augment import InceptionCrop, transform_encoded
from shards.build import build
from shards.decode import DECODER, DecodeError, decode
from shards.encode import ENCODER, Encoding

folder = Path(sys.argv[1])
data = (folder / "turned.jpg").read_bytes()
images = {
    "whole": decode(data, "a"),
    "part": decode(data, "a", lambda height, width: (5, 7, 30, 20)),
    "short": decode(data, "a", short=16),
    "crop": transform_encoded(InceptionCrop(16, shrink=True), data, "a", (0, 0, 0)),
}
try:
    decode(data[:-40], "cut short")
except DecodeError as error:
    print(error, file=sys.stderr)
build(folder / "source", folder / "kept", workers=1)
build(folder / "source", folder / "anew", workers=1, encoding=Encoding(resize_short=10))
jpegcrop.main()
print(json.dumps({"decoder": DECODER, "encoder": ENCODER} | {name: image.tolist() for name, image in images.items()}))
"""


def turned():
    """A smooth JPEG of 80 x 60 pixels that lies on its side."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.fromarray(pixels).resize((80, 60), Image.BICUBIC).save(file, "JPEG", quality=95, exif=exif)
    return file.getvalue()


def test_pillow_decodes_and_says_so_once(tmp_path):
    (tmp_path / "path").mkdir()
    (tmp_path / "path/simplejpeg.py").write_text("raise ImportError('no libturbojpeg')")
    (tmp_path / "turned.jpg").write_bytes(turned())
    source = make_source(tmp_path / "source", classes=2, each=2)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path],
        env=os.environ | {"PYTHONPATH": f"{tmp_path / 'path'}:{root}"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    warning, broken, built = done.stderr.splitlines()
    assert warning.startswith("warning: simplejpeg cannot be imported: Pillow decodes JPEGs")
    assert warning.endswith("pip install simplejpeg")
    assert broken.startswith("cannot decode cut short: ")
    assert built.startswith("warning: going on without the native JPEG crop decoder: ")
    found = json.loads(done.stdout)
    decoder, encoder = found.pop("decoder"), found.pop("encoder")
    assert decoder.startswith("Pillow's libjpeg")
    assert f"pillow {PIL.__version__}" in decoder
    assert "simplejpeg" not in decoder + encoder
    assert decoder != DECODER

    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(turned()))))
    images = {name: np.array(image, np.uint8) for name, image in found.items()}
    assert np.array_equal(images["whole"], upright)
    assert np.array_equal(images["part"], upright[5:35, 7:27])
    assert np.array_equal(images["short"], upright)
    assert images["crop"].shape == (16, 16, 3)
    build(source, tmp_path / "here", workers=1)
    assert tree(tmp_path / "kept") == tree(tmp_path / "here")
    anew = Dataset.open(tmp_path / "anew")
    assert json.loads((tmp_path / "anew" / manifest.DATASET).read_text())["build"]["encoding"]["encoder"] == encoder
    for sample in map(anew.__getitem__, range(len(anew))):
        assert read_header(sample.image)[0] == "jpg"
        assert min(decode(sample.image, sample.key).shape[:2]) == 10


def test_what_is_not_installed_has_no_version(monkeypatch):
    monkeypatch.setattr(provenance, "LIBRARIES", ("pillow", "no-such-library"))
    versions = provenance.versions()
    assert (versions["pillow"], versions["no-such-library"]) == (PIL.__version__, None)
