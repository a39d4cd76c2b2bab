"""How remote stores are reached: settings without secrets, each of which the environment may give."""

import os
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ModelWrapValidatorHandler, ValidationError, model_validator

from shards.errors import UserError

PREFIX = "PATCHMILL_STORE_"


class StoreSettings(BaseModel):
    """Settings of remote stores; one that is not given is that of the environment, as PATCHMILL_STORE_RETRY_SECONDS."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    retry_seconds: float = Field(180, ge=0, description="for which a request that fails is tried again")

    @model_validator(mode="wrap")
    @classmethod
    def _over_the_environment(cls, given: Any, make: ModelWrapValidatorHandler["StoreSettings"]) -> "StoreSettings":
        if not isinstance(given, dict):
            return make(given)
        names = {key: PREFIX + key.upper() for key in cls.model_fields}
        try:
            found = make({key: os.environ[name] for key, name in names.items() if os.environ.get(name)})
        except ValidationError as error:
            first = error.errors()[0]
            name = names[first["loc"][0]]
            raise UserError(f"environment variable {name}={first['input']} does not fit: {first['msg']}") from None
        return make(found.model_dump(exclude_unset=True) | given)
