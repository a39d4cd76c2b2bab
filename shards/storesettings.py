"""How remote stores are reached: settings without secrets, each of which the environment may give."""

import os
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from shards.errors import UserError
from shards.urls import refuse_secrets

PREFIX = "PATCHMILL_STORE_"


class StoreSettings(BaseModel):
    """Settings of remote stores; what is not given is that of the environment: ``region`` is PATCHMILL_STORE_REGION.

    Raises:
        UserError: A variable of the environment does not fit, or there is a secret where none belongs.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    endpoint: str | None = Field(
        None, description="address of the S3, GCS or Azure server, if it is not the cloud's own"
    )
    region: str | None = Field(None, description="of S3")
    anonymous: bool = Field(False, description="sign nothing: public data")
    profile: str | None = Field(None, description="of the AWS command line's files, whose keys are used for S3")
    concurrency: int | None = Field(
        None, gt=0, description="requests of a process in flight; unset: 16 of a loader, 32 of a build"
    )
    timeout_seconds: float = Field(30, gt=0, description="without a byte, after which a request has failed")
    retry_seconds: float = Field(180, ge=0, description="for which a request that fails is tried again")

    @model_validator(mode="wrap")
    @classmethod
    def _over_the_environment(cls, given: Any, make: Callable[[Any], "StoreSettings"]) -> "StoreSettings":
        if not isinstance(given, dict):
            return make(given)
        names = {key: PREFIX + key.upper() for key in cls.model_fields}
        try:
            found = make({key: os.environ[name] for key, name in names.items() if os.environ.get(name)})
        except ValidationError as error:
            first = error.errors()[0]
            name, reason = names[str(first["loc"][0])], first["msg"].removeprefix("Value error, ")
            raise UserError(f"environment variable {name}={first['input']} does not fit: {reason}") from None
        return make(found.model_dump(exclude_unset=True) | given)

    @field_validator("endpoint")
    @classmethod
    def _without_secrets(cls, value: str | None) -> str | None:
        if value is None:
            return None
        refuse_secrets(value)
        parts = urlsplit(value)
        if "@" in value or parts.query:  # not repeated here
            raise UserError("the endpoint of a store carries a user or a query; put secrets into the environment")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("give the URL of a server, such as https://s3.example.org")
        return value.rstrip("/")

    @model_validator(mode="after")
    def _signed_or_not(self) -> "StoreSettings":
        if self.anonymous and self.profile:
            raise UserError(f"anonymous access to stores has no use for profile {self.profile!r}; unset one of them")
        return self
