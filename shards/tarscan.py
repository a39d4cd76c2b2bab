"""One sequential walk through a tar: its samples, grouped as stock webdataset groups them, and where each byte lies.

Nothing is extracted: the names of members are words in memory, never paths.
"""

import hashlib
import io
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import IO, NamedTuple

from shards.errors import UserError
from shards.store import Store

BLOCK = tarfile.BLOCKSIZE
PIECE = 1 << 20  # bytes passed over at once where every byte is hashed

_NAME = re.compile(
    r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL
)  # key, extensions: up to the first dot of the last part
METADATA = re.compile(r"__[^/]*__(/|$)")  # webdataset's own members, such as __index__
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_BAD_HEADER = (tarfile.TarError, ValueError, LookupError, OverflowError, RecursionError)


class DamagedTarError(UserError):
    """A tar that is cut short or no tar from some byte on; the message names both."""


class Member(NamedTuple):
    """A plain file in a tar."""

    extension: str  # all behind the first dot of the name, in lower case: jpg, cls, seg.png
    offset: int  # of the first byte of its data in the tar
    size: int  # bytes
    header: int  # CRC-32 of the 512 bytes before the data, the last block of its header
    data: bytes | None  # where it was asked for


class TarSample(NamedTuple):
    """Consecutive members with one key, in the order of the tar; two may have one extension."""

    key: str
    members: list[Member]


class TarScan:
    """Iterate over it once, to get the ``TarSample``s of a tar.

    Members that are no plain files (links, folders, devices, sparse files), or whose name has no extension or
    starts with a dot, belong to no sample: they are counted.

    Args:
        store: Where the tar is.
        path: Its name there.
        wanted: Tells by the extension of a member whether its data are read.
        hashed: Hash the whole tar, for which all of it is read.

    Attributes:
        bytes: Size of the tar.
        skipped: How many members were left out, by kind; complete once the walk has ended.
        trailing: Bytes that are not zero, or come after such, behind the end of the archive: no reader sees them.
            Known if hashed.
        sha256: Hex digest of the tar once the walk has ended, if hashed.

    Raises:
        DamagedTarError: While walking: the tar is cut short, compressed, or no tar.
    """

    def __init__(self, store: Store, path: str, wanted: Callable[[str], bool], hashed: bool = False):
        self.name = f"{store.url}/{path}"
        self.bytes = store.size(path)
        self.skipped: Counter[str] = Counter()
        self.trailing = 0
        self.sha256 = ""
        self._store, self._path, self._wanted, self._hashed = store, path, wanted, hashed

    def __iter__(self) -> Iterator[TarSample]:
        key: str | None = None
        members: list[Member] = []
        for its_key, member in self._members():
            if its_key != key:
                if key is not None:
                    yield TarSample(key, members)
                key, members = its_key, []
            members.append(member)
        if key is not None:
            yield TarSample(key, members)

    def _members(self) -> Iterator[tuple[str, Member]]:
        with self._store.stream(self._path) as stream:
            tape = _Tape(stream, self.bytes, hashlib.sha256() if self._hashed else None, self.name)
            for header in self._headers(tape):
                where, end = header.offset_data, header.offset_data + header.size
                if header.size < 0 or (header.isreg() and end > self.bytes):
                    raise self._cut(header.offset, f"{header.name!r} there claims {header.size} bytes")
                name = header.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
                kind = _left_out(header, name)
                if kind:
                    self.skipped[kind] += 1
                    continue
                key, extension = _NAME.fullmatch(name).groups()  # type: ignore[union-attr]  # it is not left out
                extension, crc = extension.lower(), zlib.crc32(tape.block)
                data = tape.read(header.size) if self._wanted(extension) else None
                yield key, Member(extension, where, header.size, crc, data)
            if tape.hash:
                self.trailing = tape.finish()
                self.sha256 = tape.hash.hexdigest()

    def _headers(self, tape: "_Tape") -> Iterator[tarfile.TarInfo]:
        """Yield all headers. TarFile's own loop takes a damaged header for the end of the archive; this does not."""
        try:
            archive = tarfile.TarFile(fileobj=tape, encoding="utf-8")  # type: ignore[arg-type]  # it reads, tells and seeks
        except _BAD_HEADER as error:
            raise self._no_tar(error) from error
        header = archive.next()
        while header:
            yield header
            archive.members.clear()  # type: ignore[attr-defined]
            if archive.offset > self.bytes:
                raise self._cut(header.offset, f"{header.name!r} there claims {header.size} bytes")
            tape.seek(archive.offset)
            try:
                header = tarfile.TarInfo.fromtarfile(archive)
            except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # a block of zeros: the end
                return
            except _BAD_HEADER as error:
                if tape.tell() >= self.bytes:
                    raise self._cut(archive.offset, "no end of the archive") from error
                raise DamagedTarError(
                    f"{self.name} is damaged at byte {archive.offset}: {error}; get or make the tar again"
                ) from error

    def _cut(self, offset: int, what: str) -> DamagedTarError:
        return DamagedTarError(
            f"{self.name} is cut short at byte {offset}: {what}, but it ends at {self.bytes}; get or make the tar again"
        )

    def _no_tar(self, error: Exception) -> DamagedTarError:
        start = self._store.read_range(self._path, 0, min(self.bytes, 8))
        for magic, packer in COMPRESSED.items():
            if start.startswith(magic):
                return DamagedTarError(
                    f"{self.name} is compressed with {packer}, so nothing in it can be read on its own; unpack it to a "
                    "plain tar first"
                )
        return DamagedTarError(f"{self.name} is no tar from byte 0 on: {error}; get or make it again")


class _Tape:
    """A stream for ``tarfile`` that goes forward only, remembers its last block and may hash all that passes."""

    def __init__(self, stream: IO[bytes] | io.BufferedIOBase, size: int, hash: "hashlib._Hash | None", name: str):
        self._stream, self._size, self.hash, self._name = stream, size, hash, name
        self._at = 0
        self.block = b""

    def tell(self) -> int:
        return self._at

    def read(self, length: int) -> bytes:
        try:
            data = self._stream.read(max(0, min(length, self._size - self._at)))  # never more memory than there is tar
        except OSError as error:
            raise DamagedTarError(f"{self._name} cannot be read at byte {self._at}: {error.strerror}") from error
        self._at += len(data)
        if self.hash:
            self.hash.update(data)
        if length == BLOCK:
            self.block = data
        return data

    def seek(self, offset: int) -> None:
        if self.hash is None:
            self._at = self._stream.seek(offset)
            return
        while self._at < offset and self.read(min(PIECE, offset - self._at)):
            pass

    def finish(self) -> int:
        """Read to the end; return how many bytes are left from the first that is not zero on."""
        trailing = 0
        while data := self.read(PIECE):
            trailing += len(data) if trailing else len(data.lstrip(b"\0"))
        return trailing


def _left_out(header: tarfile.TarInfo, name: str) -> str | None:
    """Say of what kind a member is that belongs to no sample."""
    if header.issym() or header.islnk():
        return "links"
    if header.isdir():
        return "folders"
    if not header.isreg():
        return "devices"
    if header.issparse():
        return "sparse files"
    if METADATA.match(name):
        return "metadata"
    if not _NAME.fullmatch(name):
        return "hidden files" if name.rpartition("/")[2].startswith(".") else "files without extension"
    return None
