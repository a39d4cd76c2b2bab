"""Run timm's model of the same name on our weights: ``python timm_models.py REQUEST``.

Runs in the peers' environment, which has no Patchmill. REQUEST is a JSON file: ``names`` asks for the shapes of every
parameter of models by name; otherwise ``name`` and ``settings`` make a model, ``tensors`` is a safetensors file with
our state and ``images``, ``norm_eps`` and ``filter_eps`` replace timm's, and the logits go to the file ``logits``.
"""

import json
import sys
from pathlib import Path

import torch
from read import torchvision_without_operators
from safetensors.torch import load_file, save_file

torchvision_without_operators()
import timm  # noqa: E402


def shapes(names: list[str]) -> dict[str, dict[str, list[int]]]:
    """Return the shapes of all parameters of models, without their memory."""
    with torch.device("meta"):
        models = {name: timm.create_model(name, num_classes=1000) for name in names}
    return {name: {key: list(p.shape) for key, p in model.named_parameters()} for name, model in models.items()}


def forward(request: dict) -> None:
    """Write the logits of a model with our weights and epsilons."""
    model = timm.create_model(request["name"], **request["settings"]).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.eps = request["norm_eps"]
        elif isinstance(module, torch.nn.Conv2d) and hasattr(module, "eps"):
            module.eps = request["filter_eps"]
    tensors = load_file(request["tensors"])
    images = tensors.pop("images")
    model.to(images.dtype)
    model.load_state_dict(tensors, strict=True)
    with torch.no_grad():
        save_file({"logits": model(images)}, request["logits"])


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text())
    if "names" in asked:
        print(json.dumps(shapes(asked["names"])))
    else:
        forward(asked)
