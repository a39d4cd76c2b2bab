"""A perceptual hash of images, and the comparison that confirms what it finds: arrays in, arrays out.

Everything is made from one small picture, the image in grey shrunk to 64 x 64 whatever its shape. The hash holds the
signs of its 64 lowest DCT frequencies (after Zauner, "Implementation and benchmarking of perceptual image hash
functions", 2010; signs instead of a comparison with the median, so that mirroring an image flips known bits). A small
coefficient has a sign by chance, so it counts as unreliable in comparisons and is what the search varies first.
docs/dedupe.md has the measurements behind the constants.
"""

from typing import NamedTuple

import cv2
import numpy as np

from shards.decode import decode

SIDE = 64  # pixels of the small picture
THUMB = 16  # pixels of the thumbnail kept in memory for every test image
BITS, BANDS = 64, 4
WEAK = 5  # bits varied in each band: 2**5 probes
RELIABLE = 4.0  # a DCT coefficient below it may change its sign when re-encoded at quality 30 (noise: 1 to 1.6)
MOST_DIFFERENT = 1 / 3  # of the reliable bits
LEAST_EXPLAINED = 0.8  # by the thumbnail, moved and scaled a little

# The verdict. Correlations of the small pictures as they are and of their middle frequencies ("detail"), which all
# gradients and blobs lack. Where detail is faint, in grey levels, noise drowns some of it, but the rest must agree the
# better. Where there is none, as in a plain sky, the grey levels themselves must agree; a blank image gets no verdict.
LEAST_WHOLE, LEAST_DETAIL = 0.92, 0.93
LEAST_FAINT_WHOLE, LEAST_FAINT_DETAIL = 0.99, 0.9
LEAST_CONTRAST = 8.0  # grey levels, standard deviation
MOST_DIFFERENCE = 1.5  # grey levels, root of the mean square: encoders make 0.4 to 1.2
CLEAR_LEVELS, FAINT_LEVELS = 2.0, 1.0
MOST_MISMATCH = 0.5  # of detail, anywhere: drawings from one template differ in one place alone, copies differ evenly
MOST_MOVED = 0.1  # of the side: how far a corner may lie from where it belongs, for copies that were cropped
LEAST_COMMON = 0.7  # of the area
_NOISE_LEVELS = 6.0  # of detail: what a mismatch is measured against where there is little
_MARGIN = np.ones((7, 7), np.uint8)  # around the common area, where detail is not its own

THRESHOLDS = {
    "reliable coefficient, at least": RELIABLE,
    "reliable bits that differ, at most": round(MOST_DIFFERENT, 3),
    "thumbnail explained, at least": LEAST_EXPLAINED,
    "correlation of the pictures, at least": LEAST_WHOLE,
    "correlation of their detail, at least": LEAST_DETAIL,
    "of the pictures, where detail is faint": LEAST_FAINT_WHOLE,
    "of their detail, where it is faint": LEAST_FAINT_DETAIL,
    "detail is faint below (grey levels)": CLEAR_LEVELS,
    "detail is missing below (grey levels)": FAINT_LEVELS,
    "difference where detail is missing, at most (grey levels)": MOST_DIFFERENCE,
    "blank below a contrast of (grey levels)": LEAST_CONTRAST,
    "mismatch of detail in one place, at most": MOST_MISMATCH,
    "corner moved, at most (of the side)": MOST_MOVED,
    "area in common once moved, at least": LEAST_COMMON,
}

_HALF = SIDE // 2
_ZIGZAG = sorted((u + v, max(u, v), u, v) for u in range(_HALF) for v in range(_HALF))[1 : BITS + 1]
_ROWS, _COLUMNS = np.array([(u, v) for *_, u, v in _ZIGZAG]).T
_WAVES = np.cos(np.pi * (2 * np.arange(_HALF) + 1) * np.arange(_HALF)[:, None] / (2 * _HALF)) * np.sqrt(2 / _HALF)
_WAVES[0] /= np.sqrt(2)
_WAVES = _WAVES.astype(np.float32)
_MIRROR = np.where(_COLUMNS % 2, -1, 1).astype(np.float32)  # odd waves turn their sign when read from the right
_WIDTH = BITS // BANDS
_CORNERS = np.array([[0, 0, 1], [SIDE - 1, 0, 1], [0, SIDE - 1, 1], [SIDE - 1, SIDE - 1, 1]], np.float32)
_AT = np.linspace(-1, 1, SIDE)
_SURFACES = np.stack([np.outer(_AT**i, _AT**j).ravel() for i in range(3) for j in range(3 - i)], -1)
_SURFACES = np.linalg.qr(_SURFACES)[0].astype(np.float32)  # planes and parabolas
_STEPS = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 40, 1e-4)


class Likeness(NamedTuple):
    """How alike two small pictures are.

    Attributes:
        whole: Their correlation, in [-1, 1].
        detail: The correlation of their middle frequencies.
        mismatch: Share of the detail that differs where they differ most, 0 to about 2.
        moved: How far a corner lies from where it belongs, of the side.
    """

    whole: float
    detail: float
    mismatch: float
    moved: float


def small_picture(data: bytes, key: str) -> np.ndarray:
    """Decode an image to its small picture, uint8 [64, 64].

    Raises:
        DecodeError: The image is damaged.
    """
    grey = cv2.cvtColor(decode(data, key, short=SIDE), cv2.COLOR_RGB2GRAY)
    return cv2.resize(grey, (SIDE, SIDE), interpolation=cv2.INTER_AREA)


def mirrored(pictures: np.ndarray) -> np.ndarray:
    """Return small pictures [n, 64, 64] seen in a mirror."""
    return np.ascontiguousarray(pictures[:, :, ::-1])


def coefficients(pictures: np.ndarray) -> np.ndarray:
    """Return the lowest DCT coefficients, without the mean: float32 [n, 64] of uint8 [n, 64, 64]."""
    half = pictures.reshape(-1, _HALF, 2, _HALF, 2).mean((2, 4), dtype=np.float32)
    return (_WAVES @ half @ _WAVES.T)[:, _ROWS, _COLUMNS]


def mirrored_coefficients(coefficients: np.ndarray) -> np.ndarray:
    """Return the coefficients [n, 64] of the mirrored pictures."""
    return coefficients * _MIRROR


def hashes(coefficients: np.ndarray) -> np.ndarray:
    """Return the hashes, uint64 [n]."""
    return _pack(coefficients > 0)


def reliable_bits(coefficients: np.ndarray) -> np.ndarray:
    """Return masks of the bits that a re-encoded copy will share, uint64 [n]."""
    return _pack(np.abs(coefficients) >= RELIABLE)


def _pack(bits: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.packbits(bits, axis=1, bitorder="little")).view("<u8")[:, 0]


def bands(hashes: np.ndarray) -> np.ndarray:
    """Cut hashes [n] into the keys under which the index lists them, uint16 [n, 4]."""
    return hashes.astype("<u8").view("<u2").reshape(-1, BANDS)


def probes(coefficients: np.ndarray) -> np.ndarray:
    """Return the keys to look under, uint16 [n, 4, 32]: the bands with every mix of their weakest bits."""
    weak = np.abs(coefficients).reshape(-1, BANDS, _WIDTH).argpartition(WEAK, axis=2)[:, :, :WEAK]
    keys = bands(hashes(coefficients))[:, :, None]
    for bit in range(WEAK):
        flip = np.uint16(1) << weak[:, :, bit : bit + 1].astype(np.uint16)
        keys = np.concatenate([keys, keys ^ flip], axis=2)
    return keys


def thumbs(pictures: np.ndarray) -> np.ndarray:
    """Shrink small pictures [n, 64, 64] to thumbnails, uint8 [n, 256]."""
    step = SIDE // THUMB
    means = pictures.reshape(-1, THUMB, step, THUMB, step).mean((2, 4), dtype=np.float32)
    return np.rint(means).astype(np.uint8).reshape(-1, THUMB * THUMB)


def explained(thumb: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Tell how well a thumbnail explains others if it may be moved and scaled a little, and its contrast changed.

    To first order such a change adds multiples of the slopes to an image, so this is a linear regression.

    Args:
        thumb: uint8 [256].
        others: uint8 [n, 256].

    Returns:
        float32 [n], multiple correlations in [0, 1].
    """
    image = thumb.reshape(THUMB, THUMB).astype(np.float32)
    down, right = np.gradient(image)
    at = np.linspace(-1, 1, THUMB, dtype=np.float32)
    parts = np.stack([np.ones_like(image), image, right, down, at * right, at[:, None] * down], -1)
    basis = np.linalg.qr(parts.reshape(-1, 6) / (np.linalg.norm(parts.reshape(-1, 6), axis=0) + 1e-6))[0]
    centred = others - others.mean(1, keepdims=True, dtype=np.float32)
    length = np.linalg.norm(centred, axis=1)
    return np.linalg.norm(centred @ basis, axis=1) / np.maximum(length, 1e-6)


def blank(pictures: np.ndarray) -> np.ndarray:
    """Tell which small pictures [n, 64, 64] have too little on them for any verdict, bool [n]."""
    flat = pictures.reshape(len(pictures), -1).std(1, dtype=np.float32) < LEAST_CONTRAST
    for i in np.flatnonzero(flat):
        flat[i] = _detail(pictures[i].astype(np.float32)).std() < FAINT_LEVELS
    return flat


def compare(one: np.ndarray, other: np.ndarray) -> Likeness | None:
    """Compare two small pictures, uint8 [64, 64], as they lie and, failing that, aligned; None if unlike."""
    one, other = one.astype(np.float32), other.astype(np.float32)
    everywhere = np.ones((SIDE, SIDE), bool)
    return _verdict(one, other, everywhere, 0.0) or _compare_aligned(one, other)


def _compare_aligned(one: np.ndarray, other: np.ndarray) -> Likeness | None:
    """Undo a small crop: find the affine map that fits best, from where the pictures lie now."""
    move = np.eye(2, 3, dtype=np.float32)
    try:
        cv2.findTransformECC(one, other, move, cv2.MOTION_AFFINE, _STEPS, None, 5)  # type: ignore[call-overload]
    except cv2.error:  # nothing fits
        return None
    moved = float(np.abs(_CORNERS @ move.T - _CORNERS[:, :2]).max() / SIDE)
    how = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    common = cv2.warpAffine(np.ones_like(other), move, (SIDE, SIDE), flags=how) > 0.99
    if moved > MOST_MOVED or common.mean() < LEAST_COMMON:
        return None
    other = cv2.warpAffine(other, move, (SIDE, SIDE), flags=how, borderMode=cv2.BORDER_REPLICATE)
    common = cv2.erode(common.astype(np.uint8), _MARGIN, borderValue=1) > 0
    return _verdict(one, other, common, moved)


def _verdict(one: np.ndarray, other: np.ndarray, where: np.ndarray, moved: float) -> Likeness | None:
    whole = _correlation(one[where], other[where])
    if whole < LEAST_WHOLE:
        return None
    pictures = one, other
    one, other = _detail(one) * where, _detail(other) * where
    levels = min(one[where].std(), other[where].std())
    if levels < FAINT_LEVELS:
        return _verdict_on_levels(*pictures, whole) if moved == 0 else None
    detail = _correlation(one[where], other[where])
    clear = levels >= CLEAR_LEVELS
    least = (LEAST_WHOLE, LEAST_DETAIL) if clear else (LEAST_FAINT_WHOLE, LEAST_FAINT_DETAIL)
    if whole < least[0] or detail < least[1]:
        return None
    mismatch = _mismatch(one, other)
    return Likeness(whole, detail, mismatch, moved) if mismatch <= MOST_MISMATCH else None


def _verdict_on_levels(one: np.ndarray, other: np.ndarray, whole: float) -> Likeness | None:
    difference = np.sqrt(((one - other) ** 2).mean())
    alike = min(one.std(), other.std()) >= LEAST_CONTRAST and difference <= MOST_DIFFERENCE
    return Likeness(whole, 0.0, 0.0, 0.0) if alike else None


def _mismatch(one: np.ndarray, other: np.ndarray) -> float:
    """Return the share of detail that differs, at the place where it is greatest; contrast may differ everywhere."""
    other = other * ((one * other).sum() / (other * other).sum())
    around = [cv2.GaussianBlur(squares, (0, 0), 3) for squares in ((one - other) ** 2, one**2 + other**2)]
    return float((around[0] / (around[1] + _NOISE_LEVELS**2)).max())


def _detail(picture: np.ndarray) -> np.ndarray:
    """Keep the middle frequencies: not the noise of encoders, not the gradients that all skies share.

    The smooth surface goes first: blurred at the border, where pixels are mirrored, it would leave a frame of its own.
    """
    picture = picture - (_SURFACES @ (_SURFACES.T @ picture.ravel())).reshape(SIDE, SIDE)
    return cv2.GaussianBlur(picture, (0, 0), 1) - cv2.GaussianBlur(picture, (0, 0), 6)


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    one, other = one - one.mean(), other - other.mean()
    return float((one * other).sum() / max(np.sqrt((one * one).sum() * (other * other).sum()), 1e-6))
