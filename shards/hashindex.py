"""The test images that training images are looked up in: arrays in a folder, mapped into memory and shared by workers.

In memory about 340 bytes a test image: hash, thumbnail, four places in the lists of the bands, its SHA-256 and where it
comes from. The small pictures of the confirming comparison, 4 kB each, stay on disk and are read one by one.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from shards import phash
from shards.atomic import commit_folder, partial_folder

BUCKETS = 1 << (phash.BITS // phash.BANDS)
CHUNK = 4096  # images at a time while the index is made
MOST_CANDIDATES = 1_000_000  # looked at in one go, 300 MB at most
MOST_COMPARED = 8  # test images of one set whose pictures are compared with one training image, the likeliest first


class TestImages(NamedTuple):
    """Some images of a test set, in the order of their shard.

    Attributes:
        where: int32 [n, 3], test set, shard and index in the shard.
        sha256: uint8 [n, 32].
        pictures: uint8 [n, 64, 64], zeros if an image cannot be decoded.
    """

    where: np.ndarray
    sha256: np.ndarray
    pictures: np.ndarray


TestImages.__test__ = False  # type: ignore[attr-defined]  # not for pytest


class Found(NamedTuple):
    """A test image that a training image resembles: ``row`` in the index, ``likeness`` None if the bytes are equal."""

    row: int
    mirrored: bool
    likeness: phash.Likeness | None


def write_index(folder: Path, parts: Iterable[TestImages], images: int, about: list[dict]) -> None:
    """Write the index of ``images`` test images, whole or not at all.

    Blank images, and those that cannot be decoded, are listed under their SHA-256 alone; of images of one test set with
    the same bytes, the first is listed. What is to be said ``about`` the test sets is kept beside, as it is once all
    ``parts`` are taken.
    """
    partial = partial_folder(folder)
    blank = np.empty(images, bool)
    at = 0
    # Written in order, not mapped: on a full disk a write is an error, a mapped page is the end of the process.
    with ExitStack() as files:

        def column(name: str, dtype: type, *shape: int) -> BinaryIO:
            return files.enter_context(_array_file(partial / f"{name}.npy", dtype, (images, *shape)))

        wheres, digests = column("where", np.int32, 3), column("sha256", np.uint8, 32)
        hashes, thumbs = column("hashes", np.uint64), column("thumbs", np.uint8, phash.THUMB**2)
        all_pictures = files.enter_context(open(partial / "pictures", "wb"))
        for part in parts:
            for start in range(0, len(part.where), CHUNK):
                where, sha256, pictures = (each[start : start + CHUNK] for each in part)
                wheres.write(where.astype(np.int32).tobytes())
                digests.write(sha256.tobytes())
                thumbs.write(phash.thumbs(pictures).tobytes())
                hashes.write(phash.hashes(phash.coefficients(pictures)).astype(np.uint64).tobytes())
                all_pictures.write(pictures.tobytes())
                blank[at : at + len(where)] = phash.blank(pictures)
                at += len(where)
    words = np.ascontiguousarray(_load(partial, "sha256")).view("<u8")
    listed = _distinct(words, _load(partial, "where")[:, 0])
    _save(partial / "sha256_order.npy", listed.astype(np.int32))
    _save(partial / "sha256_sorted.npy", words[listed, 0])
    found = np.zeros(images, bool)
    found[listed] = True
    shown = np.flatnonzero(found & ~blank).astype(np.int32)
    keys = phash.bands(_load(partial, "hashes")[shown])
    for band in range(phash.BANDS):
        _save(partial / f"members{band}.npy", shown[np.argsort(keys[:, band], kind="stable")])
        counts = np.bincount(keys[:, band], minlength=BUCKETS)
        _save(partial / f"starts{band}.npy", np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))
    (partial / "about.json").write_text(json.dumps(about), encoding="utf-8")
    for path in partial.iterdir():
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    commit_folder(partial, folder)


def about(folder: Path) -> list[dict]:
    """Return what ``write_index`` was told about the test sets."""
    return json.loads((folder / "about.json").read_text(encoding="utf-8"))


class HashIndex:
    """An index that ``write_index`` wrote; safe to open in many processes, which share its memory.

    Attributes:
        where: int32 [images, 3], test set, shard and index of each test image.
        tests: Number of test sets that have images.
    """

    def __init__(self, folder: Path):
        self.where = _load(folder, "where")
        self.tests = len(np.unique(self.where[:, 0]))
        self._sha256, self._hashes, self._thumbs = (_load(folder, name) for name in ("sha256", "hashes", "thumbs"))
        self._starts = [_load(folder, f"starts{band}") for band in range(phash.BANDS)]
        self._members = [_load(folder, f"members{band}") for band in range(phash.BANDS)]
        self._order, self._sorted = _load(folder, "sha256_order"), _load(folder, "sha256_sorted")
        self._pictures = os.open(folder / "pictures", os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "_pictures"):
            os.close(self._pictures)

    def __len__(self) -> int:
        return len(self.where)

    def picture(self, row: int) -> np.ndarray:
        """Return the small picture of a test image, uint8 [64, 64]."""
        data = os.pread(self._pictures, phash.SIDE**2, row * phash.SIDE**2)
        return np.frombuffer(data, np.uint8).reshape(phash.SIDE, phash.SIDE)

    def exact(self, sha256: bytes) -> dict[int, int]:
        """Return the row of the first image with these very bytes in each test set that has one, by test set."""
        wanted = np.frombuffer(sha256, np.uint8)
        prefix = wanted.view("<u8")[0]
        rows = self._order[np.searchsorted(self._sorted, prefix) : np.searchsorted(self._sorted, prefix, "right")]
        rows = rows[(self._sha256[rows] == wanted).all(1)]
        return dict(zip(self.where[rows, 0].tolist(), rows.tolist(), strict=True))

    def near(self, pictures: np.ndarray, known: Sequence[Iterable[int]] = ()) -> tuple[list[list[Found]], int]:
        """Find the test images that training images are copies of, as they are or mirrored.

        Args:
            pictures: uint8 [n, 64, 64] of the training images.
            known: Test sets that each is known to be in, which are passed over.

        Returns:
            For each training image at most one test image of each test set, the first found of the likeliest; and how
            many training images are blank.
        """
        passed = [set(tests) for tests in known] or [set() for _ in pictures]
        found: list[dict[int, Found]] = [{} for _ in pictures]
        blank = phash.blank(pictures)
        shown = np.flatnonzero(~blank & [len(tests) < self.tests for tests in passed])
        upright = pictures[shown]
        upright_coefficients = phash.coefficients(upright)
        for mirror in (False, True):
            seen = phash.mirrored(upright) if mirror else upright
            each = phash.mirrored_coefficients(upright_coefficients) if mirror else upright_coefficients
            owners, rows = self.candidates(each, phash.thumbs(seen))
            for owner, row in zip(owners.tolist(), rows.tolist(), strict=True):
                mine, test = found[shown[owner]], int(self.where[row, 0])
                if test in mine or test in known[shown[owner]]:
                    continue
                likeness = phash.compare(self.picture(row), seen[owner])
                if likeness:
                    mine[test] = Found(row, mirror, likeness)
        return [[mine[test] for test in sorted(mine)] for mine in found], int(blank.sum())

    def candidates(self, coefficients: np.ndarray, thumbs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Find which test images to compare training images with, by hash and thumbnail.

        Args:
            coefficients: float32 [n, 64] of the training images.
            thumbs: uint8 [n, 256] of the same.

        Returns:
            Place of the training image and row of the test image, each int [pairs]: by training image, then the
            likeliest first, at most ``MOST_COMPARED`` of each test set.
        """
        if not len(coefficients):
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        keys = phash.probes(coefficients)
        spans = [(starts[keys[:, band]], starts[keys[:, band].astype(np.int32) + 1])
                 for band, starts in enumerate(self._starts)]  # fmt: skip
        total = sum(int((stop - start).sum(dtype=np.int64)) for start, stop in spans)
        if total > MOST_CANDIDATES and len(coefficients) > 1:  # a test set of many look-alikes
            half = len(coefficients) // 2
            first, second = (self.candidates(coefficients[s], thumbs[s]) for s in (slice(half), slice(half, None)))
            return np.concatenate([first[0], second[0] + half]), np.concatenate([first[1], second[1]])
        owners, rows = self._members_of(spans)
        hashes, masks = phash.hashes(coefficients), phash.reliable_bits(coefficients)
        different = np.bitwise_count((self._hashes[rows] ^ hashes[owners]) & masks[owners])
        close = different <= phash.MOST_DIFFERENT * np.bitwise_count(masks)[owners]
        pairs = np.unique(owners[close] * len(self) + rows[close])  # a pair may share several bands
        return self._likeliest(pairs // len(self), pairs % len(self), thumbs)

    def _members_of(self, spans: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
        """List what lies in the buckets [start, stop) of each band, with whose buckets they are."""
        owners, rows = [], []
        for (start, stop), members in zip(spans, self._members, strict=True):
            counts = (stop - start).ravel()
            ends = np.cumsum(counts, dtype=np.int64)
            places = np.arange(ends[-1]) + np.repeat(start.ravel() - (ends - counts), counts)
            rows.append(members[places])
            owners.append(np.repeat(np.arange(len(start)), (stop - start).sum(1)))
        return np.concatenate(owners), np.concatenate(rows).astype(np.int64)

    def _likeliest(self, owners: np.ndarray, rows: np.ndarray, thumbs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        kept_owners, kept_rows = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for owner, start, count in zip(*np.unique(owners, return_index=True, return_counts=True), strict=True):
            mine = rows[start : start + count]
            likely = phash.explained(thumbs[owner], self._thumbs[mine])
            order = np.argsort(-likely, kind="stable")
            mine, tests = mine[order], self.where[mine[order], 0]
            rank = np.empty(len(mine), np.int64)  # among those of the same test set
            for test in np.unique(tests):
                rank[tests == test] = np.arange((tests == test).sum())
            mine = mine[(likely[order] >= phash.LEAST_EXPLAINED) & (rank < MOST_COMPARED)]
            kept_owners.append(np.full(len(mine), owner))
            kept_rows.append(mine)
        return np.concatenate(kept_owners), np.concatenate(kept_rows)


def _distinct(words: np.ndarray, tests: np.ndarray) -> np.ndarray:
    """Return the first row of each SHA-256 (uint64 [n, 4]) in each test set, sorted by the first 8 bytes."""
    order = np.lexsort((tests, words[:, 3], words[:, 2], words[:, 1], words[:, 0]))  # stable: rows stay in order
    first = np.ones(len(order), bool)
    first[1:] = (words[order[1:]] != words[order[:-1]]).any(1) | (tests[order[1:]] != tests[order[:-1]])
    return order[first]


@contextmanager
def _array_file(path: Path, dtype: type | np.dtype, shape: tuple[int, ...]) -> Iterator[BinaryIO]:
    """Open a ``.npy`` file to write the values of an array to."""
    described = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, described)
        yield file


def _save(path: Path, array: np.ndarray) -> None:
    """Write an array; ``np.save`` does not say why it could not."""
    with _array_file(path, array.dtype, array.shape) as file:
        file.write(array.tobytes())


def _load(folder: Path, name: str) -> np.ndarray:
    """Map an array into memory."""
    path = folder / f"{name}.npy"
    # an empty file cannot be mapped; np.asarray: plain arrays index faster than np.memmap
    return np.load(path) if path.stat().st_size <= 128 else np.asarray(np.load(path, mmap_mode="r"))
