"""Make and open models with timm, torchvision and transformers 4 themselves: ``python foreign_models.py REQUEST``.

Runs in the peers' environment, which has no Patchmill. REQUEST is a JSON file. ``make`` is LIBRARY.NAME of a model with
``arguments``, a text such as "depth=2, num_classes=7". Without ``open``, all its parameters become random, and it is
saved to ``save`` as that library does. With ``open`` it gets the weights of that file by timm's own loader, and its
state goes to ``state``; or it is what transformers opens of that folder. Its logits of ``images`` (a safetensors file)
go to ``logits``.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from read import torchvision_without_operators
from safetensors.torch import load_file, save_file

torchvision_without_operators()
import timm  # noqa: E402
import torchvision  # noqa: E402
import transformers  # noqa: E402
from timm.models import load_checkpoint  # noqa: E402


def make(name: str, text: str) -> torch.nn.Module:
    """Return a model: "timm.NAME" of its registry, or the class of ViTs of any library."""
    (library, _, name), arguments = name.partition("."), eval(f"dict({text})")
    if library == "transformers":
        return transformers.ViTForImageClassification(transformers.ViTConfig(**arguments))
    if library == "torchvision":
        return torchvision.models.vision_transformer.VisionTransformer(**arguments)
    if name == "VisionTransformer":
        return timm.models.vision_transformer.VisionTransformer(**arguments)
    return timm.create_model(name, **arguments)


def save(model: torch.nn.Module, path: str) -> None:
    """Save a state, or as timm's training script does, a table with a state, its average and the arguments in it."""
    if isinstance(model, transformers.PreTrainedModel):
        model.save_pretrained(path)
    elif path.endswith(".safetensors"):
        save_file(model.state_dict(), path)
    elif path.endswith(".pth.tar"):
        average = {name: value + 1 for name, value in model.state_dict().items()}
        state = {"epoch": 3, "arch": "vit", "state_dict": average, "state_dict_ema": model.state_dict()}
        torch.save(state | {"args": argparse.Namespace(lr=0.1), "version": 2}, path)
    else:
        torch.save(model.state_dict(), path)


def opened(request: dict) -> torch.nn.Module:
    """Return a model with the weights of a file, or of a folder of transformers, by their own loader."""
    if Path(request["open"]).is_dir():
        return transformers.ViTForImageClassification.from_pretrained(request["open"])
    model = make(request["make"], request["arguments"])
    load_checkpoint(model, request["open"], strict=True)
    save_file(model.state_dict(), request["state"])
    return model


def made(request: dict) -> torch.nn.Module:
    """Return a model whose every parameter is random, saved."""
    model = make(request["make"], request["arguments"])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            gain = parameter.dim() == 1 and name.endswith("weight")
            parameter.normal_(1.0 if gain else 0.0, 0.2, generator=generator)
    save(model, request["save"])
    return model


def main(request: dict) -> None:
    """Do what is asked."""
    assert transformers.__version__.startswith("4."), f"Patchmill's own tests have 5, not {transformers.__version__}"
    model = (opened if "open" in request else made)(request).eval()
    with torch.no_grad():
        told = model(load_file(request["images"])["images"])
    save_file({"logits": getattr(told, "logits", told)}, request["logits"])


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
