"""What every reader gives: a model's settings, and its parameters by our names, one at a time."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.config import ModelSettings
from pipeline.models import MODELS, Model, create_model
from pipeline.settings import check, override
from shards.errors import UserError

ODD = (LookupError, ValueError, TypeError, AttributeError, OverflowError, RecursionError)
"""Errors of files that anybody may have written."""


@dataclass(frozen=True)
class Source:
    """A model in any format.

    Attributes:
        format: What it is read from, in words.
        model: Settings that ``create_model`` takes, name included.
        tensor: Gives the value of a parameter by our name, in the dtype that it is kept in.
        classes: Class names in the order of the head's outputs; none if they are not known.
        note: What else is known of it, as plain JSON values.
        path: Where it is, for messages.
    """

    format: str
    model: dict[str, Any]
    tensor: Callable[[str], Tensor]
    classes: list[str] = field(default_factory=list)
    note: dict[str, Any] = field(default_factory=dict)
    path: Path = Path()

    def parameters(self) -> dict[str, Tensor]:
        """Return every parameter by name, on the meta device: shapes without values."""
        return dict(self.template().named_parameters())

    def template(self) -> Model:
        """Return the model on the meta device."""
        with torch.device("meta"):
            return create_model(**self.model, seed=None)

    def build(self) -> Model:
        """Return the model with its values, on the CPU, in float32 and evaluation mode."""
        model = create_model(**self.model, seed=None)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(self.tensor(name))
        return model.eval()


def named(family: type, found: dict[str, Any]) -> dict[str, Any]:
    """Return what was found out of a model as settings: the name whose own they are most like, and what differs.

    Args:
        family: Class of the model.
        found: Its settings without a name.
    """
    if found.get("mlp_dim") == 4 * found.get("embed_dim", 0):
        found = {key: value for key, value in found.items() if key != "mlp_dim"}
    names = [name for name, (known, _) in MODELS.items() if known is family]
    defaults = {key: each.default for key, each in inspect.signature(family).parameters.items()}

    def differs(name: str) -> dict[str, Any]:
        own = defaults | MODELS[name][1]
        return {key: value for key, value in found.items() if key not in own or value != own[key]}

    name = min(names, key=lambda name: len(differs(name)))
    kept = {key: found[key] for key in ("image_size", "num_classes") if key in found}
    return {"name": name} | differs(name) | kept


def said(options: list[str]) -> dict[str, Any]:
    """Return what a user says of a model as KEY=VALUE, in the types that its settings have.

    Raises:
        UserError: No such setting, or a value of another type.
    """
    known = override({}, options)
    size = known.pop("image_size", None)
    if size is not None and (not isinstance(size, int) or size < 1):
        raise UserError(f"image_size of --set is {size!r}; give pixels, as image_size=224")
    found = check(ModelSettings, known, "--set").overrides()
    return found | ({"image_size": size} if size else {})


def ask(where: str | Path, what: str, option: str) -> UserError:
    """Return the error for what nothing tells but the user."""
    return UserError(f"{where} does not tell {what}; say it with --set {option}")
