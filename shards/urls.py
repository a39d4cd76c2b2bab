"""What a URL must not carry."""

from urllib.parse import urlsplit

from shards.errors import UserError


def refuse_password(url: str) -> None:
    """Raise a UserError, which does not repeat it, if a URL carries a password."""
    parts = urlsplit(url)
    try:
        carries, where = bool(parts.password), f"the URL of {parts.hostname}"
        _ = parts.port
    except ValueError:  # what was to be a port: a password with a slash in it looks so
        carries, where = True, "a URL"
    if carries:
        raise UserError(f"{where} carries a password; put secrets into the environment instead")
