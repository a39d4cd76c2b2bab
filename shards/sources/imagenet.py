"""ImageNet as it is given out: tars of class tars (1k training set, 21k), and the validation tar with its devkit.

Nothing is unpacked, unless it is compressed: an image is addressed by its place in the outer tar.
"""

import gzip
import io
import json
import re
import tarfile
import zlib
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shutil import copyfileobj
from typing import BinaryIO, cast

import pyarrow as pa

from shards.errors import UserError
from shards.objects import MissingError
from shards.remotefile import range_file
from shards.sources import Item, Source, clean_key, place
from shards.sources.unpack import harmless, look, unpack
from shards.store import Store, open_store
from shards.tarscan import TarSample, TarScan

TRAIN, VAL, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
CLASS_TAR = re.compile(r"n\d{8}\.tar")
_VAL_KEY = re.compile(r"(?:.*/)?ILSVRC2012_val_(\d{8})")
IMAGES = ("jpeg", "jpg", "png", "webp")
AHEAD = 16  # class tars of a remote tar that are gone through at once
PIECE = 1 << 20  # bytes of a remote tar asked for at once: about ten images with the headers between them


class ImageNet(Source):
    """The images of ImageNet-1k or 21k. Classes are WordNet ids, sorted: the order that everybody uses.

    Args:
        url: ``ILSVRC2012_img_train.tar``, ``ILSVRC2012_img_val.tar``, or a folder with either or both, which are then
            the parts train and val; for 21k a tar of class tars (``fall11_whole.tar``, ``winter21_whole.tar.gz``), or a
            folder of class tars ``n01440764.tar``.
        unpacked: Where a compressed tar is unpacked.
        devkit: ``ILSVRC2012_devkit_t12.tar.gz``, which has the labels of the validation images; by default beside them.
        real: ``real.json``, other labels of the validation images, none or several for each ("Are we done with
            ImageNet?", Beyer et al. 2020); of these alone, without the training set.

    Raises:
        UserError: It is not ImageNet, or something is missing or damaged.
    """

    kind = "imagenet"

    def __init__(self, url: str, unpacked: Path, *, devkit: str = "", real: str = ""):
        self.url = url
        self.others: dict[str, int] = {}
        self._unpacked = unpacked
        self.multi_label = bool(real)
        single = url.lower().endswith((".tar", ".tar.gz", ".tgz"))
        self.root, name = place(url) if single else (url, "")
        self._store = open_store(self.root)
        self._skipped: Counter[str] = Counter()
        self._tars: list[_ClassTar] = []
        self._val = ""
        if single:
            if is_validation(self._store, name):
                self._val = name
            else:
                self._tars = self._class_tars(name, "")
        else:
            names = self._store.list("")
            self._val = VAL if VAL in names else ""
            if TRAIN in names:
                self._tars = self._class_tars(TRAIN, "train")
            elif not self._val:
                self._tars = [self._class_tar(each) for each in names if CLASS_TAR.fullmatch(each)]
        self._val_part = "" if single else "val"
        self.parts = sorted(filter(None, {*(each.part for each in self._tars), self._val and self._val_part}))
        if real and self._tars and self._val:
            raise UserError(f"{url} has training images too, which have no ReaL labels; give {url}/{VAL} alone")
        wnids = sorted({tar.wnid for tar in self._tars})
        if len(wnids) < len(self._tars):
            raise UserError(f"{url} has two tars of one class; remove one")
        if not (self._tars or self._val):
            raise UserError(f"{url} is not ImageNet: it has no class tars such as n01440764.tar, and no {VAL}")
        self._truth: list[tuple[int, ...]] = []
        self.classes = wnids
        if self._val:
            self.classes, self._truth = self._read_devkit(devkit)
            if wnids and wnids != self.classes:
                raise UserError(
                    f"{url}: the {len(wnids)} classes of {TRAIN} are not those of the devkit; get both again"
                )
            if real:
                self._truth = _read_real(real, len(self.classes), len(self._truth))
        elif real or devkit:
            raise UserError(f"{url} has no validation images, for which real and devkit are; leave them out")

    def items(self) -> Iterator[Item]:
        """Yield the images class tar by class tar, in the order of the tar; then the validation images.

        Raises:
            UserError: A tar is damaged.
        """
        others = self._skipped.copy()
        label = {wnid: number for number, wnid in enumerate(self.classes)}
        for tar, (images, skipped) in self._scanned():
            others += skipped
            if not images:
                others["class tars without images"] += 1
            for key, offset, size in images:
                key = clean_key(f"{tar.wnid}/{key.removeprefix(f'{tar.wnid}/')}.")
                yield Item(key, tar.file, tar.start + offset, size, (label[tar.wnid],), (), tar.changed, tar.part)
        if self._val:
            images, skipped = _images(TarScan(self._store, self._val, _nothing))
            others += skipped
            changed = look(self._store, self._val).changed
            for key, offset, size in images:
                yield Item(clean_key(f"{key}."), self._val, offset, size, self._true(key), (), changed, self._val_part)
        self.others = dict(sorted(others.items()))

    def _true(self, key: str) -> tuple[int, ...]:
        """Return the labels of a validation image."""
        number = _VAL_KEY.fullmatch(key)
        if not number or not 1 <= int(number[1]) <= len(self._truth):
            raise UserError(
                f"{self.root}/{self._val} has {key!r}, for which there is no label among {len(self._truth)}; get the "
                "official tar, devkit and labels"
            )
        return self._truth[int(number[1]) - 1]

    def _scanned(self) -> Iterator[tuple["_ClassTar", "_Found"]]:
        """Yield each class tar with what is in it; remote ones are gone through ahead by threads."""
        if all(tar.store.local for tar in self._tars):
            yield from ((tar, tar.scan()) for tar in self._tars)
            return
        waiting: deque[tuple[_ClassTar, Future]] = deque()
        pool = ThreadPoolExecutor(AHEAD)
        try:
            for tar in self._tars:
                waiting.append((tar, pool.submit(tar.scan)))
                if len(waiting) > AHEAD:
                    tar, future = waiting.popleft()
                    yield tar, future.result()
            yield from ((tar, future.result()) for tar, future in waiting)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _class_tars(self, name: str, part: str) -> list["_ClassTar"]:
        """Find the class tars in a tar, by its headers alone."""
        file, store, path, changed = name, self._store, name, look(self._store, name).changed
        if not name.lower().endswith(".tar"):
            unpack(self._unpacked, harmless(name), look(store, name), self._decompress)
            file, path = f"@/{harmless(name)}.bin", f"{harmless(name)}.bin"
            store = open_store(self._unpacked.absolute())
        tars = []
        for sample in TarScan(store, path, _nothing):
            for member in sample.members:
                if member.extension == "tar":
                    wnid = sample.key.rpartition("/")[2]
                    tars.append(_ClassTar(wnid, file, store, path, member.offset, member.size, changed, part))
                else:
                    self._skipped[f".{member.extension}"] += 1
        if not tars:
            raise UserError(f"{self.url} is no tar of class tars; for a tar of images choose the kind tars")
        return tars

    def _class_tar(self, name: str) -> "_ClassTar":
        seen = look(self._store, name)
        return _ClassTar(name.removesuffix(".tar"), name, self._store, name, 0, seen.size, seen.changed, "")

    def _decompress(self, out: BinaryIO) -> pa.Table:
        try:
            with self._store.stream(place(self.url)[1]) as packed, gzip.open(packed) as stream:
                copyfileobj(stream, out, PIECE)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UserError(f"{self.url} is damaged: {error}; get it again") from error
        return pa.table({})

    def _read_devkit(self, url: str) -> tuple[list[str], list[tuple[int, ...]]]:
        """Return the classes, sorted, and the label of each validation image."""
        url = url or (f"{self.root}/{DEVKIT}" if "://" in self.root else str(Path(self.root) / DEVKIT))
        folder, name = place(url)
        try:
            with open_store(folder).stream(name) as stream, tarfile.open(fileobj=stream, mode="r:*") as archive:
                files = {
                    member.name.rpartition("/")[2]: archive.extractfile(member).read()  # type: ignore[union-attr]  # a plain file
                    for member in archive
                    if member.isreg() and member.name.endswith(("/meta.mat", "/ILSVRC2012_validation_ground_truth.txt"))
                }
            synsets = _synsets(files["meta.mat"])
            wnids = sorted(synsets.values())
            number = {id_: wnids.index(wnid) for id_, wnid in synsets.items()}
            lines = files["ILSVRC2012_validation_ground_truth.txt"].split()
            return wnids, [(number[int(line)],) for line in lines]
        except MissingError as error:
            raise UserError(
                f"no {url}, which tells the labels of the validation images; put it beside {self._val}, or say where "
                "it is with devkit"
            ) from error
        except (tarfile.TarError, EOFError, zlib.error, LookupError, ValueError) as error:
            raise UserError(f"devkit {url} is damaged or another one: {error}; get {DEVKIT} again") from error


_Found = tuple[list[tuple[str, int, int]], Counter[str]]  # key, offset and size of images; what else there is


def _images(scan: TarScan) -> _Found:
    images: list[tuple[str, int, int]] = []
    skipped: Counter[str] = Counter()
    for sample in scan:
        for member in sample.members:
            key, _, extension = f"{sample.key}.{member.extension}".rpartition(".")
            if extension in IMAGES:
                images.append((key, member.offset, member.size))
            else:
                skipped[f".{extension}"] += 1
    return images, skipped + scan.skipped


@dataclass(frozen=True)
class _ClassTar:
    """A tar inside another one, or one that stands alone; to TarScan it is a store that holds this tar alone."""

    wnid: str
    file: str  # as items have it
    store: Store
    path: str
    start: int  # of its first byte in the outer tar
    length: int
    changed: int
    part: str

    def scan(self) -> _Found:
        """Return the images, with offsets in this tar."""
        return _images(TarScan(cast(Store, self), f"{self.wnid}.tar", _nothing))

    @property
    def url(self) -> str:
        return f"{self.store.url}/{self.path}"

    def size(self, _: str) -> int:
        return self.length

    def stream(self, _: str) -> BinaryIO:
        window = range_file(self.length, partial(self.read_range, ""))
        return cast(BinaryIO, window if self.store.local else io.BufferedReader(window, PIECE))

    def read_range(self, _: str, start: int, length: int) -> bytes:
        return self.store.read_range(self.path, self.start + start, length)


def is_validation(store: Store, name: str) -> bool:
    """Tell whether a tar is that of the validation images, by its first file."""
    first = _first(store, name)
    return bool(first and _VAL_KEY.fullmatch(first.key))


def is_tar_of_tars(store: Store, name: str) -> bool:
    """Tell whether a tar holds tars, by its first file."""
    first = _first(store, name)
    return bool(first and first.members[0].extension == "tar")


def _first(store: Store, name: str) -> TarSample | None:
    return None if not name.lower().endswith(".tar") else next(iter(TarScan(store, name, _nothing)), None)


def _nothing(extension: str) -> bool:
    return False


def _synsets(meta: bytes) -> dict[int, str]:
    """Return WordNet ids by the devkit's own numbers, of the synsets that are classes: those without children."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise UserError("ImageNet's devkit needs scipy; install it: pip install 'patchmill[imagenet]'") from error
    synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
    return {int(each["ILSVRC2012_ID"]): str(each["WNID"]) for each in synsets if int(each["num_children"]) == 0}


def _read_real(url: str, classes: int, images: int) -> list[tuple[int, ...]]:
    folder, name = place(url)
    try:
        real = json.loads(open_store(folder).read(name))
        good = isinstance(real, list) and all(
            isinstance(each, list) and all(type(label) is int and 0 <= label < classes for label in each)
            for each in real
        )
    except ValueError:
        good = False
    if not good:
        raise UserError(f"real labels {url} are no list of lists of class indices below {classes}; get real.json again")
    if len(real) != images:
        raise UserError(
            f"real labels {url} are of {len(real)} images, and the devkit's of {images}; get real.json again"
        )
    return [tuple(each) for each in real]
