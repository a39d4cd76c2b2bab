"""A profile in the files of the AWS command line: where its store is, and its keys, which go to ``obstore`` alone."""

import configparser
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

from shards.errors import UserError

LIFE = timedelta(minutes=30)  # then the files are read again: other programs may renew keys that expire


class AwsProfile:
    """The profile of a name; calling it gives its keys, in the form that ``obstore`` asks for.

    Attributes:
        region: As the profile says, or None.
        endpoint: The URL of its server, or None.

    Raises:
        UserError: There is no such profile, it holds no keys, or the files cannot be read.
    """

    def __init__(self, name: str):
        self.name = name
        self()
        found = self._read()
        self.region, self.endpoint = found.get("region"), found.get("endpoint_url")

    def __call__(self) -> dict:
        """Return the keys, as of now."""
        found = self._read()
        if not (found.get("aws_access_key_id") and found.get("aws_secret_access_key")):
            raise UserError(
                f"profile {self.name} holds no keys of its own; unset it, and put into the environment what "
                f"`aws configure export-credentials --profile {self.name} --format env` prints"
            )
        return {
            "access_key_id": found["aws_access_key_id"],
            "secret_access_key": found["aws_secret_access_key"],
            "token": found.get("aws_session_token"),
            "expires_at": datetime.now(UTC) + LIFE,
        }

    def _read(self) -> dict[str, str]:
        """Return the profile's settings; those of the file of credentials go before those of the other one."""
        config = Path(os.environ.get("AWS_CONFIG_FILE") or "~/.aws/config").expanduser()
        credentials = Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials").expanduser()
        settings = {name.removeprefix("profile "): table for name, table in _tables(config).items()}
        keys = _tables(credentials)
        if self.name not in settings and self.name not in keys:
            known = ", ".join(sorted(settings.keys() | keys.keys())) or "none"
            raise UserError(f"there is no profile {self.name} in {credentials} or {config}; there are: {known}")
        return settings.get(self.name, {}) | keys.get(self.name, {})


def _tables(path: Path) -> dict[str, dict[str, str]]:
    parser = configparser.ConfigParser(interpolation=None, strict=False, default_section="")
    try:
        parser.read(path, encoding="utf-8")  # nothing, if there is no such file
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; mend that") from error
    except (configparser.Error, UnicodeDecodeError):  # whose text may hold a key
        raise UserError(f"cannot read {path}: it is no file of the AWS command line; mend it") from None
    return {name: dict(parser[name]) for name in parser.sections()}
