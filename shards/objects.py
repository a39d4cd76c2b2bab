"""What both kinds of store say of an object: what a listing found, and the errors."""

from typing import NamedTuple

from obstore.exceptions import NotFoundError

from shards.errors import PatchmillError, UserError


class Entry(NamedTuple):
    """An object that a listing found."""

    path: str  # relative to the store
    size: int  # bytes; -1: it cannot be read, as a link to nowhere or a pipe
    changed: int  # nanoseconds since 1970, by the clock of the file system or server


class MissingError(UserError):
    """The object that was asked for is not there."""


class ShortError(UserError):
    """The object ends before the last of the bytes that were asked for."""


class ExistsError(UserError):
    """The object that was to be made is there already."""


def failure(url: str, path: str, error: Exception, start: int | None = None, length: int = 0) -> PatchmillError:
    """Return what to raise for an error on reading an object, or ``length`` bytes of it from ``start`` on."""
    where = f"{url}/{path}" + (f", bytes {start} to {start + length}" if start is not None else "")
    if isinstance(error, (FileNotFoundError, NotFoundError)):
        return MissingError(f"no object {where}; copy or build the data set again")
    if start is not None and length and any(sign in str(error) for sign in ("416 Range", "but object was only")):
        return too_short(url, path, start, length)
    return PatchmillError(f"cannot read {where}: {reason(error)}")


def too_short(url: str, path: str, start: int, length: int) -> ShortError:
    """Return what to raise where an object ends inside the bytes that were asked for."""
    return ShortError(
        f"{url}/{path} ends before byte {start + length} (asked for {length} from {start}): "
        "it is cut short or not the file that was indexed; copy, build or index the data set again"
    )


# What obstore says, and what it means to the user.
_HINTS = {
    "builder error": "for a server without TLS set AWS_ALLOW_HTTP=true in the environment",
    "//169.254.169.254/": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment, "
    "or PATCHMILL_STORE_ANONYMOUS=true for public data",
    "privileges": "check the credentials in the environment",
    "authentication": "check the credentials in the environment",
    "list request": "check the bucket",
    "error sending request": "check the network and the address",
    ", got ": "the server sends other bytes than were asked for; use another one",
    "Range request not supported": "it broke off, and the server cannot send the rest; check the network",
    "response body": "it broke off or stood still too often; check the network and the server",
}


def reason(error: Exception) -> str:
    """Return the first line of an error, and a hint; obstore adds pages of its internals below it."""
    text = str(error).strip()
    hints = [hint for sign, hint in _HINTS.items() if sign in text]
    return "; ".join([text.partition("\n")[0].rstrip(": "), *hints[:1]])
