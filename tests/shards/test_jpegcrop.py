import io
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from shards import jpegcrop
from shards.augment import TRANSFORMS, InceptionCrop, transform_encoded
from shards.decode import DecodeError, decode
from shards.errors import UserError
from shards.randaugment import RandAugment

SAMPLINGS = ("444", "422", "420", "440", "411")


def build_or_skip():
    try:
        return jpegcrop.build()
    except UserError as error:
        if "jpeglib.h" in str(error) or "-ljpeg" in str(error):
            pytest.skip(str(error))
        raise


@pytest.fixture
def native():
    """The native decoder is there."""
    build_or_skip()
    jpegcrop._native.cache_clear()
    yield
    jpegcrop._native.cache_clear()


def without_native(monkeypatch):
    monkeypatch.setattr(jpegcrop, "_native", lambda: None)


def image_of(rng, height, width):
    """Noise, or a smooth image."""
    if rng.random() < 0.5:
        return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    few = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    return np.array(few.resize((width, height), Image.BICUBIC))


def random_box(rng, height, width):
    h, w = (1 if rng.random() < 0.2 else int(rng.integers(1, side + 1)) for side in (height, width))
    return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w


def saved(image, **options):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", **options)
    return file.getvalue()


def cut(image, box):
    top, left, height, width = box
    return image[top : top + height, left : left + width]


def encode_sampling(name):
    return lambda image, q, _: simplejpeg.encode_jpeg(image, q, "RGB", name)


ENCODERS = {name: encode_sampling(name) for name in SAMPLINGS} | {
    "grey": lambda image, q, _: simplejpeg.encode_jpeg(image[:, :, :1].copy(), q, "GRAY", "Gray"),
    "rgb": lambda image, q, _: saved(image, quality=q, subsampling=0, keep_rgb=True),
    "codes of its own": lambda image, q, _: saved(image, quality=q, subsampling=2, optimize=True),
    "restarts": lambda image, q, rng: saved(
        image, quality=q, subsampling=2, restart_marker_blocks=int(rng.integers(1, 5))
    ),
}


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_part_is_bit_equal_to_the_whole_cut(native, kind):
    rng = np.random.default_rng(sum(kind.encode()))
    for most in [3] * 30 + [20] * 60 + [90] * 60 + [400] * 6:  # also smaller than a block
        height, width = (int(x) for x in rng.integers(1, most + 1, 2))
        data = ENCODERS[kind](image_of(rng, height, width), int(rng.integers(5, 101)), rng)
        whole = simplejpeg.decode_jpeg(data, "RGB")
        corners = [(0, 0, height, width), (0, 0, 1, 1), (height - 1, width - 1, 1, 1)]
        for box in corners + [random_box(rng, height, width) for _ in range(20)]:
            part = jpegcrop.decode_part(data, *box)
            assert part is not None, (box, height, width)
            assert (part == cut(whole, box)).all(), (box, height, width)


@pytest.mark.parametrize("shrink", [2, 4, 8])
@pytest.mark.parametrize("kind", ENCODERS)
def test_a_part_of_a_smaller_image_is_bit_equal_to_the_whole_cut(native, kind, shrink):
    rng = np.random.default_rng(sum(kind.encode()) + shrink)
    for most in [20] * 15 + [90] * 15 + [400] * 3:
        height, width = (
            int(x) for x in rng.integers(6, most + 1, 2)
        )  # of smaller ones simplejpeg takes other fractions
        data = ENCODERS[kind](image_of(rng, height, width), int(rng.integers(5, 101)), rng)
        height, width = -(-height // shrink), -(-width // shrink)
        whole = simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width)
        assert whole.shape == (height, width, 3)
        corners = [(0, 0, height, width), (0, 0, 1, 1), (height - 1, width - 1, 1, 1)]
        for box in corners + [random_box(rng, height, width) for _ in range(10)]:
            part = jpegcrop.decode_part(data, *box, shrink)
            assert part is not None, (box, height, width)
            assert (part == cut(whole, box)).all(), (box, height, width)
    assert jpegcrop.decode_part(data, 0, 0, height + 1, 1, shrink) is None


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize(("orientation", "quarters"), [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_large_parts_are_decoded_smaller_if_asked(native, monkeypatch, there, orientation, quarters):
    if not there:
        without_native(monkeypatch)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(image_of(np.random.default_rng(4), 203, 307), exif=exif)
    high, wide = decode(data, "a").shape[:2]
    for box, short, shrink, want in [  # edges at the nearest pixels
        ((0, 0, high, wide), 24, 8, None),
        ((0, 0, high, wide), 40, 4, None),
        ((13, 21, 128, 150), 16, 8, (2, 3, 16, 18)),
        ((13, 21, 128, 150), 17, 4, (3, 5, 32, 38)),
        ((13, 21, 128, 150), 64, 2, (7, 11, 64, 75)),
        ((13, 21, 128, 150), 65, 1, (13, 21, 128, 150)),
        ((13, 21, 31, 150), 1, 2, (7, 11, 15, 75)),  # 8 pixels at least
    ]:
        whole = simplejpeg.decode_jpeg(data, "RGB", min_height=-(-203 // shrink), min_width=-(-307 // shrink))
        whole = np.rot90(whole, quarters)
        want = (
            whole[: (high + shrink // 2) // shrink, : (wide + shrink // 2) // shrink] if not want else cut(whole, want)
        )
        assert np.array_equal(decode(data, "a", lambda h, w, box=box: box, short), want), box
        if want.shape == whole.shape:
            assert (decode(data, "a", short=short) == whole).all()


def test_transforms_of_large_files_shrink_if_asked(native):
    data = saved(image_of(np.random.default_rng(4), 403, 607), quality=95)
    whole = decode(data, "a")
    shrunk = 0
    for position in range(20):
        key = (7, 0, position)
        plain, quick = InceptionCrop(48), InceptionCrop(48, shrink=True)
        box = plain.box(403, 607, key)
        assert quick.box(403, 607, key) == box
        got = transform_encoded(quick, data, "a", key)
        want = plain.finish(decode(data, "a", lambda h, w, box=box: box, 48), key)
        assert (got == want).all()
        assert (transform_encoded(RandAugment(quick, 0, 0), data, "a", key) == want).all()
        assert (quick(whole, key) == plain(whole, key)).all()
        shrunk += (got != plain(whole, key)).any()
    assert shrunk == sum(min(InceptionCrop(48).box(403, 607, (7, 0, p))[2:]) >= 96 for p in range(20)) > 10


def test_what_is_not_plain_is_left_to_the_full_decoder(native):
    image = image_of(np.random.default_rng(0), 40, 50)
    assert jpegcrop.decode_part(saved(image), 5, 5, 9, 9) is not None
    cmyk = io.BytesIO()
    Image.fromarray(image).convert("CMYK").save(cmyk, "JPEG")
    for data in (saved(image, progressive=True), cmyk.getvalue(), b"", b"\xff\xd8\xff", b"no JPEG at all"):
        assert jpegcrop.decode_part(data, 5, 5, 9, 9) is None
    for box in [(-1, 0, 9, 9), (0, -1, 9, 9), (32, 0, 9, 9), (0, 42, 9, 9), (2**31 - 1, 0, 2, 9), (0, 0, 0, 9)]:
        assert jpegcrop.decode_part(saved(image), *box) is None


def test_a_file_cut_short_below_the_part_is_noticed(native):
    rng = np.random.default_rng(1)
    data = saved(image_of(rng, 90, 60), subsampling=2, restart_marker_blocks=2)
    assert jpegcrop.decode_part(data + b"trailing bytes", 0, 0, 8, 8) is not None
    for end in range(data.index(b"\xff\xda"), len(data) - 1):
        assert jpegcrop.decode_part(data[:end], 0, 0, 8, 8) is None
        assert jpegcrop.decode_part(data[:end] + bytes(len(data) - end), 0, 0, 8, 8) is None
    with pytest.raises(DecodeError, match="cut short"):
        decode(data[:-40], "cut short", lambda h, w: (0, 0, 8, 8))


def damaged(data, rng):
    scan = data.index(b"\xff\xda")
    at = int(rng.integers(3 if rng.random() < 0.4 else scan, len(data)))
    junk = rng.integers(0, 256, int(rng.integers(1, 5)), dtype=np.uint8).tobytes()
    return (
        data[:at],  # cut
        data[:at] + junk + data[at + len(junk) :],  # overwritten
        data[:at] + bytes([data[at] ^ 1 << int(rng.integers(8))]) + data[at + 1 :],  # one bit
        data[:at] + data[at + len(junk) :],  # bytes lost
        data[:at] + b"\xff" + junk + data[at:],  # a marker
    )[rng.integers(5)]


def test_damaged_files_give_the_same_with_and_without_it(native, monkeypatch):
    rng = np.random.default_rng(2)
    files = []
    for _ in range(3000):
        height, width = (int(x) for x in rng.integers(8, 70, 2))
        options = {"subsampling": int(rng.integers(3)), "quality": int(rng.integers(20, 98))}
        if rng.random() < 0.5:
            options["restart_marker_blocks"] = int(rng.integers(1, 6))
        files.append((damaged(saved(image_of(rng, height, width), **options), rng), rng.random(4)))

    def result(data, share):
        def box(height, width):
            h, w = 1 + int(share[0] * height / 2), 1 + int(share[1] * width)
            return int(share[2] * (height - h)), int(share[3] * (width - w)), h, min(w, width)

        try:
            return decode(data, "a", box)
        except DecodeError:
            return None

    answered = sum(jpegcrop.decode_part(data, 0, 0, 4, 4) is not None for data, _ in files)
    got = [result(*file) for file in files]
    without_native(monkeypatch)
    want = [result(*file) for file in files]
    assert answered > 500  # where the damage is below the part, or does not show
    assert sum(x is None for x in want) > 500
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a == b).all()


def test_filling_inside_the_data_is_left_to_the_full_decoder(native):
    # libjpeg-turbo leaves coefficients of its first try behind there.
    data = saved(image_of(np.random.default_rng(6), 90, 60), quality=95)
    stuffed = data.index(b"\xff\x00", data.index(b"\xff\xda"))
    assert jpegcrop.decode_part(data, 0, 0, 9, 9) is not None
    assert jpegcrop.decode_part(data[:stuffed] + b"\xff" + data[stuffed:], 0, 0, 9, 9) is None


def test_data_that_ends_before_the_part_does_is_noticed(native):
    data = saved(image_of(np.random.default_rng(6), 90, 60), quality=95)
    scan = data.index(b"\xff\xda") + 14
    for share in (0, 0.3, 0.9):
        early = data[: scan + int(share * (len(data) - 2 - scan))].rstrip(b"\xff") + b"\xff\xd9"
        assert jpegcrop.decode_part(early, 60, 0, 30, 60) is None


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_part_of_a_turned_image_is_of_the_upright_one(native, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(image_of(np.random.default_rng(0), 40, 60), exif=exif)
    box = (3, 5, 17, 22)
    assert (decode(data, "a", lambda h, w: box) == cut(decode(data, "a"), box)).all()


@pytest.mark.parametrize("name", [*TRANSFORMS, "rand_augment"])
@pytest.mark.parametrize("there", [True, False])
def test_transforms_of_files_are_those_of_images(native, monkeypatch, name, there):
    rng = np.random.default_rng(4)
    image = image_of(rng, 130, 170)
    png = io.BytesIO()
    Image.fromarray(image).save(png, "PNG")
    transform = TRANSFORMS[name](48) if name in TRANSFORMS else RandAugment(InceptionCrop(48), 2, 15)
    if not there:
        without_native(monkeypatch)
    for data in (saved(image), saved(image, progressive=True), png.getvalue()):
        for position in range(10):
            key = (7, 0, position)
            want = transform(decode(data, "a"), key)
            assert (transform_encoded(transform, data, "a", key) == want).all()


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_the_whole_image_take_the_native_decoder_too(native, monkeypatch, name):
    data = saved(image_of(np.random.default_rng(4), 130, 170))
    want = TRANSFORMS[name](48)(decode(data, "a"), (7, 0, 1))

    def by_simplejpeg(*_, **__):
        raise AssertionError("simplejpeg was asked for the pixels")

    monkeypatch.setattr(simplejpeg, "decode_jpeg", by_simplejpeg)
    assert (transform_encoded(TRANSFORMS[name](48), data, "a", (7, 0, 1)) == want).all()


def test_its_absence_is_said_once_and_only_when_a_part_is_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jpegcrop, "_library", lambda: tmp_path / "none.so")
    jpegcrop._native.cache_clear()
    data = saved(image_of(np.random.default_rng(0), 40, 60))
    whole = decode(data, "a")
    assert capsys.readouterr().err == ""
    start = Barrier(4)

    def part(_):
        start.wait()
        return decode(data, "a", lambda h, w: (3, 4, 20, 30))

    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(part, range(8)):
            assert (got == whole[3:23, 4:34]).all()
    jpegcrop._native.cache_clear()
    said = capsys.readouterr().err
    assert said.count("warning") == 1
    assert "none.so" in said
    assert "apt-get install libjpeg-dev" in said


@pytest.fixture
def own_source(tmp_path, monkeypatch):
    """A copy of the C source that a test may change."""
    build_or_skip()
    copies = [tmp_path / path.name for path in jpegcrop._SOURCES]
    for path, copy in zip(jpegcrop._SOURCES, copies, strict=True):
        copy.write_bytes(path.read_bytes())
    monkeypatch.setattr(jpegcrop, "_SOURCES", copies)
    return copies[0]


def test_a_build_is_of_its_source(own_source):
    one = jpegcrop.build()
    made = one.stat().st_mtime_ns
    assert jpegcrop.build() == one
    assert one.stat().st_mtime_ns == made  # not made again
    own_source.write_text(own_source.read_text() + "/* changed */\n")
    other = jpegcrop._library()
    other.write_bytes(b"made for another machine")
    assert jpegcrop.build() == other != one
    jpegcrop._load(other)
    assert {path.name for path in own_source.parent.iterdir()} == {
        *(path.name for path in jpegcrop._SOURCES), one.name, other.name
    }  # fmt: skip


@pytest.mark.parametrize(
    ("was", "now", "message"),
    [
        ("JDCT_ISLOW", "JDCT_IFAST", "other pixels"),
        ("<jpeglib.h>", "<no_such_jpeglib.h>", "no_such_jpeglib.h.*apt-get install libjpeg-dev"),
    ],
)
def test_a_build_that_fails_leaves_nothing(own_source, was, now, message):
    source = own_source.read_text()
    assert was in source
    own_source.write_text(source.replace(was, now))
    with pytest.raises(UserError, match=message):
        jpegcrop.build()
    assert sorted(own_source.parent.iterdir()) == sorted(jpegcrop._SOURCES)


def test_a_libjpeg_that_came_later_with_other_pixels_is_not_used(own_source, capsys):
    own_source.write_text(own_source.read_text().replace("JDCT_ISLOW", "JDCT_IFAST"))
    jpegcrop._compile(jpegcrop._library())
    jpegcrop._native.cache_clear()
    try:
        assert jpegcrop.native() is None
    finally:
        jpegcrop._native.cache_clear()
    assert "this libjpeg decodes 444 to other pixels than simplejpeg" in capsys.readouterr().err
    with pytest.raises(UserError, match="other pixels"):
        jpegcrop.build()


def test_no_compiler_is_a_warning(own_source, monkeypatch, capsys):
    monkeypatch.setenv("CC", "no-such-compiler")
    jpegcrop.main()
    assert "going on without the native JPEG crop decoder: no C compiler" in capsys.readouterr().err
    assert sorted(own_source.parent.iterdir()) == sorted(jpegcrop._SOURCES)
