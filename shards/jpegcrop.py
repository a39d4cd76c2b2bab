"""A part of a JPEG without decoding the rest: native/jpegcrop.c. Built by ``python -m shards.jpegcrop``.

The library has native/resize.c in it too, for shards/resize.py.
"""

import ctypes
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from threading import Lock

import numpy as np

from shards.atomic import whole_file
from shards.errors import UserError

try:
    import simplejpeg as simplejpeg  # for decode.py and encode.py too
except ImportError:  # Pillow decodes JPEGs then, and there is nothing to check the crop decoder by
    simplejpeg = None

_SOURCES = [Path(__file__).parent / "native" / name for name in ("jpegcrop.c", "resize.c")]
_FLAGS = ["-O3", "-shared", "-fPIC"]
_LOADING = Lock()


@dataclass(frozen=True, eq=False)
class Native:
    """The functions of the library, which release the GIL while they run."""

    decode: Callable[..., int]
    resize: Callable[..., int]


def decode_part(data: bytes, top: int, left: int, height: int, width: int, shrink: int = 1) -> np.ndarray | None:
    """Decode a part of a JPEG as stored, to the bits that simplejpeg gives for it in the whole.

    Args:
        data: An encoded JPEG.
        top: First row of the part.
        left: First column of the part.
        height: Of the part, pixels.
        width: Of the part, pixels.
        shrink: 1, 2, 4 or 8: the part is of the image decoded at such a fraction of its size, rounded up.

    Returns:
        uint8 [height, width, 3], RGB, contiguous; or None where the full decoder has to look: the JPEG is
        damaged, not baseline or not grey or RGB, the part is not inside it, or there is no native decoder,
        which is said once on stderr.
    """
    library = native()
    if library is None or min(height, width) < 1:
        return None
    return _call(library.decode, data, shrink, top, left, height, width)


def native() -> Native | None:
    """Return what is built, or None, which is said once on stderr."""
    with _LOADING:
        return _native()


@cache
def _native() -> Native | None:
    if simplejpeg is None:
        print(
            "warning: simplejpeg cannot be imported: Pillow decodes JPEGs, whole and at full size, more slowly and to "
            "pixels a little different; pip install simplejpeg",
            file=sys.stderr,
        )
        return None
    try:
        return _load(_library())
    except (OSError, UserError) as error:
        print(
            f"warning: no native JPEG crop decoder ({error}): JPEGs are decoded whole, to the same pixels "
            "but slower; apt-get install libjpeg-dev and run: python -m shards.jpegcrop",
            file=sys.stderr,
        )
        return None


def _library() -> Path:
    # Its name changes with the sources, so an older build is never taken for this one.
    sources = b"".join(path.read_bytes() for path in _SOURCES)
    return _SOURCES[0].with_name(f"jpegcrop-{hashlib.sha256(sources).hexdigest()[:16]}.so")


def _load(path: Path) -> Native:
    library = ctypes.CDLL(str(path))
    decode, resize = library.jpegcrop_decode, library.jpegcrop_resize
    decode.argtypes = [ctypes.c_char_p, ctypes.c_size_t, *[ctypes.c_int] * 5, ctypes.c_void_p]
    resize.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 5, ctypes.c_void_p]
    decode.restype = resize.restype = ctypes.c_int
    _check(decode)  # each time, which takes milliseconds: libjpeg is the system's, and may be another than at the build
    return Native(decode, resize)


def _call(
    decode: Callable[..., int], data: bytes, shrink: int, top: int, left: int, height: int, width: int
) -> np.ndarray | None:
    part = np.empty((height, width, 3), dtype=np.uint8)
    return None if decode(data, len(data), shrink, top, left, height, width, part.ctypes.data) else part


def build() -> Path:
    """Compile the decoder beside its source, unless that was done; returns the library.

    Raises:
        UserError: There is no compiler, no simplejpeg or no libjpeg-turbo, or one that gives other pixels than it.
    """
    if simplejpeg is None:
        raise UserError("simplejpeg, which it is checked by, cannot be imported; pip install simplejpeg")
    path = _library()
    try:
        _load(path)
    except OSError:  # not there yet, or made for another machine
        with whole_file(path) as partial:
            _compile(partial)
            _load(partial)
    return path


def _compile(path: Path) -> None:
    command = [os.environ.get("CC", "gcc"), *_FLAGS, "-o", str(path), *map(str, _SOURCES), "-ljpeg", "-lm"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise UserError(f"no C compiler: {error}; apt-get install gcc") from error
    if done.returncode:
        why = done.stderr.partition("\n")[0]
        raise UserError(f"{_SOURCES[0].name} does not compile: {why}; apt-get install libjpeg-dev")


def _check(decode: Callable[..., int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    for sampling, shrink in product(("444", "422", "420", "440", "411"), (1, 2, 4, 8)):
        data = simplejpeg.encode_jpeg(image, quality=90, colorsubsampling=sampling)
        whole = simplejpeg.decode_jpeg(data, "RGB", min_height=-(-50 // shrink), min_width=-(-70 // shrink))
        for box in [(0, 0, 50, 70), (17, 19, 20, 30), (33, 5, 1, 1)]:
            top, left, height, width = (-(-side // shrink) for side in box)
            part = _call(decode, data, shrink, top, left, height, width)
            if part is None or not np.array_equal(part, whole[top : top + height, left : left + width]):
                raise UserError(f"this libjpeg decodes {sampling} to other pixels than simplejpeg; install another")


def main() -> None:
    """Build, or say why there is nothing built: it goes without."""
    try:
        build()
    except UserError as error:
        print(f"warning: going on without the native JPEG crop decoder: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
