"""CIFAR-10 and CIFAR-100, in their python or binary form, as the official archive or the folder in it."""

import io
import json
import pickle
import struct
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import pyarrow as pa
from PIL import Image

from shards.errors import UserError
from shards.objects import Entry
from shards.sources import Item, Source, place
from shards.sources.unpack import harmless, look, unpack
from shards.store import open_store

SIDE = 32  # pixels
PIXELS = 3 * SIDE * SIDE  # bytes of an image: all red, all green, all blue


class _Form(NamedTuple):
    """The files of one of the four forms."""

    meta: str
    train: list[str]
    test: str
    head: int  # bytes before the pixels of an image, in the binary form: the last is the label
    labels: str = ""  # key of the labels, in the python form
    names: str = ""  # key of the names, in the python form


FORMS = [
    _Form("batches.meta", [f"data_batch_{n}" for n in range(1, 6)], "test_batch", 0, "labels", "label_names"),
    _Form("batches.meta.txt", [f"data_batch_{n}.bin" for n in range(1, 6)], "test_batch.bin", 1),
    _Form("meta", ["train"], "test", 0, "fine_labels", "fine_label_names"),
    _Form("fine_label_names.txt", ["train.bin"], "test.bin", 2),
]
FOLDERS = ("cifar-10-batches-py", "cifar-10-batches-bin", "cifar-100-python", "cifar-100-binary")


class Cifar(Source):
    """The images of CIFAR, as PNG, in the parts train and test; of CIFAR-100 the fine labels.

    Args:
        url: The archive (``cifar-10-python.tar.gz`` ...), the folder in it, or the folder around that.
        unpacked: Where the PNGs go; None: images are listed only, with the size -1.

    Raises:
        UserError: It is not CIFAR, or a file of it is missing or damaged.
    """

    kind = "cifar"
    parts = ("train", "test")

    def __init__(self, url: str, unpacked: Path | None):
        self.url = url
        self.others: dict[str, int] = {}
        archive = url.lower().endswith((".tar.gz", ".tgz", ".tar"))
        self.root, name = place(url) if archive else (url, "")
        self._store = open_store(self.root)
        if archive:
            source = look(self._store, name)
        else:
            name, source = "cifar", self._files()
        self._file, self._changed = f"@/{harmless(name)}.bin", source.changed
        write = self._unpack_archive if archive else self._unpack_folder
        rows = unpack(unpacked, harmless(name), source, write) if unpacked else write(None)
        assert rows is not None  # it was waited for
        self._rows = rows
        self.classes = json.loads(self._rows.schema.metadata[b"classes"])

    def items(self) -> Iterator[Item]:
        """Yield the training images, then the test images, in the order of the files."""
        start, count = 0, dict.fromkeys(("train", "test"), 0)
        for size, label, part in zip(
            *(self._rows[name].to_pylist() for name in ("size", "label", "part")), strict=True
        ):
            yield Item(f"{part}/{count[part]:05d}", self._file, start, size, (label,), (), self._changed, part)
            start += max(size, 0)
            count[part] += 1

    def _files(self) -> Entry:
        """Find the files in a folder; return what tells whether they have changed."""
        inside = [folder for folder in FOLDERS if folder in self._store.folders()]
        if len(inside) > 1:
            raise UserError(f"{self.url} has several forms of CIFAR: {', '.join(inside)}; give one of them")
        self._folder = inside[0] if inside else ""
        form = self._form(self._store.list(self._folder))
        looks = [look(self._store, self._path(name)) for name in (form.meta, *form.train, form.test)]
        return Entry("", sum(each.size for each in looks), max(each.changed for each in looks))

    def _path(self, name: str) -> str:
        return f"{self._folder}/{name}" if self._folder else name

    def _unpack_folder(self, out: BinaryIO | None) -> pa.Table:
        form = self._form(self._store.list(self._folder))
        names = (form.meta, *form.train, form.test)
        return self._write(form, {name: self._store.read(self._path(name)) for name in names}, out)

    def _unpack_archive(self, out: BinaryIO | None) -> pa.Table:
        """Read the archive into memory (180 MB): its files come in any order."""
        wanted = {name for form in FORMS for name in (form.meta, *form.train, form.test)}
        files = {}
        try:
            with (
                self._store.stream(place(self.url)[1]) as stream,
                tarfile.open(fileobj=stream, mode="r|*") as archive,
            ):
                for member in archive:
                    name = member.name.rpartition("/")[2]
                    if member.isreg() and name in wanted:
                        files[name] = archive.extractfile(member).read()  # type: ignore[union-attr]
        except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
            raise UserError(f"{self.url} is damaged: {error}; get it again") from error
        return self._write(self._form(list(files)), files, out)

    def _form(self, names: list[str]) -> _Form:
        for form in FORMS:
            if form.meta in names:
                if missing := {*form.train, form.test} - set(names):
                    raise UserError(f"{self.url} lacks {', '.join(sorted(missing))}; get it again")
                return form
        raise UserError(f"{self.url} is not CIFAR: it has none of {', '.join(form.meta for form in FORMS)}")

    def _write(self, form: _Form, files: dict[str, bytes], out: BinaryIO | None) -> pa.Table:
        """Write all images as PNG, one after the other; without a file, list them."""
        if form.head:
            classes = files[form.meta].decode("ascii", "replace").split()
        else:
            classes = self._load(form.meta, files, form.names)
        rows: dict[str, list] = {"size": [], "label": [], "part": []}
        for name in (*form.train, form.test):
            labels, pixels = self._binary(form, name, files) if form.head else self._python(form, name, files)
            if len(labels) != len(pixels) or not all(type(n) is int and 0 <= n < len(classes) for n in labels):
                raise self._bad(name, "its labels do not fit its images or classes")
            part = "test" if name == form.test else "train"
            for label, image in zip(labels, pixels.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1), strict=True):
                size = _write_png(image, out) if out else -1
                for column, value in zip(rows, (size, label, part), strict=True):
                    rows[column].append(value)
        schema = pa.schema([("size", pa.int64()), ("label", pa.int32()), ("part", pa.string())])
        return pa.table(rows, schema.with_metadata({"classes": json.dumps(classes)}))

    def _binary(self, form: _Form, name: str, files: dict[str, bytes]) -> tuple[list[int], np.ndarray]:
        """Return labels and pixels, uint8 [images, 3072]."""
        rows = np.frombuffer(files[name], np.uint8)
        if not len(rows) or len(rows) % (form.head + PIXELS):
            raise self._bad(name, f"{len(rows)} bytes are no whole number of images")
        rows = rows.reshape(-1, form.head + PIXELS)
        return rows[:, form.head - 1].tolist(), rows[:, form.head :]

    def _python(self, form: _Form, name: str, files: dict[str, bytes]) -> tuple[list[int], np.ndarray]:
        """Return labels and pixels, uint8 [images, 3072]."""
        labels, data = self._load(name, files, form.labels), cast(Any, self._load(name, files, "data"))
        try:
            return labels, data.pixels()
        except (AttributeError, ValueError, TypeError, UnicodeError) as error:
            raise self._bad(name, f"its images cannot be read ({error})") from error

    def _load(self, name: str, files: dict[str, bytes], key: str) -> list:
        try:
            value = _Unpickler(io.BytesIO(files[name]), encoding="latin1").load()[key]
        except _RefusedError as error:
            raise UserError(
                f"{self.url}: {name} wants to load {error}, which CIFAR has no need of and could run any program; "
                "get the official archive"
            ) from error
        except (pickle.UnpicklingError, EOFError, LookupError, TypeError, ValueError, AttributeError, struct.error,
                OverflowError, MemoryError) as error:  # fmt: skip
            raise self._bad(name, str(error) or type(error).__name__) from error
        if key != "data" and not isinstance(value, list):
            raise self._bad(name, f"{key} is no list")
        return value

    def _bad(self, name: str, why: str) -> UserError:
        return UserError(f"{self.url}: {name} is damaged or not of CIFAR: {why}; get the official archive")


def _write_png(image: np.ndarray, out: BinaryIO) -> int:
    """Write uint8 [height, width, 3]; return how many bytes that took."""
    png = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(png, "PNG")
    return out.write(png.getbuffer())


def is_mark(path: str) -> bool:
    """Tell by the path of a file whether it is one of CIFAR's."""
    *folders, name = path.split("/")
    known = {name for form in FORMS for name in (form.meta, *form.train, form.test)}
    if name.removesuffix(".bin") in ("meta", "train", "test"):  # what others may call their files too
        return folders[-1:] in (["cifar-100-python"], ["cifar-100-binary"])
    return name in known or name in FOLDERS or folders[-1:] in ([each] for each in FOLDERS)


class _RefusedError(Exception):
    """A pickle asked for a name that it has no need of."""


class _Array:
    """What stands for a NumPy array in a pickle: only its state is kept, nothing of NumPy runs."""

    def __setstate__(self, state: tuple) -> None:
        _, self.shape, self.dtype, self.fortran, self.raw = state

    def pixels(self) -> np.ndarray:
        """Return the array, uint8 [images, 3072]."""
        if self.dtype.name not in ("u1", "uint8") or len(self.shape) != 2 or self.shape[1] != PIXELS:
            raise ValueError(f"{self.dtype.name} {self.shape} where uint8 (images, {PIXELS}) is wanted")
        raw = self.raw.encode("latin1") if isinstance(self.raw, str) else self.raw
        return np.frombuffer(raw, np.uint8).reshape(self.shape, order="F" if self.fortran else "C")


class _Dtype:
    """What stands for a NumPy dtype in a pickle."""

    def __init__(self, name: str, *_: object):
        self.name = name

    def __setstate__(self, _: tuple) -> None:
        pass


def _reconstruct(*_: object) -> _Array:
    return _Array()


def _from_buffer(raw: bytes, dtype: _Dtype, shape: tuple, order: str) -> _Array:
    array = _Array()
    array.__setstate__((1, shape, dtype, order == "F", raw))
    return array


def _encode(text: str, *_: object) -> bytes:
    """Return bytes that protocols before 3 write as text; the real function knows codecs that do more."""
    return text.encode("latin1")


class _Unpickler(pickle.Unpickler):
    """Loads lists, dicts, texts and numbers, and the stand-ins for NumPy arrays; nothing else."""

    _KNOWN = {  # noqa: RUF012
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,  # as NumPy 2 calls it
        ("_codecs", "encode"): _encode,
        ("numpy.core.numeric", "_frombuffer"): _from_buffer,
        ("numpy._core.numeric", "_frombuffer"): _from_buffer,
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Dtype,
    }

    def find_class(self, module: str, name: str) -> object:
        """Return a stand-in; called for each name that the pickle asks for."""
        try:
            return self._KNOWN[module, name]
        except KeyError:
            raise _RefusedError(f"{module}.{name}") from None
