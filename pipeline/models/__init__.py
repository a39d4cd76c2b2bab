"""Models by name, with the parameter names of timm."""

import inspect
from typing import Any

from pydantic import TypeAdapter, ValidationError

from pipeline.models import axial, resnet, vit
from pipeline.models.initial import init_parameters
from pipeline.settings import nearest
from shards.errors import UserError

Model = vit.VisionTransformer | resnet.ResNet
"""What ``create_model`` builds; an Axial-ViT is one of the first kind."""

# name -> (class, its settings): one line a family.
MODELS: dict[str, tuple[type[Model], dict[str, Any]]] = {}
MODELS |= {name: (vit.VisionTransformer, settings) for name, settings in vit.SETTINGS.items()}
MODELS |= {name: (axial.AxialTransformer, settings) for name, settings in axial.SETTINGS.items()}
MODELS |= {name: (resnet.ResNet, settings) for name, settings in resnet.SETTINGS.items()}
BLOCKS = ("depth", "decoder_depth", "units", "backbone")
MOST_BLOCKS = 10_000


def model_names() -> list[str]:
    """Return the names that ``create_model`` knows."""
    return list(MODELS)


def create_model(name: str, *, seed: int | None = 0, **settings: Any) -> Model:
    """Build a model by name.

    Args:
        name: one of ``model_names()``, such as "vit_b16".
        seed: the first values are a function of it and of each parameter's name; None leaves the memory
            unwritten, for a caller that loads a state or writes ``initial_value`` into sharded parameters.
        **settings: override any argument of the model's class, such as ``num_classes=10`` or ``depth=6``.

    Raises:
        UserError: an unknown model or setting, a value of another type, or settings that do not fit each other.
    """
    if name not in MODELS:
        families = "; known: ViTs such as vit_b16, hybrids such as r50_vit_b16, axial_vit_b16 and the like, and BiT's "
        families += "ResNets such as bit_r50x1; docs/models.md has all of them"
        raise UserError(f"unknown model: {name!r}{nearest(name, model_names(), most=3) or families}")
    model_class, defaults = MODELS[name]
    known = inspect.signature(model_class).parameters
    for key, value in settings.items():
        if key not in known:
            hint = nearest(key, list(known), most=3) or f"; known: {', '.join(known)}"
            raise UserError(f"unknown setting of {name}: {key!r}{hint}")
        _check_type(name, key, value, known[key].annotation)
        blocks = sum(value) if isinstance(value, (list, tuple)) else value
        if key in BLOCKS and blocks is not None and blocks > MOST_BLOCKS:  # each takes time and memory, even on meta
            raise UserError(f"{key} of {name} is {value!r}, more than {MOST_BLOCKS:,} blocks; take fewer")
    try:
        model = model_class(**(defaults | settings))
    except (RuntimeError, TypeError, OverflowError) as error:  # torch's, of sizes beyond all memory
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{name} cannot be made of these settings ({why}); take smaller ones") from error
    if seed is not None:
        init_parameters(model, seed)
    return model


def _check_type(name: str, key: str, value: Any, wanted: Any) -> None:
    try:
        TypeAdapter(wanted).validate_python(value, strict=True)
    except ValidationError:
        take = inspect.formatannotation(wanted)
        raise UserError(f"{key} of {name} is {value!r}, of another type than it takes; give {take}") from None
