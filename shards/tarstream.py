"""Tars that are read once, from front to back: without a manifest, from commands, from standard input.

Stock webdataset groups their files into samples, whose labels and images are found as ``patchmill shards index`` does.
Unlike tarfile alone, which takes damage for the end of an archive, a tar that is not read to its end is an error.
"""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeGuard

from braceexpand import UnbalancedBracesError, braceexpand  # type: ignore[attr-defined]

from shards.errors import PatchmillError, UserError
from shards.header import BrokenImageError
from shards.labels import ClassNames, LabelError, LabelRule
from shards.manylabels import Accepts, Labels, refusal
from shards.storesettings import StoreSettings
from shards.tarindex import Reading
from shards.tarlist import find_tars
from shards.tarscan import BLOCK, COMPRESSED, DamagedTarError, Member

STDIN, PIPE = "-", "pipe:"
_PIECE = 1 << 20
_GRACE = 5.0  # seconds that a command gets to end


class StreamedSample(NamedTuple):
    """An encoded image and its classes, of the tar called ``tar``."""

    key: str
    tar: str
    image: bytes
    labels: Labels


class Rejected(NamedTuple):
    """A sample that cannot be used, and why."""

    key: str
    tar: str
    reason: str


class Readable(Protocol):
    """What a tar is read from."""

    def read(self, size: int, /) -> bytes:
        """Return so many bytes, or fewer at the end."""

    def close(self) -> None:
        """Let go of it."""


class Tar(NamedTuple):
    """A tar by name, and how to begin to read it."""

    name: str
    open: Callable[[], Readable]


def is_stream(source: object) -> TypeGuard[str]:
    """Tell whether a source of samples is a stream, no data set: ``-``, ``pipe:...`` or something ``.tar``."""
    return isinstance(source, str) and (
        source == STDIN or source.startswith(PIPE) or (source.endswith(".tar") and not Path(source).is_dir())
    )


def find_streams(source: str, allow_pipe: bool, settings: StoreSettings | None = None) -> list[Tar]:
    """Return the tars that a source means.

    Args:
        source: ``-``, standard input; ``pipe:COMMAND``, the output of a shell command, of several with braces as in
            ``pipe:curl -sf https://host/{000..146}.tar``; or tars as in ``find_tars``.
        allow_pipe: Commands may run.
        settings: Of the store of remote tars; by default those of the environment.

    Raises:
        UserError: There are no tars, or a command is not allowed.
    """
    if source == STDIN:
        return [Tar("standard input", lambda: open(0, "rb", buffering=0, closefd=False))]
    if not source.startswith(PIPE):
        store, paths = find_tars(source, settings)
        return [Tar(f"{store.url}/{path}", partial(store.stream, path)) for path in paths]
    if not allow_pipe:
        raise UserError(f"{source} would run a command; if you trust it, set data.allow_pipe = true")
    try:
        return [Tar(each, partial(_Command, each.removeprefix(PIPE))) for each in braceexpand(source)]
    except UnbalancedBracesError as error:
        raise UserError(f"{source}: a brace is not closed; put a backslash before one that means itself") from error


def read_samples(tar: Tar, classes: ClassNames, accepts: Accepts) -> Iterator[StreamedSample | Rejected]:
    """Yield the samples of one tar, reading it once; ``accepts`` says how many labels are right.

    Raises:
        PatchmillError: It cannot be read to its end, is damaged, or its command failed.
    """
    from webdataset.tariterators import group_by_keys, tar_file_expander  # imports torch

    reading = Reading(LabelRule())
    twice: list[Exception] = []
    try:
        with closing(_Tape(tar.open())) as tape:
            files = tar_file_expander(
                [{"url": tar.name, "stream": tape}], select_files=lambda name: reading.wants(_extension(name))
            )
            for found in group_by_keys(files, handler=lambda error: not twice.append(error)):  # type: ignore[func-returns-value]
                yield _sample(tar.name, found, bool(twice), reading, classes, accepts)
                twice.clear()
            tape.finish()
    except Exception as error:
        text = _said(error)
        if not isinstance(error, PatchmillError):
            text += "; get or make the tar again"
        kind = UserError if isinstance(error, UserError) else PatchmillError
        raise kind(text if tar.name in text else f"cannot read {tar.name}: {text}") from error


def _sample(
    tar: str, found: dict[str, Any], twice: bool, reading: Reading, classes: ClassNames, accepts: Accepts
) -> StreamedSample | Rejected:
    key = found["__key__"]
    data = {name: value for name, value in found.items() if not name.startswith("__")}
    members = [Member(extension, 0, len(value), 0, value) for extension, value in data.items()]
    try:
        if twice:
            raise BrokenImageError("two files with one extension")
        image = reading.image_of(members).data or b""
        said = reading.label.find(members)
        labels = tuple(classes.index(label) for label in said.labels)
        if wrong := refusal(len(labels), accepts):
            raise LabelError(wrong)
    except (BrokenImageError, LabelError) as error:
        return Rejected(key, tar, str(error))
    return StreamedSample(key, tar, image, (labels, tuple(said.weights)))


def _extension(name: str) -> str:
    return name.rpartition("/")[2].partition(".")[2].lower()


def _said(error: Exception) -> str:
    """Return what an error says, without what webdataset adds to it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error.args[0]).partition(" @ <")[0] if error.args else repr(error)


class _Tape:
    """A stream for ``tarfile`` that knows at its end whether that is the end of the archive too."""

    def __init__(self, stream: Readable):
        self._stream, self.close = stream, stream.close
        self._last = b""

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        if not self._last:
            for magic, packer in COMPRESSED.items():
                if data.startswith(magic):
                    raise UserError(f"it is compressed with {packer}; unpack it, as in pipe:gzip -dc x.tar.gz")
        self._last = (self._last + data)[-BLOCK:]
        return data

    def finish(self) -> None:
        """Read to the end; raises DamagedTarError if anything but zeros is there, or no zeros are."""
        while not self._last.strip(b"\0") and (data := self._stream.read(_PIECE)):
            self._last = data.strip(b"\0")[-BLOCK:]
        if self._last.strip(b"\0"):
            raise DamagedTarError(
                "it does not end as tars do: it is cut short or damaged, or more follows, such as another tar; get or "
                "make it again, or name several one by one, as in pipe:cat {000..146}.tar"
            )


class _Command:
    """The output of a shell command, for reading; that it failed is an error at the end of it."""

    def __init__(self, command: str):
        # Unbuffered, so that what a slow command has written is read at once. A session of its own, so that all
        # processes of a pipeline can be ended together.
        self._process = subprocess.Popen(
            command, 0, shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True
        )
        assert self._process.stdout is not None
        self._output = self._process.stdout

    def read(self, size: int) -> bytes:
        data = self._output.read(size)
        if not data and (code := self._process.wait()):
            raise PatchmillError(f"the command ended with exit code {code}; run it by hand to see why")
        return data

    def close(self) -> None:
        self._output.close()
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self._process.poll() is None:  # we leave before its end
                os.killpg(self._process.pid, number)
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(_GRACE)
