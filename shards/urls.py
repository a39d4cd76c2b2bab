"""The parts of a URL, and what it must not carry."""

from urllib.parse import SplitResult, urlsplit

from shards.errors import UserError


def parts_of(url: str) -> SplitResult:
    """Return the parts of a URL.

    Raises:
        UserError: It cannot be read; what may be a secret is not repeated.
    """
    try:
        return urlsplit(url)
    except ValueError as error:  # whose words may quote what stands before an @
        told = "a URL cannot be read" if "@" in url or "?" in url else f"{url!r} cannot be read ({error})"
        raise UserError(f"{told}; check its host") from None


def refuse_secrets(url: str) -> None:
    """Raise a UserError, which does not repeat it, if a URL carries a password, a user or, on the web, a query.

    Tokens stand in the place of a user, and signatures in a query. In a bucket ``?`` belongs to a pattern or a name.
    """
    parts = parts_of(url)
    try:
        carries, where = "a password" if parts.password else None, f"the URL of {parts.hostname}"
        _ = parts.port
    except ValueError:  # what was to be a port: a password with a slash in it looks so
        carries, where = "a password", "a URL"
    user = parts.username is not None and not parts.scheme.startswith("abfs")  # there it is a container of Azure
    if carries is None and (user or (parts.query and parts.scheme in ("http", "https"))):
        carries = "a user or a query"
    if carries:
        raise UserError(f"{where} carries {carries}; put secrets into the environment instead")
