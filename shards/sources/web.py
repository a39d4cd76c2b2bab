"""What web servers answer to the URLs of a table: some pages are gone for good, and some send no length."""

import re
import socket
import time
from functools import lru_cache
from http.client import HTTPException
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import Request, getproxies, urlopen

from shards.errors import PatchmillError
from shards.header import BrokenImageError
from shards.storesettings import StoreSettings


@lru_cache(maxsize=10_000)
def is_unknown(host: str) -> bool:
    """Tell whether there is no such host: a retry would ask for it for minutes.

    It is not known to be so while the name service is not there itself, or where a proxy looks up names.
    """
    if {"http", "https", "all"} & getproxies().keys():
        return False
    try:
        socket.getaddrinfo(host, None)
    except socket.gaierror as error:
        return error.errno in (socket.EAI_NONAME, socket.EAI_NODATA)
    except UnicodeError:  # no name that a host could have
        return True
    return False


def refusal(error: BaseException | None) -> str | None:
    """Return why asking again will never help, in a few words; None if it might. The text of ``obstore`` tells."""
    text = str(error)
    if answer := re.search(r"non-2xx status code: (\d\d\d [^:\n]*)", text):
        return _for_good(answer[1].strip())
    if "error following redirect" in text:
        return "redirected for ever"
    if "redirect without LOCATION" in text:
        return "redirected to nowhere"
    return None


def lacks_length(error: BaseException | None) -> bool:
    """Tell whether ``obstore`` gave up since it was not told how long the body is."""
    return "Content-Length Header missing" in str(error)


def fetch(url: str) -> bytes:
    """Return the body of a page that comes without its length.

    One that only ends when the server hangs up may be cut short: the image in it tells.

    Raises:
        BrokenImageError: The server refuses for good; the message is the reason.
        PatchmillError: The network failed, in spite of retries.
    """
    request = Request(quote(url, safe="%/:=&?~#+!$,;'@()*[]"), headers={"User-Agent": "patchmill"})
    settings = StoreSettings()
    deadline = time.monotonic() + settings.retry_seconds
    attempt = -1
    while True:
        attempt += 1
        try:
            with urlopen(request, timeout=settings.timeout_seconds) as answer:
                return answer.read()
        except (OSError, HTTPException) as error:  # the first is urllib's own, too
            if isinstance(error, HTTPError) and (reason := _for_good(f"{error.code} {error.reason}")):
                raise BrokenImageError(reason) from error
            wait = min(0.1 * 2**attempt, 15)
            if time.monotonic() + wait > deadline:
                raise PatchmillError(f"cannot read {url}: {error}; check the network and the address") from error
            time.sleep(wait)


def _for_good(answer: str) -> str | None:
    """Return a status that will not change; too slow (408) and too many requests (429) may."""
    return answer if answer.startswith(("3", "4")) and answer[:3] not in ("408", "429") else None
