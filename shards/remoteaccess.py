"""Opens a remote store of ``obstore`` in the way that the settings say."""

import os
from datetime import timedelta
from typing import Any, NamedTuple

import obstore

from shards.awsprofile import AwsProfile
from shards.errors import UserError
from shards.storesettings import StoreSettings


class _Cloud(NamedTuple):
    variables: str  # what those in the environment begin with
    address: str  # obstore's name for the URL of the server


_CLOUDS = {
    "s3": _Cloud("AWS", "endpoint"),
    "gcs": _Cloud("GOOGLE", "base_url"),
    "azure": _Cloud("AZURE", "endpoint"),
}
# Variables of the environment that obstore leaves alone once it is told anything of the client.
_CLIENT = ("allow_http", "allow_invalid_certificates", "proxy_url", "root_certificate")


def open_remote(url: str, settings: StoreSettings, retry: bool = True) -> obstore.store.ObjectStore:
    """Return the store of a URL; without ``retry``, one that asks once.

    Raises:
        UserError: The profile or a variable of the environment does not fit.
        BaseError: As from ``obstore``, for a URL of no known kind.
    """
    cloud = obstore.parse_scheme(url)
    profile = AwsProfile(settings.profile) if settings.profile and cloud == "s3" else None
    server = url if cloud not in _CLOUDS else settings.endpoint or (profile and profile.endpoint) or ""
    options: dict[str, Any] = {
        "client_options": _client(cloud, settings.timeout_seconds, server),
        # Server errors, lost connections and time-outs are tried again by obstore, with exponential back-off: the time
        # decides, since ten tries are over in two seconds.
        "retry_config": {"max_retries": 1000 * retry, "retry_timeout": timedelta(seconds=settings.retry_seconds)},
    }
    if cloud in _CLOUDS:
        options["config"] = _config(cloud, settings, profile, server)
    if profile:
        options["credential_provider"] = profile
    return obstore.store.from_url(url, **options)


def _client(cloud: str, timeout_seconds: float, server: str) -> dict:
    timeout = timedelta(seconds=timeout_seconds)
    client: dict[str, Any] = {
        "connect_timeout": min(timeout, timedelta(seconds=5)),
        "read_timeout": timeout,
        "timeout": timedelta(days=1),  # of a whole request: a slow line is no fault as long as something comes
    }
    if cloud in _CLOUDS:
        variables = {key: f"{_CLOUDS[cloud].variables}_{key.upper()}" for key in _CLIENT}
        client |= {key: os.environ[name] for key, name in variables.items() if os.environ.get(name)}
    if server.startswith("http://"):
        client["allow_http"] = True
    return client


def _config(cloud: str, settings: StoreSettings, profile: AwsProfile | None, server: str) -> dict:
    config: dict = {_CLOUDS[cloud].address: server} if server else {}
    if settings.anonymous:
        config["skip_signature"] = True
    if cloud == "s3":
        _check_environment(server)
        if region := settings.region or (profile and profile.region):
            config["region"] = region
        if profile:
            config["skip_signature"] = False  # whatever the environment says
    return config


def _check_environment(server: str) -> None:
    """Refuse what ``obstore`` would take in another sense, or not survive."""
    if server and os.environ.get("AWS_ENDPOINT_URL_S3") not in (None, "", server):
        raise UserError(f"AWS_ENDPOINT_URL_S3 in the environment would go before endpoint {server}; unset one of them")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN"):
        if not (value := os.environ.get(name, "")).isascii() or not value.isprintable():
            raise UserError(f"environment variable {name} holds a line break or another odd character; set it anew")
