"""The hash against SciPy-free references of its own, and the comparison on pictures that are or are not copies."""

import io
from itertools import combinations

import cv2
import numpy as np
import pytest
from PIL import Image, ImageDraw

from shards import phash
from shards.decode import decode
from shards.hashindex import HashIndex, TestImages, about, write_index
from tests.shards.photographs import jpeg, photographs


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    return np.stack([phash.small_picture(jpeg(each, 95), "x") for each in photographs(300, side=128)])


def drawing(mouth: tuple[int, int], background: str = "white") -> np.ndarray:
    image = Image.new("L", (64, 64), background)
    draw = ImageDraw.Draw(image)
    draw.ellipse((8, 8, 56, 56), fill=180, outline=0)
    draw.ellipse((20, 22, 26, 28), fill=0)
    draw.ellipse((38, 22, 44, 28), fill=0)
    draw.arc((22, 30, 42, 46), *mouth, fill=60, width=2)
    return np.asarray(image)


def test_all_thresholds_are_told():
    named = ("LEAST_", "MOST_", "RELIABLE", "CLEAR_", "FAINT_")
    values = {name: round(value, 3) for name, value in vars(phash).items() if name.startswith(named)}
    assert sorted(values.values()) == sorted(phash.THRESHOLDS.values()), values


def test_coefficients_are_those_of_the_textbook(pictures):
    half = pictures[0].reshape(32, 2, 32, 2).mean((1, 3))
    whole = cv2.dct(half)
    found = phash.coefficients(pictures[:1])[0]
    order = sorted((u + v, max(u, v), u, v) for u in range(32) for v in range(32))[1:65]
    np.testing.assert_allclose(found, [whole[u, v] for *_, u, v in order], atol=0.01)


def test_a_mirror_flips_signs_and_nothing_else(pictures):
    ours = phash.mirrored_coefficients(phash.coefficients(pictures))
    np.testing.assert_allclose(ours, phash.coefficients(phash.mirrored(pictures)), atol=0.01)


def test_probes_are_all_mixes_of_the_weakest_bits(pictures):
    found = phash.coefficients(pictures[:1])
    keys = phash.probes(found)[0]
    for band in range(4):
        own = int(phash.bands(phash.hashes(found))[0, band])
        weakest = np.argsort(np.abs(found[0, 16 * band : 16 * band + 16]))[:5]
        mixes = [own ^ sum(1 << int(bit) for bit in chosen) for n in range(6) for chosen in combinations(weakest, n)]
        assert sorted(keys[band].tolist()) == sorted(mixes)


def test_a_shrunk_decode_gives_the_same_reliable_bits():
    for image in photographs(20, side=640):
        data = jpeg(image, 80)
        whole = cv2.cvtColor(decode(data, "x"), cv2.COLOR_RGB2GRAY)
        whole = phash.coefficients(cv2.resize(whole, (64, 64), interpolation=cv2.INTER_AREA)[None])
        shrunk = phash.coefficients(phash.small_picture(data, "x")[None])
        differ = (phash.hashes(whole) ^ phash.hashes(shrunk)) & phash.reliable_bits(whole)
        assert np.bitwise_count(differ)[0] == 0


def test_copies_are_alike_and_others_are_not(pictures):
    for image, other in zip(photographs(15, side=256), photographs(15, side=256, seed=1), strict=True):
        picture = phash.small_picture(jpeg(image, 95), "x")
        again = phash.compare(picture, phash.small_picture(jpeg(image, 30), "x"))
        assert again is not None
        assert again.moved == 0
        cut = phash.compare(picture, phash.small_picture(jpeg(image[6:, 9:], 90), "x"))
        assert cut is not None
        assert phash.compare(picture, phash.small_picture(jpeg(other, 95), "x")) is None


def test_drawings_from_one_template_are_no_copies():
    smile, frown = drawing((10, 170)), drawing((190, 350))
    assert phash.compare(smile, smile) is not None
    assert phash.compare(smile, frown) is None
    correlation = np.corrcoef(smile.ravel(), frown.ravel())[0, 1]
    assert correlation > phash.LEAST_WHOLE  # else this test would show nothing


def test_blank_pictures_are_never_alike():
    rng = np.random.default_rng(0)
    slope = np.linspace(-9, 9, 64)
    plain = [np.full((64, 64), 128), np.zeros((64, 64)), 128 + np.tile(slope, (64, 1)), 128 + np.tile(slope, (64, 1)).T]
    noisy = [(each + rng.normal(0, 1, (64, 64))).clip(0, 255).astype(np.uint8) for each in plain for _ in range(2)]
    assert phash.blank(np.stack(noisy)).all()
    assert not any(phash.compare(one, other) for one, other in combinations(noisy, 2))


def test_plain_skies_are_copies_only_if_their_levels_agree():
    """Gradients correlate with each other; a re-encoded one has the same levels."""
    down = np.tile(np.linspace(90, 220, 64)[:, None], (1, 64))
    across = np.linspace(-1, 1, 64)
    skies = [down, down * 0.9, down + 6, down - 12 * across**2, np.linspace(60, 250, 64)[:, None].repeat(64, 1)]
    assert np.corrcoef(np.stack([sky.ravel() for sky in skies])).min() > phash.LEAST_WHOLE
    rng = np.random.default_rng(0)
    noisy = [[(sky + rng.normal(0, 0.6, (64, 64))).clip(0, 255).astype(np.uint8) for _ in range(2)] for sky in skies]
    assert not phash.blank(np.concatenate(noisy)).any()
    for (i, one), (j, other) in combinations([(i, each) for i, pair in enumerate(noisy) for each in pair], 2):
        assert (phash.compare(one, other) is not None) == (i == j)


def index_of(pictures: np.ndarray, folder) -> HashIndex:
    where = np.stack([np.arange(len(pictures)) % 3, np.zeros(len(pictures)), np.arange(len(pictures))], 1)
    sha256 = np.random.default_rng(0).integers(0, 256, (len(pictures), 32), np.uint8)
    half = len(pictures) // 2
    parts = [TestImages(where[s].astype(np.int32), sha256[s], pictures[s]) for s in (slice(half), slice(half, None))]
    write_index(folder, parts, len(pictures), [{"images": len(pictures)}])
    return HashIndex(folder)


def test_candidates_are_those_of_brute_force(pictures, tmp_path):
    index = index_of(pictures[:200], tmp_path / "index")
    assert about(tmp_path / "index") == [{"images": 200}]
    rng = np.random.default_rng(2)
    asked = (pictures[:200].astype(float) + rng.normal(0, 6, (200, 64, 64))).clip(0, 255).astype(np.uint8)
    found = set(zip(*index.candidates(phash.coefficients(asked), phash.thumbs(asked)), strict=True))
    mine, theirs = phash.coefficients(asked), phash.coefficients(pictures[:200])
    keys, listed = phash.probes(mine), phash.bands(phash.hashes(theirs))
    expected = set()
    for i in range(200):
        reliable = np.abs(mine[i]) >= phash.RELIABLE
        different = ((mine[i] > 0) != (theirs > 0)) & reliable
        close = different.sum(1) <= phash.MOST_DIFFERENT * reliable.sum()
        share = [any(listed[j, band] in keys[i, band] for band in range(4)) for j in range(200)]
        likely = phash.explained(phash.thumbs(asked[i : i + 1])[0], phash.thumbs(pictures[:200]))
        expected |= {(i, j) for j in range(200) if close[j] and share[j] and likely[j] >= phash.LEAST_EXPLAINED}
    assert found == expected
    assert {(i, i) for i in range(200)} <= found


def test_many_look_alikes_are_searched_in_pieces_with_the_same_result(pictures, tmp_path, monkeypatch):
    index = index_of(pictures, tmp_path / "index")
    asked = phash.coefficients(pictures[:64]), phash.thumbs(pictures[:64])
    at_once = index.candidates(*asked)
    monkeypatch.setattr("shards.hashindex.MOST_CANDIDATES", 100)
    for one, other in zip(at_once, index.candidates(*asked), strict=True):
        np.testing.assert_array_equal(one, other)


def test_at_most_a_few_of_a_test_set_are_compared(pictures, tmp_path):
    index = index_of(np.repeat(pictures[:1], 90, axis=0), tmp_path / "index")
    owners, rows = index.candidates(phash.coefficients(pictures[:1]), phash.thumbs(pictures[:1]))
    assert len(owners) == 3 * 8
    assert np.bincount(index.where[rows, 0]).tolist() == [8, 8, 8]


def test_an_index_of_nothing_with_detail_finds_nothing(pictures, tmp_path):
    index = index_of(np.full((5, 64, 64), 99, np.uint8), tmp_path / "index")
    assert index.near(pictures[:3]) == ([[], [], []], 0)
    assert index.near(np.full((2, 64, 64), 99, np.uint8)) == ([[], []], 2)


def test_bytes_are_found_by_all_of_their_hash(pictures, tmp_path):
    index = index_of(pictures[:50], tmp_path / "index")
    sha256 = np.random.default_rng(0).integers(0, 256, (50, 32), np.uint8)
    assert [list(index.exact(row.tobytes()).values()) for row in sha256] == [[i] for i in range(50)]
    other = sha256[7].copy()
    other[31] ^= 1  # the same first 8 bytes
    assert index.exact(other.tobytes()) == {}


def test_images_of_one_test_set_with_the_same_bytes_are_listed_once(pictures, tmp_path):
    tests = np.array([0, 0, 0, 1, 1, 0])  # the first five have the same bytes
    sha256 = np.random.default_rng(0).integers(0, 256, (2, 32), np.uint8)[[0, 0, 0, 0, 0, 1]]
    where = np.stack([tests, np.zeros(6), np.arange(6)], 1).astype(np.int32)
    shown = pictures[[0, 0, 0, 0, 0, 1]]
    write_index(tmp_path / "index", [TestImages(where, sha256, shown)], 6, [{}, {}])
    index = HashIndex(tmp_path / "index")
    assert index.exact(sha256[0].tobytes()) == {0: 0, 1: 3}
    _, rows = index.candidates(phash.coefficients(pictures[:1]), phash.thumbs(pictures[:1]))
    assert sorted(rows.tolist()) == [0, 3]
    asked = np.repeat(pictures[:1], 3, axis=0)
    found, _ = index.near(asked, [{}, {0: None}, {0: None, 1: None}])
    assert [[match.row for match in each] for each in found] == [[0, 3], [3], []]


def test_exif_orientation_is_honoured():
    image = Image.fromarray(photographs(1, side=128)[0])
    upright, turned = io.BytesIO(), io.BytesIO()
    image.save(upright, "JPEG", quality=95)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    image.transpose(Image.ROTATE_90).save(turned, "JPEG", quality=95, exif=exif)
    pair = [phash.small_picture(each.getvalue(), "x") for each in (upright, turned)]
    assert phash.compare(*pair) is not None
